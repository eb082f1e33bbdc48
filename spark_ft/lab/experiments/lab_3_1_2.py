"""Lab 3.1.2: DoRA, LoRA, magnitudes alone and full fine-tuning on the same tickets."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spark_ft.adapters import AdapterConfig, adapted_layers, add_adapters
from spark_ft.embedded import EMBEDDED
from spark_ft.lab.experiments.common import SHORT_RUN, TRAIN, VALIDATION, held_out, tune
from spark_ft.lab.experiments.lab_3_1_1 import SETTINGS as LORA
from spark_ft.lab.experiments.lab_3_1_1 import tune_rank
from spark_ft.lab.experiments.runner import experiment
from spark_ft.lab.kitchen import tickets, with_shuffled_answers
from spark_ft.methods.lora import LoRALinear
from spark_ft.models import load_model
from spark_ft.training import History

# The rates with the lowest held-out loss for seed 100, which is not measured here, on the 32 validation
# tickets after those measured here. LoRA and DoRA: of 1e-3, 2e-3, 4e-3 (4e-3 is 0.002 better for DoRA: too
# little to use two rates). Magnitude alone: of 0.005, 0.02, 0.05, 0.1, 0.2. Full fine-tuning: of 3e-5, 1e-4,
# 3e-4, 1e-3.
SETTINGS = {
    **LORA,
    "ranks": [16, 17],
    "rank of DoRA": 16,
    "learning_rate of the magnitude": 0.1,
    "learning_rate of full fine-tuning": 3e-4,
    "watched": ["q_proj", "v_proj"],
}


def tune_dora(seed: int, first: int | None = None, shuffled: bool = False) -> tuple[nn.Module, History]:
    """The embedded model with DoRA, trained on kitchen tickets; `shuffled` puts each under another note."""
    rows = tickets("train")
    rows = with_shuffled_answers(rows, seed) if shuffled else rows
    rank = SETTINGS["rank of DoRA"]
    adapter = AdapterConfig(method="dora", rank=rank, alpha=SETTINGS["alpha / rank"] * rank)
    return tune(rows, seed, adapter=adapter, first=first, **SHORT_RUN)


def tune_magnitude(seed: int, first: int | None = None) -> tuple[nn.Module, History]:
    """DoRA with every direction frozen: B stays zero, and only the magnitudes train."""

    def magnitude_only(model: nn.Module) -> None:
        add_adapters(model, AdapterConfig(method="dora", rank=1))
        for layer in adapted_layers(model).values():
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)

    run = {**SHORT_RUN, "learning_rate": SETTINGS["learning_rate of the magnitude"]}
    return tune(tickets("train"), seed, adapter=magnitude_only, first=first, **run)


def tune_full(seed: int, first: int | None = None) -> tuple[nn.Module, History]:
    """Full fine-tuning of the weights that adapters are put on: every linear layer but the output head."""

    def linear_weights(model: nn.Module) -> None:
        model.requires_grad_(False)
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
                layer.weight.requires_grad_(True)

    run = {**SHORT_RUN, "learning_rate": SETTINGS["learning_rate of full fine-tuning"]}
    return tune(tickets("train"), seed, adapter=linear_weights, first=first, **run)


@torch.no_grad()
def watched_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of each query and value layer's weight, by name, its adapter merged in."""
    weights = {}
    for name, layer in model.named_modules():
        if name.endswith(tuple(SETTINGS["watched"])):
            adapted = isinstance(layer, LoRALinear)
            if adapted:
                layer.merge()
            weights[name] = layer.weight.detach().clone()
            if adapted:
                layer.unmerge()
    return weights


def movement(before: Tensor, after: Tensor) -> tuple[float, float]:
    """How far a weight's rows moved in length and in direction.

        ΔM = mean |‖after‖ − ‖before‖|    ΔD = mean (1 − cos(after, before))    (Liu et al. 2024, section 3.2)

    Both means run over the rows of (out, in) weights, as in the authors' code; the paper writes columns.
    """
    before, after = before.double(), after.double()
    lengths = torch.linalg.vector_norm(after, dim=1) - torch.linalg.vector_norm(before, dim=1)
    return lengths.abs().mean().item(), (1 - F.cosine_similarity(after, before, dim=1)).mean().item()


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, list[list[float]]]:
    """[ΔM, ΔD] of every watched layer, from the lowest to the highest, by kind of layer."""
    after = watched_weights(model)
    pairs = {
        name: [float(f"{value:.5g}") for value in movement(before[name], after[name])] for name in before
    }
    return {
        kind: [pair for name, pair in pairs.items() if name.endswith(kind)] for kind in SETTINGS["watched"]
    }


@experiment(
    settings=SETTINGS,
    seeds=(0, 1, 2, 3, 4),
    code=[
        tickets,
        tune,
        tune_rank,
        tune_dora,
        tune_magnitude,
        tune_full,
        held_out,
        watched_weights,
        movement,
        moved,
        with_shuffled_answers,
    ],
    data=[TRAIN, VALIDATION],
)
def dora_against_lora(seed: int, first: int | None = None) -> dict:
    """Losses and held-out figures of each method and of the control; ΔM and ΔD where direction can move."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
    rows = tickets("validation")[: SETTINGS["held-out tickets"]]
    before = watched_weights(model)
    figures = {"base": held_out(model, tokenizer, rows)}
    runs = {
        **{f"LoRA r{rank}": lambda rank=rank: tune_rank(rank, seed, first) for rank in SETTINGS["ranks"]},
        "DoRA": lambda: tune_dora(seed, first),
        "magnitude alone": lambda: tune_magnitude(seed, first),
        "full": lambda: tune_full(seed, first),
        "DoRA on shuffled answers": lambda: tune_dora(seed, first, shuffled=True),
    }
    for name, run in runs.items():
        model, history = run()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        figures[name] = {"trainable": trainable, "losses": history.losses, **held_out(model, tokenizer, rows)}
        if name in ("LoRA r16", "DoRA", "full"):
            figures[name]["moved"] = moved(model, before)
        print(f"{name}, seed {seed}: held-out loss {figures[name]['held-out loss']:.3f}", flush=True)
    return figures
