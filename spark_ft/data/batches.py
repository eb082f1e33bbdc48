"""From records to batches: label masks, truncation, padding, and the batch of each optimizer step."""

import random
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from spark_ft.data.chat import IGNORE, Marked, conversation, last_answer, render, render_turns, whole_text
from spark_ft.data.records import Record, find_fault

if TYPE_CHECKING:  # importing transformers takes seconds, and reading records needs none of it
    from transformers import PreTrainedTokenizerBase as Tokenizer

Learn = Callable[[Record, "Tokenizer"], Marked]
Batch = dict[str, Int[Tensor, "rows ..."]]


def collate_sft(
    records: Sequence[Record], tokenizer: "Tokenizer", max_length: int = 1024, learn: Learn = last_answer
) -> Batch:
    """One right-padded batch for supervised fine-tuning; only learned tokens carry a label.

    labels[b, t] = input_ids[b, t] where t is learned (by default b's completion, its end-of-turn token too),
    −100 elsewhere. They are not shifted: a model that is given `labels` shifts them itself.

    Args:
        records: B rows that `render` takes, in a list or a `datasets.Dataset`.
        max_length: longer rows lose tokens at the start of their prompt, never any of the last answer; a
            first token that begins every text (BOS) stays. A warning counts these rows, and those with a
            system turn.
        learn: which tokens: `last_answer`, `all_answers`, `whole_conversation`; `whole_text` of a "text" row.

    Returns:
        input_ids, attention_mask and labels, each int64 of shape (B, L), L the longest row's length.

    Raises:
        ValueError: with the row: as `render`; a last answer that does not fit max_length behind a token of
            its prompt.
    """
    return _stack_sft(_each(records, _sft_row, tokenizer, max_length, learn), tokenizer)


def collate_preferences(records: Sequence[Record], tokenizer: "Tokenizer", max_length: int = 1024) -> Batch:
    """One batch of "preference" rows; `with_prompt` makes what a model can be given of a side.

    Args:
        max_length: as in `collate_sft`; a prompt is cut to fit in front of the longer of its answers.

    Returns:
        prompt_ids, prompt_mask (B, P) padded on the left; chosen_ids, chosen_mask (B, C), rejected_ids,
        rejected_mask (B, R) padded on the right, each with its end-of-turn token; row (B,), the row's place
        in `records`.
    """
    return _stack(_each(records, _answers_row, tokenizer, max_length, "preference"), tokenizer)


def collate_feedback(records: Sequence[Record], tokenizer: "Tokenizer", max_length: int = 1024) -> Batch:
    """One batch of "feedback" rows, two or more, with the mismatched pairs that KTO's KL estimate needs.

    Args:
        max_length: as in `collate_sft`; a mismatched pair exceeds it where its completion is longer than the
            own.

    Returns:
        prompt_ids, prompt_mask (B, P) padded on the left; completion_ids, completion_mask (B, C) padded on
        the right; mismatched_ids, mismatched_mask (B, M), the completion of the nearest row before that has
        another prompt (before the first comes the last); desirable (B,) bool; row (B,), the row's place in
        `records`.
    """
    return _stack(_thumbs(records, tokenizer, max_length), tokenizer)


def with_prompt(batch: Batch, *sides: str) -> Batch:
    """Prompts and answers as `sequence_logps` takes them: input_ids, attention_mask, labels, right-padded.

    Args:
        batch: of `collate_preferences` or `collate_feedback`.
        sides: "chosen" and "rejected", or "completion" and "mismatched", or one of them: a row for each,
            example by example.
    """
    width = max(batch[f"{side}_ids"].shape[1] for side in sides)

    def rows(name: str, prompt: Tensor) -> Tensor:
        answers = (batch[f"{side}_{name}"] for side in sides)
        alike = [F.pad(torch.cat([prompt, x], 1), (0, width - x.shape[1])) for x in answers]
        return torch.stack(alike, 1).flatten(0, 1)

    ids, mask = rows("ids", batch["prompt_ids"]), rows("mask", batch["prompt_mask"])
    learned = rows("mask", torch.zeros_like(batch["prompt_mask"]))
    labels = torch.where(learned.bool(), ids, IGNORE)
    real_first = mask.argsort(dim=1, descending=True, stable=True)
    order = real_first[:, : int(mask.sum(1).max())]
    fields = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.gather(1, order) for name, tensor in fields.items()}


