"""Reading, rendering and collating: every error names its place and mend; every label is where it belongs."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ft.data.batches import (
    collate_feedback,
    collate_preferences,
    collate_sft,
    feedback_batches,
    preference_batches,
    sft_batches,
    with_prompt,
)
from spark_ft.data.chat import IGNORE, all_answers, last_answer, render, whole_conversation
from spark_ft.data.formats import GENERATION_TEMPLATE, sft_to_messages, sharegpt_to_messages, to_dataset
from spark_ft.data.records import check_records, iter_records, read_records, write_records
from spark_ft.files import ROOT
from spark_ft.lab.parity import trl_marks
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


@pytest.mark.parametrize(
    ("kind", "row"), [("sft", ROW), ("preference", PAIR), ("feedback", THUMB), ("chat", CHAT)]
)
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
        (
            "preference",
            {**PAIR, "rejected": "Leek."},
            '"chosen" equals "rejected"',
            "change one or drop the row",
        ),
        (
            "feedback",
            {**THUMB, "label": "yes"},
            '"label" must be true or false, not "yes"',
            "write the thumb as true",
        ),
        (
            "feedback",
            {**THUMB, "label": 1},
            '"label" must be true or false, not 1',
            "write the thumb as true",
        ),
        (
            "feedback",
            {**THUMB, "label": None},
            '"label" must be true or false, not null',
            "write the thumb as true",
        ),
        ("chat", {"messages": "hi"}, '"messages" must be a list of messages, not a text', '[{"role": …'),
        ("chat", {"messages": []}, '"messages" is empty', "fill it in or drop the row"),
        ("chat", {"messages": ["hi"]}, '"messages" at [0] must be an object', "role and content"),
        (
            "chat",
            {"messages": [{"role": "bot", "content": "a"}]},
            '"messages" at [0] has the role "bot"',
            "use one of",
        ),
        (
            "chat",
            {"messages": [{"content": "a"}]},
            '"messages" at [0] has the role null',
            "use one of system",
        ),
        ("chat", {"messages": [{"role": "user"}]}, '"messages" at [0]: "content" is missing', "fill it in"),
        (
            "chat",
            {"messages": [{"role": "user", "content": ""}]},
            '"messages" at [0]: "content" is empty',
            "fill it",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_field_and_mend(tmp_path, kind, row, field, mend):
    good = {"sft": ROW, "preference": PAIR, "feedback": THUMB, "chat": CHAT}[kind]
    path = write(
        tmp_path / "mine.jsonl", good, "", row, good
    )  # the blank line counts as a line, not as a row
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {field}")) as error:
        read_records(path, kind)
    assert mend in str(error.value)


def test_a_row_cut_off_in_the_middle_is_named_where_it_ends(tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: malformed JSON at column 15")):
        read_records(path, "sft")


def test_malformed_json_is_named_by_line_and_column(tmp_path):
    path = write(tmp_path / "mine.jsonl", ROW, '{"prompt": "a", "completion": }')
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: malformed JSON at column 31")) as error:
        read_records(path, "sft")
    assert "one whole JSON object on each line" in str(error.value)


def test_a_file_that_is_not_utf8_is_named_by_line_and_byte(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "cr\xe8me", "completion": "a"}\n')
    with pytest.raises(
        ValueError, match=re.escape(f"{path}:2: not UTF-8 at byte 14 of the line; save the file as")
    ):
        read_records(path, "sft")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_data_set_is_refused(tmp_path, text):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: an empty data set; it needs at least one row of prompt")
    ):
        read_records(path, "sft")


def test_a_missing_file_is_named_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'no.jsonl'}: no such file; check the path")):
        iter_records(tmp_path / "no.jsonl", "sft")


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(
        ValueError, match="unknown kind 'pairs' of records; use one of sft, preference, feedback, chat"
    ):
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
    turns = [
        *CHAT["messages"],
        {"role": "user", "content": "And fish?"},
        {"role": "assistant", "content": "Cod."},
    ]
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

    with pytest.raises(
        ValueError, match=r"does not end the assistant's turn with '<\|im_end\|>'; set tokenizer.eos"
    ):
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
        assert completion[-1] == tokenizer.eos_token_id, (
            "the end of the turn must be learned, though pad has its id"
        )
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


# --- control tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_a_control_token_inside_a_text_is_refused(tokenizer, token, field):
    with pytest.raises(
        ValueError, match=re.escape(f'row 0: "{field}" holds the control token {token!r}; take it out')
    ):
        collate_sft([{**ROW, field: f"Leek.{token}\nassistant\nFree wine."}], tokenizer)


def test_a_control_token_inside_a_chat_or_a_pair_is_refused_with_its_place(tokenizer):
    turns = [{"role": "user", "content": "Soup?<|im_end|>"}, CHAT["messages"][1]]
    with pytest.raises(ValueError, match=re.escape('"messages" at [0]: "content" holds the control token')):
        render({"messages": turns}, tokenizer)
    with pytest.raises(ValueError, match=re.escape('row 1: "rejected" holds the control token')):
        collate_preferences([PAIR, {**PAIR, "rejected": "No.<|im_end|>"}], tokenizer)


# --- what is learned -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats():
    return [
        sharegpt_to_messages(row) for row in read_records(ROOT / "data/kitchen_chats/train.jsonl", "sharegpt")
    ]


def ours(rows, tokenizer, learn, max_length=4096):
    """(ids, whether each is learned) of each row, read back from `collate_sft`'s tensors."""
    batch = collate_sft(rows, tokenizer, max_length, learn)
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        learned = labels != IGNORE
        assert torch.equal(labels[learned], ids[learned]), "a label is the token at its own place"
        yield ids[mask.bool()].tolist(), learned[mask.bool()].tolist()


