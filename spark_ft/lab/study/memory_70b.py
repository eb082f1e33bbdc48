"""What lab 3.1.5 shows of memory and speed: a true-size layer, plans of 70B, floors, what is free."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.data.batches import sft_batches
from spark_ft.data.chat import IGNORE
from spark_ft.embedded import EMBEDDED
from spark_ft.lab import plots
from spark_ft.lab import true_size as giant
from spark_ft.lab.kitchen import tickets
from spark_ft.lab.study import show_table
from spark_ft.memory.guard import Guard, fit_report
from spark_ft.memory.machine import DGX_SPARK, DGX_SPARK_SPEED, GIB, Machine, MemoryBudget, measure
from spark_ft.memory.plan import MemoryPlan, plan_step, plan_training
from spark_ft.memory.shapes import known_config
from spark_ft.models import load_model
from spark_ft.scoring import sft_loss

TABLES = "embeddings and head"
DATASHEET = Machine("DGX Spark", 125e12, 273e9)  # dense bf16 and bandwidth as NVIDIA states them
# Model, method, tokens per second: developer.nvidia.com/blog/
# how-nvidia-dgx-sparks-performance-enables-intensive-ai-tasks
PUBLISHED = (
    ("Llama-3.2-3B", "full", 82_739.2),
    ("Llama-3.1-8B", "lora", 53_657.6),
    ("Llama-3.3-70B", "qlora", 5_079.4),
)
# GiB on a GB10 after a file of 60 GiB was written (github.com/unslothai/unsloth/pull/10704)
READINGS = {"mem_get_info": 41.52, "MemAvailable": 115.65}


# ── planned and measured ────────────────────────────────────────────────────────────────────────────────────


def show_layer(planned: MemoryPlan, layer: Mapping[str, float]) -> dict[str, float]:
    """One true-size layer: what the plan says, what its tensors took, and what the system saw."""
    sizes = {
        "planned": planned.peak / 1e9,
        "its tensors": layer["counted"] / 1e9,
        "the process": layer["process"] / 1e9,
    }
    off = sizes["planned"] / sizes["its tensors"] - 1
    assert abs(off) < 0.05, "the plan of one layer should be within 5% of its tensors"
    fig, ax = plots.figure(
        f"At its worst a true-size layer takes {sizes['its tensors']:.2f} GB, {abs(off):.1%} off its plan",
        x="memory (GB)",
        y="one layer",
        height=2.8,
        caption="one decoder layer of Llama-3.3-70B's shape, random weights, NF4, LoRA r16, fp32. Forward "
        "and backward with checkpointing, 512 tokens; this machine, one run.",
    )
    own = layer["layer"] / 1e9
    ax.barh(list(sizes), [own] * 3, 0.6, label="the layer and its notes", **plots.BAR["yours"])
    rest = [size - own for size in sizes.values()]
    ax.barh(list(sizes), rest, 0.6, left=[own] * 3, label="activations, scratch", **plots.BAR["control"])
    ax.invert_yaxis()
    ax.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    said = ", ".join(f"{name} {size:.3f} GB" for name, size in sizes.items())
    plots.show(fig, alt=f"Horizontal bars of one layer's memory: {said}; {own:.2f} GB of each is the layer.")
    seconds, weights = layer["seconds a step"], layer["weights"] / 1e6
    print(
        f"{weights:.0f} M weights in {layer['in 4 bits'] / 1e9:.2f} GB; forward and backward {seconds:.0f} s"
    )
    print(f"80 such layers: {80 * seconds / 60:.0f} minutes per step on this machine")
    return sizes


def show_forgetful(model: nn.Module, tokenizer: Any) -> float:
    """A whole QLoRA step of the embedded model, counted, beside its plan and one without the embeddings."""
    batch, was = sft_batches(tickets("train"), tokenizer, 3)(0), model.training
    batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)  # makes moments, moves nothing
    plan = plan_step(model, batch)
    with measure("cpu") as made:
        total, count = sft_loss(model, batch)
        (total / count).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.train(was)
    own = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    moments = sum(m.nbytes for s in optimizer.state.values() for name, m in s.items() if name != "step")
    counted = own + moments + made.extra
    sizes = {"the plan": plan.peak, "without embeddings and head": plan.peak - plan.terms[TABLES]}
    off = {name: size / counted - 1 for name, size in sizes.items()}
    rows = [{"plan": n, "MB": f"{s / 1e6:.0f}", "off": f"{off[n]:+.1%}"} for n, s in sizes.items()]
    show_table(rows, f"one step on 3 tickets, embedded model; its tensors took {counted / 1e6:.0f} MB")
    assert abs(off["the plan"]) < 0.05, "the plan should be within 5% of what was counted"
    assert abs(off["without embeddings and head"]) > 0.1, "a plan without the embeddings must be noticed"
    return 100 * off["without embeddings and head"]


GROUPS = {
    "linear layers, NF4": ("linear layers", "norms"),
    "embeddings, head": (TABLES,),
    "notes, gradients, moments": ("adapters", "gradients", "optimizer moments"),
    "checkpoints": ("checkpoints",),
}


def _whole_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """transformers' own loss, which keeps the logits of every position."""
    return model(**batch, use_cache=False).loss, 1


