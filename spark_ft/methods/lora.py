"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), on one linear layer."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spark_ft.methods.fused import at_least_fp32, rows, without_autocast
from spark_ft.methods.nf4 import NF4Linear

SAME_AS_LINEAR = ("FalconLinear",)  # subclasses whose own `forward` computes what nn.Linear's does
PLAIN_WEIGHTS = ("Parameter", "FakeTensor")  # types that are just numbers; the second is a memory plan's


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update.

        y = base(x) + scaling · B A dropout(x)          (Hu et al. 2021, eq. 3)

    A starts random and B starts at zero, so a new LoRALinear computes exactly what its base computes.

    Args:
        base: the `nn.Linear` or `NF4Linear` to adapt; it is frozen here.
        rank: r, rows of A and columns of B. More can express a richer update; usual: 4 to 64.
        alpha: α; the update is scaled by α/r, so that another r does not need another learning rate.
        dropout: probability of zeroing an input of the update (never of the base), in training only.
        rslora: scale by α/√r instead (Kalajdzievski 2023, arXiv:2312.03732), so large ranks keep learning.

    Attributes:
        base, lora_A (rank, in), lora_B (out, rank), scaling, enabled, merged.

    Raises:
        ValueError: `refusal(base)`, a rank below 1 or larger than the matrix, or a dropout outside [0, 1).
    """

    def __init__(
        self, base: nn.Module, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, rslora: bool = False
    ):
        super().__init__()
        if why := refusal(base):
            raise ValueError(f"{type(base).__name__} cannot be adapted: {why}")
        out, inp = self.out_features, self.in_features = base.out_features, base.in_features
        if not (most := min(out, inp)) >= rank >= 1:
            raise ValueError(f"rank={rank} does not fit a {out}×{inp} layer; choose a rank from 1 to {most}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} is not a probability below 1; choose one such as 0.05, or 0")
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.enabled, self.merged = True, False
        # A bf16 step of 1e-4 would round away, so the update lives in at least fp32, as in PEFT.
        place = {"device": base.weight.device, "dtype": at_least_fp32(base.weight.dtype)}
        self.lora_A = nn.Parameter(torch.empty(rank, inp, **place))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, **place))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.merged or not self.enabled:
            return self._base_output(x)
        out, A, B = self.base(x), self.lora_A, self.lora_B
        low = rows(F.dropout(x.to(A.dtype), self.dropout, self.training)) @ A.T
        y = torch.addmm(rows(out).to(low.dtype), low, B.T, alpha=self.scaling)  # out + s · (x Aᵀ) Bᵀ
        return y.view(out.shape).to(out.dtype)

    def _base_output(self, x: Tensor) -> Tensor:
        if self.enabled or not self.merged:
            return self.base(x)
        return F.linear(x, self._weights()[0].to(x.dtype), self.bias)  # rare: the update is taken out

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """ΔW = scaling · B A, what `merge` adds to the base weight."""
        with without_autocast(self.lora_A.device):
            return self.scaling * (self.lora_B @ self.lora_A)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """The weight without and with the update, in the adapter's precision."""
        W, delta = self.weight.to(self.lora_A.dtype), self.delta_weight()
        return (W - delta, W) if self.merged else (W, W + delta)

    @torch.no_grad()
    def merge(self) -> None:
        """Put W + ΔW in the base weight's place: the same outputs with no extra work; twice is once."""
        if isinstance(self.base, NF4Linear):
            raise ValueError("4 bits cannot hold W + ΔW; call merge_adapters(model), which dequantizes first")
        if not self.merged:
            self.weight.copy_(self._weights()[1])
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W in its place again, to within the rounding of its dtype; twice is once."""
        if self.merged:
            self.weight.copy_(self._weights()[0])
            self.merged = False

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}, dropout={self.dropout}"


def refusal(layer: nn.Module) -> str:
    """Why a layer cannot be adapted, with the mend; empty if it computes x Wᵀ + b from plain numbers W."""
    kind, weight = type(layer), layer._parameters.get("weight")
    if isinstance(layer, LoRALinear):
        return "it has an adapter already; merge that first"
    plain = type(weight).__name__ in PLAIN_WEIGHTS and weight.is_floating_point() and weight.itemsize > 1
    if isinstance(layer, nn.Linear) and not plain:
        what = f"its weight ({getattr(weight, 'dtype', 'computed')}) is not a plain one of 16 bits or more"
        return f'{what}; load a copy of the model that has such weights, or load_model(…, quantize="nf4")'
    if isinstance(layer, NF4Linear) or kind.forward is nn.Linear.forward or kind.__name__ in SAME_AS_LINEAR:
        return ""
    return "its forward is not nn.Linear's x Wᵀ + b; choose targets without it"
