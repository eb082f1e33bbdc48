"""Experiments: functions of a seed whose figures are measured once per seed and stored with their origin.

    python -m spark_ft.lab.experiments              every experiment; stored seeds are not run again
    python -m spark_ft.lab.experiments lora_rank    one experiment
    python -m spark_ft.lab.experiments --jobs 2     two seeds at a time, one thread each: more seeds per hour

Each lab has a module, `lab_3_1_N.py`; figures are stored in `data/measurements/NAME.json`.
"""

import argparse
import ast
import datetime
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import platform
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from spark_ft.files import ROOT, sha256, write_atomically

MEASUREMENTS = ROOT / "data" / "measurements"
EXPERIMENTS: dict[str, "Experiment"] = {}


@dataclass(frozen=True)
class Experiment:
    """A function of the seed and all that its figures depend on; calling it runs one seed."""

    name: str
    run: Callable[..., dict[str, Any]]
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    code: tuple[Callable, ...]
    data: tuple[str, ...]

    def __call__(self, seed: int, **options: Any) -> dict[str, Any]:
        return self.run(seed, **options)

    @property
    def hash(self) -> str:
        """SHA-256 of the code (without comments, docstrings and layout), the settings and the data files."""
        sources = [_code(function) for function in (self.run, *self.code)]
        files = {path: sha256(ROOT / path) for path in self.data}
        return hashlib.sha256(
            json.dumps([sources, self.settings, files], sort_keys=True).encode()
        ).hexdigest()


def _code(function: Callable) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tree.body[0].decorator_list = []  # more seeds make no stored seed stale
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def experiment(
    *,
    settings: Any = None,
    seeds: Sequence[int] = (0, 1, 2),
    code: Sequence[Callable] = (),
    data: Sequence[str] = (),
) -> Callable[[Callable[..., dict]], Experiment]:
    """Register a function `run(seed) -> dict of figures` (what JSON can hold) under its own name.

    Args:
        settings: a dict or dataclass of what `run` was told; stored beside the figures and part of the hash.
        seeds: three at least, five where they fit.
        code: the helpers of its own that `run` calls; a change in them makes the stored figures stale.
        data: the files it reads, relative to the repository root.
    """

    def register(run: Callable[..., dict]) -> Experiment:
        values = json.loads(json.dumps(asdict(settings) if is_dataclass(settings) else settings or {}))
        EXPERIMENTS[run.__name__] = Experiment(
            run.__name__, run, values, tuple(seeds), tuple(code), tuple(data)
        )
        return EXPERIMENTS[run.__name__]

    return register


class Measurement(dict):
    """A stored experiment: its JSON, and shortcuts to the figures in it."""

    def figures(self, seed: int) -> dict[str, Any]:
        """One seed's figures."""
        return next(run["figures"] for run in self["runs"] if run["seed"] == seed)

    def values(self, *path: str | int) -> list[Any]:
        """One figure of every seed, named by the keys that lead to it: ready for `mean_interval`."""
        found = [run["figures"] for run in self["runs"]]
        for key in path:
            found = [figures[str(key) if isinstance(figures, dict) else key] for figures in found]
        return found

    def origin(self) -> str:
        """One line for a figure's caption: seeds, machine, threads, date."""
        count, last = len(self["runs"]), self["runs"][-1]
        return f"stored: {count} seeds, {last['machine']}, {last['threads']} thread(s), {last['date']}"


def load(name: str) -> Measurement:
    """The stored figures of an experiment.

    Raises:
        FileNotFoundError: it was never run.
    """
    path = MEASUREMENTS / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"data/measurements/{name}.json: no such file; `make experiments ARGS={name}` measures it"
        )
    return Measurement(json.loads(path.read_text(encoding="utf-8")))


def stale(name: str) -> str | None:
    """Why a stored measurement no longer belongs to its experiment, or None."""
    found = known()
    if name not in found:
        return (
            f"{name}.json: no experiment in spark_ft/lab/experiments has this name; delete it, or restore it"
        )
    again = f"run `make experiments ARGS={name}`"
    if not (MEASUREMENTS / f"{name}.json").is_file():
        return f"{name} was never measured; {again}"
    stored = load(name)
    if stored["hash"] != found[name].hash:
        return f"{name}: its code, settings or data changed since it was measured; {again}"
    missing = set(found[name].seeds) - {run["seed"] for run in stored["runs"]}
    return f"{name}: seeds {sorted(missing)} were not measured; {again}" if missing else None


