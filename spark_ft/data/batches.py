"""From records to batches: chat templates, label masks, collators, and the log-probabilities of what is learned.

Nothing here knows a model's special tokens: every text goes through the tokenizer's own chat template.
"""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from spark_ft.data.chat import IGNORE, Marked, _render_answer, last_answer, render
from spark_ft.data.records import find_fault

if TYPE_CHECKING:  # importing transformers takes seconds, and reading records needs none of it
    from transformers import PreTrainedTokenizerBase


# ── what is learned ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
    return _stack(
        _each(records, lambda row: _answers_row(row, "preference", tokenizer, max_length)), tokenizer
    )


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
    return _stack_feedback(
        _each(records, lambda row: _answers_row(row, "feedback", tokenizer, max_length)), tokenizer
    )


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
    return {
        name: x.gather(1, order)
        for name, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }


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
        raise ValueError(
            "one thumb has no other to be mismatched with, and KTO's KL needs that; batch two rows or more"
        )
    batch = _stack(rows, tokenizer)
    batch["mismatched_ids"], batch["mismatched_mask"] = (
        batch[f"completion_{x}"].roll(1, 0) for x in ("ids", "mask")
    )
    return {**batch, "desirable": torch.tensor([row["desirable"] for row in rows])}


def _filler(tokenizer) -> int:
    # Padding is known by its place, never by its id: here pad and eos are the same token, and eos must be learned.
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
