"""Conversions: what comes back is what went in, and a bad row is named with its field and mend."""

import copy
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ft.data import formats as f
from spark_ft.data.records import ROLES, SHAREGPT, read_records, write_records
from spark_ft.files import ROOT
from spark_ft.models import load_tokenizer

TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("\n\n\t {}|"), min_size=1, max_size=30).filter(
    str.strip
)
PLAIN = TEXT.filter(lambda text: "<|im_" not in text)
EXTRA = st.dictionaries(
    st.sampled_from(["id", "source", "score", "tags"]), st.none() | st.integers() | TEXT | st.lists(TEXT)
)
CHAT = {"messages": [{"role": "user", "content": "Soup?"}, {"role": "assistant", "content": "Leek."}]}
ALPACA = {"instruction": "Name it.", "input": "A leek soup.", "output": "Vichyssoise."}


def turns(who, what, names, text=TEXT):
    turn = st.builds(
        lambda extra, name, value: {**extra, who: name, what: value}, EXTRA, st.sampled_from(names), text
    )
    return st.lists(turn, min_size=1, max_size=5)


def rows(**fields):
    return st.builds(lambda extra, row: {**extra, **row}, EXTRA, st.fixed_dictionaries(fields))


def unchanged(convert, row):
    """The converted row; the one that went in must not be touched."""
    before = copy.deepcopy(row)
    result = convert(row)
    assert row == before, "a conversion must leave the row it was given alone"
    return result


# --- there and back --------------------------------------------------------------------------------------------------


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


OPTIONAL = st.fixed_dictionaries(
    {}, optional={"input": st.text(max_size=20) | TEXT | st.just("\n\n"), "system": TEXT}
)


