"""Lab 3.1.7: DPO from the SFT start, on shuffled labels, at several β; and a rate that fools the judge."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from spark_ft.adapters import adapters_disabled
from spark_ft.data.batches import with_prompt
from spark_ft.data.judge import is_metric
from spark_ft.embedded import EMBEDDED
from spark_ft.lab.experiments.common import tune
from spark_ft.lab.experiments.preferences import (
    PAIRS,
    RUN,
    START,
    START_SEED,
    beside_reference,
    either_answer,
    judged,
    loops,
    pairs,
    prefer,
    questions,
    sft_start,
    with_shuffled_labels,
)
from spark_ft.lab.experiments.runner import experiment
from spark_ft.methods.preference import dpo_loss
from spark_ft.models import load_tokenizer
from spark_ft.preferences import ReferenceLogps, preference_loss
from spark_ft.scoring import sequence_logps
from spark_ft.training import History

SETTINGS = {
    "start": {**START, "seed": START_SEED},
    **RUN,
    "beta": 0.1,
    "other betas": [1.0, 5.0],
    "questions of the sweep": 25,
    "learning_rate that fools the judge": 1e-3,
}
SHARED = [pairs, questions, either_answer, sft_start, prefer, judged, beside_reference, loops, tune]
SHARED += [is_metric, dpo_loss]
KEPT = ReferenceLogps()  # all runs here have one reference


def tune_dpo(
    seed: int,
    beta: float = SETTINGS["beta"],
    *,
    learning_rate: float = SETTINGS["learning_rate"],
    shuffled: bool = False,
    loss: Any = dpo_loss,
    first: int | None = None,
) -> tuple[nn.Module, History]:
    """The SFT start trained on the pairs; the reference's numbers are kept for the runs after it."""
    rows = with_shuffled_labels(pairs("train"), seed) if shuffled else pairs("train")
    step = preference_loss(partial(loss, beta=beta), reference=KEPT)
    return prefer(rows, seed, step, learning_rate=learning_rate, first=first)


def followed(history: History) -> dict[str, list[float]]:
    """A run's losses and metrics, at five digits."""
    lists = {"losses": history.losses, **history.metrics}
    return {name: [float(f"{value:.5g}") for value in values] for name, values in lists.items()}


@cache
def before() -> dict[str, Any]:
    """What the start answers, the same for every seed."""
    return judged(*sft_start(), questions("test"))


@experiment(
    settings=SETTINGS,
    seeds=(0, 1, 2, 3, 4),
    code=[*SHARED, before, tune_dpo, followed, with_shuffled_labels],
    data=PAIRS,
)
def dpo_kitchen(seed: int) -> dict:
    """What the start answers, and the same start after DPO on true and on shuffled labels."""
    asked = questions("test")
    figures = {"before": before()}
    for name, shuffled in (("DPO", False), ("shuffled labels", True)):
        model, history = tune_dpo(seed, shuffled=shuffled)
        figures[name] = {**followed(history), **judged(model, load_tokenizer(EMBEDDED), asked)}
        print(f"{name}, seed {seed}: {figures[name]['metric']} of {len(asked)} metric", flush=True)
    return figures


@experiment(settings=SETTINGS, code=[*SHARED, tune_dpo, followed], data=PAIRS)
def dpo_beta(seed: int) -> dict:
    """The same run at higher β, judged on the first questions; `dpo_kitchen` has β = 0.1."""
    asked = questions("test")[: SETTINGS["questions of the sweep"]]
    figures = {}
    for beta in SETTINGS["other betas"]:
        model, history = tune_dpo(seed, beta)
        figures[str(beta)] = {**followed(history), **judged(model, load_tokenizer(EMBEDDED), asked)}
        print(f"beta {beta}, seed {seed}: {figures[str(beta)]['kl']:.2f} nats per answer", flush=True)
    return figures


@experiment(settings=SETTINGS, code=[*SHARED, tune_dpo, followed], data=PAIRS)
def dpo_fooled(seed: int) -> dict:
    """The same run at a rate that is far too high."""
    model, history = tune_dpo(seed, learning_rate=SETTINGS["learning_rate that fools the judge"])
    figures = {**followed(history), **judged(model, load_tokenizer(EMBEDDED), questions("test"))}
    print(f"too high a rate, seed {seed}: {figures['metric']} of {figures['asked']} metric", flush=True)
    return figures


def plain_pair_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """DPO as it is first written: each answer by itself, and the reference anew in every step."""
    sides = [with_prompt(batch, side) for side in ("chosen", "rejected")]
    policy = [sequence_logps(model, side)[0] for side in sides]
    with torch.no_grad(), adapters_disabled(model):
        reference = [sequence_logps(model, side)[0] for side in sides]
    losses = dpo_loss(*policy, *reference, beta=SETTINGS["beta"])
    return losses.sum(), len(losses)
