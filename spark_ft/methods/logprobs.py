"""Log-probabilities of given tokens, without ever holding a (tokens, vocabulary) matrix."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spark_ft.methods.fused import FrozenHead, at_least_fp32


def token_logps(
    hidden: Float[Tensor, "tokens hidden"],
    head: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    chunk_size: int = 128,
) -> Float[Tensor, " tokens"]:
    """log p(target) of each token under softmax(hidden · headᵀ), in fp32 or better.

        log p(y) = hW[y] − log Σ_v exp(hW[v])          d log p(y) / dh = W[y] − softmax(hWᵀ) W

    A frozen head (LoRA) takes two matrix products in all and keeps one row per token (`FrozenHead`). With a
    head that trains, each chunk's logits are computed again in backward (`chunked_logps`).

    Args:
        hidden: final hidden states, one row per scored token; prompt and padding rows need not come.
        head: the output embedding.
        targets: the token that each row should predict.
        chunk_size: rows per chunk; more make larger matrix products and a peak of chunk_size × vocab.

    Raises:
        ValueError: the numbers of rows differ, or hidden and head have different widths.
    """
    if len(hidden) != len(targets) or hidden.shape[-1] != head.shape[-1]:
        found = f"hidden {tuple(hidden.shape)}, head {tuple(head.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"{found} do not fit: expected (N, H), (V, H) and (N,)")
    if not torch.is_grad_enabled():
        hidden = hidden.detach()  # needs_input_grad would still be true, and the slope be computed for nobody
    elif head.requires_grad:
        return chunked_logps(hidden, lambda rows: F.linear(rows, head), targets, chunk_size)
    return FrozenHead.apply(hidden, head, targets, chunk_size)


def chunked_logps(
    hidden: Float[Tensor, "tokens hidden"],
    logits: Callable[[Tensor], Tensor],
    targets: Int[Tensor, " tokens"],
    chunk_size: int = 128,
) -> Float[Tensor, " tokens"]:
    """`token_logps` for any differentiable `logits(rows)`: a head that trains, or is biased or soft-capped.

    Each chunk's logits are dropped after forward and computed again in backward.
    """

    def of_chunk(rows, ys):
        scores = logits(rows)
        return -F.cross_entropy(scores.to(at_least_fp32(scores.dtype)), ys, reduction="none")

    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    return torch.cat([checkpoint(of_chunk, rows, ys, use_reentrant=False) for rows, ys in chunks])
