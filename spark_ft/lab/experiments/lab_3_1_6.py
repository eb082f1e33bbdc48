"""Lab 3.1.6: a training set into which test rows leaked, against a clean one of the same size."""

import random
from collections.abc import Sequence

import torch
from torch import nn

from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.data.batches import sft_batches
from spark_ft.data.records import read_records
from spark_ft.embedded import EMBEDDED
from spark_ft.files import ROOT
from spark_ft.lab.experiments.lab_3_1_1 import held_out
from spark_ft.lab.experiments.runner import experiment
from spark_ft.lab.kitchen import with_shuffled_answers
from spark_ft.models import load_model
from spark_ft.scoring import sft_loss
from spark_ft.training import History, TrainConfig, train

TRAIN, TEST = "data/kitchen_tickets/train.jsonl", "data/kitchen_tickets/test.jsonl"
# Chosen on *validation* rows in the place of the test rows, seeds 100 and 101: of 16, 24 and 32 rows in 14 to 24 steps (half of
# the rows leaked) the smallest whose leaked rows were told apart. No test row was looked at before the figures were stored.
SETTINGS = {
    "rows": 16,
    "leaked": 8,
    "untouched": 40,
    "rank": 16,
    "alpha": 32.0,
    "steps": 14,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_steps": 3,
}


def draw(seed: int) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """(training sets of one size, test rows): "leaked" has half of "clean"'s rows replaced by test rows, tickets and all;
    "wrong tickets" has the same notes leaked, each with another's ticket. The seed draws all rows."""
    rng = random.Random(seed)
    clean = rng.sample(read_records(ROOT / TRAIN, "sft"), SETTINGS["rows"])
    seen = [row for row in read_records(ROOT / TEST, "sft") if row["phrasing"] == "seen"]
    test = rng.sample(seen, SETTINGS["leaked"] + SETTINGS["untouched"])
    leaked, untouched = test[: SETTINGS["leaked"]], test[SETTINGS["leaked"] :]
    rest = clean[SETTINGS["leaked"] :]
    sets = {
        "clean": clean,
        "leaked": leaked + rest,
        "wrong tickets": with_shuffled_answers(leaked, seed) + rest,
    }
    return sets, {"leaked rows": leaked, "untouched rows": untouched}


def tune(records: Sequence[dict], seed: int, steps: int = SETTINGS["steps"]) -> tuple[nn.Module, History]:
    """The embedded model with LoRA, trained on these rows; the seed draws A and the order of the rows."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
    torch.manual_seed(seed)
    add_adapters(model, AdapterConfig(rank=SETTINGS["rank"], alpha=SETTINGS["alpha"]))
    config = TrainConfig(
        steps, SETTINGS["learning_rate"], warmup_steps=SETTINGS["warmup_steps"], seed=seed, progress=False
    )
    return model, train(
        model, sft_batches(records, tokenizer, SETTINGS["batch_size"], seed), sft_loss, config
    )


@experiment(
    settings=SETTINGS,
    seeds=(0, 1, 2, 3, 4),
    code=[draw, tune, held_out, with_shuffled_answers],
    data=[TRAIN, TEST],
)
def leaked_test_rows(seed: int) -> dict:
    """Losses of each training set, and how its model scores on the rows that leaked and on those that did not."""
    _, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
    sets, tests = draw(seed)
    figures = {}
    for name, records in sets.items():
        model, history = tune(records, seed)
        scores = {which: held_out(model, tokenizer, rows) for which, rows in tests.items()}
        figures[name] = {"losses": history.losses, **scores}
        print(
            f"{name}, seed {seed}: " + ", ".join(f"{w} {s['exact match']:.0%}" for w, s in scores.items()),
            flush=True,
        )
    return figures
