"""Held-out measures: generation, exact match, field F1 and perplexity."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from spark_ft.data.batches import collate_sft, padded
from spark_ft.scoring import Prepared, completion_hidden, completion_logps, evaluating, head_logits, prepare

Prompt = str | list[dict[str, str]]  # a user's turn, or a whole chat that ends with one


def generate(
    model: nn.Module, tokenizer, prompts: Sequence[Prompt], max_new_tokens: int = 128, batch_size: int = 32
) -> list[str]:
    """The model's greedy answer to each prompt, through the tokenizer's own chat template.

    Args:
        prompts: the user's turns, or whole chats, each a list of {role, content}.
        max_new_tokens: where an answer that has not ended by itself is cut off.
        batch_size: prompts at a time, of similar length; more is faster and takes more memory.

    Raises:
        ValueError: a tokenizer without a chat template or an end token; a single text as prompts.
    """
    answers = _answers(model, tokenizer, prompts, max_new_tokens, batch_size, do_sample=False)
    return [text for ((text, _),) in answers]


@torch.no_grad()
def answers_and_ends(
    model: nn.Module, tokenizer, prompts: Sequence[Prompt], max_new_tokens: int = 128
) -> list[tuple[str, bool]]:
    """`generate` for all prompts at once, and whether each answer ended by itself or was cut off.

    What all prompts begin with is computed once, and an answer that has ended leaves the batch: where most
    answers are short and some run on, that is half the work of `generate`.
    """
    from transformers import DynamicCache

    encoded, ends, pad = _encoded(tokenizer, prompts), *_ends(model, tokenizer)
    shared = min(map(len, encoded)) - 1
    while len({tuple(row[:shared]) for row in encoded}) > 1:
        shared -= 1
    ids, mask = (x.to(model.device) for x in padded([row[shared:] for row in encoded], pad, left=True))
    rows, cache = torch.arange(len(ids), device=model.device), DynamicCache(config=model.config)
    written, ended = [[] for _ in encoded], [False] * len(encoded)
    with evaluating(model):
        if shared:
            model(ids.new_tensor([encoded[0][:shared]]), past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(len(ids))
            mask = torch.cat([mask.new_ones(len(ids), shared), mask], 1)
        positions = (mask.cumsum(1) - 1)[:, shared:].clamp_min(0)
        for _ in range(max_new_tokens):
            given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            ids = model(ids, **given, logits_to_keep=1).logits[:, -1].argmax(-1)
            for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
                written[row].append(token)
                ended[row] = token in ends
            on = torch.tensor([not ended[row] for row in rows.tolist()], device=model.device)
            if not on.any():
                break
            if not on.all():
                cache.batch_select_indices(on.nonzero()[:, 0])
                rows, mask, ids = rows[on], mask[on], ids[on]
            ids, mask = ids[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            positions = mask.sum(1, keepdim=True) - 1
    return list(zip(tokenizer.batch_decode(written, skip_special_tokens=True), ended, strict=True))


def _ends(model: nn.Module, tokenizer) -> tuple[set[int], int]:
    """The tokens that end an answer, and the one that pads."""
    end, ends = tokenizer.eos_token_id, model.generation_config.eos_token_id
    more = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return {end, *more}, end if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def sample(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[Prompt],
    n: int = 4,
    temperature: float = 0.8,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seed: int = 0,
) -> list[list[str]]:
    """Up to n answers to each prompt, drawn at a temperature, without those that did not end by themselves.

    Args:
        prompts: as in `generate`.
        n: answers drawn per prompt.
        temperature: more is more varied; 0.7 to 1.0 is usual.
        max_new_tokens: an answer that needs more counts as not ended.
        batch_size: prompts at a time, n answers each.
        seed: the same seed draws the same answers on the same machine; torch's global generator is not moved.

    Raises:
        ValueError: as `generate`; n below 1, or a temperature that is not above 0.
    """
    if n < 1 or not temperature > 0:
        raise ValueError(f"n={n}, temperature={temperature}; draw one answer or more, at more than 0")
    drawing = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "num_return_sequences": n}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = _answers(model, tokenizer, prompts, max_new_tokens, batch_size, do_sample=True, **drawing)
    return [[text for text, ended in answers if ended] for answers in drawn]


def _answers(
    model, tokenizer, prompts, max_new_tokens, batch_size, **drawing
) -> list[list[tuple[str, bool]]]:
    """For each prompt its answers, and whether each ended by itself."""
    encoded = _encoded(tokenizer, prompts)
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ends = model.generation_config.eos_token_id  # one, several (Gemma's end of a turn among them), or None
    ends = torch.tensor([end, *(ends if isinstance(ends, list) else [] if ends is None else [ends])])
    # greedy answers do not depend on the order of the prompts, drawn ones do
    order = sorted(range(len(encoded)), key=lambda i: not drawing["do_sample"] and len(encoded[i]))
    answers: list[list[tuple[str, bool]]] = [[]] * len(encoded)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = (x.to(model.device) for x in padded([encoded[i] for i in rows], pad, left=True))
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **drawing
            )
            new = out[:, ids.shape[1] :].cpu()
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            ended = torch.isin(new, ends).any(1).tolist()
            n = len(texts) // len(rows)
            for place, row in enumerate(rows):
                mine = slice(n * place, n * (place + 1))
                answers[row] = list(zip(texts[mine], ended[mine], strict=True))
    return answers


def _encoded(tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    if isinstance(prompts, str):
        raise ValueError(f"prompts is one text, {prompts[:40]!r}; put it into a list")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat_template; take an instruct model's, or set one")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token to what ends an answer")
    chats = [[{"role": "user", "content": x}] if isinstance(x, str) else x for x in prompts]
    return [tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False) for x in chats]


def exact_match(outputs: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each output is its reference: equal as JSON where both are JSON, else equal as stripped text.

    Raises:
        ValueError: the two have different lengths.
    """
    _same_length(outputs, references)
    return [_canonical(out) == _canonical(ref) for out, ref in zip(outputs, references, strict=True)]