def agrees(live: Sequence[float], stored: Sequence[float], rel: float = 0.02) -> str:
    """Compare a live run's losses with the stored ones of the same seed, and say how near they are.

    Args:
        live, stored: losses, step by step.
        rel: largest relative difference allowed; rounding grows with every step, so compare the first few.

    Raises:
        AssertionError: they differ by more: another model, other data, or another training loop.
    """
    pairs = list(zip(live, stored, strict=False))
    assert pairs, "nothing to compare: one of the two has no losses"
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    said = f"the first {len(pairs)} losses differ from the stored run's by at most {worst:.2g} (relative)"
    assert worst <= rel, f"{said}, more than {rel:g}: another model, other data, or another training loop"
    return said


def known() -> dict[str, Experiment]:
    """Every experiment by name; imports the modules in `spark_ft.lab.experiments`."""
    from spark_ft.lab import experiments

    for module in pkgutil.iter_modules(experiments.__path__):
        if module.name.startswith("lab_"):
            importlib.import_module(f"{experiments.__name__}.{module.name}")
    return EXPERIMENTS


def measure(experiment: Experiment, jobs: int = 1) -> Measurement:
    """Run the seeds that are not stored yet, storing each as it ends; figures of other code are dropped.

    Args:
        jobs: seeds to run at a time; more than one are processes of one thread each.
    """
    path = MEASUREMENTS / f"{experiment.name}.json"
    stored = load(experiment.name) if path.is_file() else {}
    runs = stored["runs"] if stored.get("hash") == experiment.hash else []
    result = Measurement(
        experiment=experiment.name, hash=experiment.hash, settings=experiment.settings, runs=runs
    )
    missing = [seed for seed in experiment.seeds if all(run["seed"] != seed for run in runs)]
    for hash_now, run, seconds in (
        _in_turn(experiment, missing) if jobs == 1 else _side_by_side(experiment, missing, jobs)
    ):
        if hash_now != result["hash"]:
            raise RuntimeError(
                f"{experiment.name}: code, settings or data changed while seed {run['seed']} ran; run again"
            )
        runs.append(run)
        runs.sort(key=lambda run: run["seed"])
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        print(f"{experiment.name}: seed {run['seed']} stored after {seconds:.0f} s", flush=True)
    return result


Ran = tuple[str, dict[str, Any], float]  # the experiment's hash after the run, the run, its seconds


def _in_turn(experiment: Experiment, seeds: Sequence[int]) -> Iterator[Ran]:
    for seed in seeds:
        started = time.perf_counter()
        run = {"seed": seed, "figures": experiment(seed), **_origin()}
        yield experiment.hash, run, time.perf_counter() - started


def _side_by_side(experiment: Experiment, seeds: Sequence[int], jobs: int) -> Iterator[Ran]:
    one_thread = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }  # read when a process starts; else threads fight
    before = {name: os.environ.get(name) for name in one_thread}
    os.environ.update(one_thread)
    try:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            runs = [pool.submit(_one_seed, experiment.name, seed) for seed in seeds]
            for run in as_completed(runs):
                yield run.result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _one_seed(name: str, seed: int) -> Ran:
    torch.set_num_threads(1)
    return next(_in_turn(known()[name], [seed]))


def _origin() -> dict[str, Any]:
    """Where and with what a seed was run; names no host and no folder."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    chip = names[0] if names else platform.processor() or platform.machine()
    if torch.cuda.is_available():
        chip = f"{torch.cuda.get_device_name()}, {chip}"
    packages = ("spark-ft", "torch", "transformers", "accelerate")
    return {
        "machine": f"{chip}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "date": datetime.date.today().isoformat(),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m spark_ft.lab.experiments", description="Measure and store."
    )
    parser.add_argument("names", nargs="*", help="experiments to run; default: all")
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds to run at a time, a process of one thread each (1)"
    )
    options = parser.parse_args(arguments)
    chosen, found = options.names, known()
    if unknown := set(chosen) - set(found):
        parser.error(
            f"no experiment is called {', '.join(sorted(unknown))}; there are {', '.join(found) or 'none'}"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("SPARK_FT_PROFILE", "laptop")
    for name in chosen or found:
        measure(found[name], options.jobs)
    return 0
