"""A training step run on tensors that have a shape and no memory: who is alive when, and what is computed."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spark_ft.memory.tracker import Tracker, real_tensors
from spark_ft.methods import nf4
from spark_ft.methods.lora import LoRALinear
from spark_ft.scoring import PACKED, head_path

aten = torch.ops.aten
Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, int]]
CUDA_ATTENTION = "spark_ft_on_cuda"  # the name, among transformers' own, of attention as a GPU computes it
CUDA_CONTEXT_BYTES = 700_000_000  # of a CUDA process before its first tensor: driver, kernels, workspaces

# What a step's tensors are, in the order of a plan's table.
LINEAR, EXPERTS, EMBEDDINGS, NORMS = "linear layers", "experts", "embeddings and head", "norms"
REFERENCE, ADAPTERS, GRADIENTS, MOMENTS = "reference model", "adapters", "gradients", "optimizer moments"
CHECKPOINTS, SAVED, RECOMPUTED = "checkpoints", "saved activations", "one layer recomputed"
DEQUANTIZED, PASSING, LOGITS = "dequantized weight", "gradients in passing", "logits"
INDICES, CONTEXT = "masks and positions", "CUDA context"
WEIGHTS = (LINEAR, EXPERTS, EMBEDDINGS, NORMS, REFERENCE, ADAPTERS)
WORKING = (CHECKPOINTS, SAVED, RECOMPUTED, DEQUANTIZED, PASSING, LOGITS, INDICES, CONTEXT)
KINDS = (*WEIGHTS, GRADIENTS, MOMENTS, *WORKING)

# The parts of a step; of a layer's two parts, (FORWARD, i) and (BACKWARD, i), i < 0 counts from the last.
START, HEAD, AFTER, STEP = (
    "before the step",
    "the output head",
    "backward of the embeddings",
    "the optimizer's step",
)
FORWARD, BACKWARD = "forward", "backward"


class Trace(NamedTuple):
    """What a step was seen to do: its parts' worst moments, label → bytes, and what it computes and moves."""

    moments: dict[Any, dict[str, float]]
    flops: float
    moved: float


class _StepTracker(Tracker):
    """A tracker that tells the kinds of a step's tensors apart."""

    backward = False
    keeps = SAVED

    def label(self, tensor: Tensor, inputs: list[Tensor]) -> str:
        from_labels = {self.label_of(x) for x in inputs} - {None, INDICES}
        if from_labels and from_labels <= {LINEAR, EXPERTS, DEQUANTIZED}:
            return DEQUANTIZED
        if not tensor.is_floating_point():
            return INDICES
        if self.part == HEAD:
            return LOGITS
        if self.backward:  # gradients are on where a checkpointed layer is computed again
            return RECOMPUTED if torch.is_grad_enabled() else PASSING
        return self.keeps


@contextmanager
def _planned_for(device: str, copied: nn.Module) -> Iterator[None]:
    """Attention as a GPU computes it, and NF4's blocks as large as there."""
    config = getattr(copied, "config", None)
    if device == "cuda" and getattr(config, "_attn_implementation", None) in ("sdpa", PACKED):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(CUDA_ATTENTION, _attention_on_cuda)
        AttentionMaskInterface.register(CUDA_ATTENTION, sdpa_mask)
        copied.set_attn_implementation(CUDA_ATTENTION)
    few = {"split": _few_blocks, "dequantize": _one_block}
    with patch.dict(nf4.DENSE, cpu=nf4.DENSE[device]), patch.multiple(nf4.NF4Tensor, **few):
        yield


_split, _dequantize = nf4.NF4Tensor.split, nf4.NF4Tensor.dequantize


