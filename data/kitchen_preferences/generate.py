"""Writes train.jsonl and test.jsonl from the hand-written cores; `--check` only compares.

A core is one thing to know in a kitchen: a few ways to ask for it, as many wordings of the answer, and each quantity in
both spellings. A question gets one wording in metric as `chosen` and another in imperial as `rejected`; each wording is
chosen once and rejected once. Which goes where, and how units are abbreviated, is searched for until neither the length
nor the place of a wording tells chosen from rejected: the longer one is chosen as often as not, at every length and
difference, and the wording that was written with this question in mind is chosen as often as rejected.
"""

import random
import re
import sys
from typing import NamedTuple

from cores import HERE, Core, imperial, jsonl, metric, read_cores, write_or_check

SEED = 7


class Plan(NamedTuple):
    """Question i gets wording i + chosen in metric and wording i + rejected in imperial, modulo their number."""

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
    """About as many as a tokenizer makes: words, signs, digits one by one, the space before them, rare fractions thrice."""
    return len(re.findall(r" (?=[\d½⅓⅔¼¾⅛⅜⅝⅞⅙])|\d|[^\W\d]+|[^\w\s]", text)) + 2 * len(re.findall("[⅓⅔⅛⅜⅝⅞⅙]", text))


def cells(rows: list[dict]) -> list[tuple[tuple, float]]:
    """Where a pair counts, and how: +1 if chosen is longer and -1 if shorter, by difference and by length."""
    found: list[tuple[tuple, float]] = []
    for row in rows:
        for unit, size, scale in (("characters", len, 1.0), ("pieces", pieces, 4.0)):
            a, b = size(row["chosen"]), size(row["rejected"])
            difference, sign = (a - b) * scale, (a > b) - (a < b)
            found.append(((unit, "all"), 2 * sign))
            found.append(((unit, "sum"), difference / 30))
            found.append(((unit, "difference", min(int(abs(difference)) // 6, 5)), sign))
            found += [((unit, "length", width, int((a + b) * scale) // width), sign) for width in (20, 50)]
    return found


def planned(split: str) -> list[tuple[Core, Plan]]:
    """Each core with its plan, changed one core at a time for as long as that helps the balance."""
    rng = random.Random(SEED)
    cores = read_cores(split)
    rng.shuffle(cores)
    options = [plans(core) for core in cores]
    weights = [
        [cells(pairs(core, plan)) + [("place", (plan.rejected == 0) - (plan.chosen == 0))] * 2 for plan in each]
        for core, each in zip(cores, options, strict=True)
    ]
    current = [rng.randrange(len(each)) for each in options]
    tally: dict = {}

    def count(core: int, sign: int) -> None:
        for cell, weight in weights[core][current[core]]:
            tally[cell] = tally.get(cell, 0.0) + sign * weight

    def imbalance() -> float:
        return sum(value * value for value in tally.values())

    for core in range(len(cores)):
        count(core, 1)
    for _ in range(300 * len(cores)):
        core, before = rng.randrange(len(cores)), imbalance()
        old = current[core]
        count(core, -1)
        current[core] = rng.randrange(len(options[core]))
        count(core, 1)
        if imbalance() > before:
            count(core, -1)
            current[core] = old
            count(core, 1)
    return [(core, each[option]) for core, each, option in zip(cores, options, current, strict=True)]


def make(split: str) -> list[dict]:
    rows = [row for core, plan in planned(split) for row in pairs(core, plan)]
    random.Random(SEED).shuffle(rows)
    return rows


if __name__ == "__main__":
    about = __doc__.splitlines()[0]
    sys.exit(write_or_check(HERE, {f"{split}.jsonl": jsonl(make(split)) for split in ("train", "test")}, about))
