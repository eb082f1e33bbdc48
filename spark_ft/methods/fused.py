"""Gradients written by hand where autograd would keep too much; each class's docstring has its plain line."""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


class ScaleRows(torch.autograd.Function):
    """y = g · (z − b) + b, DoRA's gain on each output. `z` is used up: y may be written into it.

    Plain: `y = (gain * (z - b) + b).to(dtype)`, which keeps z. Kept here: g · (z − b), y itself without b.
    """

    @staticmethod
    def forward(ctx, z, gain, b, dtype):
        if b is not None:
            plain = z - b
            # z + (g − 1)(z − b) equals z to the last bit where g = 1
            y = torch.addcmul(z.to(plain.dtype), gain - 1, plain).to(dtype)
            kept = plain.mul_(gain).to(dtype)
        elif z.dtype == dtype:
            ctx.mark_dirty(z)
            kept = y = z.mul_(gain)
        else:
            kept = y = (z * gain).to(dtype)
        ctx.save_for_backward(kept, gain)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept, gain = ctx.saved_tensors
        product = grad.to(gain.dtype) * kept
        grad_gain = product.sum(0) / gain  # dL/dg = Σ dL/dy · (z − b), over the rows
        grad_z = torch.mul(grad, gain, out=product)  # dL/dz = dL/dy · g
        return grad_z, grad_gain, None, None


class NF4Product(torch.autograd.Function):
    """y = x Wᵀ for a frozen W in 4 bits, of which only some rows are dense at a time, in backward too.

    Plain: `y = x @ weight.dequantize(x.dtype).T`, for which autograd keeps the dense W until backward.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight, at_once = weight, weight.rows_at_once()
        y = x.new_empty(len(rows(x)), weight.shape[0])
        for columns, W in zip(y.split(at_once, dim=1), weight.split(at_once, x.dtype), strict=True):
            torch.mm(rows(x), W.T, out=columns)  # y = x Wᵀ
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, at_once = ctx.weight, ctx.weight.rows_at_once()
        grad_x = grad.new_zeros(len(rows(grad)), weight.shape[1])
        blocks = weight.split(at_once, grad.dtype)
        for columns, W in zip(rows(grad).split(at_once, dim=1), blocks, strict=True):
            grad_x.addmm_(columns, W)  # dL/dx = dL/dy W
        return grad_x.view(*grad.shape[:-1], weight.shape[1]), None


class FrozenHead(torch.autograd.Function):
    """log p(y) = hW[y] − log Σ_v exp(hW[v]) of each token's target y, for a frozen W (vocab, hidden).

    Plain: `log_softmax(hidden @ head.T, 1).gather(1, targets[:, None])[:, 0]`; autograd keeps all logits.
    The slope d log p/dh does not depend on the loss, so it is computed while a chunk's logits are at hand.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, chunk_size):
        logps = hidden.new_empty(len(hidden), dtype=at_least_fp32(hidden.dtype))
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            y = targets[chunk]
            logits = (hidden[chunk] @ head.T).to(logps.dtype)
            target, (top, at) = logits.gather(1, y[:, None]), logits.max(1, keepdim=True)
            # torch's own softmax, a little coarse on CPU: so it agrees with transformers' loss to 1e-6
            probs = torch.softmax(logits, 1, out=logits)
            # log Σ exp = top − log p(top), and p(top) ≥ 1/V never underflows, which p(target) may
            logps[chunk] = (target - top + probs.gather(1, at).log()).squeeze(1)
            if slope is not None:  # d log p/dh = W[y] − softmax(hWᵀ) W
                slope[chunk] = (probs.to(head.dtype) @ head).neg_().add_(head[y])
        if slope is not None:
            ctx.save_for_backward(slope)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None  # dL/dh = dL/d log p · d log p/dh


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: the precision of sums and of adapters."""
    return torch.promote_types(dtype, torch.float32)


def as_in_autocast(x: Tensor) -> Tensor:
    """x in the precision that torch.autocast asks of matrix products; x itself outside of autocast."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if on else x


def without_autocast(device: torch.device):
    """A context in which matrix products keep their precision, whatever torch.autocast asks for outside."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def rows(x: Float[Tensor, "... features"]) -> Float[Tensor, "rows features"]:
    """All leading dimensions as one."""
    return x.reshape(-1, x.shape[-1])
