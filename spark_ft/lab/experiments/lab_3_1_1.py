"""Lab 3.1.1: LoRA of several ranks trained on kitchen tickets, on the same rows, for the same number of steps."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.data.batches import collate_sft, sft_batches
from spark_ft.data.chat import IGNORE
from spark_ft.data.records import read_records
from spark_ft.embedded import EMBEDDED
from spark_ft.files import ROOT
from spark_ft.lab.experiments.runner import experiment
from spark_ft.models import load_model
from spark_ft.scoring import packed_row, sft_loss
from spark_ft.training import History, TrainConfig, train

TRAIN, HELD_OUT = "data/kitchen_tickets/train.jsonl", "data/kitchen_tickets/validation.jsonl"
SETTINGS = {
    "ranks": [1, 4, 16, 64],
    "alpha / rank": 2,
    "targets": "all-linear",
    "steps": 20,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_steps": 3,
    "held-out tickets": 32,
}


@torch.no_grad()
def held_out(model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 16) -> dict[str, float]:
    """How well the model predicts unseen answers: loss per token, share of tokens right, share of tickets all right.

    A token is right when it is the most probable one after the true tokens before it. A ticket whose tokens are all right is
    one that greedy generation writes letter by letter, so the last figure is exact match, with nothing generated.
    """
    loss, right, whole = 0.0, [], []
    for start in range(0, len(records), batch_size):
        batch = collate_sft(records[start : start + batch_size], tokenizer)
        batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
        predicts = F.pad(batch["labels"][:, 1:] != IGNORE, (0, 1))
        if row := packed_row(model, batch):  # all rows in one, their common beginning computed once
            places = {"position_ids": row.positions, "lengths": row.lengths, "prefix": row.prefix}
            hidden = model.base_model(row.ids, **places, use_cache=False).last_hidden_state[0][
                row.places[predicts]
            ]
        else:
            hidden = model.base_model(
                batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state[predicts]
        logits = model.get_output_embeddings()(hidden).float()
        target = batch["labels"].roll(-1, 1)[predicts]
        loss += F.cross_entropy(logits, target, reduction="sum").item()
        hit = logits.argmax(-1) == target
        right += hit.tolist()
        whole += [part.all().item() for part in hit.split(predicts.sum(1).tolist())]
    return {
        "held-out loss": loss / len(right),
        "token accuracy": sum(right) / len(right),
        "exact match": sum(whole) / len(whole),
    }


def tune(rank: int, seed: int, steps: int = SETTINGS["steps"]) -> tuple[nn.Module, History]:
    """The embedded model with LoRA of one rank, trained on kitchen tickets; the seed draws A and the order of the rows."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
    torch.manual_seed(seed)
    add_adapters(model, AdapterConfig(rank=rank, alpha=SETTINGS["alpha / rank"] * rank))
    batches = sft_batches(read_records(ROOT / TRAIN, "sft"), tokenizer, SETTINGS["batch_size"], seed)
    config = TrainConfig(
        steps, SETTINGS["learning_rate"], warmup_steps=SETTINGS["warmup_steps"], seed=seed, progress=False
    )
    return model, train(model, batches, sft_loss, config)


@experiment(settings=SETTINGS, code=[held_out, tune], data=[TRAIN, HELD_OUT])
def lora_rank(seed: int) -> dict:
    """Losses and held-out figures of every rank."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
    rows = read_records(ROOT / HELD_OUT, "sft")[: SETTINGS["held-out tickets"]]
    figures = {"base": held_out(model, tokenizer, rows)}
    for rank in SETTINGS["ranks"]:
        model, history = tune(rank, seed)
        figures[str(rank)] = {"losses": history.losses, **held_out(model, tokenizer, rows)}
        print(
            f"rank {rank}, seed {seed}: held-out loss {figures[str(rank)]['held-out loss']:.3f}", flush=True
        )
    return figures
