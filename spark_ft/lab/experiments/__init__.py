"""Experiments: what needs many seeds is measured once and stored. `runner` runs them; a module per lab holds them."""

from spark_ft.lab.experiments.runner import agrees, experiment, known, load, measure, stale

__all__ = ["agrees", "experiment", "known", "load", "measure", "stale"]
