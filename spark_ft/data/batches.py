"""From records to batches: chat templates, label masks, collators, and the log-probabilities of what is learned.

Nothing here knows a model's special tokens: every text goes through the tokenizer's own chat template.
"""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from spark_ft.methods.logprobs import chunked_logps, token_logps
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.neftune import draws_noise
from spark_ft.models import PACKED
from spark_ft.packing import Packed, pack
from spark_ft.records import check_records, find_fault, iter_records, read_records, write_records

__all__ = [
    "IGNORE",
    "all_answers",
    "check_records",
    "collate_feedback",
    "collate_preferences",
    "collate_sft",
    "completion_logps",
    "feedback_batches",
    "iter_records",
    "last_answer",
    "preference_batches",
    "read_records",
    "render",
    "sequence_logps",
    "sft_batches",
    "whole_conversation",
    "with_prompt",
    "write_records",
]

if TYPE_CHECKING:  # importing transformers takes seconds, and reading records needs none of it
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that transformers' and torch's cross-entropy leave out


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
    messages = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record[field]}]
    return _render(messages, ['"prompt"', f'"{field}"'], tokenizer)


def _render(messages: list[dict], fields: list[str], tokenizer) -> tuple[list[int], list[int]]:
    for message, field in zip(messages, fields, strict=True):
        for token in tokenizer.all_special_tokens:
            # the tokenizer cannot tell it from the template's own: the text would end its turn, or open another's
            if token in message["content"]:
                raise ValueError(f"{field} holds the control token {token!r}; take it out or write it otherwise")
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


# ── what is learned ──────────────────────────────────────────────────────────────────────────────────────────────────────

