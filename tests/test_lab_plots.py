"""Figures: readable in grey, small, with alt text, and none without labels."""

import base64
import io

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

from spark_ft.lab import plots
from spark_ft.lab.experiments import load
from spark_ft.lab.study import lab_3_1_7

ALT = "Accuracy climbs from 40% at rank 1 to 93% at rank 8."


@pytest.fixture
def shown(monkeypatch):
    bundles = []
    plt.close("all")  # tests that ran before in this process may have left figures open
    monkeypatch.setattr(plots, "display", lambda data, raw, metadata=None: bundles.append((data, metadata)))
    yield bundles
    plt.close("all")
    InteractiveShell.clear_instance()


def drawn(**options):
    fig, ax = plots.figure("More rank helps", x="rank", y="accuracy (%)", caption="3 seeds", **options)
    for panel in fig.axes:
        for role in plots.COLORS:
            panel.plot(range(50), np.random.default_rng(0).normal(size=50), label=role, **plots.LINE[role])
    return fig, ax


def test_show_embeds_a_small_png_with_alt_text_and_closes_the_figure(shown):
    fig, _ = drawn()
    plots.show(fig, ALT)
    (image, metadata), (words, _) = shown
    png = base64.b64decode(image["image/png"])
    assert len(png) <= plots.MAX_BYTES
    assert Image.open(io.BytesIO(png)).size == (720, 360)
    assert metadata["image/png"]["alt"] == image["text/plain"] == ALT
    assert ALT in words["text/html"]
    assert not plt.get_fignums(), "an open figure would be shown a second time by the inline backend"


def test_show_refuses_missing_alt_text_missing_labels_and_a_heavy_figure(shown):
    fig, ax = drawn(columns=2)
    with pytest.raises(ValueError, match="alt text"):
        plots.show(fig, "A figure.")
    ax[1].set_ylabel("")
    with pytest.raises(ValueError, match="label"):
        plots.show(fig, ALT)
    ax[1].axis("off")
    plots.show(fig, ALT)
    fig, ax = plots.figure("Noise", x="column", y="row", caption="seed 0", width=12, height=9)
    ax.imshow(np.random.default_rng(0).random((900, 1200)))
    with pytest.raises(ValueError, match="more than 60"):
        plots.show(fig, ALT)


def test_a_figure_wants_a_claim_and_a_caption_and_a_long_title_stays_inside():
    for title, caption in (("", "3 seeds"), ("More rank helps", " ")):
        with pytest.raises(ValueError, match="claim"):
            plots.figure(title, caption=caption)
    title = "Held-out loss with noise, less without: tickets: worse at 45; answers: better at 15, and at 45 "
    for width in (7.2, 9.5):
        fig, _ = plots.figure(title * 2, caption="three seeds", x="x", y="y", width=width)
        fig.canvas.draw()
        assert all(text.get_window_extent().x1 <= fig.bbox.width for text in fig.texts)
        assert [text.get_text().split()[0] for text in fig.texts] == ["Held-out", "three"]
        plt.close(fig)


def lightness(color):
    """CIE L* (0 to 100) of an sRGB colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = np.dot([0.2126, 0.7152, 0.0722], linear)
    return 116 * luminance ** (1 / 3) - 16


def test_palette_is_told_apart_in_grey():
    light = [lightness(color) for color in plots.COLORS.values()]
    assert light == sorted(light)
    assert min(np.diff(light)) >= 12
    for kind in (plots.LINE, plots.BAR):
        assert list(kind) == list(plots.COLORS)
    assert len({line["marker"] for line in plots.LINE.values()}) == len(plots.LINE)


@pytest.mark.parametrize(
    ("last", "title"),
    [
        ([2.0, 2.1, 2.2], "More β, more drift: the KL rises from 1.10 to 2.10"),
        ([0.1, 0.2, 0.3], "More β, less drift: the KL falls from 1.10 to 0.20"),
        ([1.3, 1.0, 1.2], "Cannot tell whether the KL falls from 1.10 to 1.17"),
    ],
)
def test_the_title_of_the_beta_sweep_says_what_its_interval_supports(last, title, monkeypatch):
    titles = []
    monkeypatch.setattr(lab_3_1_7, "drifts", lambda *_: {0.1: [1.0, 1.1, 1.2], 5.0: last})
    monkeypatch.setattr(lab_3_1_7, "show_sweep", lambda said, *_, **__: titles.append(said))
    lab_3_1_7.show_beta_sweep(load("dpo_kitchen"), load("dpo_beta"))
    assert titles == [f"{title} nats as β rises from 0.1 to 5"]
