"""What lab 3.1.1 shows: tickets, a real update cut to few layers, your run, ranks, a control, memory."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spark_ft.adapters import AdapterConfig, adapted_layers, adapters_disabled, add_adapters
from spark_ft.data.batches import sft_batches
from spark_ft.embedded import EMBEDDED
from spark_ft.lab import plots
from spark_ft.lab.checks import is_stub, told
from spark_ft.lab.experiments.common import SHORT_RUN, held_out, tune
from spark_ft.lab.experiments.lab_3_1_1 import SETTINGS
from spark_ft.lab.experiments.runner import Measurement
from spark_ft.lab.kitchen import tickets
from spark_ft.lab.study import show_differences, show_sweep, show_table, verdict
from spark_ft.memory import measure
from spark_ft.memory.machine import DGX_SPARK
from spark_ft.memory.plan import plan_step
from spark_ft.memory.shapes import known_config
from spark_ft.models import load_model, load_tokenizer
from spark_ft.scoring import Batch, sft_loss
from spark_ft.stats import mean_interval, paired_difference
from spark_ft.training import History, TrainConfig, train

FREED = {  # the matrices that train fully, and how a figure calls them
    "model.layers.14.self_attn.q_proj": "layer 14, q_proj",
    "model.layers.20.mlp.down_proj": "layer 20, down_proj",
    "model.layers.22.self_attn.o_proj": "layer 22, o_proj",
}
RANKS = (1, 4, 16, 64)


def show_tickets(rows: Sequence[Mapping[str, str]], before: Sequence[str], after: Sequence[str]) -> None:
    """Orders, and what the model wrote before and after it was trained, side by side."""
    shown = [
        {"order": row["prompt"].split("\n")[-1], "before": b, "after": a}
        for row, b, a in zip(rows, before, after, strict=True)
    ]
    show_table(shown, "greedy answers of at most 48 tokens to held-out orders; rank 16, 20 steps, seed 0")


# ── exercise 1: is the update low-rank? ─────────────────────────────────────────────────────────────────────


def cut_to_rank(matrix: Tensor, k: int) -> Tensor:
    """The best rank-k part of a matrix (Eckart and Young 1936)."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k]


def share_kept(matrix: Tensor) -> Tensor:
    """The share of the squared norm that the best rank-k part keeps, for k = 1, 2, …"""
    squares = torch.linalg.svdvals(matrix).square()
    return squares.cumsum(0) / squares.sum()


class Update:
    """A short full fine-tune of three matrices of the embedded model, and what it changed in them.

    Attributes:
        delta: name → ΔW, after minus before.
        before: name → W as it was.
        history: the run.
        moved: name → ‖ΔW‖ / ‖W‖.
    """

    def __init__(self, steps: int = 12, learning_rate: float = 1e-3):
        self.model, self.tokenizer = load_model(EMBEDDED, dtype=torch.float32)
        self.model.requires_grad_(False)
        weights = {name: self.model.get_submodule(name).weight.requires_grad_() for name in FREED}
        self.before = {name: weight.detach().clone() for name, weight in weights.items()}
        batches = sft_batches(tickets("train"), self.tokenizer, 4)
        self.history = train(self.model, batches, sft_loss, TrainConfig(steps, learning_rate))
        self.delta = {name: weight.detach() - self.before[name] for name, weight in weights.items()}
        self.moved = {name: (d.norm() / self.before[name].norm()).item() for name, d in self.delta.items()}
        self.losses: dict[int | None, float] = {}

    @torch.no_grad()
    def held_out_loss(self, cut: Callable[[Tensor, int], Tensor], k: int | None) -> float:
        """The held-out loss with each ΔW cut to rank k; 0 takes it out, None keeps it whole."""
        if k not in self.losses:
            for name, delta in self.delta.items():
                kept = delta if k is None else cut(delta, k) if k else 0 * delta
                self.model.get_submodule(name).weight.copy_(self.before[name] + kept)
            self.losses[k] = held_out(self.model, self.tokenizer, tickets("validation")[:16])["held-out loss"]
        return self.losses[k]


def _yours(answer: Callable, package: Callable, example: tuple) -> Callable:
    """The learner's function if it agrees with the package's on an example; else the package's, and why."""
    name, right = package.__name__, package(*example)
    try:
        given = told.as_tensor(answer(*example))
        if given is not None and given.shape == right.shape and torch.allclose(given, right, atol=1e-3):
            return answer
        said = f"your {name} gives other numbers"
    except NotImplementedError as error:
        said = f"{name} is not written yet" if is_stub(error) else f"your {name} raises an error"
    except Exception:
        said = f"your {name} raises an error"
    print(f"{said}; shown with the study's own")
    return package


