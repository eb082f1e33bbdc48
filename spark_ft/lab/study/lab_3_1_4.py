"""What lab 3.1.4 shows: tickets, your loop's run, rates, scores beside a control, merging, a kill, plans."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spark_ft.adapters import AdapterConfig, adapters_disabled, add_adapters, merge_adapters
from spark_ft.evaluation import exact_match, generate, greedy_match
from spark_ft.lab import kitchen, plots
from spark_ft.lab.checks import is_stub
from spark_ft.lab.experiments.runner import Measurement
from spark_ft.lab.parity import relative_difference
from spark_ft.lab.study import show_table, workplace  # noqa: F401
from spark_ft.lab.tokens import show_tokens
from spark_ft.memory.machine import DGX_SPARK, budget
from spark_ft.memory.plan import plan_training
from spark_ft.memory.shapes import known_config
from spark_ft.models import PROFILES, load_model, profile
from spark_ft.scoring import Batch, sft_loss
from spark_ft.stats import Estimate, mean_interval, wilson_interval
from spark_ft.training import History, TrainConfig, cosine, train

Loss = Callable[[nn.Module, Batch], Tensor]
STEPS, WARMUP, BETAS = 20, 2, (0.9, 0.99)  # of the lab's short run


def kinds(test: Sequence[dict]) -> dict[str, list[dict]]:
    """The held-out orders by kind: seen phrasings, unseen ones, and unseen ones with unseen dishes."""
    return {
        "seen phrasings": [row for row in test if row["phrasing"] == "seen"],
        "unseen phrasings": [r for r in test if r["phrasing"] == "unseen" and r["dishes"] == "seen"],
        "unseen dishes too": [row for row in test if row["dishes"] == "unseen"],
    }


def order(row: Mapping[str, str]) -> str:
    """What the waiter wrote, without the line that asks for JSON."""
    return row["prompt"].split("\n", 1)[1]


def show_tickets(model: nn.Module, tokenizer, rows: Sequence[dict]) -> None:
    """Orders, and what the model writes without and with its notes, side by side."""
    orders = [row["prompt"] for row in rows]
    after = generate(model, tokenizer, orders, max_new_tokens=64)
    with adapters_disabled(model):
        before = generate(model, tokenizer, orders, max_new_tokens=64)
    show_table(
        [
            {"order": order(row), "before": b, "after 20 steps": a}
            for row, b, a in zip(rows, before, after, strict=True)
        ],
        "greedy answers of at most 64 tokens to held-out orders; rank 16, 20 steps of 4 orders, seed 0",
    )


def show_labels(tokenizer, batch: Batch) -> None:
    """The tokens of a batch's first row, those with a label marked."""
    real = batch["attention_mask"][0].bool()
    ids, labels = (batch[name][0][real] for name in ("input_ids", "labels"))
    show_tokens(tokenizer, ids.tolist(), (labels != -100).tolist())


# ── your loop trains ────────────────────────────────────────────────────────────────────────────────────────


def your_loss(mask: Callable, completion_loss: Callable, accumulated_loss: Callable) -> Loss:
    """A batch's mean loss from the learner's mask, loss of a row, and sum over rows."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        parts = []
        for ids, labels, real in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
        ):
            ids, learned = ids[real].tolist(), int((labels[real] != -100).sum())
            mine = torch.as_tensor(mask(ids[:-learned], ids[-learned:]), device=model.device)
            logits = model(torch.tensor([ids], device=model.device)).logits[0].float()
            parts.append((learned * completion_loss(logits, mine), learned))
        return accumulated_loss(parts)

    return loss


def train_yours(
    fine_tune: Callable,
    mask: Callable,
    completion_loss: Callable,
    accumulated_loss: Callable,
    rate: Callable,
    batches: Callable[[int], Batch],
) -> list[float]:
    """The lab's short run of seed 0 with everything that the learner wrote; the loss of each step."""
    model, _ = load_model()
    torch.manual_seed(0)
    add_adapters(model, AdapterConfig(rank=16))
    loss = your_loss(mask, completion_loss, accumulated_loss)
    peak = profile().learning_rate
    return fine_tune(model, batches, loss, STEPS, lambda step: rate(step, STEPS, peak, WARMUP))


