"""Alpaca, ShareGPT, ChatML text and `messages`, converted both ways; pairs and thumbs; `datasets.Dataset` in and out.

Every conversion takes one row and returns a new one, keeps the fields it does not know, and converts back to the row it
came from. `messages` is the middle: what `render` and the collators take.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from spark_ft.data.records import SHAREGPT, find_fault

if TYPE_CHECKING:
    from datasets import Dataset

Record = dict[str, Any]

# The embedded model's own template with marks around what the assistant says, and the same text when rendered: what TRL's
# `assistant_only_loss` needs. `all_answers` needs none of it.
GENERATION_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_USUAL = {role: name for name, role in reversed(SHAREGPT.items())}  # role → ShareGPT's usual name for it


def sharegpt_to_messages(row: Record) -> Record:
    """conversations [{from, value}] → messages [{role, content}].

    human → user, gpt → assistant; an unusual name (bot, chatgpt, …) stays in the message as `from`, for the way back.

    Raises:
        ValueError: with field and mend: not a "sharegpt" row, or it has fields of the same names as the result's.
    """
    _check(row, "sharegpt")
    messages = []
    for turn in row["conversations"]:
        role = SHAREGPT[turn["from"]]
        unusual = {} if turn["from"] == _USUAL[role] else {"from": turn["from"]}
        rest = _rest(turn, ("from", "value"), ("role", "content"))
        messages.append({"role": role, "content": turn["value"], **unusual, **rest})
    return _replaced(row, "conversations", "messages", messages)


def messages_to_sharegpt(row: Record) -> Record:
    """messages [{role, content}] → conversations [{from, value}]; the way back of `sharegpt_to_messages`."""
    _check(row, "chat")
    turns = []
    for message in row["messages"]:
        name = message.get("from", _USUAL[message["role"]])
        if SHAREGPT.get(name) != message["role"]:
            raise ValueError(
                f'"from" is "{name}" in a message of role "{message["role"]}"; take it out or mend the role'
            )
        turns.append(
            {
                "from": name,
                "value": message["content"],
                **_rest(message, ("role", "content", "from"), ("value",)),
            }
        )
    return _replaced(row, "messages", "conversations", turns)


def alpaca_to_messages(row: Record) -> Record:
    """instruction, input and output (and a system text, where there is one) → messages.

    The user's turn is the instruction, a blank line, and the input where there is one. Either may hold blank lines itself, so
    the place where the input starts is written down beside the messages: `input_start`, a number of characters. It is absent
    where the input is "", and null where the row has no such field.

    Raises:
        ValueError: with field and mend: not an "alpaca" row, or it has fields of the same names as the result's.
    """
    _check(row, "alpaca")
    if "system" in row and (fault := find_fault({"prompt": row["system"], "completion": "-"}, "sft")):
        raise ValueError(fault.replace('"prompt"', '"system"'))
    user, mark = row["instruction"], {}
    if "input" not in row:
        mark = {"input_start": None}
    elif row["input"]:
        mark = {"input_start": len(user) + 2}
        user = f"{user}\n\n{row['input']}"
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    messages = [*system, {"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
    fields = ("instruction", "input", "output", "system")
    return {"messages": messages, **mark, **_rest(row, fields, ("messages", "input_start"))}


def messages_to_alpaca(row: Record) -> Record:
    """messages → instruction, input and output; the way back of `alpaca_to_messages`.

    A chat that never was Alpaca gives an empty input.

    Raises:
        ValueError: with field and mend: not a "chat" row, or more than Alpaca can hold: one question, one answer.
    """
    _check(row, "chat")
    roles = [message["role"] for message in row["messages"]]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(
            f'"messages" are {", ".join(roles)}; Alpaca holds one question and one answer: use ShareGPT'
        )
    if more := {key for message in row["messages"] for key in message} - {"role", "content"}:
        raise ValueError(
            f'"messages" hold {", ".join(sorted(more))}, which Alpaca has no place for; take it out'
        )
    *system, user, answer = (message["content"] for message in row["messages"])
    start = row.get("input_start", len(user))
    if start is None:
        asked = {"instruction": user}
    elif start == len(user) and "input_start" not in row:
        asked = {"instruction": user, "input": ""}
    elif isinstance(start, int) and 2 < start < len(user) and user[start - 2 : start] == "\n\n":
        asked = {"instruction": user[: start - 2], "input": user[start:]}
    else:
        raise ValueError(
            f'"input_start" is {start!r}, but no input starts there; the text was changed: take the field out'
        )
    fields = ("instruction", "input", "output", "system")
    rest = _rest(row, ("messages", "input_start"), fields)
    return {**asked, "output": answer, **({"system": system[0]} if system else {}), **rest}


def sft_to_messages(row: Record) -> Record:
    """prompt, completion → messages: one question, one answer."""
    _check(row, "sft")
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    return {"messages": turns, **_rest(row, ("prompt", "completion"), ("messages",))}


def messages_to_sft(row: Record) -> Record:
    """messages of one question and one answer → prompt, completion; the way back of `sft_to_messages`."""
    _check(row, "chat")
    roles = [message["role"] for message in row["messages"]]
    if roles != ["user", "assistant"] or any(
        set(message) != {"role", "content"} for message in row["messages"]
    ):
        raise ValueError(
            f'"messages" are {", ".join(roles)}; prompt and completion hold two bare turns: keep the messages'
        )
    prompt, completion = (message["content"] for message in row["messages"])
    return {"prompt": prompt, "completion": completion, **_rest(row, ("messages",), ("prompt", "completion"))}


_TURN = re.compile(r"<\|im_start\|>([^\n<]*)\n(.*?)<\|im_end\|>\s*", re.DOTALL)


def chatml_to_messages(text: str) -> Record:
    """ChatML text, <|im_start|>role … <|im_end|> again and again → {"messages": …}.

    Raises:
        ValueError: with place and mend: text outside the marks, a mark inside a turn, an unknown role, no turn at all.
    """
    messages, end = [], len(text) - len(text.lstrip())
    while end < len(text):
        turn = _TURN.match(text, end)
        if not turn or "<|im_start|>" in turn[2]:
            raise ValueError(
                f"at character {end}, {text[end : end + 30]!r}: no whole turn; write each as <|im_start|>role, a new line, "
                "the text and <|im_end|>"
            )
        messages.append({"role": turn[1], "content": turn[2]})
        end = turn.end()
    row = {"messages": messages}
    _check(row, "chat")
    return row


def messages_to_chatml(row: Record) -> str:
    """messages → ChatML text, for tools that read it; what a model reads comes from `render`, by its own template.

    Raises:
        ValueError: with field and mend: not a "chat" row, or a text that holds one of ChatML's marks.
    """
    _check(row, "chat")
    for i, message in enumerate(row["messages"]):
        for mark in ("<|im_start|>", "<|im_end|>"):
            if mark in message["content"]:
                raise ValueError(
                    f'"messages" at [{i}]: "content" holds {mark}, ChatML\'s own mark; take it out'
                )
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"])


def pairs_to_thumbs(pairs: Iterable[Record]) -> list[Record]:
    """Each prompt/chosen/rejected becomes two prompt/completion/label rows: chosen up, then rejected down."""
    thumbs = []
    for index, pair in enumerate(pairs):
        _check(pair, "preference", index)
        rest = _rest(pair, ("prompt", "chosen", "rejected"), ("completion", "label"))
        for field, label in (("chosen", True), ("rejected", False)):
            thumbs.append({"prompt": pair["prompt"], "completion": pair[field], "label": label, **rest})
    return thumbs


def thumbs_to_pairs(thumbs: Iterable[Record]) -> list[Record]:
    """Thumbs on the same prompt become pairs: its n-th up with its n-th down, in the order they came.

    What is left over (a prompt with more of one than of the other) makes no pair; nor do two equal answers. A further field
    is kept where both thumbs agree on it.
    """
    by_prompt: dict[str, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    for index, thumb in enumerate(thumbs):
        _check(thumb, "feedback", index)
        by_prompt[thumb["prompt"]][thumb["label"]].append(thumb)
    pairs = []
    for prompt, (down, up) in by_prompt.items():
        for good, bad in zip(up, down, strict=False):
            if good["completion"] != bad["completion"]:
                agreed = {key: value for key, value in good.items() if key in bad and bad[key] == value}
                rest = _rest(agreed, ("prompt", "completion", "label"), ("chosen", "rejected"))
                pairs.append(
                    {"prompt": prompt, "chosen": good["completion"], "rejected": bad["completion"], **rest}
                )
    return pairs


def ratings_to_thumbs(rows: Iterable[Record], up: float = 4, down: float = 2) -> list[Record]:
    """Rows of prompt, completion and a number `rating` become thumbs: up from `up` on, down to `down`; between, dropped.

    Raises:
        ValueError: with row, field and mend: a bad row, a rating that is no number, or `down` not below `up`.
    """
    if not down < up:
        raise ValueError(f"down={down} is not below up={up}; a rating cannot be both")
    thumbs = []
    for index, row in enumerate(rows):
        _check(row, "sft", index)
        rating = row.get("rating")
        if isinstance(rating, bool) or not isinstance(rating, (int, float)):
            raise ValueError(
                f'row {index}: "rating" must be a number, not {rating!r}; write one or drop the row'
            )
        if rating >= up or rating <= down:
            rest = _rest(row, ("prompt", "completion"), ("label",))
            thumbs.append(
                {"prompt": row["prompt"], "completion": row["completion"], "label": rating >= up, **rest}
            )
    return thumbs


def to_dataset(records: Iterable[Record]) -> "Dataset":
    """Rows → `datasets.Dataset`, with a column for every field of any row; a row without the field holds null there."""
    from datasets import Dataset

    rows = list(records)
    columns = dict.fromkeys(
        field for row in rows for field in row
    )  # from_list would take the first row's alone
    return Dataset.from_dict({field: [row.get(field) for row in rows] for field in columns})


def from_dataset(dataset: "Dataset") -> list[Record]:
    """`datasets.Dataset` → rows; nulls, with which a table fills the fields that a row does not have, are left out."""
    return [_without_nulls(row) for row in dataset]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _check(row: Record, kind: str, index: int | None = None) -> None:
    if fault := find_fault(row, kind):
        raise ValueError(fault if index is None else f"row {index}: {fault}")


def _rest(row: Record, used: tuple[str, ...], taken: tuple[str, ...]) -> Record:
    """The fields of a row beyond those used up; none may bear the name of a field that the result has of its own."""
    rest = {key: value for key, value in row.items() if key not in used}
    if clash := [key for key in taken if key in rest]:
        raise ValueError(
            f'"{clash[0]}" is there already, and the conversion writes a field of that name; rename it first'
        )
    return rest


def _replaced(row: Record, old: str, new: str, value: Any) -> Record:
    """The row with one field renamed and given another value, in its place."""
    _rest(row, (old,), (new,))
    return {(new if key == old else key): (value if key == old else inner) for key, inner in row.items()}
