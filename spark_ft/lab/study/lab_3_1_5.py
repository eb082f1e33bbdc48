"""What lab 3.1.5 shows of 4 bits: a tuned model, your NF4 in a run, four codes, two books, three merges."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spark_ft.adapters import adapted_layers
from spark_ft.embedded import EMBEDDED
from spark_ft.lab import parity, plots
from spark_ft.lab.experiments.common import SHORT_RUN, tune
from spark_ft.lab.experiments.lab_3_1_5 import EQUAL_STEPS, SETTINGS, rounded
from spark_ft.lab.experiments.runner import Measurement, agrees
from spark_ft.lab.kitchen import tickets
from spark_ft.lab.study import detectable, show_differences, show_table, verdict
from spark_ft.methods.nf4 import NF4_CODE, NF4Linear, quantize_nf4
from spark_ft.models import load_model
from spark_ft.stats import Estimate, mean_interval, paired_difference
from spark_ft.training import History

Figures = Mapping[str, Any]


def show_start(model: nn.Module, before: Figures, after: Figures) -> None:
    """The 4-bit model's size, and what 20 steps of notes on it changed."""
    weights = [m.weight for m in model.modules() if isinstance(m, NF4Linear)]
    numbers, size = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
    print(f"{numbers / 1e6:.0f} M weights in {size / 1e6:.0f} MB: {8 * size / numbers:.3f} bits per weight")
    names = {
        "held-out loss": "held-out loss",
        "token accuracy": "tokens right",
        "exact match": "tickets right",
    }
    rows = [
        {"notes": notes, **{names[key]: _percent(key, figures[key]) for key in names}}
        for notes, figures in (("none", before), ("20 steps", after))
    ]
    show_table(rows, f"{SETTINGS['held-out tickets']} held-out tickets; embedded model, NF4, rank 16, seed 0")


def _percent(name: str, value: float) -> str:
    return f"{value:.3f}" if "loss" in name else f"{value:.0%}"


# ── your code trains ────────────────────────────────────────────────────────────────────────────────────────


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers but the head, by name: those that QLoRA quantizes."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def train_over(
    quantize: Callable, pack: Callable, unpack: Callable, dequantize: Callable, steps: int
) -> History:
    """The first steps of the QLoRA run of seed 0, its weights sent through somebody's NF4 and back."""
    model, _ = load_model(EMBEDDED, dtype=torch.float32)
    for layer in linear_layers(model).values():
        shape = layer.weight.shape
        codes, absmax = quantize(layer.weight.data, NF4_CODE, 64)
        again = unpack(pack(codes.flatten())).view_as(codes)
        layer.weight.data = dequantize(again, absmax, NF4_CODE, tuple(shape))
    return tune(tickets("train"), 0, model=model, first=steps, **SHORT_RUN)[1]


# ── four codes, and bitsandbytes ────────────────────────────────────────────────────────────────────────────


def _fp4() -> Tensor:
    """E2M1, as in the OCP Microscaling formats: one bit of sign, two of exponent, one of mantissa."""
    positive = [(m / 2 if e == 0 else 2.0 ** (e - 1) * (1 + m / 2)) for e in range(4) for m in (0, 1)]
    return torch.tensor(sorted({s * x for s in (1, -1) for x in positive})) / max(positive)


CODES = {
    "NF4": NF4_CODE,
    "16 equal steps": EQUAL_STEPS,
    "int4: −7 … 7": torch.arange(-7, 8) / 7,
    "fp4: E2M1": _fp4(),
}


def code_errors(block_size: int = 64) -> dict[str, dict[str, list[float]]]:
    """Kind of numbers → code → mean |w − ŵ| in standard deviations of w, for each matrix of that kind."""
    model, _ = load_model(EMBEDDED, dtype=torch.float32)
    layers = [layer.weight.detach().cpu() for layer in linear_layers(model).values()]
    normal = torch.randn(2**21, generator=torch.Generator().manual_seed(0))
    embeddings = model.get_input_embeddings().weight.detach().cpu()[::8]
    kinds = {"normal": [normal], "linear layers": layers[::30], "embeddings": [embeddings]}

    def error(w: Tensor, code: Tensor) -> float:
        return ((rounded(w, code, block_size) - w).abs().mean() / w.std()).item()

    return {
        kind: {name: [error(w, code) for w in weights] for name, code in CODES.items()}
        for kind, weights in kinds.items()
    }


