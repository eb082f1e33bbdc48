"""Lab 3.1.5: the same notes on weights in fp32, in NF4 and at 16 equally spaced levels, and what a merge keeps of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spark_ft.adapters import AdapterConfig, add_adapters, merge_adapters
from spark_ft.data.batches import sft_batches
from spark_ft.data.records import read_records
from spark_ft.embedded import EMBEDDED
from spark_ft.files import ROOT
from spark_ft.lab.experiments.lab_3_1_1 import HELD_OUT, TRAIN, held_out
from spark_ft.lab.experiments.lab_3_1_1 import SETTINGS as LORA
from spark_ft.lab.experiments.runner import experiment
from spark_ft.methods.nf4 import NF4Linear
from spark_ft.models import load_model
from spark_ft.scoring import sft_loss
from spark_ft.training import History, TrainConfig, train

SHARED = (
    "alpha / rank",
    "targets",
    "steps",
    "batch_size",
    "learning_rate",
    "warmup_steps",
    "held-out tickets",
)
SETTINGS = {**{key: LORA[key] for key in SHARED}, "rank": 16, "weights": ["fp32", "NF4", "16 equal steps"]}
EQUAL_STEPS = torch.linspace(-1, 1, 16)


def rounded(weight: Tensor, code: Tensor, block_size: int = 64) -> Tensor:
    """A weight with each number at its nearest level of a sorted code, blocks scaled to ±1 first: into 4 bits and back."""
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = torch.bucketize(blocks / largest, (code[1:] + code[:-1]) / 2)
    return (code[nearest] * largest).flatten()[: len(flat)].view_as(weight)


def base(weights: str):
    """The embedded model and its tokenizer, its linear layers but the head in this precision."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32, quantize="nf4" if weights == "NF4" else None)
    if weights == "16 equal steps":
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
                layer.weight.data = rounded(layer.weight.data, EQUAL_STEPS)
    return model, tokenizer


def tune(weights: str, seed: int, steps: int = SETTINGS["steps"]) -> tuple[nn.Module, History]:
    """That model with LoRA, trained on kitchen tickets as in lab 3.1.1; the seed draws A and the order of the rows."""
    model, tokenizer = base(weights)
    torch.manual_seed(seed)
    add_adapters(
        model, AdapterConfig(rank=SETTINGS["rank"], alpha=SETTINGS["alpha / rank"] * SETTINGS["rank"])
    )
    batches = sft_batches(read_records(ROOT / TRAIN, "sft"), tokenizer, SETTINGS["batch_size"], seed)
    config = TrainConfig(
        steps, SETTINGS["learning_rate"], warmup_steps=SETTINGS["warmup_steps"], seed=seed, progress=False
    )
    return model, train(model, batches, sft_loss, config)


def merged(model: nn.Module) -> nn.Module:
    """The notes copied into the print, which is then in bf16; computed with in fp32, which is faster on a CPU."""
    return merge_adapters(model).float()


def quantized_again(model: nn.Module) -> nn.Module:
    """A merged model, put into NF4 once more: what a merge must not do in silence."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            model.set_submodule(name, NF4Linear.from_linear(layer))
    return model


@experiment(
    settings=SETTINGS,
    seeds=(0, 1, 2, 3, 4),
    code=[rounded, base, tune, merged, quantized_again, held_out],
    data=[TRAIN, HELD_OUT],
)
def qlora_against_lora(seed: int) -> dict:
    """Held-out figures of each kind of weights before and after training; of the QLoRA model merged, and quantized again."""
    rows = read_records(ROOT / HELD_OUT, "sft")[: SETTINGS["held-out tickets"]]
    figures = {}
    for weights in SETTINGS["weights"]:
        model, tokenizer = base(weights)
        before = held_out(model, tokenizer, rows)
        model, history = tune(weights, seed)
        figures[weights] = {"before": before, "losses": history.losses, **held_out(model, tokenizer, rows)}
        print(f"{weights}, seed {seed}: held-out loss {figures[weights]['held-out loss']:.3f}", flush=True)
        if weights == "NF4":
            figures["merged"] = held_out(merged(model), tokenizer, rows)
            figures["quantized again"] = held_out(quantized_again(model), tokenizer, rows)
    return figures
