"""Chat templates, and which tokens are learned; all text goes through the tokenizer's own template."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from spark_ft.data.records import REFUSED, Record, find_fault, given

if TYPE_CHECKING:  # importing transformers takes seconds, and reading records needs none of it
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORE = -100  # the label that transformers' and torch's cross-entropy leave out
Marked = tuple[list[int], list[bool]]

_OTHER = "give the tokenizer another chat_template"  # the mend of what a template does
_TAG = re.compile(r"(</?[\w|]+>)")


_RENDERED = {"role", "content", "tool_calls"}
_LINKS = {"tool": {"tool_call_id", "name"}}  # whose result a turn is: its place says so too
_NOTES = {"weight", "from"}  # `from` is what sharegpt_to_messages notes for the way back


class Conversation(NamedTuple):
    """Turns and tools as a template takes them; each turn's name in its row, and if it may be learned."""

    turns: list[dict[str, Any]]
    names: list[str]
    learnable: list[bool]
    tools: list[dict] | None


def conversation(record: Record, answer: str | None = None) -> Conversation:
    """A row as turns, the last of them the answer; a `system` beside them comes first.

    Args:
        record: an "sft", "feedback" or "chat" row; with `answer`, any row that was checked.
        answer: the field with the answer.
    """
    chat = answer is None and isinstance(record, Mapping) and record.get("messages") is not None
    if answer is None and (complaint := find_fault(record, "chat" if chat else "sft")):
        raise ValueError(complaint)
    if chat:
        messages, names = record["messages"], [f'"messages" at [{i}]' for i in range(len(record["messages"]))]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError('"messages" must end with an answer by the assistant; add one')
    else:
        messages, names = record["prompt"], ['"prompt"']
        if isinstance(messages, list):
            names = [f'"prompt" at [{i}]' for i in range(len(messages))]
            if messages[-1]["role"] == "assistant":
                raise ValueError('"prompt" must end before the answer; take its last message out')
        else:
            messages = [{"role": "user", "content": messages}]
        field = answer or "completion"
        messages, names = [*messages, {"role": "assistant", "content": record[field]}], [*names, f'"{field}"']
    messages = [{k: m[k] for k in m if given(m, k) is not None} for m in messages]
    for name, message in zip(names, messages, strict=True):
        if more := sorted(message.keys() - _RENDERED - _NOTES - _LINKS.get(message["role"], set())):
            mend = {"train": 'write "weight": 0 or 1', **REFUSED}.get(more[0], "write it into the content")
            raise ValueError(f'{name} has "{more[0]}", which is not rendered; {mend}, or take it out')
        if "weight" in message and (message["role"] != "assistant" or message["weight"] not in (0, 1)):
            raise ValueError(f"{name} has the weight {message['weight']!r}; only answers have one, 0 or 1")
    if system := given(record, "system"):
        messages, names = [{"role": "system", "content": system}, *messages], ['"system"', *names]
    turns = [{"content": "", **{k: m[k] for k in m if k not in _NOTES}} for m in messages]
    learnable = [message.get("weight") != 0 for message in messages]
    return Conversation(turns, names, learnable, given(record, "tools"))


def render(record: Record, tokenizer: "Tokenizer") -> tuple[list[int], list[int]]:
    """Token ids of what the model is given and of what it should answer, by the tokenizer's chat template.

    prompt ids + completion ids = the whole conversation, up to and including the answer's end-of-turn token;
    what the template writes after that (often a newline) is cut off, since generation stops there.

    Args:
        record: an "sft" or "feedback" row (prompt, completion), or a "chat": its last message, by the
            assistant, is the completion, all before it the prompt. `system` and `tools` beside them are
            rendered too, and the `tool_calls` of a message.
        tokenizer: one with a chat template; its `eos_token` must end the assistant's turn.

    Raises:
        ValueError: with field and mend: a bad row; a message with a field that is not rendered; a control
            token in a text; a template that fails, leaves out a turn, a call, the tools or a part of the
            answer (white space around it and its tags may go), rewrites the prompt once the answer follows,
            or does not end the turn.
    """
    return render_turns(conversation(record), tokenizer)