def show_codes() -> dict[str, float]:
    """Where four codes put their levels, and how far each is off on three kinds of numbers."""
    errors = code_errors()
    best = {kind: min(by, key=lambda name: mean(by[name])) for kind, by in errors.items()}
    everywhere = set(best.values()) == {"NF4"}
    title = "Of four codes, NF4 is the nearest on all three kinds of numbers"
    fig, (left, right) = plots.figure(
        title if everywhere else f"The nearest code: {', '.join(f'{b} on {k}' for k, b in best.items())}",
        columns=2,
        width=9.5,
        caption=f"blocks of 64. Normal: 2²¹ numbers. Linear layers: {len(errors['linear layers']['NF4'])} "
        "matrices of the embedded model, bars are means, whiskers the best and the worst. Embeddings: every "
        "eighth row.",
    )
    for row, code in enumerate(CODES.values()):
        left.plot(code, [row] * len(code), "|", color=plots.INK, markersize=14)
    left.set_yticks(range(len(CODES)), list(CODES))
    left.set(xlabel="level / largest magnitude of the block", ylabel="code", ylim=(3.5, -0.5))
    for i, (name, role) in enumerate(zip(CODES, ("package", "reference", "other", "control"), strict=True)):
        means = [mean(by[name]) for by in errors.values()]
        low = [m - min(by[name]) for m, by in zip(means, errors.values(), strict=True)]
        high = [max(by[name]) - m for m, by in zip(means, errors.values(), strict=True)]
        places = np.arange(3) + 0.2 * (i - 1.5)
        right.bar(places, means, 0.2, yerr=[low, high], capsize=2, label=name, **plots.BAR[role])
    right.set_xticks(range(3), list(errors))
    right.set(xlabel="kind of numbers", ylabel="mean error (standard deviations)", ylim=(0, 0.17))
    right.legend(fontsize=8, ncols=2, loc="upper left")
    said = (
        f"{kind}: " + ", ".join(f"{name} {mean(e):.3f}" for name, e in by.items())
        for kind, by in errors.items()
    )
    plots.show(fig, alt=f"Left: NF4's levels crowd near zero. Right, mean errors: {'; '.join(said)}.")
    return {name: errors["normal"][name][0] for name in CODES}


def show_bytes() -> float:
    """The package's NF4 beside bitsandbytes' own, with plain and with doubly quantized scales."""
    real = load_model(EMBEDDED, dtype=torch.float32)[0].get_submodule("model.layers.0.mlp.down_proj").weight
    draw = torch.Generator().manual_seed(0)
    rows = []
    for what, w in (
        ("a layer of the model", real.detach().cpu()),
        ("300 × 333, normal", torch.randn(300, 333, generator=draw)),
    ):
        plain, double = quantize_nf4(w, double_quant=False), quantize_nf4(w)
        first = parity.nf4_against_bitsandbytes(w, plain.packed, plain.absmax, plain.dequantize())
        second = parity.double_quantization_against_bitsandbytes(w, double)
        rows.append(
            {
                "weight": what,
                "bytes equal": f"{first['bytes equal']:.2%}",
                "fp32 scales equal": f"{first['scales equal']:.2%}",
                "doubly quantized: bytes equal": f"{second['bytes equal']:.2%}",
                "8-bit scales equal": f"{second['8-bit scales equal']:.2%}",
                "error, ours / theirs": second["error, ours / theirs"],
            }
        )
        assert first["bytes equal"] == second["bytes equal"] == 1
    show_table(rows, "spark_ft and bitsandbytes on this machine; blocks of 64, also over the ends of rows")
    return 100.0


# ── a rough book, and merging ───────────────────────────────────────────────────────────────────────────────


def show_rough_book(stored: Measurement) -> dict[str, Estimate]:
    """The same notes on three books, five seeds: losses, and the two differences seed by seed."""
    losses = {weights: stored.values(weights, "held-out loss") for weights in SETTINGS["weights"]}
    pairs = {
        "NF4 − fp32": (losses["NF4"], losses["fp32"]),
        "equal steps − NF4": (losses["16 equal steps"], losses["NF4"]),
    }
    gap, code = (paired_difference(*pair) for pair in pairs.values())
    near, far = sorted((abs(gap.low), abs(gap.high)))
    ends = f"ends {near:.2f} to {far:.2f} nats lower"
    book = verdict(gap, f"LoRA {ends} than QLoRA", f"QLoRA {ends} than LoRA")
    levels = verdict(code, "NF4 ends lower", "equal steps end lower")
    book = book.replace("cannot tell", "LoRA against QLoRA: cannot tell")
    rows = [
        {
            "book": weights,
            "held-out loss before": stored.figures(0)[weights]["before"]["held-out loss"],
            "after 20 steps": mean_interval(values),
            "tickets right": mean_interval(stored.values(weights, "exact match")).percent(),
        }
        for weights, values in losses.items()
    ]
    show_table(rows, f"mean and 95% t interval of {len(losses['NF4'])} seeds, 32 held-out tickets")
    show_differences(
        f"{book}; NF4 against equal steps: {levels}",
        pairs,
        unit="difference in held-out loss (nats per token)",
        caption=f"{stored.origin()};",
    )
    return {"LoRA": mean_interval(losses["fp32"]), "QLoRA": mean_interval(losses["NF4"]), "gap": gap}


