"""What lab 3.1.2 shows: the held-still norm, your run, faders, five seeds, a control, distances, costs."""

import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from spark_ft.adapters import AdapterConfig, adapted_layers, add_adapters
from spark_ft.bench import peers
from spark_ft.embedded import EMBEDDED
from spark_ft.lab import plots
from spark_ft.lab.experiments.common import SHORT_RUN, held_out, tune
from spark_ft.lab.experiments.lab_3_1_2 import SETTINGS, moved, tune_dora, watched_weights
from spark_ft.lab.experiments.runner import Measurement, agrees
from spark_ft.lab.kitchen import tickets
from spark_ft.lab.study import detectable, show_differences, show_table, verdict
from spark_ft.lab.study.lab_3_1_1 import put_layers, show_tickets, take_steps
from spark_ft.memory.machine import measure
from spark_ft.memory.shapes import known_config
from spark_ft.methods.dora import row_norm
from spark_ft.models import load_model, load_tokenizer
from spark_ft.scoring import Batch, sft_loss
from spark_ft.stats import Estimate, mean_interval, paired_difference
from spark_ft.training import History

__all__ = ["show_tickets"]  # lab 3.1.1's: orders, and what the model wrote before and after

WATCHED = (  # three of the model's 210 matrices, from its start, its middle and its end
    "model.layers.0.self_attn.q_proj",
    "model.layers.14.self_attn.v_proj",
    "model.layers.29.mlp.down_proj",
)
METHODS = {  # what the stored experiment trained → its role in a figure
    "DoRA": "package",
    "LoRA r16": "yours",
    "LoRA r17": "yours",
    "magnitude alone": "other",
    "full": "reference",
    "DoRA on shuffled answers": "control",
}
CONTROL = "DoRA on shuffled answers"
KINDS = {"q_proj": "query", "v_proj": "value"}
PAPER = {"full": -0.62, "LoRA r16": 0.83, "DoRA": -0.31}  # Liu et al. 2024, figure 2
RUN = f"{SETTINGS['steps']} steps of 4 kitchen tickets"
HELD_OUT = f"{RUN}, {SETTINGS['held-out tickets']} held-out tickets"


def _short(name: str) -> str:
    return name.removeprefix("model.layers.")


def _rows(W: Tensor) -> Tensor:
    return W.detach().norm(dim=1)


# ── the norm held still ─────────────────────────────────────────────────────────────────────────────────────


def split_gradient(W: Tensor, G: Tensor, still: bool) -> tuple[Tensor, Tensor]:
    """The gradients of V and m that the gradient G of W' = m · V/n becomes where V = W and m = ‖W‖.

    Args:
        still: n is held still, as in DoRA; else the gradient goes through n too.
    """
    V, m = W.detach().clone().requires_grad_(), _rows(W).requires_grad_()
    n = torch.linalg.vector_norm(V, dim=1)
    merged = (m / (n.detach() if still else n))[:, None] * V
    return torch.autograd.grad(merged, (V, m), G)


def show_held_still(batch: Batch) -> dict[str, float]:
    """How much of each direction's gradient runs along the rows, with the norm held still and without."""
    model = load_model(EMBEDDED, dtype=torch.float32)[0].requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in WATCHED}
    total, tokens = sft_loss(model, {key: tensor.to(model.device) for key, tensor in batch.items()})
    gradients = torch.autograd.grad(total / tokens, list(weights.values()))
    rows, shares = [], {}
    for (name, W), G in zip(weights.items(), gradients, strict=True):
        direction, small = F.normalize(W.detach(), dim=1), 1e-5 * G.abs().max().item() * len(W) ** 0.5
        (held, fader), (moving, _) = (split_gradient(W, G, still) for still in (True, False))
        along = (held * direction).sum(1)
        assert torch.allclose(held - along[:, None] * direction, moving, atol=small)
        assert torch.allclose(along, fader, atol=small), "the part along a row is the magnitude's gradient"
        shares[name] = (along.norm() / held.norm()).item()
        rest = ((moving * direction).sum(1).norm() / moving.norm()).item()
        rows.append({"layer": _short(name), "held still": f"{shares[name]:.1%}", "moving": f"{rest:.0e}"})
    show_table(
        rows, "share of the direction's gradient that runs along the rows; four kitchen tickets, one step"
    )
    return shares