def render_turns(chat: Conversation, tokenizer: "Tokenizer") -> tuple[list[int], list[int]]:
    """`render` for a `conversation`."""
    texts = [turn["content"] + str(turn.get("tool_calls", "")) for turn in chat.turns]
    for name, text in zip([*chat.names, '"tools"'], [*texts, str(chat.tools)], strict=True):
        _refuse_control(name, text, tokenizer)
    prompt = _apply(tokenizer, chat.turns[:-1], chat.tools, prompting=True)
    whole = _apply(tokenizer, chat.turns, chat.tools)
    _check_all_is_there(chat, prompt, whole, tokenizer)
    prompt_ids, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, whole))
    completion = ids[len(prompt_ids) :]
    if ids[: len(prompt_ids)] != prompt_ids:
        start = texts[-1][0]
        raise ValueError(
            f"the chat template does not keep the prompt's tokens when an answer that starts with {start!r} "
            f"follows; {'strip it' if start.isspace() else _OTHER}"
        )
    if tokenizer.eos_token_id not in completion:
        raise ValueError(
            f"the chat template does not end the assistant's turn with {tokenizer.eos_token!r}; "
            "set tokenizer.eos_token to the token that does"
        )
    return prompt_ids, completion[: len(completion) - completion[::-1].index(tokenizer.eos_token_id)]


def _refuse_control(name: str, text: str, tokenizer) -> None:
    # the tokenizer would take it for the template's own, the end of a turn
    control = _control_tokens(tokenizer, len(tokenizer), tuple(tokenizer.all_special_tokens))
    if found := control.search(text):
        raise ValueError(f"{name} holds the control token {found[0]!r}; take it out, or write it otherwise")


@lru_cache(maxsize=8)
def _control_tokens(tokenizer, size: int, special: tuple[str, ...]) -> re.Pattern:
    # Llama 3's <|start_header_id|> is among the added ones alone; `size` and `special` tell that tokens were
    # added
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return re.compile("|".join(map(re.escape, sorted({*special, *added}, key=len, reverse=True))) or r"(?!)")


def _apply(tokenizer, turns: list[dict], tools: list[dict] | None, prompting: bool = False) -> str:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat_template; take an instruct model's, or set one")
    try:
        return tokenizer.apply_chat_template(turns, tools, tokenize=False, add_generation_prompt=prompting)
    except Exception as error:  # a template raises what it likes, and trips over what it does not expect
        fault = f'the chat template refuses this conversation: "{error}"'
        raise ValueError(f"{fault}; change what it names, or {_OTHER}") from error


def _check_all_is_there(chat: Conversation, prompt: str, whole: str, tokenizer) -> None:
    if chat.tools and _apply(tokenizer, chat.turns[:-1], None, prompting=True) == prompt:
        raise ValueError(f'the chat template leaves "tools" out; {_OTHER}, or take the field out')
    marked = [_marked(turn, f"turn{i}of{len(chat.turns)}") for i, turn in enumerate(chat.turns)]
    turns = [turn for turn, _ in marked]
    text = _apply(tokenizer, turns[:-1], chat.tools, prompting=True)
    if chat.turns[-1].get("tool_calls"):
        text += _apply(tokenizer, turns, chat.tools)
    for i, (name, (_, marks)) in enumerate(zip(chat.names, marked, strict=True)):
        lost = [field for mark, field in marks.items() if mark not in text]
        if "tool_calls" in lost:
            fault = f'{name}: the chat template leaves "tool_calls" out or rewrites them'
            raise ValueError(f"{fault}; {_OTHER}, or write the call into the content as the model should")
        if lost and i < len(marked) - 1:  # the answer itself is looked at below
            fault = f"{name}: the chat template leaves it out or rewrites it"
            raise ValueError(f"{fault}; {_OTHER}, or take it out")
    if not whole.startswith(prompt):
        raise ValueError(f"the chat template writes the prompt otherwise when an answer follows; {_OTHER}")
    pieces = [piece.strip() for piece in _TAG.split(chat.turns[-1]["content"]) if piece.strip()]
    place = len(prompt)
    opened = prompt.rstrip().endswith(tuple(pieces[:1]))  # a prompt may open the answer, with <think>
    for piece in pieces[opened:]:
        if (place := whole.find(piece, place)) < 0:
            fault = f"{chat.names[-1]}: the chat template leaves {piece[:40]!r} out"
            raise ValueError(f"{fault}; {_OTHER}, or take it out")
        place += len(piece)


