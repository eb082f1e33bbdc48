"""Reading, rendering and collating: every error names its place and mend; every label is where it belongs."""

import copy
import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import complains
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from spark_ft import collate_feedback, collate_preferences, collate_sft, with_prompt
from spark_ft.data.batches import feedback_batches, padded, preference_batches, sft_batches
from spark_ft.data.chat import IGNORE, all_answers, last_answer, render, whole_conversation, whole_text
from spark_ft.data.formats import sft_to_messages, sharegpt_to_messages, to_dataset
from spark_ft.data.records import check_records, iter_records, read_records, write_records
from spark_ft.files import ROOT
from spark_ft.lab.parity import GENERATION_TEMPLATE, trl_marks

ROW = {"prompt": "Soup of the day?", "completion": "Leek."}
PAIR = {"prompt": "Soup of the day?", "chosen": "Leek.", "rejected": "No."}
THUMB = {**ROW, "label": True}
CHAT = {"messages": [{"role": "user", "content": "Soup?"}, {"role": "assistant", "content": "Leek."}]}


def write(path, *lines) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def without(row, field):
    return {key: value for key, value in row.items() if key != field}


def turn(role, text, **more):
    return {"role": role, "content": text, **more}


def chat(*turns, **more):
    return {"messages": list(turns), **more}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- reading ---------------------------------------------------------------------------------------------
GOOD = {
    "sft": ROW,
    "preference": PAIR,
    "feedback": THUMB,
    "chat": CHAT,
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "text": {"text": "a"},
}


def test_records_of_every_kind_are_read_one_line_at_a_time_with_their_extra_fields(tmp_path):
    for kind, row in GOOD.items():
        rows = [row, {**row, "style": "colon", "n": 3, "tools": None, "system": "", "history": []}]
        path = tmp_path / "good.jsonl"
        lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
        path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
        assert read_records(path, kind) == rows
    rows = iter_records(write(tmp_path / "mine.jsonl", ROW, "not JSON"), "sft")
    assert next(rows) == ROW, "the first row should come before the second is looked at"
    with pytest.raises(ValueError, match=":2: malformed"):
        next(rows)


