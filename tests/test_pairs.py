"""Pairs from sampled answers: the judge decides who wins, length does not."""

import random
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ft.data.judge import is_metric
from spark_ft.data.pairs import balance_lengths, judged_pairs, length_baseline, length_ratio
from spark_ft.data.records import check_records
from spark_ft.evaluation import sample


def pair(prompt, chosen, rejected):
    return {"prompt": f"p{prompt}", "chosen": "c" * chosen, "rejected": "r" * rejected}


def test_judged_pairs_puts_every_good_answer_against_every_bad_one():
    answers = [["30 g", "1 cup", "40 g", "30 g", " "], ["1 cup", "2 cups"], []]
    assert judged_pairs(["a", "b", "c"], answers, is_metric) == [
        {"prompt": "a", "chosen": "30 g", "rejected": "1 cup"},
        {"prompt": "a", "chosen": "40 g", "rejected": "1 cup"},
    ]
    with pytest.raises(ValueError, match="2 lists of answers for 1 prompts; give one for each"):
        judged_pairs(["a"], answers[:2], is_metric)


def test_balance_takes_each_prompts_most_equal_pair_and_as_many_longer_as_shorter():
    pairs = [
        pair(0, 90, 50), pair(0, 52, 50),  # the second is nearer
        pair(1, 80, 50), pair(2, 51, 50),
        pair(3, 50, 53), pair(4, 50, 50),
    ]  # fmt: skip
    kept = balance_lengths(pairs)
    assert kept == [pairs[3], pairs[4], pairs[5]], (
        "one longer, one shorter, and the equal one, in their order"
    )
    assert kept[0] is pairs[3]


LENGTHS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 200), st.integers(1, 200)), max_size=60)


@settings(deadline=None)
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


@pytest.mark.slow
def test_sampling_the_embedded_model_is_seeded_and_ends_its_answers(embedded):
    model, tokenizer = embedded
    prompts = ["Hello", "Hi"]  # answered in ten tokens, mostly
    settings = {"n": 4, "temperature": 0.7, "max_new_tokens": 12}
    state = torch.get_rng_state()
    answers = sample(model, tokenizer, prompts, **settings, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(answers) == 2
    assert all(len(drawn) <= 4 for drawn in answers)
    texts = [text for drawn in answers for text in drawn]
    assert texts
    assert all("<|im_" not in text and len(tokenizer(text).input_ids) < 12 for text in texts)
    assert sample(model, tokenizer, prompts, **settings, seed=1) == answers
    assert sample(model, tokenizer, prompts, **settings, seed=2) != answers
    longest = max(map(len, texts))
    pairs = judged_pairs(prompts, answers, lambda text: len(text) < longest)
    if pairs:
        check_records(pairs, "preference")
