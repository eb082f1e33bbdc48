"""What labs 3.1.7 to 3.1.9 share: the pairs, the start and reference, a run, and its answers judged."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch
from torch import nn

from spark_ft.adapters import (
    adapted_layers,
    adapters_disabled,
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from spark_ft.data.batches import collate_sft, preference_batches
from spark_ft.data.chat import IGNORE
from spark_ft.data.judge import is_metric
from spark_ft.data.records import read_records
from spark_ft.embedded import EMBEDDED
from spark_ft.evaluation import answers_and_ends
from spark_ft.files import CACHE, ROOT, sha256
from spark_ft.lab.experiments.common import tune
from spark_ft.lab.kitchen import ADAPTER
from spark_ft.models import load_model, load_tokenizer
from spark_ft.scoring import completion_hidden, evaluating, head_logits, prepare
from spark_ft.stats import Estimate, wilson_interval
from spark_ft.training import History, Loss, TrainConfig, cosine, train

PAIRS = tuple(f"data/kitchen_preferences/{split}.jsonl" for split in ("train", "test"))
START = {"steps": 16, "learning_rate": 1e-3, "batch_size": 8, "warmup_steps": 4}
# One start for all seeds, or their scores before would be most of what differs between them: 34 of 50 for
# seed 0. This one answers 13 of 40 validation questions in metric units, which leaves room to learn.
START_SEED = 100
RUN = {"steps": 16, "learning_rate": 1.5e-4, "batch_size": 4, "warmup_steps": 4}
VALIDATION_CORES = 20  # of the 100 in train.jsonl: nothing is trained on them, and settings are tuned on them
MAX_NEW_TOKENS = 64
# Nats per token. Below lie 1 of 80 validation answers of sound runs (24 steps at 1.5e-4, 3e-4), and 41 of 50
# test answers of the run that fools the judge (1e-3): "Cook them at 2000 °C for 2000 ms".
SOUND = -1.6


def pairs(split: str) -> list[dict]:
    """The rows of "train" (80 cores), "validation" (20 other cores of train.jsonl) or "test" (50 cores).

    A core is one thing to know in a kitchen; no two splits share one.
    """
    if split == "test":
        return read_records(ROOT / PAIRS[1], "preference")
    if split not in ("train", "validation"):
        raise ValueError(f'no split is called "{split}"; take train, validation or test')
    rows = read_records(ROOT / PAIRS[0], "preference")
    held = random.Random(0).sample(sorted({row["core"] for row in rows}), VALIDATION_CORES)
    return [row for row in rows if (row["core"] in held) == (split == "validation")]


def questions(split: str) -> list[str]:
    """One question of each core, the first: two questions about one thing would not be independent."""
    first = {row["core"]: row["prompt"] for row in reversed(pairs(split))}
    return [first[core] for core in sorted(first)]


def with_shuffled_labels(rows: Sequence[dict], seed: int) -> list[dict]:
    """The pairs, chosen and rejected exchanged in a random half: a control that must teach nothing."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    exchanged = set(order[: len(rows) // 2])
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i in exchanged else row
        for i, row in enumerate(rows)
    ]


def either_answer(rows: Sequence[dict], seed: int) -> list[dict]:
    """Each question with one of its two answers, drawn at random: the style, and no preference."""
    rng = random.Random(seed)
    return [{"prompt": row["prompt"], "completion": row[rng.choice(("chosen", "rejected"))]} for row in rows]


def sft_start(seed: int = START_SEED) -> tuple[nn.Module, Any]:
    """The embedded model after a short SFT on either answer, merged: where a run starts, and its reference.

    Without it the model rarely gives a quantity at all, and pairs that differ in units cannot teach that.
    The adapter lies in the cache under a hash of all that it depends on; it is trained where it is missing.
    """
    depends = {"start": START, "seed": seed, "data": sha256(ROOT / PAIRS[0]), "adapter": str(ADAPTER)}
    depends["cores"] = VALIDATION_CORES
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    folder = CACHE / "adapters" / f"preferences-start-{digest[:16]}"
    if not (folder / "adapter_config.json").is_file():  # written last: where it is, all is
        print(f"training the SFT start of seed {seed} once ({START['steps']} steps) …", flush=True)
        save_adapters(tune(either_answer(pairs("train"), seed), seed, **START)[0], folder)
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
    return merge_adapters(load_adapters(model, folder)), tokenizer


def prefer(
    rows: Sequence[dict],
    seed: int,
    loss: Loss,
    *,
    steps: int = RUN["steps"],
    learning_rate: float = RUN["learning_rate"],
    batch_size: int = RUN["batch_size"],
    warmup_steps: int = RUN["warmup_steps"],
    model: nn.Module | None = None,
    batches: Callable = preference_batches,
    first: int | None = None,
) -> tuple[nn.Module, History]:
    """Put adapters on a model and train them on pairs or thumbs; with them off it is the reference.

    Args:
        rows: preference rows, or feedback rows with `batches=feedback_batches`.
        seed: draws the adapters' start and the order of the rows.
        loss: for `train`: preference_loss(dpo_loss).
        model: a model without adapters; default `sft_start()`.
        first: stop after this many steps of the run; its rates are the whole run's.
    """
    start, tokenizer = (model, load_tokenizer(EMBEDDED)) if model is not None else sft_start()
    torch.manual_seed(seed)
    add_adapters(start, ADAPTER)
    taken = first or steps
    part = 1.0 if taken == steps else (taken - warmup_steps) / (steps - warmup_steps)
    config = TrainConfig(
        taken,
        learning_rate,
        warmup_steps=warmup_steps,
        schedule=lambda progress: cosine(part * progress),
        seed=seed,
        progress=False,
    )
    return start, train(start, batches(rows, tokenizer, batch_size, seed), loss, config)


