"""What lab 3.1.9 shows: values of gains, flipped and lopsided thumbs, thumbs beside pairs, the KL's batch."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from spark_ft.data.judge import IMPERIAL, is_metric
from spark_ft.lab import plots
from spark_ft.lab.checks import is_stub
from spark_ft.lab.experiments.runner import Measurement
from spark_ft.lab.study import show_differences, show_table, verdict
from spark_ft.stats import Estimate, paired_difference

MODEL = "Embedded model, KTO from the SFT start, 14 steps of 8 thumbs."
BATCHES = (2, 4, 8, 16, 32)
DRAWS = 400  # batches drawn of each size


def metric(figures: Mapping[str, Any], asked: int = 25) -> float:
    """Percent of the first answers that the judge passes: metric units, and no others."""
    return 100 * mean(is_metric(answer) for answer in figures["answers"][:asked])


def imperial(figures: Mapping[str, Any], asked: int = 25) -> float:
    """Percent of the first answers that hold a cup, an ounce, an inch or a degree Fahrenheit."""
    return 100 * mean(bool(IMPERIAL.search(answer)) for answer in figures["answers"][:asked])


def of(stored: Measurement, run: str, what: Callable[[Mapping[str, Any]], float] = metric) -> list[float]:
    """One number of a stored run for every seed."""
    return [what(figures) for figures in stored.values(run)]


# ── It works ────────────────────────────────────────────────────────────────────────────────────────────────


def show_answers(questions: Sequence[str], stored: Measurement, after: Sequence[str]) -> None:
    """A table of answers before (the first test questions', stored) and after, each with the judge's mark."""
    before = stored.figures(0)["before"]["answers"]
    marks = {True: "✓ ", False: "· "}
    show_table(
        [
            {"question": q, "before": marks[is_metric(a)] + a, "after": marks[is_metric(b)] + b}
            for q, a, b in zip(questions, before, after, strict=False)
        ],
        "✓: measured in metric units and in no others. Before: the start, stored. After: your run.",
    )


# ── Build it ────────────────────────────────────────────────────────────────────────────────────────────────


def show_values(yours: Callable[[Tensor], Tensor], beta: float = 0.1) -> None:
    """Draw what a gain is worth to people, and to KTO for a thumb up and a thumb down."""
    gain = torch.linspace(-60, 60, 241)
    by_hand = torch.where(gain < 0, -2.25 * gain.abs() ** 0.88, gain.abs() ** 0.88)
    try:
        felt, whose = yours(gain), "yours"
    except Exception as error:
        stub = isinstance(error, NotImplementedError) and is_stub(error)
        print("exercise 1 is not written yet" if stub else f"exercise 1: {error}", "– drawn by spark_ft")
        felt, whose = by_hand, "spark_ft's"
    fig, (left, right) = plots.figure(
        "People feel a loss more than a gain; KTO's value is flat at both ends",
        caption=f"Left: {whose}, power 0.88, losses × 2.25. Right: KTO's σ, β = {beta}, weights 1.",
        columns=2,
        width=9.0,
        height=3.2,
    )
    left.plot(gain, torch.as_tensor(felt), **{**plots.LINE["yours"], "marker": ""})
    left.set(xlabel="gain (dollars)", ylabel="how it feels")
    for sign, role, name in ((1, "yours", "thumb up"), (-1, "package", "thumb down")):
        value = torch.sigmoid(sign * beta * gain)
        right.plot(gain, value, **{**plots.LINE[role], "marker": ""}, label=name)
    right.set(xlabel="log π − log π_ref − z (nats)", ylabel="value, σ")
    right.legend(loc="center left")
    for ax in (left, right):
        ax.axvline(0, color=plots.INK, linewidth=0.6)
    down, up = by_hand[40].item(), by_hand[200].item()
    plots.show(
        fig,
        alt=f"Left, an S-curve with a kink at zero: a gain of 40 feels like {up:.0f}, a loss of 40 like "
        f"{down:.0f}. Right, two smooth S-curves that cross at one half where the gain is zero: rising for a "
        "thumb up, falling for a thumb down, and flat beyond 40 nats on either side.",
    )


def spread(gains: Sequence[float], batch: int, draws: int = DRAWS) -> tuple[Estimate, float]:
    """The middle and the central 95% of a batch's mean gain, and how often the mean is below zero."""
    rng = random.Random(batch)
    means = sorted(mean(rng.choices(gains, k=batch)) for _ in range(draws))
    below = sum(m < 0 for m in means) / draws
    return Estimate(mean(means), means[int(0.025 * draws)], means[int(0.975 * draws)]), below


def show_reference_points(stored: Measurement, batch: int, seed: int = 0) -> None:
    """Draw how far the KL estimate of one batch can be off, by the batch's size; the chosen size marked."""
    gains = stored.figures(seed)["gains"]["mismatched"]
    if batch not in range(2, len(gains) + 1):
        raise ValueError(f"a batch of {batch}; choose 2 to {len(gains)} rows")
    found = {size: spread(gains, size)[0] for size in sorted({*BATCHES, batch})}
    chosen, below = spread(gains, batch)
    fig, ax = plots.figure(
        f"One batch of {batch} finds anything from {chosen.low:.1f} to {chosen.high:.1f} nats",
        x="mismatched pairs in the batch",
        y="their mean gain (nats)",
        caption=f"After training, seed {seed}: {len(gains)} mismatched pairs with mean {mean(gains):.2f}. "
        f"Bars hold 95% of {DRAWS} batches drawn from them with replacement.",
    )
    for place, (size, point) in enumerate(found.items()):
        bars = [[point.value - point.low], [point.high - point.value]]
        ax.errorbar(
            place, point.value, yerr=bars, capsize=4, **plots.LINE["package" if size == batch else "yours"]
        )
    ax.set_xticks(range(len(found)), [str(size) for size in found])
    ax.axhline(0, color=plots.INK, linewidth=0.8)
    said = "; ".join(f"{size}: {p.low:.1f} to {p.high:.1f}" for size, p in found.items())
    plots.show(fig, alt=f"Spread of a batch's mean gain in nats, by rows in the batch. {said}.")
    shift = 0.1 * (chosen.high - chosen.low) / 2
    print(f"{batch} rows: the mean is below zero, and z is 0, in {below:.0%} of the batches.")
    lost = math.tanh(shift / 2) ** 2  # 1 − σ'(shift) / σ'(0)
    print(f"So σ sees a shift of up to {shift:.2f} (β = 0.1): its slope falls by up to {lost:.1%}.")


# ── Is it true? ─────────────────────────────────────────────────────────────────────────────────────────────


def show_flipped(thumbs: Measurement, pairs: Measurement) -> dict[str, Estimate]:
    """Draw metric and imperial answers before, after KTO, and after KTO on flipped thumbs."""
    start = pairs.values("before")[: len(thumbs["runs"])]  # the same answers for every seed
    change = {
        name: paired_difference(of(thumbs, name), [*map(metric, start)]) for name in ("thumbs", "flipped")
    }
    more = paired_difference(of(thumbs, "flipped", imperial), [*map(imperial, start)])
    told = [
        part
        for part in (
            verdict(change["thumbs"], "true thumbs teach grams", "true thumbs lose grams"),
            verdict(more, "flipped ones teach cups", "flipped ones lose cups"),
        )
        if part != "cannot tell"
    ]
    _show_runs(
        "; ".join(told).capitalize() or "Cannot tell",
        {
            "before": start,
            "true thumbs": thumbs.values("thumbs"),
            "flipped thumbs": thumbs.values("flipped"),
        },
        f"Metric less before: {change['thumbs'].signed(0)}, flipped {change['flipped'].signed(0)} points.",
    )
    return {**change, "flipped, imperial": more}


def show_weights(lopsided: Measurement, pairs: Measurement) -> dict[str, Estimate]:
    """Draw what 10 thumbs up and 100 down teach with equal and with balanced weights, and a table beside."""
    equal, balanced = (lopsided.values(f"{name} weights") for name in ("equal", "balanced"))
    found = {
        "metric": paired_difference([*map(metric, balanced)], [*map(metric, equal)]),
        "drift": paired_difference([run["kl"] for run in balanced], [run["kl"] for run in equal]),
    }
    more = verdict(found["metric"], "balanced weights teach more grams", "equal weights teach more grams")
    if more == "cannot tell":
        more = "by their answers we cannot tell the two weights apart"
    runs = {
        "before": pairs.values("before"),
        "equal weights\n1 and 1": equal,
        "balanced weights\n10 and 1": balanced,
    }
    change = f"Metric, balanced less equal: {found['metric'].signed(0)} points."
    _show_runs(f"10 up, 100 down: {more}", runs, change)
    drifts = [run["kl"] for run in balanced], [run["kl"] for run in equal]
    drift = verdict(found["drift"], "balanced weights drift further", "balanced weights drift less")
    show_differences(
        f"Drift from the start: {drift}",
        {"balanced − equal": drifts},
        unit="difference in KL (nats per answer)",
        caption="Embedded model, 14 steps of 8 thumbs, 25 questions.",
    )
    table = [
        {
            "weights": name.replace("\n", ", "),
            "metric only (%)": mean(map(metric, each)),
            "some imperial (%)": mean(map(imperial, each)),
            "loops (%)": mean(100 * run["looping"] / run["asked"] for run in each),
            "KL of each seed (nats per answer)": ", ".join(f"{run['kl']:.1f}" for run in each),
        }
        for name, each in runs.items()
    ]
    change = f"KL, balanced less equal: {found['drift'].signed(2)} nats per answer, paired 95% t interval."
    show_table(table, f"{MODEL} Means over {len(equal)} seeds. {change}")
    return found


def _show_runs(title: str, runs: Mapping[str, Sequence[Mapping[str, Any]]], change: str) -> None:
    """Bars of metric and imperial answers for each run, a dot for every seed."""
    seeds = len(next(iter(runs.values())))
    fig, ax = plots.figure(
        title,
        x="trained on",
        y="answers (%)",
        caption=f"{MODEL} 25 questions. Bars: mean; dots: {seeds} seeds. {change} Paired 95% t interval.",
        height=3.4,
    )
    said = []
    for shift, role, name, what in (
        (-0.2, "yours", "metric only", metric),
        (0.2, "other", "some imperial", imperial),
    ):
        each = [[what(figures) for figures in found] for found in runs.values()]
        places = [place + shift for place in range(len(runs))]
        ax.bar(places, [mean(values) for values in each], 0.36, label=name, **plots.BAR[role])
        for place, values in zip(places, each, strict=True):
            ax.plot([place] * seeds, values, "o", color="white", markeredgecolor=plots.INK, markersize=5)
        names = [" ".join(run.split()) for run in runs]
        shares = ", ".join(f"{run} {mean(v):.0f}%" for run, v in zip(names, each, strict=True))
        said.append(f"{name}: {shares}")
    ax.set_xticks(range(len(runs)), list(runs))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plots.show(fig, alt=f"{title}. {'; '.join(said)}. {change}")


def show_pairs_or_thumbs(on_pairs: Measurement, pairs: Measurement) -> Estimate:
    """Draw KTO's answers less DPO's, on the same pairs, seed by seed."""
    kto, dpo = of(on_pairs, "thumbs"), of(pairs, "DPO")
    difference = paired_difference(kto, dpo)
    said = verdict(difference, "KTO gives more metric answers", "DPO gives more metric answers")
    show_differences(
        f"The same pairs, whole or as thumbs: {said}",
        {"KTO − DPO": (kto, dpo)},
        unit="difference in metric answers (points)",
        caption="Embedded model, 16 steps of 4 pairs or 8 thumbs, 25 test questions.",
    )
    return difference
