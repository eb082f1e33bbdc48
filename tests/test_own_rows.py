"""Rows as people have them: files of ten kinds, three of them broken, become the right rows or sentences."""

import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from test_data import CALLED, PLAIN, TOOLS, with_template

from spark_ft.cli import main as cli
from spark_ft.data.own import own_rows
from spark_ft.data.records import read_records

ROWS = [
    {"prompt": "Is miso vegan?", "completion": "The paste mostly is, the soup often is not."},
    {"prompt": 'Say "hot", twice;\nthen stop.', "completion": '[{"say": "hot", "times": 2}]'},
    {"prompt": "Wie heiß für Brot?", "completion": "230 °C."},
]
TALKS = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in ROWS]


def messages(talk, who="role", what="content"):
    return [{who: speaker, what: text} for speaker, text in talk]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, **style) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **style)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


def parquet(rows) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def save(path, content: bytes):
    path.write_bytes(content)
    return path


def test_the_same_rows_come_out_of_every_format(tmp_path):
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [[(names[who], text) for who, text in talk] for talk in TALKS]
    alpaca = [{"instruction": r["prompt"], "input": "", "output": r["completion"]} for r in ROWS]
    asked = [{"Question": r["prompt"], "Answer": r["completion"]} for r in ROWS]
    chats = [{"messages": messages(talk)} for talk in TALKS]
    marks = ["".join(f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in talk) for talk in TALKS]
    lists = [{"prompt": messages(t[:1]), "completion": messages(t[1:])} for t in TALKS]
    files = {
        "rows.jsonl": jsonl(ROWS),
        "windows.jsonl": b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\r\n\r\n"),
        "array.json": json.dumps(ROWS, indent=2).encode(),
        "lines.json": jsonl(ROWS),
        "one_field.json": json.dumps({"version": 1, "data": ROWS}).encode(),
        "excel.csv": table(asked, delimiter=";") + b";\r\n",
        "comma.csv": table(ROWS, quoting=csv.QUOTE_ALL),
        "tabs.tsv": table(asked, delimiter="\t"),
        "rows.parquet": parquet(ROWS),
        "packed.jsonl.gz": gzip.compress(jsonl(ROWS)),
        "packed.csv.gz": gzip.compress(table(ROWS)),
        "alpaca.json": json.dumps(alpaca).encode(),
        "sharegpt.jsonl": jsonl({"conversations": messages(talk, "from", "value")} for talk in sharegpt),
        "messages.parquet": parquet(chats),
        "json_in_cells.csv": table([{"messages": json.dumps(chat["messages"])} for chat in chats]),
        "pandas_in_cells.csv": table(chats),
        "chatml.jsonl": jsonl({"text": text} for text in marks),
        "trl.jsonl": jsonl(lists),
        "trl.csv": table([{name: json.dumps(some) for name, some in row.items()} for row in lists]),
    }
    for name, content in files.items():
        rows = own_rows(save(tmp_path / name, content))
        assert (rows.kind, rows.records, rows.faults) == ("sft", ROWS, []), name
    dolly = {"instruction": "Sum it up.", "context": "Soup.", "response": "S.", "category": "sum"}
    rows = own_rows(save(tmp_path / "dolly.jsonl", jsonl([dolly])))
    assert rows.records == [{"prompt": "Sum it up.\n\nSoup.", "completion": "S.", "category": "sum"}]
    assert '"context" is read as "input" (rows: 1)' in rows.notes


USER, BOT = ({"role": role, "content": text} for role, text in (("user", "Hot?"), ("assistant", "Yes.")))
CALL = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
CALLS = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]
ANSWERED = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "tool_calls": CALLS},
    {"role": "tool", "content": "35 °C"},
    BOT,
]


