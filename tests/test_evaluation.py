"""Measures by hand, intervals against published values, and generation that batching does not change."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spark_ft.evaluation import exact_match, field_f1, generate, perplexity
from spark_ft.stats import Estimate, mean_interval, paired_difference, wilson_interval

PROMPTS = [
    "What is the capital of France?",
    "Name a colour.",
    "Hi",
    "Write the numbers from one to five, separated by commas, and nothing else.",
    "Translate to French: Good morning, how are you today? I hope the soup is warm.",
    "Is water wet? Answer yes or no.",
]


# --- exact match and F1 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "reference", "equal"),
    [
        (
            '{"table": 3, "items": []}',
            '{"items":[],"table":3}',
            True,
        ),  # spaces and the order of fields say nothing
        (' {"table":3}\n', '{"table":3}', True),
        ('{"table":3}', '{"table":4}', False),
        ('{"table":3}', '{"table":"3"}', False),
        ('{"table":1}', '{"table":true}', False),  # to Python 1 == True; to a cook it is not
        ('{"items":["a","b"]}', '{"items":["b","a"]}', False),  # the order of a list does
        ('{"table":3', '{"table":3}', False),
        ('{"table":3} thanks', '{"table":3}', False),
        ("", '{"table":3}', False),
        (" Leek soup \n", "Leek soup", True),
        ("leek soup", "Leek soup", False),
        ('"Leek"', "Leek", False),  # a JSON string is not the bare word
    ],
)
def test_exact_match_by_hand(output, reference, equal):
    assert exact_match([output], [reference]) == [equal]
    assert exact_match([reference], [output]) == [equal]


def test_f1_by_hand():
    reference = '{"table":4,"items":[{"qty":2,"dish":"soup"},{"qty":1,"dish":"tart"}]}'
    # table right; of qty {2, 1} one of two is right; of dish {soup, tart} one right, one wrong, one too many
    output = '{"table":4,"items":[{"qty":2,"dish":"soup"},{"qty":2,"dish":"pie"},{"dish":"rice"}]}'
    assert field_f1([output], [reference]) == pytest.approx(
        {
            "table": 1.0,
            "items.qty": 2 * 1 / (2 + 2),
            "items.dish": 2 * 1 / (3 + 2),
            "all": 2 * 3 / (6 + 5),
        }
    )


def test_f1_counts_over_all_tickets_not_as_a_mean_of_tickets():
    references = ['{"a":1}', '{"a":1,"b":2}', '{"a":[1,1,2]}']
    outputs = ['{"a":1}', "no ticket at all", '{"a":[1,2,2],"c":"x"}']
    # a: 1 + 0 + 2 right, of 1 + 0 + 3 predicted and 1 + 1 + 3 expected; b: never predicted; c: never expected
    assert field_f1(outputs, references) == pytest.approx(
        {"a": 2 * 3 / 9, "b": 0.0, "c": 0.0, "all": 2 * 3 / (5 + 6)}
    )


def test_f1_tells_types_apart_and_ignores_the_order_of_a_list():
    assert field_f1(['{"a":1}'], ['{"a":"1"}'])["all"] == 0
    assert field_f1(['{"a":true}'], ['{"a":1}'])["all"] == 0
    assert field_f1(['{"a":["x","y"]}'], ['{"a":["y","x"]}'])["all"] == 1
    assert field_f1(["[1,2]"], ['{"a":1}'])["all"] == 0


@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), min_size=1), min_size=1, max_size=5)
)
def test_f1_is_one_for_the_references_themselves(tickets):
    import json

    texts = [json.dumps(t) for t in tickets]
    assert set(field_f1(texts, texts).values()) == {1.0}
    assert all(exact_match(texts, texts))


def test_lists_of_different_lengths_and_references_that_are_no_tickets_are_refused():
    for measure in (exact_match, field_f1):
        with pytest.raises(ValueError, match="2 outputs for 1 references; there must be one for each"):
            measure(["{}", "{}"], ["{}"])
    with pytest.raises(ValueError, match="reference 1 is no JSON object: 'Leek soup'"):
        field_f1(["{}", "{}"], ["{}", "Leek soup"])


# --- intervals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, n", [(0, 10), (1, 10), (5, 10), (35, 40), (10, 10), (95, 100)])  # noqa: PT006
def test_wilson_by_its_formula(k, n):
    z, p = 1.959963984540054, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    estimate = wilson_interval(k, n)
    assert estimate == pytest.approx((p, max(0.0, centre - half), min(1.0, centre + half)), abs=1e-9)


def test_wilson_against_known_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for k, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        estimate = wilson_interval(k, n)
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=6e-5)


def test_wilson_widens_with_confidence_and_refuses_what_is_no_proportion():
    assert wilson_interval(5, 10, 0.99).low < wilson_interval(5, 10, 0.9).low
    for k, n in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError):  # noqa: PT011 - three different sentences
            wilson_interval(k, n)


def test_a_paired_difference_is_sure_where_two_intervals_overlap():
    noisy, better = [1.0, 2.0, 3.0], [0.9, 1.89, 2.9]
    assert mean_interval(noisy).low < mean_interval(better).high
    d = paired_difference(noisy, better)
    assert d == pytest.approx(mean_interval([0.1, 0.11, 0.1]))
    assert (d.verdict("worse", "better"), Estimate(-1, -2, -0.1).verdict("worse", "better")) == (
        "worse",
        "better",
    )
    assert Estimate(0.1, -0.1, 0.3).verdict("worse", "better") == "no measurable difference"
    assert Estimate(0.12345, -0.1, 0.3).signed(2) == "+0.12 [-0.10, +0.30]"
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])


def test_mean_interval_by_hand():
    # mean 2, s = 1, s/√3 = 0.57735; t(0.975, 2) = 4.302653
    assert mean_interval([1, 2, 3]) == pytest.approx(
        (2, 2 - 4.302653 * 0.5773503, 2 + 4.302653 * 0.5773503), abs=1e-6
    )
    # mean 5, deviations ±1: s² = 4/3, n = 4; t(0.95, 3) = 2.353363
    half = 2.353363 * math.sqrt(4 / 3) / 2
    assert mean_interval([4, 4, 6, 6], confidence=0.9) == pytest.approx((5, 5 - half, 5 + half), abs=1e-6)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_run_has_no_interval(values):
    with pytest.raises(ValueError, match=f"{len(values)} value has no interval; run at least two seeds"):
        mean_interval(values)


def test_an_estimate_says_itself_in_one_line():
    assert str(Estimate(0.875, 0.739, 0.945)) == "0.875 [0.739, 0.945]"
    assert Estimate(0.875, 0.739, 0.945).percent() == "88% [74%, 94%]"


# --- perplexity ----------------------------------------------------------------------------------------------------


def test_perplexity_of_one_row_is_exp_of_transformers_own_loss(embedded):
    from spark_ft.data.batches import collate_sft

    model, tokenizer = embedded
    row = {"prompt": "What is the capital of France?", "completion": "The capital of France is Paris."}
    with torch.no_grad():
        batch = collate_sft([row], tokenizer)
        loss = model(**batch).loss
    assert perplexity(model, tokenizer, [row]) == pytest.approx(math.exp(loss), rel=1e-5)


def test_perplexity_weighs_tokens_whatever_the_batches_and_leaves_the_mode(embedded):
    from spark_ft.data.batches import collate_sft
    from spark_ft.scoring import completion_logps

    model, tokenizer = embedded
    rows = [
        {"prompt": "Count.", "completion": "1 2 3 4 5 6 7 8"},
        {"prompt": "Hi", "completion": "Xylophone"},
    ]
    one, both = (
        perplexity(model, tokenizer, rows, batch_size=1),
        perplexity(model, tokenizer, rows, batch_size=2),
    )
    assert one == pytest.approx(both, rel=1e-5)
    with torch.no_grad():
        logps, _ = completion_logps(model, collate_sft(rows, tokenizer))
    assert both == pytest.approx(math.exp(-logps.mean()), rel=1e-5)
    model.train()
    try:
        perplexity(model, tokenizer, rows[:1])
        assert model.training
    finally:
        model.eval()


def test_perplexity_of_nothing_is_refused(embedded):
    with pytest.raises(ValueError, match="an empty data set"):
        perplexity(*embedded, [])


# --- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_batches_and_left_padding_do_not_change_the_greedy_answers(embedded):
    model, tokenizer = embedded
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        expected.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}) > 3  # there is padding to do
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=4) == expected
    assert "Paris" in expected[0]


def test_an_answer_stops_at_the_end_of_its_turn(embedded):
    model, tokenizer = embedded
    (answer,) = generate(model, tokenizer, ["What is the capital of France?"], max_new_tokens=60)
    ids = tokenizer(answer)["input_ids"]
    assert len(ids) < 30  # it ended by itself
    head = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    with torch.no_grad():  # and what the model says next is the end of the turn
        after = model(torch.tensor([head + ids])).logits[0, -1].argmax().item()
    assert tokenizer.convert_ids_to_tokens(after) == "<|im_end|>"
    assert "<|im_end|>" not in answer


def test_no_prompts_no_answers_and_the_mode_is_restored(embedded):
    model, tokenizer = embedded
    assert generate(model, tokenizer, []) == []
    model.train()
    try:
        assert len(generate(model, tokenizer, ["Hi"], max_new_tokens=1)) == 1
        assert model.training
    finally:
        model.eval()
