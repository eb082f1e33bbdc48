"""What lab 3.1.8 shows: answers, sums and means, the family of losses, four methods compared, their cost."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from spark_ft.data.judge import is_metric
from spark_ft.evaluation import generate
from spark_ft.lab import plots
from spark_ft.lab.experiments import lab_3_1_8 as experiment
from spark_ft.lab.experiments.preferences import SOUND, loops, pairs, prefer, questions
from spark_ft.lab.experiments.runner import load
from spark_ft.lab.study import detectable, show_table, verdict
from spark_ft.methods import preference
from spark_ft.stats import Estimate, mean_interval, paired_difference
from spark_ft.training import Loss

METHODS, STEPS = experiment.METHODS, experiment.STEPS
GOOD = "good answers (points)"


# ── it works ────────────────────────────────────────────────────────────────────────────────────────────────


def answers(model: nn.Module, tokenizer, count: int = 3) -> list[str]:
    """What the model writes to a few test questions, greedily."""
    return generate(model, tokenizer, questions("test")[:count], max_new_tokens=48, batch_size=count)


def show_answers(before: Sequence[str], after: Sequence[str]) -> None:
    """Questions, and the answers before and after the training, side by side."""
    asked = questions("test")[: len(before)]
    rows = [{"question": q, "before": b, "after": a} for q, b, a in zip(asked, before, after, strict=True)]
    show_table(rows, "greedy, at most 48 tokens; questions about things that no training pair is about")


def first_steps(loss: Loss, method: str, steps: int) -> list[float]:
    """The losses of a run's first steps with a method's own rate, seed 0."""
    rate = experiment.TUNED[method]
    return prefer(pairs("train"), 0, loss, learning_rate=rate, first=steps, **STEPS)[1].losses


# ── sums and means ──────────────────────────────────────────────────────────────────────────────────────────


def show_sum_and_mean(rows: Sequence[dict], logps: Tensor, tokens: Tensor) -> None:
    """How often sum and mean prefer the shorter answer, and a pair in which they disagree.

    Args:
        logps, tokens: (2, pairs) of chosen and rejected, from `pair_logps`.
    """
    means = logps / tokens
    shorter = tokens[0] < tokens[1]
    unequal = tokens[0] != tokens[1]
    found = []
    for name, numbers in (("the sum", logps), ("the mean", means)):
        prefers_shorter = ((numbers[0] > numbers[1]) == shorter)[unequal]
        found.append(
            {
                "what decides": name,
                "prefers the shorter answer": f"{int(prefers_shorter.sum())} of {int(unequal.sum())}",
                "prefers the chosen answer": f"{int((numbers[0] > numbers[1]).sum())} of {len(rows)}",
            }
        )
    show_table(
        found, "pairs of kitchen_preferences' test set; pairs of equal length decide nothing on length"
    )
    disagree = (logps[0] > logps[1]) != (means[0] > means[1])
    gap = ((tokens[0] - tokens[1]).abs() * disagree).argmax().item()
    shown = [
        {
            "answer": rows[gap][side],
            "tokens": int(tokens[i, gap]),
            "sum (nats)": f"{logps[i, gap]:.1f}",
            "mean (nats per token)": f"{means[i, gap]:.2f}",
        }
        for i, side in enumerate(("chosen", "rejected"))
    ]
    count = int(disagree.sum())
    show_table(
        shown,
        f"one of the {count} pairs (of {len(rows)}) in which sum and mean disagree: {rows[gap]['prompt']}",
    )


def show_suspicious(loss: Callable[..., Tensor], logps: Tensor, tokens: Tensor, count: int = 6) -> None:
    """Some pairs' losses under a suspicious ORPO, and who is shorter."""
    chosen, rejected = (x.clone().requires_grad_() for x in logps[:, :count])
    losses = loss(chosen, rejected, tokens[0, :count], tokens[1, :count])
    nll = -logps[0, :count].sum() / tokens[0, :count].sum()
    rows = [
        {
            "pair": i + 1,
            "tokens, chosen": int(tokens[0, i]),
            "tokens, rejected": int(tokens[1, i]),
            "loss": f"{losses[i].item():.2f}",
            "of it NLL": f"{nll:.2f}",
            "−log σ(…)": f"{(losses[i].item() - nll.item()) / 0.1:.2f}",
        }
        for i in range(count)
    ]
    show_table(rows, "the first pairs, before any preference training; λ = 0.1")


# ── the family ──────────────────────────────────────────────────────────────────────────────────────────────

TOKENS = 35  # of a mean answer of kitchen_preferences: a margin per token is this many times larger in all
START = -2.6  # log-probability per token of either answer before training