def _marked(turn: dict[str, Any], mark: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A turn whose texts are marks, which no template has a reason to change; mark → the field it is in."""
    marks, calls = {mark: "content"} if turn["content"] else {}, []
    for i, call in enumerate(turn.get("tool_calls", ())):
        name, argument = f"{mark}call{i}", {f"{mark}name{i}": f"{mark}value{i}"}
        argument = argument if call["function"].get("arguments") else {}
        calls.append({**call, "function": {**call["function"], "name": name, "arguments": argument}})
        marks |= dict.fromkeys((name, *argument, *argument.values()), "tool_calls")
    changed = {"content": turn["content"] and mark, **({"tool_calls": calls} if calls else {})}
    return {**turn, **changed}, marks


def last_answer(record: Record, tokenizer: "Tokenizer") -> Marked:
    """Token ids of a conversation, and whether each is learned: the last answer with its end of turn."""
    chat = conversation(record)
    return _mark(chat, [len(chat.turns) - 1], tokenizer)


def all_answers(record: Record, tokenizer: "Tokenizer") -> Marked:
    """Token ids of a conversation, and whether each is learned: all answers but those with the weight 0.

    Raises:
        ValueError: as `render`; or the template writes an answer otherwise once more turns follow, as those
            do that drop the reasoning of earlier turns.
    """
    chat = conversation(record)
    return _mark(chat, [i for i, turn in enumerate(chat.turns) if turn["role"] == "assistant"], tokenizer)


def whole_conversation(record: Record, tokenizer: "Tokenizer") -> Marked:
    """Token ids of a conversation, all of them learned: what everyone said, and the template's own marks."""
    chat = conversation(record)
    if not all(chat.learnable):
        raise ValueError("an answer has the weight 0; learn all_answers, or take the weight out")
    prompt, completion = render_turns(chat, tokenizer)
    return prompt + completion, [True] * len(prompt + completion)


def whole_text(record: Record, tokenizer: "Tokenizer") -> Marked:
    """Token ids of a "text" row for a base model, all of them learned, and the end token; no template."""
    if complaint := find_fault(record, "text"):
        raise ValueError(complaint)
    _refuse_control('"text"', record["text"], tokenizer)
    ids = tokenizer(record["text"]).input_ids
    ids += [tokenizer.eos_token_id] * (ids[-1:] != [tokenizer.eos_token_id])
    return ids, [True] * len(ids)


def _mark(chat: Conversation, answers: list[int], tokenizer) -> Marked:
    prompt, completion = render_turns(chat, tokenizer)
    ids, learned = prompt + completion, [False] * len(prompt + completion)
    for i in filter(chat.learnable.__getitem__, answers):
        if i == 0:
            raise ValueError(f"{chat.names[0]} answers no question; give it the weight 0")
        until = Conversation(*(part[: i + 1] for part in chat[:3]), chat.tools)
        before, answer = (prompt, completion) if until == chat else render_turns(until, tokenizer)
        if ids[: len(before + answer)] != before + answer:
            fault = f"{chat.names[i]}: the chat template changes this answer when more turns follow"
            raise ValueError(f"{fault}; learn the last answer only, or {_OTHER}")
        learned[len(before) : len(before + answer)] = [True] * len(answer)
    if not any(learned):
        raise ValueError("nothing is learned of a row whose answers have the weight 0; drop it")
    return ids, learned