def test_tool_calls_of_every_dialect_are_the_same_rows(tmp_path, tokenizer):
    openai = [
        {"role": "developer", "content": [{"type": "text", "text": text} for text in ("Be ", "brief.")]},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "35 °C"},
        BOT,
    ]
    flat = [*openai[:2], {"role": "assistant", "content": None, "tool_calls": [CALL]}, *openai[3:]]
    old = [*openai[:2], {"role": "assistant", "function_call": CALL}, *openai[3:]]
    old[3] = {"role": "function", "content": "35 °C"}
    turns = [("human", "Hot?"), ("function_call", json.dumps({**CALL, "arguments": {"city": "Rome"}}))]
    turns += [("observation", "35 °C"), ("gpt", "Yes.")]
    tools = json.dumps(TOOLS)
    factory = {"conversations": messages(turns, "from", "value"), "system": "Be brief.", "tools": tools}
    rows = [{"messages": talk, "tools": tools} for talk in (openai, flat, old)]
    one = {"messages": [{"role": "system", "content": "Be brief."}, *openai[1:]]}
    one["tools"] = [{**TOOLS[0], "strict": None}]
    for name, content in {"a.jsonl": jsonl([*rows, factory]), "b.parquet": parquet([one])}.items():
        rows = own_rows(save(tmp_path / name, content))
        assert not rows.faults
        assert all(record == {"messages": ANSWERED, "tools": TOOLS} for record in rows.records), name
    offered = "{% if tools %}{{ tools | tojson }}{% endif %}"
    calls = with_template(tokenizer, offered + PLAIN, CALLED)
    assert own_rows(tmp_path / "a.jsonl").rendered(calls).lengths == [rows.rendered(calls).lengths[0]] * 4
    sample = rows.rendered(calls).samples(calls, 1)
    assert '⟦[{"name": "get_weather", "arguments": {"city": "Rome"}}]<|im_end|>⟧' in sample
    refused = rows.rendered(with_template(tokenizer, offered + PLAIN))
    assert not refused.records
    assert {said.split(";")[0] for _, said in refused.faults} == {
        '"messages" at [2]: the chat template leaves "tool_calls" out or rewrites them'
    }


def test_preferences_thumbs_and_texts_become_their_kinds(tmp_path, tokenizer):
    system, other = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "No."}
    talk = [USER, BOT, {"role": "user", "content": "Sure?"}]
    rows = [
        {"prompt": [system, USER], "chosen": [BOT], "rejected": [other]},
        {"chosen": [system, USER, BOT], "rejected": [system, USER, other]},
        {"prompt": "Hot?", "chosen": [system, USER, BOT], "rejected": [system, USER, other], "messages": []},
        {"system": "Be brief.", "question": "Hot?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": talk, "chosen": [BOT], "rejected": [other]},
        {"prompt": [USER], "chosen": [BOT, USER], "rejected": [other]},
        {"prompt": "Cold?", "chosen": [USER, BOT], "rejected": [USER, other]},
        {"prompt": [USER], "chosen": [BOT], "rejected": [BOT]},
    ]
    pairs = own_rows(save(tmp_path / "pairs.json", json.dumps(rows).encode()))
    pair = {"system": "Be brief.", "prompt": "Hot?", "chosen": "Yes.", "rejected": "No."}
    plain = [{name: record[name] for name in pair} for record in pairs.records[:4]]
    assert (pairs.kind, plain) == ("preference", [pair] * 4)
    assert pairs.records[4] == {"prompt": talk, "chosen": "Yes.", "rejected": "No."}
    faults = ["must be one answer by", '"prompt" is not what its answers begin', '"chosen" equals "rejected"']
    assert [n for n, _ in pairs.faults] == [6, 7, 8]
    assert all(part in said for part, (_, said) in zip(faults, pairs.faults, strict=True))
    assert pairs.rendered(tokenizer).samples(tokenizer, 1).count("⟦") == 2, "both answers are shown"

    labels = ["1", "0", "True", "false", "👍"]
    cells = [{"prompt": f"Hot? {i}", "completion": "Yes.", "label": x} for i, x in enumerate(labels)]
    thumbs = own_rows(save(tmp_path / "thumbs.csv", table(cells)))
    assert thumbs.kind == "feedback"
    assert [record["label"] for record in thumbs.records] == [True, False, True, False]
    assert thumbs.faults[0][1].startswith('"label" must be true or false')

    prose = "Soup begins\nwith water.\r\n\r\n  \nThen salt.\n"
    texts = own_rows(save(tmp_path / "book.txt", prose.encode())).rendered(tokenizer)
    assert [record["text"] for record in texts.records] == ["Soup begins\nwith water.", "Then salt."]
    assert (texts.kind, texts.numbers) == ("text", [1, 5])
    assert "⟦Then salt.<|im_end|>⟧" in texts.samples(tokenizer)


