"""Measure two libraries' versions of the same step, side by side in one run.

Before anything is timed, both sides' loss and gradient must be equal. Then the sides take turns, and the
result is the median of the pairwise ratios: whatever slows the machine for a while slows both halves of a
pair. Memory is measured in a process of its own.
"""

import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from statistics import median

import torch
from torch import Tensor, nn

from spark_ft.bench import quiet_known_messages
from spark_ft.data.chat import IGNORE
from spark_ft.memory.machine import measure
from spark_ft.methods.lora import LoRALinear
from spark_ft.scoring import packed_row

TOLERANCE = 1e-5  # largest relative difference of the loss, fp32
# … and of the gradient: our head and transformers' loss use torch's softmax, which is coarser on a CPU than
# TRL's head: with random adapters it is 4e-5 off an fp64 gradient, and TRL's 4e-6.
GRADIENT_TOLERANCE = 1e-4
Gemms = dict[tuple[int, int, int], int]  # (rows, in, out) of x Wᵀ → how often a step computes it


@dataclass(frozen=True)
class Side:
    """One library's version of a step.

    Args:
        step: the step, as it is timed.
        loss_and_gradient: (loss, gradient by parameter name), computed without changing any weight.
    """

    step: Callable[[], object]
    loss_and_gradient: Callable[[], tuple[float, dict[str, Tensor]]]


@dataclass(frozen=True)
class Row:
    """What is compared.

    Args:
        name: what it is called on the command line.
        says: what one step is, in a few words.
        ours, theirs: functions that build a side, the same each time; another process imports them by name.
        work: floating-point operations of one step, and the shapes of its matrix products.
        repeats: steps in one timing, for steps that are too short to time alone.
        records: rows that one step reads, where it reads and does not train.
    """

    name: str
    says: str
    ours: Callable[[], Side]
    theirs: Callable[[], Side]
    work: Callable[[], tuple[int, Gemms]]
    repeats: int = 1
    records: int = 0


@dataclass(frozen=True)
class Result:
    """What was measured; `seconds` are of one step, `order` is the order in which the sides were timed."""

    row: str
    says: str
    ours_seconds: list[float]
    theirs_seconds: list[float]
    order: str
    loss_difference: float
    gradient_difference: float
    ours_extra_bytes: int
    theirs_extra_bytes: int
    step_flops: int
    gemm_gflops: float
    records: int = 0

    @property
    def ratios(self) -> list[float]:
        """theirs / ours of each pair: 2 means that ours took half the time."""
        return [theirs / ours for ours, theirs in zip(self.ours_seconds, self.theirs_seconds, strict=True)]

    @property
    def gflops(self) -> float:
        """What our step reaches, at its median time."""
        return self.step_flops / median(self.ours_seconds) / 1e9


# ── the harness ─────────────────────────────────────────────────────────────────────────────────────────────


def compare(row: Row, pairs: int = 7) -> Result:
    """Check that both sides compute the same, then time them in turns, then measure each one's memory.

    Raises:
        ValueError: the sides' losses or gradients differ by more than rounding; says which and by how much.
    """
    ours, theirs = row.ours(), row.theirs()
    loss_difference, gradient_difference = check_equal(row.name, ours, theirs)
    flops, gemms = row.work()
    rate = GemmRate(gemms)
    for side in (ours, theirs, ours, theirs):  # warm-up: allocator, thread pools, optimizer state
        side.step()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    order = ""
    for _ in range(pairs):
        for name, side in (("ours", ours), ("theirs", theirs)):
            seconds[name].append(_seconds(side.step, row.repeats))
            order += name[0]
        rate.sample()
    del ours, theirs, side
    gc.collect()
    extra = [peak_extra_bytes(build) for build in (row.ours, row.theirs)]
    return Result(
        row.name,
        row.says,
        seconds["ours"],
        seconds["theirs"],
        order,
        loss_difference,
        gradient_difference,
        *extra,
        flops,
        rate.gflops,
        row.records,
    )


