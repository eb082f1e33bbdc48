"""Batches without padding: the tokens of all sequences in one row, each sequence attending only to itself."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def pack(
    input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
) -> tuple[Int[Tensor, "1 tokens"], Int[Tensor, "1 tokens"], list[int]]:
    """Drop a batch's padding: (token ids, positions that restart at 0, length of each sequence)."""
    real = attention_mask.bool()
    positions = attention_mask.cumsum(1) - 1
    return input_ids[real][None], positions[real][None], attention_mask.sum(1).tolist()


def packed_attention(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    lengths: Sequence[int],
    scale: float | None = None,
) -> Float[Tensor, "1 heads tokens dim"]:
    """Causal softmax(q kᵀ · scale) v within each of the packed sequences; no mask is ever made, no score wasted on padding.

    Args:
        lengths: tokens of each sequence, in order; their sum is the row's length.
        scale: factor on the scores, default 1/√dim.
    """
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True) for q, k, v in parts], dim=2
    )
