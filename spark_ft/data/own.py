"""Your own rows: from a file as people have them to rows of this project, and a sentence for every fault."""

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from spark_ft.data.chat import Marked, all_answers, conversation, last_answer, render_turns, whole_text
from spark_ft.data.cleaning import clean
from spark_ft.data.formats import (
    alpaca_to_messages,
    chatml_to_messages,
    messages_to_sft,
    sft_to_messages,
    sharegpt_to_messages,
)
from spark_ft.data.readers import read_file
from spark_ft.data.records import KINDS, SHAREGPT, Record, find_fault, given, write_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_CHATS = ("messages", "conversations", "conversation", "dialogue")
_ASKING = ("prompt", "question", "query", "instruction", "input")
_ANSWERING = ("completion", "answer", "response", "output", "target")
_NAMES = {*_CHATS, *_ASKING, *_ANSWERING, "chosen", "rejected", "label", "text", "system", "tools", "history"}
_ROLES = {**SHAREGPT, "developer": "system", "model": "assistant", "ai": "assistant", "function": "tool"}
_THUMBS = {1: True, 0: False, "true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


@dataclass(frozen=True)
class OwnRows:
    """Rows of one kind that came from a file, and what was wrong with the others; `print` it for the report.

    Each row of the file is either in `records`, with its line or row in `numbers`, or has a sentence in
    `faults`.
    """

    path: Path
    form: str
    unit: str  # between the file's name and a number
    kind: str
    shapes: dict[str, int]
    records: list[Record]
    numbers: list[int]
    faults: list[tuple[int, str]]
    notes: list[str]
    lengths: list[int] = field(default_factory=list)

    def rendered(self, tokenizer: "Tokenizer") -> "OwnRows":
        """These rows through a tokenizer's template: token counts, and a sentence for each it refuses."""
        lengths, faults, last = {}, [], Counter()
        for i, record in enumerate(self.records):
            try:
                marks, only = _marks(record, self.kind, tokenizer)
                lengths[i] = len(marks[0][0])
                last[only] += 1
            except ValueError as error:
                faults.append((self.numbers[i], str(error)))
        told = [f"only the last answer is learned (rows: {n}): {why}" for why, n in last.items() if why]
        rows = replace(self, notes=[*self.notes, *told])
        return replace(rows._only(list(lengths), faults), lengths=list(lengths.values()))

    def cleaned(self, held_out: "OwnRows | None" = None, keep: Collection[str] = ()) -> "OwnRows":
        """These rows without duplicates, leaks, refusals and the like; see `clean`, also for `keep`."""
        result, faults = clean(self.records, held_out.records if held_out else (), keep), []
        for drop in result.dropped:
            other = held_out if drop.fault == "leaked" else self
            reason = drop.reason
            if drop.copy_of is not None:  # its number in the list becomes its place in the file
                place = other.place(other.numbers[drop.copy_of])
                reason = re.sub(r"(held-out )?row \d+", lambda _, place=place: place, reason, count=1)
            faults.append((self.numbers[drop.index], f"{drop.fault.replace('_', ' ')}: {reason}"))
        gone = {drop.index for drop in result.dropped}
        return self._only([i for i in range(len(self.records)) if i not in gone], faults)

    def _only(self, places: list[int], faults: list[tuple[int, str]]) -> "OwnRows":
        kept = {name: getattr(self, name) for name in ("records", "numbers", "lengths")}
        kept = {name: [values[i] for i in places] for name, values in kept.items() if values}
        return replace(self, **kept, faults=sorted([*self.faults, *faults]))

    def place(self, number: int) -> str:
        """A row's place as the report names it: file:line, or the row's number where lines say nothing."""
        return f"{self.path}{self.unit}{number}"

    def samples(self, tokenizer: "Tokenizer", count: int = 3) -> str:
        """What a template makes of the first row, the last and some between; learned tokens in ⟦ ⟧."""
        last, shown = len(self.records) - 1, []
        for i in sorted({round(k * last / max(1, count - 1)) for k in range(count)} if last >= 0 else ()):
            for ids, learned in _marks(self.records[i], self.kind, tokenizer)[0]:
                pieces = groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
                texts = [(mark, tokenizer.decode([token for token, _ in some])) for mark, some in pieces]
                texts = [f"⟦{_short(text)}⟧" if mark else _short(text) for mark, text in texts]
                shown.append(f"{self.place(self.numbers[i])}, {sum(learned)} of {len(ids)} tokens learned\n")
                shown[-1] += "".join(texts)
        return "\n\n".join(shown)

    def write(self, path: Path) -> None:
        """Write the rows as JSONL, for `read_records(path, rows.kind)`; never over the file that was read."""
        if path.resolve() == self.path.resolve():
            raise ValueError(f"{path} is the file that was read; write to another one")
        write_records(path, self.records)

    def __str__(self) -> str:
        found = ", ".join(f"{count} {shape}" for shape, count in self.shapes.items()) or "none readable"
        rows = len(self.records) + len({number for number, _ in self.faults})
        lines = [f"{self.path}: {self.form}, {rows} rows ({found}); kind {self.kind!r} here"]
        lines += [f"  {note}" for note in self.notes]
        if self.lengths:
            longest = max(range(len(self.lengths)), key=self.lengths.__getitem__)
            lines.append(
                f"  tokens per row: median {median(self.lengths):.0f}, longest {self.lengths[longest]} "
                f"({self.place(self.numbers[longest])}), {sum(self.lengths):,} in all"
            )
        lines.append(f"fine: {len(self.records)} of {rows} rows; left out: {rows - len(self.records)}")
        same: dict[str, list[int]] = {}
        for number, sentence in self.faults:
            same.setdefault(sentence, []).append(number)
        lines += [f"  {self.path}{self.unit}{_ranges(numbers)}: {said}" for said, numbers in same.items()]
        return "\n".join(lines)


def own_rows(path: str | Path) -> OwnRows:
    """The rows of a file, whatever common format they are in, as rows of this project.

    Args:
        path: JSONL, a JSON array, CSV or TSV, Parquet, or plain text (a row per paragraph), also as .gz.
            Alpaca, ShareGPT, messages, ChatML text, question and answer under their usual names,
            prompt/chosen/rejected and thumbs, each also as lists of messages, or text for base models.

    Raises:
        ValueError: the file cannot be read at all; what is wrong with single rows is in `.faults`.
    """
    path = Path(path)
    form, unit, numbered = read_file(path, _form)
    found, faults, read_as = [], [], Counter()
    for number, row in numbered:
        try:
            if isinstance(row, ValueError):
                raise row
            found.append((number, *_own(row, read_as)))
        except ValueError as error:
            faults.append((number, str(error)))
    if not found and not faults:
        raise ValueError(f"{path}: an empty data set; it needs at least one row")
    kinds = Counter(kind for _, _, kind, _ in found)
    kind = max(kinds, key=kinds.__getitem__, default="sft")
    stray = "a row of another kind ({}) than most; put rows of each kind into a file of their own"
    faults += [(number, stray.format(shape)) for number, shape, other, _ in found if other != kind]
    found = [row for row in found if row[2] == kind]
    records = [record for *_, record in found]
    if kind == "chat":
        with suppress(ValueError):  # all of them are one question and its answer
            records, kind = [messages_to_sft(record) for record in records], "sft"
    beside = sorted({name for record in records for name in record} - {*KINDS[kind], "system", "tools"})
    notes = [f'"{old}" is read as "{new}" (rows: {count})' for (old, new), count in read_as.items()]
    notes += [f"kept beside the rows, and not trained on: {', '.join(beside)}"] * bool(beside)
    shapes = Counter(shape for _, shape, *_ in found)
    numbers = [number for number, *_ in found]
    return OwnRows(path, form, unit, kind, shapes, records, numbers, sorted(faults), notes)


def _marks(record: Record, kind: str, tokenizer) -> tuple[list[Marked], str]:
    """Ids and learned tokens of a row, of each of its answers; and why only the last answer is learned."""
    if kind == "text":
        return [whole_text(record, tokenizer)], ""
    if kind == "chat":
        try:
            return [all_answers(record, tokenizer)], ""
        except ValueError as error:  # templates that drop earlier reasoning; what else is wrong comes again
            return [last_answer(record, tokenizer)], str(error).partition(": ")[2]
    marks = []
    for answer in ("chosen", "rejected") if kind == "preference" else ("completion",):
        asked, said = render_turns(conversation(record, answer), tokenizer)
        marks.append((asked + said, [False] * len(asked) + [True] * len(said)))
    return marks, ""


# --- one row ---------------------------------------------------------------------------------------------
def _own(row: Any, read_as: Counter) -> tuple[str, str, Record]:
    """(format, kind, row as it is here) of a row from outside, or a ValueError that says what is wrong."""
    if not isinstance(row, dict):
        raise ValueError(find_fault(row, "sft"))
    known = {key: key.strip().lower() for key in row}
    row = {known[key] if known[key] in _NAMES else key: _plain(value) for key, value in row.items()}
    row = {name: _listed(name, value) for name, value in row.items()}

    def rename(group: tuple[str, ...], new: str) -> None:
        there = [name for name in group if given(row, name) is not None] or [n for n in group if n in row]
        if there and new not in there:
            if len(there) > 1:
                raise ValueError(f'"{there[0]}" and "{there[1]}" may both be the {new}; rename one to it')
            row[new] = row.pop(there[0])
            read_as[there[0], new] += 1

    form = _form({name for name in row if given(row, name) is not None} | ({"label"} & row.keys()))
    form = form or _form(row.keys())
    kind = {"preference": "preference", "feedback": "feedback", "text": "text"}.get(form, "chat")
    if form is None:
        fields = ", ".join(f'"{name}"' for name in row)
        if asked := [name for name in _ASKING if name in row]:
            raise ValueError(f'"{asked[0]}" has no answer beside it; add "completion", or drop the row')
        raise ValueError(f'the fields {fields} are no known format; rename two to "prompt" and "completion"')
    if form == "messages":
        rename(_CHATS, "messages")
        turns = row["messages"]
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
            form, row = "ShareGPT", sharegpt_to_messages({"conversations": row.pop("messages"), **row})
        row["messages"] = _talk(row["messages"], "user")
    elif form == "Alpaca":
        rename(_ANSWERING, "output")
        rename(("input", "context"), "input")
        row = alpaca_to_messages(row)
        row.pop("input_start", None)
    elif form == "text" and "<|im_start|>" in str(row["text"]):
        form, kind, row = "ChatML", "chat", {**chatml_to_messages(row.pop("text")), **row}
    elif form != "text":
        rename(_ASKING, "prompt")
        if form != "preference":
            rename(_ANSWERING, "completion")
        if form == "feedback":
            row["label"] = _THUMBS.get(str(row["label"]).lower(), row["label"])
        row = _one_answer(row, ("chosen", "rejected") if form == "preference" else ("completion",))
        if kind == "chat":
            row = sft_to_messages(row)
    if fault := find_fault(row, kind):
        raise ValueError(fault)
    if kind != "text":
        conversation(row, {"preference": "chosen", "feedback": "completion"}.get(kind))
    return form, kind, row


def _form(fields: Collection[str]) -> str | None:
    """What rows with these fields are called, or None."""
    if {"chosen", "rejected"} & set(fields):
        return "preference"
    if set(_CHATS) & set(fields):
        return "messages"
    if not (set(_ASKING) & set(fields) and set(_ANSWERING) & set(fields)):
        return "text" if "text" in fields else None
    return "feedback" if "label" in fields else "Alpaca" if "instruction" in fields else "question and answer"


def _one_answer(row: Record, fields: tuple[str, ...]) -> Record:
    """The row with each answer as a text, and its prompt too if it is one turn; both may come as messages."""
    talks = {name: _talk(row[name], "assistant") for name in fields if name in row}
    asked = _talk(row["prompt"], "user") if given(row, "prompt") is not None else []
    turns = zip(*(talk[:-1] for talk in talks.values()), strict=False)
    shared = [turn for turn, *others in takewhile(lambda some: all(t == some[0] for t in some), turns)]
    if shared and shared[-len(asked) :] != (asked or shared):
        raise ValueError('"prompt" is not what its answers begin with; take it out, or mend it')
    for name, talk in talks.items():
        answer = talk[len(shared) :]
        if len(answer) != 1 or not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
            raise ValueError(f'"{name}" must be one answer by the assistant after the prompt; cut it there')
        if "tool_calls" in answer[0]:
            raise ValueError(f'"{name}" has tool_calls; write them into the content as the model should')
        row[name] = answer[0].get("content")
    if asked := shared or asked:
        if len(asked) > 1 and asked[0].get("role") == "system" and given(row, "system") is None:
            row["system"] = asked.pop(0)["content"]
        row["prompt"] = asked[0]["content"] if [turn.get("role") for turn in asked] == ["user"] else asked
    return row


def _talk(value: Any, role: str) -> list[Any]:
    """Messages as OpenAI, Arrow and others write them as messages here; a text is a message by `role`."""
    return [_message(t) for t in value] if isinstance(value, list) else [{"role": role, "content": value}]


def _message(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    turn = {name: value for name, value in turn.items() if value is not None}
    turn["role"] = _ROLES.get(str(turn.get("role")).lower(), turn.get("role"))
    parts = turn.get("content")
    if isinstance(parts, list) and all(isinstance(p, dict) and p.keys() <= {"type", "text"} for p in parts):
        turn["content"] = "".join(str(part.get("text", "")) for part in parts)
    calls = turn.get("tool_calls", [turn.pop("function_call")] if "function_call" in turn else [])
    if turn.pop("from", None) == "function_call":
        calls = [_json(turn.pop("content"), "a function_call")]
    if calls and isinstance(calls, list):
        turn["tool_calls"] = [_call(call) for call in calls]
    return turn


def _call(call: Any) -> Any:
    """A call as OpenAI nests it, its arguments as an object, which templates write as JSON themselves."""
    if isinstance(call, dict) and "function" not in call:
        call = {"type": "function", "function": {n: v for n, v in call.items() if n in ("name", "arguments")}}
    function = call["function"] if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        function = {**function, "arguments": _json(function["arguments"], '"arguments" of a call')}
        call = {**call, "function": function}
    return call


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} must be JSON ({error}); mend it, or drop the row") from error


def _listed(name: str, value: Any) -> Any:
    """A list that a table keeps as a text, as JSON or as Python writes it; other values as they are."""
    if name not in _NAMES or not isinstance(value, str) or not re.match(r"\s*\[\s*[\[{]", value):
        return value
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(value)
            turns = all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in found)
            return found if turns or name in (*_CHATS, "tools", "history") else value
    return value


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: dates and the like as texts, NaN as null."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


# --- the report ------------------------------------------------------------------------------------------
def _ranges(numbers: Sequence[int]) -> str:
    """3, 5–7 for 3, 5, 6, 7."""
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)


def _short(text: str, most: int = 600) -> str:
    cut = f"{text[: most // 2]} … {len(text) - most} characters … {text[-most // 2 :]}"
    return text if len(text) <= most else cut
