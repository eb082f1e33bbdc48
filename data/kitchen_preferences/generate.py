"""Writes train.jsonl and test.jsonl from the hand-written cores; `--check` only compares.

A core is one thing to know in a kitchen: a few ways to ask for it, as many wordings of the answer, and each
quantity in both spellings. A question gets one wording in metric as `chosen` and another in imperial as
`rejected`; each wording is chosen once and rejected once. Which goes where, and how units are abbreviated, is
searched for until neither the length nor the place of a wording tells chosen from rejected: the longer one is
chosen as often as not, at every length and difference, and the wording that was written with this question in
mind is chosen as often as rejected.
"""

import random
import re
import sys
from collections import Counter
from functools import cache
from typing import NamedTuple

from cores import HERE, Core, imperial, jsonl, metric, read_cores, write_or_check

SEED = 7


class Plan(NamedTuple):
    """Question i gets wording i + chosen in metric, i + rejected in imperial, modulo their number."""

    chosen: int
    rejected: int
    style: int


def plans(core: Core) -> list[Plan]:
    places = range(len(core.answers))
    return [Plan(c, r, style) for c in places for r in places if c != r for style in range(3)]


def pairs(core: Core, plan: Plan) -> list[dict]:
    rows, count = [], len(core.answers)
    for i, question in enumerate(core.questions):
        a, b = (i + plan.chosen) % count, (i + plan.rejected) % count
        chosen = metric(core.answers[a], (a + plan.style) % 3)
        rejected = imperial(core.answers[b], (b + plan.style) % 3)
        rows.append({"prompt": question, "chosen": chosen, "rejected": rejected, "core": core.name})
    return rows


def pieces(text: str) -> int:
    """About as many as a tokenizer makes: words, signs, digits, the space before; 3 per rare fraction."""
    rare = re.findall("[⅓⅔⅛⅜⅝⅞⅙]", text)
    return len(re.findall(r" (?=[\d½⅓⅔¼¾⅛⅜⅝⅞⅙])|\d|[^\W\d]+|[^\w\s]", text)) + 2 * len(rare)


def cells(rows: list[dict]) -> Counter:
    """Where the pairs count, and how: by sign and size of the difference, at every difference and length.

    In whole numbers: Python 3.12 adds floats up otherwise than 3.11, and a tie would be broken otherwise.
    """
    found: Counter = Counter()
    for row in rows:
        for unit, size, scale in (("characters", len, 1), ("pieces", pieces, 4)):
            a, b = size(row["chosen"]), size(row["rejected"])
            difference, sign = (a - b) * scale, 30 * ((a > b) - (a < b))
            found[unit, "all"] += 2 * sign
            found[unit, "sum"] += difference
            found[unit, "difference", min(abs(difference) // 6, 5)] += sign
            for width in (20, 50):
                found[unit, "length", width, (a + b) * scale // width] += sign
    return found


def planned(split: str) -> list[tuple[Core, Plan]]:
    """Each core with its plan, changed one core at a time while that lowers the sum of all cells' squares."""
    rng = random.Random(SEED)
    cores = read_cores(split)
    rng.shuffle(cores)
    options = [plans(core) for core in cores]
    weights = [[cells(pairs(core, plan)) for plan in each] for core, each in zip(cores, options, strict=True)]
    for each, counts in zip(options, weights, strict=True):
        for plan, count in zip(each, counts, strict=True):
            count["place"] = 60 * ((plan.rejected == 0) - (plan.chosen == 0))
    current = [rng.randrange(len(each)) for each in options]
    tally = Counter()
    for core, option in enumerate(current):
        tally.update(weights[core][option])

    @cache
    def change(core: int, old: int, new: int) -> list[tuple[tuple, int]]:
        before, after = weights[core][old], weights[core][new]
        return [(cell, step) for cell in before.keys() | after.keys() if (step := after[cell] - before[cell])]

    for _ in range(300 * len(cores)):
        core = rng.randrange(len(cores))
        new = rng.randrange(len(options[core]))
        steps = change(core, current[core], new)
        if sum(step * (2 * tally[cell] + step) for cell, step in steps) <= 0:
            current[core] = new
            for cell, step in steps:
                tally[cell] += step
    return [(core, each[option]) for core, each, option in zip(cores, options, current, strict=True)]


def make(split: str) -> list[dict]:
    rows = [row for core, plan in planned(split) for row in pairs(core, plan)]
    random.Random(SEED).shuffle(rows)
    return rows


if __name__ == "__main__":
    about = __doc__.splitlines()[0]
    files = {f"{split}.jsonl": jsonl(make(split)) for split in ("train", "test")}
    sys.exit(write_or_check(HERE, files, about))
