"""Measures by hand, intervals against published values, and generation that batching does not change."""

import copy
import json
import math

import pytest
import torch
from helpers import complains, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from spark_ft import collate_sft, completion_logps, exact_match, field_f1, generate, perplexity, sample
from spark_ft.evaluation import greedy_match
from spark_ft.stats import Estimate, mean_interval, paired_difference, wilson_interval


def test_exact_match_by_hand():
    for output, reference, equal in [
        ('{"table": 3, "items": []}', '{"items":[],"table":3}', True),  # neither spaces nor the fields' order
        (' {"table":3}\n', '{"table":3}', True),
        ('{"table":3}', '{"table":4}', False),
        ('{"table":3}', '{"table":"3"}', False),
        ('{"table":1}', '{"table":true}', False),  # to Python 1 == True; to a cook it is not
        ('{"items":["a","b"]}', '{"items":["b","a"]}', False),  # the order of a list counts
        ('{"table":3', '{"table":3}', False),
        ('{"table":3} thanks', '{"table":3}', False),
        ("", '{"table":3}', False),
        (" Leek soup \n", "Leek soup", True),
        ("leek soup", "Leek soup", False),
        ('"Leek"', "Leek", False),  # a JSON string is not the bare word
        ("[" * 99_999, "[]", False),  # too deep to be read as JSON
    ]:
        assert exact_match([output], [reference]) == exact_match([reference], [output]) == [equal], output


def test_f1_by_hand_counts_over_all_tickets():
    reference = '{"table":4,"items":[{"qty":2,"dish":"soup"},{"qty":1,"dish":"tart"}]}'
    # table right; of qty {2, 1} one of two is right; of dish {soup, tart} one right, one wrong, one too many
    output = '{"table":4,"items":[{"qty":2,"dish":"soup"},{"qty":2,"dish":"pie"},{"dish":"rice"}]}'
    expected = {"table": 1.0, "items.qty": 2 * 1 / (2 + 2), "items.dish": 2 * 1 / (3 + 2), "all": 6 / (6 + 5)}
    assert field_f1([output], [reference]) == pytest.approx(expected)
    # a: 1 + 0 + 2 right, of 1 + 0 + 3 predicted and 1 + 1 + 3 expected; b: never predicted; c: never expected
    references = ['{"a":1}', '{"a":1,"b":2}', '{"a":[1,1,2]}']
    outputs = ['{"a":1}', "no ticket at all", '{"a":[1,2,2],"c":"x"}']
    expected = {"a": 2 * 3 / 9, "b": 0.0, "c": 0.0, "all": 2 * 3 / (5 + 6)}
    assert field_f1(outputs, references) == pytest.approx(expected)
    for output, reference, f1 in [
        ('{"a":1}', '{"a":"1"}', 0), ('{"a":true}', '{"a":1}', 0), ("[1,2]", '{"a":1}', 0),
        ('{"a":["x","y"]}', '{"a":["y","x"]}', 1),  # types count, a list's order does not
    ]:  # fmt: skip
        assert field_f1([output], [reference])["all"] == f1


TICKET = st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), min_size=1)


@given(st.lists(TICKET, min_size=1, max_size=5))
def test_the_references_themselves_score_one(tickets):
    texts = [json.dumps(t) for t in tickets]
    assert set(field_f1(texts, texts).values()) == {1.0}
    assert all(exact_match(texts, texts))


def test_what_has_no_measure_and_no_interval_is_refused():
    lengths = "2 outputs for 1 references; there must be one for each"
    trials = [(k, n, f"{k} successes in {n} trials are no proportion") for k, n in ((0, 0), (3, 2), (-1, 5))]
    few = [(values, f"{len(values)} value has no interval; run at least two seeds") for values in ([], [1.0])]
    complains(
        *((measure, (["{}", "{}"], ["{}"]), lengths) for measure in (exact_match, field_f1)),
        (field_f1, (["{}", "{}"], ["{}", "Leek soup"]), "reference 1 is no JSON object: 'Leek soup'"),
        *((wilson_interval, (k, n), says) for k, n, says in trials),
        *((mean_interval, (values,), says) for values, says in few),
        (paired_difference, ([1.0, 2.0], [1.0]), "2 values and 1 others are no pairs"),
    )


def test_wilson_against_published_values_and_scipy():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    for k, n, low, high in [
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718),
    ]:  # fmt: skip
        assert wilson_interval(k, n) == pytest.approx((k / n, low, high), abs=6e-5)
    for k, n, confidence in [(0, 10, 0.95), (5, 10, 0.9), (35, 40, 0.99), (10, 10, 0.95)]:
        theirs = binomtest(k, n).proportion_ci(confidence, method="wilson")
        assert wilson_interval(k, n, confidence) == pytest.approx((k / n, *theirs), abs=1e-9)


