"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353), on one linear layer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from spark_ft.methods.fused import ScaleRows, rows, without_autocast
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import NF4Tensor

ROW_BLOCK = 2048  # rows of a weight at a time, so that no copy of a whole one is made
CANCELS = 0.1  # below this share of ‖W‖² + ‖sBA‖², the three terms of ‖W + sBA‖² have lost digits
TINY = 1e-30  # a gain of zero would forget the row's output, which the magnitude's own gradient needs

_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)  # fused optimizers write parameters and leave `_version` alone


class DoRALinear(LoRALinear):
    """A frozen linear layer whose row magnitudes and directions are trained separately.

        y = m/n · (W x + s B A x) + b,   n = ‖W + s B A‖   (Liu et al. 2024, eq. 5; n held still as in eq. 11)

    m and n have one entry per row of (out, in). m starts as ‖W‖ and B at zero, so a new DoRALinear computes
    exactly what its base computes. Dropout acts on the input of all that DoRA adds, as in PEFT:

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

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.merged or not self.enabled:
            return self._base_output(x)
        out, A, B, gain = self.base(x), self.lora_A, self.lora_B, self.gain()
        drops = self.training and self.dropout > 0
        dropped = F.dropout(x.to(A.dtype), self.dropout, self.training)
        low = rows(dropped) @ A.T
        Wx = self.base(dropped.to(x.dtype)).to(low.dtype) if drops else out
        z = torch.addmm(rows(Wx).to(low.dtype), low, B.T, alpha=self.scaling)  # W x + b + s · (x Aᵀ) Bᵀ
        y = ScaleRows.apply(z, gain, self.bias, z.dtype if drops else out.dtype)  # m/n · (z − b) + b
        y = y.view(out.shape)
        return out + (y - Wx).to(out.dtype) if drops else y

    def gain(self) -> Float[Tensor, " out"]:
        """m/n, never zero nor divided by zero."""
        return self.magnitude / self.norm().clamp_min(TINY) + TINY

    def norm(self) -> Float[Tensor, " out"]:
        """n = ‖W + s B A‖ of each row, computed anew after an optimizer's step or a change of W, A, B or s.

        A change through `.data` can go unnoticed: call `forget_norm` after it.
        """
        A, B, W = self.lora_A, self.lora_B, self.weight
        states = [(id(t), t.untyped_storage()._cdata, t._version) for t in (A, B, getattr(W, "packed", W))]
        key, kept = (_optimizer_steps, self.scaling, *states), self._kept
        if key != kept.get("key"):
            # what is kept here may be wanted in training, and outside of autocast
            with torch.inference_mode(False), torch.no_grad(), without_autocast(A.device):
                if states[-1] != kept.get("W"):
                    kept["squares"] = torch.cat([w.to(A.dtype).norm(dim=1) for w in W.split(ROW_BLOCK)]) ** 2
                kept["norm"] = row_norm(W, A, B, self.scaling, kept["squares"])
            kept |= {"key": key, "W": states[-1], "tensors": (A, B, W)}  # so that no other gets their ids
        return kept["norm"]

    def forget_norm(self) -> None:
        """Drop the cached norm."""
        self._kept: dict = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": {}}  # a copy computes its own

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """ΔW = m/n · (W + s B A) − W, what `merge` adds to the base weight."""
        original, adapted = self._weights()
        return adapted - original

    def _weights(self) -> tuple[Tensor, Tensor]:
        W, dtype, update = self.weight, self.lora_A.dtype, super().delta_weight()
        W = W.dequantize(dtype) if isinstance(W, NF4Tensor) else W.to(dtype)
        if self.merged:
            return W / self._merged_gain[:, None] - update, W
        return W, self.gain()[:, None] * (W + update)

    def merge(self) -> None:
        if not self.merged:
            self._merged_gain = self.gain().detach()
        super().merge()


@torch.no_grad()
def row_norm(
    W: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    scaling: float,
    squares: Float[Tensor, " out"],
) -> Float[Tensor, " out"]:
    """‖W + s B A‖ of each row without an (out, in) product: two thin ones and ‖W‖², which never changes.

        ‖W + s B A‖² = ‖W‖² + 2 s Σ (W Aᵀ ⊙ B) + s² Σ (B (A Aᵀ) ⊙ B)

    Args:
        W: in any precision; it is read in blocks of rows, each in the precision of A.
        squares: ‖W‖² of each row.
    """
    cross = torch.cat([block.to(A.dtype) @ A.T for block in W.split(ROW_BLOCK)]).mul_(B).sum(1)
    update = scaling**2 * (B @ (A @ A.T)).mul_(B).sum(1)
    total = squares + 2 * scaling * cross + update
    lost = total < CANCELS * (squares + update)
    if not lost.is_meta and lost.any():  # those rows directly
        blocks = zip(W.split(ROW_BLOCK), B.split(ROW_BLOCK), lost.split(ROW_BLOCK), strict=True)
        direct = [w[i].double() + scaling * b[i].double() @ A.double() for w, b, i in blocks]
        total[lost] = torch.cat([part.square().sum(1) for part in direct]).to(total.dtype)
    return total.sqrt_()