def test_a_bad_row_is_named_by_file_line_field_and_mend(tmp_path):
    user, bot = CHAT["messages"][0], {"role": "bot", "content": "a"}
    text, part = "must be a text, not", [{"type": "text", "text": "a"}]
    nothing = {"role": "assistant", "content": None}
    call = {**nothing, "tool_calls": [{"type": "function"}]}
    text_call = {**nothing, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    rows = [
        ("sft", without(ROW, "prompt"), '"prompt" is missing', "a row of kind"),
        ("sft", {**ROW, "completion": "  "}, '"completion" is empty', "fill it in or drop the row"),
        ("sft", {**ROW, "completion": 7}, f'"completion" {text} a number', "write it as one"),
        ("sft", {**ROW, "prompt": None}, f'"prompt" {text} null', "fill it in or drop the row"),
        ("sft", {**ROW, "prompt": "half \ud83d"}, '"prompt" holds half a character', "as UTF-8 again"),
        ("sft", ["prompt"], "a row must be a JSON object, not a list", '{"prompt": …}'),
        ("preference", without(PAIR, "rejected"), '"rejected" is missing', "prompt, chosen, rejected"),
        ("preference", {**PAIR, "rejected": "Leek."}, '"chosen" equals "rejected"', "drop the row"),
        ("preference", {**PAIR, "chosen": [nothing]}, f'"chosen" {text} a list', "write it as one"),
        ("feedback", {**THUMB, "label": "yes"}, '"label" must be true or false, not a text', "thumbs"),
        ("feedback", {**THUMB, "label": 1}, '"label" must be true or false, not a number', "thumbs up"),
        ("feedback", {**THUMB, "label": None}, '"label" must be true or false, not null', "fill it in"),
        ("chat", {"messages": "hi"}, '"messages" must be a list of messages, not a text', '[{"role": …'),
        ("chat", chat(), '"messages" is empty', "fill it in or drop the row"),
        ("chat", chat("hi"), '"messages" at [0] must be an object', "role and content"),
        ("chat", chat(bot), '"messages" at [0]: "role" is "bot"', "use one of system"),
        ("chat", chat({"content": "a"}), f'"messages" at [0]: "role" {text} null', "fill it in"),
        ("chat", chat({"role": "user"}), '"messages" at [0]: "content" is missing', "fill it in"),
        ("chat", chat({**user, "content": ""}), '"messages" at [0]: "content" is empty', "fill it in"),
        ("chat", chat(user, nothing), f'"messages" at [1]: "content" {text} null', "fill it in"),
        ("chat", chat({**user, "content": part}), f'"content" {text} a list', "write it as one"),
        ("chat", chat(user, call), '"messages" at [1]: "tool_calls" must be a list of calls', '"function"'),
        ("chat", chat(user, text_call), '"tool_calls" at "arguments" must be an object', "json.loads"),
        ("chat", chat({**user, "role": "system"}, system="a"), '"system" stands beside', "keep one"),
        ("chat", chat(user, images=["a.png"]), '"images" is not used in training', "drop the row"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, '[0]: "value" is missing', "fill it in"),
        ("alpaca", {"instruction": "a"}, '"output" is missing; a row of', "instruction, output"),
        ("alpaca", {**GOOD["alpaca"], "history": [["a"]]}, '"history" must be a list', '["question", '),
        ("sft", {**ROW, "system": 3}, f'"system" {text} a number', "write it as one"),
        ("sft", {**ROW, "tools": "[]"}, '"tools" must be a list of objects, not a text', "json.loads"),
        ("sft", {**ROW, "tools": ["add"]}, '"tools" must be a list of objects', '"function"'),
        ("sft", {**ROW, "history": [["a", "b"]]}, '"history" is not used in training', '"messages"'),
        ("sft", {**ROW, "system_prompt": "a"}, '"system_prompt" is not used', 'rename it to "system"'),
        ("preference", {**PAIR, "weight": 0.5}, '"weight" is not used in training', "take the field out"),
        ("sft", '{"prompt": "a", "completion": }', "malformed JSON at column 31", "one whole JSON object"),
        ("sft", '{"prompt": "a"', "malformed JSON at column 15", "one whole JSON object on each line"),
        ("sft", '{"prompt": "a", "n": [1, NaN]}', '"n" holds NaN, which JSON does not', "write null"),
        ("sft", '{"n": -Infinity, "prompt": "a"}', '"n" holds -Infinity', "write null"),
        ("sft", '{"id": ' + "9" * 5000 + "}", '"id" holds a number of more than 4300 digits', "in quotes"),
        ("sft", '{"n": ' + "[" * 100_000, "lists and objects are nested too deeply", "as a text"),
    ]
    calls = []
    for number, (kind, row, *parts) in enumerate(rows):  # the blank line counts as a line, not as a row
        path = write(tmp_path / f"mine{number}.jsonl", GOOD[kind], "", row, GOOD[kind])
        calls.append((read_records, (path, kind), f"{path}:3: ", *parts))
    complains(*calls)


def test_a_bad_file_and_values_that_are_not_pythons_own_are_named_with_their_mend(tmp_path):
    latin, empty, blank, none = (tmp_path / f"{name}.jsonl" for name in ("latin", "empty", "blank", "none"))
    latin.write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "cr\xe8me", "completion": "a"}\n')
    empty.write_text("")
    blank.write_text("\n \n")
    good = write(tmp_path / "mine.jsonl", ROW)
    known = "unknown kind 'pairs' of records; use one of sft, preference, feedback, chat"
    complains(
        (read_records, (latin, "sft"), f"{latin}:2: not UTF-8 at byte 14 of the line; save the file as"),
        (read_records, (empty, "sft"), f"{empty}: an empty data set; it needs at least one row of prompt"),
        (read_records, (blank, "sft"), f"{blank}: an empty data set"),
        (iter_records, (none, "sft"), f"{none}: no such file; check the path"),  # before anything is read
        (iter_records, (good, "pairs"), known),
        (check_records, ([ROW], "pairs"), known),
        (check_records, ([], "sft"), "an empty data set"),
    )
    array = np.array([{"role": "user", "content": "a"}])
    numpy = "call its .tolist()"
    complains(
        (check_records, ([{"messages": array}], "chat"), "row 0: ", "not a NumPy ndarray", numpy),
        (check_records, ([THUMB, {**THUMB, "label": np.bool_(1)}], "feedback"), "row 1: ", numpy),
        (check_records, ([{"messages": [{"role": array, "content": "a"}]}], "chat"), "ndarray", numpy),
        (check_records, ([{**ROW, "tools": array}], "sft"), '"tools" must be a list of objects', numpy),
        (check_records, ([{**ROW, "prompt": math.nan}], "sft"), "must be a text, not NaN; fill it in"),
        (check_records, ([{**ROW, "prompt": b"a"}], "sft"), "must be a text, not a bytes; write it as one"),
    )
    assert check_records([{**ROW, "prompt": np.str_("a"), "n": np.int64(3)}], "sft"), "notes may be anything"