def show_rate(peak: float, batches: Callable[[int], Batch], history: History, first: int = 10) -> None:
    """The first steps of the short run at another peak rate, beside the run at the profile's."""
    model, _ = load_model()
    torch.manual_seed(0)
    add_adapters(model, AdapterConfig(rank=16))
    part = (first - WARMUP) / (STEPS - WARMUP)
    config = TrainConfig(
        first,
        peak,
        warmup_steps=WARMUP,
        betas=BETAS,
        schedule=lambda progress: cosine(part * progress),
        progress=False,
    )
    losses = train(model, batches, sft_loss, config).losses
    usual = max(history.learning_rates)
    fig, ax = plots.figure(
        f"With a peak of {peak:g} the loss goes from {losses[0]:.2f} to {losses[-1]:.2f} in {first} steps",
        x="step",
        y="loss (nats per token)",
        caption=f"rank 16, steps of 4 kitchen tickets, warm-up {WARMUP} steps, seed 0: one run each",
        height=3.0,
    )
    steps = range(1, first + 1)
    ax.plot(steps, history.losses[:first], **plots.LINE["package"], label=f"peak {usual:g}")
    ax.plot(steps, losses, **plots.LINE["yours"], label=f"peak {peak:g}")
    ax.legend()
    said = f"{usual:g}: {history.losses[first - 1]:.2f}, {peak:g}: {losses[-1]:.2f}"
    plots.show(fig, alt=f"Loss over {first} steps at two peak rates. After them, {said}.")


# ── the whole run ───────────────────────────────────────────────────────────────────────────────────────────


def show_losses(history: History) -> None:
    """The loss of every step of the long run, on a log scale."""
    first, end = history.losses[0], sum(history.losses[-10:]) / 10
    fig, ax = plots.figure(
        f"The loss falls from {first:.2f} to {end:.3f}",
        x="step (8 orders each)",
        y="loss (nats per token)",
        caption="rank 16 on all linear layers, seed 0, this run; second number: mean of the last ten steps",
        height=3.0,
    )
    ax.plot(history.steps, history.losses, **{**plots.LINE["package"], "marker": ""})
    ax.set_yscale("log")
    plots.show(fig, alt=f"Training loss on a log scale: {first:.2f} at step 1, {end:.3f} at the end.")


def score(model: nn.Module, tokenizer, rows: Sequence[dict]) -> Estimate:
    """The share of tickets that the model writes exactly, with its Wilson interval."""
    right = greedy_match(model, tokenizer, rows)
    return wilson_interval(sum(right), len(right))


def show_scores(
    model: nn.Module, tokenizer, test: Sequence[dict], stored: Measurement
) -> dict[str, Estimate]:
    """Exact tickets before and after, by kind, beside the stored seeds and the stored control."""
    groups = kinds(test)
    with adapters_disabled(model):
        scores = {"before": score(model, tokenizer, groups["seen phrasings"])}
    scores |= {kind: score(model, tokenizer, rows) for kind, rows in groups.items()}
    keys = ("seen", "unseen phrasings", "unseen phrasings and dishes")
    seeds = {kind: stored.values(key) for kind, key in zip(groups, keys, strict=True)}
    seeds["control"] = stored.values("shuffled")
    scores["control"] = mean_interval(seeds["control"])
    assert scores["control"].value < 0.05, "shuffled answers must teach nothing, or the measure is broken"
    roles = dict(zip(scores, ("reference", "package", "other", "yours", "control"), strict=True))
    title = " and ".join(f"{scores[kind].value:.0%} with {kind}" for kind in groups)
    fig, ax = plots.figure(
        f"Right on held-out orders: {title}",
        x="orders",
        y="exact tickets (%)",
        caption=f"bars: this run, seed 0, Wilson 95% interval; control: shuffled answers, stored, mean and t "
        f"interval; dots: every stored seed; {stored.origin()}",
    )
    for place, (kind, found) in enumerate(scores.items()):
        low, high = max(0.0, found.low), min(1.0, found.high)
        error = [[100 * max(0.0, found.value - low)], [100 * max(0.0, high - found.value)]]
        ax.bar(place, 100 * found.value, yerr=error, capsize=4, **plots.BAR[roles[kind]])
        if kind in seeds:
            dots = [100 * value for value in seeds[kind]]
            ax.plot([place + 0.2] * len(dots), dots, "o", color=plots.INK, markersize=3)
    ax.set_xticks(range(len(scores)), [name.replace(" ", "\n", 1) for name in scores])
    ax.set_ylim(0, 105)
    said = "; ".join(f"{name} {found.percent()}" for name, found in scores.items())
    plots.show(fig, alt=f"Bars of exact tickets: {said}.")
    return scores


