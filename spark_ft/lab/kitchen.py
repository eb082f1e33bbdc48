"""The kitchen-ticket fine-tune that several labs share: its data, its run, its score and a cached adapter."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from spark_ft.adapters import AdapterConfig, add_adapters, save_adapters
from spark_ft.data.batches import sft_batches
from spark_ft.data.records import read_records
from spark_ft.evaluation import exact_match, generate
from spark_ft.files import CACHE, ROOT, sha256
from spark_ft.models import load_model, profile
from spark_ft.scoring import sft_loss
from spark_ft.stats import Estimate, wilson_interval
from spark_ft.training import History, TrainConfig, train

TICKETS = ROOT / "data" / "kitchen_tickets"
ADAPTER = AdapterConfig(rank=16, alpha=32.0)


def tickets(split: str) -> list[dict]:
    """The rows of kitchen_tickets' "train", "validation" or "test" split."""
    return read_records(TICKETS / f"{split}.jsonl", "sft")


def with_shuffled_answers(records: list[dict], seed: int = 0) -> list[dict]:
    """The same notes and tickets, but each ticket under another note: a control that must teach nothing."""
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    moved = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: every ticket moves
    return [{**row, "completion": records[moved[i]]["completion"]} for i, row in enumerate(records)]


def run_config(seed: int = 0) -> TrainConfig:
    """The profile's training run: its steps and rate, warm-up over a tenth of the steps, then half a cosine.

    β₂ is 0.99, not AdamW's usual 0.999, which averages over a thousand steps: there are only a hundred.
    """
    here = profile()
    return TrainConfig(
        here.steps,
        here.learning_rate,
        warmup_steps=here.steps // 10,
        betas=(0.9, 0.99),
        gradient_accumulation_steps=here.gradient_accumulation_steps,
        seed=seed,
    )


def fine_tune(model: nn.Module, tokenizer, records: list[dict], seed: int = 0) -> History:
    """Train the model's adapters on `records`; the seed orders the rows and seeds torch's generator."""
    return train(model, ticket_batches(records, tokenizer, seed), sft_loss, run_config(seed))


def ticket_batches(records: list[dict], tokenizer, seed: int = 0) -> Callable[[int], dict[str, torch.Tensor]]:
    """The batch of each step, of the profile's size."""
    here = profile()
    return sft_batches(records, tokenizer, here.batch_size, seed, here.max_length)


def score(model: nn.Module, tokenizer, rows: list[dict]) -> tuple[Estimate, list[str]]:
    """The share of tickets that are exactly right, with its Wilson interval, and the answers."""
    answers = generate(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=64, batch_size=50)
    right = exact_match(answers, [row["completion"] for row in rows])
    return wilson_interval(sum(right), len(right)), answers


def adapter_folder(seed: int = 0) -> Path:
    """Where `kitchen_adapter` keeps an adapter; the name holds a hash of all that the adapter depends on."""
    config = run_config(seed)
    depends = {
        "model": os.environ.get("SPARK_FT_MODEL"),
        "profile": str(profile()),
        "adapter": asdict(ADAPTER),
        "run": {**asdict(config), "schedule": config.schedule.__name__},  # a function's repr is its address
        "data": sha256(TICKETS / "train.jsonl"),
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return CACHE / "adapters" / f"kitchen-{digest[:16]}"


def kitchen_adapter(seed: int = 0) -> Path:
    """The folder of a tuned kitchen adapter in PEFT's format; from the cache, or trained now.

    Only one process trains it; another that asks meanwhile waits for it.
    """
    folder = adapter_folder(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "adapter_config.json").is_file():  # written last: where it is, all is
            print(f"training the kitchen adapter once ({profile().steps} steps) …", flush=True)
            model, tokenizer = load_model()
            torch.manual_seed(seed)
            add_adapters(model, ADAPTER)
            fine_tune(model, tokenizer, tickets("train"), seed)
            save_adapters(model, folder)
    return folder


def short_run(folder: str | Path) -> dict[str, torch.Tensor]:
    """Eight steps of two rows with dropout, a checkpoint every two steps: small enough to kill and resume.

    Returns the trained parameters by name.
    """
    model, tokenizer = load_model()
    torch.manual_seed(0)
    add_adapters(model, AdapterConfig(rank=4, dropout=0.1))
    config = replace(
        run_config(), steps=8, warmup_steps=2, checkpoint_dir=folder, checkpoint_every=2, progress=False
    )
    train(model, sft_batches(tickets("train")[:16], tokenizer, batch_size=2), sft_loss, config)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