# ── your layer trains ───────────────────────────────────────────────────────────────────────────────────────


def train_layer(layer_type: Callable[..., nn.Module]) -> History:
    """The DoRA run of seed 0 with layers of another class, called as (base, rank, alpha)."""

    def layers(model: nn.Module) -> None:
        put_layers(model, lambda base, rank, alpha, _: layer_type(base, rank, alpha))

    return tune(tickets("train"), 0, adapter=layers, **SHORT_RUN)[1]


# ── faders ──────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def show_faders(model: nn.Module, times: float) -> dict[str, float]:
    """The trained model with its faders at 0, 1 and `times` of their way; its notes stay as trained."""
    tokenizer, rows = load_tokenizer(EMBEDDED), tickets("validation")[: SETTINGS["held-out tickets"]]
    layers = adapted_layers(model).values()
    trained = [(layer, layer.magnitude.clone(), _rows(layer.weight)) for layer in layers]
    found = {}
    for share in dict.fromkeys((0.0, 1.0, float(times))):
        for layer, after, before in trained:
            layer.magnitude.copy_(before + share * (after - before))
        found[f"{share:g}"] = held_out(model, tokenizer, rows)
    for layer, after, _ in trained:
        layer.magnitude.copy_(after)
    names = {"0": "where they started", "1": "as trained"}
    losses = {share: figures["held-out loss"] for share, figures in found.items()}
    show_table(
        [{"faders": names.get(s, f"{s} times as far"), "held-out loss": loss} for s, loss in losses.items()],
        f"your DoRA run, seed 0, notes as trained; {SETTINGS['held-out tickets']} held-out tickets",
    )
    return losses


# ── is it true? five stored seeds ───────────────────────────────────────────────────────────────────────────


def hold_to_stored(history: History, stored: Measurement) -> None:
    """Hold your run, and the first steps of the control, to the stored ones of seed 0."""
    print("DoRA:", agrees(history.losses[:5], stored.figures(0)["DoRA"]["losses"]))
    start = tune_dora(seed=0, first=3, shuffled=True)[1]
    print("control:", agrees(start.losses, stored.figures(0)[CONTROL]["losses"]))


def difference(stored: Measurement, name: str, other: str, key: str = "held-out loss") -> Estimate:
    """A figure of one method minus that of another, seed by seed."""
    return paired_difference(stored.values(name, key), stored.values(other, key))


def show_dora_against_lora(stored: Measurement) -> str:
    """DoRA minus LoRA of rank 16 and of rank 17, seed by seed: the verdict."""
    losses = {name: stored.values(name, "held-out loss") for name in METHODS}
    pairs = {f"DoRA − {other}": (losses["DoRA"], losses[other]) for other in ("LoRA r16", "LoRA r17")}
    said = verdict(difference(stored, "DoRA", "LoRA r16"), "DoRA is worse", "DoRA is better")
    show_differences(
        f"DoRA against LoRA of the same size: {said}",
        pairs,
        unit="difference in held-out loss (nats per token; below zero: DoRA is better)",
        caption=f"{HELD_OUT};",
    )
    smallest = max(detectable(*values) for values in pairs.values())
    share = smallest / mean(losses["LoRA r16"])
    print(f"These seeds find a true difference of {smallest:.4f}, {share:.0%} of LoRA's loss, 4 times of 5.")
    return said


