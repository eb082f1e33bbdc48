"""Lab 3.1.8: IPO, SimPO and ORPO where lab 3.1.7 has DPO (`dpo_kitchen`), and ORPO's imitation by itself."""

import time
from functools import partial
from typing import Any

from torch import Tensor, nn

from spark_ft.adapters import add_adapters
from spark_ft.data.batches import preference_batches
from spark_ft.data.judge import is_metric
from spark_ft.lab.experiments.common import tune
from spark_ft.lab.experiments.preferences import (
    PAIRS,
    RUN,
    START,
    beside_reference,
    either_answer,
    judged,
    loops,
    pairs,
    prefer,
    questions,
    sft_start,
)
from spark_ft.lab.experiments.runner import experiment
from spark_ft.lab.kitchen import ADAPTER
from spark_ft.memory.machine import measure
from spark_ft.memory.plan import plan_training
from spark_ft.memory.shapes import known_config
from spark_ft.methods.preference import dpo_loss, ipo_loss, orpo_loss, simpo_loss
from spark_ft.preferences import ReferenceLogps, preference_loss
from spark_ft.scoring import sequence_logps
from spark_ft.training import Loss

# What `one_rate` gave on the 20 questions of the validation cores, seed 100, 26 November 2026. Taken is the
# rate with the most good answers; where they differ by one of twenty, the one with the smaller KL.
RATES = {
    "DPO": {
        1.5e-4: {"good": 11, "metric": 15, "looping": 4, "cut": 5, "KL": 0.85},
        3e-4: {"good": 8, "metric": 17, "looping": 9, "cut": 10, "KL": 2.96},
    },
    "IPO": {
        1.5e-4: {"good": 11, "metric": 15, "looping": 4, "cut": 5, "KL": 0.83},
        3e-4: {"good": 9, "metric": 17, "looping": 8, "cut": 9, "KL": 2.86},
    },
    "SimPO": {
        1.5e-4: {"good": 11, "metric": 18, "looping": 7, "cut": 7, "KL": 0.65},
        3e-4: {"good": 10, "metric": 19, "looping": 9, "cut": 11, "KL": 3.05},
    },
    "ORPO": {
        3e-4: {"good": 12, "metric": 17, "looping": 6, "cut": 7, "KL": 0.84},
        6e-4: {"good": 13, "metric": 18, "looping": 6, "cut": 7, "KL": 2.81},
    },
}
METHODS = ("DPO", "IPO", "SimPO", "ORPO")
SHARED = [pairs, questions, either_answer, sft_start, prefer, judged, beside_reference, loops, tune]
STEPS = {name: RUN[name] for name in ("steps", "batch_size", "warmup_steps")}
TUNED = {"DPO": RUN["learning_rate"], "IPO": 1.5e-4, "SimPO": 1.5e-4, "ORPO": 3e-4, "NLL": 3e-4}
SETTINGS = {
    "beta": {"DPO": 0.1, "IPO": 1.0, "SimPO": 2.0},
    "gamma": 1.0,
    "weight": 0.1,
    "run": STEPS,
    "start": START,
    "tuned": TUNED,
}


def method_loss(method: str, reference: ReferenceLogps | None = None) -> Loss:
    """What `train` takes for a method; "NLL" is ORPO without its comparison."""
    beta = SETTINGS["beta"]
    losses = {
        "DPO": partial(dpo_loss, beta=beta["DPO"]),
        "IPO": partial(ipo_loss, beta=beta["IPO"]),
        "SimPO": partial(simpo_loss, beta=beta["SimPO"], gamma=SETTINGS["gamma"]),
        "ORPO": partial(orpo_loss, weight=SETTINGS["weight"]),
        "NLL": nll_alone,
    }
    return preference_loss(losses[method], reference=reference)


def nll_alone(chosen: Tensor, nll: Tensor) -> Tensor:
    """ORPO's imitation of the chosen texts, and nothing else."""
    return nll + 0 * chosen


