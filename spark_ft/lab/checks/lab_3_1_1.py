"""Checks of lab 3.1.1: each compares with the full matrix and names the mistakes that people make."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spark_ft.lab import parity
from spark_ft.lab.checks import (
    CheckFailed,
    call,
    check,
    is_stub,
    require,
    require_close,
    require_gradient,
    require_pair,
    require_parity,
    require_tensor,
)

# What to add where PyTorch complains; "leaf" is its word for a parameter changed under autograd.
MENDS = {
    "leaf": "add inside torch.no_grad(), to the weight in place",
    "": "A is (rank, in), B (out, rank): x Aᵀ Bᵀ",
}
MERGE_MENDS = {**MENDS, "": "the update is B A"}
SHAPES = ((8, 8, 8), (12, 20, 1), (20, 12, 4), (33, 7, 5))  # in, out, rank
WIDE = (96, 80, 2)  # in, out, rank: here B A is far larger than all that an answer needs


def run(answer: Callable, what: str, *arguments: object, may_change: Sequence = ()) -> object:
    """Call an answer, and say what the shapes should be where PyTorch complains about them."""
    return call(answer, what, *arguments, mends=MENDS, may_change=may_change)


class Largest(TorchDispatchMode):
    """Watches for the largest new tensor that any operation makes; views of old ones do not count."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = {_storage(t) for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)}
        out = function(*arguments, **(options or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and _storage(t) not in given]
        self.numbers = max([self.numbers, *(t.numel() for t in made)])
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # the same for a tensor and its views


# ── exercise 1 ──


FULL = "full_matrices=False may be missing"
SVD_MENDS = {"multiplied": FULL, "size of tensor": FULL}


def _parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values, strongest first, and the right directions, by another way than the SVD."""
    squares, directions = torch.linalg.eigh(matrix.double().T @ matrix.double())
    most = min(matrix.shape)
    return squares.flip(0)[:most].clamp(min=0), directions.flip(1)[:, :most]


def _cut(matrix: Tensor, k: int) -> Tensor:
    V = _parts(matrix)[1][:, :k]
    return matrix.double() @ V @ V.T


def _cut_mistakes(matrix: Tensor, k: int) -> dict[str, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    most, right = len(S), _cut(matrix, k)
    square = matrix.shape[0] == matrix.shape[1]
    rows, columns = torch.zeros_like(matrix), torch.zeros_like(matrix)
    rows[:k], columns[:, :k] = matrix[:k], matrix[:, :k]
    mistakes = {
        "the weakest layers are kept, not the strongest": (U[:, most - k :] * S[most - k :]) @ Vh[most - k :],
        "that is what is left out; return what stays": matrix.double() - right,
        "one layer too many": _cut(matrix, k + 1) if k < most else right,
        "one layer too few": _cut(matrix, k - 1),
        "only the last of the k layers is there; add all k": right - _cut(matrix, k - 1),
        "only the strongest layer is there; add the first k": _cut(matrix, 1),
        "the singular values are missing: U[:, :k] * S[:k]": U[:, :k] @ Vh[:k],
        "the singular values are squared": (U[:, :k] * S[:k] ** 2) @ Vh[:k],
        "the root of the singular values was taken": (U[:, :k] * S[:k].sqrt()) @ Vh[:k],
        "that is the first k rows of the matrix; the layers come from the SVD": rows,
        "that is the first k columns of the matrix; the layers come from the SVD": columns,
        "that is the whole matrix; nothing was cut": matrix,
    }
    if square:
        mistakes["Vh's rows are the layers: Vh[:k], not Vh[:, :k].T"] = (U[:, :k] * S[:k]) @ Vh[:, :k].T
        mistakes["the result is transposed"] = right.T
        mistakes["U's columns are the layers: U[:, :k], not U[:k]"] = (U[:k].T * S[:k]) @ Vh[:k]
    return mistakes


def _matrix(out: int, width: int) -> Tensor:
    """A random matrix whose layers differ clearly in strength."""
    U, _, Vh = torch.linalg.svd(torch.randn(out, width), full_matrices=False)
    return (U * (3 * 0.6 ** torch.arange(min(out, width)))) @ Vh


@check
def check_cut(cut: Callable[[Tensor, int], Tensor], share: Callable[[Tensor], Tensor]) -> str:
    """The best rank-k part of a matrix, and how much of its squared norm each k keeps."""
    for out, width in ((9, 9), (12, 7), (6, 15)):
        matrix = _matrix(out, width)
        for k in (4, 2, 1, min(out, width)):
            what = f"cut_to_rank of a ({out}, {width}) matrix for k={k}"
            got = call(cut, what, matrix, k, mends=SVD_MENDS)
            require_close(got, _cut(matrix, k), what, _cut_mistakes(matrix, k), tolerance=1e-4)
    for out, width in ((9, 9), (12, 7), (6, 15), (5, 1)):
        matrix = 0.1 * _matrix(out, width)
        squares = _parts(matrix)[0]
        values, right = squares.sqrt(), squares.cumsum(0) / squares.sum()
        what = f"share_kept of a ({out}, {width}) matrix"
        got = require_tensor(call(share, what, matrix), what)
        if got.shape == (min(out, width) + 1,):
            raise CheckFailed(f"{what} has {len(got)} entries: it should begin with k=1, not k=0")
        wrong = {
            "not squared: add up the squares of the singular values": values.cumsum(0) / values.sum(),
            "each layer's own share: add up the first k, cumsum(0)": squares / squares.sum(),
            "that is the share left out; return the share kept": 1 - right,
            "the root was taken: it is the share of the squared norm": right.sqrt(),
            "not a share: divide by the sum of all squares": squares.cumsum(0),
            "divided by the largest square: divide by the sum of all": squares.cumsum(0) / squares[0],
            "divided by the norm, not by its square": squares.cumsum(0) / squares.sum().sqrt(),
            "in percent: give a share between 0 and 1": 100 * right,
            "from the weakest layer on; begin with the strongest": squares.flip(0).cumsum(0) / squares.sum(),
        }
        require_close(got, right, what, wrong, tolerance=1e-4)
    return "the strongest k layers, and their share of the squared norm, for square, tall and wide matrices"


# ── exercise 2 ──


@check
def check_init_adapter(answer: Callable[[int, int, int], tuple[Tensor, Tensor]]) -> str:
    """A random, B zero: the update is zero and yet can learn."""
    for width, out, rank in ((64, 48, 4), (400, 20, 8), (64, 300, 2)):
        what = f"init_adapter for in={width}, out={out}, rank={rank}"
        A, B = require_pair(
            call(answer, what, width, out, rank), "init_adapter should return two tensors, (A, B)"
        )
        shapes = f"A is {tuple(A.shape)} and B is {tuple(B.shape)} for in={width}, out={out}, rank={rank}"
        swapped = A.shape == (out, rank) and B.shape == (rank, width)
        require(
            not swapped,
            f"{shapes}: A and B are swapped; A (rank, in) reads the input, B (out, rank) writes the output",
        )
        require(
            A.shape == (rank, width) and B.shape == (out, rank),
            f"{shapes}, but should be ({rank}, {width}) and ({out}, {rank}): a weight is (out, in)",
        )
        _check_start(A, B)
        again, _ = require_pair(
            call(answer, what, width, out, rank), "init_adapter should return two tensors, (A, B)"
        )
        require(
            not torch.equal(A, again), "A is the same at every call: draw it at random, without a fixed seed"
        )
    return "A is random, B is zero: the update starts at zero and can learn, for 3 shapes"


def _check_start(A: Tensor, B: Tensor, names: tuple[str, str] = ("A", "B")) -> None:
    """A's spread, and that B is zero."""
    a, b = names
    require_tensor(A, a)
    require_tensor(B, b)
    require(
        A.is_floating_point() and B.is_floating_point(),
        f"{a} holds {A.dtype} and {b} {B.dtype}; both need floating-point numbers to train",
    )
    require(
        A.any() or B.any(),
        f"{a} and {b} are both zero: {a}'s gradient is multiplied by {b} and {b}'s by {a}, so neither moves",
    )
    require(
        A.any(),
        f"{a} is zero and {b} is random: {a} and {b} are swapped. The update is zero too, but LoRA draws A",
    )
    require(
        not B.any(),
        f"{a} and {b} are both random: B A is not zero, so {b} does not start at zero and the model changes "
        "before it learns",
    )
    width = A.shape[1]
    scaled = A.detach().double() * math.sqrt(width)  # 0.58 for U(−1/√in, 1/√in), 1 for N(0, 1/in)
    spread, middle = scaled.square().mean().sqrt().item(), scaled.mean().item()
    require(
        len(A) == 1 or not torch.equal(A[0], A[1]),
        f"all rows of {a} are equal, so the note has rank 1; draw every entry by itself",
    )
    require(
        scaled.numel() < 64 or abs(middle) < max(0.35, 5 / math.sqrt(scaled.numel())) * spread,
        f"{a}'s entries are all on one side of zero: draw them from −1/√in to +1/√in",
    )
    require(
        scaled.numel() < 64 or 0.4 < spread < 1.3,
        f"{a}'s entries spread by {spread / math.sqrt(width):.3g}, but 1/√in is {1 / math.sqrt(width):.3g}: "
        "A x should be about as large as x; draw A from U(−1/√in, 1/√in)",
    )


# ── exercise 3 ──


def _update_mistakes(x: Tensor, A: Tensor, B: Tensor, alpha: float) -> dict[str, Tensor]:
    (rank, width), out = A.shape, len(B)
    low = x @ (B @ A).T
    mistakes = {
        "scaled by alpha, not alpha / rank": alpha * low,
        "not scaled: alpha / rank is missing": low,
        "only divided by rank: alpha is missing": low / rank,
        "scaled by alpha / √rank: that is rsLoRA, a fine idea for later": alpha / math.sqrt(rank) * low,
        "scaled by alpha / rank twice": (alpha / rank) ** 2 * low,
        "scaled by rank / alpha: that is upside down": rank / alpha * low,
        "divided by the width of x, not by the rank": alpha / width * low,
        "divided by the width of the output, not by the rank": alpha / out * low,
        "whole numbers: // cuts the fraction off; write alpha / rank": (alpha // rank) * low,
        "the sign is wrong: the update is added": -alpha / rank * low,
    }
    if width == out:
        mistakes["x itself is added; only the note's share is asked"] = x + alpha / rank * low
    if width == out == rank:
        s = alpha / rank
        mistakes |= {
            "x A B: the transposes are missing; A is (rank, in), so x meets Aᵀ": s * (x @ A @ B),
            "A and B are swapped: A comes first, x Aᵀ Bᵀ": s * (x @ B.T @ A.T),
            "B comes before A, without transposes: it should be x Aᵀ Bᵀ": s * (x @ B @ A),
            "A is transposed, B is not: it should be x Aᵀ Bᵀ": s * (x @ A.T @ B),
            "B is transposed, A is not: it should be x Aᵀ Bᵀ": s * (x @ A @ B.T),
        }
    return mistakes


@check
def check_lora_update(answer: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> str:
    """α/r · B A x against the materialized (out, in) matrix, its gradients, and no matrix as large."""
    for width, out, rank in SHAPES:  # the square one first: there every wrong product has the right shape
        alpha = 5.0 + torch.rand(()).item()
        for lead in ((3,), (), (1,), (2, 4)):
            A, B = torch.randn(rank, width, requires_grad=True), torch.randn(out, rank, requires_grad=True)
            x = torch.randn(*lead, width, requires_grad=True)
            what = f"the update for x {tuple(x.shape)}, out={out}, rank={rank}"
            got = run(answer, what, x, A, B, alpha)
            right, mistakes = alpha / rank * x @ (B @ A).T, _update_mistakes(x, A, B, alpha)
            require_close(got, right, what, mistakes, 3e-5)
            require_gradient(got, {"x": x, "A": A, "B": B}, right, "the update", tolerance=1e-4)
    half = [torch.randn(shape, dtype=torch.bfloat16) for shape in ((3, 12), (4, 12), (20, 4))]
    what = "the update in bf16"
    right = 8 / 4 * half[0].float() @ (half[2].float() @ half[1].float()).T
    require_close(run(answer, what, *half, 8.0), right, what, None, 3e-2, torch.bfloat16)
    width, out, rank = WIDE
    _require_narrow(answer, "lora_update", torch.randn(3, width), torch.randn(rank, width),
                    torch.randn(out, rank), 8.0)  # fmt: skip
    return "alpha / rank · B A x with its gradients, through the narrow middle; x of 1 to 3 dimensions, bf16"


def _require_narrow(answer: Callable, name: str, *arguments: object) -> None:
    width, out, _ = WIDE
    with Largest() as watch:
        run(answer, name, *arguments)
    require(
        watch.numbers < width * out,
        f"{name} is right, but it built a tensor of {watch.numbers:,} numbers, as large as B A. Go through "
        "the narrow middle: first x Aᵀ, then Bᵀ",
    )


# ── exercise 4 ──


@check
def check_lora_linear(answer: type[nn.Module]) -> str:
    """The whole layer: its start, what trains, scaling, bias, dropout, gradients, and `merged`."""
    for width, out, rank in SHAPES:
        for bias in (True, False):
            base = nn.Linear(width, out, bias=bias)
            weight, shift = base.weight.detach().clone(), base.bias.detach().clone() if bias else 0.0
            layer = _made(answer, base, rank, 6.0)
            _check_parts(layer, base, rank, 6.0)
            what = f"in={width}, out={out}, rank={rank}, bias={bias}"
            x = torch.randn(3, width)
            require_close(
                run(layer, what, x),
                x @ weight.T + shift,
                f"a new layer's output ({what}), which should be its base's",
                {"the bias is lost": x @ weight.T, "the base's output is missing": torch.zeros(3, out)},
            )
            with torch.no_grad():
                layer.lora_B.normal_()
            for lead in ((3,), (), (2, 4)):
                _check_output(layer, torch.randn(*lead, width, requires_grad=True), weight, shift, what)
    _check_dropout(answer)
    _check_dropout_rate(answer)
    width, out, rank = WIDE
    _require_narrow(_made(answer, nn.Linear(width, out), rank, 4.0).eval(), "forward", torch.randn(3, width))
    return "starts as its base, trains A and B alone, scales by alpha / rank, drops only the update's input"


def _made(answer: type[nn.Module], base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
    layer = call(answer, "making the layer", base, rank, alpha, dropout, may_change=[base])
    require(isinstance(layer, nn.Module), f"the layer is {type(layer).__name__}, not an nn.Module")
    return layer


def _check_output(layer: nn.Module, x: Tensor, weight: Tensor, shift: Tensor | float, what: str) -> None:
    A, B = layer.lora_A, layer.lora_B
    rank = len(A)
    plain, low = x @ weight.T + shift, x @ (B @ A).T
    expected = plain + 6.0 / rank * low
    got = run(layer, what, x)
    turned = {
        message: plain + wrong for message, wrong in _update_mistakes(x, A, B, 6.0).items() if "Aᵀ" in message
    }
    require_close(
        got,
        expected,
        f"the output with a trained B (x {tuple(x.shape)}, {what})",
        {
            **turned,
            "scaled by alpha, not alpha / rank": plain + 6.0 * low,
            "not scaled: alpha / rank is missing": plain + low,
            "scaled by alpha / √rank": plain + 6.0 / math.sqrt(rank) * low,
            "scaled by alpha / rank twice": plain + (6.0 / rank) ** 2 * low,
            "the base's output is missing": 6.0 / rank * low,
            "the update is missing": plain,
            "the update is subtracted": plain - 6.0 / rank * low,
            "the base's output is scaled too": 6.0 / rank * (plain + low),
            "the bias is lost": expected - shift,
            "the bias counts twice": expected + shift,
        },
        tolerance=3e-5,
    )
    require_gradient(got, {"lora_A": A, "lora_B": B, "x": x}, expected, "the output")
    layer.merged = True
    output = run(layer, "the output with merged=True", x)
    layer.merged = False
    require_close(
        output,
        plain,
        "the output with merged=True, where the base's weight holds the update already",
        {"the update is added again: return the base's output alone": expected, "it is zero": 0 * plain},
        tolerance=3e-5,
    )


def _check_parts(layer: nn.Module, base: nn.Linear, rank: int, alpha: float) -> None:
    out, width = base.weight.shape
    for name in ("lora_A", "lora_B"):
        part = getattr(layer, name, None)
        require(part is not None, f"the layer has no self.{name}: the names lora_A and lora_B are fixed")
        require(
            isinstance(part, nn.Parameter) and part.requires_grad,
            f"self.{name} is {type(part).__name__}: the optimizer only sees an nn.Parameter that trains",
        )
    require(getattr(layer, "base", None) is base, "self.base is not the layer that came in: don't copy it")
    A, B = layer.lora_A, layer.lora_B
    require(
        A.shape == B.shape or not (A.shape == (out, rank) and B.shape == (rank, width)),
        "lora_A and lora_B are swapped: A is (rank, in), B is (out, rank)",
    )
    require(
        A.shape == (rank, width) and B.shape == (out, rank),
        f"lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, but should be ({rank}, {width}) and "
        f"({out}, {rank})",
    )
    _check_start(A, B, ("lora_A", "lora_B"))
    trains = sorted(name for name, p in layer.named_parameters() if p.requires_grad)
    extra = [name for name in trains if name not in ("lora_A", "lora_B")]
    require(
        not extra,
        f"{', '.join(extra)} still trains: freeze the base, weight and bias, and add no other parameter",
    )
    scaling = getattr(layer, "scaling", None)
    require(scaling is not None, "the layer has no self.scaling; merge needs it: alpha / rank")
    wrong = {
        "that is alpha": alpha,
        "that is alpha / √rank": alpha / math.sqrt(rank),
        "upside down": rank / alpha,
    }
    require_close(scaling, alpha / rank, f"self.scaling for alpha={alpha:g}, rank={rank}", wrong)
    require(getattr(layer, "merged", None) is False, "self.merged should be False in a new layer")


def _check_dropout(answer: type[nn.Module]) -> None:
    base = nn.Linear(64, 32)
    layer = _made(answer, base, 1, 1.0, 0.5)
    with torch.no_grad():
        layer.lora_A.normal_()
    x = layer.lora_A.detach().repeat(4000, 1)  # along A, so that the update is never near zero
    layer.train()
    out = (x @ base.weight.T + base.bias).detach()
    require_close(
        run(layer, "training with dropout", x),
        out,
        "dropout acts on the base's path: with B at zero, the output in training should be the base's, which",
    )
    with torch.no_grad():
        layer.lora_B.normal_()
    delta = (x @ (layer.lora_B @ layer.lora_A).T).detach()
    layer.eval()
    still = run(layer, "evaluating", x)
    what = "dropout is active in eval mode: F.dropout needs training=self.training. The output in eval"
    require_close(still, out + delta, what, tolerance=1e-4)
    layer.train()
    share = (run(layer, "training with dropout", x) - out).detach()
    require(
        not torch.allclose(share, delta, atol=1e-5),
        "dropout=0.5 does nothing in training: apply it to the update's input",
    )
    zeros = share.abs() < 1e-6
    require(
        not (zeros.float().mean() > 0.25 and zeros.all(1).float().mean() > 0.25),
        "dropout acts between A and B; LoRA drops entries of x, before A",
    )
    require(
        zeros.float().mean() < 0.25, "dropout acts on the update's output; LoRA drops entries of x, before A"
    )
    kept = ((share.mean(0) @ delta[0]) / (delta[0] @ delta[0])).item()
    require(
        abs(kept - 0.5) > 0.05,
        f"with dropout=0.5 the update is {kept:.2f} of itself on average: what is kept must grow by "
        "1 / (1 − p), as in F.dropout",
    )


def _check_dropout_rate(answer: type[nn.Module], p: float = 0.25, width: int = 32) -> None:
    """With A and B the identity, each output shows what became of one input."""
    base = nn.Linear(width, width, bias=False)
    layer = _made(answer, base, width, float(width), p).train()
    with torch.no_grad():
        base.weight.zero_()
        layer.lora_A.copy_(torch.eye(width))
        layer.lora_B.copy_(torch.eye(width))
    x = torch.ones(1000, width)
    first, second = (run(layer, f"training with dropout={p:g}", x).detach() for _ in range(2))
    dropped = first.abs() < 1e-6
    rate = dropped.float().mean().item()
    require(
        not (dropped == dropped[0]).all(), "every row drops the same entries: each row needs its own draw"
    )
    require(
        abs(rate - (1 - p)) > 0.02,
        f"dropout={p:g} drops {rate:.0%} of the inputs: p is the share that is dropped, not kept",
    )
    require(abs(rate - p) < 0.02, f"dropout={p:g} drops {rate:.0%} of the inputs: use the argument's value")
    require(
        not torch.equal(first, second), "two calls in training drop the same entries: draw anew at every call"
    )
    kept = first[~dropped].mean().item()
    require(
        abs(kept - 1 / (1 - p)) < 0.01,
        f"with dropout={p:g} a kept entry becomes {kept:.3g} of itself: it must grow by 1 / (1 − p), to "
        f"{1 / (1 - p):.3g}",
    )


# ── exercise 5 ──


class _Layer(nn.Module):
    """A plain LoRA layer to merge; once merged it computes its base alone."""

    def __init__(self, width: int, out: int, rank: int, alpha: float, bias: bool):
        super().__init__()
        self.base = nn.Linear(width, out, bias=bias).requires_grad_(False)
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.randn(rank, width)),
            nn.Parameter(torch.randn(out, rank)),
        )
        self.scaling, self.merged = alpha / rank, False

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out if self.merged else out + self.scaling * x @ self.lora_A.T @ self.lora_B.T


Merge = Callable[[nn.Module], None]


@check
def check_merge(merge: Merge, unmerge: Merge, layer_type: type[nn.Module] | None = None) -> str:
    """merge and unmerge against W + α/r · B A; a second call of either changes nothing, nor does the output.

    Args:
        layer_type: the learner's own layer, which is merged too if it is written.
    """
    for width, out, rank in SHAPES:
        _check_merged(merge, unmerge, _Layer(width, out, rank, 6.0, bias=rank > 1))
    shapes = "for 4 shapes; a second call changes nothing"
    try:
        own = layer_type and layer_type(nn.Linear(12, 20), 4, 6.0, 0.0)
    except NotImplementedError as error:
        require(is_stub(error), f"making your layer raised {type(error).__name__}")
        return f"merge adds the update, unmerge subtracts it, {shapes}; your own layer is not written yet"
    if own is None:
        return f"merge adds the update, unmerge subtracts it, {shapes}"
    require(isinstance(own, nn.Module), f"your layer is {type(own).__name__}, not an nn.Module")
    for name in ("base", "lora_A", "lora_B", "scaling", "merged"):
        require(hasattr(own, name), f"your layer has no self.{name}: finish exercise 4 first")
    with torch.no_grad():
        own.lora_B.normal_()
    _check_merged(merge, unmerge, own, "your own layer: ")
    return f"merge adds the update, unmerge subtracts it, {shapes}; your own layer's output stays the same"


def _check_merged(merge: Merge, unmerge: Merge, layer: nn.Module, whose: str = "") -> None:
    (out, rank), width = layer.lora_B.shape, layer.lora_A.shape[1]
    x, W = torch.randn(3, width), layer.base.weight.detach().clone()
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    s, before = layer.scaling, layer(x).detach()
    merged = W + s * B @ A
    shape = f"in={width}, out={out}, rank={rank}"
    what = f"{whose}the merged weight for {shape}"
    call(merge, what, layer, mends=MERGE_MENDS, may_change=[layer])
    mistakes = {
        "alpha / rank is missing: the update is scaling · B A": W + B @ A,
        "the update alone: W is gone": s * B @ A,
        "nothing was added to base.weight": W,
        "the update was subtracted, not added": W - s * B @ A,
        "the update was added twice": W + 2 * s * B @ A,
        "it is divided by rank once more: layer.scaling is alpha / rank already": W + s / rank * B @ A,
    }
    if width == out == rank:
        mistakes["A B instead of B A"] = W + s * A @ B
        mistakes["the update is transposed"] = W + s * (B @ A).T
    require_close(layer.base.weight, merged, what, mistakes, tolerance=3e-5)
    require(
        layer.base.weight.grad_fn is None and not layer.base.weight.requires_grad,
        "after merge the base weight is part of a graph or trains: "
        "add inside torch.no_grad(), to the weight in place",
    )
    require_close(layer.lora_A, A, "lora_A after merge (unmerge needs it unchanged)")
    require_close(layer.lora_B, B, "lora_B after merge (unmerge needs it unchanged)")
    twice = before + s * x @ A.T @ B.T
    said = "set layer.merged = True" if not whose else "its forward must return the base alone where merged"
    require_close(
        layer(x),
        before,
        f"{whose}the output after merge",
        {f"the update counts twice, in the weight and beside it: {said}": twice},
        tolerance=1e-4,
    )
    require(layer.merged is True, f"after merge layer.merged should be True, not {layer.merged!r}")
    call(merge, what, layer, mends=MERGE_MENDS, may_change=[layer])
    require_close(
        layer.base.weight,
        merged,
        "the weight after merging twice",
        {
            "the update was added twice: look at layer.merged first": W + 2 * s * B @ A,
            "the second merge took the update out again": W,
        },
        tolerance=3e-5,
    )
    call(unmerge, "unmerge", layer, mends=MERGE_MENDS, may_change=[layer])
    require_close(
        layer.base.weight,
        W,
        "the weight after unmerge",
        {
            "unmerge added the update again instead of subtracting it": W + 2 * s * B @ A,
            "unmerge did nothing to the weight": merged,
            "alpha / rank is missing in unmerge": merged - B @ A,
        },
        tolerance=3e-5,
    )
    require(
        layer.merged is False,
        "after unmerge layer.merged should be False, or forward leaves the update out",
    )
    require_close(layer(x), before, f"{whose}the output after unmerge", tolerance=1e-4)
    call(unmerge, "unmerge", layer, mends=MERGE_MENDS, may_change=[layer])
    require_close(
        layer.base.weight,
        W,
        "the weight after unmerging twice",
        {"the update was subtracted twice: look at layer.merged first": W - s * B @ A},
        tolerance=3e-5,
    )


@check
def check_parity(answer: type[nn.Module], merge: Merge) -> str:
    """Yours against PEFT's own layer on the same weights."""
    differences = parity.lora_against_peft(answer, merge)
    require_parity(differences, "PEFT's")
    return "your layer equals PEFT's: " + ", ".join(
        f"{name} to {value:.0e}" for name, value in differences.items()
    )
