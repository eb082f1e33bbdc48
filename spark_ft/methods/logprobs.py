"""Log-probabilities of given tokens, without ever holding a (tokens, vocabulary) matrix."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def token_logps(
    hidden: Float[Tensor, "tokens hidden"],
    head: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    chunk_size: int = 128,
) -> Float[Tensor, " tokens"]:
    """log p(target) of each token under softmax(hidden · headᵀ), in fp32 or better.

        log p(y) = hW[y] − log Σ_v exp(hW[v])            d log p(y) / dh = W[y] − softmax(hWᵀ) W

    The derivative does not depend on the loss, so where the head is frozen (LoRA) it is computed beside the value, while
    the chunk's logits are still at hand: two matrix products in all, and backward is one multiplication. A head that trains
    is handled by `chunked_logps`, which computes the chunk's logits again in backward.

    Args:
        hidden: final hidden states, one row per scored token. Prompt and padding rows need not come.
        head: the output embedding.
        targets: the token each row should predict.
        chunk_size: rows per chunk; peak memory is chunk_size × vocab, more rows make larger matrix products.

    Raises:
        ValueError: the numbers of rows differ, or hidden and head have different widths.
    """
    if len(hidden) != len(targets) or hidden.shape[-1] != head.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, head {tuple(head.shape)} and targets {tuple(targets.shape)} do not fit: "
            "expected (N, H), (V, H) and (N,)"
        )
    if not torch.is_grad_enabled():
        hidden = hidden.detach()  # needs_input_grad would still be true, and the slope be computed for nobody
    elif head.requires_grad:
        return chunked_logps(hidden, lambda rows: F.linear(rows, head), targets, chunk_size)
    return _FrozenHead.apply(hidden, head, targets, chunk_size)


def chunked_logps(
    hidden: Float[Tensor, "tokens hidden"],
    logits: Callable[[Tensor], Tensor],
    targets: Int[Tensor, " tokens"],
    chunk_size: int = 128,
) -> Float[Tensor, " tokens"]:
    """`token_logps` for any differentiable `logits(rows)`: a head that is trained, adapted, biased, scaled or soft-capped.

    Each chunk's logits are dropped after forward and computed again in backward: three matrix products for frozen-head's two.
    """

    def of_chunk(rows, ys):
        return -F.cross_entropy(_wide(logits(rows)), ys, reduction="none")

    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    return torch.cat([checkpoint(of_chunk, rows, ys, use_reentrant=False) for rows, ys in chunks])


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, chunk_size):
        needs_grad = ctx.needs_input_grad[0]
        logps = hidden.new_empty(len(hidden), dtype=_wide(hidden[:0]).dtype)
        slope = torch.empty_like(hidden) if needs_grad else None
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            y = targets[rows]
            logits = _wide(hidden[rows] @ head.T)
            target, (top, at) = logits.gather(1, y[:, None]), logits.max(1, keepdim=True)
            # torch's softmax, as in transformers' own loss: its exp on CPU is a little coarse, and so both agree to 1e-6
            probs = torch.softmax(logits, 1, out=logits)
            # log Σ exp = top − log p(top), and p(top) ≥ 1/V never underflows, which p(target) may
            logps[rows] = (target - top + probs.gather(1, at).log()).squeeze(1)
            if needs_grad:
                torch.mm(probs.to(head.dtype), head, out=slope[rows]).neg_().add_(head[y])
        if needs_grad:
            ctx.save_for_backward(slope)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
