"""Pairs from sampled answers: the judge decides who wins, length does not."""

import random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_ft.data.judge import is_metric
from spark_ft.data.pairs import balance_lengths, judged_pairs, length_baseline, length_ratio


def pair(prompt, chosen, rejected):
    return {"prompt": f"p{prompt}", "chosen": "c" * chosen, "rejected": "r" * rejected}


def test_judged_pairs_are_all_good_against_bad_and_balance_takes_the_most_equal_ones():
    answers = [["30 g", "1 cup", "40 g", "30 g", " "], ["1 cup", "2 cups"], []]
    found = judged_pairs(["a", "b", "c"], answers, is_metric)
    assert found == [{"prompt": "a", "chosen": good, "rejected": "1 cup"} for good in ("30 g", "40 g")]
    with pytest.raises(ValueError, match="2 lists of answers for 1 prompts; give one for each"):
        judged_pairs(["a"], answers[:2], is_metric)
    rows = (0, 90, 50), (0, 52, 50), (1, 80, 50), (2, 51, 50), (3, 50, 53), (4, 50, 50)
    pairs = [pair(*row) for row in rows]  # the second is nearer than the first
    kept = balance_lengths(pairs)
    assert kept == pairs[3:], "one longer, one shorter, and the equal one, in their order"
    assert kept[0] is pairs[3]


LENGTHS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 200), st.integers(1, 200)), max_size=60)


@given(LENGTHS, st.sampled_from([0.01, 0.05, 0.2]))
def test_balanced_pairs_keep_the_ratio_and_leave_length_at_chance(lengths, tolerance):
    pairs = [pair(*row) for row in lengths]
    kept = balance_lengths(pairs, tolerance=tolerance)
    assert len({row["prompt"] for row in kept}) == len(kept)
    assert all(row in pairs for row in kept)
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in kept]
    assert sum(gap > 0 for gap in gaps) == sum(gap < 0 for gap in gaps)
    if kept:
        assert abs(length_ratio(kept) - 1) <= tolerance
    if any(gaps):
        chance = length_baseline(kept)
        assert chance.low <= 0.5 <= chance.high


def test_balancing_takes_the_length_out_of_pairs_where_longer_is_better():
    """Chosen answers are half as long again on average; after balancing, enough rows remain to train on."""
    rng = random.Random(0)
    lengths = [(i, rng.randint(60, 240), rng.randint(40, 160)) for i in range(300) for _ in range(4)]
    pairs = [pair(*row) for row in lengths]
    assert length_ratio(pairs) > 1.4
    assert length_baseline(pairs).low > 0.6
    kept = balance_lengths(pairs)
    assert len(kept) >= 100
    assert 0.95 <= length_ratio(kept) <= 1.05

    def threshold_accuracy(cut):  # "the longer wins if the gap is under the cut, else the shorter"
        gaps = [len(row["chosen"]) - len(row["rejected"]) for row in kept]
        return mean((gap > 0) == (abs(gap) < cut) for gap in gaps if gap)

    assert all(0.35 < threshold_accuracy(cut) < 0.65 for cut in range(0, 100, 5))


def test_length_can_be_counted_in_tokens_or_words():
    rows = [{"prompt": "p", "chosen": "a b c", "rejected": "four-teen letters"}]
    assert length_ratio(rows, lambda text: len(text.split())) == 1.5
    assert length_ratio(rows) == 5 / 17
    assert length_baseline(rows, lambda text: len(text.split())).value == 1
    with pytest.raises(ValueError, match="no row has answers of different lengths"):
        length_baseline([pair(0, 3, 3)])