def sft_batches(
    records: Sequence[Record],
    tokenizer: "Tokenizer",
    batch_size: int,
    seed: int = 0,
    max_length: int = 1024,
    learn: Learn = last_answer,
) -> Callable[[int], Batch]:
    """The batch of step t, as a pure function of seed and t: a resumed run asks for the step it stopped at.

    The rows form one endless stream: epoch after epoch, each a seeded permutation of all N rows. Step t takes
    rows t·B … t·B + B − 1 of it, so each row comes exactly once per epoch and nothing is dropped.

    Args:
        records: N rows; all are tokenized here, once, so that a bad one is met before training starts.
        batch_size: B, rows per optimizer step.
        seed: another seed gives another order.
        max_length, learn: as in `collate_sft`, which also names the tensors returned and the errors.
    """
    rows = _each(records, _sft_row, tokenizer, max_length, learn)
    return _by_step(rows, lambda chosen: _stack_sft(chosen, tokenizer), batch_size, seed)


def preference_batches(
    records: Sequence[Record], tokenizer: "Tokenizer", batch_size: int, seed: int = 0, max_length: int = 1024
) -> Callable[[int], Batch]:
    """`sft_batches` of what `collate_preferences` makes; `row` tells which rows they are."""
    rows = _each(records, _answers_row, tokenizer, max_length, "preference")
    return _by_step(rows, lambda chosen: _stack(chosen, tokenizer), batch_size, seed)


def feedback_batches(
    records: Sequence[Record], tokenizer: "Tokenizer", batch_size: int, seed: int = 0, max_length: int = 1024
) -> Callable[[int], Batch]:
    """`sft_batches` of what `collate_feedback` makes of all records: each keeps its mismatched completion."""
    rows = _thumbs(records, tokenizer, max_length)
    return _by_step(rows, lambda chosen: _stack(chosen, tokenizer), batch_size, seed)


