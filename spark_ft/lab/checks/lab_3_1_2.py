"""Checks of lab 3.1.2: each compares with the full weight and names the mistakes that people make."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spark_ft.lab import parity
from spark_ft.lab.checks import check, require, require_close, require_pair, require_parity
from spark_ft.lab.checks.lab_3_1_1 import SHAPES, run  # its first shape is square: every axis fits there

WRONG_AXIS = (
    "the norm runs over the wrong axis: a weight is (out, in), and each of its *rows* has a length: use dim=1"
)
NOT_DETACHED = (
    "the norm is not detached. The output is the same, but each row's gradient loses its part along the row; "
    "DoRA treats the norm as a constant in the backward pass: .detach()"
)


def _norm(matrix: Tensor) -> Tensor:
    return matrix.square().sum(1).sqrt()


@check
def check_decompose(answer: Callable[[Tensor], tuple[Tensor, Tensor]]) -> str:
    """Row lengths and rows of length one; their product is the weight."""
    for width, out in ((8, 8), (20, 12), (12, 20), (1, 5), (5, 1)):
        W = torch.randn(out, width) * (0.1 + 3 * torch.rand(out, 1))
        m, V = require_pair(answer(W.clone()), "decompose should return two tensors, (magnitude, direction)")
        what = f"the magnitude of a {out}×{width} weight"
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
            },
        )
    return "one length per row, rows of length 1, and their product is W again, for 5 shapes"


class _Products(TorchDispatchMode):
    """Watches for matrix products with as many entries as the weight."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.found = size, False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.found |= out.numel() == self.size
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
            "the lengths were added; add the squares, then take one root": _norm(W) + _norm(s * BA),
        }
        if width == out:
            mistakes[WRONG_AXIS] = _norm((W + s * BA).T)
            mistakes["A B instead of B A"] = _norm(W + s * A @ B)
        watch = _Products(out * width)
        with watch:
            got = run(answer, what, W.clone(), A.clone(), B.clone(), s)
        require_close(got, _norm(W + s * BA), what, mistakes, tolerance=1e-4)
        require(
            not watch.found or rank >= min(width, out),
            f"{what} is right, but it built a product as large as the weight itself, {out}×{width}. "
            "Multiply A with Wᵀ or with Aᵀ first: those products are thin",
        )
    return "‖W + sBA‖ of every row, without building B A, for 5 shapes"


@check
def check_dora_linear(answer: type[nn.Module]) -> str:
    """The whole layer: its start, what trains, the formula, bias, gradients with a constant norm, dropout."""
    for width, out, rank in SHAPES:
        for bias in (True, False):
            base = nn.Linear(width, out, bias=bias)
            W, shift = base.weight.detach().clone(), base.bias.detach().clone() if bias else torch.zeros(out)
            layer = answer(base, rank, 6.0, 0.0)
            _check_parts(layer, width, out, rank, W)
            x = torch.randn(3, width)
            what = f"in={width}, out={out}, rank={rank}, bias={bias}"
            at_start = {
                "the bias is lost": x @ W.T,
                "it is not divided by the norm ‖W + sBA‖": _norm(W) * (x @ W.T) + shift,
            }
            if width == out:
                at_start[WRONG_AXIS] = _norm(W) / _norm(W.T) * (x @ W.T) + shift
            require_close(
                run(layer, what, x),
                x @ W.T + shift,
                f"a new layer's output ({what}), which should be its base's",
                at_start,
            )
            with torch.no_grad():
                layer.lora_B.normal_(std=width**-0.5)
                layer.magnitude.mul_(0.3 + 1.5 * torch.rand(out))
            _check_output_and_gradients(layer, W, shift, 6.0 / rank, x, what)
    _check_dropout(answer)
    return "starts as its base; A, B and magnitude train; constant norm; bias not scaled; dropout as in PEFT"


def _check_parts(layer: nn.Module, width: int, out: int, rank: int, W: Tensor) -> None:
    for name in ("lora_A", "lora_B", "magnitude"):
        part = getattr(layer, name, None)
        require(
            isinstance(part, nn.Parameter) and part.requires_grad,
            f"self.{name} is {type(part).__name__}: the optimizer only sees an nn.Parameter",
        )
    A, B, m = layer.lora_A, layer.lora_B, layer.magnitude
    require(
        A.shape == (rank, width) and B.shape == (out, rank),
        f"lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, but should be ({rank}, {width}) and "
        f"({out}, {rank})",
    )
    require(A.any() and not B.any(), "A should start at random and B at zero, as in LoRA")
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
        },
    )
    extra = [
        n
        for n, p in layer.named_parameters()
        if p.requires_grad and n not in ("lora_A", "lora_B", "magnitude")
    ]
    require(not extra, f"{', '.join(extra)} still trains: freeze the base, weight and bias")