@torch.no_grad()
def what_arrives(model: nn.Module) -> list[dict[str, Any]]:
    """What arrives of ΔW in Q(W + ΔW), from dequantized and from original weights, as a table's rows."""
    whole, _ = load_model(EMBEDDED, dtype=torch.float32)
    starts = ("dequantized weights", "original weights")
    changed, inner, square, numbers = dict.fromkeys(starts, 0), dict.fromkeys(starts, 0.0), 0.0, 0
    for name, layer in adapted_layers(model).items():
        W, delta, stored = whole.get_submodule(name).weight, layer.delta_weight(), layer.base.weight
        old = stored.dequantize()
        square, numbers = square + delta.square().sum().item(), numbers + delta.numel()
        for start, base in zip(starts, (old, W), strict=True):
            again = quantize_nf4(base + delta)
            other = again.packed ^ stored.packed
            changed[start] += int((other >> 4 > 0).sum() + (other & 15 > 0).sum())
            inner[start] += ((again.dequantize() - old) * delta).sum().item()
    return [
        {
            "quantized from": f"{start} + ΔW",
            "weights that get another level": f"{changed[start] / numbers:.2%}",
            "of ΔW that arrives": f"{inner[start] / square:.0%}",
        }
        for start in starts
    ]


def show_merges(stored: Measurement, into_4_bits: Measurement, model: nn.Module) -> dict[str, float]:
    """What is kept of the gain after four kinds of merge, five seeds each; and why, on the live model."""
    start = stored.figures(0)["NF4"]["before"]["held-out loss"]
    on, here = stored.values("NF4", "held-out loss"), into_4_bits.values("notes on", "held-out loss")
    agrees(into_4_bits.figures(0)["losses"][:5], stored.figures(0)["NF4"]["losses"])

    def kept(losses: Sequence[float], on: Sequence[float]) -> list[float]:
        return [100 * (start - loss) / (start - best) for loss, best in zip(losses, on, strict=True)]

    originals = into_4_bits.values("from the originals", "held-out loss")
    aware = into_4_bits.values("merge-aware", "held-out loss")
    found = {
        "16 bits": kept(stored.values("merged", "held-out loss"), on),
        "dequantized + ΔW,\nNF4 again": kept(stored.values("quantized again", "held-out loss"), on),
        "original + ΔW,\nthen NF4": kept(originals, here),
        "trained merge-aware,\nthen NF4": kept(aware, here),
    }
    again, whole = (mean(found[name]) for name in list(found)[1:3])
    fig, ax = plots.figure(
        f"Quantized again on its own grid, a merge keeps {again:.0f}% of the gain; from the original weights "
        f"{whole:.0f}%",
        x="gain in held-out loss that the merged model keeps (%)",
        y="merged into",
        height=3.4,
        caption=f"mean and 95% t interval, circles are seeds; {into_4_bits.origin()}. 100%: notes on.",
    )
    for place, values in enumerate(found.values()):
        e = mean_interval(values)
        ax.plot(values, [place] * len(values), "o", markerfacecolor="none", color=plots.COLORS["package"])
        spread = [[e.value - e.low], [e.high - e.value]]
        ax.errorbar([e.value], [place], xerr=spread, capsize=4, **plots.LINE["yours"])
    ax.set_yticks(range(len(found)), list(found))
    ax.set(ylim=(len(found) - 0.5, -0.5), xlim=(0, None))
    said = ", ".join(f"{n} {mean_interval(v)}%" for n, v in found.items()).replace("\n", " ")
    plots.show(fig, alt=f"Share of the gain kept: {said}.")
    merged = stored.values("merged", "held-out loss")
    for name, losses, other, against in (
        ("16 bits", merged, on, "notes on"),
        ("original + ΔW, then NF4", originals, here, "notes on"),
        ("trained merge-aware", aware, originals, "original + ΔW, then NF4"),
    ):
        difference, smallest = paired_difference(losses, other), detectable(losses, other)
        print(f"{name} − {against}: {difference.signed(4)} nats, {verdict(difference, 'worse', 'better')}; "
              f"{smallest:.2g} would be found with 80% power")  # fmt: skip
    caption = "all 210 layers of the run above, seed 0; ΔW arrives: ⟨change of Q, ΔW⟩ / ‖ΔW‖²"
    show_table(what_arrives(model), caption)
    return dict(zip(("16 bits", "again", "originals", "aware"), map(mean, found.values()), strict=True))
