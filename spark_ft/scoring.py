"""Batches without padding: the tokens of all sequences in one row, and what they all begin with only once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


class Packed(NamedTuple):
    """A batch as one row: the shared prefix, then what is left of each sequence."""

    ids: Int[Tensor, "1 tokens"]
    positions: Int[Tensor, "1 tokens"]  # each token's place in its own sequence
    prefix: int  # tokens at the start that belong to every sequence
    lengths: list[int]  # tokens of each sequence after the prefix
    places: Int[Tensor, "batch seq"]  # where in the row each real token of the batch is; padding's entries mean nothing


def pack(input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"], share_prefix: bool = False) -> Packed:
    """Drop a batch's padding and, if told so, all but one copy of the tokens that every sequence begins with.

    A causal model computes the same for equal beginnings, so the loss and its gradient stay what they were. (Not where
    something random acts on them, as dropout does: the copies would have drawn apart.)

    Args:
        share_prefix: compute a common beginning once; needs two sequences or more, padded on the right.
    """
    real, positions = attention_mask.bool(), attention_mask.cumsum(1) - 1
    prefix = _common_prefix(input_ids, real) if share_prefix else 0
    own = real & (positions >= prefix)
    lengths = own.sum(1)
    starts = prefix + lengths.cumsum(0) - lengths
    return Packed(
        torch.cat([input_ids[0, :prefix], input_ids[own]])[None],
        torch.cat([positions[0, :prefix], positions[own]])[None],
        prefix,
        lengths.tolist(),
        torch.where(positions < prefix, positions, starts[:, None] + positions - prefix),
    )


def _common_prefix(input_ids: Tensor, real: Tensor) -> int:
    if len(input_ids) < 2 or not real[:, 0].all():
        return 0
    same = ((input_ids == input_ids[0]) & real).all(0).long().cumprod(0).sum().item()
    return min(same, int(real.sum(1).min()) - 1)  # every sequence keeps a token of its own


def packed_attention(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    lengths: Sequence[int],
    prefix: int = 0,
    scale: float | None = None,
) -> Float[Tensor, "1 heads tokens dim"]:
    """Causal softmax(q kᵀ · scale) v within each packed sequence; no score is computed for padding or for a neighbour.

    Args:
        lengths: tokens of each sequence after the prefix, in order.
        prefix: tokens at the row's start which every sequence sees.
        scale: factor on the scores, default 1/√dim.
    """
    (q0, *q), (k0, *k), (v0, *v) = (x.split([prefix, *lengths], dim=2) for x in (query, key, value))
    if not prefix:
        outs = [_attention(*parts, scale, is_causal=True) for parts in zip(q, k, v, strict=True)]
        return torch.cat(outs, dim=2)
    outs = [_attention(q0, k0, v0, scale, is_causal=True)]
    for qi, ki, vi in zip(q, k, v, strict=True):
        sees = torch.ones(qi.shape[2], prefix + qi.shape[2], dtype=torch.bool, device=query.device).tril(prefix)
        outs.append(_attention(qi, torch.cat([k0, ki], 2), torch.cat([v0, vi], 2), scale, attn_mask=sees))
    return torch.cat(outs, dim=2)


def _attention(q, k, v, scale, **mask):
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **mask)