def _by_step(rows: list[dict], stack: Callable[[list[dict]], Batch], batch_size: int, seed: int):
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a step needs at least one row")

    @lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> list[int]:
        order = list(range(len(rows)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        return order

    def batch(step: int) -> Batch:
        places = (divmod(i, len(rows)) for i in range(step * batch_size, (step + 1) * batch_size))
        return stack([rows[epoch_order(epoch)[i]] for epoch, i in places])

    return batch


def _each(records, encode: Callable[..., dict], tokenizer, max_length: int, choice) -> list[dict]:
    if not len(records):
        raise ValueError("an empty data set: no rows to train on; check the file or the filter before this")
    rows, lost = [], []
    for index, record in enumerate(records):
        try:
            row = encode(record, tokenizer, max_length, choice)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        lost += row.pop("lost")
        rows.append({"row": index, **row})
    if lost:
        system = sum(chat.turns[0]["role"] == "system" for _, chat in lost)
        whole = max_length + max(over for over, _ in lost)
        told = (
            f"{len(lost)} of {len(rows)} rows lost the start of their prompt, {system} of them a system turn"
        )
        warnings.warn(f"{told}; raise max_length from {max_length} to {whole} to keep all", stacklevel=3)
    return rows


def _sft_row(record, tokenizer, max_length: int, learn: Learn) -> dict:
    ids, learned = learn(record, tokenizer)
    if (over := len(ids) - max_length) <= 0:
        return {"ids": ids, "learned": learned, "lost": []}
    if learn is whole_text:
        fault = f"a text of {len(ids)} tokens does not fit max_length={max_length}"
        raise ValueError(f"{fault}; split it, or raise max_length")
    prompt, answer = render(record, tokenizer)
    begin = _begin(prompt, _room(answer, max_length), tokenizer)
    ids, learned = (tokens[:begin] + tokens[begin + over :] for tokens in (ids, learned))
    if not any(learned):
        raise ValueError(f"nothing to learn is left by truncation to max_length={max_length}; raise it")
    return {"ids": ids, "learned": learned, "lost": [(over, conversation(record))]}


def _answers_row(record, tokenizer, max_length: int, kind: str) -> dict:
    if complaint := find_fault(record, kind):
        raise ValueError(complaint)
    fields = ("completion",) if kind == "feedback" else ("chosen", "rejected")
    chats = [conversation(record, field) for field in fields]
    prompts, answers = zip(*(render_turns(chat, tokenizer) for chat in chats), strict=True)
    room = min(_room(answer, max_length) for answer in answers)
    prompt, over = prompts[0], max(0, len(prompts[0]) - room)
    begin = _begin(prompt, room, tokenizer)
    row = {"prompt": prompt[:begin] + prompt[begin + over :], **dict(zip(fields, answers, strict=True))}
    if kind == "feedback":
        row["desirable"] = record["label"]
    return {**row, "lost": [(over, chats[0])] * (over > 0)}


def _room(answer: list[int], max_length: int) -> int:
    if len(answer) >= max_length:  # the first token of the answer is predicted from the token before it
        raise ValueError(
            f"a completion of {len(answer)} tokens and one of its prompt do not fit max_length={max_length}; "
            f"raise it to {len(answer) + 1} or more, or shorten the completion"
        )
    return max_length - len(answer)


def _begin(prompt: list[int], room: int, tokenizer) -> int:
    # 1 where the first token begins every text, which models lean on: a control token that does not come
    # again. The embedded model's bos_token opens every turn, and kept, it would open one without a role.
    return int(room > 1 and prompt[0] in tokenizer.all_special_ids and prompt[0] not in prompt[1:])


def padded(rows: list[list[int]], filler: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token lists as one (rows, length) tensor, padded on the right or left, and the mask of real tokens."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), filler), torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        places = slice(width - len(row), width) if left else slice(len(row))
        ids[i, places], mask[i, places] = torch.tensor(row), 1
    return ids, mask


def _stack_sft(rows: list[dict], tokenizer) -> Batch:
    ids, mask = padded([row["ids"] for row in rows], _filler(tokenizer))
    learned, _ = padded([row["learned"] for row in rows], 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(learned.bool(), ids, IGNORE)}


def _stack(rows: list[dict], tokenizer) -> Batch:
    batch = {"row": torch.tensor([row["row"] for row in rows])}
    for field in ("prompt", "chosen", "rejected", "completion", "mismatched"):
        if field in rows[0]:
            both = padded([row[field] for row in rows], _filler(tokenizer), left=field == "prompt")
            batch[f"{field}_ids"], batch[f"{field}_mask"] = both
    if "desirable" in rows[0]:
        batch["desirable"] = torch.tensor([row["desirable"] for row in rows])
    return batch


def _thumbs(records, tokenizer, max_length: int) -> list[dict]:
    """Feedback rows with their mismatched completions, so that these do not change from epoch to epoch."""
    rows = _each(records, _answers_row, tokenizer, max_length, "feedback")
    if len(rows) < 2:
        raise ValueError("one feedback row has no other to be mismatched with, as KTO's KL needs; give two")
    for i, row in enumerate(rows):  # an answer to the same question would be no mismatch
        others = (rows[i - n] for n in range(1, len(rows)) if rows[i - n]["prompt"] != row["prompt"])
        row["mismatched"] = next(others, rows[i - 1])["completion"]
    return rows


def _filler(tokenizer) -> int:
    # Padding is known by its place, never by its id: pad and eos may be one token, and eos must be learned.
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