def show_methods(stored: Measurement) -> float:
    """Every method's held-out loss, seed by seed, and the share of DoRA's way that magnitudes alone go."""
    losses = {name: stored.values(name, "held-out loss") for name in METHODS}
    found = {name: mean_interval(values) for name, values in losses.items()}
    base = stored.figures(0)["base"]["held-out loss"]
    form = found[CONTROL].value  # what the form of a ticket brings, whatever stands in it
    shares = [
        (c - m) / (c - d)
        for c, m, d in zip(losses[CONTROL], losses["magnitude alone"], losses["DoRA"], strict=True)
    ]
    share = mean_interval(shares)
    fig, ax = plots.figure(
        f"Magnitudes alone go {share.value:.0%} of the way from the control's loss to DoRA's",
        x="held-out loss (nats per token), log scale",
        y="what trains",
        width=9.5,
        height=3.6,
        caption=f"circles: seeds; bar: mean and 95% t interval of {len(shares)}; dotted: no adapter. Share: "
        f"{share.percent()}. {HELD_OUT}. {stored.origin()}.",
    )
    for place, (name, role) in enumerate(METHODS.items()):
        e, color = found[name], plots.COLORS[role] if role != "control" else plots.INK
        spread = [[e.value - e.low], [e.high - e.value]]
        ax.errorbar(e.value, place, xerr=spread, fmt="|", markersize=14, capsize=4, color=color)
        ax.plot(losses[name], [place] * len(shares), "o", markerfacecolor="none", color=color)
    ax.axvline(base, color=plots.INK, linestyle=":", linewidth=1)
    ax.set_xscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_yticks(range(len(METHODS)), list(METHODS))
    ax.invert_yaxis()
    said = "; ".join(f"{name} {e}" for name, e in found.items())
    plots.show(fig, alt=f"Held-out loss, mean and interval of the seeds: {said}; no adapter {base:.2f}.")
    rows = [
        {
            "what trains": name,
            "numbers": f"{stored.values(name, 'trainable')[0]:,}",
            "held-out loss": found[name],
            "tickets right, seed by seed": ", ".join(f"{v:.0%}" for v in stored.values(name, "exact match")),
        }
        for name in METHODS
    ]
    show_table(rows, f"{HELD_OUT}; mean and 95% t interval of {len(shares)} stored seeds")
    assert max(stored.values(CONTROL, "exact match")) < 0.05, "shuffled answers must not teach the task"
    assert difference(stored, CONTROL, "DoRA").low > 0, f"the control's loss, {form:.2f}, must stay higher"
    return share.value


# ── how far lengths and directions move ─────────────────────────────────────────────────────────────────────


def _distances(stored: Measurement, name: str, kind: str) -> Tensor:
    """ΔM and ΔD of each layer in each seed: (seeds, layers, 2)."""
    return torch.tensor(stored.values(name, "moved", kind))


def _fisher(layers: Tensor) -> list[float]:
    """Each seed's correlation of ΔM and ΔD over layers as artanh r, which scatters evenly."""
    return [torch.corrcoef(seed.T)[0, 1].atanh().item() for seed in layers]


def _back(estimate: Estimate) -> Estimate:
    return Estimate(*(torch.tensor(z).tanh().item() for z in estimate))


def _ratio(stored: Measurement, which: int) -> Estimate:
    """How many times as far DoRA moved ΔM (0) or ΔD (1) as LoRA, seed by seed, over all watched layers."""
    dora, lora = (
        torch.cat([_distances(stored, name, kind) for kind in KINDS], 1)[..., which].mean(1)
        for name in ("DoRA", "LoRA r16")
    )
    return mean_interval((dora / lora).tolist())


