"""Held-out measures: exact match and field F1 of generated tickets, perplexity, and the intervals that belong to them."""

import json
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from spark_ft.data.batches import collate_sft, padded
from spark_ft.data.chat import IGNORE
from spark_ft.scoring import completion_logps


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer, prompts: Sequence[str], max_new_tokens: int = 128, batch_size: int = 32
) -> list[str]:
    """The model's greedy answer to each prompt, through its own chat template; in batches of similar length.

    Args:
        prompts: the user's turns.
        max_new_tokens: where an answer is cut off if it has not ended by itself.
        batch_size: prompts at a time; more is faster and takes more memory.
    """
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers = [""] * len(prompts)
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = padded([encoded[i] for i in rows], tokenizer.pad_token_id, left=True)
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
    model.train(training)
    return answers


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
    """Whether greedy generation would write each record's completion token for token, found without generating anything.

    It would just where every completion token is the likeliest one after the true tokens before it: one forward pass in
    place of one for each token.
    """
    training = model.training
    model.eval()
    records, matches = list(records), []
    for start in range(0, len(records), batch_size):
        batch = collate_sft(records[start : start + batch_size], tokenizer, max_length)
        predicts = F.pad(batch["labels"][:, 1:] != IGNORE, (0, 1))
        hidden = model.base_model(
            batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            use_cache=False,
        ).last_hidden_state[predicts.to(model.device)]
        likeliest = model.get_output_embeddings()(hidden).argmax(-1).cpu()
        hits = likeliest == batch["labels"].roll(-1, 1)[predicts]
        matches += [bool(part.all()) for part in hits.split(predicts.sum(1).tolist())]
    model.train(training)
    return matches


def field_f1(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F1 of each field over all tickets, and of all fields together under "all".

        F1 = 2 · correct / (predicted + expected),

    counted over (field, value) pairs of the flattened JSON: a list's elements count each, in any order; an output that is no
    JSON object predicts nothing.

    Raises:
        ValueError: the two have different lengths, or a reference is no JSON object.
    """
    _same_length(outputs, references)
    correct, sizes = Counter(), Counter()
    for i, (out, ref) in enumerate(zip(outputs, references, strict=True)):
        expected = _parsed(ref)
        if not isinstance(expected, dict):
            raise ValueError(f"reference {i} is no JSON object: {ref[:60]!r}; field F1 needs tickets")
        expected, predicted = _fields(expected), _fields(_parsed(out))
        for counts, of in ((expected & predicted, correct), (expected, sizes), (predicted, sizes)):
            for (name, _), n in counts.items():
                of[name] += n
                of["all"] += n
    return {name: 2 * correct[name] / sizes[name] for name in sizes}


def _same_length(outputs, references) -> None:
    if len(outputs) != len(references):
        raise ValueError(
            f"{len(outputs)} outputs for {len(references)} references; there must be one for each"
        )


def _canonical(text: str) -> str:
    """One spelling for equal JSON; a comparison of Python's values would take true for 1."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return text.strip()


def _parsed(text: str):
    """The JSON value, or the stripped text where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def _fields(ticket) -> Counter:
    """(path, value) pairs; a list's elements share their list's path."""
    found = Counter()

    def walk(value, path):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, path)
        else:
            found[path, json.dumps(value)] += 1

    if isinstance(ticket, dict):
        walk(ticket, "")
    return found


@torch.no_grad()
def perplexity(
    model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 16, max_length: int = 1024
) -> float:
    """exp(−mean log p) over the completion tokens of `records`: 1 is certain, the vocabulary's size is clueless.

    Raises:
        ValueError: no records.
    """
    if not len(records):
        raise ValueError("an empty data set: no rows to measure on; check the file or the filter before this")
    training = model.training
    model.eval()
    records = list(records)  # a slice of a datasets.Dataset would be columns
    total, count = 0.0, 0
    for start in range(0, len(records), batch_size):
        batch = collate_sft(records[start : start + batch_size], tokenizer, max_length)
        logps, _ = completion_logps(model, {key: value.to(model.device) for key, value in batch.items()})
        total, count = total + logps.double().sum().item(), count + logps.numel()
    model.train(training)
    return math.exp(-total / count)


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    n: int = 4,
    temperature: float = 0.8,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seed: int = 0,
) -> list[list[str]]:
    """Up to n answers of the model to each prompt, drawn at a temperature; those that did not end by themselves are left out.

    Args:
        prompts: the user's turns.
        n: answers drawn for each prompt.
        temperature: more is more varied; 0.7 to 1.0 is usual.
        max_new_tokens: where an answer counts as not ended.
        batch_size: prompts at a time, n answers each.
        seed: the same seed draws the same answers on the same machine; torch's global generator is left as it was.
    """
    found: list[list[str]] = []
    training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
            encoded = [
                tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                for chat in chats
            ]
            ids, mask = padded(encoded, tokenizer.pad_token_id, left=True)
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                num_return_sequences=n,
                pad_token_id=tokenizer.pad_token_id,
            )[:, ids.shape[1] :]
            texts = tokenizer.batch_decode(out, skip_special_tokens=True)
            ended = (out == tokenizer.eos_token_id).any(1).tolist()
            for row in range(0, len(texts), n):
                found.append([texts[i] for i in range(row, row + n) if ended[i]])
    model.train(training)
    return found