def _check_output_and_gradients(
    layer: nn.Module, W: Tensor, shift: Tensor, s: float, x: Tensor, what: str
) -> None:
    out, width = W.shape
    leaves = [p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.magnitude, x)]
    A, B, m, x_oracle = leaves

    def oracle(still: bool) -> Tensor:
        V = W + s * B @ A
        n = _norm(V).detach() if still else _norm(V)
        return x_oracle @ ((m / n)[:, None] * V).T + shift

    with torch.no_grad():
        low, plain, n = s * x @ (B @ A).T, x @ W.T, _norm(W + s * B @ A)
        mistakes = {
            "the norm is that of W alone; it should be ‖W + sBA‖": m / _norm(W) * (plain + low) + shift,
            "the bias is scaled too; the magnitude only scales the weight's rows": (
                m / n * (plain + low + shift)
            ),
            "the magnitude has no effect: that is LoRA": plain + low + shift,
            "the bias is lost": m / n * (plain + low),
            "scaling is missing in the norm": m / _norm(W + B @ A) * (plain + low) + shift,
            "scaling is missing": m / _norm(W + B @ A) * (plain + low / s) + shift,
            "the note's share is not scaled by m / n": m / n * plain + low + shift,
            "the base's share is not scaled by m / n": plain + m / n * low + shift,
            "the rows do not turn: A and B are missing": m / _norm(W) * plain + shift,
            "the rows do not turn: A and B appear only in the norm": m / n * plain + shift,
        }
        if out == width:
            mistakes[WRONG_AXIS] = m / _norm((W + s * B @ A).T) * (plain + low) + shift
            mistakes["m / n scales the inputs, not the outputs"] = (x * m / n) @ (W + s * B @ A).T + shift
    x_mine = x.clone().requires_grad_()
    got = run(layer, what, x_mine)
    expected = oracle(still=True)
    require_close(got, expected, f"the output of a trained layer ({what})", mistakes, tolerance=5e-5)
    require(
        got.requires_grad, "the output carries no gradient: no .detach(), .data or no_grad around the forward"
    )
    slope = torch.randn(got.shape)
    got.backward(slope)
    right = torch.autograd.grad(expected, leaves, slope)
    moving = torch.autograd.grad(oracle(still=False), leaves, slope)
    mine = (layer.lora_A.grad, layer.lora_B.grad, layer.magnitude.grad, x_mine.grad)
    for name, gradient, oracles, other in zip(
        ("lora_A", "lora_B", "magnitude", "x"), mine, right, moving, strict=True
    ):
        require(gradient is not None, f"{name} gets no gradient: no .detach() or .data on it in forward")
        unlike = {} if torch.allclose(oracles, other) else {NOT_DETACHED: other}
        require_close(gradient, oracles, f"{name}'s gradient ({what})", unlike, tolerance=2e-4)


