"""Model and batch → log-probabilities of the completions, for every causal language model of transformers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from spark_ft.data.batches import with_prompt
from spark_ft.data.chat import IGNORE
from spark_ft.methods.logprobs import chunked_logps, token_logps
from spark_ft.methods.neftune import draws_noise

Batch = dict[str, Tensor]
Tokens = Int[Tensor, " tokens"]  # one number per completion token of the batch


def sft_loss(model: nn.Module, batch: "Batch | Prepared") -> tuple[Tensor, int]:
    """Supervised fine-tuning: −Σ log p(token) over the batch's completion tokens, and their number.

    Divided, they are the model's own loss, without what a mixture of experts may add for its routers.
    """
    logps, _ = completion_logps(model, batch)
    return -logps.sum(), logps.numel()


def completion_logps(model: nn.Module, batch: "Batch | Prepared") -> tuple[Float[Tensor, " tokens"], Tokens]:
    """log p of every completion token, in fp32 or better, and the batch row each belongs to; differentiable.

    Only positions that predict a completion token reach the output head. Where the model takes packed rows
    (`use_packed_attention`), padding is not computed, and what all rows begin with is computed once.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: input_ids, attention_mask and labels, each (B, L), as `collate_sft` makes them.

    Raises:
        ValueError: as `head_path`.
    """
    plain, head = head_path(model) == "head", model.get_output_embeddings()
    hidden, targets, rows = completion_hidden(model, batch)
    if plain and type(head) is nn.Linear and head.bias is None:
        return token_logps(hidden, head.weight, targets), rows
    return chunked_logps(hidden, head_logits(model), targets), rows


def sequence_logps(model: nn.Module, batch: "Batch | Prepared") -> tuple[Float[Tensor, " batch"], Tensor]:
    """Σ log p of each row's completion tokens, in fp32 or better, and the number of these tokens (B,)."""
    batch = prepare(model, batch)
    logps, rows = completion_logps(model, batch)
    return logps.new_zeros(len(batch.counts)).index_add(0, rows, logps), batch.counts


def pair_logps(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "2 batch"], Int[Tensor, "2 batch"]]:
    """Σ log p of each pair's chosen and rejected tokens, and their numbers; differentiable.

        (chosen, rejected), (chosen_tokens, rejected_tokens) = pair_logps(model, batch)

    Where the model takes packed rows, a prompt is computed once for both of its answers.

    Args:
        batch: as `collate_preferences` makes it.
    """
    logps, counts, _ = answer_logps(model, batch, ("chosen", "rejected"))
    return logps, counts


