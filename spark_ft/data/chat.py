"""Chat templates, and which tokens of a conversation are learned.

Nothing here knows a model's special tokens: every text goes through the tokenizer's own chat template.
"""

from typing import TYPE_CHECKING, Any

from spark_ft.data.records import find_fault

if TYPE_CHECKING:  # importing transformers takes seconds, and reading records needs none of it
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that transformers' and torch's cross-entropy leave out
Marked = tuple[list[int], list[bool]]


def render(record: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Token ids of what the model is given and of what it should answer, by the tokenizer's own chat template.

    prompt ids + completion ids = the whole conversation, up to and including the answer's end-of-turn token; what the
    template writes after that (often a newline) is cut off, since generation stops there.

    Args:
        record: an "sft" or "feedback" row (prompt, completion), or a "chat" whose last message is the assistant's:
            that message is the completion, all before it the prompt.
        tokenizer: one with a chat template; its `eos_token` must end the assistant's turn.

    Raises:
        ValueError: a field is missing, empty or of the wrong type, or holds one of the tokenizer's control tokens; the
            chat does not end with the assistant; the template does not keep the prompt's tokens as a prefix, or does not
            end the turn.
    """
    if complaint := find_fault(record, "chat" if "messages" in record else "sft"):
        raise ValueError(complaint)
    if "messages" in record:
        messages = record["messages"]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError('"messages" must end with an answer by the assistant; add one or drop the row')
        return _render(messages, [f'"messages" at [{i}]: "content"' for i in range(len(messages))], tokenizer)
    return _render_answer(record, "completion", tokenizer)


def _render_answer(record, field: str, tokenizer) -> tuple[list[int], list[int]]:
    messages = [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record[field]},
    ]
    return _render(messages, ['"prompt"', f'"{field}"'], tokenizer)


def _render(messages: list[dict], fields: list[str], tokenizer) -> tuple[list[int], list[int]]:
    for message, field in zip(messages, fields, strict=True):
        for token in tokenizer.all_special_tokens:
            # the tokenizer cannot tell it from the template's own: the text would end its turn, or open another's
            if token in message["content"]:
                raise ValueError(
                    f"{field} holds the control token {token!r}; take it out or write it otherwise"
                )
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            "the chat template does not keep the prompt's tokens when the answer follows: "
            f"an answer that starts with {messages[-1]['content'][:1]!r} may melt into the turn's head; strip it"
        )
    completion = whole[len(prompt) :]
    if tokenizer.eos_token_id not in completion:
        raise ValueError(
            f"the chat template does not end the assistant's turn with {tokenizer.eos_token!r}; "
            "set tokenizer.eos_token to the token that does"
        )
    end = len(completion) - completion[::-1].index(tokenizer.eos_token_id)
    return prompt, completion[:end]


def last_answer(record: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Marked:
    """Token ids of a conversation, and for each whether it is learned: the last answer and its end-of-turn token."""
    prompt, completion = render(record, tokenizer)
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def all_answers(record: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Marked:
    """Token ids of a conversation, and for each whether it is learned: every answer of the assistant, end-of-turn included.

    Raises:
        ValueError: as `render`; or the template writes an answer otherwise once more turns follow it, as those do that drop
            the reasoning of earlier turns.
    """
    ids, learned = last_answer(record, tokenizer)
    messages = record.get("messages", [])
    for i in range(1, len(messages) - 1):
        if messages[i]["role"] == "assistant":
            prompt, answer = render({"messages": messages[: i + 1]}, tokenizer)
            start, end = len(prompt), len(prompt) + len(answer)
            if ids[:end] != prompt + answer:
                raise ValueError(
                    f"the chat template changes the answer at [{i}] when more turns follow; "
                    "learn the last answer only, or give the tokenizer a template that keeps the earlier ones"
                )
            learned[start:end] = [True] * len(answer)
    return ids, learned


def whole_conversation(record: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Marked:
    """Token ids of a conversation, all of them learned: what everyone said, and the template's own marks."""
    ids, _ = last_answer(record, tokenizer)
    return ids, [True] * len(ids)
