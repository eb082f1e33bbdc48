"""Alpaca, ShareGPT, ChatML text and `messages`, both ways; preferences and feedback; `datasets.Dataset`.

Each conversion takes a row, gives a new one, keeps the fields it does not know and converts back to the row
it came from, but for empty optional fields, which are as good as absent. `messages` is the middle, as
`render` takes it. A bad row, or one that does not fit the other format, raises a ValueError with field and
mend.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from spark_ft.data.records import SHAREGPT, Record, find_fault, given

if TYPE_CHECKING:
    from datasets import Dataset

_USUAL = {role: name for name, role in reversed(SHAREGPT.items())}  # role → ShareGPT's usual name for it
_COLUMN = "column"  # `from` of a system turn that stood beside the conversation, for the way back


def sharegpt_to_messages(row: Record) -> Record:
    """conversations [{from, value}], and a `system` beside them → messages [{role, content}].

    human → user, gpt → assistant; an unusual name (bot, …) stays in the message as `from`, for the way back.
    """
    _check(row, "sharegpt")
    messages = [{**turn, "from": _COLUMN} for turn in _messages(row)]
    for turn in row["conversations"]:
        role = SHAREGPT[turn["from"]]
        unusual = {} if turn["from"] == _USUAL[role] else {"from": turn["from"]}
        rest = _rest(turn, ("from", "value"), ("role", "content"))
        messages.append({"role": role, "content": turn["value"], **unusual, **rest})
    return _replaced(row, "conversations", "messages", messages, without="system")


def messages_to_sharegpt(row: Record) -> Record:
    """messages [{role, content}] → conversations [{from, value}]; the way back of `sharegpt_to_messages`."""
    _check(row, "chat")
    first, *others = row["messages"]
    if column := first["role"] == "system" and first.get("from") == _COLUMN:
        _refuse_more({**first, "from": None}, "a system beside the turns")
    turns = []
    for message in others if column else row["messages"]:
        if given(message, "tool_calls"):
            raise ValueError('"messages" hold tool_calls, which ShareGPT has no place for; keep the messages')
        name = message.get("from") or _USUAL[message["role"]]
        if SHAREGPT.get(name) != message["role"]:
            fault = f'"from" is "{name}" in a message of role "{message["role"]}"'
            raise ValueError(f"{fault}; take it out or mend the role")
        rest = _rest(message, ("role", "content", "from"), ("value",))
        turns.append({"from": name, "value": message["content"], **rest})
    there = _replaced(row, "messages", "conversations", turns)
    return {**there, "system": first["content"]} if column else there


def alpaca_to_messages(row: Record) -> Record:
    """instruction, input, output, and system and history where there are any → messages.

    The user's turn is the instruction, a blank line, and the input where there is one. Either may hold blank
    lines, so `input_start` beside the messages tells at which character the input starts: absent where the
    input is "", null where the row has no such field.
    """
    _check(row, "alpaca")
    user, mark = row["instruction"], {}
    if row.get("input"):
        mark = {"input_start": len(user) + 2}
        user = f"{user}\n\n{row['input']}"
    elif row.get("input") is None:
        mark = {"input_start": None}
    messages = _messages(row, *(given(row, "history") or []), (user, row["output"]))
    fields = ("instruction", "input", "output", "system", "history")
    return {"messages": messages, **mark, **_rest(row, fields, ("messages", "input_start"))}


def messages_to_alpaca(row: Record) -> Record:
    """messages → instruction, input, output, system, history; a chat not from Alpaca gives an empty input."""
    system, texts = _questions_and_answers(row, "Alpaca holds questions and their answers: use ShareGPT")
    *earlier, user, answer = texts
    start = row.get("input_start", len(user))
    if start is None:
        asked = {"instruction": user}
    elif start == len(user) and "input_start" not in row:
        asked = {"instruction": user, "input": ""}
    elif isinstance(start, int) and 2 < start < len(user) and user[start - 2 : start] == "\n\n":
        asked = {"instruction": user[: start - 2], "input": user[start:]}
    else:
        raise ValueError(f'"input_start" is {start!r}, but no input starts there; take the field out')
    history = [list(turn) for turn in zip(earlier[::2], earlier[1::2], strict=True)]
    fields = {**asked, "output": answer, **system, **({"history": history} if history else {})}
    taken = ("instruction", "input", "output", "history", *system)
    return {**fields, **_rest(row, ("messages", "input_start"), taken)}


def sft_to_messages(row: Record) -> Record:
    """prompt, completion, and a system where there is one → messages: one question, one answer."""
    _check(row, "sft")
    asked = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    messages = [*_messages(row), *asked, {"role": "assistant", "content": row["completion"]}]
    return {"messages": messages, **_rest(row, ("prompt", "completion", "system"), ("messages",))}


def messages_to_sft(row: Record) -> Record:
    """messages of one question and answer → prompt, completion, system; the way back of `sft_to_messages`."""
    system, texts = _questions_and_answers(row, "prompt and completion hold two turns: keep the messages", 2)
    taken = {"prompt": texts[0], "completion": texts[1], **system}
    return {**taken, **_rest(row, ("messages",), tuple(taken))}


_TURN = re.compile(r"<\|im_start\|>([^\n<]*)\n(.*?)<\|im_end\|>\s*", re.DOTALL)


def chatml_to_messages(text: str) -> Record:
    """ChatML text, <|im_start|>role … <|im_end|> again and again → {"messages": …}."""
    messages, end = [], len(text) - len(text.lstrip())
    while end < len(text):
        turn = _TURN.match(text, end)
        if not turn or "<|im_start|>" in turn[2]:
            fault = f"at character {end}, {text[end : end + 30]!r}: no whole turn"
            raise ValueError(f"{fault}; write each as <|im_start|>role, a new line, the text and <|im_end|>")
        messages.append({"role": turn[1], "content": turn[2]})
        end = turn.end()
    row = {"messages": messages}
    _check(row, "chat")
    return row


def messages_to_chatml(row: Record) -> str:
    """messages → ChatML text, for tools that read it; what a model reads comes from `render`."""
    _check(row, "chat")
    for field in ("system", "tools"):
        if given(row, field):
            raise ValueError(f'"{field}" has no place in ChatML text; write it as a turn')
    for i, message in enumerate(row["messages"]):
        _refuse_more({**message, "from": None}, "ChatML text")  # the role says what `from` does
        for mark in ("<|im_start|>", "<|im_end|>"):
            if mark in message["content"]:
                raise ValueError(f'"messages" at [{i}]: "content" holds ChatML\'s own {mark}; take it out')
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"])


def pairs_to_thumbs(pairs: Iterable[Record]) -> list[Record]:
    """Each preference row becomes two feedback rows: chosen with the label true, then rejected with false."""
    thumbs = []
    for index, pair in enumerate(pairs):
        _check(pair, "preference", index)
        rest = _rest(pair, ("prompt", "chosen", "rejected"), ("completion", "label"))
        for field, label in (("chosen", True), ("rejected", False)):
            thumbs.append({"prompt": pair["prompt"], "completion": pair[field], "label": label, **rest})
    return thumbs


def thumbs_to_pairs(thumbs: Iterable[Record]) -> list[Record]:
    """Feedback rows on one prompt, system and tools become preference rows: the n-th true, the n-th false.

    What is left over (a prompt with more of one than of the other) makes no row; nor do two equal answers. A
    further field is kept where both agree on it.
    """
    by_prompt: dict[str, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    for index, thumb in enumerate(thumbs):
        _check(thumb, "feedback", index)
        asked = json.dumps([thumb["prompt"], given(thumb, "system"), given(thumb, "tools")], default=str)
        by_prompt[asked][thumb["label"]].append(thumb)
    pairs = []
    for down, up in by_prompt.values():
        for good, bad in zip(up, down, strict=False):
            if good["completion"] != bad["completion"]:
                agreed = {key: value for key, value in good.items() if key in bad and bad[key] == value}
                rest = _rest(agreed, ("prompt", "completion", "label"), ("chosen", "rejected"))
                answers = {"chosen": good["completion"], "rejected": bad["completion"]}
                pairs.append({"prompt": good["prompt"], **answers, **rest})
    return pairs


def ratings_to_thumbs(rows: Iterable[Record], up: float = 4, down: float = 2) -> list[Record]:
    """Rows with a `rating` become feedback rows: true from `up` on, false down to `down`, else dropped."""
    if not down < up:
        raise ValueError(f"down={down} is not below up={up}; a rating cannot be both")
    thumbs = []
    for index, row in enumerate(rows):
        _check(row, "sft", index)
        rating = row.get("rating")
        if isinstance(rating, bool) or not isinstance(rating, (int, float)) or rating != rating:
            raise ValueError(f'row {index}: "rating" must be a number, not {rating!r}; write one')
        if rating >= up or rating <= down:
            rest = _rest(row, ("prompt", "completion"), ("label",))
            answer = {"prompt": row["prompt"], "completion": row["completion"]}
            thumbs.append({**answer, "label": rating >= up, **rest})
    return thumbs


def to_dataset(records: Iterable[Record]) -> "Dataset":
    """Rows → `datasets.Dataset`; a column for every field of any row, null in the rows without it."""
    from datasets import Dataset

    rows = list(records)
    # from_list would take the first row's fields alone
    fields = dict.fromkeys(field for row in rows for field in row)
    columns = {field: [row.get(field) for row in rows] for field in fields}
    try:
        return Dataset.from_dict(columns)
    except (TypeError, ValueError, OverflowError) as error:  # Arrow's own are of these
        types = {field: set(map(type, values)) - {type(None)} for field, values in columns.items()}
        mixed = next((f'"{field}"' for field in types if len(types[field]) > 1), "a field of the rows")
        raise ValueError(f"{mixed} does not make a column ({error}); write one type in all rows") from error


def from_dataset(dataset: "Dataset") -> list[Record]:
    """`datasets.Dataset` → rows; nulls, with which a table fills fields a row does not have, are left out."""
    return [without_nulls(row) for row in dataset]


def without_nulls(value: Any) -> Any:
    """A row of a table without the nulls, at any depth, that fill the fields it does not have."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _check(row: Record, kind: str, index: int | None = None) -> None:
    if fault := find_fault(row, kind):
        raise ValueError(fault if index is None else f"row {index}: {fault}")


