"""Writes train.jsonl and test.jsonl from the hand-written cores; `--check` only compares.

A core is one thing to know in a kitchen: a few ways to ask for it, as many wordings of the answer, and each quantity in
both spellings. Question i gets wording i in metric as `chosen` and another wording in imperial as `rejected`, so that
each wording is chosen once and rejected once. Which other one, and how units are abbreviated, is searched for until
length does not tell chosen from rejected: the longer one is chosen as often as not, at every length and difference.
"""

import random
import re
import sys

from cores import HERE, Core, imperial, jsonl, metric, read_cores, write_or_check

SEED = 7


def pairs(core: Core, shift: int, style: int) -> list[dict]:
    rows = []
    for i, question in enumerate(core.questions):
        j = (i + shift) % len(core.answers)
        chosen, rejected = metric(core.answers[i], (i + style) % 3), imperial(core.answers[j], (j + style) % 3)
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


def make(split: str) -> list[dict]:
    """The split's pairs: one of six ways to pair up each core, changed one core at a time while that helps the balance."""
    rng = random.Random(SEED)
    cores = read_cores(split)
    rng.shuffle(cores)
    options = [[pairs(core, s, t) for s in range(1, len(core.questions)) for t in range(3)] for core in cores]
    weights = [[cells(rows) for rows in each] for each in options]
    chosen = [rng.randrange(len(each)) for each in options]
    tally: dict[tuple, float] = {}

    def count(core: int, sign: int) -> None:
        for cell, weight in weights[core][chosen[core]]:
            tally[cell] = tally.get(cell, 0.0) + sign * weight

    def imbalance() -> float:
        return sum(value * value for value in tally.values())

    for core in range(len(cores)):
        count(core, 1)
    for _ in range(200 * len(cores)):
        core, before = rng.randrange(len(cores)), imbalance()
        old = chosen[core]
        count(core, -1)
        chosen[core] = rng.randrange(len(options[core]))
        count(core, 1)
        if imbalance() > before:
            count(core, -1)
            chosen[core] = old
            count(core, 1)
    rows = [row for each, option in zip(options, chosen, strict=True) for row in each[option]]
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    about = __doc__.splitlines()[0]
    sys.exit(write_or_check(HERE, {f"{split}.jsonl": jsonl(make(split)) for split in ("train", "test")}, about))