# --- rendering -------------------------------------------------------------------------------------------
def test_render_gives_the_ids_of_the_whole_conversation_up_to_its_last_end_of_turn(tokenizer):
    prompt, completion = render(ROW, tokenizer)
    turns = [turn("user", ROW["prompt"]), turn("assistant", ROW["completion"])]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    head, end, after = text.rpartition("<|im_end|>")
    assert after == "\n", "the template changed: what follows the last turn was one newline"
    assert prompt + completion == tokenizer(head + end, add_special_tokens=False).input_ids
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(completion) == "Leek.<|im_end|>"
    assert render({"messages": turns}, tokenizer) == (prompt, completion)
    turns += [turn("user", "And fish?"), turn("assistant", "Cod.")]  # the last answer is the completion
    prompt, completion = render({"messages": turns}, tokenizer)
    assert tokenizer.decode(completion) == "Cod.<|im_end|>"
    assert prompt == tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)


def test_render_refuses_what_would_be_dropped_or_misread(tokenizer):
    user, answer = CHAT["messages"]
    complains(*((render, (row, tokenizer), *parts) for row, *parts in [
        (chat(user), '"messages" must end with an answer by the assistant; add one'),
        ({**ROW, "completion": "\n\nLeek."}, "does not keep the prompt's tokens", "strip it"),
        (chat(user, {**answer, "train": False}), '"messages" at [1] has "train"', '"weight": 0 or 1'),
        (chat({**user, "name": "Ana"}, answer), '"messages" at [0] has "name"', "write it into the content"),
        (chat(user, {**answer, "reasoning_content": "Hm."}), 'has "reasoning_content"', "<think>"),
        (chat(user, {**answer, "tool_calls": CALL}), 'the chat template leaves "tool_calls" out', "content"),
        ({"prompt": [user, answer], "completion": "c"}, '"prompt" must end before the answer', "take its"),
        (chat(user, {**answer, "weight": 0.5}), "has the weight 0.5", "0 or 1"),
        (chat({**user, "weight": 1}, answer), "has the weight 1; only answers have one"),
        ({**ROW, "tools": TOOLS}, 'the chat template leaves "tools" out', "take the field out"),
        ({**ROW, "system": 3}, '"system" must be a text'),
        ({**ROW, "images": ["a.png"]}, '"images" is not used'),
    ]))  # fmt: skip
    empties = {"name": "", "tool_calls": [], "weight": None, "from": "human"}
    same = chat({**user, **empties}, answer, tools=[], system=None)
    assert render(same, tokenizer) == render(CHAT, tokenizer)


TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]
CALL = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]
CALLED = "m.content + ((m.tool_calls | map(attribute='function') | list | tojson) if m.tool_calls else '')"
TURN = "{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>' }}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}"
PLAIN += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def with_template(tokenizer, template, content="m.content"):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template and template.replace("CONTENT", content)
    return changed


def test_a_template_that_fails_or_loses_a_text_is_refused(tokenizer):
    def without_role(role):
        return PLAIN.replace("messages %}", f"messages if m.role != '{role}' %}}")

    system, thought = {**ROW, "system": "s"}, {**ROW, "completion": "<think>two\nand two</think> Leek."}
    tool = chat(*CHAT["messages"], turn("tool", "3"), CHAT["messages"][1])
    refuses, other = "the chat template refuses this conversation", "another chat_template"
    short = "(m.content[:4] if m.role == 'assistant' else m.content)"
    answer_last = "m.content.split('</think>')[-1]"
    complains(*((render, (row, with_template(tokenizer, *template)), *parts) for row, template, *parts in [
        (thought, (PLAIN, answer_last), "the chat template leaves '<think>' out", other),
        (ROW, (PLAIN, short), "the chat template leaves 'Leek.' out", other),
        (system, (without_role("system"),), '"system": the chat template leaves it out or', other),
        (tool, (without_role("tool"),), '"messages" at [2]: the chat template leaves it out', other),
        (system, ("{{ raise_exception('No system') }}",), f'{refuses}: "No system"; change what it names'),
        (ROW, ("{{ messages[0].content + 3 }}",), refuses, other),
        (ROW, ("{% if %}",), refuses, other),
        (ROW, (None,), "the tokenizer has no chat_template"),
        (ROW, (PLAIN.replace("assistant\n", "assistant\n<think>"),), "writes the prompt otherwise", other),
        (ROW, (PLAIN.replace("<|im_end|>", ""),), "does not end the assistant's turn", "tokenizer.eos"),
    ]))  # fmt: skip