Marked = tuple[list[int], list[bool]]


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


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def collate_sft(
    records: Sequence[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int = 1024,
    learn: Callable[[dict[str, Any], "PreTrainedTokenizerBase"], Marked] = last_answer,
) -> dict[str, Int[Tensor, "rows length"]]:
    """One right-padded batch for supervised fine-tuning; only learned tokens carry a label.

    labels[b, t] = input_ids[b, t] where t is learned (by default b's completion, its end-of-turn token too), −100
    elsewhere. They are not shifted: a model that is given `labels` shifts them itself.

    Args:
        records: B rows that `render` takes, in a list or a `datasets.Dataset`.
        max_length: rows with more tokens lose the first of them, never any of the last answer.
        learn: which tokens: `last_answer`, `all_answers` or `whole_conversation`.

    Returns:
        input_ids, attention_mask and labels, each int64 of shape (B, L), L the longest row's length.

    Raises:
        ValueError: no rows, or a last answer that does not fit max_length behind one token of its prompt.
    """
    return _stack_sft(_each(records, lambda row: _sft_row(row, tokenizer, max_length, learn)), tokenizer)


def collate_preferences(
    records: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int = 1024
) -> dict[str, Int[Tensor, "rows ..."]]:
    """One batch of pairs, a row a pair; the prompt comes once. `with_prompt` makes a side of it what a model can be given.

    Args:
        records: B "preference" rows (prompt, chosen, rejected).
        max_length: prompts lose their start until they fit in front of the longer answer; answers are never cut.

    Returns:
        prompt_ids, prompt_mask (B, P) padded on the left; chosen_ids, chosen_mask (B, C) and rejected_ids, rejected_mask
        (B, R) padded on the right, each answer with its end-of-turn token; row (B,), the pair's index in `records`.

    Raises:
        ValueError: as `collate_sft`.
    """
    return _stack(_each(records, lambda row: _answers_row(row, "preference", tokenizer, max_length)), tokenizer)


def collate_feedback(
    records: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int = 1024
) -> dict[str, Tensor]:
    """One batch of thumbs, a row a thumb, with the mismatched pairs that KTO's KL estimate needs.

    Args:
        records: B "feedback" rows (prompt, completion, label).
        max_length: prompts lose their start until they fit in front of their completion; completions are never cut. A
            mismatched pair may be longer by as much as its completion is longer than the prompt's own.

    Returns:
        prompt_ids, prompt_mask (B, P) padded on the left; completion_ids, completion_mask (B, C) padded on the right;
        mismatched_ids, mismatched_mask (B, C), the completion of the row before (of the last row, for the first);
        desirable (B,) bool; row (B,), the thumb's index in `records`.

    Raises:
        ValueError: as `collate_sft`; or fewer than two rows.
    """
    return _stack_feedback(_each(records, lambda row: _answers_row(row, "feedback", tokenizer, max_length)), tokenizer)


def with_prompt(batch: dict[str, Tensor], side: str) -> dict[str, Int[Tensor, "rows length"]]:
    """Prompt and one answer as `sequence_logps` takes them: input_ids, attention_mask and labels (B, L), right-padded.

    Args:
        batch: of `collate_preferences` or `collate_feedback`.
        side: "chosen" or "rejected"; "completion" or "mismatched".
    """
    ids = torch.cat([batch["prompt_ids"], batch[f"{side}_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch[f"{side}_mask"]], 1)
    learned = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch[f"{side}_mask"]], 1)
    labels = torch.where(learned.bool(), ids, IGNORE)
    real_first = mask.argsort(dim=1, descending=True, stable=True)
    order = real_first[:, : int(mask.sum(1).max())]
    return {name: x.gather(1, order) for name, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def sft_batches(
    records: Sequence[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    seed: int = 0,
    max_length: int = 1024,
    learn: Callable[[dict[str, Any], "PreTrainedTokenizerBase"], Marked] = last_answer,
) -> Callable[[int], dict[str, Int[Tensor, "rows length"]]]:
    """The batch of optimizer step t, as a pure function of (seed, t): a resumed run asks for the step it stopped at.

    The rows form one endless stream: epoch after epoch, each a seeded permutation of all N rows. Step t takes rows
    t·B … t·B + B − 1 of the stream, so each row comes exactly once an epoch, nothing is dropped, and a batch at the end
    of an epoch is filled from the start of the next.

    Args:
        records: N rows; all are tokenized here, once, so that a bad one is met before training starts.
        batch_size: B, rows an optimizer step.
        seed: another seed gives another order.
        max_length, learn: as in `collate_sft`, which also names the tensors returned and the errors.
    """
    rows = _each(records, lambda row: _sft_row(row, tokenizer, max_length, learn))
    return _by_step(rows, lambda chosen: _stack_sft(chosen, tokenizer), batch_size, seed)


def preference_batches(
    records: Sequence[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    seed: int = 0,
    max_length: int = 1024,
) -> Callable[[int], dict[str, Tensor]]:
    """`sft_batches` for pairs: step t's batch as `collate_preferences` makes it, `row` telling which pairs they are."""
    rows = _each(records, lambda row: _answers_row(row, "preference", tokenizer, max_length))
    return _by_step(rows, lambda chosen: _stack(chosen, tokenizer), batch_size, seed)


def feedback_batches(
    records: Sequence[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    seed: int = 0,
    max_length: int = 1024,
) -> Callable[[int], dict[str, Tensor]]:
    """`sft_batches` for thumbs: step t's batch as `collate_feedback` makes it, `row` telling which thumbs they are."""
    rows = _each(records, lambda row: _answers_row(row, "feedback", tokenizer, max_length))
    return _by_step(rows, lambda chosen: _stack_feedback(chosen, tokenizer), batch_size, seed)


def _by_step(rows: list[Any], stack: Callable[[list[Any]], dict[str, Tensor]], batch_size: int, seed: int):
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a step needs at least one row")

    @lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> list[int]:
        order = list(range(len(rows)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        return order

    def batch(step: int) -> dict[str, Tensor]:
        places = (divmod(i, len(rows)) for i in range(step * batch_size, (step + 1) * batch_size))
        return stack([rows[epoch_order(epoch)[i]] for epoch, i in places])

    return batch


def _each(records: Sequence[dict[str, Any]], encode: Callable[[dict[str, Any]], Any]) -> list[Any]:
    if not len(records):
        raise ValueError("an empty data set: no rows to train on; check the file or the filter before this")
    rows = []
    for index, record in enumerate(records):
        try:
            row = encode(record)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        rows.append({"row": index, **row})
    return rows


def _sft_row(record, tokenizer, max_length: int, learn) -> dict[str, list]:
    ids, learned = learn(record, tokenizer)
    if len(ids) > max_length:
        _room(len(render(record, tokenizer)[1]), max_length)
    return {"ids": ids[-max_length:], "learned": learned[-max_length:]}


def _answers_row(record, kind: str, tokenizer, max_length: int) -> dict[str, Any]:
    if complaint := find_fault(record, kind):
        raise ValueError(complaint)
    row = {"desirable": record["label"]} if kind == "feedback" else {}
    for field in ("completion",) if kind == "feedback" else ("chosen", "rejected"):
        prompt, row[field] = _render_answer(record, field, tokenizer)
        row["prompt"] = row.get("prompt", prompt)[-_room(len(row[field]), max_length) :]
    return row


def _room(answer: int, max_length: int) -> int:
    if answer >= max_length:  # the first token of the answer is predicted from the token before it
        raise ValueError(
            f"a completion cut to nothing by truncation: its {answer} tokens and one of the prompt do not fit "
            f"max_length={max_length}; raise it to {answer + 1} or more, or shorten the completion"
        )
    return max_length - answer


def padded(rows: list[list[int]], filler: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token lists as one (rows, length) tensor filled up on the right, or left, and the mask (rows, length) of real tokens."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), filler), torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        places = slice(width - len(row), width) if left else slice(len(row))
        ids[i, places], mask[i, places] = torch.tensor(row), 1
    return ids, mask


def _stack_sft(rows: list[dict], tokenizer) -> dict[str, Tensor]:
    ids, mask = padded([row["ids"] for row in rows], _filler(tokenizer))
    learned, _ = padded([row["learned"] for row in rows], 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(learned.bool(), ids, IGNORE)}


def _stack(rows: list[dict], tokenizer) -> dict[str, Tensor]:
    batch = {"row": torch.tensor([row["row"] for row in rows])}
    for field in ("prompt", "chosen", "rejected", "completion"):
        if field in rows[0]:
            both = padded([row[field] for row in rows], _filler(tokenizer), left=field == "prompt")
            batch[f"{field}_ids"], batch[f"{field}_mask"] = both
    return batch


def _stack_feedback(rows: list[dict], tokenizer) -> dict[str, Tensor]:
    if len(rows) < 2:
        raise ValueError("one thumb has no other to be mismatched with, and KTO's KL needs that; batch two rows or more")
    batch = _stack(rows, tokenizer)
    batch["mismatched_ids"], batch["mismatched_mask"] = (batch[f"completion_{x}"].roll(1, 0) for x in ("ids", "mask"))
    return {**batch, "desirable": torch.tensor([row["desirable"] for row in rows])}


def _filler(tokenizer) -> int:
    # Padding is known by its place, never by its id: here pad and eos are the same token, and eos must be learned.
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def completion_logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p of every completion token (N,) fp32, and the batch row each belongs to (N,); differentiable.

    Only the positions that predict a completion token reach the output head, and where the model takes packed sequences
    (`use_packed_attention`) padding is not computed at all, and what all rows begin with is computed once.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: input_ids, attention_mask and labels, each (B, L), as `collate_sft` makes them.
    """
    labels, mask = batch["labels"], batch["attention_mask"]
    predicts = F.pad(labels[:, 1:] != IGNORE, (0, 1))  # (B, L): the next token is a completion token
    backbone = model.base_model
    if row := packed_row(model, batch):
        places = {"position_ids": row.positions, "lengths": row.lengths, "prefix": row.prefix}
        hidden = backbone(row.ids, **places, use_cache=False).last_hidden_state[0][row.places[predicts]]
    else:
        hidden = backbone(batch["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state[predicts]
    return _head_logps(model, hidden, labels.roll(-1, 1)[predicts]), predicts.nonzero()[:, 0]


def packed_row(model: nn.Module, batch: dict[str, Tensor]) -> Packed | None:
    """The batch as the one row that the model computes, or None where it takes padded batches only."""
    if model.config._attn_implementation != PACKED:
        return None
    return pack(batch["input_ids"], batch["attention_mask"], share_prefix=not _draws_random_numbers(model))


def _draws_random_numbers(model: nn.Module) -> bool:
    """Dropout or NEFTune is at work, so that equal tokens of two rows are not computed alike."""
    return draws_noise(model) or (
        model.training
        and any(
            module.dropout if isinstance(module, LoRALinear) else isinstance(module, nn.Dropout) and module.p
            for module in model.modules()
        )
    )


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
