"""Lab 3.1.10: adapters averaged, right and wrong; an adapter over 4 bits, and over the originals."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean

import torch
from torch import Tensor, nn

from spark_ft.adapters import AdapterConfig, adapted_layers, add_adapters
from spark_ft.data.batches import collate_sft
from spark_ft.embedded import EMBEDDED
from spark_ft.lab.experiments.common import SHORT_RUN, TRAIN, VALIDATION, held_out, tune
from spark_ft.lab.experiments.runner import experiment
from spark_ft.lab.kitchen import ADAPTER, tickets
from spark_ft.models import load_model, load_tokenizer
from spark_ft.scoring import completion_logps

SETTINGS = {**SHORT_RUN, "adapter": asdict(ADAPTER), "adapters": 3, "held-out tickets": 32}
Notes = dict[str, tuple[Tensor, Tensor]]  # an adapter: layer → its A and B


def notes(model: nn.Module) -> Notes:
    """A and B of every adapted layer."""
    return {name: (x.lora_A.data, x.lora_B.data) for name, x in adapted_layers(model).items()}


def mean_of_products(As: list[Tensor], Bs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of the mean of all B·A: the As one below the other, the Bs side by side, over their number."""
    return torch.cat(As), torch.cat(Bs, 1) / len(Bs)


def mean_of_parts(As: list[Tensor], Bs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of the As and the mean of the Bs, whose product is no mean of the products."""
    return torch.stack(As).mean(0), torch.stack(Bs).mean(0)


def averaged(adapters: list[Notes], how) -> nn.Module:
    """The embedded model with one LoRA that is made of several; α/r stays, whatever its rank."""
    made = {
        name: how(*map(list, zip(*(each[name] for each in adapters), strict=True))) for name in adapters[0]
    }
    rank = len(next(iter(made.values()))[0])
    config = replace(ADAPTER, rank=rank, alpha=ADAPTER.alpha / ADAPTER.rank * rank)
    return with_notes(made, config)


def with_notes(made: Notes, config: AdapterConfig) -> nn.Module:
    """The embedded model with these numbers on it."""
    model = add_adapters(load_model(EMBEDDED, dtype=torch.float32)[0], config)
    for name, layer in adapted_layers(model).items():
        for own, given in zip((layer.lora_A, layer.lora_B), made[name], strict=True):
            own.data.copy_(given)
    return model.eval()


@experiment(
    settings=SETTINGS,
    seeds=(0, 1, 2, 3, 4),
    code=[tickets, tune, held_out, notes, mean_of_products, mean_of_parts, averaged, with_notes],
    data=[TRAIN, VALIDATION],
)
def averaged_adapters(seed: int) -> dict:
    """Held-out loss: three adapters alone, the mean of their ΔW, and their A and B averaged apart."""
    tokenizer, rows = load_tokenizer(EMBEDDED), tickets("validation")[: SETTINGS["held-out tickets"]]
    several, alone = [], []
    for number in range(SETTINGS["adapters"]):
        model, _ = tune(tickets("train"), 100 * seed + number, **SHORT_RUN)
        alone.append(held_out(model.eval(), tokenizer, rows)["held-out loss"])
        several.append(notes(model))
    figures = {"alone": alone, "alone, mean": mean(alone)}
    for name, how in (("mean of ΔW", mean_of_products), ("A and B apart", mean_of_parts)):
        figures[name] = held_out(averaged(several, how), tokenizer, rows)["held-out loss"]
    print(f"averaged_adapters, seed {seed}: {figures}", flush=True)
    return figures


@torch.no_grad()
def answer_logps(model: nn.Module, tokenizer, rows: Sequence[dict]) -> Tensor:
    """The log-probability of every token of the right answers."""
    return completion_logps(model.eval(), collate_sft(rows, tokenizer))[0]


@experiment(
    settings={**SHORT_RUN, "adapter": asdict(ADAPTER), "weights": "NF4", "held-out tickets": 16},
    seeds=(0, 1, 2),
    code=[tickets, tune, notes, with_notes, answer_logps],
    data=[TRAIN, VALIDATION],
)
def trained_over_4_bits(seed: int) -> dict:
    """An adapter trained on NF4 weights: its loss there and on the originals, and how far apart these are."""
    tokenizer, rows = load_tokenizer(EMBEDDED), tickets("validation")[:16]
    in_4_bits, _ = load_model(EMBEDDED, dtype=torch.float32, quantize="nf4")
    before = answer_logps(in_4_bits, tokenizer, rows)
    in_4_bits, _ = tune(tickets("train"), seed, model=in_4_bits, **SHORT_RUN)
    there = answer_logps(in_4_bits, tokenizer, rows)
    originals = answer_logps(with_notes(notes(in_4_bits), ADAPTER), tokenizer, rows)
    return {
        "before": -before.mean().item(),
        "on 4 bits": -there.mean().item(),
        "on the originals": -originals.mean().item(),
        "apart": (there - originals).abs().mean().item(),
    }
