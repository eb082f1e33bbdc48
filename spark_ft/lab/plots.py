"""One look for every figure: a palette that stays readable in grey, claims as titles, captions, and alt text.

fig, ax = plots.figure("Rank 8 is enough", x="rank", y="exact match (%)", caption="3 seeds, 95% t interval")
ax.plot(ranks, scores, **plots.LINE["yours"])
plots.show(fig, alt="Exact match climbs from 41% at rank 1 to 93% at rank 8 and stays there up to rank 64.")
"""

import base64
import io
import textwrap
from html import escape

import matplotlib
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

MAX_BYTES = 60_000
INK = "#1f2328"

# Role → colour, from dark to light: printed in grey, neighbours differ by 12 points of lightness or more.
COLORS = {
    "yours": "#14285c",
    "package": "#9a2a45",
    "reference": "#2b7f86",
    "other": "#d98a2b",
    "control": "#bfc2c8",
}
# The same roles as keywords for plot and errorbar: no line depends on its colour alone.
LINE = {
    role: {"color": color, "marker": marker, "linestyle": style}
    for (role, color), marker, style in zip(
        COLORS.items(), "osD^x", ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":"), strict=True
    )
}
# …and for bars.
BAR = {
    role: {"color": color, "edgecolor": INK, "hatch": hatch, "linewidth": 0.6}
    for (role, color), hatch in zip(COLORS.items(), ("", "//", "..", "xx", ""), strict=True)
}
GREY = "Greys"  # the colour map of every image and heat map

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=list(COLORS.values())),
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "image.cmap": GREY,
    "figure.facecolor": "white",
}
matplotlib.rcParams.update(STYLE)  # so that heat maps and legends drawn later follow it too


def figure(
    title: str,
    *,
    caption: str,
    x: str = "",
    y: str = "",
    columns: int = 1,
    width: float = 7.2,
    height: float = 3.6,
) -> tuple[Figure, Axes]:
    """An empty figure in the project's style: (figure, axes), with an array of axes where columns > 1.

    Args:
        title: the claim that the figure supports, as a sentence.
        caption: what the claim rests on: seeds, interval, data and model.
        x, y: the axis labels with units, for every panel; a panel may set its own with `ax.set_xlabel`.
        columns: panels side by side.
        width, height: inches; at 100 dots an inch.
    """
    if not title.strip() or not caption.strip():
        raise ValueError(
            "a figure needs a title that states its claim and a caption that says what the claim rests on"
        )
    fig, axes = plt.subplots(1, columns, figsize=(width, height), dpi=100, layout="constrained")
    for ax in fig.axes:
        ax.set(xlabel=x, ylabel=y)
    fig.suptitle(textwrap.fill(title, int(width * 9.5)), x=0.01, ha="left", fontsize=12, fontweight="bold")
    fig.supxlabel(textwrap.fill(caption, int(width * 16)), x=0.01, ha="left", fontsize=8.5, color="#57606a")
    return fig, axes


def show(fig: Figure, alt: str) -> None:
    """Put a figure into the notebook as a small PNG with alt text, and close it.

    The text goes into the output's metadata, where nbconvert's classic template reads it as `alt=`, into the
    plain-text form, and into a folded line below, since JupyterLab and GitHub show no alt text.

    Args:
        fig: from `figure`.
        alt: what you would say on the phone: the axes, the shape, the numbers that matter.

    Raises:
        ValueError: the alt text is too short, an axis has no label, or the PNG is larger than 60 KB.
    """
    if len(alt.split()) < 6:
        raise ValueError(
            f"the alt text {alt!r} does not say what the figure shows; describe its shape and its numbers"
        )
    for ax in fig.axes:
        # A colour bar explains itself, and an axis that is turned off has no scale.
        if ax.axison and not hasattr(ax, "_colorbar") and not (ax.get_xlabel() and ax.get_ylabel()):
            raise ValueError(f"panel {ax.get_title()!r} needs a label with its unit on both axes")
    png = _png(fig)
    plt.close(fig)
    alt = " ".join(alt.split())
    words = f"<details><summary>The figure in words</summary>{escape(alt)}</details>"
    image = {"image/png": base64.b64encode(png).decode(), "text/plain": alt}
    display(image, raw=True, metadata={"image/png": {"alt": alt}})
    display({"text/html": words, "text/plain": alt}, raw=True)


def _png(fig: Figure) -> bytes:
    drawn, small = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png")
    # 128 colours are enough for lines, bars and grey maps, and take a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        small, format="png", optimize=True
    )
    if small.tell() > MAX_BYTES:
        raise ValueError(
            f"the figure takes {small.tell() / 1000:.0f} KB, more than 60: draw fewer points, or shrink it"
        )
    return small.getvalue()
