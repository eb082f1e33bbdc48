"""Preference rows from a model's own answers: judge them, pair good with bad, balance the lengths."""

import math
from collections.abc import Callable, Sequence
from statistics import mean

from spark_ft.data.records import Record
from spark_ft.stats import Estimate, wilson_interval

Length = Callable[[str], int]


def judged_pairs(
    prompts: Sequence[str], answers: Sequence[Sequence[str]], judge: Callable[[str], bool]
) -> list[Record]:
    """A preference row for each good and each bad answer to the same prompt.

    Args:
        prompts: P of them.
        answers: for each prompt its answers, as `sample` draws them; empty ones and repeats are left out.
        judge: whether an answer is good.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(answers)} lists of answers for {len(prompts)} prompts; give one for each")
    pairs = []
    for prompt, drawn in zip(prompts, answers, strict=True):
        good = {text: judge(text) for text in dict.fromkeys(drawn) if text.strip()}
        pairs += [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for chosen in good
            for rejected in good
            if good[chosen] and not good[rejected]
        ]
    return pairs


def balance_lengths(pairs: Sequence[Record], length: Length = len, tolerance: float = 0.05) -> list[Record]:
    """At most one row per prompt, so chosen that length does not tell the better answer, lest it be learned.

    Of each prompt's rows the one nearest to equal lengths is taken. Then as many with the longer answer
    chosen are kept as with the shorter, and the most unequal go until |Σ len(chosen) / Σ len(rejected) − 1| ≤
    tolerance. Rows of equal length all stay.

    Args:
        length: of a text; characters by default, or `lambda text: len(tokenizer(text).input_ids)`.
        tolerance: how far the ratio of mean lengths may be from 1.
    """

    def gap(pair: Record) -> int:
        return length(pair["chosen"]) - length(pair["rejected"])

    nearest: dict[str, Record] = {}
    for pair in pairs:
        asked = str(pair["prompt"])  # a list of messages, perhaps
        if asked not in nearest or abs(gap(pair)) < abs(gap(nearest[asked])):
            nearest[asked] = pair
    ordered = sorted(nearest.values(), key=lambda pair: abs(gap(pair)))
    longer, shorter = ([pair for pair in ordered if sign * gap(pair) > 0] for sign in (1, -1))
    count = min(len(longer), len(shorter))
    longer, shorter = longer[:count], shorter[:count]
    kept = [pair for pair in ordered if gap(pair) == 0]
    while longer and abs(length_ratio(kept + longer + shorter, length) - 1) > tolerance:
        over = sum(map(gap, longer + shorter)) > 0
        (longer if over else shorter).pop()  # the most unequal of the heavier side,
        (shorter if over else longer).pop(0)  # and the least unequal of the other: the numbers stay equal
    chosen = {id(pair) for pair in kept + longer + shorter}
    return [pair for pair in pairs if id(pair) in chosen]


def length_ratio(pairs: Sequence[Record], length: Length = len) -> float:
    """Mean length of the chosen answers over that of the rejected ones; 1 is balanced."""
    if not pairs:
        return math.nan
    return mean(length(pair["chosen"]) for pair in pairs) / mean(length(pair["rejected"]) for pair in pairs)


def length_baseline(pairs: Sequence[Record], length: Length = len) -> Estimate:
    """How often the longer answer is the chosen one, with its interval; rows of equal length are left out.

    An interval that contains one half: neither "take the longer" nor "take the shorter" finds the chosen
    answer.

    Raises:
        ValueError: no row has answers of different length.
    """
    gaps = [length(pair["chosen"]) - length(pair["rejected"]) for pair in pairs]
    if not any(gaps):
        raise ValueError("no row has answers of different lengths; length could tell nothing")
    return wilson_interval(sum(gap > 0 for gap in gaps), sum(gap != 0 for gap in gaps))