def show_movement(
    stored: Measurement, model: nn.Module, measured: Callable[[Tensor, Tensor], Any]
) -> dict[str, float]:
    """ΔM against ΔD of every query and value layer, in figure and table; your run's, by your function."""
    before = watched_weights(load_model(EMBEDDED, dtype=torch.float32)[0])
    live = {kind: torch.tensor(pairs) for kind, pairs in moved(model, before).items()}
    theirs = {kind: _distances(stored, "DoRA", kind)[0] for kind in KINDS}
    apart = max(((live[kind] - t).abs().max() / t.max()).item() for kind, t in theirs.items())
    print(f"your run's ΔM and ΔD differ from the stored seed 0 by at most {apart:.1e} of the largest")
    assert apart < 0.05
    _say_yours(measured, before, watched_weights(model))
    longer, turned = _ratio(stored, 0), _ratio(stored, 1)
    far = f"{turned.value:.2f} times as far"
    claim = f"DoRA changes lengths {longer.value:.1f} times as much as LoRA; rows turn {far}"
    fig, axes = plots.figure(
        claim,
        x="ΔD, mean 1 − cos (log scale)",
        y="ΔM, mean change (log scale)",
        columns=2,
        width=9.5,
        height=4.0,
        caption=f"left: query layers, right: value layers; a point: one layer, mean of {len(stored['runs'])} "
        f"seeds; {RUN}. Ratios in the title, mean and 95% t interval: {longer}, {turned}. {stored.origin()}.",
    )
    said = []
    for ax, kind in zip(axes, KINDS, strict=True):
        for name in PAPER:
            lengths, turns = _distances(stored, name, kind).mean(0).T
            ax.plot(turns, lengths, label=name, **{**plots.LINE[METHODS[name]], "linestyle": ""})
            said.append(f"{KINDS[kind]}, {name}: ΔM {lengths.mean():.1e}, ΔD {turns.mean():.1e}")
        ax.set(xscale="log", yscale="log")
        ax.legend(fontsize=8)
    plots.show(fig, alt=f"{claim}. Two log-log scatter plots, one point per layer. {'; '.join(said)}.")
    return _show_coupling(stored) | {"longer": longer.value, "turned": turned.value}


