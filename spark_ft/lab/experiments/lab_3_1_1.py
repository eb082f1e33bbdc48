"""Lab 3.1.1: LoRA of several ranks, trained on the same kitchen tickets for the same number of steps."""

import torch
from torch import nn

from spark_ft.adapters import AdapterConfig
from spark_ft.embedded import EMBEDDED
from spark_ft.lab.experiments.common import SHORT_RUN, TRAIN, VALIDATION, held_out, tune
from spark_ft.lab.experiments.runner import experiment
from spark_ft.lab.kitchen import tickets
from spark_ft.models import load_model
from spark_ft.training import History

SETTINGS = {
    **SHORT_RUN,
    "ranks": [1, 4, 16, 64],
    "alpha / rank": 2,
    "targets": "all-linear",
    "held-out tickets": 32,
}


def tune_rank(rank: int, seed: int, first: int | None = None) -> tuple[nn.Module, History]:
    """The embedded model with LoRA of one rank, trained on kitchen tickets."""
    adapter = AdapterConfig(rank=rank, alpha=SETTINGS["alpha / rank"] * rank)
    return tune(tickets("train"), seed, adapter=adapter, first=first, **SHORT_RUN)


@experiment(settings=SETTINGS, code=[tickets, tune, tune_rank, held_out], data=[TRAIN, VALIDATION])
def lora_rank(seed: int) -> dict:
    """Losses and held-out figures of every rank."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
    rows = tickets("validation")[: SETTINGS["held-out tickets"]]
    figures = {"base": held_out(model, tokenizer, rows)}
    for rank in SETTINGS["ranks"]:
        model, history = tune_rank(rank, seed)
        figures[str(rank)] = {"losses": history.losses, **held_out(model, tokenizer, rows)}
        loss = figures[str(rank)]["held-out loss"]
        print(f"rank {rank}, seed {seed}: held-out loss {loss:.3f}", flush=True)
    return figures