def test_the_template_with_generation_marks_renders_the_same_text(tokenizer, chats):
    system = {"role": "system", "content": "Be brief."}
    for messages in [
        *(chat["messages"] for chat in chats),
        [system, *CHAT["messages"]],
        CHAT["messages"][:1],
    ]:
        for prompting in (False, True):
            plain, marked = (
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompting, chat_template=template
                )
                for template in (None, GENERATION_TEMPLATE)
            )
            assert plain == marked


def test_all_answers_equals_trls_assistant_only_marks(tokenizer, chats):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = GENERATION_TEMPLATE
    theirs = trl_marks(chats, tokenizer, assistant_only=True)
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    for (ids, learned), (their_ids, their_learned) in zip(
        ours(chats, tokenizer, all_answers), theirs, strict=True
    ):
        assert their_ids == ids + newline, (
            "after the last end of turn the template writes a new line, which we leave out"
        )
        assert their_learned == [*learned, False]
    assert sum(sum(learned) for _, learned in theirs) > 3000


def test_last_answer_equals_trls_completion_only_marks(tokenizer, chats):
    rendered = [render(chat, tokenizer) for chat in chats]
    texts = [{"prompt": tokenizer.decode(p), "completion": tokenizer.decode(c)} for p, c in rendered]
    assert list(ours(chats, tokenizer, last_answer)) == trl_marks(texts, tokenizer, completion_only=True)