def _curves() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each loss as a function of the margin in nats per token, both answers moving half of it."""

    def referred(loss: Callable[..., Tensor], tokens: int = 1) -> Callable[[Tensor], Tensor]:
        def of_margin(margin: Tensor) -> Tensor:
            zero = torch.zeros_like(margin)
            return loss(tokens * margin / 2, -tokens * margin / 2, zero, zero)

        return of_margin

    def alone(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda margin: loss(START + margin / 2, START - margin / 2)

    def orpo(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference.orpo_loss(chosen, rejected, 0.0, weight=1.0)

    return {
        "DPO, β 0.1": referred(preference.dpo_loss, TOKENS),
        "IPO, β 1": referred(partial(preference.ipo_loss, beta=1.0)),
        "SimPO, β 2, γ 1": alone(partial(preference.simpo_loss, beta=2.0, gamma=1.0)),
        "ORPO's comparison": alone(orpo),
        "cDPO, ε 0.1": referred(preference.cdpo_loss, TOKENS),
        "robust DPO, ε 0.1": referred(preference.robust_dpo_loss, TOKENS),
        "APO-zero": referred(preference.apo_zero_loss, TOKENS),
        "APO-down": referred(preference.apo_down_loss, TOKENS),
        "DPO on means, β 2": referred(partial(preference.dpo_loss, beta=2.0)),
    }


def _with_push(loss: Callable[[Tensor], Tensor], margin: Tensor) -> tuple[Tensor, Tensor]:
    x = margin.clone().requires_grad_()
    value = loss(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), -slope


def show_push(loss: Callable[..., Tensor], beta: float, gamma: float) -> None:
    """SimPO's push over the margin per token, and where it has fallen to half."""
    margin = torch.linspace(-2, 4, 121)
    _, push = _with_push(lambda m: loss(START + m / 2, START - m / 2), margin)
    half = gamma / beta
    title = f"SimPO with β = {beta:g}, γ = {gamma:g}: half of the push is left at {half:.2g} nats per token"
    fig, ax = plots.figure(
        title,
        x="margin: chosen − rejected (nats per token)",
        y="push",
        caption="minus the slope of simpo_loss; computed, not measured",
        height=3.0,
    )
    ax.plot(margin, push, **{**plots.LINE["yours"], "marker": ""})
    ax.axvline(half, **{**plots.LINE["control"], "marker": "", "color": plots.INK})
    ax.annotate("γ/β", (half, 0), xytext=(4, 4), textcoords="offset points")
    ends = f"{push[0]:.2g} at a margin of −2 to {push[-1]:.2g} at 4"
    plots.show(fig, alt=f"The push falls from {ends}; at γ/β = {half:.2g} it is {beta / 2:.2g}.")


def show_family() -> None:
    """Every loss of the family and its push over one margin, drawn from the package's functions."""
    margin = torch.linspace(-1, 2, 121)
    roles = ("yours", "package", "reference", "other", "control")
    fig, axes = plots.figure(
        "Where a loss stops: DPO, SimPO and ORPO flatten, IPO and cDPO pull back beyond their target",
        x="margin gained (nats per token)",
        columns=2,
        width=10.0,
        height=4.2,
        caption=f"From methods/preference.py; both answers start at {START} nats per token and move half the "
        f"margin each; sums are over {TOKENS} tokens.",
    )
    dashes, said = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (2, 1))), []
    for number, (name, loss) in enumerate(_curves().items()):
        value, push = _with_push(loss, margin)
        line = plots.LINE[roles[number % len(roles)]]
        style = {"color": line["color"], "linewidth": 2.0 if number < 4 else 1.1}
        style |= {"linestyle": "-" if number < 4 else dashes[number - 4]}
        axes[0].plot(margin, value, label=name, **style)
        axes[1].plot(margin, push / push.abs().max(), **style)
        zero = (push[:-1] > 0) & (push[1:] <= 0)
        ends = (
            f"its push is zero at {margin[:-1][zero][0]:.1f}" if zero.any() else "its push never reaches zero"
        )
        said.append(f"{name}: {value[0]:.2g} at −1, {value[40]:.2g} at 0, {value[-1]:.2g} at 2; {ends}")
    axes[0].set_ylabel("loss (nats; IPO: nats² per token²)")
    axes[1].set_ylabel("push, as a share of its largest")
    axes[1].axhline(0, color=plots.INK, linewidth=0.8)
    axes[0].legend(fontsize=7.5)
    plots.show(fig, alt=f"Losses and their pushes over the margin. {'; '.join(said)}.")


def show_parity(parity: Mapping[str, Mapping[str, float]]) -> None:
    """How far a loss and its gradients are from TRL's, relative to the largest entry."""
    rows = [{"method": m} | {name: f"{x:.0e}" for name, x in found.items()} for m, found in parity.items()]
    show_table(
        rows, "relative differences, on the batch of TRL's own trainer; a small random model with LoRA"
    )


