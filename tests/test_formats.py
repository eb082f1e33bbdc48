"""Conversions: what comes back is what went in, and a bad row is named with its field and mend."""

import copy
import math

from helpers import complains
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ft.data import formats as f
from spark_ft.data.records import ROLES, SHAREGPT, read_records, write_records
from spark_ft.files import ROOT
from spark_ft.models import load_tokenizer

LETTERS = st.characters(codec="utf-8") | st.sampled_from("\n\n\t {}|")
TEXT = st.text(LETTERS, min_size=1, max_size=30).filter(str.strip)
PLAIN = TEXT.filter(lambda text: "<|im_" not in text)
FIELDS = st.sampled_from(["id", "source", "score", "tags"])
EXTRA = st.dictionaries(FIELDS, st.none() | st.integers() | TEXT | st.lists(TEXT))
CHAT = {"messages": [{"role": "user", "content": "Soup?"}, {"role": "assistant", "content": "Leek."}]}
SFT = {"prompt": "p", "completion": "c"}
ALPACA = {"instruction": "Name it.", "input": "A leek soup.", "output": "Vichyssoise."}


def turns(who, what, names, text=TEXT):
    return st.lists(rows(**{who: st.sampled_from(names), what: text}), min_size=1, max_size=5)


def rows(**fields):
    return st.builds(lambda extra, row: {**extra, **row}, EXTRA, st.fixed_dictionaries(fields))


def unchanged(convert, row):
    """The converted row; the one that went in must not be touched."""
    before = copy.deepcopy(row)
    result = convert(row)
    assert row == before, "a conversion must leave the row it was given alone"
    return result


@given(rows(conversations=turns("from", "value", list(SHAREGPT))))
def test_sharegpt_to_messages_and_back_is_the_same_row_in_the_same_order(row):
    there = unchanged(f.sharegpt_to_messages, row)
    back = unchanged(f.messages_to_sharegpt, there)
    assert back == row
    assert list(back) == list(row)
    assert [m["role"] for m in there["messages"]] == [SHAREGPT[t["from"]] for t in row["conversations"]]
    assert [m["content"] for m in there["messages"]] == [t["value"] for t in row["conversations"]]


@given(rows(messages=turns("role", "content", ROLES)))
def test_messages_to_sharegpt_and_back_is_the_same_row(row):
    there = unchanged(f.messages_to_sharegpt, row)
    assert {t["from"] for t in there["conversations"]} <= {"system", "human", "gpt", "tool"}
    assert f.sharegpt_to_messages(there) == row


EMPTY = st.none() | st.just("") | st.just([])
EXCHANGES = st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=3)
INPUT = st.text(max_size=20) | TEXT | st.just("\n\n")
OPTIONAL = {"input": INPUT, "system": EMPTY | TEXT, "history": EMPTY | EXCHANGES, "tools": EMPTY}


@settings(max_examples=300)
@given(rows(instruction=TEXT, output=TEXT), st.fixed_dictionaries({}, optional=OPTIONAL))
def test_alpaca_to_messages_and_back_is_the_same_row_but_for_empty_fields(row, optional):
    row = {**row, **optional}
    there = unchanged(f.alpaca_to_messages, row)
    *before, user, answer = [m["content"] for m in there["messages"]]
    assert user == (f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"])
    assert answer == row["output"]
    system = [row["system"]] if row.get("system") else []
    assert before == [*system, *(text for exchange in row.get("history") or [] for text in exchange)]
    empty = {key for key in ("system", "history") if not row.get(key)}
    assert unchanged(f.messages_to_alpaca, there) == {key: row[key] for key in row if key not in empty}


@given(rows(conversations=turns("from", "value", ["human", "gpt"])), TEXT)
def test_a_system_beside_a_conversation_becomes_its_first_turn_and_comes_back(row, system):
    row = {**row, "system": system}
    there = unchanged(f.sharegpt_to_messages, row)
    assert there["messages"][0]["role"] == "system"
    assert there["messages"][0]["content"] == system
    assert "system" not in there
    assert f.messages_to_sharegpt(there) == row


def test_empty_optional_fields_are_as_good_as_absent_and_blank_lines_come_back():
    for empty in (None, "", " ", []):
        extra = {"system": empty, "history": empty, "tools": empty, "images": empty}
        converted = f.alpaca_to_messages({**ALPACA, **extra})
        assert converted["messages"] == f.alpaca_to_messages(ALPACA)["messages"]
        assert "system" not in f.sft_to_messages({**SFT, **extra})
        assert f.messages_to_alpaca({**CHAT, **extra})["instruction"] == "Soup?"
    for instruction, input in [("a\n\nb", "c"), ("a", "b\n\nc"), ("a\n", "\nb"), ("a\n\n", "b")]:
        row = {"instruction": instruction, "input": input, "output": "x"}
        assert f.messages_to_alpaca(f.alpaca_to_messages(row)) == row


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.none() | TEXT)
def test_a_chat_that_never_was_alpaca_goes_there_and_back(exchanges, system):
    texts = [("system", system)] if system else []
    for question, answer in exchanges:
        texts += [("user", question), ("assistant", answer)]
    row = {"id": 7, "messages": [{"role": role, "content": text} for role, text in texts]}
    assert f.messages_to_alpaca(row)["input"] == ""
    assert f.alpaca_to_messages(f.messages_to_alpaca(row)) == row