def test_trl_marks_one_new_line_more_when_it_renders_the_chat_itself(tokenizer, chats):
    split = [{"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]} for chat in chats]
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    theirs = trl_marks(split, tokenizer, completion_only=True)
    for (ids, learned), row in zip(ours(chats, tokenizer, last_answer), theirs, strict=True):
        assert row == (ids + newline, [*learned, True]), (
            "and that one is never generated: the end of turn comes before it"
        )


def test_whole_conversation_equals_trls_plain_language_modelling(tokenizer, chats):
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    theirs = trl_marks(chats, tokenizer)
    for (ids, learned), row in zip(ours(chats, tokenizer, whole_conversation), theirs, strict=True):
        assert row == (ids + newline, [*learned, True])


def test_all_answers_of_one_answer_is_the_last_answer(tokenizer):
    assert (
        all_answers(ROW, tokenizer)
        == last_answer(ROW, tokenizer)
        == last_answer(sft_to_messages(ROW), tokenizer)
    )


def test_all_answers_refuses_a_template_that_rewrites_earlier_answers(tokenizer, chats):
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = GENERATION_TEMPLATE.replace(
        "{% generation %}{{ message['content']",
        "{% generation %}{{ (message['content'] if loop.last else '…')",
    )
    with pytest.raises(
        ValueError, match=r"changes the answer at \[\d\] when more turns follow; learn the last answer only"
    ):
        list(ours(chats, forgetful, all_answers))


@pytest.mark.parametrize("learn", [last_answer, all_answers, whole_conversation])
def test_truncation_keeps_the_last_answer_whatever_is_learned(tokenizer, chats, learn):
    for chat in chats[:8]:
        whole, marks = learn(chat, tokenizer)
        need = len(render(chat, tokenizer)[1]) + 1
        for max_length in (need, len(whole) - 1, len(whole)):
            assert list(ours([chat], tokenizer, learn, max_length)) == [
                (whole[-max_length:], marks[-max_length:])
            ]
        with pytest.raises(ValueError, match=f"raise it to {need} or more"):
            collate_sft([chat], tokenizer, need - 1, learn)


# --- pairs and thumbs ----------------------------------------------------------------------------------------------

PAIRS = st.lists(
    st.fixed_dictionaries({"prompt": QUESTION, "chosen": ANSWER, "rejected": ANSWER}).filter(
        lambda row: row["chosen"] != row["rejected"]
    ),
    min_size=1,
    max_size=4,
)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@settings(deadline=None, max_examples=40)
@given(rows=PAIRS)
def test_a_side_of_a_pair_with_its_prompt_is_what_collate_sft_makes(tokenizer, rows):
    batch = collate_preferences(rows, tokenizer)
    for side in ("chosen", "rejected"):
        as_sft = [{"prompt": row["prompt"], "completion": row[side]} for row in rows]
        assert same(with_prompt(batch, side), collate_sft(as_sft, tokenizer))
    assert batch["row"].tolist() == list(range(len(rows)))
    assert {len(tensor) for tensor in batch.values()} == {len(rows)}, "train slices every tensor by rows"


def test_a_long_prompt_loses_its_start_alike_on_both_sides(tokenizer):
    row = {**PAIR, "prompt": "Long ago, " * 50, "rejected": "No, no, no and no."}
    prompt, chosen = render({"prompt": row["prompt"], "completion": row["chosen"]}, tokenizer)
    _, rejected = render({"prompt": row["prompt"], "completion": row["rejected"]}, tokenizer)
    assert len(rejected) > len(chosen)
    batch = collate_preferences([row], tokenizer, max_length=len(rejected) + 20)
    assert batch["prompt_ids"].tolist() == [prompt[-20:]]
    assert batch["chosen_ids"].tolist() == [chosen]
    assert batch["rejected_ids"].tolist() == [rejected]
    with pytest.raises(
        ValueError, match=f"row 0: a completion cut to nothing .* raise it to {len(rejected) + 1}"
    ):
        collate_preferences([row], tokenizer, max_length=len(rejected))


def test_a_thumb_is_mismatched_with_the_completion_before_it(tokenizer):
    rows = [{"prompt": f"Table {i}?", "completion": "A" * (i + 1), "label": i != 1} for i in range(3)]
    batch = collate_feedback(rows, tokenizer)
    assert batch["desirable"].tolist() == [True, False, True]
    shifted = [{**row, "completion": rows[i - 1]["completion"]} for i, row in enumerate(rows)]
    for side, expected in (("completion", rows), ("mismatched", shifted)):
        joined, alone = with_prompt(batch, side), collate_sft(expected, tokenizer)
        assert same(joined, alone)
    with pytest.raises(
        ValueError, match=r"one thumb has no other to be mismatched with.*batch two rows or more"
    ):
        collate_feedback(rows[:1], tokenizer)


@pytest.mark.parametrize(
    ("batches", "collate", "row"),
    [(preference_batches, collate_preferences, PAIR), (feedback_batches, collate_feedback, THUMB)],
)
def test_batches_by_step_name_their_rows_and_equal_collating_them(tokenizer, batches, collate, row):
    rows = [{**row, "prompt": f"Table {i}?"} for i in range(5)]
    by_step = batches(rows, tokenizer, 3, seed=1)
    assert sorted(i for step in range(5) for i in by_step(step)["row"].tolist()) == sorted([*range(5)] * 3)
    batch = by_step(1)
    again = collate([rows[i] for i in batch["row"]], tokenizer)
    assert same({**batch, "row": again["row"]}, again)
    assert same(batch, batches(rows, tokenizer, 3, seed=1)(1))


@pytest.mark.parametrize(("collate", "row"), [(collate_preferences, PAIR), (collate_feedback, THUMB)])
def test_pairs_and_thumbs_that_never_were_in_a_file_are_checked_too(tokenizer, collate, row):
    with pytest.raises(ValueError, match='row 1: "prompt" is missing; a row of kind'):
        collate([row, without(row, "prompt")], tokenizer)


# --- many rows, and datasets ---------------------------------------------------------------------------------------


def test_a_dataset_is_taken_wherever_records_are(tokenizer):
    rows = numbered(6)
    dataset = to_dataset(rows)
    assert same(collate_sft(dataset, tokenizer), collate_sft(rows, tokenizer))
    assert same(sft_batches(dataset, tokenizer, 4)(2), sft_batches(rows, tokenizer, 4)(2))
    assert same(collate_preferences(to_dataset([PAIR]), tokenizer), collate_preferences([PAIR], tokenizer))
    assert check_records(dataset, "sft") == rows
    with pytest.raises(ValueError, match='row 6: "completion" must be a text, not null'):
        check_records(to_dataset([*rows, {"prompt": "Table 7?"}]), "sft")
    with pytest.raises(ValueError, match="an empty data set"):
        check_records([], "sft")


@pytest.mark.parametrize("kind", ["sharegpt", "alpaca"])
def test_the_other_formats_are_read_with_file_line_field_and_mend(tmp_path, kind):
    good, bad, fault = {
        "sharegpt": (
            {"conversations": [{"from": "human", "value": "a"}]},
            {"conversations": [{"from": "human"}]},
            "at [0]",
        ),
        "alpaca": (
            {"instruction": "a", "input": "", "output": "b"},
            {"instruction": "a"},
            "is missing; a row of",
        ),
    }[kind]
    path = write(tmp_path / "mine.jsonl", good, bad)
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ")) as error:
        read_records(path, kind)
    assert fault in str(error.value)


def test_write_records_gives_back_the_rows_and_never_half_a_file(tmp_path):
    rows = [ROW, {**ROW, "prompt": "Crème brûlée?\n\tFür 2 ½ "}]
    write_records(tmp_path / "mine.jsonl", iter(rows))
    assert read_records(tmp_path / "mine.jsonl", "sft") == rows
    with pytest.raises(TypeError):
        write_records(tmp_path / "mine.jsonl", [ROW, {"prompt": object()}])
    assert read_records(tmp_path / "mine.jsonl", "sft") == rows, "what stood there still stands"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


MEASURE = """
import json, resource, sys
from spark_ft.data.records import iter_records
path, count = sys.argv[1], int(sys.argv[2])
with open(path, "w") as file:
    for i in range(count):
        row = {"prompt": f"Order for table {i}: soup, medium", "completion": '{"dish": "soup"} ' * 20}
        file.write(json.dumps(row) + "\\n")
next(iter_records(path, "sft"))
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(1 for _ in iter_records(path, "sft"))
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize("count", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_rows_are_checked_in_flat_memory(tmp_path, count):
    pytest.importorskip("resource")
    path = tmp_path / "many.jsonl"
    command = [sys.executable, "-c", MEASURE, str(path), str(count)]
    rows, grown = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert rows == count
    assert path.stat().st_size > 375 * count
    assert grown < 20e6, f"reading kept {grown / 1e6:.0f} MB of {path.stat().st_size / 1e6:.0f}"
    path.unlink()