def test_a_template_may_trim_spell_and_open_the_answer_and_renders_system_and_tools(tokenizer):
    thought = {**ROW, "completion": " <think>\ntwo\n  and two\n</think>\n\nLeek."}
    quotes = chat(*CHAT["messages"], turn("user", 'A "1"?'), CHAT["messages"][1])
    trims = "m.content.replace('<think>\n', '<think>').replace('\n</think>\n\n', '</think>') | trim"
    opens = PLAIN.replace("assistant\n", "assistant\n<think>\n")
    cases = [
        (thought, PLAIN, trims, "<think>two\n  and two</think>Leek.<|im_end|>"),
        (thought, opens, "(m.content | trim)", "two\n  and two\n</think>\n\nLeek.<|im_end|>"),
        (quotes, PLAIN, "(m.content if m.role == 'assistant' else m.content | tojson)", "Leek.<|im_end|>"),
    ]
    for row, template, content, learned in cases:
        _, completion = render(row, with_template(tokenizer, template, content))
        assert tokenizer.decode(completion) == learned
    tools = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>' }}{% endif %}"
    for row in (ROW, CHAT):
        prompt, _ = render({**row, "tools": TOOLS}, with_template(tokenizer, tools + PLAIN))
        assert '"get_weather"' in tokenizer.decode(prompt)
        messages = row.get("messages") or sft_to_messages(row)["messages"]
        with_turn = {"messages": [turn("system", "Be brief."), *messages]}
        assert render({**row, "system": "Be brief."}, tokenizer) == render(with_turn, tokenizer)


def test_tool_calls_are_rendered_and_learned_and_a_template_that_loses_a_part_is_refused(tokenizer):
    user, answer = CHAT["messages"]
    call = {"role": "assistant", "content": None, "tool_calls": CALL}
    result = {"role": "tool", "name": "get_weather", "tool_call_id": "c1", "content": "9 °C"}
    calls = with_template(tokenizer, PLAIN, CALLED)
    ids, learned = all_answers(chat(user, call, result, answer), calls)
    said = tokenizer.decode([token for token, one in zip(ids, learned, strict=True) if one])
    assert said == '[{"name": "get_weather", "arguments": {"city": "Rome"}}]<|im_end|>Leek.<|im_end|>'
    _, completion = render(chat(user, call), calls)
    assert '"city": "Rome"' in tokenizer.decode(completion)
    name_only = "m.content + (m.tool_calls[0].function.name if m.tool_calls else '')"
    for row in (chat(user, call), chat(user, call, result, answer)):
        loses = (row, with_template(tokenizer, PLAIN, name_only))
        complains((render, loses, '[1]: the chat template leaves "tool_calls" out or rewrites'))


def test_a_prompt_may_be_a_list_of_messages_and_a_text_is_learned_whole(tokenizer):
    question, answer, *rest = [*CHAT["messages"], turn("user", "And fish?")]
    row = {"prompt": [question, answer, *rest], "completion": "Cod."}
    whole = chat(question, answer, *rest, turn("assistant", "Cod."))
    assert render(row, tokenizer) == render(whole, tokenizer)
    assert sft_to_messages(row) == whole
    pair = {"prompt": row["prompt"], "chosen": "Cod.", "rejected": "Ham."}
    batch = collate_preferences([pair], tokenizer)
    assert batch["prompt_ids"][0].tolist() == render(row, tokenizer)[0]
    ids, learned = whole_text({"text": "Leek soup."}, tokenizer)
    assert (tokenizer.decode(ids), all(learned)) == ("Leek soup.<|im_end|>", True)
    text = {"text": "Leek soup. " * 9}
    complains(
        (whole_text, ({"text": "a<|im_end|>"}, tokenizer), '"text" holds the control token'),
        (collate_sft, ([text], tokenizer, 9, whole_text), "a text of", "fit max_length=9", "split it"),
    )
    labels = collate_sft([text], tokenizer, learn=whole_text)["labels"]
    assert labels[0].tolist() == whole_text(text, tokenizer)[0]


# --- collating -------------------------------------------------------------------------------------------
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