def show_kept(update: Update, share: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """How much of each real update few layers of paint hold, beside random matrices of the same size."""
    share = _yours(share, share_kept, (torch.randn(6, 9),))
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(d.shape, generator=generator) for name, d in update.delta.items()}
    real = {name: share(delta.cpu()) for name, delta in update.delta.items()}
    random = {name: share(matrix) for name, matrix in noise.items()}
    means = {
        kind: {k: mean(float(each[k - 1]) for each in kept.values()) for k in RANKS}
        for kind, kept in (("real", real), ("random", random))
    }
    fig, ax = plots.figure(
        f"16 layers hold {means['real'][16]:.0%} of a real update, {means['random'][16]:.0%} of a random one",
        x="layers of paint, strongest first (k)",
        y="share of ‖ΔW‖² kept (%)",
        caption=f"three matrices, trained fully for {len(update.history.losses)} steps of 4 tickets, seed 0; "
        "dotted: random matrices of the same shapes. The numbers in the title are means of three.",
    )
    for role, name in zip(("yours", "package", "reference"), FREED, strict=True):
        style = {"color": plots.COLORS[role]}
        line = plots.LINE[role]["linestyle"]
        ax.plot(range(1, len(real[name]) + 1), 100 * real[name], line, label=FREED[name], **style)
        ax.plot(range(1, len(random[name]) + 1), 100 * random[name], ":", alpha=0.7, **style)
    ax.plot([], [], color=plots.INK, linestyle=":", label="random")
    ax.set(xscale="log", ylim=(0, 103))
    ax.set_xticks([*RANKS, 256], [str(k) for k in (*RANKS, 256)])
    ax.legend()
    said = {kind: ", ".join(f"{v:.0%} at k={k}" for k, v in kept.items()) for kind, kept in means.items()}
    plots.show(fig, alt=f"Share kept rises with k. Real updates: {said['real']}. Random: {said['random']}.")
    return {"real": means["real"][16], "random": means["random"][16]}


def show_learned(
    update: Update, cut: Callable[[Tensor, int], Tensor], ranks: Sequence[int]
) -> dict[int, float]:
    """What the model still knows with its update cut to rank k: held-out loss, and share of the gain."""
    cut = _yours(cut, cut_to_rank, (torch.randn(6, 9), 2))
    start, whole = update.held_out_loss(cut, 0), update.held_out_loss(cut, None)
    kept = {k: mean(share_kept(d)[k - 1].item() for d in update.delta.values()) for k in ranks}
    found = {k: update.held_out_loss(cut, k) for k in ranks}
    gained = {k: (start - loss) / (start - whole) for k, loss in found.items()}
    rows = [
        {
            "update": f"best rank-{k} part",
            "of ‖ΔW‖²": f"{kept[k]:.0%}",
            "held-out loss": loss,
            "of the gain": f"{gained[k]:.0%}",
        }
        for k, loss in found.items()
    ]
    ends = [
        {"update": name, "of ‖ΔW‖²": share, "held-out loss": loss, "of the gain": share}
        for name, share, loss in (("none", "0%", start), ("whole", "100%", whole))
    ]
    show_table(
        [ends[0], *rows, ends[1]],
        "three matrices, all cut to the same rank; 16 held-out tickets; one run, seed 0",
    )
    return gained


# ── your layer trains ───────────────────────────────────────────────────────────────────────────────────────


def put_layers(model: nn.Module, layer_type: Callable[..., nn.Module], rank: int = 16) -> None:
    """Freeze a model and put a layer of any class around each linear layer but the head.

    All classes start from the same A: that of `add_adapters` with the same seed.
    """
    model.requires_grad_(False)
    head, state = model.get_output_embeddings(), torch.get_rng_state()
    bases = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for name, base in bases.items():
        layer = layer_type(base, rank, SETTINGS["alpha / rank"] * rank, 0.0)
        model.set_submodule(name, layer.to(base.weight.device).train(base.training))
    torch.set_rng_state(state)
    with torch.no_grad():
        for name, base in bases.items():
            bound = base.in_features**-0.5
            model.get_submodule(name).lora_A.uniform_(-bound, bound)