# ── the comparison ──────────────────────────────────────────────────────────────────────────────────────────


def show_rates() -> None:
    """What each method's rates gave on the validation cores; the one that was taken is marked."""
    rows = []
    for method, rates in experiment.RATES.items():
        for rate, found in rates.items():
            taken = " ← taken" if rate == experiment.TUNED[method] else ""
            rows.append({"method": method, "rate": f"{rate:g}{taken}", **found})
    show_table(rows, "one seed, 20 validation questions; good: metric and no loop; KL in nats per answer")


class Runs:
    """The runs that the lab compares, by name; a figure of one is a list with a number per seed."""

    def __init__(self):
        dpo, others, imitation = (
            load(name) for name in ("dpo_kitchen", "preference_methods", "orpo_imitation")
        )
        self.origin = others.origin()
        self.seeds = len(others["runs"])
        self.runs = {name: dpo.values(name)[: self.seeds] for name in ("before", "DPO")}
        self.runs |= {name: others.values(name) for name in METHODS[1:]}
        self.runs["NLL"] = imitation.values("NLL")

    def values(self, run: str, what: str) -> list[float]:
        """A stored figure, or the percentage of answers that are metric, sound, looping, cut or good.

        "sound" passes the guard (`judged`); "good" is metric, sound and does not loop.
        """
        return [self._one(figures, what) for figures in self.runs[run]]

    @staticmethod
    def _one(figures: Mapping[str, Any], what: str) -> float:
        if what in ("metric", "looping", "cut"):
            return 100 * figures[what] / figures["asked"]
        if what not in ("sound", "good"):
            return figures[what]
        sound = [logp is not None and logp >= SOUND for logp in figures["logps"]]
        if what == "good":
            both = zip(sound, figures["answers"], strict=True)
            sound = [passes and is_metric(text) and not loops(text) for passes, text in both]
        return 100 * sum(sound) / len(sound)


def _level(values: Sequence[float], digits: int = 0) -> str:
    found = mean_interval(values)
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def show_methods(stored: Runs) -> None:
    """Each method's judged answers after its run, mean and interval over the seeds."""
    rows = []
    for run in ("before", *METHODS):
        row = {"method": "SFT start" if run == "before" else run}
        row["rate"] = f"{experiment.TUNED[run]:g}" if run in experiment.TUNED else "–"
        row |= {f"{what} (%)": _level(stored.values(run, what)) for what in ("good", "metric")}
        row |= {f"{what} (%)": f"{mean(stored.values(run, what)):.0f}" for what in ("sound", "looping")}
        row["tokens"] = _level(stored.values(run, "tokens"))
        row["KL (nats)"] = _level(stored.values(run, "kl"), 2)
        rows.append(row)
    show_table(rows, f"{stored.runs['DPO'][0]['asked']} questions; mean [95% t interval]. {stored.origin}")


FIGURES = {GOOD: "good", "KL (nats)": "kl", "tokens": "tokens"}


def differences(stored: Runs) -> dict[str, dict[str, tuple[list[float], Estimate]]]:
    """Pair of methods → figure → the differences seed by seed, and their mean with its interval."""
    found: dict[str, dict[str, tuple[list[float], Estimate]]] = {}
    for one, other in combinations(METHODS, 2):
        for unit, what in FIGURES.items():
            ours, theirs = stored.values(one, what), stored.values(other, what)
            each = [a - b for a, b in zip(ours, theirs, strict=True)]
            found.setdefault(f"{one} − {other}", {})[unit] = each, paired_difference(ours, theirs)
    return found


def verdicts(stored: Runs) -> dict[str, str]:
    """Pair of methods → the verdict on good answers."""
    found = differences(stored).items()
    return {pair: verdict(figures[GOOD][1], "more", "less") for pair, figures in found}