def _messages(row: Record, *exchanges: tuple[str, str]) -> list[Record]:
    turns = [("system", row["system"])] if given(row, "system") else []
    for question, answer in exchanges:
        turns += [("user", question), ("assistant", answer)]
    return [{"role": role, "content": text} for role, text in turns]


def _questions_and_answers(row: Record, mend: str, most: int = 0) -> tuple[Record, list[str]]:
    """The system turn as a field, and the texts of the other turns, which are questions and their answers."""
    _check(row, "chat")
    for message in row["messages"]:
        _refuse_more(message, "this format")
    roles = [message["role"] for message in row["messages"]]
    texts = [message["content"] for message in row["messages"]]
    system = {"system": texts.pop(0)} if roles[0] == "system" else {}
    turns = roles[len(system) :]
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) or len(turns) > (most or len(turns)):
        raise ValueError(f'"messages" are {", ".join(roles)}; {mend}')
    return system, texts


def _refuse_more(message: Record, where: str) -> None:
    if more := sorted(key for key in message.keys() - {"role", "content"} if given(message, key) is not None):
        raise ValueError(f'"messages" hold {", ".join(more)}, which {where} has no place for; take it out')


def _rest(row: Record, used: tuple[str, ...], taken: tuple[str, ...]) -> Record:
    """The fields of a row beyond those used up; none may have the name of one the result has of its own."""
    rest = {
        key: row[key] for key in row if key not in used and (key not in taken or given(row, key) is not None)
    }
    if clash := [key for key in taken if key in rest]:
        raise ValueError(f'"{clash[0]}" is there already, and the conversion writes it anew; rename it first')
    return rest


def _replaced(row: Record, old: str, new: str, value: Any, without: str | None = None) -> Record:
    """The row with one field renamed and given another value, in its place."""
    _rest(row, (old,), (new,))
    names = {old: new}
    return {names.get(key, key): value if key == old else row[key] for key in row if key != without}