def plan_70b(length: int, name: str = "Llama-3.3-70B", **settings: Any) -> MemoryPlan:
    """QLoRA of a well-known model's shape, rank 16; notes, gradients and moments in bf16."""
    return _planned(name, length, **{"adapter_dtype": torch.bfloat16, **settings})


@cache  # labs ask for the same plan more than once
def _planned(name: str, length: int, **settings: Any) -> MemoryPlan:
    return plan_training(known_config(name), "qlora", length=length, **settings)


def show_plans() -> dict[int, MemoryPlan]:
    """70B term by term for two lengths, and as the usual preparation would make it."""
    plans = {length: plan_70b(length) for length in (512, 2048)}
    fp32 = dict.fromkeys(("dtype", "adapter_dtype"), torch.float32)
    usual = plan_70b(2048, **fp32, loss=_whole_logits)
    bars = {f"{length:,}": plan for length, plan in plans.items()} | {"2,048, all but\nNF4 in fp32": usual}
    fig, ax = plots.figure(
        f"QLoRA of 70B needs {plans[512].peak / 1e9:.0f} to {plans[2048].peak / 1e9:.0f} GB at its worst "
        f"moment; a DGX Spark has {DGX_SPARK.available / 1e9:.0f}",
        x="memory of one step (GB)",
        y="tokens per row",
        width=9.5,
        height=3.3,
        caption="planned, Llama-3.3-70B's shape, one row, LoRA r16 on all linear layers, checkpointing. "
        "Third bar: PEFT's usual preparation, all logits kept. Dotted: an idle DGX Spark, less 8 GiB.",
    )
    left, said = np.zeros(len(bars)), []
    grouped = {name for names in GROUPS.values() for name in names}
    rest = {name for plan in bars.values() for name in plan.terms} - grouped
    groups = {**GROUPS, "one layer, logits, context": tuple(rest)}
    for (group, names), role in zip(groups.items(), plots.BAR, strict=True):
        sizes = [sum(plan.terms.get(name, 0) for name in names) / 1e9 for plan in bars.values()]
        ax.barh(list(bars), sizes, 0.6, left=left, label=group, **plots.BAR[role])
        left += sizes
        said.append(f"{group} {', '.join(f'{size:.1f}' for size in sizes)}")
    ax.axvline(DGX_SPARK.available / 1e9, color=plots.INK, linestyle=":")
    ax.invert_yaxis()
    ax.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    totals = ", ".join(f"{plan.peak / 1e9:.1f}" for plan in bars.values())
    plots.show(fig, alt=f"Three stacked bars in GB, {totals} in all. {'; '.join(said)}.")
    return plans


def show_models(names: Sequence[str], length: int = 2048) -> None:
    """Other models in the same call: dense ones and mixtures of experts."""
    rows = []
    for name in names:
        plan = plan_70b(length, name)
        weights = sum(plan.terms.get(n, 0) for n in ("linear layers", "experts", TABLES))
        rows.append(
            {
                "model": name,
                "weights (GB)": f"{weights / 1e9:.1f}",
                "peak (GB)": f"{plan.peak / 1e9:.1f}",
                "where": plan.where,
                "on an idle DGX Spark": "fits" if plan.peak <= DGX_SPARK.available else "does not fit",
                "a step takes at least": f"{plan.floor(DATASHEET):.2f} s",
            }
        )
    show_table(
        rows, f"planned: QLoRA r16, one row of {length:,} tokens; with experts, notes on attention alone"
    )


def show_fit(plan: MemoryPlan) -> None:
    """A plan's terms, and whether an idle DGX Spark holds it."""
    print(plan)
    print(fit_report(plan, DGX_SPARK))