def answer_logps(
    model: nn.Module, batch: Batch, sides: Sequence[str], prompts: bool = False
) -> tuple[Float[Tensor, "sides batch"], Int[Tensor, "sides batch"], Float[Tensor, " batch"]]:
    """`pair_logps` for any answers that share their prompt, and Σ log p of the prompts' own tokens.

    Args:
        batch, sides: as in `with_prompt`.
        prompts: score the prompts' tokens too, all but the first, which nothing predicts; else that sum is 0.
    """
    rows, size = with_prompt(batch, *sides), len(batch["prompt_ids"])
    of_prompt = torch.zeros(size, len(sides), dtype=torch.long, device=rows["labels"].device)
    if prompts:  # those of the first answer's row
        of_prompt[:, 0] = batch["prompt_mask"].sum(1) - 1
        whole = rows["attention_mask"].bool() & (of_prompt.flatten() > 0)[:, None]
        rows["labels"] = torch.where(whole, rows["input_ids"], rows["labels"])
    ready = prepare(model, rows, together=len(sides))
    logps, row = completion_logps(model, ready)
    place = torch.arange(len(row), device=row.device) - (ready.counts.cumsum(0) - ready.counts)[row]
    total = size * len(sides)  # a row's first scored tokens are its prompt's
    row = torch.where(place < of_prompt.flatten()[row], total + row // len(sides), row)
    sums = logps.new_zeros(total + size).index_add(0, row, logps)
    counts = ready.counts.view(size, -1) - of_prompt
    return sums[:total].view(size, -1).T, counts.T, sums[total:]


def completion_hidden(
    model: nn.Module, batch: "Batch | Prepared"
) -> tuple[Float[Tensor, "tokens hidden"], Tokens, Tokens]:
    """Final hidden state of each position that predicts a completion token, that token, and its batch row."""
    batch = prepare(model, batch)
    hidden = _backbone(model)(**batch.inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.places), batch.targets, batch.rows


class Prepared(NamedTuple):
    """All integers that scoring a batch needs; what is left is tensor work of known shapes."""

    inputs: dict  # what the backbone is called with
    places: Tokens  # of the scored positions among the hidden states, flattened
    targets: Tokens
    rows: Tokens
    counts: Int[Tensor, " batch"]  # completion tokens of each row


def prepare(model: nn.Module, batch: Batch | Prepared, together: int = 1) -> Prepared:
    """Find which positions are scored, and pack the batch where the model takes packed rows.

    Args:
        together: that many rows after each other begin with the same prompt, as in `pack`.
    """
    if isinstance(batch, Prepared):
        return batch
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    predicts = F.pad(labels[:, 1:] != IGNORE, (0, 1))  # (B, L): the next token is a completion token
    places = predicts.flatten().nonzero()[:, 0]
    targets, rows = labels.roll(-1, 1).flatten()[places], places // ids.shape[1]
    if row := packed_row(model, batch, together):
        inputs, places = row.inputs(), row.places.flatten()[places]
    else:
        inputs = {"input_ids": ids, "attention_mask": None if mask.all() else mask}
    return Prepared(inputs, places, targets, rows, predicts.sum(1))


def _backbone(model: nn.Module) -> nn.Module:
    return model.model if model.base_model is model else model.base_model  # Llama 4 and Mllama: the first


# ── the output head, whatever a model does around it ─────────────────────────────────────────────────────


def head_path(model: nn.Module) -> str:
    """How hidden states become logits: "head", by the output head alone; "own", by the model's own forward.

    Found by comparing the logits of eight tokens, made so large that a soft cap shows: two short passes in
    eval mode, once per model, and again when the head's type or a number in the config has changed. A copy
    with shapes and no numbers (fake or meta tensors) keeps the answer of its original, in `known_head_path`.

    Raises:
        ValueError: no causal language model of transformers, or its logits follow from something else.
        RuntimeError: a model without numbers, and nothing known of it.
    """
    from transformers import PreTrainedModel

    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is None:
        mend = "load it with AutoModelForCausalLM, or take PEFT's get_base_model()"
        raise ValueError(f"{type(model).__name__} is no causal language model of transformers; {mend}")
    known, weight = getattr(model, "known_head_path", None), next(model.parameters())
    if isinstance(weight, FakeTensor) or weight.is_meta:
        if known is None:
            raise RuntimeError("ask head_path of the real model, or of a tiny one; then copy known_head_path")
        return known[0]
    numbers = {**vars(model.config.get_text_config()), **vars(model)}
    about = (type(head), {name: x for name, x in numbers.items() if type(x) in (int, float)})
    if known is None or known[1] != about:
        model.known_head_path = known = (_compare_heads(model, head), about)
    return known[0]


def head_logits(model: nn.Module) -> Callable[[Float[Tensor, "rows hidden"]], Float[Tensor, "rows vocab"]]:
    """The function from final hidden states to the model's logits, scaling and soft caps included."""
    return model.get_output_embeddings() if head_path(model) == "head" else _own_logits(model)


def _own_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model's own forward, with the given rows in place of what its backbone would return."""

    def logits(rows: Tensor) -> Tensor:
        ids = torch.zeros(1, len(rows), dtype=torch.long, device=rows.device)
        with patch.object(_backbone(model), "forward", lambda *_, **__: _HiddenStates([rows[None]])):
            return model(input_ids=ids, use_cache=False).logits[0]

    return logits


class _HiddenStates(tuple):
    """What a backbone returns, empty but for the hidden states."""

    last_hidden_state = property(lambda self: self[0])
    __getattr__ = lambda self, name: None  # noqa: E731


@torch.no_grad()
def _compare_heads(model: nn.Module, head: nn.Module) -> str:
    def louder(head, args):  # logits of ±100, since a soft cap hides in small ones
        return (args[0] * (100 / head.forward(args[0]).abs().max().clamp_min(1e-3)),)

    def equal(ours):
        coarsest = max(torch.finfo(x.dtype).eps for x in (hidden, ours, own))
        # weights that are no numbers are for `train` to tell: they compare as equal
        return not (ours - own).abs().max() > max(1e-4, 4 * coarsest) * own.abs().max()

    with evaluating(model), head.register_forward_pre_hook(louder):
        ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
        hidden = _backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        own = model(input_ids=ids, use_cache=False).logits[0]
        if getattr(head, "in_features", None) == hidden.shape[-1] and equal(head(hidden)):
            return "head"
        if equal(_own_logits(model)(hidden)):
            return "own"
    fault = f"the logits of {type(model).__name__} do not follow from its last hidden states alone"
    raise ValueError(f"{fault}; give `train` its own loss: out = model(**batch); return out.loss * n, n")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode; then each module is put back, even after an exception."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


# ── packed rows: no padding, and what all sequences begin with only once ─────────────────────────────────

PACKED = "spark_ft_packed"  # the name of our attention among transformers' own


class Packed(NamedTuple):
    """A batch as one row: the shared prefix, then what is left of each sequence.

    Sequences with a prompt in common make a group: what is left of the prompt, then what is left of each.
    """

    ids: Int[Tensor, "1 tokens"]
    positions: Int[Tensor, "1 tokens"]  # each token's place in its own sequence
    prefix: int  # tokens at the start that belong to every sequence
    groups: list[tuple[int, ...]]  # tokens of each group after the prefix: of its prompt, of each sequence
    places: Int[Tensor, "batch seq"]  # of the batch's real tokens in the row; padding's entries mean nothing

    @property
    def lengths(self) -> list[int]:
        """Tokens of each group after the prefix."""
        return [sum(group) for group in self.groups]

    def masks(self) -> list[Tensor | None]:
        """Which keys (prefix and group) each of a group's tokens sees; None where that is all before it."""
        return [_sees(self.prefix, group, self.ids.device) for group in self.groups]

    def inputs(self) -> dict:
        """What a backbone with packed attention is called with."""
        row = {"lengths": self.lengths, "prefix": self.prefix, "masks": self.masks()}
        # transformers would make a (tokens, tokens) mask; one of four dimensions it hands on as it is
        empty = self.ids.new_empty(1, 1, 1, 1)
        return {"input_ids": self.ids, "attention_mask": empty, "position_ids": self.positions, **row}


def _sees(prefix: int, group: tuple[int, ...], device: torch.device) -> Tensor | None:
    if prefix == 0 and len(group) == 2:
        return None
    tokens, end = sum(group), group[0]
    sees = torch.ones(tokens, prefix + tokens, dtype=torch.bool, device=device).tril(prefix)
    for answer in group[1:]:  # no later answer sees this one
        begin, end = end, end + answer
        sees[end:, prefix + begin : prefix + end] = False
    return sees


def packed_row(model: nn.Module, batch: Batch, together: int = 1) -> Packed | None:
    """The batch as the one row that the model computes, or None where it takes padded batches only."""
    if model.config._attn_implementation != PACKED:
        return None
    shares = not _draws_random_numbers(model)
    return pack(batch["input_ids"], batch["attention_mask"], shares, together if shares else 1)


def pack(
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    share_prefix: bool = False,
    together: int = 1,
) -> Packed:
    """Drop a batch's padding and, if asked, all but one copy of the tokens that sequences begin with alike.

    A causal model computes the same for equal beginnings, so the loss and its gradient do not change, unless
    something random such as dropout acts on them: each copy would have drawn its own.

    Args:
        share_prefix: compute once what all sequences begin with; two or more, padded on the right.
        together: compute once, too, what each `together` sequences after each other begin with.
    """
    real, positions = attention_mask.bool(), attention_mask.cumsum(1) - 1
    prefix = _common_prefix(input_ids, real) if share_prefix else 0
    grouped = (len(input_ids) // together, together)
    prompts = _common_prompts(input_ids, real, grouped).clamp(min=prefix)
    first = torch.arange(len(input_ids), device=prompts.device) % together == 0
    begin = torch.where(first, prefix, prompts)  # a group's first sequence brings its prompt
    own = real & (positions >= begin[:, None])
    left = own.sum(1)
    starts = prefix + left.cumsum(0) - left
    ahead = starts.view(grouped)[:, :1].expand(grouped).flatten()  # where the group's prompt goes on
    in_group = torch.where(positions < prompts[:, None], ahead[:, None] - prefix, (starts - begin)[:, None])
    prompts = (prompts - prefix).view(grouped)[:, 0]
    left = left.view(grouped) - F.pad(prompts[:, None], (0, together - 1))
    return Packed(
        torch.cat([input_ids[0, :prefix], input_ids[own]])[None],
        torch.cat([positions[0, :prefix], positions[own]])[None],
        prefix,
        [tuple(group) for group in torch.cat([prompts[:, None], left], 1).tolist()],
        torch.where(positions < prefix, positions, in_group + positions),
    )


def _common_prefix(input_ids: Tensor, real: Tensor) -> int:
    if len(input_ids) < 2 or not real[:, 0].all():
        return 0
    same = ((input_ids == input_ids[0]) & real).all(0).long().cumprod(0).sum().item()
    return min(same, int(real.sum(1).min()) - 1)  # every sequence keeps a token of its own


def _common_prompts(input_ids: Tensor, real: Tensor, grouped: tuple[int, int]) -> Int[Tensor, " batch"]:
    """How many tokens the sequences of each group begin with alike, for each sequence."""
    if grouped[1] == 1 or not real[:, 0].all():
        return input_ids.new_zeros(len(input_ids))
    ids, real = (x.view(*grouped, -1) for x in (input_ids, real))
    same = ((ids == ids[:, :1]) & real).all(1).long().cumprod(1).sum(1)
    return same[:, None].expand(grouped).flatten()


def _draws_random_numbers(model: nn.Module) -> bool:
    """Dropout or NEFTune is at work, so that equal tokens of two rows are not computed alike."""
    return draws_noise(model) or any(m.training for m in dropout_layers(model))


def dropout_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that drop numbers at random while they are in training mode.

    Some drop by the rate of an `nn.Dropout` that they hold, or by one of their own. A layer that is to be
    computed again in backward is not among them, since eval mode would turn that off.
    """

    def drops(module: nn.Module) -> bool:
        own = vars(module)  # asked for by hand, since a module's own way to say "no such name" is slow
        rates = [own.get(name, 0) for name in ("dropout", "attention_dropout", "activation_dropout")]
        rates += [x.p for x in (module, *module._modules.values()) if isinstance(x, nn.Dropout)]
        return any(isinstance(x, int | float) and x > 0 for x in rates)

    return [m for m in model.modules() if drops(m) and not vars(m).get("gradient_checkpointing", False)]


def packed_attention(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    lengths: Sequence[int],
    prefix: int = 0,
    masks: Sequence[Tensor | None] = (),
    scale: float | None = None,
) -> Float[Tensor, "1 heads tokens dim"]:
    """softmax(q kᵀ · scale) v within each packed group; no score of a neighbour is computed.

    Args:
        lengths, prefix, masks: of `Packed`.
        scale: factor on the scores, default 1/√dim.
    """
    (q0, *q), (k0, *k), (v0, *v) = (x.split([prefix, *lengths], dim=2) for x in (query, key, value))
    outs = [_attention(q0, k0, v0, scale, is_causal=True)] if prefix else []
    for qi, ki, vi, mask in zip(q, k, v, masks, strict=True):
        if prefix:
            ki, vi = torch.cat([k0, ki], 2), torch.cat([v0, vi], 2)
        outs.append(_attention(qi, ki, vi, scale, attn_mask=mask, is_causal=mask is None))
    # tokens before heads in memory, as the kernel writes them and the next layer reads them
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1).transpose(1, 2)


def _attention(q, k, v, scale, **sees):
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **sees)


def use_packed_attention(model) -> None:
    """Let the model also take the packed rows of `pack`; other calls compute what transformers' sdpa does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module, query, key, value, attention_mask, scaling=None, lengths=None, **kwargs):
        if lengths:
            rest = kwargs["prefix"], kwargs["masks"], scaling
            return packed_attention(query, key, value, lengths, *rest).transpose(1, 2), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    AttentionInterface.register(PACKED, attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    model.set_attn_implementation(PACKED)


# The kinds for which packed rows are proved equal, in tests/test_scoring.py; the others run padded.
PACKED_KINDS = ("granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "qwen3_moe", "smollm3")


def takes_packed_rows(config) -> bool:
    """Whether all attention of this kind is causal over the whole sequence, and draws nothing."""
    windowed_or_random = ("sliding_window", "attention_dropout")
    return config.model_type in PACKED_KINDS and not any(getattr(config, x, 0) for x in windowed_or_random)