@given(rows=ROWS)
def test_collate_sft_unpads_to_the_rendered_rows(tokenizer, rows):
    batch = collate_sft(rows, tokenizer)
    rendered = [render(row, tokenizer) for row in rows]
    assert list(unpad(batch)) == rendered
    width = max(len(p) + len(c) for p, c in rendered)
    for b, (prompt, completion) in enumerate(rendered):
        end = len(prompt) + len(completion)
        labels = [IGNORE] * len(prompt) + completion + [IGNORE] * (width - end)
        assert batch["labels"][b].tolist() == labels
        assert batch["attention_mask"][b].tolist() == [1] * end + [0] * (width - end)
        assert completion[-1] == tokenizer.eos_token_id, "the end is learned, though pad has its id"
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_rows_that_do_not_fit_or_never_were_in_a_file_are_refused_too(tokenizer):
    question = {"messages": CHAT["messages"][:1]}
    missing, none = 'row 1: "prompt" is missing; a row of kind', "an empty data set: no rows to train on"
    need, rows = len(render(ROW, tokenizer)[1]) + 1, [{**ROW, "completion": "A"}, ROW]
    assert collate_sft([ROW], tokenizer, max_length=need)["input_ids"].shape == (1, need)
    complains(
        (collate_sft, (rows, tokenizer, need - 1), "row 1: a completion of", f"raise it to {need} or more"),
        (collate_sft, ([ROW, question], tokenizer), 'row 1: "messages" must end with'),
        (collate_sft, ([ROW, without(ROW, "completion")], tokenizer), 'row 1: "completion" is missing'),
        (sft_batches, ([{**ROW, "prompt": None}], tokenizer, 1), 'row 0: "prompt" must be a text, not null'),
        (sft_batches, ([ROW], tokenizer, 0), "batch_size is 0; a step needs at least one row"),
        (collate_sft, ([], tokenizer), none),
        (sft_batches, ([], tokenizer, 2), none),
        (collate_preferences, ([PAIR, without(PAIR, "prompt")], tokenizer), missing),
        (collate_feedback, ([THUMB, without(THUMB, "prompt")], tokenizer), missing),
        (collate_feedback, ([THUMB], tokenizer), "one feedback row has no other to be mismatched with"),
    )


# --- batches by step -------------------------------------------------------------------------------------
def numbered(count):
    return [{"prompt": f"Table {i}?", "completion": f"{i}"} for i in range(count)]


def answers(batch, tokenizer):
    return [int(tokenizer.decode(completion[:-1])) for _, completion in unpad(batch)]


@settings(max_examples=25)
@given(count=st.integers(1, 13), size=st.integers(1, 9), seed=st.integers(0, 5), data=st.data())
def test_sft_batches_visits_each_row_once_an_epoch_by_seed_and_step(tokenizer, count, size, seed, data):
    batches = sft_batches(numbered(count), tokenizer, size, seed)
    stream = [row for step in range(3 * count) for row in answers(batches(step), tokenizer)]
    assert len(stream) == 3 * count * size
    for start in range(0, len(stream), count):
        assert sorted(stream[start : start + count]) == list(range(count)), "an epoch must hold each row once"
    for step in data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=6)):
        torch.rand(1)  # the global generator must play no part
        assert same(batches(step), sft_batches(numbered(count), tokenizer, size, seed)(step)), step


def test_sft_batches_shuffles_by_seed_and_by_epoch_and_tokenizes_each_row_once(tokenizer):
    rows, calls = numbered(12), []
    learn = lambda row, tok: calls.append(row) or last_answer(row, tok)  # noqa: E731
    first, other = (sft_batches(rows, tokenizer, 12, seed, learn=learn) for seed in (0, 1))
    orders = [answers(first(0), tokenizer), answers(first(1), tokenizer), answers(other(0), tokenizer)]
    assert len({tuple(order) for order in [*orders, range(12)]}) == 4
    assert calls == rows * 2
    assert same(first(1), collate_sft([rows[i] for i in orders[1]], tokenizer))


