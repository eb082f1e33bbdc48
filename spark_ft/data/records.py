"""Records: plain dicts, one JSON object a line in their file, checked as they are read, with file, line, field and mend."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {  # its names for the roles; the first of each role is the usual one
    "system": "system",
    "human": "user",
    "gpt": "assistant",
    "tool": "tool",
    "user": "user",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
}


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"must be a text, not {_type_name(value)}; put it in quotes"
    if not value.strip():
        return "is empty; fill it in or drop the row"
    try:
        value.encode()
    except UnicodeEncodeError:  # json lets lone surrogates through, tokenizers do not
        return r"holds half a character (a lone \ud800–\udfff escape); save the text again from its source as UTF-8"
    return None


def _boolean(value: Any) -> str | None:
    if isinstance(value, bool):
        return None
    return f"must be true or false, not {json.dumps(value)}; write the thumb as true (up) or false (down)"


def _turns(who: str, what: str, names: tuple[str, ...]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if not isinstance(value, list):
            return (
                f'must be a list of messages, not {_type_name(value)}; write [{{"{who}": …, "{what}": …}}, …]'
            )
        if not value:
            return "is empty; fill it in or drop the row"
        for i, turn in enumerate(value):
            if not isinstance(turn, dict):
                return f"at [{i}] must be an object with {who} and {what}, not {_type_name(turn)}"
            if turn.get(who) not in names:
                said = "has the role" if who == "role" else f'has "{who}"'
                return f"at [{i}] {said} {json.dumps(turn.get(who))}; use one of {', '.join(names)}"
            if complaint := _text(turn[what]) if what in turn else "is missing; fill it in or drop the row":
                return f'at [{i}]: "{what}" {complaint}'
        return None

    return check


KINDS: dict[str, dict[str, Callable[[Any], str | None]]] = {
    "sft": {"prompt": _text, "completion": _text},
    "preference": {"prompt": _text, "chosen": _text, "rejected": _text},
    "feedback": {"prompt": _text, "completion": _text, "label": _boolean},
    "chat": {"messages": _turns("role", "content", ROLES)},
    "sharegpt": {"conversations": _turns("from", "value", tuple(SHAREGPT))},
    "alpaca": {
        "instruction": _text,
        "output": _text,
    },  # and "input", which may be empty or not be there at all
}


def iter_records(path: str | Path, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file one by one, each checked; the file is never in memory as a whole.

    Args:
        path: UTF-8 JSONL file, one object a line. Blank lines are skipped, fields beyond the kind's own are kept.
        kind: "sft" (prompt, completion), "preference" (prompt, chosen, rejected),
            "feedback" (prompt, completion, label), "chat" (messages: role, content), "sharegpt" (conversations: from,
            value) or "alpaca" (instruction, output, and an input that may be empty).

    Raises:
        ValueError: with file, line, field and mend, on the first bad line; also if the file is missing or has no rows.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of records; use one of {', '.join(KINDS)}")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path (relative ones start at {Path.cwd()})")
    return _checked_lines(path, kind)


def read_records(path: str | Path, kind: str) -> list[dict[str, Any]]:
    """All records of a JSONL file as a list; arguments and errors are those of `iter_records`."""
    return list(iter_records(path, kind))


def check_records(records: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Rows that come from memory or a `datasets.Dataset`, as a list, each checked as `iter_records` checks a line.

    Raises:
        ValueError: with row number (from 0), field and mend, on the first bad row; also if there are no rows.
    """
    checked = []
    for index, record in enumerate(records):
        if complaint := find_fault(record, kind):
            raise ValueError(f"row {index}: {complaint}")
        checked.append(record)
    if not checked:
        raise ValueError(f"an empty data set; it needs at least one row of {', '.join(KINDS[kind])}")
    return checked


def write_records(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Write rows as a JSONL file, one by one, whole or not at all; the same rows give the same bytes."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    from spark_ft.files import write_atomically

    write_atomically(Path(path), write)


def _checked_lines(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            empty = False
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: malformed JSON at column {error.colno} ({error.msg}); "
                    "a JSONL file has one whole JSON object on each line"
                ) from error
            if complaint := find_fault(record, kind):
                raise ValueError(f"{path}:{number}: {complaint}")
            yield record
    if empty:
        raise ValueError(f"{path}: an empty data set; it needs at least one row of {', '.join(KINDS[kind])}")


def find_fault(record: Any, kind: str) -> str | None:
    """What is wrong with a record and how to mend it, or None."""
    if not isinstance(record, dict) and not isinstance(
        record, Mapping
    ):  # Dataset.map hands over rows that are no dicts
        return (
            f'a row must be a JSON object, not {_type_name(record)}; write {{"{next(iter(KINDS[kind]))}": …}}'
        )
    for field, check in KINDS[kind].items():
        if field not in record:
            return f'"{field}" is missing; a row of kind "{kind}" has {", ".join(KINDS[kind])}'
        if complaint := check(record[field]):
            return f'"{field}" {complaint}'
    if kind == "alpaca" and not isinstance(record.get("input", ""), str):
        return f'"input" must be a text, not {_type_name(record["input"])}; write "" where there is none'
    if kind == "preference" and record["chosen"] == record["rejected"]:
        return '"chosen" equals "rejected"; a pair teaches nothing if both are the same, so change one or drop the row'
    return None


def _type_name(value: Any) -> str:
    names = {str: "a text", bool: "true or false", type(None): "null", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
