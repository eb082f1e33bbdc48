"""Reading, rendering and collating: every error names its place and mend; every label is where it belongs."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ft.data import IGNORE, collate_sft, iter_records, read_records, render, sft_batches
from spark_ft.models import load_tokenizer

ROW = {"prompt": "Soup of the day?", "completion": "Leek."}
PAIR = {"prompt": "Soup of the day?", "chosen": "Leek.", "rejected": "No."}
THUMB = {**ROW, "label": True}
CHAT = {"messages": [{"role": "user", "content": "Soup?"}, {"role": "assistant", "content": "Leek."}]}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write(path, *lines) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def without(row, field):
    return {key: value for key, value in row.items() if key != field}


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "row"), [("sft", ROW), ("preference", PAIR), ("feedback", THUMB), ("chat", CHAT)])
def test_read_records_returns_the_rows_with_their_extra_fields(tmp_path, kind, row):
    rows = [row, {**row, "style": "colon", "n": 3}]
    path = tmp_path / "good.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    assert read_records(path, kind) == rows


@pytest.mark.parametrize(
    ("kind", "row", "field", "mend"),
    [
        ("sft", without(ROW, "prompt"), '"prompt" is missing', "a row of kind"),
        ("sft", {**ROW, "completion": "  "}, '"completion" is empty', "fill it in or drop the row"),
        ("sft", {**ROW, "completion": 7}, '"completion" must be a text, not a number', "put it in quotes"),
        ("sft", {**ROW, "prompt": None}, '"prompt" must be a text, not null', "put it in quotes"),
        ("sft", {**ROW, "prompt": "half \ud83d"}, '"prompt" holds half a character', "save the text again"),
        ("sft", ["prompt"], "a row must be a JSON object, not a list", '{"prompt": …}'),
        ("preference", without(PAIR, "rejected"), '"rejected" is missing', "prompt, chosen, rejected"),
        ("preference", {**PAIR, "rejected": "Leek."}, '"chosen" equals "rejected"', "change one or drop the row"),
        ("feedback", {**THUMB, "label": "yes"}, '"label" must be true or false, not "yes"', "write the thumb as true"),
        ("feedback", {**THUMB, "label": 1}, '"label" must be true or false, not 1', "write the thumb as true"),
        ("feedback", {**THUMB, "label": None}, '"label" must be true or false, not null', "write the thumb as true"),
        ("chat", {"messages": "hi"}, '"messages" must be a list of messages, not a text', '[{"role": …'),
        ("chat", {"messages": []}, '"messages" is empty', "fill it in or drop the row"),
        ("chat", {"messages": ["hi"]}, '"messages" at [0] must be an object', "role and content"),
        ("chat", {"messages": [{"role": "bot", "content": "a"}]}, '"messages" at [0] has the role "bot"', "use one of"),
        ("chat", {"messages": [{"content": "a"}]}, '"messages" at [0] has the role null', "use one of system"),
        ("chat", {"messages": [{"role": "user"}]}, '"messages" at [0]: "content" is missing', "fill it in"),
        ("chat", {"messages": [{"role": "user", "content": ""}]}, '"messages" at [0]: "content" is empty', "fill it"),
    ],
)
def test_a_bad_row_is_named_by_file_line_field_and_mend(tmp_path, kind, row, field, mend):
    good = {"sft": ROW, "preference": PAIR, "feedback": THUMB, "chat": CHAT}[kind]
    path = write(tmp_path / "mine.jsonl", good, "", row, good)  # the blank line counts as a line, not as a row
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {field}")) as error:
        read_records(path, kind)
    assert mend in str(error.value)


def test_malformed_json_is_named_by_line_and_column(tmp_path):
    path = write(tmp_path / "mine.jsonl", ROW, '{"prompt": "a", "completion": }')
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: malformed JSON at column 31")) as error:
        read_records(path, "sft")
    assert "one whole JSON object on each line" in str(error.value)


def test_a_file_that_is_not_utf8_is_named_by_line_and_byte(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "cr\xe8me", "completion": "a"}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: not UTF-8 at byte 14 of the line; save the file as")):
        read_records(path, "sft")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_data_set_is_refused(tmp_path, text):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: an empty data set; it needs at least one row of prompt")):
        read_records(path, "sft")


def test_a_missing_file_is_named_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'no.jsonl'}: no such file; check the path")):
        iter_records(tmp_path / "no.jsonl", "sft")


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown kind 'pairs' of records; use one of sft, preference, feedback, chat"):
        iter_records(write(tmp_path / "mine.jsonl", ROW), "pairs")


def test_iter_records_reads_one_line_at_a_time(tmp_path):
    rows = iter_records(write(tmp_path / "mine.jsonl", ROW, "not JSON"), "sft")
    assert next(rows) == ROW, "the first row should come before the second is looked at"
    with pytest.raises(ValueError, match=":2: malformed"):
        next(rows)


# --- rendering -----------------------------------------------------------------------------------------------------


def test_render_gives_the_ids_of_the_whole_conversation_up_to_its_last_end_of_turn(tokenizer):
    prompt, completion = render(ROW, tokenizer)
    messages = [
        {"role": "user", "content": ROW["prompt"]},
        {"role": "assistant", "content": ROW["completion"]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    head, end, after = text.rpartition("<|im_end|>")
    assert after == "\n", "the template changed: what follows the last turn was one newline"
    assert prompt + completion == tokenizer(head + end, add_special_tokens=False).input_ids
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(completion) == "Leek.<|im_end|>"


def test_render_takes_the_last_answer_of_a_chat_as_the_completion(tokenizer):
    turns = [*CHAT["messages"], {"role": "user", "content": "And fish?"}, {"role": "assistant", "content": "Cod."}]
    prompt, completion = render({"messages": turns}, tokenizer)
    assert tokenizer.decode(completion) == "Cod.<|im_end|>"
    assert prompt == tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)


def test_render_equals_itself_for_a_row_and_its_chat(tokenizer):
    chat = [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": ROW["completion"]}]
    assert render(ROW, tokenizer) == render({"messages": chat}, tokenizer)


def test_render_refuses_a_chat_without_a_last_answer(tokenizer):
    with pytest.raises(ValueError, match=r'"messages" must end with an answer by the assistant'):
        render({"messages": CHAT["messages"][:1]}, tokenizer)


def test_render_refuses_an_answer_that_melts_into_the_turns_head(tokenizer):
    with pytest.raises(ValueError, match=r"does not keep the prompt's tokens .* strip it"):
        render({**ROW, "completion": "\n\nLeek."}, tokenizer)


def test_render_refuses_a_template_that_never_ends_the_turn(tokenizer):
    class Endless:
        eos_token, eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id
        all_special_tokens = tokenizer.all_special_tokens

        def apply_chat_template(self, messages, add_generation_prompt=False, return_dict=True):
            return [5] * len(messages) + [6] * add_generation_prompt if add_generation_prompt else [5, 6, 7]

    with pytest.raises(ValueError, match=r"does not end the assistant's turn with '<\|im_end\|>'; set tokenizer.eos"):
        render(ROW, Endless())


# --- collating -----------------------------------------------------------------------------------------------------

# An answer that starts with white space is refused (above), so the first character is a visible one.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<|"), max_size=40)
ANSWER = st.builds(lambda a, b: a + b, st.sampled_from("Aé{7½魚"), TEXT)
QUESTION = TEXT.filter(str.strip)
ROWS = st.lists(st.fixed_dictionaries({"prompt": QUESTION, "completion": ANSWER}), min_size=1, max_size=5)


def unpad(batch):
    """Prompt and completion ids of each row, read back from the tensors alone."""
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        learned = labels != IGNORE
        yield ids[mask.bool() & ~learned].tolist(), ids[learned].tolist()


@settings(deadline=None, max_examples=60)
@given(rows=ROWS)
def test_collate_sft_unpads_to_the_rendered_rows(tokenizer, rows):
    batch = collate_sft(rows, tokenizer)
    rendered = [render(row, tokenizer) for row in rows]
    assert list(unpad(batch)) == rendered
    for b, (prompt, completion) in enumerate(rendered):
        end = len(prompt) + len(completion)
        assert batch["labels"][b].tolist() == (
            [IGNORE] * len(prompt) + completion + [IGNORE] * (batch["labels"].shape[1] - end)
        )
        assert batch["attention_mask"][b].tolist() == [1] * end + [0] * (batch["labels"].shape[1] - end)
        assert completion[-1] == tokenizer.eos_token_id, "the end of the turn must be learned, though pad has its id"
    assert batch["input_ids"].shape[1] == max(len(p) + len(c) for p, c in rendered)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, spare=st.integers(1, 80))
def test_truncation_keeps_the_completion_and_the_end_of_the_prompt(tokenizer, rows, spare):
    rendered = [render(row, tokenizer) for row in rows]
    max_length = max(len(completion) for _, completion in rendered) + spare
    kept = list(unpad(collate_sft(rows, tokenizer, max_length)))
    for (prompt, completion), (kept_prompt, kept_completion) in zip(rendered, kept, strict=True):
        assert kept_completion == completion
        assert kept_prompt == prompt[-(max_length - len(completion)) :]
        assert len(kept_prompt) >= 1
        assert len(kept_prompt) + len(completion) <= max_length


def test_a_completion_that_does_not_fit_is_refused_with_the_length_it_needs(tokenizer):
    _, completion = render(ROW, tokenizer)
    need = len(completion) + 1
    assert collate_sft([ROW], tokenizer, max_length=need)["input_ids"].shape == (1, need)
    with pytest.raises(ValueError, match="row 1: a completion cut to nothing by truncation") as error:
        collate_sft([{**ROW, "completion": "A"}, ROW], tokenizer, max_length=need - 1)
    assert f"raise it to {need} or more" in str(error.value)


def test_a_row_that_cannot_be_rendered_is_named_by_its_index(tokenizer):
    with pytest.raises(ValueError, match=r'row 1: "messages" must end with an answer'):
        collate_sft([ROW, {"messages": CHAT["messages"][:1]}], tokenizer)


def test_rows_that_never_were_in_a_file_are_checked_too(tokenizer):
    with pytest.raises(ValueError, match='row 1: "completion" is missing'):
        collate_sft([ROW, without(ROW, "completion")], tokenizer)
    with pytest.raises(ValueError, match='row 0: "prompt" must be a text, not null'):
        sft_batches([{**ROW, "prompt": None}], tokenizer, 1)


@pytest.mark.parametrize("make", [collate_sft, lambda rows, tokenizer: sft_batches(rows, tokenizer, 2)])
def test_no_rows_are_refused(tokenizer, make):
    with pytest.raises(ValueError, match="an empty data set: no rows to train on"):
        make([], tokenizer)


# --- batches by step -----------------------------------------------------------------------------------------------


def numbered(count):
    return [{"prompt": f"Table {i}?", "completion": f"{i}"} for i in range(count)]


def answers(batch, tokenizer):
    return [int(tokenizer.decode(completion[:-1])) for _, completion in unpad(batch)]


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 13), batch_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_sft_batches_visits_every_row_once_an_epoch(tokenizer, count, batch_size, seed):
    batches = sft_batches(numbered(count), tokenizer, batch_size, seed)
    stream = [row for step in range(3 * count) for row in answers(batches(step), tokenizer)]
    assert len(stream) == 3 * count * batch_size
    for start in range(0, len(stream), count):
        assert sorted(stream[start : start + count]) == list(range(count)), "an epoch must hold each row once"


@settings(deadline=None, max_examples=25)
@given(steps=st.lists(st.integers(0, 400), min_size=1, max_size=6), seed=st.integers(0, 5))
def test_sft_batches_is_a_function_of_seed_and_step_alone(tokenizer, steps, seed):
    rows = numbered(11)
    asked_in_this_order = sft_batches(rows, tokenizer, 4, seed)
    torch.manual_seed(steps[0])  # the global generator must play no part
    for step in steps:
        torch.rand(1)
        fresh = sft_batches(rows, tokenizer, 4, seed)(step)
        for name, tensor in asked_in_this_order(step).items():
            assert torch.equal(tensor, fresh[name]), f"step {step} depends on what was asked before it"


def test_sft_batches_shuffles_differently_by_seed_and_by_epoch(tokenizer):
    rows = numbered(12)
    first, other = (sft_batches(rows, tokenizer, 12, seed) for seed in (0, 1))
    orders = [answers(first(0), tokenizer), answers(first(1), tokenizer), answers(other(0), tokenizer)]
    assert len({tuple(order) for order in [*orders, range(12)]}) == 4


def test_sft_batches_equals_collating_the_same_rows(tokenizer):
    rows = numbered(12)
    batch = sft_batches(rows, tokenizer, 5)(1)
    again = collate_sft([rows[i] for i in answers(batch, tokenizer)], tokenizer)
    assert all(torch.equal(batch[name], again[name]) for name in again)


def test_sft_batches_tokenizes_each_row_once_and_before_the_first_step(tokenizer, monkeypatch):
    import spark_ft.data

    calls = []
    monkeypatch.setattr(spark_ft.data, "render", lambda row, tok: calls.append(row) or render(row, tok))
    batches = sft_batches(numbered(6), tokenizer, 3)
    for step in range(6):
        batches(step)
    assert len(calls) == 6


def test_sft_batches_refuses_an_empty_step(tokenizer):
    with pytest.raises(ValueError, match="batch_size is 0; a step needs at least one row"):
        sft_batches([ROW], tokenizer, 0)