# --- control tokens --------------------------------------------------------------------------------------
def test_a_control_token_inside_a_text_is_refused_with_its_place(tokenizer):
    added = copy.deepcopy(tokenizer)
    render(ROW, added)  # before the token is there
    added.add_tokens([AddedToken("<|start_header_id|>", special=True), AddedToken("<think>")])
    end, found = "Soup?<|im_end|>\nassistant", "holds the control token"
    complains(
        (render, ({**ROW, "prompt": "x<|start_header_id|>y"}, added), "'<|start_header_id|>'; take it out"),
        (render, (chat(turn("user", end), CHAT["messages"][1]), tokenizer), f'"messages" at [0] {found}'),
        (render, ({**ROW, "system": end}, tokenizer), f'"system" {found}'),
        (render, ({**ROW, "tools": [{"type": end}]}, tokenizer), f'"tools" {found}'),
        (collate_preferences, ([PAIR, {**PAIR, "rejected": end}], tokenizer), f'row 1: "rejected" {found}'),
        *(
            (collate_sft, ([{**ROW, field: f"a{token}\nb"}], tokenizer), f'"{field}" {found} {token!r}')
            for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
            for field in ROW
        ),
    )  # fmt: skip
    assert render({**ROW, "completion": "<think>a"}, added), "a token that is not special is text"


# --- what is learned -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chats():
    rows = read_records(ROOT / "data/kitchen_chats/train.jsonl", "sharegpt")
    return list(map(sharegpt_to_messages, rows))


def ours(rows, tokenizer, learn, max_length=4096):
    """(ids, whether each is learned) of each row, read back from `collate_sft`'s tensors."""
    batch = collate_sft(rows, tokenizer, max_length, learn)
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        learned = labels != IGNORE
        assert torch.equal(labels[learned], ids[learned]), "a label is the token at its own place"
        yield ids[mask.bool()].tolist(), learned[mask.bool()].tolist()


def test_the_template_with_generation_marks_renders_the_same_text(tokenizer, chats):
    marked = with_template(tokenizer, GENERATION_TEMPLATE)
    system = [turn("system", "Be brief."), *CHAT["messages"]]
    for messages in (*(chat["messages"] for chat in chats), system, CHAT["messages"][:1]):
        for prompting in (False, True):
            how = {"tokenize": False, "add_generation_prompt": prompting}
            assert len({each.apply_chat_template(messages, **how) for each in (marked, tokenizer)}) == 1


