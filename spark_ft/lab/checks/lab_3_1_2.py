"""Checks of lab 3.1.2: each compares with the full weight and names the mistakes that people make."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spark_ft.lab import parity
from spark_ft.lab.checks import (
    call,
    check,
    require,
    require_close,
    require_gradient,
    require_pair,
    require_parity,
    require_tensor,
)
from spark_ft.lab.checks.lab_3_1_1 import SHAPES, _check_start  # the first shape is square: every axis fits

WRONG_AXIS = "the norm runs over the wrong axis: each *row* of a (out, in) weight has a length, dim=1"
NOT_DETACHED = "the norm is not detached; hold it still in the backward pass: .detach()"
TWO = "decompose should return two tensors, (magnitude, direction)"
MENDS = {
    "size of tensor": "rows need m[:, None]",
    "broadcast": "rows need m[:, None]",
    "cannot be multiplied": "A is (rank, in), B (out, rank): x Aᵀ Bᵀ, B A",
}


def run(answer: Callable, what: str, *arguments: object) -> object:
    """Call an answer, and say what the shapes should be where PyTorch complains about them."""
    return call(answer, what, *arguments, mends=MENDS)


def _norm(matrix: Tensor) -> Tensor:
    return matrix.square().sum(1).sqrt()


# ── exercise 1 ──


@check
def check_decompose(answer: Callable[[Tensor], tuple[Tensor, Tensor]]) -> str:
    """Row lengths and rows of length one; their product is the weight."""
    for width, out in ((8, 8), (20, 12), (12, 20), (1, 5), (5, 1)):
        W = torch.randn(out, width) * (0.1 + 3 * torch.rand(out, 1))
        what = f"the magnitude of a {out}×{width} weight"
        m, V = require_pair(run(answer, f"decompose of a {out}×{width} weight", W), TWO)
        require(
            not (m.shape == W.shape and V.shape == (out,) and out * width > max(out, width)),
            "the two are swapped: return (magnitude, direction)",
        )
        require(
            m.shape != (out, 1),
            f"{what} has shape ({out}, 1); one number per row is enough: ({out},), no keepdim",
        )
        require(
            m.shape != () or out * width == 1,
            f"{what} is one number for the whole matrix; each row has its own: dim=1",
        )
        require(m.shape != (width,) or width == out, f"{what} has shape ({width},): {WRONG_AXIS}")
        row = _norm(W)
        require_close(
            m,
            row,
            what,
            {
                WRONG_AXIS: _norm(W.T),
                "the square root is missing": row**2,
                "that is the sum of absolute values; a length is the root of the sum of squares": (
                    W.abs().sum(1)
                ),
                "that is the root of the mean square: sum the squares, don't average them": row / width**0.5,
                "that is the length of the whole matrix, in every row": torch.full((out,), W.norm().item()),
                "that is the largest entry of each row, not its length": W.abs().amax(1),
                "that is one over the length": 1 / row,
                "that is the sum of the row; square its entries first": W.sum(1),
                "the square root was taken twice": row.sqrt(),
            },
        )
        require_close(
            V,
            W / row[:, None],
            f"the direction of a {out}×{width} weight",
            {
                "it is W itself: divide each row by its length": W,
                "its columns are divided, not its rows: the lengths need a second axis, m[:, None]": (
                    W / _norm(W.T)
                ),
                "the rows are divided by their length twice": W / row[:, None] ** 2,
                "the rows are multiplied by their lengths, not divided": W * row[:, None],
                "W is divided by the length of the whole matrix": W / W.norm(),
                "W is divided by the squares; take the root first": W / row[:, None].square(),
                "the rows add up to one; each should have length one": W / W.abs().sum(1, keepdim=True),
                "the signs are lost": W.abs() / row[:, None],
            },
        )
    half = torch.randn(12, 20, dtype=torch.bfloat16)
    m, V = require_pair(run(answer, "decompose of a bf16 weight", half), TWO)
    require_close(m, _norm(half.float()), "the magnitude of a bf16 weight", None, 2e-2)
    require_close(
        V, half.float() / _norm(half.float())[:, None], "the direction of a bf16 weight", None, 2e-2
    )
    return "one length per row, rows of length 1, and their product is W again, for 5 shapes"


# ── exercise 2 ──


class _Products(TorchDispatchMode):
    """Watches for matrix products with as many entries as the weight, and for anything larger."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.found = size, False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if isinstance(out, Tensor):
            product = function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
            self.found |= out.numel() >= self.size if product else out.numel() > self.size
        return out


