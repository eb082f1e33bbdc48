"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), on one linear layer."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spark_ft.methods.nf4 import NF4Linear, NF4Tensor


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update.

        y = base(x) + scaling · B A dropout(x)          (Hu et al. 2021, eq. 3)

    A starts random and B starts at zero, so a new LoRALinear computes exactly what its base computes.

    Args:
        base: the layer to adapt, `nn.Linear` or one that looks like it; it is frozen here.
        rank: r, rows of A and columns of B. More can express a richer update; usual: 4 to 64.
        alpha: α; the update is scaled by α/r, so that changing r does not ask for a new learning rate.
        dropout: probability of zeroing an input of the update (never of the base), in training only.
        rslora: scale by α/√r instead (Kalajdzievski 2023, arXiv:2312.03732), which keeps large ranks learning.

    Attributes:
        base, lora_A (rank, in), lora_B (out, rank), scaling, enabled, merged.

    Raises:
        ValueError: rank is below 1 or larger than the matrix, or dropout is not in [0, 1).
    """

    def __init__(
        self, base: nn.Module, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, rslora: bool = False
    ):
        super().__init__()
        out_features, in_features = base.out_features, base.in_features
        if not 1 <= rank <= min(out_features, in_features):
            raise ValueError(
                f"rank={rank} does not fit a {out_features}×{in_features} layer; "
                f"choose a rank from 1 to {min(out_features, in_features)}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(
                f"dropout={dropout} is not a probability below 1; choose one in [0, 1), such as 0.05"
            )
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.enabled, self.merged = True, False
        self._quantized: tuple[
            NF4Linear, ...
        ] = ()  # the base that a merge replaced; in a tuple, so that it is no submodule
        # A bf16 step of 1e-4 would round away, so the update lives in at least fp32, as in PEFT.
        place = {"device": base.weight.device, "dtype": _at_least_fp32(base.weight.dtype)}
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **place))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if not self.merged:
            return self._adapted(x) if self.enabled else self.base(x)
        if self._quantized:
            return (
                self.base(x.to(self.base.weight.dtype)).to(x.dtype) if self.enabled else self._quantized[0](x)
            )
        # merged and disabled at once is rare: the update is taken out again
        return self.base(x) if self.enabled else F.linear(x, self._weights()[0].to(x.dtype), self.bias)

    def _adapted(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return self._add_update(out, self._dropped(x)).to(out.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)

    def _add_update(self, out: Tensor, x: Tensor) -> Tensor:
        return _AddLowRank.apply(out, x, self.lora_A, self.lora_B, self.scaling)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """ΔW = scaling · B A, what `merge` adds to the base weight."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """The weight without and with the update, in the adapter's precision; while merged, only a dense base's."""
        W, delta = _dense(self.base.weight, self.lora_A.dtype), self.delta_weight()
        return (W - delta, W) if self.merged else (W, W + delta)

    @torch.no_grad()
    def merge(self) -> None:
        """Put W + ΔW in the base weight's place: the same outputs with no extra work. Merging twice changes nothing.

        A 4-bit base becomes a bf16 layer, four times as large: in 4 bits again, the sum would lose what was learned.
        """
        if not self.merged:
            weight = self._weights()[1]
            if isinstance(self.base, NF4Linear):
                self._quantized, self.base = (self.base,), self.base.to_linear(torch.bfloat16)
            self.base.weight.copy_(weight)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W in its place again: to within the rounding of its dtype, or the 4-bit base itself."""
        if self.merged:
            if self._quantized:
                (self.base,), self._quantized = self._quantized, ()
            else:
                self.base.weight.copy_(self._weights()[0])
            self.merged = False

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}, dropout={self.dropout}"


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dense(weight: Tensor | NF4Tensor, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, NF4Tensor) else weight.to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _AddLowRank(torch.autograd.Function):
    """out + scaling · (x Aᵀ) Bᵀ in the precision of A, written into `out` where it can be.

    x is all it keeps; x Aᵀ is computed again in backward, which is cheaper than to keep it.
    """

    @staticmethod
    def forward(ctx, out, x, A, B, scaling):
        ctx.save_for_backward(x, A, B)
        ctx.scaling = scaling
        low = _rows(x) @ A.T
        if (
            out.dtype == A.dtype and out.is_contiguous()
        ):  # else its rows would be a copy, and the update lost with it
            ctx.mark_dirty(out)
            _rows(out).addmm_(low, B.T, alpha=scaling)
            return out
        return torch.addmm(_rows(out).to(A.dtype), low, B.T, alpha=scaling).view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, B = ctx.saved_tensors
        x2, grad2 = _rows(x), _rows(grad).to(A.dtype)
        grad_low = (grad2 @ B).mul_(ctx.scaling)
        needs_x, needs_A, needs_B = ctx.needs_input_grad[1:4]
        grad_x = (grad_low @ A).view_as(x) if needs_x else None
        grad_A = grad_low.T @ x2 if needs_A else None
        grad_B = (
            ((x2 @ A.T).T @ grad2).mul_(ctx.scaling).T if needs_B else None
        )  # this way round the product is faster
        return grad, grad_x, grad_A, grad_B, None