def test_what_is_learned_equals_trls_marks(tokenizer, chats):
    """TRL keeps the new line that the template writes after the last end of turn; it is never generated."""
    marked = with_template(tokenizer, GENERATION_TEMPLATE)
    split = [{"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]} for chat in chats]
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    for learn, theirs, last in (
        (all_answers, trl_marks(chats, marked, assistant_only=True), False),
        (last_answer, trl_marks(split, tokenizer, completion_only=True), True),
        (whole_conversation, trl_marks(chats, tokenizer), True),
    ):
        for (ids, learned), row in zip(ours(chats, marked, learn), theirs, strict=True):
            assert row == (ids + newline, [*learned, last]), learn.__name__
        assert sum(sum(learned) for _, learned in theirs) > 1000
    rendered = [render(chat, tokenizer) for chat in chats]
    texts = [{"prompt": tokenizer.decode(p), "completion": tokenizer.decode(c)} for p, c in rendered]
    assert list(ours(chats, tokenizer, last_answer)) == trl_marks(texts, tokenizer, completion_only=True)


def test_all_answers_learns_none_of_weight_0_and_refuses_a_template_that_rewrites_some(tokenizer, chats):
    rewritten = "(m.content if loop.last or m.role != 'assistant' else m.content.split(' ')[-1])"
    forgetful = with_template(tokenizer, PLAIN, rewritten)
    collate_sft(chats, forgetful, 4096)  # the last answers are whole
    complains((collate_sft, (chats, forgetful, 4096, all_answers), "changes this answer", "learn the last"))
    assert all_answers(ROW, tokenizer) == last_answer(sft_to_messages(ROW), tokenizer)
    user, right = CHAT["messages"]
    wrong = turn("assistant", "WRONG", weight=0)
    last_wrong = {"messages": [user, right, user, wrong]}
    for row in ({"messages": [user, wrong, user, {**right, "weight": 1}]}, last_wrong):
        ids, learned = all_answers(row, tokenizer)
        said = tokenizer.decode([i for i, mark in zip(ids, learned, strict=True) if mark])
        assert said == "Leek.<|im_end|>"
    complains(
        (last_answer, (last_wrong, tokenizer), "nothing is learned", "drop it"),
        (all_answers, ({"messages": [user, wrong]}, tokenizer), "nothing is learned", "drop it"),
        (whole_conversation, (last_wrong, tokenizer), "an answer has the weight 0", "learn all_answers"),
        (all_answers, ({"messages": [right, user, right]}, tokenizer), "[0] answers no question", "weight 0"),
        (collate_sft, ([last_wrong], tokenizer, 12, all_answers), "nothing to learn is left", "raise it"),
    )


def test_truncation_keeps_the_last_answer_whatever_is_learned(tokenizer, chats):
    for learn in (last_answer, all_answers, whole_conversation):
        for chat in chats[:8]:
            whole, marks = learn(chat, tokenizer)
            need = len(render(chat, tokenizer)[1]) + 1
            for length in (need, len(whole) - 1, len(whole)):
                assert list(ours([chat], tokenizer, learn, length)) == [(whole[-length:], marks[-length:])]
            complains((collate_sft, ([chat], tokenizer, need - 1, learn), f"raise it to {need} or more"))


def test_what_truncation_cuts_is_counted_and_told_and_the_first_token_stays(tokenizer):
    begun = with_template(tokenizer, "{{ '<|endoftext|>' }}" + PLAIN)
    long, system = {**ROW, "prompt": "word " * 40}, {"system": "In French."}
    rows = [ROW, long, {**long, **system}, {**long, "prompt": "word " * 60}]
    pairs = [{"prompt": row["prompt"], "chosen": "A", "rejected": row["completion"], **row} for row in rows]
    thumbs = [{**row, "label": True} for row in rows]
    longest = len(last_answer(rows[3], begun)[0])
    told = f"3 of 4 rows lost the start of .*, 1 of them a system turn; raise max_length from 30 to {longest}"
    first = begun.convert_tokens_to_ids("<|endoftext|>")
    for collate, batches, records, side in (
        (collate_sft, sft_batches, rows, None),
        (collate_preferences, preference_batches, pairs, "rejected"),
        (collate_feedback, feedback_batches, thumbs, "completion"),
    ):
        with pytest.warns(UserWarning, match=told) as warned:
            batch = collate(records, begun, max_length=30)
        with pytest.warns(UserWarning, match=told):
            batches(records, begun, 2, max_length=30)
        assert len(warned) == 1
        cut = with_prompt(batch, side) if side else batch
        assert cut["input_ids"][:, 0].tolist() == [first] * 4
        assert cut["attention_mask"].sum(1).max() == 30
        with warnings.catch_warnings(action="error"):
            collate(records, begun, max_length=longest)
    with pytest.warns(UserWarning, match="1 of 1 rows"):
        batch = collate_sft([long], begun, len(render(long, begun)[1]) + 1)
    assert tokenizer.decode(batch["input_ids"][0]) == "\nLeek.<|im_end|>", "the answer's head comes first"


# --- preference and feedback ----------------------------------------------------------------------------
PAIR_ROW = st.fixed_dictionaries({"prompt": QUESTION, "chosen": ANSWER, "rejected": ANSWER})
PAIRS = st.lists(PAIR_ROW.filter(lambda row: row["chosen"] != row["rejected"]), min_size=1, max_size=4)


@given(rows=PAIRS)
def test_a_side_of_a_pair_with_its_prompt_is_what_collate_sft_makes(tokenizer, rows):
    batch = collate_preferences(rows, tokenizer)
    for side in ("chosen", "rejected"):
        as_sft = [{"prompt": row["prompt"], "completion": row[side]} for row in rows]
        assert same(with_prompt(batch, side), collate_sft(as_sft, tokenizer))
    assert batch["row"].tolist() == list(range(len(rows)))
    assert {len(tensor) for tensor in batch.values()} == {len(rows)}, "train slices every tensor by rows"


def test_a_long_prompt_loses_its_start_on_both_sides_and_a_thumb_is_mismatched_with_the_one_before(tokenizer):
    row = {**PAIR, "prompt": "Long ago, " * 50, "rejected": "No, no, no and no."}
    prompt, chosen = render({"prompt": row["prompt"], "completion": row["chosen"]}, tokenizer)
    _, rejected = render({"prompt": row["prompt"], "completion": row["rejected"]}, tokenizer)
    assert len(rejected) > len(chosen)
    batch = collate_preferences([row], tokenizer, max_length=len(rejected) + 20)
    assert batch["prompt_ids"].tolist() == [prompt[-20:]]
    assert batch["chosen_ids"].tolist() == [chosen]
    assert batch["rejected_ids"].tolist() == [rejected]
    with pytest.raises(ValueError, match=f"row 0: a completion of .* raise it to {len(rejected) + 1}"):
        collate_preferences([row], tokenizer, max_length=len(rejected))
    rows = [{"prompt": f"Table {i}?", "completion": "A" * (i + 1), "label": i != 1} for i in range(3)]
    batch = collate_feedback(rows, tokenizer)
    assert batch["desirable"].tolist() == [True, False, True]
    shifted = [{**row, "completion": rows[i - 1]["completion"]} for i, row in enumerate(rows)]
    for side, expected in (("completion", rows), ("mismatched", shifted)):
        assert same(with_prompt(batch, side), collate_sft(expected, tokenizer))
    each = [row for both in zip(rows, shifted, strict=True) for row in both]
    assert same(with_prompt(batch, "completion", "mismatched"), collate_sft(each, tokenizer))


def test_a_thumbs_mismatched_answer_belongs_to_another_prompt_and_stays_in_every_epoch(tokenizer):
    asked = ("Salt?", "Salt?", "Oil?", "Salt?", "Salt?")
    rows = [{"prompt": p, "completion": str(i), "label": True} for i, p in enumerate(asked)]
    batch = collate_feedback(rows, tokenizer)
    answers = ["2", "2", "1", "2", "2"]
    said = tokenizer.batch_decode(batch["mismatched_ids"], skip_special_tokens=True)
    assert [text.strip() for text in said] == answers
    by_step = feedback_batches(rows, tokenizer, 3)
    for step in range(10):
        batch = by_step(step)
        said = tokenizer.batch_decode(batch["mismatched_ids"], skip_special_tokens=True)
        assert [text.strip() for text in said] == [answers[i] for i in batch["row"]]
    alike = [{**row, "prompt": "Salt?"} for row in rows]  # the row before is the best there is
    batch = collate_feedback(alike, tokenizer)
    said = tokenizer.batch_decode(batch["mismatched_ids"], skip_special_tokens=True)
    assert [text.strip() for text in said] == ["4", "0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("batches", "collate", "row"),
    [(preference_batches, collate_preferences, PAIR), (feedback_batches, collate_feedback, THUMB)],
)
def test_batches_by_step_name_their_rows_and_equal_collating_them(tokenizer, batches, collate, row):
    rows = [{**row, "prompt": f"Table {i}?"} for i in range(5)]
    by_step = batches(rows, tokenizer, 3, seed=1)
    assert sorted(i for step in range(5) for i in by_step(step)["row"].tolist()) == sorted([*range(5)] * 3)
    batch = by_step(1)
    whole = collate(rows, tokenizer)
    for name, tensor in batch.items():  # of one width, since the rows differ in their prompts' digit alone
        assert torch.equal(tensor, whole[name][batch["row"]]), name
    assert same(batch, batches(rows, tokenizer, 3, seed=1)(1))


# --- many rows, and datasets -----------------------------------------------------------------------------
def test_a_dataset_is_taken_wherever_records_are(tokenizer):
    rows = numbered(6)
    dataset = to_dataset(rows)
    assert same(collate_sft(dataset, tokenizer), collate_sft(rows, tokenizer))
    assert same(sft_batches(dataset, tokenizer, 4)(2), sft_batches(rows, tokenizer, 4)(2))
    assert same(collate_preferences(to_dataset([PAIR]), tokenizer), collate_preferences([PAIR], tokenizer))
    assert check_records(dataset, "sft") == rows
    more = to_dataset([*rows, {"prompt": "Table 7?"}])
    complains((check_records, (more, "sft"), 'row 6: "completion" must be a text, not null'))


@pytest.mark.parametrize("left", [False, True])
def test_padding_stands_on_the_side_that_was_asked_for(left):
    ids, mask = padded([[5, 6, 7], [8], [9, 3]], 0, left)
    short = [[0, 0, 8], [0, 9, 3]] if left else [[8, 0, 0], [9, 3, 0]]
    assert ids.tolist() == [[5, 6, 7], *short]
    assert mask.tolist() == (ids != 0).long().tolist()


def test_write_records_gives_back_the_rows_and_never_half_a_file(tmp_path):
    rows = [ROW, {**ROW, "prompt": "Crème brûlée?\n\tFür 2 ½ \u2028"}]
    path = tmp_path / "mine.jsonl"
    write_records(path, iter(rows))
    assert read_records(path, "sft") == rows
    bad = [object(), math.nan, -math.inf, np.int64(3), np.array([1.0]), "\ud83d", 10**5000, {(1, 2): 3}]
    for value in bad:
        told = 'row 1: "n": ', "; write texts, finite numbers"
        complains((write_records, (path, [ROW, {**ROW, "n": value}]), *told))
    assert read_records(path, "sft") == rows, "what stood there still stands"
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
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
start = peak()
print(sum(1 for _ in iter_records(path, "sft")), peak() - start)
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
