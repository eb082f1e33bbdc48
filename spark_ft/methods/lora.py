"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), on one linear layer."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


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

    def __init__(self, base: nn.Module, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        out_features, in_features = base.out_features, base.in_features
        if not 1 <= rank <= min(out_features, in_features):
            raise ValueError(
                f"rank={rank} does not fit a {out_features}×{in_features} layer; "
                f"choose a rank from 1 to {min(out_features, in_features)}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} is not a probability below 1; choose one in [0, 1), such as 0.05")
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.enabled, self.merged = True, False
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
        sign = self.enabled - self.merged  # merged and disabled at once: take the update out again
        if sign == 0:
            return self.base(x)
        if self._drops():
            out = self.base(x)
            return self._add_update(out, self._dropped(x)).to(out.dtype)
        return self._updated(x, sign).to(x.dtype)

    def _drops(self) -> bool:
        return bool(self.dropout) and self.training and not self.merged

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x.to(self.lora_A.dtype), self.dropout)

    def _updated(self, x: Tensor, sign: int = 1) -> Tensor:
        """base(x) + sign · scaling · B A x, in the adapter's precision."""
        base = self.base
        if type(base) is nn.Linear and x.dtype == base.weight.dtype == self.lora_A.dtype and _untouched(base):
            return _LowRankLinear.apply(x, base.weight, base.bias, self.lora_A, self.lora_B, sign * self.scaling)
        return self._add_update(base(x), x.to(self.lora_A.dtype), sign)

    def _add_update(self, out: Tensor, x: Tensor, sign: int = 1) -> Tensor:
        return _AddLowRank.apply(out, x, self.lora_A, self.lora_B, sign * self.scaling)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """ΔW = scaling · B A, what `merge` adds to the base weight."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merge(self) -> None:
        """Add ΔW into the base weight: the same outputs with no extra work. Merging twice changes nothing."""
        if not self.merged:
            _add_to(self.base.weight, self.delta_weight())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take ΔW out of the base weight again, to within the rounding of its dtype."""
        if self.merged:
            _add_to(self.base.weight, -self.delta_weight())
            self.merged = False

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}, dropout={self.dropout}"


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _add_to(weight: Tensor, delta: Tensor) -> None:
    """weight += delta, summed in delta's precision and rounded once."""
    weight.copy_(weight.to(delta.dtype) + delta)


def _untouched(base: nn.Module) -> bool:
    """Nothing of it trains and nobody watches it: its product may be computed without calling it."""
    watched = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return not watched and not any(p.requires_grad for p in base.parameters())


class _LowRankLinear(torch.autograd.Function):
    """x Wᵀ + b + scaling · (x Aᵀ) Bᵀ with W and b frozen; keeps x alone, and both gradients of x are one sum."""

    @staticmethod
    def forward(ctx, x, W, b, A, B, scaling):
        ctx.save_for_backward(x, W, A, B)
        ctx.scaling = scaling
        out = F.linear(x, W, b)
        _rows(out).addmm_(_rows(x) @ A.T, B.T, alpha=scaling)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W, A, B = ctx.saved_tensors
        grad2 = _rows(grad)
        grad_low, grad_A, grad_B = _update_gradients(ctx, grad2, _rows(x), A, B, *ctx.needs_input_grad[3:5])
        grad_x = (grad2 @ W).addmm_(grad_low, A).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_A, grad_B, None


class _AddLowRank(torch.autograd.Function):
    """out + scaling · (x Aᵀ) Bᵀ in the precision of A, written into `out` where it can be; x is all it keeps."""

    @staticmethod
    def forward(ctx, out, x, A, B, scaling):
        low = _rows(x) @ A.T
        ctx.save_for_backward(x, A, B)
        ctx.scaling = scaling
        if out.dtype == A.dtype and out.is_contiguous():  # else its rows would be a copy, and the update lost with it
            ctx.mark_dirty(out)
            _rows(out).addmm_(low, B.T, alpha=scaling)
            return out
        return torch.addmm(_rows(out).to(A.dtype), low, B.T, alpha=scaling).view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, B = ctx.saved_tensors
        grad2 = _rows(grad).to(A.dtype)
        grad_low, grad_A, grad_B = _update_gradients(ctx, grad2, _rows(x), A, B, *ctx.needs_input_grad[2:4])
        grad_x = (grad_low @ A).view_as(x) if ctx.needs_input_grad[1] else None
        return grad, grad_x, grad_A, grad_B, None


def _update_gradients(ctx, grad, x, A, B, needs_A, needs_B):
    """Gradients of x Aᵀ, of A and of B; x Aᵀ is computed again, which is cheaper than to keep it."""
    grad_low = (grad @ B).mul_(ctx.scaling)
    grad_A = grad_low.T @ x if needs_A else None
    grad_B = ((x @ A.T).T @ grad).mul_(ctx.scaling).T if needs_B else None  # this way round the product is the faster one
    return grad_low, grad_A, grad_B