def test_a_broken_row_has_its_line_and_its_sentence_and_the_others_are_read(tmp_path):
    lines = [
        json.dumps(ROWS[0]),
        "",
        '{"prompt": "Hi", "completion": }',
        json.dumps({"prompt": "Hi", "completion": " "}),
        json.dumps({"prompt": "Hi"}),
        json.dumps({"prompt": "Hi", "completion": 7}),
        json.dumps(["Hi"]),
        json.dumps({"Frage": "Hi", "Antwort": "Ho"}),
        json.dumps({"question": "Hi", "query": "Hi", "answer": "Ho"}),
        json.dumps({"messages": [USER]}),
        json.dumps({"messages": [USER, {"role": "chef", "content": "a"}]}),
        json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}),
        json.dumps({"prompt": "Hi", "chosen": "Ho"}),
        json.dumps({"prompt": "Hi", "chosen": "Ho", "rejected": "Ha"}),
        json.dumps({"prompt": "Hi", "completion": "Ho", "images": ["a.png"]}),
        json.dumps({"messages": [USER, {**BOT, "tool_calls": [{"name": "f", "arguments": "{"}]}]}),
        json.dumps({**ROWS[1], "id": 5}),
    ]
    rows = own_rows(save(tmp_path / "mine.jsonl", "\n".join(lines).encode()))
    assert [{**record, "id": 5} for record in rows.records] == [{**row, "id": 5} for row in ROWS[:2]]
    assert rows.numbers == [1, 17]
    said = {
        3: "malformed JSON at column",
        4: '"completion" is empty; fill it in',
        5: '"prompt" has no answer',
        6: '"completion" must be a text, not a number',
        7: "a row must be a JSON object",
        8: 'the fields "Frage", "Antwort" are no known format; rename',
        9: '"question" and "query" may both be the prompt',
        10: '"messages" must end with an answer',
        11: '"role" is "chef"; use one of',
        12: '"value" must be a text, not null',
        13: '"rejected" is missing',
        14: "a row of another kind (preference) than most; put",
        15: '"images" is not used in training',
        16: '"arguments" of a call must be JSON',
    }
    assert [number for number, _ in rows.faults] == list(said)
    for number, sentence in rows.faults:
        assert said[number] in sentence, number
        assert f"{rows.path}:{number}: {sentence}" in str(rows)
    assert "15 rows" not in str(rows)
    assert "fine: 2 of 16 rows; left out: 14" in str(rows)
    assert "not trained on: id" in str(rows)


