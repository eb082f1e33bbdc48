"""Records, their validation, chat templates, label masks and collators.

A record is a plain dict, one JSON object a line in its file. Nothing here knows a model's special tokens: every text
goes through the tokenizer's own chat template.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from spark_ft.methods.logprobs import chunked_logps, token_logps
from spark_ft.methods.packing import pack
from spark_ft.models import PACKED

if TYPE_CHECKING:  # importing transformers takes seconds, and reading records needs none of it
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that transformers' and torch's cross-entropy leave out
ROLES = ("system", "user", "assistant", "tool")


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


def _messages(value: Any) -> str | None:
    if not isinstance(value, list):
        return f'must be a list of messages, not {_type_name(value)}; write [{{"role": …, "content": …}}, …]'
    if not value:
        return "is empty; fill it in or drop the row"
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            return f"at [{i}] must be an object with role and content, not {_type_name(message)}"
        if message.get("role") not in ROLES:
            return f"at [{i}] has the role {json.dumps(message.get('role'))}; use one of {', '.join(ROLES)}"
        if complaint := _text(message["content"]) if "content" in message else "is missing; fill it in or drop the row":
            return f'at [{i}]: "content" {complaint}'
    return None


KINDS: dict[str, dict[str, Callable[[Any], str | None]]] = {
    "sft": {"prompt": _text, "completion": _text},
    "preference": {"prompt": _text, "chosen": _text, "rejected": _text},
    "feedback": {"prompt": _text, "completion": _text, "label": _boolean},
    "chat": {"messages": _messages},
}


def iter_records(path: str | Path, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file one by one, each checked; the file is never in memory as a whole.

    Args:
        path: UTF-8 JSONL file, one object a line. Blank lines are skipped, fields beyond the kind's own are kept.
        kind: "sft" (prompt, completion), "preference" (prompt, chosen, rejected),
            "feedback" (prompt, completion, label) or "chat" (messages: role, content).

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


def _checked_lines(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            empty = False
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: malformed JSON at column {error.colno} ({error.msg}); "
                    "a JSONL file has one whole JSON object on each line"
                ) from error
            if complaint := _complaint(record, kind):
                raise ValueError(f"{path}:{number}: {complaint}")
            yield record
    if empty:
        raise ValueError(f"{path}: an empty data set; it needs at least one row of {', '.join(KINDS[kind])}")


def _complaint(record: Any, kind: str) -> str | None:
    """What is wrong with a record and how to mend it, or None."""
    if not isinstance(record, dict):
        return f'a row must be a JSON object, not {_type_name(record)}; write {{"{next(iter(KINDS[kind]))}": …}}'
    for field, check in KINDS[kind].items():
        if field not in record:
            return f'"{field}" is missing; a row of kind "{kind}" has {", ".join(KINDS[kind])}'
        if complaint := check(record[field]):
            return f'"{field}" {complaint}'
    if kind == "preference" and record["chosen"] == record["rejected"]:
        return '"chosen" equals "rejected"; a pair teaches nothing if both are the same, so change one or drop the row'
    return None


def _type_name(value: Any) -> str:
    names = {str: "a text", bool: "true or false", type(None): "null", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def render(record: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Token ids of what the model is given and of what it should answer, by the tokenizer's own chat template.

    prompt ids + completion ids = the whole conversation, up to and including the answer's end-of-turn token; what the
    template writes after that (often a newline) is cut off, since generation stops there.

    Args:
        record: an "sft" or "feedback" row (prompt, completion), or a "chat" whose last message is the assistant's:
            that message is the completion, all before it the prompt.
        tokenizer: one with a chat template; its `eos_token` must end the assistant's turn.

    Raises:
        ValueError: a field is missing, empty or of the wrong type; the chat does not end with the assistant; the
            template does not keep the prompt's tokens as a prefix, or does not end the turn.
    """
    if complaint := _complaint(record, "chat" if "messages" in record else "sft"):
        raise ValueError(complaint)
    if "messages" in record:
        messages = record["messages"]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError('"messages" must end with an answer by the assistant; add one or drop the row')
    else:
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
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


def collate_sft(
    records: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int = 1024
) -> dict[str, Int[Tensor, "rows length"]]:
    """One right-padded batch for supervised fine-tuning; only completion tokens carry a label.

    labels[b, t] = input_ids[b, t] where t is in b's completion (its end-of-turn token too), −100 elsewhere. They are
    not shifted: a model that is given `labels` shifts them itself.

    Args:
        records: B rows that `render` takes.
        max_length: rows with more tokens lose prompt tokens from the start, never any of the completion.

    Returns:
        input_ids, attention_mask and labels, each int64 of shape (B, L), L the longest row's length.

    Raises:
        ValueError: no rows, or a completion that does not fit max_length behind one token of its prompt.
    """
    return _pad(_encode(records, tokenizer, max_length), tokenizer)


