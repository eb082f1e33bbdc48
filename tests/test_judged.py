"""The preference labs' shared parts: splits, controls, what keeps the judge honest, and faster generation."""

import math

import pytest
import torch
from helpers import tiny_llama
from torch import nn

from spark_ft import AdapterConfig, adapters_disabled, add_adapters, collate_sft, generate, sequence_logps
from spark_ft.adapters import adapted_layers
from spark_ft.evaluation import answers_and_ends
from spark_ft.lab.experiments import preferences
from spark_ft.lab.experiments.preferences import beside_reference, judged, loops, pairs, questions, score

ASKED = ["How hot should an oven be?", "Tea?", "How much rice do I need for four hungry people at noon?"]


@pytest.fixture
def policy(tokenizer):
    """A tiny model with the embedded model's vocabulary, whose adapters have moved."""
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    add_adapters(model, AdapterConfig(rank=2))
    torch.manual_seed(1)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def test_no_split_shares_a_core_and_each_core_is_asked_once():
    cores = {split: {row["core"] for row in pairs(split)} for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in cores.items()} == {
        "train": 80,
        "validation": 20,
        "test": 50,
    }
    assert not (cores["train"] & cores["validation"])
    assert not ((cores["train"] | cores["validation"]) & cores["test"])
    assert len(pairs("train")) + len(pairs("validation")) == 300
    for split, found in cores.items():
        asked = questions(split)
        assert len(asked) == len(set(asked)) == len(found)
    with pytest.raises(ValueError, match="take train, validation or test"):
        pairs("dev")


def test_shuffled_labels_exchange_half_of_the_pairs_and_the_start_prefers_nothing():
    rows = pairs("train")
    shuffled = preferences.with_shuffled_labels(rows, 3)
    exchanged = [
        a["chosen"] == b["rejected"] and a["rejected"] == b["chosen"]
        for a, b in zip(rows, shuffled, strict=True)
    ]
    assert sum(exchanged) == len(rows) // 2
    assert all(a == b for a, b, other in zip(rows, shuffled, exchanged, strict=True) if not other)
    assert shuffled != preferences.with_shuffled_labels(rows, 4)
    answers = preferences.either_answer(rows, 0)
    chosen = sum(answer["completion"] == row["chosen"] for answer, row in zip(answers, rows, strict=True))
    assert all(a["completion"] in (r["chosen"], r["rejected"]) for a, r in zip(answers, rows, strict=True))
    assert 0.35 < chosen / len(rows) < 0.65


def test_loops_are_found_and_no_written_answer_is_one():
    assert loops("boil it for ten minutes and boil it for ten minutes")
    assert loops("g g g g g g")
    assert not loops("200 g of rice, 200 g of peas and 200 g of corn")
    assert not loops("")
    assert not loops("boil it for ten minutes and then for ten minutes more")
    for split in ("train", "validation", "test"):
        assert not [row for row in pairs(split) if loops(row["chosen"]) or loops(row["rejected"])]


def test_answers_that_leave_the_batch_are_those_of_generate(policy, tokenizer):
    chat = [{"role": "user", "content": ASKED[1]}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    fifth = policy.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, -1].item()
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, fifth]  # so that one of them ends early
    found = answers_and_ends(policy, tokenizer, ASKED, max_new_tokens=12)
    assert {ended for _, ended in found} == {True, False}
    assert [text for text, _ in found] == generate(policy, tokenizer, ASKED, max_new_tokens=12)
    assert found == [answers_and_ends(policy, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in ASKED]


def test_what_the_reference_finds_of_an_answer_is_its_log_probability_and_its_kl(policy, tokenizer):
    answers, ended = ["Take 200 g of rice.", "", "Hot, at 180 °C"], [True, True, False]
    logps, drifts, counts = beside_reference(policy, tokenizer, ASKED, answers, ended, batch_size=2)
    assert (logps[1], drifts[1], counts[1]) == (-math.inf, 0.0, 0)
    for i in (0, 2):
        batch = collate_sft([{"prompt": ASKED[i], "completion": answers[i]}], tokenizer)
        if not ended[i]:
            batch["labels"][0, -1] = -100
        with torch.no_grad():
            with adapters_disabled(policy):
                total, count = sequence_logps(policy, batch)
                kept = policy(batch["input_ids"]).logits[0].log_softmax(-1)
            moved = policy(batch["input_ids"]).logits[0].log_softmax(-1)
        places = [t - 1 for t, label in enumerate(batch["labels"][0].tolist()) if label != -100]
        kl = sum(float((moved[t].exp() * (moved[t] - kept[t])).sum()) for t in places)
        assert counts[i] == count.item() == len(places)
        assert logps[i] == pytest.approx(total.item() / count.item(), rel=1e-4)
        assert drifts[i] == pytest.approx(kl, rel=1e-3)
        assert kl > 0


def test_judged_answers_come_with_all_that_keeps_the_judge_honest(policy, tokenizer, monkeypatch):
    monkeypatch.setattr(preferences, "MAX_NEW_TOKENS", 6)
    weights = {name: layer.weight.clone() for name, layer in adapted_layers(policy).items()}
    figures = judged(policy, tokenizer, ASKED)
    for name, layer in adapted_layers(policy).items():
        torch.testing.assert_close(layer.weight, weights[name])
        assert not layer.merged
    assert figures["asked"] == len(figures["answers"]) == len(figures["logps"]) == len(figures["kls"]) == 3
    assert figures["answers"] == generate(policy, tokenizer, ASKED, max_new_tokens=6)
    assert figures["kl"] == pytest.approx(sum(figures["kls"]) / 3, abs=1e-3)
    for layer in adapted_layers(policy).values():
        nn.init.zeros_(layer.lora_B)
    assert judged(policy, tokenizer, ASKED)["kl"] == pytest.approx(0, abs=1e-4)


def test_the_guard_reads_the_reference_and_not_the_judge():
    figures = {
        "asked": 4,
        "metric": 4,
        "logps": [preferences.SOUND + 0.1, preferences.SOUND - 0.1, None, -9.0],
    }
    assert score(figures).value == 1.0
    assert score(figures, "sound").value == 0.25