def _say_yours(measured: Callable, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    name = "model.layers.14.self_attn.v_proj"
    try:
        longer, turned = (float(value) for value in measured(before[name], after[name]))
        print(f"by your movement, {_short(name)}: ΔM {longer:.2e}, ΔD {turned:.2e}")
    except Exception as error:
        written = "is not written yet" if isinstance(error, NotImplementedError) else "raises an error"
        print(f"your movement {written}; shown with the study's own")


def _show_coupling(stored: Measurement) -> dict[str, float]:
    """Correlation of ΔM and ΔD over layers beside the paper's, and the pairs of methods, seed by seed."""
    scales = {(name, kind): _fisher(_distances(stored, name, kind)) for name in PAPER for kind in KINDS}
    rows = [
        {
            "trained": name,
            "query layers": _back(mean_interval(scales[name, "q_proj"])).signed(2),
            "value layers": _back(mean_interval(scales[name, "v_proj"])).signed(2),
            "in the paper": f"{r:+.2f}",
        }
        for name, r in PAPER.items()
    ]
    alike = total = 0
    for name, other in (("LoRA r16", "full"), ("DoRA", "full"), ("DoRA", "LoRA r16")):
        there = "higher" if PAPER[name] > PAPER[other] else "lower"
        for kind in KINDS:
            found = paired_difference(scales[name, kind], scales[other, kind])
            alike += verdict(found, "higher", "lower") == there
            total += 1
    show_table(
        rows,
        "correlation of ΔM and ΔD over 30 layers, mean and 95% t interval of the seeds on Fisher's scale. "
        f"Compared in pairs, {alike} of {total} go the paper's way beyond their interval",
    )
    return {"alike": alike, "compared": total}


# ── what it costs ───────────────────────────────────────────────────────────────────────────────────────────


def _in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, in turns, so that whatever slows the machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, step in list(sides.items()) * rounds:
        started = time.perf_counter()
        step()
        times[name].append(time.perf_counter() - started)
    return times


def _most(step: Callable[[], object]) -> int:
    with measure() as memory:
        step()
    return memory.extra


def show_step_cost(model: nn.Module, batch: Batch) -> float:
    """A training step with DoRA beside one with LoRA, in turns: time and memory."""
    lora = add_adapters(load_model(EMBEDDED, dtype=torch.float32)[0], AdapterConfig(rank=16))
    steps = {}
    for name, one in (("LoRA r16", lora), ("DoRA r16", model)):
        trained = [p for p in one.train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        steps[name] = lambda one=one, optimizer=optimizer: take_steps(one, optimizer, batch, steps=1)
    _in_turns(steps, rounds=1)  # warms up: AdamW makes its moments at the first step
    times = _in_turns(steps, rounds=3)
    memory = {name: _most(step) for name, step in steps.items()}
    ratios = sorted(d / lo for d, lo in zip(times["DoRA r16"], times["LoRA r16"], strict=True))
    rows = [
        {"adapter": name, "time": f"{median(times[name]):.2f} s", "memory": f"+{most / 1e6:.0f} MB"}
        for name, most in memory.items()
    ]
    show_table(
        rows,
        "one step of 4 tickets, and what it holds at its worst moment; fp32, this machine, now. DoRA "
        f"takes {median(ratios):.2f} times LoRA's time, {ratios[0]:.2f} to {ratios[-1]:.2f} in 3 turns",
    )
    return median(ratios)


def _norms(width: int) -> dict[str, Callable[[], Tensor]]:
    """PEFT's own way and the thin way to the row norms of one square layer."""
    layer = peers.peft_layer(nn.Linear(width, width, bias=False), 16, dora=True)
    A, B, s = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    nn.init.normal_(B.weight, std=0.02)
    theirs, W = layer.lora_magnitude_vector["default"], layer.get_base_layer().weight.detach()
    squares = W.square().sum(1)
    return {
        "through B A (PEFT)": lambda: theirs.get_weight_norm(W, theirs.get_lora_weight(A, B).detach(), s),
        "without B A": lambda: row_norm(W, A.weight, B.weight, s, squares),
    }


def show_norm_cost(widths: Sequence[int] = (576, 2048, 4096)) -> None:
    """The norm through B A, as PEFT computes it, beside the thin one: time and memory per layer."""
    rows = []
    for width in widths:
        ways = _norms(width)
        theirs, thin = (way() for way in ways.values())
        assert torch.allclose(theirs, thin, rtol=1e-5), "both must give the same norms"
        times, rows = _in_turns(ways, rounds=5), [*rows, {"layer": f"{width} × {width}"}]
        for name, way in ways.items():
            rows[-1][name] = f"{1e3 * median(times[name]):.1f} ms, +{_most(way) / 1e6:.1f} MB"
    show_table(rows, "rank 16, fp32, median of 5 in turns; this machine, now")


def show_giants(names: Sequence[str] = ("Qwen3-8B", "Llama-3.3-70B")) -> None:
    """What magnitudes add to large models, and what the norm of their largest matrix holds in passing."""
    rows = []
    for name in names:
        with torch.device("meta"):  # there a tensor has a shape and no memory
            model = AutoModelForCausalLM.from_config(known_config(name), dtype=torch.bfloat16)
            add_adapters(model, AdapterConfig(method="dora", rank=16))
        layers = adapted_layers(model).values()
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        faders = sum(layer.magnitude.numel() for layer in layers)
        out, width = max((layer.weight.shape for layer in layers), key=lambda s: s[0] * s[1] + s[1] ** 2)
        rows.append(
            {
                "model": name,
                "trains": f"{numbers / 1e6:.0f} M",
                "of it faders": f"{faders / 1e6:.1f} M ({faders / numbers:.1%})",
                "largest matrix": f"{out} × {width}",
                "norm through B A": f"{4 * (out * width + width**2) / 1e9:.1f} GB",
                "thin norm": f"{4 * 16 * (2 * out + 16) / 1e6:.0f} MB",
            }
        )
    show_table(
        rows, "counted from the shapes, adapters in fp32; B A and an identity matrix against thin products"
    )
