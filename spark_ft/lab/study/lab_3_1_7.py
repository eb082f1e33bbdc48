"""What lab 3.1.7 shows: answers side by side, the leash, a run's curves, judge and guard, β, plans."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from spark_ft.lab import plots
from spark_ft.lab.experiments import lab_3_1_7 as experiment
from spark_ft.lab.experiments.preferences import SOUND, score
from spark_ft.lab.experiments.runner import Measurement
from spark_ft.lab.study import show_sweep, show_table, verdict
from spark_ft.memory.machine import DGX_SPARK
from spark_ft.memory.plan import plan_training
from spark_ft.memory.shapes import known_config
from spark_ft.scoring import Batch
from spark_ft.stats import Estimate, paired_difference
from spark_ft.training import History

RUNS = {"before": "before", "DPO": "after DPO", "shuffled labels": "shuffled labels"}


def show_answers(asked: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    """Questions, and the answers before and after, side by side."""
    rows = [{"question": q, "before": b, "after": a} for q, b, a in zip(asked, before, after, strict=False)]
    show_table(rows, "greedy; questions about things that no training pair is about; before: stored, seed 0")


# ── from Bradley and Terry to the loss ──────────────────────────────────────────────────────────────────────


def show_leash(reference: Tensor, reward: Tensor, policies: Mapping[str, Tensor]) -> None:
    """Some answers' probabilities under each policy, and what reward and drift it has."""
    rows = []
    for name, policy in policies.items():
        drift = (policy * (policy / reference).log()).sum().item()
        shares = {f"answer {i}": f"{p:.0%}" for i, p in enumerate(policy.tolist(), 1)}
        rows.append({"policy": name, **shares, "reward": (policy @ reward).item(), "KL (nats)": drift})
    show_table(rows, "three answers, computed exactly")


def show_pull(loss: Callable[..., Tensor], beta: float) -> None:
    """How strongly each pair still pulls: the loss's slope over the margin, at a β and at 0.1."""
    fig, ax = plots.figure(
        f"At β = {beta:g} a pair stops pulling at a margin of some {math.log(19) / beta:.3g} nats",
        x="margin: (log π − log π_ref) of chosen − of rejected (nats)",
        y="pull: slope / β",
        caption="computed from the loss by autograd; below 0.05 a pair is as good as satisfied",
    )
    margins = torch.linspace(-20, 60, 161, requires_grad=True)
    none = torch.zeros_like(margins)
    for role, value in (("yours", beta), ("control", 0.1)):
        (slope,) = torch.autograd.grad(loss(margins, none, none, none, beta=value).sum(), margins)
        style = {**plots.LINE[role], "marker": ""}
        ax.plot(margins.detach(), -slope / value, label=f"β = {value:g}", **style)
    ax.axhline(0.05, color=plots.INK, linewidth=0.8)
    ax.legend()
    plots.show(
        fig,
        alt=f"The pull falls from 1 to 0 as the margin grows; at β = {beta:g} it passes 0.05 at "
        f"{math.log(19) / beta:.3g} nats, at β = 0.1 at 29 nats.",
    )


# ── a run ───────────────────────────────────────────────────────────────────────────────────────────────────


def show_training(history: History) -> None:
    """How far each step's pairs have moved from the reference, and the margin with its loss."""
    steps, found = history.steps, history.metrics
    beta = experiment.SETTINGS["beta"]
    gains = {side: [x / beta for x in found[f"{side}_reward"]] for side in ("chosen", "rejected")}
    ends = {side: mean(values[-4:]) for side, values in gains.items()}
    said = {side: f"{'risen' if x > 0 else 'fallen'} by {abs(x):.1f} nats" for side, x in ends.items()}
    fig, (left, other) = plots.figure(
        f"At the end chosen has {said['chosen']}, rejected has {said['rejected']}",
        caption=f"embedded model from its SFT start, LoRA r16, {len(steps)} steps of 4 new pairs, seed 0; "
        "measured from the reference, since every step has other pairs",
        columns=2,
        width=9.5,
        x="optimizer step",
    )
    for role, (side, values) in zip(("yours", "package"), gains.items(), strict=True):
        left.plot(steps, values, label=side, **plots.LINE[role])
    left.set_ylabel("log π − log π_ref (nats per answer)")
    left.axhline(0, color=plots.INK, linewidth=0.8)
    left.legend()
    for role, name, values in (
        ("reference", "margin", found["margin"]),
        ("other", "accuracy", found["accuracy"]),
    ):
        other.plot(steps, values, label=name, **plots.LINE[role])
    other.set_ylabel("margin (β · nats); accuracy (share)")
    other.legend()
    plots.show(
        fig,
        alt=f"Left: at the end chosen has {said['chosen']}, rejected has {said['rejected']}. Right: the "
        f"margin of the rewards goes from {found['margin'][0]:.2f} to {mean(found['margin'][-4:]):.2f}.",
    )


