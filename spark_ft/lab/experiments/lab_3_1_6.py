"""Lab 3.1.6: a training set into which test rows leaked, against a clean one of the same size."""

import random
from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

from spark_ft.embedded import EMBEDDED
from spark_ft.lab.experiments.common import TEST, TRAIN, held_out, tune
from spark_ft.lab.experiments.runner import experiment
from spark_ft.lab.kitchen import ADAPTER, tickets, with_shuffled_answers
from spark_ft.models import load_tokenizer
from spark_ft.training import History

# Chosen on validation rows in place of the test rows, seeds 100 and 101: of 16, 24 and 32 rows in 14 to 24
# steps (half of the rows leaked), the smallest in which leaked rows stood out. No test row was used before
# the figures were stored.
RUN = {"steps": 14, "learning_rate": 2e-3, "batch_size": 4, "warmup_steps": 3}
SETTINGS = {**RUN, "rows": 16, "leaked": 8, "untouched": 40, "adapter": asdict(ADAPTER)}


def draw(seed: int) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """Training sets of one size, and the test rows; the seed draws all rows.

    In "leaked", test rows with their tickets replace half of "clean"'s rows. In "wrong tickets" the same
    notes leak, each with another's ticket.
    """
    rng = random.Random(seed)
    clean = rng.sample(tickets("train"), SETTINGS["rows"])
    seen = [row for row in tickets("test") if row["phrasing"] == "seen"]
    test = rng.sample(seen, SETTINGS["leaked"] + SETTINGS["untouched"])
    leaked, untouched = test[: SETTINGS["leaked"]], test[SETTINGS["leaked"] :]
    rest = clean[SETTINGS["leaked"] :]
    sets = {
        "clean": clean,
        "leaked": leaked + rest,
        "wrong tickets": with_shuffled_answers(leaked, seed) + rest,
    }
    return sets, {"leaked rows": leaked, "untouched rows": untouched}


def tune_drawn(rows: Sequence[dict], seed: int, first: int | None = None) -> tuple[nn.Module, History]:
    """The embedded model with LoRA of rank 16, trained on one of the sets."""
    return tune(rows, seed, first=first, **RUN)


@experiment(
    settings=SETTINGS,
    seeds=(0, 1, 2, 3, 4),
    code=[tickets, draw, tune, tune_drawn, held_out, with_shuffled_answers],
    data=[TRAIN, TEST],
)
def leaked_test_rows(seed: int) -> dict:
    """Losses of each training set, and its model's scores on leaked and on untouched rows."""
    tokenizer = load_tokenizer(EMBEDDED)
    sets, tests = draw(seed)
    figures = {}
    for name, records in sets.items():
        model, history = tune_drawn(records, seed)
        scores = {which: held_out(model, tokenizer, rows) for which, rows in tests.items()}
        figures[name] = {"losses": history.losses, **scores}
        right = ", ".join(f"{which} {score['exact match']:.0%}" for which, score in scores.items())
        print(f"{name}, seed {seed}: {right}", flush=True)
    return figures
