"""Checks of lab 3.1.1: each compares with the full matrix and names the mistakes that people make."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from spark_ft.lab import parity
from spark_ft.lab.checks import call, check, require, require_close, require_pair, require_parity

# What to add where PyTorch complains; "leaf" is its word for a parameter changed under autograd.
MENDS = {
    "leaf": "add inside torch.no_grad(), to the weight in place",
    "": "x is (…, in), A (rank, in), B (out, rank): the update is x Aᵀ Bᵀ, as a weight B A",
}
SHAPES = ((8, 8, 8), (12, 20, 1), (20, 12, 4), (33, 7, 5))  # in, out, rank


def run(answer: Callable, what: str, *arguments: object, may_change: Sequence = ()) -> object:
    """Call an answer, and say what the shapes should be where PyTorch complains about them."""
    return call(answer, what, *arguments, mends=MENDS, may_change=may_change)


@check
def check_init_adapter(answer: Callable[[int, int, int], tuple[Tensor, Tensor]]) -> str:
    """A random, B zero: the update is zero and yet can learn."""
    for width, out, rank in ((64, 48, 4), (300, 20, 8), (20, 300, 1)):
        A, B = require_pair(answer(width, out, rank), "init_adapter should return two tensors, (A, B)")
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
        a_zero, b_zero = not A.any(), not B.any()
        require(
            not (a_zero and b_zero),
            "A and B are both zero: A's gradient is multiplied by B and B's by A, so neither ever moves",
        )
        require(
            not a_zero,
            "A is zero and B is random: A and B are swapped. The update is zero too, but LoRA draws A",
        )
        require(
            b_zero,
            "A and B are both random: B A is not zero, so the model changes before it learns anything",
        )
        spread = A.float().std().item() * math.sqrt(width)  # 0.58 for U(−1/√in, 1/√in), 1 for N(0, 1/in)
        require(
            0.3 < spread < 1.5,
            f"A's entries spread by {A.float().std().item():.3g}, but 1/√in is {1 / math.sqrt(width):.3g}: "
            "A x should be about as large as x; draw A from U(−1/√in, 1/√in)",
        )
        again = answer(width, out, rank)[0]
        require(
            not torch.equal(A, again), "A is the same at every call: draw it at random, without a fixed seed"
        )
    return "A is random, B is zero: the update starts at zero and can learn, for 3 shapes"


@check
def check_lora_update(answer: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> str:
    """α/r · B A x against the materialized (out, in) matrix."""
    for width, out, rank in SHAPES:  # the square one first: there every wrong product has the right shape
        A, B, alpha = torch.randn(rank, width), torch.randn(out, rank), 5.0 + torch.rand(()).item()
        for lead in ((), (1,), (3,), (2, 4)):
            x = torch.randn(*lead, width)
            low = x @ (B @ A).T
            mistakes = {
                "scaled by alpha, not alpha / rank": alpha * low,
                "not scaled: alpha / rank is missing": low,
                "scaled by alpha / √rank: that is rsLoRA, a fine idea for later": alpha
                / math.sqrt(rank)
                * low,
                "scaled by alpha / rank twice": (alpha / rank) ** 2 * low,
                "scaled by rank / alpha: that is upside down": rank / alpha * low,
                "divided by the width of x, not by the rank": alpha / width * low,
            }
            if width == out == rank:
                mistakes |= {
                    "x A B: the transposes are missing; A is (rank, in), so x meets Aᵀ": alpha
                    / rank
                    * (x @ A @ B),
                    "A and B are swapped: A comes first, x Aᵀ Bᵀ": alpha / rank * (x @ B.T @ A.T),
                    "B comes before A, without transposes: it should be x Aᵀ Bᵀ": alpha / rank * (x @ B @ A),
                    "A is transposed, B is not: it should be x Aᵀ Bᵀ": alpha / rank * (x @ A.T @ B),
                    "B is transposed, A is not: it should be x Aᵀ Bᵀ": alpha / rank * (x @ A @ B.T),
                }
            what = f"the update for in={width}, out={out}, rank={rank}"
            require_close(run(answer, what, x, A, B, alpha), alpha / rank * low, what, mistakes, 3e-5)
    return "lora_update is alpha / rank · B A x, for 4 shapes and inputs of 1 to 3 dimensions"


@check
def check_lora_parameters(answer: Callable[[Sequence[tuple[int, int]], int], int]) -> str:
    """rank · (in + out), summed over the matrices."""
    for shapes, rank in (
        ([(48, 32)], 4),
        ([(576, 576), (192, 576), (1536, 576), (576, 1536)], 16),
        ([(7, 5), (5, 11)], 1),
        ([], 8),
    ):
        got = answer(shapes, rank)
        require(got is not None, "lora_parameters returned None; is a return missing?")
        right = sum(rank * (out + width) for out, width in shapes)
        wrong = {
            "rank · in · out counts rank whole matrices": sum(rank * o * i for o, i in shapes),
            "that is the full matrices; LoRA trains A and B only": sum(o * i for o, i in shapes),
            "rank × rank is not an adapter: A is (rank, in) and B is (out, rank)": sum(
                rank * rank for _ in shapes
            ),
            "2 · rank · in holds for square matrices only": sum(2 * rank * i for _, i in shapes),
            "2 · rank · out holds for square matrices only": sum(2 * rank * o for o, _ in shapes),
            "only A is counted": sum(rank * i for _, i in shapes),
            "only B is counted": sum(rank * o for o, _ in shapes),
            "in + out once each: times the rank": sum(o + i for o, i in shapes),
            "only one matrix is counted, not all of them": rank * sum(shapes[0]) if shapes else -1,
        }
        if got != right:
            for message, value in wrong.items():
                require(got != value, f"{got} for {shapes} at rank {rank}: {message}")
        require(got == right, f"{got} for {shapes} at rank {rank}, but should be {right:,}")
    return "rank · (in + out) for every matrix, none counted twice"


@check
def check_lora_linear(answer: type[nn.Module]) -> str:
    """The whole layer: its start, what trains, scaling, bias, dropout, gradients."""
    for width, out, rank in SHAPES:
        for bias in (True, False):
            base = nn.Linear(width, out, bias=bias)
            weight, shift = base.weight.detach().clone(), base.bias.detach().clone() if bias else 0.0
            layer = answer(base, rank, 6.0, 0.0)
            _check_parts(layer, width, out, rank)
            x = torch.randn(3, width)
            what = f"in={width}, out={out}, rank={rank}, bias={bias}"
            require_close(
                run(layer, what, x),
                x @ weight.T + shift,
                f"a new layer's output ({what}), which should be its base's",
                {"the bias is lost": x @ weight.T, "the base's output is missing": torch.zeros(3, out)},
            )
            with torch.no_grad():
                layer.lora_B.normal_()
            A, B = (
                layer.lora_A.detach().clone().requires_grad_(),
                layer.lora_B.detach().clone().requires_grad_(),
            )
            plain, low = x @ weight.T + shift, x @ (B @ A).T
            expected = plain + 6.0 / rank * low
            got = run(layer, what, x)
            require_close(
                got,
                expected,
                f"the output with a trained B ({what})",
                {
                    "scaled by alpha, not alpha / rank": plain + 6.0 * low,
                    "not scaled: alpha / rank is missing": plain + low,
                    "scaled by alpha / √rank": plain + 6.0 / math.sqrt(rank) * low,
                    "the base's output is missing": 6.0 / rank * low,
                    "the update is missing": plain,
                },
                tolerance=3e-5,
            )
            require(
                got.requires_grad, "the output carries no gradient: no .detach(), .data or no_grad in forward"
            )
            slope = torch.randn(3, out)
            got.backward(slope)
            expected.backward(slope)
            for name, mine, theirs in (
                ("lora_A", layer.lora_A.grad, A.grad),
                ("lora_B", layer.lora_B.grad, B.grad),
            ):
                require(mine is not None, f"{name} gets no gradient: no .detach() or .data on it in forward")
                require_close(mine, theirs, f"{name}'s gradient ({what})", tolerance=1e-4)
    _check_dropout(answer)
    return "starts as its base, trains only A and B, scales by alpha / rank, drops only the update's input"


def _check_parts(layer: nn.Module, width: int, out: int, rank: int) -> None:
    for name in ("lora_A", "lora_B"):
        part = getattr(layer, name, None)
        require(
            isinstance(part, nn.Parameter) and part.requires_grad,
            f"self.{name} is {type(part).__name__}: the optimizer only sees an nn.Parameter",
        )
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
    require(A.any() or B.any(), "lora_A and lora_B are both zero: neither would ever get a gradient")
    require(
        A.any(),
        "lora_A is zero and lora_B is random: they are swapped; A starts at random, B at zero",
    )
    require(not B.any(), "lora_B does not start at zero, so the new layer is not its base")
    trains = sorted(name for name, p in layer.named_parameters() if p.requires_grad)
    extra = [name for name in trains if name not in ("lora_A", "lora_B")]
    require(
        not extra,
        f"{', '.join(extra)} still trains: freeze the base, weight and bias",
    )


def _check_dropout(answer: type[nn.Module]) -> None:
    base = nn.Linear(64, 32)
    layer = answer(base, 1, 1.0, 0.5)
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
    spread = (share @ delta[0] / (delta[0] @ delta[0])).std().item() / math.sqrt(len(x))
    require(
        abs(kept - 1) < 6 * spread + 1e-3,
        f"with dropout=0.5 the update is {kept:.2f} of itself on average: what is kept must grow by "
        "1 / (1 − p), as in F.dropout",
    )


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


@check
def check_merge(merge: Callable[[nn.Module], None], unmerge: Callable[[nn.Module], None]) -> str:
    """merge and unmerge against W + α/r · B A; a second call of either changes nothing."""
    for width, out, rank in SHAPES:
        layer = _Layer(width, out, rank, 6.0, bias=rank > 1)
        x, W = torch.randn(3, width), layer.base.weight.detach().clone()
        A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        s, before = layer.scaling, layer(x).detach()
        merged = W + s * B @ A
        what = f"the merged weight for in={width}, out={out}, rank={rank}"
        run(merge, what, layer, may_change=[layer])
        mistakes = {
            "alpha / rank is missing: the update is scaling · B A": W + B @ A,
            "the update alone: W is gone": s * B @ A,
            "nothing was added to base.weight": W,
            "the update was subtracted, not added": W - s * B @ A,
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
        twice = before + s * x @ A.T @ B.T
        require_close(
            layer(x),
            before,
            "the output after merge",
            {"the update counts twice, in the weight and beside it: set layer.merged = True": twice},
            tolerance=1e-4,
        )
        require(layer.merged is True, "after merge layer.merged should be True")
        require_close(layer.lora_A, A, "lora_A after merge (unmerge needs it unchanged)")
        require_close(layer.lora_B, B, "lora_B after merge (unmerge needs it unchanged)")
        run(merge, what, layer, may_change=[layer])
        require_close(
            layer.base.weight,
            merged,
            "the weight after merging twice",
            {"the update was added twice: look at layer.merged first": W + 2 * s * B @ A},
            tolerance=3e-5,
        )
        run(unmerge, "unmerge", layer, may_change=[layer])
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
        run(unmerge, "unmerge", layer, may_change=[layer])
        require_close(
            layer.base.weight,
            W,
            "the weight after unmerging twice",
            {"the update was subtracted twice: look at layer.merged first": W - s * B @ A},
            tolerance=3e-5,
        )
    return "merge adds the update, unmerge subtracts it, and a second call changes nothing, for 4 shapes"


@check
def check_parity(answer: type[nn.Module], merge: Callable[[nn.Module], None]) -> str:
    """Yours against PEFT's own layer on the same weights."""
    differences = parity.lora_against_peft(answer, merge)
    require_parity(differences, "PEFT's")
    return "your layer equals PEFT's: " + ", ".join(
        f"{name} to {value:.0e}" for name, value in differences.items()
    )