# ── the judge, and what keeps it honest ─────────────────────────────────────────────────────────────────────


def shares(stored: Measurement, name: str, what: str) -> list[float]:
    """Each seed's share of answers that are metric, sound, looping or cut, in percent."""
    return [100 * score(run["figures"][name], what).value for run in stored["runs"]]


def gain(stored: Measurement, name: str = "DPO") -> Estimate:
    """Points of metric answers that a run gained on the start it began from, over the seeds."""
    return paired_difference(shares(stored, name, "metric"), shares(stored, "before", "metric"))


def show_judged(stored: Measurement, live: dict[str, Any]) -> None:
    """The judge's score, and the guard, lengths and drift beside it: the seeds' means, and this run."""
    rows = []
    for key, name in RUNS.items():
        found = {what: mean(shares(stored, key, what)) for what in ("metric", "sound", "looping", "cut")}
        lengths, drifts = stored.values(key, "tokens"), stored.values(key, "kl")
        rows.append(_row(f"{name}, {len(lengths)} seeds", found, mean(lengths), mean(drifts)))
    found = {what: 100 * score(live, what).value for what in ("metric", "sound", "looping", "cut")}
    rows.append(_row("after DPO, this run", found, live["tokens"], live["kl"]))
    here = f"{live['asked']} of them: {score(live).percent()} metric"
    show_table(rows, f"50 held-out questions, in this run {here}; {stored.origin()}")


def _row(name: str, found: dict[str, float], tokens: float, drift: float) -> dict[str, str]:
    percent = {
        "metric": found["metric"],
        "pass the guard": found["sound"],
        "loop": found["looping"],
        "cut off": found["cut"],
    }
    return {
        "": name,
        **{column: f"{value:.0f}%" for column, value in percent.items()},
        "tokens": f"{tokens:.0f}",
        "KL (nats)": f"{drift:.2f}",
    }


def show_gains(stored: Measurement) -> None:
    """Points gained on the start: on true labels, and on shuffled ones; each seed, mean and interval."""
    gains = {"true labels": gain(stored), "shuffled labels": gain(stored, "shuffled labels")}
    found = (verdict(x, "gain", "lose") for x in gains.values())
    true, shuffled = (f"{'nothing measurable' if x == 'cannot tell' else x}" for x in found)
    value = gains["true labels"].value
    fig, ax = plots.figure(
        f"True labels {true} {value:.0f} points; shuffled labels {shuffled if shuffled != true else 'too'}",
        x="points of metric answers gained on the SFT start",
        y="trained on",
        caption=f"dots: seeds; line: mean and 95% t interval; 50 held-out questions; {stored.origin()}",
        height=2.6,
    )
    for place, (name, estimate) in enumerate(gains.items()):
        key = "DPO" if name == "true labels" else name
        seeds = [a - b for a, b in zip(*(shares(stored, k, "metric") for k in (key, "before")), strict=True)]
        ax.plot(seeds, [place] * len(seeds), **{**plots.LINE["control"], "linestyle": ""})
        spread = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
        ax.errorbar([estimate.value], [place], xerr=spread, capsize=3, **plots.LINE["yours"])
    ax.axvline(0, color=plots.INK, linewidth=0.8)
    ax.set_yticks(range(len(gains)), list(gains))
    ax.set_ylim(len(gains) - 0.5, -0.5)
    said = "; ".join(f"{name} {estimate.signed(0)}" for name, estimate in gains.items())
    plots.show(fig, alt=f"Points gained with 95% intervals: {said}.")


def show_guard(kitchen: Measurement, fooled: Measurement) -> None:
    """Every answer's log-probability per token under its reference, and the threshold."""
    groups = {
        "before": [x for run in kitchen["runs"] for x in run["figures"]["before"]["logps"]],
        "after DPO": [x for run in kitchen["runs"] for x in run["figures"]["DPO"]["logps"]],
        "rate 1e-3": [x for run in fooled["runs"] for x in run["figures"]["logps"]],
    }
    under = {name: mean(x is None or x < SOUND for x in values) for name, values in groups.items()}
    fig, ax = plots.figure(
        f"The guard stops {under['rate 1e-3']:.0%} of the broken run's answers, and "
        f"{under['after DPO']:.0%} of DPO's",
        x="log-probability of an answer under the reference (nats per token)",
        y="answers of",
        caption=f"one mark per answer to 50 held-out questions; line: the guard, {SOUND:g}; stored, DPO "
        f"{len(kitchen['runs'])} seeds, rate 1e-3 {len(fooled['runs'])}",
        height=2.8,
    )
    for place, (role, (_, values)) in enumerate(
        zip(("reference", "yours", "package"), groups.items(), strict=True)
    ):
        drawn = [x for x in values if x is not None]
        aside = [place + 0.25 * math.sin(12.9 * i) for i in range(len(drawn))]
        ax.plot(drawn, aside, **{**plots.LINE[role], "linestyle": "", "markersize": 3})
    ax.axvline(SOUND, color=plots.INK, linewidth=1)
    ax.set_yticks(range(len(groups)), list(groups))
    ax.set_ylim(len(groups) - 0.5, -0.5)
    said = ", ".join(f"{share:.0%} of {name}" for name, share in under.items())
    plots.show(fig, alt=f"Answers by log-probability under the reference; below {SOUND:g} lie {said}.")