def test_mean_intervals_by_hand_and_a_paired_difference_that_is_surer():
    half = 4.302653 * 0.5773503
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - half, 2 + half), abs=1e-6)
    # mean 5, deviations ±1: s² = 4/3, n = 4; t(0.95, 3) = 2.353363
    half = 2.353363 * math.sqrt(4 / 3) / 2
    assert mean_interval([4, 4, 6, 6], confidence=0.9) == pytest.approx((5, 5 - half, 5 + half), abs=1e-6)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    noisy, better = [1.0, 2.0, 3.0], [0.9, 1.89, 2.9]
    assert mean_interval(noisy).low < mean_interval(better).high
    d = paired_difference(noisy, better)
    assert d == pytest.approx(mean_interval([0.1, 0.11, 0.1]))
    assert d.verdict("worse", "better") == "worse"
    assert Estimate(-1, -2, -0.1).verdict("worse", "better") == "better"
    assert Estimate(0.1, -0.1, 0.3).verdict("worse", "better") == "no measurable difference"
    assert str(Estimate(0.875, 0.739, 0.945)) == "0.875 [0.739, 0.945]"
    assert Estimate(0.875, 0.739, 0.945).percent() == "88% [74%, 94%]"
    assert Estimate(0.12345, -0.1, 0.3).signed(2) == "+0.12 [-0.10, +0.30]"


def test_perplexity_is_exp_of_transformers_own_loss_and_weighs_tokens_whatever_the_batches(embedded):
    model, tokenizer = embedded
    texts = (("Count.", "1 2 3 4 5 6 7 8"), ("Hi", "Xylophone"))
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    with torch.no_grad():
        loss = model(**collate_sft(rows[:1], tokenizer)).loss
        logps, _ = completion_logps(model, collate_sft(rows, tokenizer))
    assert perplexity(model, tokenizer, rows[:1]) == pytest.approx(math.exp(loss), rel=1e-5)
    for size in (1, 2):
        assert perplexity(model, tokenizer, rows, size) == pytest.approx(math.exp(-logps.mean()), rel=1e-5)
    with pytest.raises(ValueError, match="an empty data set"):
        perplexity(model, tokenizer, [])


def test_an_answer_ends_with_its_turn_and_greedy_match_finds_it_without_generating(embedded):
    model, tokenizer = embedded
    prompts = ["What is the capital of France?", "Hi"]
    answers = generate(model, tokenizer, prompts, max_new_tokens=40)
    assert "Paris" in answers[0]
    assert "<|im_end|>" not in "".join(answers)
    right = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
    wrong = [{**row, "completion": row["completion"] + "!"} for row in right]
    assert greedy_match(model, tokenizer, right + wrong, batch_size=3) == [True, True, False, False]


PROMPTS = [
    "What is the capital of France?", "Name a colour.", "Hi",
    "Write the numbers from one to five, separated by commas, and nothing else.",
    "Translate to French: Good morning, how are you today? I hope the soup is warm.",
]  # fmt: skip


@pytest.fixture(scope="module")
def small(embedded):
    """A small random model that speaks the embedded one's tokens, and a tokenizer of its own to change."""
    return tiny_llama(vocab_size=len(embedded[1])), copy.deepcopy(embedded[1])


def test_batches_and_left_padding_do_not_change_the_greedy_answers(small):
    model, tokenizer = small
    expected = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        expected.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=4) == expected
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert generate(model, tokenizer, chats, max_new_tokens=8) == expected
    tokenizer.pad_token = None  # then the end token fills up
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert generate(model, tokenizer, []) == sample(model, tokenizer, []) == []


def test_samples_are_seeded_and_only_those_that_ended_are_kept(small):
    model, tokenizer = small
    state, settings = torch.get_rng_state(), {"n": 3, "max_new_tokens": 4, "batch_size": 2}
    tokenizer.pad_token = "<|im_start|>"  # not an end
    # the end of Gemma's turns is known to the generation config alone: here, of half of all tokens
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 2))
    answers = sample(model, tokenizer, PROMPTS, **settings, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(answers) == len(PROMPTS)
    assert 5 < sum(map(len, answers)) <= 15
    assert sample(model, tokenizer, PROMPTS, **settings, seed=1) == answers
    assert sample(model, tokenizer, PROMPTS, **settings, seed=2) != answers
    model.generation_config.eos_token_id = None
    assert sample(model, tokenizer, PROMPTS, **settings) == [[]] * len(PROMPTS)  # none ends in four tokens
    for wrong in ({"n": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"n=\d, temperature=.*; draw one answer or more"):
            sample(model, tokenizer, PROMPTS, **wrong)


def test_every_module_is_put_back_even_after_an_exception(small, monkeypatch):
    model, tokenizer = small
    model.train().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    row = {"prompt": "Hi", "completion": "Hello."}
    generate(model, tokenizer, ["Hi"], max_new_tokens=1)
    perplexity(model, tokenizer, [row])
    greedy_match(model, tokenizer, [row])
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(TypeError):
        generate(model, tokenizer, ["Hi"])
    assert [module.training for module in model.modules()] == modes


def test_a_tokenizer_that_cannot_chat_or_end_and_a_bare_text_are_refused_with_the_mend(small):
    model, endless, silent = small[0], copy.deepcopy(small[1]), copy.deepcopy(small[1])
    endless.eos_token = silent.chat_template = None
    complains(
        (generate, (model, small[1], "Hi"), "prompts is one text, 'Hi'; put it into a list"),
        (generate, (model, endless, ["Hi"]), "no end token; set tokenizer.eos_token"),
        (sample, (model, silent, ["Hi"]), "no chat_template; take an instruct model's, or set one"),
    )