def show_answers(
    model: nn.Module, tokenizer, test: Sequence[dict], same_ticket: Callable[[str, str], bool], count: int = 4
) -> None:
    """A few orders of each kind, what was wanted, what the model writes, and the learner's verdict."""
    rows = [row for group in kinds(test).values() for row in group[:count]]
    answers = generate(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=64)
    right = exact_match(answers, [row["completion"] for row in rows])
    judge, told = "your verdict", "judged by your same_ticket"
    try:
        verdicts = [same_ticket(a, row["completion"]) for a, row in zip(answers, rows, strict=True)]
        other = sum(bool(a) != b for a, b in zip(verdicts, right, strict=True))
        told += f", which differs from spark_ft's exact_match on {other} of {len(rows)}"
    except Exception as error:
        stub = isinstance(error, NotImplementedError) and is_stub(error)
        why = "is not written yet" if stub else "raises an error"
        verdicts, judge, told = right, "right", f"your same_ticket {why}; judged by spark_ft's exact_match"
    show_table(
        [
            {
                "order": order(row),
                "wanted": row["completion"],
                "written": "the same" if answer == row["completion"] else answer,
                judge: "✓" if verdict else "✗",
            }
            for row, answer, verdict in zip(rows, answers, verdicts, strict=True)
        ],
        f"the first {count} held-out orders of each kind; {told}",
    )


# ── ship it, kill it ────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def show_merged(model: nn.Module, batch: Batch) -> float:
    """Merge the notes; how far the logits moved, as a share of the largest one."""
    given = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    real, layer = given["attention_mask"].bool(), model.model.layers[0].self_attn
    adapted, before = model(**given).logits[real], type(layer.q_proj).__name__
    merge_adapters(model)
    apart = relative_difference(model(**given).logits[real], adapted)
    print(f"a layer was a {before} and is a {type(layer.q_proj).__name__} now")
    print(f"merged against adapted: logits differ by {apart:.0e} of the largest")
    assert 0 < apart < 1e-5
    return apart


def kill_and_resume() -> tuple[int, int]:
    """Kill a short run at its first checkpoint and start it again; how many tensors equal a calm run's."""
    with tempfile.TemporaryDirectory() as place:
        killed, calm = Path(place) / "killed", Path(place) / "calm"
        command = f"from spark_ft.lab import kitchen; kitchen.short_run({str(killed)!r})"
        process = subprocess.Popen([sys.executable, "-c", command])
        while not list(killed.glob("step-*.safetensors")) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        how = "killed" if process.wait() < 0 else "it ended before the kill"
        print(f"{how}; left behind: {', '.join(sorted(path.name for path in killed.glob('step-*')))}")
        resumed, undisturbed = kitchen.short_run(killed), kitchen.short_run(calm)
    same = sum(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    print(f"{same} of {len(undisturbed)} trained tensors are equal, bit for bit")
    return same, len(undisturbed)


# ── larger models ───────────────────────────────────────────────────────────────────────────────────────────


def show_profiles() -> None:
    """What each machine trains, as the profiles say."""
    rows = [
        {
            "profile": each.name,
            "model": each.model or "embedded, 135M",
            "numbers": str(each.dtype).removeprefix("torch."),
            "steps": str(each.steps),
            "orders per step": f"{each.batch_size} in {each.gradient_accumulation_steps} part(s)",
            "peak rate": f"{each.learning_rate:g}",
        }
        for each in PROFILES.values()
    ]
    show_table(rows, f"this machine's profile: {profile().name}")


def show_plans(name: str, length: int = 2048) -> None:
    """Full, LoRA and QLoRA: what a step of a large model holds at its worst moment, and where it fits."""
    rows = []
    for method in ("full", "lora", "qlora"):
        plan = plan_training(known_config(name), method, length=length)
        weights = sum(plan.terms[part] for part in ("linear layers", "embeddings and head", "norms"))
        trained = sum(plan.terms.get(p, 0) for p in ("adapters", "gradients", "optimizer moments"))
        fits = {
            where: room.available is not None and plan.peak <= room.available
            for where, room in (("fits here", budget()), ("fits a DGX Spark", DGX_SPARK))
        }
        rows.append({
            "GB": f"{name}, {method}",
            "weights": f"{weights / 1e9:.1f}",
            "notes, gradients, moments": f"{trained / 1e9:.1f}",
            "the rest": f"{(plan.peak - weights - trained) / 1e9:.1f}",
            "at the peak": f"{plan.peak / 1e9:.1f}",
            **{where: "yes" if fit else "no" for where, fit in fits.items()},
        })  # fmt: skip
    show_table(
        rows, f"planned, not measured: one row of {length:,} tokens per step, with checkpointing, rank 16"
    )
