"""Preference pairs from the model's own answers: sample, judge, pair a good one with a bad one, balance the lengths."""

import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch
from torch import nn

from spark_ft.data import padded
from spark_ft.evaluation import Estimate, wilson_interval

Record = dict[str, Any]
Length = Callable[[str], int]


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
            encoded = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
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


def judged_pairs(prompts: Sequence[str], answers: Sequence[Sequence[str]], judge: Callable[[str], bool]) -> list[Record]:
    """Every pair of a good and a bad answer to the same prompt; a prompt whose answers are all good or all bad gives none.

    Args:
        prompts: P of them.
        answers: for each prompt its answers, as `sample` draws them; empty ones and repeats are left out.
        judge: whether an answer is good.

    Raises:
        ValueError: the numbers of prompts and of lists of answers differ.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(answers)} lists of answers for {len(prompts)} prompts; there must be one for each")
    pairs = []
    for prompt, drawn in zip(prompts, answers, strict=True):
        verdicts = {text: judge(text) for text in dict.fromkeys(drawn) if text.strip()}
        good, bad = ([text for text, verdict in verdicts.items() if verdict is wanted] for wanted in (True, False))
        pairs += [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen in good for rejected in bad]
    return pairs


def balance_lengths(pairs: Sequence[Record], length: Length = len, tolerance: float = 0.05) -> list[Record]:
    """At most one pair a prompt, so chosen that length does not tell the better answer: else that is what would be learned.

    Of each prompt's pairs the one nearest to equal lengths is taken. Then as many with the longer answer chosen are kept as
    with the shorter, and the most unequal go until |Σ len(chosen) / Σ len(rejected) − 1| ≤ tolerance. Pairs of equal length
    all stay.

    Args:
        length: of a text; characters by default, or `lambda text: len(tokenizer(text).input_ids)`.
        tolerance: how far the ratio of mean lengths may be from 1.
    """

    def gap(pair: Record) -> int:
        return length(pair["chosen"]) - length(pair["rejected"])

    nearest: dict[str, Record] = {}
    for pair in pairs:
        if pair["prompt"] not in nearest or abs(gap(pair)) < abs(gap(nearest[pair["prompt"]])):
            nearest[pair["prompt"]] = pair
    ordered = sorted(nearest.values(), key=lambda pair: abs(gap(pair)))
    longer, shorter = ([pair for pair in ordered if sign * gap(pair) > 0] for sign in (1, -1))
    count = min(len(longer), len(shorter))
    longer, shorter = longer[:count], shorter[:count]
    kept = [pair for pair in ordered if gap(pair) == 0]
    while longer and abs(length_ratio(kept + longer + shorter, length) - 1) > tolerance:
        over = sum(map(gap, longer + shorter)) > 0
        (longer if over else shorter).pop()  # the most unequal of the heavier side,
        (shorter if over else longer).pop(0)  # and the least unequal of the other: the numbers stay equal
    chosen = {id(pair) for pair in kept + longer + shorter}
    return [pair for pair in pairs if id(pair) in chosen]


def length_ratio(pairs: Sequence[Record], length: Length = len) -> float:
    """Mean length of the chosen answers over that of the rejected ones; 1 is balanced."""
    if not pairs:
        return math.nan
    return mean(length(pair["chosen"]) for pair in pairs) / mean(length(pair["rejected"]) for pair in pairs)


def length_baseline(pairs: Sequence[Record], length: Length = len) -> Estimate:
    """How often the longer answer is the chosen one, with its interval; pairs of equal length tell nothing and are left out.

    An interval that contains one half says that neither "take the longer" nor "take the shorter" finds the chosen answer.

    Raises:
        ValueError: no pair has answers of different length.
    """
    gaps = [length(pair["chosen"]) - length(pair["rejected"]) for pair in pairs]
    if not any(gaps):
        raise ValueError("no pair has answers of different lengths; there is nothing that length could tell")
    return wilson_interval(sum(gap > 0 for gap in gaps), sum(gap != 0 for gap in gaps))