@check
def check_row_norm(answer: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> str:
    """‖W + sBA‖ of every row against the full sum, and no matrix product as large as the weight."""
    for width, out, rank in (*SHAPES, (31, 17, 3)):
        W, A, B = torch.randn(out, width), torch.randn(rank, width) / width**0.5, torch.randn(out, rank)
        s = 0.5 + torch.rand(()).item()
        BA = B @ A
        plain, cross, note = W.square().sum(1), (W * BA).sum(1), BA.square().sum(1)
        what = f"the row norm for in={width}, out={out}, rank={rank}"
        mistakes = {
            "the square root is missing": _norm(W + s * BA) ** 2,
            "the middle term counts twice: (a + b)² = a² + 2ab + b²": (
                plain + s * cross + s * s * note
            ).sqrt(),
            "the middle term is missing: (a + b)² is not a² + b²": (plain + s * s * note).sqrt(),
            "scaling is not squared in the last term": (plain + 2 * s * cross + s * note).clamp(0).sqrt(),
            "scaling is missing in the middle term": (plain + 2 * cross + s * s * note).clamp(0).sqrt(),
            "scaling is missing: that is ‖W + BA‖": _norm(W + BA),
            "that is ‖W‖: the note is missing": _norm(W),
            "that is ‖sBA‖: the weight is missing": _norm(s * BA),
            "the last term is missing: it is s² · Σ (B (A Aᵀ) ⊙ B)": (plain + 2 * s * cross).clamp(0).sqrt(),
            "the middle term has the wrong sign": _norm(W - s * BA),
            "scaling is squared in the middle term": (plain + 2 * s * s * cross + s * s * note)
            .clamp(0)
            .sqrt(),
            "the last term counts twice": (plain + 2 * s * cross + 2 * s * s * note).clamp(0).sqrt(),
            "W's own share is missing": (2 * s * cross + s * s * note).clamp(0).sqrt(),
            "‖W‖ is not squared: the first term is the row sums of W ⊙ W": (
                plain.sqrt() + 2 * s * cross + s * s * note
            )
            .clamp(0)
            .sqrt(),
            "that is the norm of the whole matrix, in every row": torch.full(
                (out,), (W + s * BA).norm().item()
            ),
            "the lengths were added; add the squares, then take one root": _norm(W) + _norm(s * BA),
        }
        if width == out:
            mistakes[WRONG_AXIS] = _norm((W + s * BA).T)
            mistakes["A B instead of B A"] = _norm(W + s * A @ B)
        if width == out == rank:
            turned = (plain + 2 * s * (W @ A * B).sum(1) + s * s * note).clamp(0).sqrt()
            mistakes["W A instead of W Aᵀ in the middle term"] = turned
            mistakes["Aᵀ A instead of A Aᵀ in the last term"] = (
                (plain + 2 * s * cross + s * s * (B @ (A.T @ A) * B).sum(1)).clamp(0).sqrt()
            )
        watch = _Products(out * width)
        with watch:
            got = run(answer, what, W, A, B, s)
        require_close(got, _norm(W + s * BA), what, mistakes, tolerance=1e-4)
        require(
            not watch.found or rank >= min(width, out),
            f"{what} is right, but it built a product as large as the weight itself, {out}×{width}. "
            "First multiply W Aᵀ and A Aᵀ: those are thin",
        )
    return "‖W + sBA‖ of every row, without building B A, for 5 shapes"


# ── exercise 3 ──


@check
def check_dora_linear(answer: type[nn.Module]) -> str:
    """The whole layer: its start, what trains, the formula, bias, gradients with a constant norm."""
    for width, out, rank in (
        (64, 64, 8),
        *SHAPES,
    ):  # in the first, A has enough entries to judge their spread
        for bias in (True, False):
            base = nn.Linear(width, out, bias=bias)
            W, shift = base.weight.detach().clone(), base.bias.detach().clone() if bias else torch.zeros(out)
            layer = call(answer, "making the layer", base, rank, 6.0, mends=MENDS, may_change=[base])
            require(isinstance(layer, nn.Module), f"the layer is {type(layer).__name__}, not an nn.Module")
            _check_parts(layer, base, rank, W)
            x = torch.randn(3, width)
            what = f"in={width}, out={out}, rank={rank}, bias={bias}"
            at_start = {
                "the bias is lost": x @ W.T,
                "it is not divided by the norm ‖W + sBA‖": _norm(W) * (x @ W.T) + shift,
                "W x is missing": shift.expand(3, out),
                "the bias counts twice": x @ W.T + 2 * shift,
                "only the direction is there; m is missing": (x @ W.T) / _norm(W) + shift,
            }
            if width == out:
                at_start[WRONG_AXIS] = _norm(W) / _norm(W.T) * (x @ W.T) + shift
            got = run(layer, what, x)
            require(torch.equal(base.weight, W), "forward changed base.weight: the base stays as it is")
            require_close(
                got,
                x @ W.T + shift,
                f"a new layer's output ({what}), which should be its base's",
                at_start,
            )
            with torch.no_grad():
                layer.lora_B.normal_(std=width**-0.5)
                layer.magnitude.mul_(0.3 + 1.5 * torch.rand(out))
            for lead in ((3,), (), (2, 4)):
                _check_output(layer, torch.randn(*lead, width, requires_grad=True), W, shift, what)
    return "starts as its base; A, B and magnitude train; the norm is held still; the bias is not scaled"


def _check_parts(layer: nn.Module, base: nn.Linear, rank: int, W: Tensor) -> None:
    out, width = W.shape
    for name in ("lora_A", "lora_B", "magnitude"):
        part = getattr(layer, name, None)
        require(part is not None, f"the layer has no self.{name}: the names in the text are fixed")
        require(
            isinstance(part, nn.Parameter) and part.requires_grad,
            f"self.{name} is {type(part).__name__}: the optimizer only sees an nn.Parameter that trains",
        )
    require(getattr(layer, "base", None) is base, "self.base is not the layer that came in: don't copy it")
    A, B, m = layer.lora_A, layer.lora_B, layer.magnitude
    require(
        A.shape == (rank, width) and B.shape == (out, rank),
        f"lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, but should be ({rank}, {width}) and "
        f"({out}, {rank})",
    )
    if A.numel() > 500:
        _check_start(A, B, ("lora_A", "lora_B"))
    require(m.shape != (width,) or width == out, f"the magnitude has shape ({width},): {WRONG_AXIS}")
    require(
        m.any(),
        "the magnitude starts at zero: ‖BA‖ is zero as long as B is. It should start as W's row lengths",
    )
    require_close(
        m,
        _norm(W),
        "the magnitude at the start",
        {
            WRONG_AXIS: _norm(W.T),
            "it starts at one; a new layer equals its base only if it starts as W's row lengths": torch.ones(
                out
            ),
            "that is ‖A‖, not ‖W‖": _norm(A.detach()) if len(A) == out else W,
            "the square root is missing": _norm(W) ** 2,
            "that is the length of the whole matrix, in every row": torch.full((out,), W.norm().item()),
            "that is the sum of absolute values": W.abs().sum(1),
        },
    )
    trains = [name for name, p in layer.named_parameters() if p.requires_grad]
    extra = [name for name in trains if name not in ("lora_A", "lora_B", "magnitude")]
    require(not extra, f"{', '.join(extra)} still trains: freeze the base, weight and bias; add nothing else")
    scaling = getattr(layer, "scaling", None)
    require(scaling is not None, "the layer has no self.scaling: alpha / rank")
    wrong = {"that is alpha": 6.0, "upside down": rank / 6.0, "that is alpha / √rank": 6.0 / rank**0.5}
    require_close(scaling, 6.0 / rank, f"self.scaling for alpha=6, rank={rank}", wrong)


def _check_output(layer: nn.Module, x: Tensor, W: Tensor, shift: Tensor, what: str) -> None:
    A, B, m, s = layer.lora_A, layer.lora_B, layer.magnitude, 6.0 / len(layer.lora_A)
    V = W + s * B @ A
    n, plain, low = _norm(V), x @ W.T, s * x @ (B @ A).T
    expected, moving = (m / each * (plain + low) + shift for each in (n.detach(), n))
    mistakes = {
        "the norm is that of W alone; it should be ‖W + sBA‖": m / _norm(W) * (plain + low) + shift,
        "the bias is scaled too; the magnitude only scales the weight's rows": m / n * (plain + low + shift),
        "the magnitude has no effect: that is LoRA": plain + low + shift,
        "the bias is lost": m / n * (plain + low),
        "the bias counts twice": m / n * (plain + low) + 2 * shift,
        "scaling is missing in the norm": m / _norm(W + B @ A) * (plain + low) + shift,
        "scaling is missing": m / _norm(W + B @ A) * (plain + low / s) + shift,
        "scaling is only in the norm": m / n * (plain + low / s) + shift,
        "the note's share is not scaled by m / n": m / n * plain + low + shift,
        "the base's share is not scaled by m / n": plain + m / n * low + shift,
        "the rows do not turn: A and B are missing": m / _norm(W) * plain + shift,
        "the rows do not turn: A and B appear only in the norm": m / n * plain + shift,
        "it is divided by m and multiplied by n: upside down": n / m * (plain + low) + shift,
        "it is not divided by the norm": m * (plain + low) + shift,
        "m is missing: that is the direction alone": (plain + low) / n + shift,
        "the norm is that of sBA alone": m / _norm(s * B @ A) * (plain + low) + shift,
        "the base's own output is added once more": m / n * (plain + low) + plain + 2 * shift,
        "the note is subtracted": m / _norm(W - s * B @ A) * (plain - low) + shift,
        "the norm is squared: its root is missing": m / n**2 * (plain + low) + shift,
        "divided by the length of the whole matrix, not of each row": m / V.norm() * (plain + low) + shift,
        "scaling is applied twice": m / n * (plain + s * low) + shift,
    }
    if W.shape[0] == W.shape[1]:
        mistakes[WRONG_AXIS] = m / _norm(V.T) * (plain + low) + shift
        mistakes["m / n scales the inputs, not the outputs"] = (x * m / n) @ V.T + shift
        mistakes["x W instead of x Wᵀ: use F.linear(x, W)"] = m / n * (x @ W + low) + shift
        if len(A) == len(W):
            mistakes["A B instead of B A in the norm"] = m / _norm(W + s * A @ B) * (plain + low) + shift
            mistakes["x A B: the transposes are missing, x Aᵀ Bᵀ"] = m / n * (plain + s * x @ A @ B) + shift
    got = run(layer, f"the output for x {tuple(x.shape)}", x)
    what = f"the output of a trained layer (x {tuple(x.shape)}, {what})"
    require_close(got, expected, what, mistakes, tolerance=5e-5)
    inputs = {"magnitude": m, "lora_A": A, "lora_B": B, "x": x}
    require_gradient(got, inputs, expected, "the output", {NOT_DETACHED: moving}, tolerance=2e-4)


# ── exercise 4 ──


@check
def check_merged_weight(answer: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> str:
    """m · (W + sBA) / ‖W + sBA‖, row by row."""
    for width, out, rank in SHAPES:
        W, A, B = torch.randn(out, width), torch.randn(rank, width), torch.randn(out, rank) / width**0.5
        m, s = 0.1 + 3 * torch.rand(out), 0.5 + torch.rand(()).item()
        V = W + s * B @ A
        n = _norm(V)
        mistakes = {
            "it is not divided by the norm: m · (W + sBA)": m[:, None] * V,
            "the norm is that of W alone": (m / _norm(W))[:, None] * V,
            "the magnitude is missing: that is the direction alone": V / n[:, None],
            "that is LoRA's merged weight, W + sBA: the magnitude is missing": V,
            "scaling is missing": (m / _norm(W + B @ A))[:, None] * (W + B @ A),
            "scaling is missing in the norm": (m / _norm(W + B @ A))[:, None] * V,
            "only W is scaled; the note is part of the row": (m / n)[:, None] * W + s * B @ A,
            "only the note is scaled; W is part of the row": W + (m / n)[:, None] * (s * B @ A),
            "that is the magnitude times the direction of W: the note is missing": (m / _norm(W))[:, None]
            * W,
            "the note is added after the scaling, and not scaled": (m / _norm(W))[:, None] * W + s * B @ A,
            "that is the change, not the weight: W was subtracted": m[:, None] * V / n[:, None] - W,
            "W is added once more": W + m[:, None] * V / n[:, None],
            "it is divided by the norm twice": m[:, None] * V / n[:, None] ** 2,
            "upside down: it should be m / n": (n / m)[:, None] * V,
            "divided by the length of the whole matrix, not of each row": m[:, None] * V / V.norm(),
            "the note is subtracted": (m / _norm(W - s * B @ A))[:, None] * (W - s * B @ A),
            "it is multiplied by the norm, not divided": m[:, None] * V * n[:, None],
        }
        if width == out:
            mistakes[WRONG_AXIS] = (m / _norm(V.T))[:, None] * V
            mistakes["the magnitude scales columns, not rows: it needs a second axis, m[:, None]"] = m / n * V
            mistakes["A B instead of B A"] = (m / _norm(W + s * A @ B))[:, None] * (W + s * A @ B)
        what = f"the merged weight for in={width}, out={out}, rank={rank}"
        right = m[:, None] * V / n[:, None]
        if width == out:
            mistakes["the result is transposed"] = right.T
        require_close(run(answer, what, W, m, A, B, s), right, what, mistakes, tolerance=5e-5)
    W, m, A, B = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((20, 12), (20,), (4, 12), (20, 4)))
    V = W.float() + 0.5 * B.float() @ A.float()
    what = "the merged weight in bf16"
    require_close(
        run(answer, what, W, m, A, B, 0.5),
        (m.float() / _norm(V))[:, None] * V,
        what,
        None,
        3e-2,
        torch.bfloat16,
    )
    return "the merged weight is m · (W + sBA) / ‖W + sBA‖, for 4 shapes"


# ── exercise 5 ──


@check
def check_movement(answer: Callable[[Tensor, Tensor], tuple[float, float]]) -> str:
    """Mean |change of a row's length| and mean 1 − cos of a row's turn, against known lengths and angles."""
    for width, out, turn in ((8, 8, 0.3), (30, 12, 1.2), (12, 30, 0.02), (40, 20, 2.5)):
        length = 0.5 + 2 * torch.rand(out, dtype=torch.float64)
        first = torch.randn(out, width, dtype=torch.float64)
        first /= _norm(first)[:, None]
        side = torch.randn(out, width, dtype=torch.float64)
        side -= (side * first).sum(1, keepdim=True) * first
        side /= _norm(side)[:, None]
        angle = turn * (0.5 + torch.rand(out, dtype=torch.float64))
        change = 0.4 * torch.randn(out, dtype=torch.float64)  # of both signs
        before = length[:, None] * first
        grown = (length + change).abs() + 0.05
        after = grown[:, None] * (angle.cos()[:, None] * first + angle.sin()[:, None] * side)
        pair = run(answer, f"movement of a {out}×{width} weight", before, after)
        require(
            isinstance(pair, tuple | list) and len(pair) == 2,
            f"movement should return two numbers, (ΔM, ΔD), not {type(pair).__name__}",
        )
        moved = require_tensor(pair[0], f"ΔM of a {out}×{width} weight")
        turned = require_tensor(pair[1], f"ΔD of a {out}×{width} weight")
        for name, value in (("ΔM", moved), ("ΔD", turned)):
            require(value.shape != (out,), f"{name} has one number per row; take their mean")
            require(value.shape != (width,), f"{name} has one number per column: {WRONG_AXIS}")
        cosine, longer = angle.cos(), grown - length
        shifted, columns = _norm(after - before), torch.cosine_similarity(before, after, dim=0)
        moves = {
            "longer and shorter rows cancel: take each row's absolute value first": longer.mean(),
            "that is the absolute value of the mean, not the mean of absolute values": longer.mean().abs(),
            "it is the sum over the rows, not their mean": longer.abs().sum(),
            "it is squared: take absolute values": longer.square().mean(),
            "it is a share of the old length; the paper takes the difference": (longer / length).abs().mean(),
            "that is the length of the rows' difference, not the difference of their lengths": shifted.mean(),
            WRONG_AXIS: (_norm(after.T) - _norm(before.T)).abs().mean(),
            "it is ΔD: the two are swapped": (1 - cosine).mean(),
            "that is the change of the whole matrix's length": (after.norm() - before.norm()).abs(),
            "the root of the mean square; take the mean of absolute values": longer.square().mean().sqrt(),
            "that is the median; take the mean": longer.abs().median(),
            "that is the largest change; take the mean": longer.abs().max(),
            "the squared lengths were subtracted: take the roots first": (
                (_norm(after) ** 2 - _norm(before) ** 2).abs().mean()
            ),
        }
        turns = {
            "that is the cosine, which is 1 where nothing turns; subtract it from 1": cosine.mean(),
            "that is the angle, not 1 − cos": angle.mean(),
            "it is the sum over the rows, not their mean": (1 - cosine).sum(),
            "the cosine runs over the wrong axis: each *row* has a direction: dim=1": (1 - columns).mean(),
            "the rows' lengths are still in it: divide by both": (1 - (before * after).sum(1)).mean(),
            "the sign is wrong: 1 − cos, not cos − 1": (cosine - 1).mean(),
            "that is 1 + cos": (1 + cosine).mean(),
            "the matrix is taken as one long row: give the cosine dim=1": (
                1 - torch.cosine_similarity(before.flatten(), after.flatten(), dim=0)
            ),
            "that is 1 − cos²": (1 - cosine**2).mean(),
            "that is the length of the directions' difference": (2 - 2 * cosine).sqrt().mean(),
            "the absolute value of the cosine loses wide turns": (1 - cosine.abs()).mean(),
        }
        require_close(moved, longer.abs().mean(), f"ΔM of a {out}×{width} weight", moves)
        require_close(turned, (1 - cosine).mean(), f"ΔD of a {out}×{width} weight", turns)
    return "how far lengths moved and how far directions turned, for 4 shapes and small to wide turns"


# ── beside PEFT ──


@check
def check_parity(
    answer: type[nn.Module], merged_weight: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
) -> str:
    """Yours against PEFT's own DoRA layer on the same weights."""

    def merged(layer: nn.Module) -> Tensor:
        return merged_weight(layer.base.weight, layer.magnitude, layer.lora_A, layer.lora_B, layer.scaling)

    def layer(base: nn.Linear, rank: int, alpha: float, _: float) -> nn.Module:
        return answer(base, rank, alpha)

    differences = parity.dora_against_peft(layer, merged)
    require_parity(differences, "PEFT's")
    return "your layer equals PEFT's: " + ", ".join(
        f"{name} to {value:.0e}" for name, value in differences.items()
    )