@settings(max_examples=300)
@given(rows(instruction=TEXT, output=TEXT), OPTIONAL)
def test_alpaca_to_messages_and_back_is_the_same_row(row, optional):
    row = {**row, **optional}
    there = unchanged(f.alpaca_to_messages, row)
    user = next(m["content"] for m in there["messages"] if m["role"] == "user")
    assert user == (f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"])
    assert there["messages"][-1] == {"role": "assistant", "content": row["output"]}
    assert unchanged(f.messages_to_alpaca, there) == row


@pytest.mark.parametrize(
    ("instruction", "input"), [("a\n\nb", "c"), ("a", "b\n\nc"), ("a\n", "\nb"), ("a\n\n", "b")]
)
def test_alpaca_comes_back_when_the_texts_hold_blank_lines(instruction, input):
    row = {"instruction": instruction, "input": input, "output": "x"}
    assert f.messages_to_alpaca(f.alpaca_to_messages(row)) == row


@given(TEXT, TEXT, st.none() | TEXT)
def test_a_chat_that_never_was_alpaca_goes_there_and_back(question, answer, system):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = {"id": 7, "messages": [{"role": "system", "content": system}, *messages] if system else messages}
    assert f.messages_to_alpaca(row)["input"] == ""
    assert f.alpaca_to_messages(f.messages_to_alpaca(row)) == row


@given(rows(prompt=TEXT, completion=TEXT))
def test_sft_to_messages_and_back_is_the_same_row(row):
    assert f.messages_to_sft(unchanged(f.sft_to_messages, row)) == row


@given(turns("role", "content", ROLES, PLAIN))
def test_messages_to_chatml_and_back_is_the_same_chat(messages):
    row = {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
    assert f.chatml_to_messages(f.messages_to_chatml(row)) == row


def test_chatml_reads_what_the_embedded_models_template_writes():
    messages = [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]
    text = load_tokenizer().apply_chat_template(messages, tokenize=False)
    assert f.chatml_to_messages(text) == {"messages": messages}
    assert f.messages_to_chatml({"messages": messages}) == text


def test_the_kitchen_chats_come_back_byte_for_byte(tmp_path):
    path = ROOT / "data/kitchen_chats/train.jsonl"
    chats = [f.sharegpt_to_messages(row) for row in read_records(path, "sharegpt")]
    write_records(tmp_path / "chats.jsonl", chats)
    back = [f.messages_to_sharegpt(row) for row in read_records(tmp_path / "chats.jsonl", "chat")]
    write_records(tmp_path / "back.jsonl", back)
    assert (tmp_path / "back.jsonl").read_bytes() == path.read_bytes()


# --- pairs and thumbs ------------------------------------------------------------------------------------------------

PAIRS = st.lists(
    st.fixed_dictionaries(
        {"prompt": st.sampled_from(["a", "b", "c"]), "chosen": TEXT, "rejected": TEXT, "core": TEXT}
    ),
    max_size=6,
).map(lambda pairs: [pair for pair in pairs if pair["chosen"] != pair["rejected"]])


@given(PAIRS)
def test_pairs_come_back_from_their_thumbs(pairs):
    thumbs = f.pairs_to_thumbs(pairs)
    assert len(thumbs) == 2 * len(pairs)
    assert sum(thumb["label"] for thumb in thumbs) == len(pairs)
    back = f.thumbs_to_pairs(thumbs)
    assert back == sorted(pairs, key=lambda pair: [p["prompt"] for p in pairs].index(pair["prompt"])), (
        "grouped by prompt"
    )


def test_thumbs_that_find_no_partner_make_no_pair():
    thumb = {"prompt": "p", "completion": "good", "label": True, "cook": "Ana", "n": 1}
    lonely = {**thumb, "completion": "also good", "n": 2}
    down = {**thumb, "completion": "bad", "label": False, "n": 3}
    other = {**down, "prompt": "q"}
    assert f.thumbs_to_pairs([thumb, lonely, down, other]) == [
        {"prompt": "p", "chosen": "good", "rejected": "bad", "cook": "Ana"}
    ]
    assert f.thumbs_to_pairs([thumb, {**thumb, "label": False}]) == [], "an answer is no better than itself"


def test_ratings_become_thumbs_and_the_middle_is_dropped():
    rows = [{"prompt": "p", "completion": str(n), "rating": n} for n in (1, 2, 2.5, 3.9, 4, 5)]
    thumbs = f.ratings_to_thumbs(rows)
    assert [(thumb["rating"], thumb["label"]) for thumb in thumbs] == [
        (1, False),
        (2, False),
        (4, True),
        (5, True),
    ]
    assert f.thumbs_to_pairs(thumbs)[0] == {"prompt": "p", "chosen": "4", "rejected": "1"}
    with pytest.raises(ValueError, match=r'row 1: "rating" must be a number, not \'good\'; write one'):
        f.ratings_to_thumbs([rows[0], {**rows[0], "rating": "good"}])
    with pytest.raises(ValueError, match="down=3 is not below up=3"):
        f.ratings_to_thumbs(rows, up=3, down=3)


# --- datasets --------------------------------------------------------------------------------------------------------


def test_a_dataset_gives_back_the_rows_with_fields_that_only_some_have():
    rows = [
        CHAT,
        {**CHAT, "id": 3},
        {"messages": [{**CHAT["messages"][0], "name": "Ana"}, CHAT["messages"][1]]},
    ]
    dataset = f.to_dataset(rows)
    assert dataset.column_names == ["messages", "id"]
    assert f.from_dataset(dataset) == rows


def test_a_converted_dataset_is_the_converted_rows():
    rows = read_records(ROOT / "data/kitchen_chats/train.jsonl", "sharegpt")
    mapped = f.to_dataset(rows).map(f.sharegpt_to_messages, remove_columns=["conversations"])
    assert f.from_dataset(mapped) == [f.sharegpt_to_messages(row) for row in rows]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convert", "row", "field", "mend"),
    [
        (f.sharegpt_to_messages, {}, '"conversations" is missing', "a row of kind"),
        (
            f.sharegpt_to_messages,
            {"conversations": "hi"},
            '"conversations" must be a list of messages',
            '[{"from": …',
        ),
        (
            f.sharegpt_to_messages,
            {"conversations": [{"from": "me", "value": "a"}]},
            'at [0] has "from" "me"',
            "use one of",
        ),
        (
            f.sharegpt_to_messages,
            {"conversations": [{"from": "gpt"}]},
            'at [0]: "value" is missing',
            "fill it in",
        ),
        (
            f.sharegpt_to_messages,
            {"conversations": [{"from": "gpt", "value": ""}]},
            'at [0]: "value" is empty',
            "fill it",
        ),
        (
            f.sharegpt_to_messages,
            {"conversations": [{"from": "gpt", "value": "a", "role": 1}]},
            '"role" is there',
            "rename",
        ),
        (
            f.sharegpt_to_messages,
            {"conversations": [{"from": "gpt", "value": "a"}], "messages": 1},
            '"messages" is',
            "rename",
        ),
        (
            f.messages_to_sharegpt,
            {"messages": [{"role": "user", "content": "a", "from": "gpt"}]},
            '"from" is "gpt"',
            "mend",
        ),
        (
            f.alpaca_to_messages,
            {"instruction": "a", "input": ""},
            '"output" is missing',
            "instruction, output",
        ),
        (f.alpaca_to_messages, {**ALPACA, "input": None}, '"input" must be a text, not null', 'write ""'),
        (f.alpaca_to_messages, {**ALPACA, "instruction": " "}, '"instruction" is empty', "fill it in"),
        (
            f.alpaca_to_messages,
            {**ALPACA, "system": 3},
            '"system" must be a text, not a number',
            "put it in quotes",
        ),
        (f.alpaca_to_messages, {**ALPACA, "messages": []}, '"messages" is there already', "rename it"),
        (
            f.messages_to_alpaca,
            {"messages": CHAT["messages"] * 2},
            "user, assistant, user, assistant",
            "use ShareGPT",
        ),
        (f.messages_to_alpaca, {**CHAT, "input_start": 3}, '"input_start" is 3', "take the field out"),
        (
            f.messages_to_alpaca,
            {"messages": [{**m, "n": 1} for m in CHAT["messages"]]},
            "hold n",
            "take it out",
        ),
        (f.messages_to_sft, {"messages": CHAT["messages"][:1]}, '"messages" are user', "keep the messages"),
        (
            f.messages_to_chatml,
            {"messages": [{"role": "user", "content": "a<|im_end|>"}]},
            'at [0]: "content"',
            "take it out",
        ),
        (f.chatml_to_messages, "", '"messages" is empty', "fill it in"),
        (
            f.chatml_to_messages,
            "hello <|im_start|>user\na<|im_end|>",
            "at character 0, 'hello",
            "write each as",
        ),
        (f.chatml_to_messages, "<|im_start|>user\na", "at character 0, '<|im_start", "write each as"),
        (
            f.chatml_to_messages,
            "<|im_start|>user\na<|im_start|>user\nb<|im_end|>",
            "at character 0",
            "write each as",
        ),
        (
            f.chatml_to_messages,
            "<|im_start|>chef\na<|im_end|>",
            'at [0] has the role "chef"',
            "use one of system",
        ),
        (
            f.pairs_to_thumbs,
            [{"prompt": "p", "chosen": "a", "rejected": "a"}],
            'row 0: "chosen" equals',
            "change one",
        ),
        (
            f.thumbs_to_pairs,
            [{"prompt": "p", "completion": "a", "label": 1}],
            'row 0: "label" must be true',
            "thumb",
        ),
    ],
)
def test_a_bad_row_is_named_by_field_and_mend(convert, row, field, mend):
    with pytest.raises(ValueError, match=re.escape(field)) as error:
        convert(row)
    assert mend in str(error.value)
