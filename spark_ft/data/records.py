"""Records: dicts, one JSON object per line of a file; a bad one is named by file, line, field and mend."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from spark_ft.files import write_atomically

Record = dict[str, Any]
Check = Callable[[Any], str | None]  # what is wrong with a value and how to mend it, or None

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names for the roles; the first of each role is the usual one
SHAREGPT = {"system": "system", "human": "user", "gpt": "assistant", "tool": "tool", "user": "user"}
SHAREGPT |= {"assistant": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}
SHAREGPT |= {"function_call": "assistant"}

_FILL = "fill it in or drop the row"
_JSON = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
_JSON |= {type(None): "null", int: "a number", float: "a number"}


def given(record: Mapping, field: str) -> Any:
    """An optional field's value, or None where it says nothing: null, white space, empty list or object."""
    value = record.get(field)
    said = value.strip() if isinstance(value, str) else value
    return None if isinstance(said, (str, list, tuple, dict)) and not said else value


def text_fault(value: Any) -> str | None:
    """What is wrong with a value that must be a text, and how to mend it, or None."""
    if not isinstance(value, str):
        return _must_be("a text", value, "write it as one")
    if not value.strip():
        return f"is empty; {_FILL}"
    try:
        value.encode()
    except UnicodeEncodeError:  # json lets lone surrogates through, tokenizers do not
        return r"holds half a character (a lone \ud800–\udfff escape); save its source as UTF-8 again"
    return None


def _must_be(wanted: str, value: Any, mend: str) -> str:
    name = _JSON.get(type(value), f"a {type(value).__name__}")
    if type(value).__module__ == "numpy":
        name, mend = f"a NumPy {type(value).__name__}", "call its .tolist()"
    elif value is None or (isinstance(value, float) and value != value):
        name, mend = name if value is None else "NaN", _FILL
    return f"must be {wanted}, not {name}; {mend}"


def _label(value: Any) -> str | None:
    mend = "write true (thumbs up) or false (thumbs down)"
    return None if isinstance(value, bool) else _must_be("true or false", value, mend)


def _turns(who: str, what: str, names: tuple[str, ...]) -> Check:
    def check(value: Any) -> str | None:
        form = f'write [{{"{who}": …, "{what}": …}}, …]'
        if not isinstance(value, list):
            return _must_be("a list of messages", value, form)
        if not value:
            return f"is empty; {_FILL}"
        for i, turn in enumerate(value):
            if not isinstance(turn, dict):
                return f"at [{i}] {_must_be(f'an object with {who} and {what}', turn, form)}"
            known = f"use one of {', '.join(names)}"
            if not isinstance(said := turn.get(who), str):
                return f'at [{i}]: "{who}" {_must_be("a text", said, known)}'
            if said not in names:
                return f'at [{i}]: "{who}" is "{said}"; {known}'
            if who == "role" and (calls := given(turn, "tool_calls")):
                if complaint := _calls(calls):
                    return f'at [{i}]: "tool_calls" {complaint}'
                if given(turn, what) is None:
                    continue
            if complaint := text_fault(turn[what]) if what in turn else f"is missing; {_FILL}":
                return f'at [{i}]: "{what}" {complaint}'
        return None

    return check


def _calls(value: Any) -> str | None:
    form = 'write [{"type": "function", "function": {"name": …, "arguments": {…}}}, …]'
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or text_fault(function.get("name")):
            return f"must be a list of calls, each with a function and its name; {form}"
        if not isinstance(arguments := function.get("arguments", {}), dict):
            return f'at "arguments" {_must_be("an object", arguments, "read it with json.loads")}'
    return None


def _asked(value: Any) -> str | None:
    return _asked_turns(value) if isinstance(value, list) else text_fault(value)


def _tools(value: Any) -> str | None:
    if isinstance(value, list) and all(isinstance(tool, dict) for tool in value):
        return None
    form = "read it with json.loads" if isinstance(value, str) else 'write [{"type": "function", …}, …]'
    return _must_be("a list of objects", value, form)


def _history(value: Any) -> str | None:
    for turn in value if isinstance(value, list) else [value]:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or any(map(text_fault, turn)):
            return 'must be a list of earlier turns; write [["question", "answer"], …]'
    return None


_asked_turns = _turns("role", "content", ROLES)
KINDS: dict[str, dict[str, Check]] = {
    "sft": {"prompt": _asked, "completion": text_fault},
    "preference": {"prompt": _asked, "chosen": text_fault, "rejected": text_fault},
    "feedback": {"prompt": _asked, "completion": text_fault, "label": _label},
    "chat": {"messages": _asked_turns},
    "sharegpt": {"conversations": _turns("from", "value", tuple(SHAREGPT))},
    "alpaca": {"instruction": text_fault, "output": text_fault},
    "text": {"text": text_fault},
}

# Fields beside a kind's own that change what a row or a message means: BESIDE are used, REFUSED are refused
# with this mend, empty ones are as good as absent. Any other field of a row (id, source, …) is a note.
REFUSED = {
    "history": 'write its turns as "messages"',
    "functions": 'write them as "tools"',
    "documents": "write them into the prompt",
    "chat_template_kwargs": "write what they ask for into the texts",
    **dict.fromkeys(("system_prompt", "system_message"), 'rename it to "system"'),
    **dict.fromkeys(("reasoning_content", "thinking"), 'write it into the answer, as "<think>…</think>"'),
    **dict.fromkeys(("tool_calls", "function_call"), "write it into the answer, as the template would"),
    **dict.fromkeys(("weight", "chosen_weight", "rejected_weight", "margin"), "repeat what counts for more"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "drop the row"),
}
BESIDE: dict[str, Check] = {"system": text_fault, "tools": _tools}
ALPACA_BESIDE: dict[str, Check] = {**BESIDE, "history": _history, "input": text_fault}
_MEANT = frozenset((*ALPACA_BESIDE, *REFUSED))