def drifts(kitchen: Measurement, sweep: Measurement) -> dict[float, list[float]]:
    """β → each seed's drift on the sweep's questions, in nats per answer."""
    count, seeds = sweep["settings"]["questions of the sweep"], [run["seed"] for run in sweep["runs"]]
    own = [mean(kitchen.figures(seed)["DPO"]["kls"][:count]) for seed in seeds]
    betas = sweep["settings"]["other betas"]
    return {sweep["settings"]["beta"]: own} | {beta: sweep.values(beta, "kl") for beta in betas}


def show_beta_sweep(kitchen: Measurement, sweep: Measurement) -> None:
    """How far the answers drift from the reference at each β."""
    found = drifts(kitchen, sweep)
    first, *_, last = found.values()
    rises, falls = "More β, more drift: the KL rises", "More β, less drift: the KL falls"
    title = verdict(paired_difference(last, first), rises, falls)
    title = "Cannot tell whether the KL falls" if title == "cannot tell" else title
    show_sweep(
        f"{title} from {mean(first):.2f} to {mean(last):.2f} nats as β rises from {min(found):g} to "
        f"{max(found):g}",
        {"DPO": found},
        x="β",
        y="KL (nats per answer)",
        caption=f"{sweep['settings']['steps']} steps, the same start and questions; {sweep.origin()};",
    )


# ── speed and size ──────────────────────────────────────────────────────────────────────────────────────────


def show_speed(
    model: nn.Module, batch: Batch, losses: Mapping[str, Callable], rounds: int = 2
) -> dict[str, float]:
    """Seconds of each loss's forward and backward on one batch, in turns; their gradients must be equal."""
    trained = [p for p in model.parameters() if p.requires_grad]
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    gradients = {}
    for _ in range(rounds + 1):  # the first round warms up, and computes what is kept
        for name, loss in losses.items():
            started = time.perf_counter()
            found = torch.autograd.grad(loss(model, batch)[0], trained)
            seconds[name].append(time.perf_counter() - started)
            gradients[name] = torch.cat([g.flatten() for g in found])
    first, *others = gradients.values()
    apart = max(((other - first).norm() / first.norm()).item() for other in others)
    times = {name: median(each[1:]) for name, each in seconds.items()}
    slowest = max(times.values())
    rows = [
        {"step": name, "seconds": value, "times as fast": f"{slowest / value:.1f}"}
        for name, value in times.items()
    ]
    show_table(
        rows, f"median of {rounds}, in turns, on this machine; gradients differ by {apart:.0e} (relative)"
    )
    assert apart < 1e-4, "two ways to the same gradient must agree"
    return times


def show_plans(names: Sequence[str] = ("Qwen3-8B", "Llama-3.3-70B"), length: int = 1024) -> dict[str, float]:
    """What a step of DPO on one pair holds at its worst moment, in GB, and whether a DGX Spark has it."""
    rows, peaks = [], {}
    for name in names:
        for method in ("qlora",):
            plan = plan_training(known_config(name), method, task="preference", length=length)
            peaks[f"{name} {method}"] = plan.peak / 1e9
            fits = plan.peak <= DGX_SPARK.available
            weights = sum(plan.terms.get(x, 0) for x in ("linear layers", "embeddings and head", "norms"))
            rows.append(
                {
                    "model": name,
                    "method": {"lora": "LoRA, bf16", "qlora": "QLoRA, NF4"}[method],
                    "weights (GB)": f"{weights / 1e9:.1f}",
                    "peak (GB)": f"{plan.peak / 1e9:.1f}",
                    "fits a DGX Spark": "yes" if fits else "no",
                }
            )
    show_table(
        rows, f"planned, not measured: one pair of two rows of {length} tokens, rank 16, checkpointing"
    )
    return peaks


def first_steps(loss: Callable, steps: int) -> History:
    """The first steps of the seed-0 run with another loss."""
    return experiment.tune_dpo(0, loss=loss, first=steps)[1]
