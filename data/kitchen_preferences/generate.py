"""Writes train.jsonl and test.jsonl from the hand-written cores; `--check` only compares.

A core is one thing to know in a kitchen: a few ways to ask for it, as many wordings of the answer, and each quantity in
both spellings. Question i gets wording i in metric as `chosen` and another wording in imperial as `rejected`, so that
each wording is chosen once and rejected once, and length says nothing about which it is.
"""

import random
import sys

from cores import HERE, Core, imperial, jsonl, metric, read_cores, write_or_check

SEED = 7


def pairs(core: Core, shift: int) -> list[dict]:
    count = len(core.questions)
    return [
        {
            "prompt": core.questions[i],
            "chosen": metric(core.answers[i], long=i == 1),
            "rejected": imperial(core.answers[(i + shift) % count], long=(i + shift) % count == 1),
            "core": core.name,
        }
        for i in range(count)
    ]


def lean(rows: list[dict]) -> int:
    """How many more pairs have the longer text chosen than rejected."""
    return sum((len(row["chosen"]) > len(row["rejected"])) - (len(row["chosen"]) < len(row["rejected"])) for row in rows)


def make(split: str) -> list[dict]:
    """The split's pairs; each core's shift is the one that keeps the count of longer chosen near the half."""
    rng = random.Random(SEED)
    cores = read_cores(split)
    rng.shuffle(cores)
    rows: list[dict] = []
    for core in cores:
        options = [pairs(core, shift) for shift in range(1, len(core.questions))]
        rng.shuffle(options)
        rows += min(options, key=lambda option: abs(lean(rows) + lean(option)))
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    about = __doc__.splitlines()[0]
    sys.exit(write_or_check(HERE, {f"{split}.jsonl": jsonl(make(split)) for split in ("train", "test")}, about))