def iter_records(path: str | Path, kind: str) -> Iterator[Record]:
    """Yield the records of a JSONL file one by one, each checked; the file is never in memory as a whole.

    Args:
        path: UTF-8 JSONL file, one object per line. Blank lines are skipped, further fields are kept.
        kind: "sft" (prompt, completion), "preference" (prompt, chosen, rejected), "feedback" (prompt,
            completion, label), "chat" (messages: role, content), "sharegpt" (conversations: from, value),
            "alpaca" (instruction, output; perhaps input, history) or "text" (text, for base models). Any may
            have `system` and `tools`; a `prompt` may be a list of messages.

    Raises:
        ValueError: with file, line, field and mend, on the first bad line; no such file, or no rows in it.
    """
    _known(kind)
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path (relative ones start at {Path.cwd()})")
    return _checked_lines(path, kind)


def read_records(path: str | Path, kind: str) -> list[Record]:
    """All records of a JSONL file as a list; arguments and errors are those of `iter_records`."""
    return list(iter_records(path, kind))


def check_records(records: Iterable[Record], kind: str) -> list[Record]:
    """Rows from memory or a `datasets.Dataset` as a list, checked as by `iter_records`; counted from 0."""
    _known(kind)
    checked = []
    for index, record in enumerate(records):
        if complaint := find_fault(record, kind):
            raise ValueError(f"row {index}: {complaint}")
        checked.append(record)
    if not checked:
        raise ValueError(f"an empty data set; it needs at least one row of {', '.join(KINDS[kind])}")
    return checked


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write rows as a JSONL file, whole or not at all; equal rows give equal bytes, which can be read again.

    Raises:
        ValueError: with row number (from 0) and field: JSON does not have such a value (NaN, a NumPy array).
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(_line(f"row {index}", record) for index, record in enumerate(records))

    write_atomically(Path(path), write)


def _line(where: str, record: Any) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        for field, value in record.items() if isinstance(record, dict) else ():
            _line(f'{where}: "{field}"', [value])
        mend = "write texts, finite numbers, true, false, null, and lists and objects of them"
        raise ValueError(f"{where}: {error}; {mend}") from error


def _known(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of records; use one of {', '.join(KINDS)}")


def _not_json(name: str) -> NoReturn:
    raise ValueError(name)


_decode = json.JSONDecoder(parse_constant=_not_json).decode  # json.loads would make a decoder for each line


def _checked_lines(path: Path, kind: str) -> Iterator[Record]:
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            empty = False
            try:
                record = decode_line(line, number)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            if complaint := find_fault(record, kind):
                raise ValueError(f"{path}:{number}: {complaint}")
            yield record
    if empty:
        raise ValueError(f"{path}: an empty data set; it needs at least one row of {', '.join(KINDS[kind])}")


def decode_line(line: bytes, number: int = 0) -> Any:
    """What a line of a JSONL file holds, without the byte order mark of line 1; its fault is a ValueError."""
    try:
        return _decode(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
    except (ValueError, RecursionError) as error:
        raise ValueError(_line_fault(line, error)) from error


def _line_fault(line: bytes, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        fault = f"malformed JSON at column {error.colno} ({error.msg})"
        return f"{fault}; a JSONL file has one whole JSON object on each line"
    if isinstance(error, RecursionError):
        return "lists and objects are nested too deeply; store that part as a text"
    most = sys.get_int_max_str_digits()
    place = re.search(rf'"([^"]*)"\s*:[^":]*?(?:\d{{{most + 1},}}|(-?(?:NaN|Infinity)))', line.decode())
    field = f'"{place[1]}"' if place else "a field"
    if place and place[2]:
        return f"{field} holds {place[2]}, which JSON does not have; write null or drop the row"
    return f"{field} holds a number of more than {most} digits; put it in quotes"


def find_fault(record: Any, kind: str) -> str | None:
    """What is wrong with a record and how to mend it, or None."""
    # Dataset.map hands over rows that are no dicts; to ask for a dict first is much faster
    if not isinstance(record, dict) and not isinstance(record, Mapping):
        form = f'write {{"{next(iter(KINDS[kind]))}": …}}'
        return f"a row {_must_be('a JSON object', record, form)}"
    for field, check in KINDS[kind].items():
        if field not in record:
            return f'"{field}" is missing; a row of kind "{kind}" has {", ".join(KINDS[kind])}'
        if complaint := check(record[field]):
            return f'"{field}" {complaint}'
    if not _MEANT.isdisjoint(record):
        beside = ALPACA_BESIDE if kind == "alpaca" else BESIDE
        for field in (name for name in record if name in _MEANT and given(record, name) is not None):
            if field in beside and (complaint := beside[field](record[field])):
                return f'"{field}" {complaint}'
            if field not in beside and field in REFUSED:
                return f'"{field}" is not used in training; {REFUSED[field]}, or take the field out'
        turns = record[next(iter(KINDS[kind]))]
        first = turns[0] if isinstance(turns, list) else {}
        if given(record, "system") and first.get("role", first.get("from")) == "system":
            return '"system" stands beside a system turn; keep one of them'
    if kind == "preference" and record["chosen"] == record["rejected"]:
        return '"chosen" equals "rejected" and teaches nothing; change one or drop the row'
    return None
