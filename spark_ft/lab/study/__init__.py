"""One-line studies: what a lab shows from stored and live runs, one module per lab; here what they share.

A lab calls `study.show_beta_sweep(stored)`; the figure, its alt text and its statistics live in that
function. A title claims what the interval supports: `verdict` says "cannot tell" where zero is inside.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import stdev
from typing import Any

from IPython.display import display

from spark_ft.lab import plots
from spark_ft.stats import Estimate, mean_interval, paired_difference

_WORKPLACES: list[tempfile.TemporaryDirectory] = []


def workplace() -> Path:
    """A new temporary folder, which is removed when this notebook's kernel ends."""
    _WORKPLACES.append(tempfile.TemporaryDirectory(prefix="spark_ft-"))
    return Path(_WORKPLACES[-1].name)


def show_table(rows: Sequence[Mapping[str, Any]], caption: str) -> None:
    """Display rows as a table: column → number, `Estimate` or text; long texts keep their line breaks.

    Args:
        rows: one mapping per row, all with the same keys, in the order of the columns.
        caption: what the numbers rest on: seeds, interval, data and model.
    """
    columns = list(rows[0])
    if any(list(row) != columns for row in rows):
        raise ValueError(f"all rows of a table have the same columns, here {columns}")
    cells = [[shown(row[column]) for column in columns] for row in rows]
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{_html(cell)}</td>" for cell in row) for row in cells)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    html = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    html += f"<p><small>{escape(caption)}</small></p>"
    display({"text/html": html, "text/plain": f"{_plain(columns, cells)}\n{caption}"}, raw=True)


def shown(value: Any) -> str:
    """A number, an estimate or a text as a table shows it."""
    if isinstance(value, float) and not isinstance(value, Estimate):
        return "–" if math.isnan(value) else f"{value:.3g}"
    return str(value)


def _html(text: str) -> str:
    return f'<div style="text-align:left">{escape(text)}</div>'.replace("\n", "<br>")


def _plain(columns: list[str], cells: list[list[str]]) -> str:
    flat = [columns, *([cell.replace("\n", " ⏎ ") for cell in row] for row in cells)]
    widths = [max(len(row[i]) for row in flat) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in flat)


def verdict(difference: Estimate, more: str, less: str) -> str:
    """What the interval of a difference supports: `more`, `less`, or "cannot tell"."""
    return more if difference.low > 0 else less if difference.high < 0 else "cannot tell"


def detectable(values: Sequence[float], others: Sequence[float], power: float = 0.8) -> float:
    """The true paired difference that so many seeds would find with this power at 95%.

    (t₀.₉₇₅ + t_power) · s / √n, with s the standard deviation of the differences
    """
    from scipy.stats import t

    differences = [value - other for value, other in zip(values, others, strict=True)]
    n = len(differences)
    return (t.ppf(0.975, n - 1) + t.ppf(power, n - 1)) * stdev(differences) / math.sqrt(n)


def show_sweep(
    title: str,
    points: Mapping[str, Mapping[Any, Sequence[float]]],
    *,
    x: str,
    y: str,
    caption: str,
    level: tuple[str, float] | None = None,
) -> None:
    """Draw what changes as one setting is turned: mean and 95% t interval over the seeds, per value.

    Args:
        title: the claim; say "cannot tell" where the intervals do not support one.
        points: series' name → setting's value → that value's result for every seed. The first is "yours".
        x, y: labels with units.
        caption: data and model; seeds and interval are added.
        level: (name, height) of a line to compare with: the untrained model, chance.
    """
    roles = ("yours", "package", "reference", "other", "control")
    fig, ax = plots.figure(title, x=x, y=y, caption=f"{caption} {_seeds(points)}")
    said = []
    for number, (role, (name, values)) in enumerate(zip(roles, points.items(), strict=False)):
        means = [mean_interval(list(each)) for each in values.values()]
        spread = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
        aside = 0.05 * (number - (len(points) - 1) / 2)  # so that intervals don't hide each other
        places = [place + aside for place in range(len(values))]
        ax.errorbar(places, [m.value for m in means], yerr=spread, capsize=3, label=name, **plots.LINE[role])
        ax.set_xticks(range(len(values)), [shown(value) for value in values])
        said.append(f"{name}: " + ", ".join(f"{m} at {shown(v)}" for v, m in zip(values, means, strict=True)))
    if level:
        ax.axhline(level[1], color=plots.COLORS["control"], linestyle=":", label=level[0])
        said.append(f"{level[0]}: {level[1]:.3g}")
    if len(points) > 1 or level:
        ax.legend()
    plots.show(fig, alt=f"{title}. {y} over {x}. {'; '.join(said)}.")


def show_differences(
    title: str,
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    unit: str,
    caption: str,
) -> None:
    """Draw paired differences as differences: each seed's dot, mean and 95% t interval, a line at zero.

    Args:
        title: the claim; say "cannot tell" where zero is inside.
        pairs: "SimPO − DPO" → (SimPO's value for every seed, DPO's of the same seeds).
        unit: the axis label: "difference in metric answers (points)".
        caption: data and model; seeds, interval and the detectable difference are added.
    """
    found = {name: paired_difference(*values) for name, values in pairs.items()}
    smallest = max(detectable(*values) for values in pairs.values())
    count = len(next(iter(pairs.values()))[0])
    rests = (
        f"{count} seeds, paired; 95% t interval; a true difference of {smallest:.2g} is found with 80% power"
    )
    height = 1.6 + 0.45 * len(pairs)
    fig, ax = plots.figure(title, x=unit, y="pair", caption=f"{caption} {rests}.", height=height)
    for place, (name, difference) in enumerate(found.items()):
        seeds = [a - b for a, b in zip(*pairs[name], strict=True)]
        ax.plot(seeds, [place] * count, **{**plots.LINE["control"], "linestyle": ""})
        spread = [[difference.value - difference.low], [difference.high - difference.value]]
        ax.errorbar([difference.value], [place], xerr=spread, capsize=3, **plots.LINE["yours"])
    ax.axvline(0, color=plots.INK, linewidth=0.8)
    ax.set_yticks(range(len(found)), list(found))
    ax.set_ylim(len(found) - 0.5, -0.5)
    said = (f"{name} {d.signed()}, {verdict(d, 'above zero', 'below zero')}" for name, d in found.items())
    plots.show(fig, alt=f"{title}. Differences with a line at zero: {'; '.join(said)}.")


def _seeds(points: Mapping[str, Mapping[Any, Sequence[float]]]) -> str:
    counts = {len(each) for values in points.values() for each in values.values()}
    return f"{'–'.join(map(str, sorted(counts)))} seeds, mean and 95% t interval."
