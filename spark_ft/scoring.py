"""Batches without padding: the tokens of all sequences in one row, and what they all begin with only once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from spark_ft.data.chat import IGNORE
from spark_ft.methods.logprobs import chunked_logps, token_logps
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.neftune import draws_noise

Batch = dict[str, Tensor]


class Packed(NamedTuple):
    """A batch as one row: the shared prefix, then what is left of each sequence."""

    ids: Int[Tensor, "1 tokens"]
    positions: Int[Tensor, "1 tokens"]  # each token's place in its own sequence
    prefix: int  # tokens at the start that belong to every sequence
    lengths: list[int]  # tokens of each sequence after the prefix
    places: Int[
        Tensor, "batch seq"
    ]  # where in the row each real token of the batch is; padding's entries mean nothing


def pack(
    input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"], share_prefix: bool = False
) -> Packed:
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
        sees = torch.ones(qi.shape[2], prefix + qi.shape[2], dtype=torch.bool, device=query.device).tril(
            prefix
        )
        outs.append(_attention(qi, torch.cat([k0, ki], 2), torch.cat([v0, vi], 2), scale, attn_mask=sees))
    return torch.cat(outs, dim=2)


def _attention(q, k, v, scale, **mask):
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **mask)


def completion_logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p of every completion token (N,) fp32, and the batch row each belongs to (N,); differentiable.

    Only the positions that predict a completion token reach the output head, and where the model takes packed sequences
    (`use_packed_attention`) padding is not computed at all, and what all rows begin with is computed once.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: input_ids, attention_mask and labels, each (B, L), as `collate_sft` makes them.
    """
    labels, mask = batch["labels"], batch["attention_mask"]
    predicts = F.pad(labels[:, 1:] != IGNORE, (0, 1))  # (B, L): the next token is a completion token
    backbone = model.base_model
    if row := packed_row(model, batch):
        places = {"position_ids": row.positions, "lengths": row.lengths, "prefix": row.prefix}
        hidden = backbone(row.ids, **places, use_cache=False).last_hidden_state[0][row.places[predicts]]
    else:
        hidden = backbone(batch["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state[
            predicts
        ]
    return _head_logps(model, hidden, labels.roll(-1, 1)[predicts]), predicts.nonzero()[:, 0]


def sequence_logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each row's completion (B,) fp32, and its number of tokens (B,) int64."""
    logps, rows = completion_logps(model, batch)
    zeros = logps.new_zeros(len(batch["labels"]))
    return zeros.index_add(0, rows, logps), rows.bincount(minlength=len(zeros))


def packed_row(model: nn.Module, batch: dict[str, Tensor]) -> Packed | None:
    """The batch as the one row that the model computes, or None where it takes padded batches only."""
    if model.config._attn_implementation != PACKED:
        return None
    return pack(batch["input_ids"], batch["attention_mask"], share_prefix=not _draws_random_numbers(model))


def _draws_random_numbers(model: nn.Module) -> bool:
    """Dropout or NEFTune is at work, so that equal tokens of two rows are not computed alike."""
    return draws_noise(model) or (
        model.training
        and any(
            module.dropout if isinstance(module, LoRALinear) else isinstance(module, nn.Dropout) and module.p
            for module in model.modules()
        )
    )


def _head_logps(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """`token_logps` through the model's own head, whatever it does to the logits after the matrix product."""
    head, config = model.get_output_embeddings(), model.config
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if type(head) is nn.Linear and head.bias is None and scale == 1.0 and not cap:
        return token_logps(hidden, head.weight, targets)

    def logits(rows: Tensor) -> Tensor:
        scaled = head(rows) * scale
        return torch.tanh(scaled / cap) * cap if cap else scaled

    return chunked_logps(hidden, logits, targets)


PACKED = "spark_ft_packed"  # the name of our attention among transformers' own


def use_packed_attention(model) -> None:
    """Let the model also take `lengths=[…]` and `prefix=…`: sequences packed in one row (packing.py).

    Without `lengths` it computes what it did, by transformers' own sdpa attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module, query, key, value, attention_mask, scaling=None, lengths=None, prefix=0, **kwargs):
        if lengths is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
        return packed_attention(query, key, value, lengths, prefix, scaling).transpose(1, 2), None

    AttentionInterface.register(PACKED, attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    model.set_attn_implementation(PACKED)


def _plain_causal(config) -> bool:
    """Every layer is full causal attention: no sliding window, no soft cap, no dropout on the scores."""
    return (
        config.model_type in ("llama", "mistral", "qwen2", "qwen3")
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "attention_dropout", 0)
    )


def sft_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Supervised fine-tuning: −Σ log p(token) over the batch's completion tokens, and their number."""
    logps, _ = completion_logps(model, batch)
    return -logps.sum(), logps.numel()