# ── what a run's model writes, and how it is judged ──────────────────────────────────────────────────────


def judged(model: nn.Module, tokenizer, asked: Sequence[str]) -> dict[str, Any]:
    """Let a model answer greedily, and say all that keeps the judge honest; its reference is adapters off.

    Returns, ready for JSON:
        "metric": answers that the judge passes, of "asked": `score` makes a share with its interval of both
        "looping": answers in which five words in a row stand twice
        "cut": answers that did not end within `MAX_NEW_TOKENS`; "tokens": mean length of those that did
        "logp": mean log-probability per token under the reference, averaged over the answers
        "kl": nats per answer that the model has moved away from the reference: at each token of its answer
            KL(model ‖ reference) over the whole vocabulary, summed; "kl per token" is the same per token
        "answers": the texts; "logps": the log-probability per token of each, None where it is empty;
        "kls": the nats of each
    The guard, which gibberish fails, reads "logps": `score(figures, "sound")`.
    """
    layers = adapted_layers(model).values()
    for layer in layers:  # merged, a token takes a third less time; the answers are the same
        layer.merge()
    try:
        written = answers_and_ends(model, tokenizer, asked, MAX_NEW_TOKENS)
    finally:
        for layer in layers:
            layer.unmerge()
    answers, ended = zip(*written, strict=True)
    logps, drifts, counts = beside_reference(model, tokenizer, asked, answers, ended)
    lengths = [count - 1 for count, end in zip(counts, ended, strict=True) if end]  # the end is no word
    return {
        "asked": len(asked),
        "metric": sum(map(is_metric, answers)),
        "looping": sum(map(loops, answers)),
        "cut": len(ended) - sum(ended),
        "tokens": mean(lengths) if lengths else None,
        "logp": mean(logp for logp in logps if logp > -math.inf),
        "kl": mean(drifts),
        "kl per token": sum(drifts) / sum(counts),
        "answers": list(answers),
        "logps": [round(logp, 3) if logp > -math.inf else None for logp in logps],
        "kls": [round(drift, 3) for drift in drifts],
    }


def score(figures: dict[str, Any], what: str = "metric") -> Estimate:
    """The share of a run's answers that are metric, sound, looping or cut, with Wilson's 95% interval.

    Sound is an answer that passes the guard: the reference gives it at least `SOUND` per token, on average.
    Gibberish full of grams passes the judge, and fails here.
    """
    count = figures[what] if what != "sound" else sum(x is not None and x >= SOUND for x in figures["logps"])
    return wilson_interval(count, figures["asked"])


def loops(answer: str) -> bool:
    """Whether five words in a row stand in it twice; no answer of kitchen_preferences does that."""
    words = answer.split()
    runs = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
    return len(set(runs)) < len(runs)


@torch.no_grad()
def beside_reference(
    model: nn.Module,
    tokenizer,
    asked: Sequence[str],
    answers: Sequence[str],
    ended: Sequence[bool],
    batch_size: int = 10,
) -> tuple[list[float], list[float], list[int]]:
    """Of each answer: log-probability per token under the reference, Σ KL(model ‖ reference), tokens.

    The end of an answer counts as a token where the model wrote it. An empty answer has no tokens and the
    log-probability −inf.
    """
    adapted = bool(adapted_layers(model))
    logps, drifts, counts = ([empty] * len(answers) for empty in (-math.inf, 0.0, 0))
    told = [i for i, answer in enumerate(answers) if answer.strip()]
    with evaluating(model):
        for start in range(0, len(told), batch_size):
            rows = told[start : start + batch_size]
            texts = [{"prompt": asked[i], "completion": answers[i]} for i in rows]
            batch = {name: x.to(model.device) for name, x in collate_sft(texts, tokenizer).items()}
            for place, i in enumerate(rows):
                if not ended[i]:
                    last = (batch["labels"][place] != IGNORE).nonzero()[-1]
                    batch["labels"][place, last] = IGNORE
            batch = prepare(model, batch)
            hidden, targets, _ = completion_hidden(model, batch)
            policy = head_logits(model)(hidden).log_softmax(-1)
            kept = policy
            if adapted:
                with adapters_disabled(model):
                    hidden, _, _ = completion_hidden(model, batch)
                kept = head_logits(model)(hidden).log_softmax(-1)
            drift = (policy.exp() * (policy - kept)).sum(-1)
            of_target = kept.gather(1, targets[:, None])[:, 0]
            parts = (x.split(batch.counts.tolist()) for x in (of_target, drift))
            for i, logp, kl in zip(rows, *parts, strict=True):
                logps[i], drifts[i], counts[i] = logp.mean().item(), kl.sum().item(), len(kl)
    return logps, drifts, counts