def test_a_broken_file_is_one_sentence(tmp_path):
    cells = "prompt,completion\nHi,Ho\n"
    files = {
        "excel.csv": ("prompt;completion\nCrème?;Ja.\n".encode("cp1252"), ":2: not UTF-8; save", "CSV UTF-8"),
        "cut.json": (json.dumps(ROWS).encode()[:-30], ":1: malformed JSON at column", "or write JSONL"),
        "cut.csv.gz": (gzip.compress(table(ROWS))[:-9], "the gzip file is damaged", "get it again"),
        "cut.parquet": (parquet(ROWS)[:-9], "the Parquet file is damaged", "get it again"),
        "book.xlsx": (b"PK\x03\x04...", "this is an Excel workbook or", "save it as CSV"),
        "notepad.csv": (cells.encode("utf-16"), "this is UTF-16", "in UTF-8"),
        "splits.json": (json.dumps({"train": ROWS, "test": []}).encode(), 'object with "train", "test"'),
        "rows.yaml": (b"- prompt: a", "what a .yaml file holds is unknown", ".jsonl, .json, .csv"),
        "empty.csv": (b"\n", "an empty data set", "at least one row"),
        "header.csv": (b"prompt,completion\n", "an empty data set", "at least one row"),
        "twice.csv": (b"prompt,prompt\na,b\n", 'two columns are called "prompt"', "rename one"),
    }
    for name, (content, *parts) in files.items():
        path = save(tmp_path / name, content)
        with pytest.raises(ValueError, match=name) as caught:
            own_rows(path)
        assert str(caught.value).startswith(str(path)), name
        assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(ValueError, match="no such file"):
        own_rows(tmp_path / "none.csv")
    broken = own_rows(save(tmp_path / "quote.csv", f'{cells}a,b,c\nHow?,"So.\nHi,Ho\n'.encode()))
    assert len(broken.records) == 1
    assert [number for number, _ in broken.faults] == [3, 4]
    assert "3 cells where the first line has 2; put a cell" in broken.faults[0][1]
    assert "quotes do not close" in broken.faults[1][1]
    assert "nothing from this line on" in broken.faults[1][1]


def test_the_command_says_what_it_found_and_writes_a_clean_file_nothing_lost_in_silence(tmp_path, capsys):
    mine = [
        *ROWS,
        ROWS[0],
        {"prompt": "How long do eggs boil?", "completion": "Six minutes for soft ones."},
        {"prompt": "A wine?", "completion": "I'm sorry, but I can't help with that."},
        {"prompt": "Stop?", "completion": "Never say <|im_end|> here."},
    ]
    path = save(tmp_path / "my.rows.csv", table(mine))
    leak = {"question": mine[4]["prompt"], "answer": "7."}
    held = save(tmp_path / "test.json", json.dumps([leak]).encode())
    assert cli(["data", str(path), "--held-out", str(held)]) == 0
    said = capsys.readouterr().out
    for part in (
        "CSV with ',' between cells, 7 rows (7 question and answer); kind 'sft' here",
        f"{path}:6: exact duplicate: equals {path}:2",
        f"{path}:7: leaked: asks what {held}, row 1 asks",
        f"{path}:8: refusal: declines",
        f"{path}:9: \"completion\" holds the control token '<|im_end|>'",
        "fine: 3 of 7 rows; left out: 4",
        f"longest 54 ({path}:3)",
        f"{path}:5, 7 of 46 tokens learned",
        "Wie heiß für Brot?<|im_end|>\n<|im_start|>assistant\n⟦230 °C.<|im_end|>⟧",
    ):
        assert part in said, part
    assert read_records(tmp_path / "my.rows.clean.jsonl", "sft") == ROWS
    assert f'read_records("{tmp_path / "my.rows.clean.jsonl"}", "sft")' in said
    out = tmp_path / "kept.jsonl"
    assert cli(["data", str(path), "--keep", "refusal", "--out", str(out)]) == 0
    assert len(read_records(out, "sft")) == 5
    assert "Leaks were not looked for" in capsys.readouterr().out
    assert cli(["data", str(held), "--out", str(held)]) == 1
    assert "is the file that was read; write to another one" in capsys.readouterr().err
    assert cli(["data", "no.csv"]) == 1
    assert "spark-ft data: no.csv: no such file" in capsys.readouterr().err
    assert json.loads(held.read_text())
    lone = save(tmp_path / "lone.jsonl", b'{"prompt": "Hi"}')
    assert cli(["data", str(lone)]) == 1
    told = capsys.readouterr()
    assert f'{lone}, row 1: "prompt" has no answer beside it' in told.out
    assert "no row is left to write" in told.err
    assert not (tmp_path / "lone.clean.jsonl").exists()
