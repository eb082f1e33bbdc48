"""Experiments need many seeds, so they are measured once and stored; `runner` runs them."""

from spark_ft.lab.experiments.runner import agrees, experiment, known, load, measure, stale

__all__ = ["agrees", "experiment", "known", "load", "measure", "stale"]
