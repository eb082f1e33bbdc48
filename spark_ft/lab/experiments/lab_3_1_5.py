"""Lab 3.1.5: the same LoRA on weights in fp32, in NF4 and at 16 equal steps; and merges into NF4."""

from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spark_ft.adapters import adapted_layers, merge_adapters
from spark_ft.embedded import EMBEDDED
from spark_ft.lab.experiments.common import SHORT_RUN, TRAIN, VALIDATION, held_out, tune
from spark_ft.lab.experiments.runner import experiment
from spark_ft.lab.kitchen import ADAPTER, tickets
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import NF4Linear, quantize_nf4
from spark_ft.models import load_model
from spark_ft.training import History

SETTINGS = {
    **SHORT_RUN,
    "adapter": asdict(ADAPTER),
    "held-out tickets": 32,
    "weights": ["fp32", "NF4", "16 equal steps"],
}
EQUAL_STEPS = torch.linspace(-1, 1, 16)


def rounded(weight: Tensor, code: Tensor, block_size: int = 64) -> Tensor:
    """Quantize and dequantize a weight: blocks scaled to ±1, each number at the nearest level of `code`."""
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


def tune_on(weights: str, seed: int, first: int | None = None) -> tuple[nn.Module, History]:
    """That model with LoRA of rank 16, trained on kitchen tickets as in lab 3.1.1."""
    return tune(tickets("train"), seed, model=base(weights)[0], first=first, **SHORT_RUN)


def merged(model: nn.Module) -> nn.Module:
    """The adapters merged into bf16 weights; then cast to fp32, which a CPU computes faster."""
    return merge_adapters(model).float()


def quantized_again(model: nn.Module) -> nn.Module:
    """A merged model quantized to NF4 once more: what a merge must not do in silence."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            model.set_submodule(name, NF4Linear.from_linear(layer))
    return model


@experiment(
    settings=SETTINGS,
    seeds=(0, 1, 2, 3, 4),
    code=[tickets, rounded, base, tune, tune_on, merged, quantized_again, held_out],
    data=[TRAIN, VALIDATION],
)
def qlora_against_lora(seed: int) -> dict:
    """Held-out figures before and after training on each kind of weights; QLoRA also merged and quantized."""
    rows = tickets("validation")[: SETTINGS["held-out tickets"]]
    figures = {}
    for weights in SETTINGS["weights"]:
        model, tokenizer = base(weights)
        before = held_out(model, tokenizer, rows)
        model, history = tune_on(weights, seed)
        figures[weights] = {"before": before, "losses": history.losses, **held_out(model, tokenizer, rows)}
        print(f"{weights}, seed {seed}: held-out loss {figures[weights]['held-out loss']:.3f}", flush=True)
        if weights == "NF4":
            figures["merged"] = held_out(merged(model), tokenizer, rows)
            figures["quantized again"] = held_out(quantized_again(model), tokenizer, rows)
    return figures


# ── merges into 4 bits ──────────────────────────────────────────────────────────────────────────────────────


class MergeAwareLinear(LoRALinear):
    """What the layer will be when it is merged into 4 bits: Q(W + s B A) x; its gradient is LoRA's."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            merged = quantize_nf4(self.weight + self.delta_weight()).dequantize()
        low = self.scaling * (x.detach() @ self.lora_A.T @ self.lora_B.T)
        return F.linear(x, merged, self.bias) + low - low.detach()


def merge_aware(model: nn.Module) -> None:
    """Freeze a model and put a merge-aware layer around each linear layer but the head."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            model.set_submodule(name, MergeAwareLinear(layer, ADAPTER.rank, ADAPTER.alpha))


@torch.no_grad()
def from_the_originals(model: nn.Module) -> nn.Module:
    """The embedded model with every weight Q(W + ΔW), from the original W and the model's updates."""
    whole, _ = base("fp32")
    for name, layer in adapted_layers(model).items():
        whole.get_submodule(name).weight += layer.delta_weight()
    return quantized_again(whole)


@experiment(
    settings=SETTINGS,
    seeds=(0, 1, 2, 3, 4),
    code=[
        tickets,
        base,
        tune,
        tune_on,
        quantized_again,
        MergeAwareLinear,
        merge_aware,
        from_the_originals,
        held_out,
    ],
    data=[TRAIN, VALIDATION],
)
def merges_into_4_bits(seed: int, first: int | None = None) -> dict:
    """QLoRA's notes merged into the originals, then NF4; and notes that were trained for that merge."""
    rows = tickets("validation")[: SETTINGS["held-out tickets"]]
    model, history = tune_on("NF4", seed, first)
    _, tokenizer = base("fp32")
    figures = {"losses": history.losses, "notes on": held_out(model, tokenizer, rows)}
    figures["from the originals"] = held_out(from_the_originals(model), tokenizer, rows)
    aware, history = tune(tickets("train"), seed, adapter=merge_aware, first=first, **SHORT_RUN)
    merged_loss = held_out(from_the_originals(aware), tokenizer, rows)
    figures["merge-aware"] = {"losses": history.losses, **merged_loss}
    said = {name: each["held-out loss"] for name, each in figures.items() if isinstance(each, dict)}
    print(f"seed {seed}: {said}", flush=True)
    return figures