@torch.no_grad()
def greedy_match(
    model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 16, max_length: int = 1024
) -> list[bool]:
    """Whether greedy generation would write each record's completion token for token, without generating it.

    It would where every completion token is the likeliest one after the true tokens before it: one forward
    pass in place of one per token.
    """
    matches = []
    with evaluating(model):
        for batch in _prepared(model, tokenizer, records, batch_size, max_length):
            hidden, targets, _ = completion_hidden(model, batch)
            hits = head_logits(model)(hidden).argmax(-1) == targets
            matches += [bool(part.all()) for part in hits.split(batch.counts.tolist())]
    return matches


@torch.no_grad()
def perplexity(
    model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 16, max_length: int = 1024
) -> float:
    """exp(−mean log p) over the records' completion tokens: 1 is certain, the vocabulary's size is clueless.

    Raises:
        ValueError: no records.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for batch in _prepared(model, tokenizer, records, batch_size, max_length):
            logps, _ = completion_logps(model, batch)
            total, count = total + logps.double().sum().item(), count + logps.numel()
    return math.exp(-total / count)


def _prepared(model, tokenizer, records, batch_size: int, max_length: int) -> Iterator[Prepared]:
    records = list(records)  # a slice of a datasets.Dataset would be columns
    if not records:
        raise ValueError("an empty data set: no rows to measure on; check the file or the filter before this")
    for start in range(0, len(records), batch_size):
        batch = collate_sft(records[start : start + batch_size], tokenizer, max_length)
        yield prepare(model, {key: tensor.to(model.device) for key, tensor in batch.items()})


def field_f1(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F1 of each field over all tickets, and of all fields together under "all".

        F1 = 2 · correct / (predicted + expected),

    counted over (field, value) pairs of the flattened JSON: each element of a list counts, in any order; an
    output that is no JSON object predicts nothing.

    Raises:
        ValueError: the two have different lengths, or a reference is no JSON object.
    """
    _same_length(outputs, references)
    correct, sizes = Counter(), Counter()
    for i, (out, ref) in enumerate(zip(outputs, references, strict=True)):
        expected, predicted = _json(ref), _json(out)
        if not isinstance(expected, dict):
            raise ValueError(f"reference {i} is no JSON object: {ref[:60]!r}; field F1 needs tickets")
        expected, predicted = _fields(expected), _fields(predicted if isinstance(predicted, dict) else {})
        for counts, of in ((expected & predicted, correct), (expected, sizes), (predicted, sizes)):
            for (name, _), n in counts.items():
                of[name] += n
                of["all"] += n
    return {name: 2 * correct[name] / sizes[name] for name in sizes}


def _same_length(outputs, references) -> None:
    if len(outputs) != len(references):
        counts = f"{len(outputs)} outputs for {len(references)} references"
        raise ValueError(f"{counts}; there must be one for each")


def _json(text: str):
    """The JSON value, or an ellipsis where the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ...


def _canonical(text: str) -> str:
    """One spelling for equal JSON; a comparison of Python's values would take true for 1."""
    value = _json(text)
    return text.strip() if value is ... else json.dumps(value, sort_keys=True)


def _fields(value, path: str = "") -> Counter:
    """(path, value) pairs; a list's elements share their list's path."""
    if isinstance(value, dict):
        inner = [_fields(part, f"{path}.{key}" if path else key) for key, part in value.items()]
    elif isinstance(value, list):
        inner = [_fields(part, path) for part in value]
    else:
        return Counter([(path, json.dumps(value))])
    return sum(inner, Counter())