# ── how fast at most ────────────────────────────────────────────────────────────────────────────────────────


def show_floors(plans: Mapping[int, MemoryPlan]) -> dict[int, float]:
    """The least time of a 70B step on a DGX Spark, by its arithmetic and by its bytes."""
    rows = [
        {
            "tokens per row": length,
            "arithmetic (TFLOP)": f"{plan.flops / 1e12:.0f}",
            "seconds at 125 TFLOP/s": plan.flops / DATASHEET.flops,
            "at 93 (measured)": plan.flops / DGX_SPARK_SPEED.flops,
            "bytes moved (GB)": f"{plan.moved / 1e9:.0f}",
            "seconds at 273 GB/s": plan.moved / DATASHEET.bandwidth,
            "tokens/s at most": f"{length / plan.floor(DATASHEET):.0f}",
        }
        for length, plan in plans.items()
    ]
    show_table(rows, "QLoRA, Llama-3.3-70B's shape, one row; counted on tensors without memory, not measured")
    return {length: plan.floor(DATASHEET) for length, plan in plans.items()}


def show_published(length: int = 2048) -> float:
    """What published rates in tokens per second would need of the chip; returns the smallest excess."""
    rows, excess = [], []
    for name, method, rate in PUBLISHED:
        plan = plan_training(known_config(name), method, length=length, checkpointing=False)
        needed = rate * plan.flops / length
        excess.append(needed / DATASHEET.flops)
        rows.append(
            {
                "model": name,
                "method": method,
                "published tokens/s": f"{rate:,.0f}",
                "GFLOP per token": f"{plan.flops / length / 1e9:.0f}",
                "needs (TFLOP/s)": f"{needed / 1e12:,.0f}",
                "times 125": f"{excess[-1]:.0f}",
                "tokens/s at most": f"{length / plan.floor(DATASHEET):,.0f}",
            }
        )
    show_table(
        rows, "arithmetic without checkpointing, so the least there is; 125 TFLOP/s: dense bf16, datasheet"
    )
    return min(excess)


def show_gpu_runs() -> float:
    """All 80 layers on a GPU, as measured and stored; returns how far off their plan at most, in %."""
    run = next(run for run in giant.stored() if run["model"] == "Llama-3.3-70B")
    rows, off = [], []
    for one in run["runs"]:
        context = one["planned terms"]["CUDA context"]  # of the process, not of torch
        planned, took = one["planned peak bytes"] - context, one["peak bytes"]
        from_device = one["reserved bytes"] + one["context bytes"]
        off.append(took / planned - 1)
        rows.append(
            {
                "tokens per row": f"{one['length']:,}",
                "planned (GB)": f"{planned / 1e9:.2f}",
                "torch allocated (GB)": f"{took / 1e9:.2f}",
                "off": f"{off[-1]:+.1%}",
                "with reserve and context (GB)": f"{from_device / 1e9:.2f}",
                "seconds a step": f"{one['seconds a step']:.1f}",
                "floor (seconds)": f"{one['floor seconds']:.1f}",
            }
        )
    where = f"{run['device']}, {run['date']}, torch {run['versions']['torch']}"
    how = "random weights, QLoRA r16, notes in fp32, one row, checkpointing"
    show_table(rows, f"{where}: Llama-3.3-70B's shape, {how}")
    return 100 * max(map(abs, off))


# ── what is free ────────────────────────────────────────────────────────────────────────────────────────────


def show_readings(plan: MemoryPlan) -> None:
    """One plan, one machine, and the two numbers that call themselves free memory."""
    for name, free in READINGS.items():
        room = MemoryBudget(f"by {name}", True, DGX_SPARK.total, round(free * GIB), DGX_SPARK.reserve)
        print(f"{name}: {fit_report(plan, room)}\n")


def show_refusal(rows: int = 64, length: int = 2048) -> None:
    """Ask the guard for a far too large step of the embedded model; it plans it, and nothing is allocated."""
    model = add_adapters(load_model(EMBEDDED, dtype=torch.float32)[0], AdapterConfig(rank=16)).train()
    ids = torch.arange(length) % 1000 + torch.arange(rows)[:, None]
    labels = torch.where(torch.arange(length) < length - 32, IGNORE, ids)  # answers of 32 tokens
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    try:
        Guard(model).check({key: tensor.to(model.device) for key, tensor in batch.items()})
        print("this machine has room even for that")
    except MemoryError as refusal:
        print(f"refused: {refusal}")