def check_equal(name: str, ours: Side, theirs: Side) -> tuple[float, float]:
    """Relative differences of loss and of the whole gradient, ‖g − g'‖ / ‖g'‖.

    Raises:
        ValueError: either is above its tolerance or not a number, or the sides have gradients of different
        parameters.
    """
    (loss, gradient), (their_loss, their_gradient) = ours.loss_and_gradient(), theirs.loss_and_gradient()
    if gradient.keys() != their_gradient.keys():
        alone = sorted(gradient.keys() ^ their_gradient.keys())
        raise ValueError(f"{name}: only one side has a gradient of {', '.join(alone[:3])}")
    loss_difference = abs(loss - their_loss) / abs(their_loss)
    if not loss_difference <= TOLERANCE:
        raise ValueError(
            f"{name}: the losses differ by {loss_difference:.1e} (ours {loss:.8g}, theirs {their_loss:.8g}; "
            f"at most {TOLERANCE:g})"
        )
    apart = {key: (g.double() - their_gradient[key].double()).norm().item() for key, g in gradient.items()}
    whole = sum(g.double().norm().item() ** 2 for g in their_gradient.values()) ** 0.5
    difference = sum(d**2 for d in apart.values()) ** 0.5 / whole
    if not difference <= GRADIENT_TOLERANCE:
        raise ValueError(
            f"{name}: the gradients differ by {difference:.1e} (at most {GRADIENT_TOLERANCE:g}), "
            f"most of all that of {max(apart, key=apart.get)}"
        )
    return loss_difference, difference


class GemmRate:
    """The machine's fp32 rate on a step's matrix products: each shape's best run, weighted as in the step."""

    def __init__(self, gemms: Gemms):
        self.gemms = gemms
        self.best = dict.fromkeys(gemms, float("inf"))

    def sample(self, runs: int = 3) -> None:
        device = this_device()
        for rows, inner, out in self.gemms:
            x, w = torch.randn(rows, inner, device=device), torch.randn(out, inner, device=device)
            for _ in range(runs):
                seconds = _seconds(lambda x=x, w=w: x @ w.T, 1)
                self.best[rows, inner, out] = min(self.best[rows, inner, out], seconds)

    @property
    def gflops(self) -> float:
        flops = sum(2 * m * k * n * count for (m, k, n), count in self.gemms.items())
        seconds = sum(self.best[shape] * count for shape, count in self.gemms.items())
        return flops / seconds / 1e9 if flops else 0.0


def this_device() -> str:
    """Where the bench computes: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(step: Callable[[], object], repeats: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    _synchronize()
    return (time.perf_counter() - started) / repeats


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────


def peak_extra_bytes(build: Callable[[], Side], steps: int = 2) -> int:
    """The most memory that a few steps hold at once, beyond what the built side holds; in a fresh process.

    Gradients, optimizer state and whatever is kept for backward count; weights and libraries do not. On a
    CPU this is resident memory, on CUDA what torch allocates on the device.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start_process) as fresh:
        return fresh.submit(_peak_of_steps, build, steps, torch.get_num_threads()).result()


def start_process() -> None:
    """Silence what other libraries say about nothing, in this process."""
    from transformers.utils import logging

    quiet_known_messages()
    logging.disable_progress_bar()


def _peak_of_steps(build: Callable[[], Side], steps: int, threads: int) -> int:
    torch.set_num_threads(threads)
    side = build()
    once = torch.randn(2048, 2048, device=this_device(), requires_grad=True)
    (once @ once).sum().backward()  # the first matrix product makes the libraries' lasting workspaces
    del once
    with measure() as memory:
        for _ in range(steps):
            side.step()
    return memory.extra


# ── counting a step's work ──────────────────────────────────────────────────────────────────────────────────


