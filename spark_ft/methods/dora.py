"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353), on one linear layer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from spark_ft.methods.lora import LoRALinear, _dense
from spark_ft.methods.nf4 import NF4Tensor

ROWS = 2048  # of a weight at a time, so that no copy of a whole one is made
CANCELS = (
    0.1  # where less than this share of ‖W‖² + ‖sBA‖² is left in ‖W + sBA‖², its three terms have lost digits
)
TINY = (
    1e-30  # a gain of zero would forget the row's output, from which the magnitude's own gradient is computed
)

_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(
    _count_step
)  # of every optimizer: fused ones write parameters and leave `_version` alone


class DoRALinear(LoRALinear):
    """A frozen linear layer of whose rows length and direction train apart.

        y = m/n · (W x + s B A x) + b,    n = ‖W + s B A‖         (Liu et al. 2024, eq. 5, with n held still as in eq. 11)

    m and n have one entry for each row of (out, in). m starts as ‖W‖ and B at zero, so a new DoRALinear computes exactly what
    its base computes. Dropout falls on the input of all that DoRA adds to the base, as in PEFT; W is then applied twice:

        y = W x + b + (m/n − 1) · W x̃ + m/n · s B A x̃

    Args:
        base, rank, alpha, dropout, rslora: as in `LoRALinear`.

    Attributes:
        magnitude (out,): m; and those of `LoRALinear`.
    """

    def __init__(
        self, base: nn.Module, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, rslora: bool = False
    ):
        super().__init__(base, rank, alpha, dropout, rslora)
        self.forget_norm()
        self.magnitude = nn.Parameter(self.norm().clone())

    def _adapted(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        out, dropped = self.base(x), self._dropped(x)
        if not (self.dropout and self.training):
            return self._scaled(self._add_update(out.to(dropped.dtype), dropped), out.dtype)
        again = self.base(dropped.to(x.dtype)).to(dropped.dtype)
        return out + (self._scaled(self._add_update(again.clone(), dropped), dropped.dtype) - again).to(
            out.dtype
        )

    def _scaled(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        return _ScaleRows.apply(z, self.magnitude, self.norm(), self.bias, dtype)

    def norm(self) -> Float[Tensor, " out"]:
        """n = ‖W + s B A‖ of each row, computed anew only after an optimizer's step or a change of W, A, B or s.

        On a GPU a change through `.data` goes unnoticed, since comparing A and B would wait for it: call `forget_norm` then.
        """
        A, B, W = self.lora_A, self.lora_B, self.base.weight
        of = (_optimizer_steps, self.scaling, _state(A), _state(B), _state(W))
        if of != self._norm_of or not all(map(torch.equal, self._factors, (A, B))):
            with torch.inference_mode(False), torch.no_grad():  # what is kept here may be wanted in training
                if self._squares_of != _state(W):
                    self._squares = torch.cat([_squares(block.to(A.dtype)) for block in W.split(ROWS)])
                    self._squares_of = _state(W)
                self._norm, self._norm_of = row_norm(W, A, B, self.scaling, self._squares), of
                self._factors = (A.clone(), B.clone()) if A.device.type == "cpu" else ()
        return self._norm

    def forget_norm(self) -> None:
        """Have the norm computed anew when it is asked for next."""
        self._norm = self._norm_of = self._squares = self._squares_of = None
        self._factors: tuple[Tensor, ...] = ()

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """ΔW = m/n · (W + s B A) − W, what `merge` adds to the base weight."""
        original, adapted = self._weights()
        return adapted - original

    def _weights(self) -> tuple[Tensor, Tensor]:
        W, update = _dense(self.base.weight, self.lora_A.dtype), super().delta_weight()
        if self.merged:
            return W / self._merged_gain[:, None] - update, W
        return W, _gain(self.magnitude, self.norm())[:, None] * (W + update)

    def merge(self) -> None:
        if not self.merged:
            self._merged_gain = _gain(self.magnitude, self.norm()).detach()
        super().merge()


@torch.no_grad()
def row_norm(
    W: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    scaling: float,
    squares: Float[Tensor, " out"],
) -> Float[Tensor, " out"]:
    """‖W + s B A‖ of each row with no (out, in) product: two thin ones, and the row's own ‖W‖², which never changes.

        ‖W + s B A‖² = ‖W‖² + 2 s Σ (W Aᵀ ⊙ B) + s² Σ (B (A Aᵀ) ⊙ B)

    Args:
        W: in any precision; it is read in blocks of rows, each in the precision of A.
        squares: ‖W‖².
    """
    cross = torch.cat([block.to(A.dtype) @ A.T for block in W.split(ROWS)]).mul_(B).sum(1)
    update = scaling**2 * (B @ (A @ A.T)).mul_(B).sum(1)
    total = squares + 2 * scaling * cross + update
    lost = total < CANCELS * (squares + update)
    if lost.any():
        directly = [
            _squares(block[some].double() + scaling * B_block[some].double() @ A.double())
            for block, B_block, some in zip(W.split(ROWS), B.split(ROWS), lost.split(ROWS), strict=True)
        ]
        total[lost] = torch.cat(directly).to(total.dtype)
    return total.sqrt_()


def _squares(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).square_()


def _gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m/n, never zero nor divided by zero."""
    gain = magnitude / norm.clamp_min(TINY)
    return gain.masked_fill_(gain.abs() < TINY, TINY)


def _state(weight: Tensor | NF4Tensor) -> tuple[int, int]:
    stored = weight.packed if isinstance(weight, NF4Tensor) else weight
    return stored.data_ptr(), stored._version


class _ScaleRows(torch.autograd.Function):
    """m/n · (z − b) + b, written into z where it can be. It keeps m/n · (z − b), most often its own output.

    The magnitude's gradient Σ grad ⊙ (z − b) / n needs no z of its own then.
    """

    @staticmethod
    def forward(ctx, z, magnitude, norm, b, dtype):
        gain = _gain(magnitude, norm)
        if b is not None:
            plain = z - b
            out = torch.addcmul(z, gain - 1, plain).to(dtype)  # where m = n it is z, to the last bit
            scaled = plain.mul_(gain).to(dtype)
        elif z.dtype == dtype:
            ctx.mark_dirty(z)
            scaled = out = z.mul_(gain)
        else:
            scaled = out = (z * gain).to(dtype)
        ctx.save_for_backward(scaled, gain, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scaled, gain, norm = ctx.saved_tensors
        product = grad.to(gain.dtype) * scaled
        grad_m = (
            product.flatten(0, -2).sum(0) / gain / norm.clamp_min(TINY) if ctx.needs_input_grad[1] else None
        )
        grad_z = torch.mul(grad, gain, out=product) if ctx.needs_input_grad[0] else None
        return grad_z, grad_m, None, None, None