def _few_blocks(weight: nf4.NF4Tensor, rows: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """`NF4Tensor.split`, of whose blocks all but the first two and the last are the second one again."""
    blocks = -(-weight.shape[0] // rows)
    first = _split(weight, rows, dtype)
    for i in range(min(blocks, 2)):
        block = next(first)
        yield block
    for _ in range(2, blocks - 1):
        yield block
    if blocks > 2:
        left = weight.shape[0] - (blocks - 1) * rows
        yield block[:left]


def _one_block(weight: nf4.NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`NF4Tensor.dequantize`, whose pieces are all like the first."""
    whole = weight.packed.new_empty(weight.shape, dtype=dtype or weight.dtype)
    size = min(nf4.CODED_AT_ONCE // weight.block_size * weight.block_size // weight.shape[-1], len(whole))
    for _ in _split(weight, size, torch.float32) if whole.dim() == 2 and size else ():
        break
    return whole


def _attention_on_cuda(module, query, key, value, attention_mask, scaling=None, **_):
    """The kernels that torch's attention takes on a GPU: flash where there is no mask, else
    memory-efficient."""
    if attention_mask is None and query.shape[-1] <= 256:
        out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scaling)[0]
    else:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        mask = attention_mask
        if mask is not None:
            mask = mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        out = aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


def trace_step(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    device: str,
    accumulates: bool,
    reference: nn.Module | None = None,
) -> Trace:
    """The trace of the whole model, from that of one period of its layers and of two."""
    _find_head_path(model, FakeTensorMode(allow_non_fake_inputs=True))
    layers = _layers(model)
    total = len(layers) or 1
    head, period = _period(layers, getattr(_text_config(model), "layer_types", None))
    head = max(head, 1)  # the first layer's input is the embeddings, which nothing else keeps
    few = head + period + (total - head) % period
    options = {
        "batch": batch,
        "loss": loss,
        "device": device,
        "accumulates": accumulates,
        "reference": reference,
    }
    if few + period >= total:
        return _trace(model, layers, total, total, **options)
    one, two = (_trace(model, layers, n, few, **options) for n in (few, few + period))
    repeats = (total - few) / period

    def at_all(a: float, b: float) -> float:
        return a + repeats * (b - a)

    moments = {
        part: {name: at_all(terms.get(name, 0), two.moments[part].get(name, 0)) for name in KINDS}
        for part, terms in one.moments.items()
    }
    return Trace(moments, at_all(one.flops, two.flops), at_all(one.moved, two.moved))


def _find_head_path(model: nn.Module, fake: FakeTensorMode) -> None:
    """Leave on a model without numbers what `head_path` says: whether its logits are its head's output,
    untouched."""
    if getattr(model, "known_head_path", None) or _head(model) is None:
        return
    if not next(model.parameters()).is_meta:
        head_path(model)
        return
    copied, seen = _stand_in(model, _layers(model), 1, fake), {}
    _head(copied).register_forward_hook(lambda _, args, out: seen.update(into=args[0], out=out))
    backbone = copied.model if copied.base_model is copied else copied.base_model
    backbone.register_forward_hook(lambda _, args, out: seen.update(hidden=out.last_hidden_state))
    with fake, Tracker(fake), torch.no_grad():
        logits = copied(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits
    one = all(
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        for a, b in ((seen["into"], seen["hidden"]), (logits, seen["out"]))
    )
    model.known_head_path = ("head" if one else "own",)


def _layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers: the module list that is as long as the config says."""
    count = getattr(_text_config(model), "num_hidden_layers", None)
    lists = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=nn.ModuleList())


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _period(layers: nn.ModuleList, types: list[str] | None) -> tuple[int, int]:
    """(h, p): from layer h on, every layer is like the one p layers before it."""
    kinds = [
        (repr(layer), [p.requires_grad for p in layer.parameters()], types and types[i])
        for i, layer in enumerate(layers)
    ]
    total = len(kinds)
    found = (
        (head, period)
        for size in range(1, total + 1)
        for period in range(1, size + 1)
        for head in (size - period,)
        if all(kinds[i] == kinds[i + period] for i in range(head, total - period))
    )
    return next(found, (0, max(1, total)))


def _trace(
    model: nn.Module,
    layers: nn.ModuleList,
    count: int,
    few: int,
    batch: Batch,
    loss: Loss,
    device: str,
    accumulates: bool,
    reference: nn.Module | None,
) -> Trace:
    """Run the step on a copy of the model with `count` of its layers, on tensors without memory."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    copied = _stand_in(model, layers, count, fake)
    tracker = _StepTracker(fake)
    tracker.keeps = CHECKPOINTS if getattr(model, "is_activation_checkpointing", False) else SAVED
    tracker.enter(START)
    logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)  # it prints what it also raises
    with _out_of_reach(model), _planned_for(device, copied), fake, tracker:
        for tensor, kind in kinds_of(copied):
            tracker.count(tensor, kind)
        if reference is not None and reference is not model:
            copied.reference_model = _stand_in(reference, _layers(reference), count, fake)
            for tensor, _ in kinds_of(copied.reference_model):
                tracker.count(tensor, REFERENCE)
        trained = [p for p in copied.parameters() if p.requires_grad]
        state = [torch.zeros_like(p) for p in trained for _ in range(2)]
        for tensor in state:
            tracker.count(tensor, MOMENTS)
        if accumulates:
            for p in trained:
                p.grad = torch.zeros_like(p)
                tracker.count(p.grad, GRADIENTS)
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: tracker.count(p.grad, GRADIENTS))
        _watch(tracker, _layers(copied))
        value, _ = loss(copied, {key: x.cpu() for key, x in batch.items()})
        if not value.requires_grad:
            raise ValueError(
                "the loss does not use the model that it is given; let it, or its step can't be planned"
            )
        value.backward()
        tracker.enter(STEP)
        kept = tracker.moments.get(HEAD, tracker.moments[START])[1].get(tracker.keeps, 0)
    weights = {kind: size for kind, size in tracker.moments[START][1].items() if kind in WEIGHTS}
    output = _head(model)
    passes = 3 if tracker.keeps == CHECKPOINTS else 2
    read = passes * sum(size for kind, size in weights.items() if kind != EMBEDDINGS)
    moved = (
        read
        + (output.weight.nbytes if output is not None else 0)
        + 2 * kept
        + 9 * sum(p.nbytes for p in trained)
    )
    moments = {}
    for part, (_, terms) in tracker.moments.items():
        if device == "cuda":
            terms = terms | {CONTEXT: CUDA_CONTEXT_BYTES}
        for name in _names(part, count, few):
            if sum(terms.values()) > sum(moments.get(name, {"": -1}).values()):
                moments[name] = terms
    return Trace(moments, tracker.flops, moved)


@contextmanager
def _out_of_reach(model: nn.Module) -> Iterator[None]:
    """A loss that uses the real model, and not the one it is given, finds nothing there to put gradients on.

    Random numbers that it draws are put back.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def _names(part: Any, count: int, few: int) -> list[Any]:
    """A layer's part counts from the model's end and from its beginning, as far as the smaller copy has
    layers."""
    if not isinstance(part, tuple):
        return [part]
    direction, i = part
    return [(direction, i)] * (i < few) + [(direction, i - count)] * (i >= count - few)


def _stand_in(model: nn.Module, layers: nn.ModuleList, count: int, fake: FakeTensorMode) -> nn.Module:
    """A copy of the model with the first of its layers, whose every tensor has a shape and no memory."""
    memo: dict[int, Any] = {}
    left_out = set(map(id, layers[count:].modules()))
    for module in model.modules():
        for tensor in () if id(module) in left_out else real_tensors(module):
            if id(tensor) not in memo:
                with fake:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = empty
    if layers:
        memo[id(layers)] = nn.ModuleList(copy.deepcopy(layer, memo) for layer in layers[:count])
    copied = copy.deepcopy(model, memo)
    if layers:
        _text_config(copied).num_hidden_layers = count
    return copied


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def kinds_of(model: nn.Module) -> list[tuple[Tensor, str]]:
    """Every tensor that the model holds, once, with its kind; tied weights are one."""
    head, found = _head(model), {}
    for module in model.modules():
        if isinstance(module, LoRALinear):
            kind = ADAPTERS
        elif module is head or isinstance(module, nn.Embedding):
            kind = EMBEDDINGS
        elif isinstance(module, nf4.NF4Tensor):
            kind = EXPERTS if len(module.shape) == 3 else LINEAR
        elif any(p.dim() == 3 for p in module.parameters(recurse=False)):
            kind = EXPERTS
        else:
            kind = LINEAR if any(p.dim() == 2 for p in module.parameters(recurse=False)) else NORMS
        for tensor in real_tensors(module):
            found.setdefault(id(tensor), (tensor, kind))
    return list(found.values())


def _watch(tracker: _StepTracker, layers: nn.ModuleList) -> None:
    """Tell the tracker which part of the step begins, by hooks on the layers and on the gradients between
    them."""

    def begins(part: Any, backward: bool) -> Callable[[Any], None]:
        def enter(*_: Any) -> None:
            tracker.backward = backward
            tracker.enter(part)

        return enter

    def before(i: int):
        def hook(_, args, kwargs):
            begins((FORWARD, i), False)()
            x = args[0] if args else kwargs.get("hidden_states")
            if i == 0 and isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(begins(AFTER, True))

        return hook

    def after(i: int):
        def hook(_, args, out):
            out = out[0] if isinstance(out, tuple) else out
            if out.requires_grad:
                out.register_hook(begins((BACKWARD, i), True))
            if i == len(layers) - 1:
                begins(HEAD, False)()

        return hook

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(before(i), with_kwargs=True)
        layer.register_forward_hook(after(i))