def train_layer(layer_type: Callable[..., nn.Module]) -> History:
    """The rank-16 run of seed 0 with layers of another class."""
    return tune(tickets("train"), 0, adapter=lambda model: put_layers(model, layer_type), **SHORT_RUN)[1]


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, steps: int) -> list[float]:
    """Some plain steps on one batch; the loss of each."""
    batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
    losses = []
    for _ in range(steps):
        total, tokens = sft_loss(model, batch)
        (total / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total / tokens).item())
    return losses


# ── ranks and the control ───────────────────────────────────────────────────────────────────────────────────


def show_rank_sweep(stored: Measurement) -> None:
    """Held-out loss at each rank, each rank against the next one, seed by seed, and tickets right."""
    ranks = SETTINGS["ranks"]
    losses = {rank: stored.values(rank, "held-out loss") for rank in ranks}
    pairs = {f"rank {low} − rank {high}": (losses[low], losses[high]) for low, high in pairwise(ranks)}
    falls = {high: paired_difference(losses[low], losses[high]) for low, high in pairwise(ranks)}
    helped = [rank for rank, fall in falls.items() if verdict(fall, "falls", "rises") == "falls"]
    unclear = [rank for rank in falls if rank not in helped]
    title = f"More rank measurably helps up to rank {max(helped)}" if helped else "Cannot tell"
    base = stored.figures(0)["base"]["held-out loss"]
    caption = f"{SETTINGS['steps']} steps of 4 tickets, 32 held-out tickets; no adapter: {base:.2f}. "
    show_sweep(
        title + (f"; beyond it we cannot tell (rank {', '.join(map(str, unclear))})" if unclear else ""),
        {"LoRA": losses},
        x="rank",
        y="held-out loss (nats per token)",
        caption=f"{caption}{stored.origin()}.",
    )
    show_differences(
        "Rank by rank: " + ", ".join(f"to {r} {verdict(f, 'helps', 'harms')}" for r, f in falls.items()),
        pairs,
        unit="fall of the held-out loss (nats per token)",
        caption="the same tickets in the same order at every rank;",
    )
    rows = [
        {
            "rank": rank,
            "tokens right": mean_interval(stored.values(rank, "token accuracy")).percent(),
            "whole tickets right, seed by seed": ", ".join(
                f"{value:.0%}" for value in stored.values(rank, "exact match")
            ),
        }
        for rank in ranks
    ]
    show_table(rows, "32 held-out tickets, three stored seeds; mean and 95% t interval")


@torch.no_grad()
def show_control(model: nn.Module, draws: int = 3) -> dict[str, Any]:
    """The trained notes beside none, and beside random ones of the same rank and norm in every layer."""
    tokenizer, rows = load_tokenizer(EMBEDDED), tickets("validation")[: SETTINGS["held-out tickets"]]
    layers = adapted_layers(model)
    with adapters_disabled(model):
        none = held_out(model, tokenizer, rows)["held-out loss"]
    trained = held_out(model, tokenizer, rows)["held-out loss"]
    kept = {name: (layer.lora_A.clone(), layer.lora_B.clone()) for name, layer in layers.items()}
    norms = {name: layer.delta_weight().norm() for name, layer in layers.items()}
    random = []
    for seed in range(draws):
        torch.manual_seed(seed)
        for name, layer in layers.items():
            layer.lora_A.normal_()
            layer.lora_B.normal_()
            layer.lora_B *= norms[name] / layer.delta_weight().norm()
        random.append(held_out(model, tokenizer, rows)["held-out loss"])
    for name, (A, B) in kept.items():
        layers[name].lora_A.copy_(A)
        layers[name].lora_B.copy_(B)
    losses = mean_interval(random)
    gain = (none - losses.value) / (none - trained)
    inside = losses.low <= none <= losses.high
    found = "cannot tell from none" if inside else "worse than none" if gain < 0 else "better than none"
    show_table(
        [
            {"notes": "none", "held-out loss": none, "verdict": ""},
            {"notes": "trained, rank 16", "held-out loss": trained, "verdict": ""},
            {"notes": "random, same rank and norm", "held-out loss": losses, "verdict": found},
        ],
        f"32 held-out tickets; random: mean and 95% t interval of {draws} draws",
    )
    assert gain < 0.1, "a random adapter should not do what a trained one does"
    return {"none": none, "trained": trained, "random": losses.value, "gain": gain, "verdict": found}


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────

KINDS_OF_WEIGHTS = ("linear layers", "embeddings and head", "norms", "adapters")
PARTS = ("weights", "gradients", "AdamW moments", "activations, scratch")