def one_rate(method: str, rate: float, seed: int = 100) -> dict[str, float]:
    """A run judged on cores that nothing is trained on or tested on."""
    start, tokenizer = sft_start()
    model, _ = prefer(pairs("train"), seed, method_loss(method), learning_rate=rate, model=start, **STEPS)
    found = judged(model, tokenizer, questions("validation"))
    good = sum(is_metric(text) and not loops(text) for text in found["answers"])
    return {"good": good} | {key: found[key] for key in ("metric", "looping", "cut")} | {"KL": found["kl"]}


def tuned_run(method: str, seed: int) -> dict[str, Any]:
    """A run from lab 3.1.7's start with the method's own rate: its CPU time, and its judged test answers."""
    start, tokenizer = sft_start()
    rate, began = TUNED[method], time.process_time()
    model, run = prefer(pairs("train"), seed, method_loss(method), learning_rate=rate, model=start, **STEPS)
    seconds = time.process_time() - began
    found = judged(model, tokenizer, questions("test"))
    print(f"{method}, seed {seed}: metric {found['metric']}, KL {found['kl']:.2f}", flush=True)
    lists = {"losses": run.losses, "margin": run.metrics["margin"], "accuracy": run.metrics["accuracy"]}
    lists = {name: [float(f"{value:.5g}") for value in values] for name, values in lists.items()}
    return {"CPU seconds": seconds, **lists, **found}


@experiment(settings=SETTINGS, seeds=range(5), code=[*SHARED, method_loss, tuned_run], data=PAIRS)
def preference_methods(seed: int) -> dict:
    """IPO, SimPO and ORPO from the start that is DPO's in `dpo_kitchen`, each with its own rate."""
    return {method: tuned_run(method, seed) for method in METHODS if method != "DPO"}


@experiment(settings=SETTINGS, seeds=range(5), code=[*SHARED, method_loss, nll_alone, tuned_run], data=PAIRS)
def orpo_imitation(seed: int) -> dict:
    """ORPO's NLL alone, from the same start."""
    return {"NLL": tuned_run("NLL", seed)}


def step_costs() -> dict[str, tuple[int, float]]:
    """Peak extra bytes of one step of each method on one batch, every tensor followed, and its CPU seconds.

    A method with a reference computes its log-probabilities once for every pair, and keeps them.
    """
    model, tokenizer = sft_start()
    add_adapters(model, ADAPTER).train()
    batch = preference_batches(pairs("train"), tokenizer, STEPS["batch_size"], seed=0)(0)
    kept, found = ReferenceLogps(), {}

    def step(loss: Loss) -> float:
        began = time.process_time()
        loss(model, batch)[0].backward()
        model.zero_grad(set_to_none=True)
        return time.process_time() - began

    step(method_loss("DPO", kept))
    for name in ("DPO", "DPO, reference kept", "SimPO", "ORPO"):
        method, before = name.split(",")[0], kept if "kept" in name else None
        with measure("cpu") as memory:
            step(method_loss(method, before))
        found[name] = memory.extra, step(method_loss(method, before))
    return found


def memory_plans(name: str = "Qwen/Qwen3-8B", count: int = 2, length: int = 1024) -> dict[str, list[int]]:
    """Way of training → planned peak bytes of a DPO step and of an ORPO step, bf16, checkpointing."""
    config, peaks, copy = known_config(name), {}, 0
    for method in ("full", "lora"):
        dpo = plan_training(config, method, task="preference", batch_size=count, length=length)
        orpo = plan_training(config, method, batch_size=2 * count, length=length, loss=_orpo_step)
        peaks[method] = [dpo.peak, orpo.peak]
        copy = max(copy, dpo.terms.get("reference model", 0))  # full fine-tuning has a second model
    with_adapters_off, without = peaks["lora"]
    return {
        "LoRA, reference loaded as a second model": [with_adapters_off + copy, without],
        "LoRA, reference with the adapter off": [with_adapters_off, without],
        "full fine-tuning, reference a second model": peaks["full"],
    }


def _orpo_step(model: nn.Module, rows: dict[str, Tensor]) -> tuple[Tensor, int]:
    """ORPO on rows of which the first half is chosen."""
    logps, tokens = sequence_logps(model, rows)
    chosen, rejected = (logps / tokens).chunk(2)
    return orpo_loss(chosen, rejected, -chosen).sum(), len(chosen)