def sft_batches(
    records: Sequence[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    seed: int = 0,
    max_length: int = 1024,
) -> Callable[[int], dict[str, Int[Tensor, "rows length"]]]:
    """The batch of optimizer step t, as a pure function of (seed, t): a resumed run asks for the step it stopped at.

    The rows form one endless stream: epoch after epoch, each a seeded permutation of all N rows. Step t takes rows
    t·B … t·B + B − 1 of the stream, so each row comes exactly once an epoch, nothing is dropped, and a batch at the end
    of an epoch is filled from the start of the next.

    Args:
        records: N rows; all are tokenized here, once, so that a bad one is met before training starts.
        batch_size: B, rows an optimizer step.
        seed: another seed gives another order.
        max_length: as in `collate_sft`, which also names the tensors returned and the errors.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a step needs at least one row")
    rows = _encode(records, tokenizer, max_length)

    @lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> list[int]:
        order = list(range(len(rows)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        return order

    def batch(step: int) -> dict[str, Int[Tensor, "rows length"]]:
        places = (divmod(i, len(rows)) for i in range(step * batch_size, (step + 1) * batch_size))
        return _pad([rows[epoch_order(epoch)[i]] for epoch, i in places], tokenizer)

    return batch


def _encode(
    records: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion ids of each row, the prompt cut from its start where the row is too long."""
    if not len(records):
        raise ValueError("an empty data set: no rows to train on; check the file or the filter before this")
    rows = []
    for index, record in enumerate(records):
        try:
            prompt, completion = render(record, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        room = max_length - len(completion)
        if room < 1:  # the first completion token is predicted from the token before it
            raise ValueError(
                f"row {index}: a completion cut to nothing by truncation: its {len(completion)} tokens and one "
                f"of the prompt do not fit max_length={max_length}; "
                f"raise it to {len(completion) + 1} or more, or shorten the completion"
            )
        rows.append((prompt[-room:], completion))
    return rows


def _pad(
    rows: list[tuple[list[int], list[int]]], tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Int[Tensor, "rows length"]]:
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    # Padding is known by its place, never by its id: here pad and eos are the same token, and eos must be learned.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = {
        "input_ids": torch.full((len(rows), length), pad),
        "attention_mask": torch.zeros((len(rows), length), dtype=torch.long),
        "labels": torch.full((len(rows), length), IGNORE),
    }
    for row, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        batch["input_ids"][row, :end] = torch.tensor(prompt + completion)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, start:end] = torch.tensor(completion)
    return batch


def completion_logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p of every completion token (N,) fp32, and the batch row each belongs to (N,); differentiable.

    Only the positions that predict a completion token reach the output head, and where the model takes packed sequences
    (`use_packed_attention`) the padding is not computed at all.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: input_ids, attention_mask and labels, each (B, L), as `collate_sft` makes them.
    """
    labels, mask = batch["labels"], batch["attention_mask"]
    predicts = F.pad(labels[:, 1:] != IGNORE, (0, 1))  # (B, L): the next token is a completion token
    backbone = model.base_model
    if model.config._attn_implementation == PACKED:
        ids, positions, lengths = pack(batch["input_ids"], mask)
        packed = backbone(ids, position_ids=positions, lengths=lengths, use_cache=False).last_hidden_state[0]
        hidden = packed[predicts[mask.bool()]]
    else:
        hidden = backbone(batch["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state[predicts]
    return _head_logps(model, hidden, labels.roll(-1, 1)[predicts]), predicts.nonzero()[:, 0]


def sequence_logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each row's completion (B,) fp32, and its number of tokens (B,) int64."""
    logps, rows = completion_logps(model, batch)
    zeros = logps.new_zeros(len(batch["labels"]))
    return zeros.index_add(0, rows, logps), rows.bincount(minlength=len(zeros))


def _head_logps(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """`token_logps` through the model's own head, whatever it does to the logits after the matrix product."""
    head, config = model.get_output_embeddings(), model.config
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if type(head) is nn.Linear and head.bias is None and scale == 1.0 and not cap:
        return token_logps(hidden, head.weight, targets)

    def logits(rows: Tensor) -> Tensor:
        scaled = head(rows) * scale
        return torch.tanh(scaled / cap) * cap if cap else scaled

    return chunked_logps(hidden, logits, targets)