def step_memory(model: nn.Module, batch: Batch) -> dict[str, dict[str, int]]:
    """Bytes before a step and at its worst moment: planned, and held to the tensors counted."""
    plan = plan_step(model.train(), batch)
    weights = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for _ in range(2):  # AdamW makes its moments at the end of the first step
        optimizer.zero_grad(set_to_none=True)
        with measure("cpu") as memory:
            total, tokens = sft_loss(model, batch)
            (total / tokens).backward()
        optimizer.step()
    states = optimizer.state.values()
    moments = sum(m.nbytes for state in states for name, m in state.items() if name != "step")
    counted = weights + moments + memory.extra
    assert abs(plan.peak / counted - 1) < 0.02, f"planned {plan.peak}, counted {counted}"
    worst = {
        "weights": sum(plan.terms.get(kind, 0) for kind in KINDS_OF_WEIGHTS),
        "gradients": plan.terms.get("gradients", 0),
        "AdamW moments": plan.terms["optimizer moments"],
    }
    worst["activations, scratch"] = plan.peak - sum(worst.values())
    before = {"weights": weights, "gradients": 0, "AdamW moments": moments, "activations, scratch": 0}
    return {"before the step": before, "at its worst": worst}


def show_memory(batch: Batch) -> dict[str, float]:
    """What full fine-tuning and LoRA hold before a step and at its worst moment, part by part."""
    found, trained = {}, {}
    for name in ("full", "LoRA r16"):
        model = load_model(EMBEDDED, dtype=torch.float32)[0].cpu().requires_grad_(True)
        if name != "full":
            add_adapters(model, AdapterConfig(rank=16))
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found |= {f"{name}, {moment}": parts for moment, parts in step_memory(model, batch).items()}
        del model
    totals = {name: sum(parts.values()) for name, parts in found.items()}
    ratio = totals["full, at its worst"] / totals["LoRA r16, at its worst"]
    fig, ax = plots.figure(
        f"At its worst moment a full step holds {ratio:.1f} times what a LoRA step holds",
        x="memory (MB)",
        y="what trains, and when",
        width=9.5,
        height=3.4,
        caption="embedded model, fp32, 4 tickets; planned, and equal to the tensors counted to within 2%",
    )
    left = dict.fromkeys(found, 0.0)
    for part, role in zip(PARTS, ("yours", "package", "reference", "control"), strict=True):
        sizes = [parts[part] / 1e6 for parts in found.values()]
        ax.barh(list(found), sizes, left=list(left.values()), label=part, **plots.BAR[role])
        left = {name: left[name] + size for name, size in zip(left, sizes, strict=True)}
    ax.invert_yaxis()
    ax.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    plots.show(fig, alt="Stacked bars: " + ", ".join(f"{n} {t / 1e6:.0f} MB" for n, t in totals.items()))
    rows = [
        {"": name, **{part: f"{parts[part] / 1e6:.0f} MB" for part in PARTS}} for name, parts in found.items()
    ]
    fewer = trained["full"] / trained["LoRA r16"]
    show_table(rows, f"numbers that train: {fewer:.0f} times fewer with LoRA")
    return {"whole step": ratio, "numbers that train": fewer}


def show_giants(names: Sequence[str] = ("Qwen3-8B", "Llama-3.3-70B")) -> None:
    """What large models' weights, gradients and moments take, counted from their shapes."""
    rows = []
    for name in names:
        with torch.device("meta"):  # there a tensor has a shape and no memory
            model = AutoModelForCausalLM.from_config(known_config(name), dtype=torch.bfloat16)
            number = sum(p.numel() for p in model.parameters())
            add_adapters(model, AdapterConfig(rank=16))
        notes = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sizes = {
            "full, fp32": 16 * number,  # weight, gradient, two moments: 4 bytes each
            "full, bf16": 8 * number,  # 2 bytes each
            "LoRA r16, bf16": 2 * number + 16 * notes,  # frozen weights in bf16; all of the notes in fp32
        }
        shown = {
            how: f"{size / 1e9:,.0f} GB{'' if size < DGX_SPARK.total else ' ✗'}"
            for how, size in sizes.items()
        }
        notes_in = f"{notes / 1e6:.0f} M ({notes / number:.2%})"
        rows.append({"model": name, "weights": f"{number / 1e9:.1f} B", "in notes": notes_in, **shown})
    show_table(
        rows,
        f"counted from the shapes, activations not included; ✗: more than the {DGX_SPARK.total / 1e9:.0f} GB "
        "that a DGX Spark has for everything",
    )