def step_flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Floating-point operations that one SFT step on this batch needs, in its linear layers and its head.

        2·N·in·out   per linear layer forward, again for its input's gradient, again where it trains
        6·N·r·(in + out)   for each adapter: forward, gradient of its input, gradients of A and B
        4·M·V·H      for the head: logits, and their gradient with respect to the hidden states

    N counts the tokens that the step computes, M the completion tokens: padding, copies of a common
    beginning, and prompt rows in the head are not computed. Attention's scores, element-wise work and
    whatever is computed twice are left out, so a rate made from it is modest.
    """
    return pass_flops(model, _computed_tokens(model, batch), _completion_tokens(batch))


def pass_flops(model: nn.Module, tokens: int, rows: int, backward: bool = True, adapters: bool = True) -> int:
    """`step_flops` for `tokens` of which `rows` are scored; without backward or without adapters if told."""
    head, total = model.get_output_embeddings(), 0
    for module in model.modules():
        if isinstance(module, LoRALinear):
            sizes = module.rank * (module.in_features + module.out_features)
            total += adapters * (6 if backward else 2) * tokens * sizes
        elif isinstance(module, nn.Linear):
            passes = 1 + backward * (1 + module.weight.requires_grad)
            total += passes * 2 * module.weight.numel() * (rows if module is head else tokens)
    return total


def step_gemms(model: nn.Module, batch: dict[str, Tensor]) -> Gemms:
    """The shapes of the model's linear layers at this batch's size, and how often each occurs."""
    return pass_gemms(model, _computed_tokens(model, batch), _completion_tokens(batch))


def pass_gemms(model: nn.Module, tokens: int, rows: int) -> Gemms:
    """`step_gemms` for `tokens` of which `rows` are scored."""
    head, gemms = model.get_output_embeddings(), {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = (rows if module is head else tokens, module.in_features, module.out_features)
            gemms[shape] = gemms.get(shape, 0) + 1
    return gemms


def _computed_tokens(model: nn.Module, batch: dict[str, Tensor]) -> int:
    row = packed_row(model, batch)
    return row.ids.numel() if row else int(batch["attention_mask"].sum())


def _completion_tokens(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORE).sum())


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────


def machine() -> dict[str, object]:
    """Where, when and with what a measurement was taken."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "datasets")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def table(results: Sequence[Result], where: dict[str, object]) -> str:
    """A Markdown table of the results, what each row is, and where they were measured."""
    head = ("row", "ours", "theirs", "theirs / ours (range)")
    head += ("extra memory: ours", "theirs", "theirs / ours", "ours, GFLOP/s", "of the GEMM rate")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for r in results:
        cells = (
            r.row,
            _time(median(r.ours_seconds)),
            _time(median(r.theirs_seconds)),
            f"**{median(r.ratios):.2f}** ({min(r.ratios):.2f}–{max(r.ratios):.2f})",
            _megabytes(r.ours_extra_bytes),
            _megabytes(r.theirs_extra_bytes),
            f"**{r.theirs_extra_bytes / r.ours_extra_bytes:.2f}**" if r.ours_extra_bytes > 1e6 else "–",
            f"{r.gflops:.0f}" if r.step_flops else "–",
            f"{r.gflops / r.gemm_gflops:.0%} of {r.gemm_gflops:.0f}" if r.step_flops else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {r.row}: {r.says}. {_equality(r)}; {len(r.ratios)} pairs." for r in results)]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines.append(
        f"\n{where['device']}, {where['cores']} cores, {where['threads']} threads, "
        f"load {where['load_average']} at the start, fp32, {versions}, {where['date']}. MB = 10⁶ bytes."
    )
    return "\n".join(lines)


def _equality(r: Result) -> str:
    if r.records:
        rates = (r.records / median(seconds) for seconds in (r.ours_seconds, r.theirs_seconds))
        return "Equal first: every row; ours {:,.0f} rows per second, theirs {:,.0f}".format(*rates)
    return f"Equal first: loss to {r.loss_difference:.0e}, gradient to {r.gradient_difference:.0e}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