@given(rows(prompt=TEXT, completion=TEXT), st.fixed_dictionaries({}, optional={"system": TEXT}))
def test_sft_to_messages_and_back_is_the_same_row(row, system):
    row = {**row, **system}
    assert f.messages_to_sft(unchanged(f.sft_to_messages, row)) == row


@given(turns("role", "content", ROLES, PLAIN))
def test_messages_to_chatml_and_back_is_the_same_chat(messages):
    row = {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
    assert f.chatml_to_messages(f.messages_to_chatml(row)) == row


def test_chatml_reads_what_the_template_writes_and_the_kitchen_chats_come_back_byte_for_byte(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]
    text = load_tokenizer().apply_chat_template(messages, tokenize=False)
    assert f.chatml_to_messages(text) == {"messages": messages}
    assert f.messages_to_chatml({"messages": messages}) == text
    path = ROOT / "data/kitchen_chats/train.jsonl"
    chats = [f.sharegpt_to_messages(row) for row in read_records(path, "sharegpt")]
    write_records(tmp_path / "chats.jsonl", chats)
    back = [f.messages_to_sharegpt(row) for row in read_records(tmp_path / "chats.jsonl", "chat")]
    write_records(tmp_path / "back.jsonl", back)
    assert (tmp_path / "back.jsonl").read_bytes() == path.read_bytes()


PAIR = {"prompt": st.sampled_from(["a", "b", "c"]), "chosen": TEXT, "rejected": TEXT, "core": TEXT}
DIFFERENT = st.fixed_dictionaries(PAIR).filter(lambda pair: pair["chosen"] != pair["rejected"])
PAIRS = st.lists(DIFFERENT, max_size=6)


@given(PAIRS)
def test_pairs_come_back_from_their_thumbs(pairs):
    thumbs = f.pairs_to_thumbs(pairs)
    assert len(thumbs) == 2 * len(pairs)
    assert sum(thumb["label"] for thumb in thumbs) == len(pairs)
    prompts = [pair["prompt"] for pair in pairs]
    grouped = sorted(pairs, key=lambda pair: prompts.index(pair["prompt"]))
    assert f.thumbs_to_pairs(thumbs) == grouped


def test_thumbs_that_find_no_partner_make_no_pair_and_middle_ratings_no_thumb():
    thumb = {"prompt": "p", "completion": "good", "label": True, "cook": "Ana", "n": 1}
    lonely = {**thumb, "completion": "also good", "n": 2}
    down = {**thumb, "completion": "bad", "label": False, "n": 3}
    other = {**down, "prompt": "q"}
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad", "cook": "Ana"}
    assert f.thumbs_to_pairs([thumb, lonely, down, other]) == [pair]
    assert f.thumbs_to_pairs([thumb, {**thumb, "label": False}]) == [], "an answer is no better than itself"
    for field in ("system", "tools"):
        asked = {field: "Be brief." if field == "system" else [{"type": "function"}]}
        assert f.thumbs_to_pairs([thumb, {**down, **asked}]) == [], f"another {field} is another prompt"
    rows = [{"prompt": "p", "completion": str(n), "rating": n} for n in (1, 2, 2.5, 3.9, 4, 5)]
    thumbs = f.ratings_to_thumbs(rows)
    assert {thumb["rating"]: thumb["label"] for thumb in thumbs} == {1: False, 2: False, 4: True, 5: True}
    assert f.thumbs_to_pairs(thumbs)[0] == {"prompt": "p", "chosen": "4", "rejected": "1"}


def test_a_dataset_gives_back_the_rows_also_converted_ones():
    question, answer = CHAT["messages"]
    rows = [CHAT, {**CHAT, "id": 3}, {"messages": [{**question, "name": "Ana"}, answer]}]
    dataset = f.to_dataset(rows)
    assert dataset.column_names == ["messages", "id"]
    assert f.from_dataset(dataset) == rows
    rows = read_records(ROOT / "data/kitchen_chats/train.jsonl", "sharegpt")
    mapped = f.to_dataset(rows).map(f.sharegpt_to_messages, remove_columns=["conversations"])
    assert f.from_dataset(mapped) == [f.sharegpt_to_messages(row) for row in rows]


def test_a_bad_row_is_named_by_field_and_mend():
    def turn(who, text, **more):
        return {"from": who, "value": text, **more}

    def sharegpt(*turns, **more):
        return {"conversations": list(turns), **more}

    def chat(*messages, **more):
        return {"messages": list(messages), **more}

    user, answer = CHAT["messages"]
    double = chat({"role": "system", "content": "x"}, answer, system="y")
    rows = {
        f.sharegpt_to_messages: [
            ({}, '"conversations" is missing', "a row of kind"),
            ({"conversations": "hi"}, "must be a list of messages", '[{"from": …'),
            (sharegpt(turn("me", "a")), 'at [0]: "from" is "me"', "use one of"),
            (sharegpt({"from": "gpt"}), 'at [0]: "value" is missing', "fill it in"),
            (sharegpt(turn("gpt", "")), 'at [0]: "value" is empty', "fill it in"),
            (sharegpt(turn("gpt", "a", role=1)), '"role" is there', "rename"),
            (sharegpt(turn("gpt", "a"), messages=1), '"messages" is', "rename"),
            (sharegpt(turn("system", "a"), system="b"), "beside a system turn", "one of them"),
        ],
        f.messages_to_sharegpt: [
            (double, '"system" stands beside a system turn; keep one'),
            (chat({**user, "from": "gpt"}), '"from" is "gpt"', "mend the role"),
        ],
        f.alpaca_to_messages: [
            ({"instruction": "a", "input": ""}, '"output" is missing', "instruction, output"),
            ({**ALPACA, "input": 3}, '"input" must be a text, not a number', "write it as one"),
            ({**ALPACA, "instruction": " "}, '"instruction" is empty', "fill it in"),
            ({**ALPACA, "system": 3}, '"system" must be a text, not a number'),
            ({**ALPACA, "history": ["a"]}, '"history" must be a list', '[["question", "answer"]'),
            ({**ALPACA, "messages": 1}, '"messages" is there already', "rename it"),
        ],
        f.messages_to_alpaca: [
            (chat(user, answer, user), "user, assistant, user", "use ShareGPT"),
            ({**CHAT, "input_start": 3}, '"input_start" is 3', "take the field out"),
            (chat(user, {**answer, "weight": 0}), "hold weight", "take it out"),
        ],
        f.messages_to_sft: [
            (chat(user), '"messages" are user', "keep the messages"),
            (chat(user, answer, user, answer), "user, assistant, user, assistant", "keep"),
        ],
        f.messages_to_chatml: [
            (chat({**user, "content": "a<|im_end|>"}), 'at [0]: "content"', "take it out"),
            (chat({**user, "name": "Ana"}), "hold name", "take it out"),
            (chat(user, tools=[{"type": "function"}]), '"tools" has no place in ChatML'),
        ],
        f.chatml_to_messages: [
            ("", '"messages" is empty', "fill it in"),
            ("hello <|im_start|>user\na<|im_end|>", "at character 0, 'hello", "write each as"),
            ("<|im_start|>user\na", "at character 0, '<|im_start", "write each as"),
            ("<|im_start|>user\na<|im_start|>user\nb<|im_end|>", "at character 0", "write each"),
            ("<|im_start|>chef\na<|im_end|>", 'at [0]: "role" is "chef"', "use one of system"),
        ],
        f.pairs_to_thumbs: [([{"prompt": "p", "chosen": "a", "rejected": "a"}], 'row 0: "chosen" equals')],
        f.thumbs_to_pairs: [([{"prompt": "p", "completion": "a", "label": 1}], '0: "label" must be true')],
        f.ratings_to_thumbs: [
            ([{**SFT, "rating": "good"}], "row 0: \"rating\" must be a number, not 'good'; write"),
            ([{**SFT, "rating": math.nan}], 'row 0: "rating" must be a number, not nan'),
        ],
        f.to_dataset: [([{"id": 1}, {"id": "two"}], '"id" does not make a column', "one type in all rows")],
    }
    cases = [(convert, (row,), *parts) for convert, bad in rows.items() for row, *parts in bad]
    complains(*cases, (f.ratings_to_thumbs, ([], 3, 3), "down=3 is not below up=3"))
