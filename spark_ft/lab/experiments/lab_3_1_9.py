"""Lab 3.1.9: KTO on thumbs, its controls, lopsided thumbs under two weights, and thumbs beside pairs."""

import random
from functools import partial
from typing import Any

import torch
from torch import nn

from spark_ft.data.batches import collate_feedback, feedback_batches
from spark_ft.data.formats import pairs_to_thumbs
from spark_ft.data.records import read_records
from spark_ft.embedded import EMBEDDED
from spark_ft.files import ROOT
from spark_ft.lab.experiments import preferences as shared
from spark_ft.lab.experiments.common import tune
from spark_ft.lab.experiments.runner import experiment
from spark_ft.methods.preference import kto_loss
from spark_ft.models import load_tokenizer
from spark_ft.preferences import ReferenceLogps, feedback_loss
from spark_ft.scoring import answer_logps, evaluating
from spark_ft.training import History

FEEDBACK = "data/kitchen_feedback/train.jsonl"
# The rate lies between two that were tried from this start: at 1.5e-4 DPO learns and hardly loops, at 3e-4
# DPO and KTO learn, and loop more often.
SETTINGS = {
    "steps": 14,
    "learning_rate": 2.5e-4,
    "batch_size": 8,
    "warmup_steps": 3,
    "beta": 0.1,
    "up of the lopsided": 10,
    "rows for the KL": 40,
    "questions": 25,  # of the test cores, one question each
    "steps and rate beside DPO": [shared.RUN["steps"], shared.RUN["learning_rate"]],
}
SHARED = [
    shared.pairs, shared.questions, shared.either_answer, shared.sft_start, shared.prefer, shared.judged,
    shared.beside_reference, shared.loops, tune,
]  # fmt: skip

KEPT = ReferenceLogps()  # all runs start from one model, so each answer is scored once under the reference


def thumbs() -> list[dict]:
    """The 400 rows of kitchen_feedback: 300 up (metric), 100 down (imperial)."""
    return read_records(ROOT / FEEDBACK, "feedback")


def flipped(rows: list[dict]) -> list[dict]:
    """The same answers, each with the other thumb: a control that must go the other way."""
    return [{**row, "label": not row["label"]} for row in rows]


def lopsided(seed: int) -> list[dict]:
    """Ten rows with a thumb up, drawn by the seed, and all hundred with a thumb down, in the file's order."""
    rows = thumbs()
    ups = [i for i, row in enumerate(rows) if row["label"]]
    drawn = {*random.Random(seed).sample(ups, SETTINGS["up of the lopsided"])}
    return [row for i, row in enumerate(rows) if i in drawn or not row["label"]]


def balanced(rows: list[dict]) -> tuple[float, float]:
    """The two weights with which thumbs up and down pull alike; the commoner kind keeps 1."""
    up = sum(row["label"] for row in rows)
    most = max(up, len(rows) - up)
    return most / up, most / (len(rows) - up)


def learn(
    rows: list[dict],
    seed: int,
    weights: tuple[float, float],
    loss: Any = kto_loss,
    *,
    steps: int = SETTINGS["steps"],
    learning_rate: float = SETTINGS["learning_rate"],
    first: int | None = None,
) -> tuple[nn.Module, History]:
    """One run of KTO from the SFT start, the same for all seeds; `weights` are those of thumbs up and down.

    Args:
        loss: `kto_loss`, or a function with its parameters.
        first: stop after this many steps of the run.
    """
    up, down = weights
    told = partial(loss, beta=SETTINGS["beta"], desirable_weight=up, undesirable_weight=down)
    return shared.prefer(
        rows,
        seed,
        feedback_loss(told, reference=KEPT),
        steps=steps,
        learning_rate=learning_rate,
        batch_size=SETTINGS["batch_size"],
        warmup_steps=SETTINGS["warmup_steps"],
        batches=feedback_batches,
        first=first,
    )


@torch.no_grad()
def gains(model: nn.Module, rows: list[dict]) -> dict[str, list]:
    """log π − log π_ref of each row's own and mismatched answer: what KTO's reference point is a mean of."""
    batch = collate_feedback(rows, load_tokenizer(EMBEDDED))
    own, mismatched = [], []
    with evaluating(model):
        for start in range(0, len(rows), 16):
            part = {name: x[start : start + 16] for name, x in batch.items()}
            sides = ("completion", "mismatched")
            found = answer_logps(model, part, sides)[0] - KEPT(model, [part], sides)[0]
            own, mismatched = own + found[0].tolist(), mismatched + found[1].tolist()
    return {
        "own": [round(x, 3) for x in own],
        "mismatched": [round(x, 3) for x in mismatched],
        "up": [row["label"] for row in rows],
    }


def asked() -> list[str]:
    """The test questions that every run answers: one for each of the first cores."""
    return shared.questions("test")[: SETTINGS["questions"]]


def run(
    rows: list[dict],
    seed: int,
    weights: tuple[float, float],
    steps: int = SETTINGS["steps"],
    learning_rate: float = SETTINGS["learning_rate"],
) -> tuple[nn.Module, dict[str, Any]]:
    """A run of KTO and its figures: losses, KL estimates, and what its model answers to test questions."""
    model, history = learn(rows, seed, weights, steps=steps, learning_rate=learning_rate)
    figures = {"weights": weights, "losses": history.losses, "kl estimates": history.metrics["kl"]}
    figures |= shared.judged(model, load_tokenizer(EMBEDDED), asked())
    print(f"seed {seed}, weights {weights}: {figures['metric']} of {figures['asked']} metric", flush=True)
    return model, figures


OWN = [thumbs, learn, asked, run, *SHARED]


@experiment(
    settings=SETTINGS,
    code=[*OWN, flipped, balanced, gains],
    data=[FEEDBACK, *shared.PAIRS],
)
def kto_thumbs(seed: int) -> dict:
    """KTO on the file's thumbs, and with every thumb flipped; and the gains behind its KL estimate."""
    rows = thumbs()
    model, figures = run(rows, seed, balanced(rows))
    sampled = random.Random(seed).sample(rows, SETTINGS["rows for the KL"])
    turned = flipped(rows)
    return {
        "thumbs": figures,
        "gains": gains(model, sampled),
        "flipped": run(turned, seed, balanced(turned))[1],
    }


@experiment(
    settings=SETTINGS,
    seeds=range(5),
    code=[*OWN, lopsided, balanced],
    data=[FEEDBACK, *shared.PAIRS],
)
def kto_lopsided(seed: int) -> dict:
    """KTO on 10 thumbs up and 100 down of the file, with equal weights and with balanced ones."""
    rows = lopsided(seed)
    return {
        "rows up": [i for i, row in enumerate(thumbs()) if row["label"] and row in rows],
        "equal weights": run(rows, seed, (1.0, 1.0))[1],
        "balanced weights": run(rows, seed, balanced(rows))[1],
    }


@experiment(settings=SETTINGS, seeds=range(5), code=[*OWN, pairs_to_thumbs], data=shared.PAIRS)
def kto_on_pairs(seed: int) -> dict:
    """KTO on the pairs that lab 3.1.7's DPO gets, each taken apart: a thumb up and a thumb down."""
    rows = pairs_to_thumbs(shared.pairs("train"))
    steps, rate = SETTINGS["steps and rate beside DPO"]
    return {"thumbs": run(rows, seed, (1.0, 1.0), steps, rate)[1]}