def _check_dropout(answer: type[nn.Module]) -> None:
    """One-hot inputs: each is dropped or kept whole, so each output is one of two known vectors."""
    width, out, rank, rows = 48, 32, 4, 3000
    base = nn.Linear(width, out)
    W, shift = base.weight.detach().clone(), base.bias.detach().clone()
    layer = answer(base, rank, 2.0 * rank, 0.5)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_(std=0.2)
        layer.magnitude.mul_(1.5 + torch.rand(out))
    m, s = layer.magnitude.detach(), 2.0
    BA = (layer.lora_B @ layer.lora_A).detach()
    g = m / _norm(W + s * BA)
    x = torch.eye(width)[torch.randint(width, (rows,))]
    plain, low = x @ W.T, s * x @ BA.T
    layer.eval()
    what = "dropout is active in eval mode: F.dropout needs training=self.training. The output in eval"
    require_close(run(layer, "evaluating", x), g * (plain + low) + shift, what, tolerance=1e-4)
    layer.train()
    got = run(layer, "training with dropout", x).detach()
    kept_as = {  # what a row becomes if its one is dropped, and if it is kept and scaled by 1 / (1 − p) = 2
        "right": (plain + shift, plain + shift + 2 * (g - 1) * plain + 2 * g * low),
        "dropout=0.5 does nothing in training: what DoRA adds to the base should see a dropped input": (
            g * (plain + low) + shift, g * (plain + low) + shift,
        ),
        "dropout is handled as LoRA's, on the input of B A only. DoRA also adds the change of volume, "
        "(m/n − 1) · W x, so that sees the dropped input too; only base(x) sees all of x": (
            g * plain + shift, g * plain + shift + 2 * g * low,
        ),
        "dropout acts on every input, the base's too: the base should see all of x": (
            shift.expand(rows, out), 2 * g * (plain + low) + shift,
        ),
        "dropout acts on the change of volume only, not on the input of B A": (
            plain + shift + g * low, plain + shift + 2 * (g - 1) * plain + g * low,
        ),
        "what is kept does not grow by 1 / (1 − p): use F.dropout or nn.Dropout": (
            plain + shift, g * (plain + low) + shift,
        ),
    }  # fmt: skip

    def is_one_of(first: Tensor, second: Tensor) -> bool:
        return bool(((got - first).abs().amax(1).minimum((got - second).abs().amax(1)) < 1e-4).all())

    for message, (dropped, kept) in kept_as.items():
        if message != "right":
            require(not is_one_of(dropped, kept), message)
    dropped, kept = kept_as["right"]
    one_mask = is_one_of(dropped, kept)
    if not one_mask:
        parts = (dropped + 2 * (g - 1) * plain, dropped + 2 * g * low)
        distance = torch.stack([(got - row).abs().amax(1) for row in (dropped, kept, *parts)]).amin(0)
        require(
            (distance >= 1e-4).any(),
            "dropout is drawn twice: W and B A should see the same dropped input, so drop x once for both",
        )
    require(
        one_mask,
        "the formula does not allow this output in training with dropout: it is base(x) + (m/n − 1) · W x̃ + "
        "(m/n) · s · B A x̃, where x̃ is x with dropped entries",
    )
    share = ((got - dropped).abs().amax(1) < 1e-4).float().mean().item()
    require(abs(share - 0.5) < 0.06, f"with dropout=0.5, {share:.0%} of the inputs were dropped")


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
        }
        if width == out:
            mistakes[WRONG_AXIS] = (m / _norm(V.T))[:, None] * V
            mistakes["the magnitude scales columns, not rows: it needs a second axis, m[:, None]"] = m / n * V
            mistakes["A B instead of B A"] = (m / _norm(W + s * A @ B))[:, None] * (W + s * A @ B)
        what = f"the merged weight for in={width}, out={out}, rank={rank}"
        got = run(answer, what, W.clone(), m.clone(), A.clone(), B.clone(), s)
        require_close(got, m[:, None] * V / n[:, None], what, mistakes, tolerance=5e-5)
    return "the merged weight is m · (W + sBA) / ‖W + sBA‖, for 4 shapes"


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
        pair = answer(before.clone(), after.clone())
        two = isinstance(pair, tuple | list) and len(pair) == 2
        require(
            two and all(isinstance(value, float | int | Tensor) for value in pair),
            f"movement should return two numbers, (ΔM, ΔD), not {pair if two else type(pair).__name__}",
        )
        moved, turned = (torch.as_tensor(value, dtype=torch.float64) for value in pair)
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
        }
        turns = {
            "that is the cosine, which is 1 where nothing turns; subtract it from 1": cosine.mean(),
            "that is the angle, not 1 − cos": angle.mean(),
            "it is the sum over the rows, not their mean": (1 - cosine).sum(),
            "the cosine runs over the wrong axis: each *row* has a direction: dim=1": (1 - columns).mean(),
            "the rows' lengths are still in it: divide by both": (1 - (before * after).sum(1)).mean(),
        }
        require_close(moved, longer.abs().mean(), f"ΔM of a {out}×{width} weight", moves)
        require_close(turned, (1 - cosine).mean(), f"ΔD of a {out}×{width} weight", turns)
    return "how far lengths moved and how far directions turned, for 4 shapes and small to wide turns"


@check
def check_parity(
    answer: type[nn.Module], merged_weight: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
) -> str:
    """Yours against PEFT's own DoRA layer on the same weights."""

    def merged(layer: nn.Module) -> Tensor:
        return merged_weight(layer.base.weight, layer.magnitude, layer.lora_A, layer.lora_B, layer.scaling)

    differences = parity.dora_against_peft(answer, merged)
    require_parity(differences, "PEFT's")
    return "your layer equals PEFT's: " + ", ".join(
        f"{name} to {value:.0e}" for name, value in differences.items()
    )