def show_verdicts(stored: Runs) -> None:
    """The difference of every pair of methods, seed by seed, with its interval and its verdict."""
    found, said = differences(stored), verdicts(stored)
    told = sum(word != "cannot tell" for word in said.values())
    least = max(
        detectable(stored.values(a, "good"), stored.values(b, "good")) for a, b in combinations(METHODS, 2)
    )
    title = f"Good answers: {told or 'none'} of {len(found)} pairs of methods can be told apart"
    fig, axes = plots.figure(
        title,
        columns=3,
        width=10.0,
        height=3.8,
        caption="Crosses: differences seed by seed; mean and 95% t interval. A true difference of "
        f"{least:.0f} points would be found with 80% power. {stored.origin}.",
    )
    for ax, unit in zip(axes, FIGURES, strict=True):
        for place, figures in enumerate(found.values()):
            each, d = figures[unit]
            ax.plot(each, [place] * len(each), **{**plots.LINE["control"], "linestyle": ""})
            spread = [[d.value - d.low], [d.high - d.value]]
            ax.errorbar([d.value], [place], xerr=spread, capsize=3, **plots.LINE["yours"])
        ax.axvline(0, color=plots.INK, linewidth=0.8)
        ax.set_xlabel(f"difference in {unit}")
        ax.set_ylabel("pair of methods")
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.set_yticks(range(len(found)), list(found) if ax is axes[0] else [""] * len(found))
    rows = []
    for pair, figures in found.items():
        digits = {unit: 2 if what == "kl" else 1 for unit, what in FIGURES.items()}
        words = {u: f"{d.signed(digits[u])} {verdict(d, 'more', 'less')}" for u, (_, d) in figures.items()}
        rows.append({"pair": pair} | words)
    alt = "; ".join(f"{row['pair']}: " + ", ".join(f"{u} {row[u]}" for u in FIGURES) for row in rows)
    plots.show(fig, alt=f"{title}. {alt}.")
    show_table(rows, f"the first method less the second; mean and 95% t interval of {stored.seeds} seeds")


def show_nll(stored: Runs) -> None:
    """What ORPO and its NLL alone gain from the same start."""
    rows = []
    for what in ("metric", "good"):
        before, orpo, nll = (stored.values(run, what) for run in ("before", "ORPO", "NLL"))
        apart = paired_difference(orpo, nll)
        row = {"answers": what, "at the start (%)": f"{mean(before):.0f}"}
        row |= {"ORPO (%)": _level(orpo), "the NLL alone (%)": _level(nll)}
        row["ORPO − NLL (points)"] = f"{apart.signed(0)} {verdict(apart, 'more', 'less')}"
        row["of ORPO's gain, the NLL's"] = f"{(mean(nll) - mean(before)) / (mean(orpo) - mean(before)):.0%}"
        rows.append(row)
    show_table(rows, f"mean and 95% t interval. {stored.origin}")


# ── the cost ────────────────────────────────────────────────────────────────────────────────────────────────


def show_costs(costs: Mapping[str, tuple[int, float]]) -> None:
    """Memory and time of one step of each method, beside DPO's."""
    size, seconds = costs["DPO"]
    rows = [
        {
            "step": name,
            "extra memory (MB)": f"{bytes_ / 1e6:.0f}",
            "of DPO's": f"{bytes_ / size:.0%}",
            "CPU seconds": f"{time:.1f}",
            "of DPO's time": f"{time / seconds:.0%}",
        }
        for name, (bytes_, time) in costs.items()
    ]
    show_table(
        rows, "live: 4 pairs, LoRA r16 on all linear layers, fp32, CPU; one step each, forward and backward"
    )


def show_plans(plans: Mapping[str, Sequence[int]]) -> None:
    """What dropping the reference saves in each way of training."""
    rows = [
        {
            "way of training": name,
            "DPO (GB)": f"{dpo / 1e9:.1f}",
            "ORPO (GB)": f"{orpo / 1e9:.1f}",
            "saved": f"{1 - orpo / dpo:.0%}",
        }
        for name, (dpo, orpo) in plans.items()
    ]
    show_table(rows, "Qwen3-8B, bf16, 2 pairs of 1,024 tokens, checkpointing; planned, not measured on a GPU")


def headline(
    stored: Runs,
    parity: Mapping[str, Mapping[str, float]],
    costs: Mapping[str, tuple[int, float]],
    plans: Mapping[str, Sequence[int]],
) -> dict[str, float | str]:
    """The lab's numbers for the table of `make labs`."""
    numbers: dict[str, float | str] = {}
    for pair, figures in differences(stored).items():
        _, d = figures[GOOD]
        numbers[f"{pair}, {GOOD}"] = f"{d.signed(0)} {verdict(d, 'more', 'less')}"
    for method in METHODS:
        numbers[f"{method}, good (%)"] = mean(stored.values(method, "good"))
        numbers[f"{method}, KL (nats)"] = mean(stored.values(method, "kl"))
    numbers["ORPO's NLL alone, good (%)"] = mean(stored.values("NLL", "good"))
    numbers["ORPO's extra memory, of DPO's (%)"] = 100 * costs["ORPO"][0] / costs["DPO"][0]
    for name, (dpo, without) in plans.items():
        numbers[f"8B, saved without a reference: {name} (%)"] = 100 * (1 - without / dpo)
    numbers["against TRL, at most"] = max(x for each in parity.values() for x in each.values())
    return numbers
