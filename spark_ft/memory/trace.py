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
Loss = Callable[[nn.Module, Batch], tuple]  # (sum, count), and of some losses more
CUDA_ATTENTION = "spark_ft_on_cuda"  # the name, among transformers' own, of attention as a GPU computes it
# What a CUDA process takes beside torch's tensors, for the driver and kernels: 806 to 808 MB on an H200 with
# CUDA 13.0 (data/measurements/gpu).
CUDA_CONTEXT_BYTES = 808_000_000

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
    """What a step was seen to do."""

    moments: dict[Any, dict[str, float]]  # part of the step → its tensors at its worst moment, kind → bytes
    flops: float
    moved: float  # bytes that it must read and write at least


def trace_step(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    device: str,
    accumulates=False,
    reference: nn.Module | None = None,
) -> Trace:
    """The trace of a step of the whole model, from that of one period of its layers and of two."""
    for lm in {model, reference or model}:
        find_head_path(lm)
    layers = _layers(model)
    total = max(1, len(layers))
    start, period = _period(layers, getattr(_text_config(model), "layer_types", None))
    start = max(start, 1)  # the first layer's input is the embeddings, which nothing else keeps
    few = start + period + (total - start) % period
    step = batch, loss, device, accumulates, reference
    if few + period >= total:
        return _trace(model, layers, total, total, *step)
    one, two = (_trace(model, layers, n, few, *step) for n in (few, few + period))

    def of_all(a: float, b: float) -> float:
        return a + (total - few) / period * (b - a)

    moments = {
        part: {kind: of_all(terms.get(kind, 0), two.moments[part].get(kind, 0)) for kind in KINDS}
        for part, terms in one.moments.items()
    }
    return Trace(moments, of_all(one.flops, two.flops), of_all(one.moved, two.moved))


def _trace(model, layers, count, few, batch, loss, device, accumulates, reference) -> Trace:
    """Run the step on a copy of the model with `count` of its layers, on tensors without memory."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    copied, tracker = _stand_in(model, layers, count, fake), _StepTracker(fake)
    tracker.keeps = CHECKPOINTS if getattr(model, "is_activation_checkpointing", False) else SAVED
    tracker.enter(START)
    with _out_of_reach(model), _planned_for(device, copied), fake, tracker:
        for tensor, kind in kinds_of(copied):
            tracker.count(tensor, kind)
        if reference not in (None, model):
            copied.reference_model = _stand_in(reference, _layers(reference), count, fake)
            for tensor, _ in kinds_of(copied.reference_model):
                tracker.count(tensor, REFERENCE)
        trained = [p for p in copied.parameters() if p.requires_grad]
        moments = [torch.zeros_like(p) for p in trained for _ in range(2)]
        for tensor in moments:
            tracker.count(tensor, MOMENTS)
        for p in trained:
            if accumulates:
                p.grad = torch.zeros_like(p)
                tracker.count(p.grad, GRADIENTS)
            p.register_post_accumulate_grad_hook(lambda p: tracker.count(p.grad, GRADIENTS))
        _watch(tracker, _layers(copied))
        value, *_ = loss(copied, {key: x.cpu() for key, x in batch.items()})
        if not value.requires_grad:
            raise ValueError("the loss does not use the model that it is given, so its step can't be planned")
        value.backward()
        tracker.enter(STEP)
    before, kept = (tracker.moments.get(part, tracker.moments[START])[1] for part in (START, HEAD))
    weights = sum(before.get(kind, 0) for kind in WEIGHTS if kind != EMBEDDINGS)
    head = _head(model)
    moved = (3 if tracker.keeps == CHECKPOINTS else 2) * weights + 2 * kept.get(tracker.keeps, 0)
    moved += (0 if head is None else head.weight.nbytes) + 9 * sum(p.nbytes for p in trained)
    worst: dict[Any, dict[str, float]] = {}
    for part, (_, terms) in tracker.moments.items():
        terms = terms | ({CONTEXT: CUDA_CONTEXT_BYTES} if device == "cuda" else {})
        for name in _names(part, count, few):
            worst[name] = max(worst.get(name, {}), terms, key=lambda found: sum(found.values()))
    return Trace(worst, tracker.flops, moved)


class _StepTracker(Tracker):
    """A tracker that tells the kinds of a step's tensors apart."""

    backward = False
    keeps = SAVED

    def label(self, tensor: Tensor, inputs: list[Tensor]) -> str:
        from_kinds = {self.label_of(x) for x in inputs} - {None, INDICES}
        if from_kinds and from_kinds <= {LINEAR, EXPERTS, DEQUANTIZED}:
            return DEQUANTIZED
        if not tensor.is_floating_point():
            return INDICES
        if self.part == HEAD:
            return LOGITS
        if self.backward:  # gradients are on where a checkpointed layer is computed again
            return RECOMPUTED if torch.is_grad_enabled() else PASSING
        return self.keeps


def _watch(tracker: _StepTracker, layers: nn.ModuleList) -> None:
    """Tell the tracker which part begins, by hooks on the layers and on the gradients between them."""

    def begins(part: Any, backward: bool = True) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            tracker.backward = backward
            tracker.enter(part)

        return enter

    def before(i: int, args: tuple, kwargs: dict) -> None:
        begins((FORWARD, i), backward=False)()
        x = args[0] if args else kwargs.get("hidden_states")
        if i == 0 and isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(begins(AFTER))

    def after(i: int, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.register_hook(begins((BACKWARD, i)))
        if i == len(layers) - 1:
            begins(HEAD, backward=False)()

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: before(i, args, kwargs), with_kwargs=True
        )
        layer.register_forward_hook(lambda _, args, out, i=i: after(i, out))


def _names(part: Any, count: int, few: int) -> list[Any]:
    """A layer's part counts from both ends of the model, as far as the smaller copy has layers."""
    if not isinstance(part, tuple):
        return [part]
    direction, i = part
    return [(direction, i)] * (i < few) + [(direction, i - count)] * (i >= count - few)


# ── the model without numbers ────────────────────────────────────────────────────────────────────────────


def kinds_of(model: nn.Module) -> list[tuple[Tensor, str]]:
    """Every tensor that the model holds, once, with its kind; tied weights are one."""
    head, found = _head(model), {}
    for module in model.modules():
        widest = max((p.dim() for p in module.parameters(recurse=False)), default=0)
        widest = len(module.shape) if isinstance(module, nf4.NF4Tensor) else widest
        kind = {2: LINEAR, 3: EXPERTS}.get(widest, NORMS)
        if isinstance(module, LoRALinear):
            kind = ADAPTERS
        elif module is head or isinstance(module, nn.Embedding):
            kind = EMBEDDINGS
        for tensor in real_tensors(module):
            found.setdefault(id(tensor), (tensor, kind))
    return list(found.values())


def _stand_in(model: nn.Module, layers: nn.ModuleList, count: int, fake: FakeTensorMode) -> nn.Module:
    """A copy of the model with the first of its layers, whose every tensor has a shape and no memory."""
    memo: dict[int, Any] = {}
    left_out = set(map(id, layers[count:].modules()))
    for tensor in (x for m in model.modules() if id(m) not in left_out for x in real_tensors(m)):
        with fake:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo.setdefault(id(tensor), empty)
    if layers:
        memo[id(layers)] = nn.ModuleList(copy.deepcopy(layer, memo) for layer in layers[:count])
    copied = copy.deepcopy(model, memo)
    if layers:
        _text_config(copied).num_hidden_layers = count
    return copied


def _layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers: the module list that is as long as the config says."""
    count = getattr(_text_config(model), "num_hidden_layers", None)
    lists = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == count]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=nn.ModuleList())


def _period(layers: nn.ModuleList, types: list[str] | None) -> tuple[int, int]:
    """(s, p) with the least s + p: from layer s on, every layer is like the one p layers before it."""
    kinds = [
        (repr(x), [p.requires_grad for p in x.parameters()], types and types[i]) for i, x in enumerate(layers)
    ]
    for both in range(1, len(kinds) + 1):
        for period in range(1, both + 1):
            if kinds[both - period : len(kinds) - period] == kinds[both:]:
                return both - period, period
    return 0, 1


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def find_head_path(model: nn.Module) -> None:
    """`head_path` of a model without numbers: are its logits its head's output, of its last hidden states?"""
    if _head(model) is None or getattr(model, "known_head_path", None):
        return
    if not next(model.parameters()).is_meta:
        head_path(model)
        return
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    copied, storages = _stand_in(model, _layers(model), 1, fake), []

    def note(*tensors: Tensor) -> None:
        storages.extend(x.untyped_storage()._cdata for x in tensors)

    backbone = copied.model if copied.base_model is copied else copied.base_model
    backbone.register_forward_hook(lambda _, args, out: note(out.last_hidden_state))
    _head(copied).register_forward_hook(lambda _, args, out: note(args[0], out))
    with fake, Tracker(fake), torch.no_grad():
        note(copied(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits)
    hidden, into, out, logits = storages
    model.known_head_path = ("head" if (hidden, out) == (into, logits) else "own",)


@contextmanager
def _out_of_reach(model: nn.Module) -> Iterator[None]:
    """The real model takes no gradient from a loss that uses it, and what is drawn at random is put back."""
    trained = [p for p in model.parameters() if p.requires_grad]
    quiet = logging.getLogger(FakeTensorMode.__module__)  # it prints what it also raises
    level = quiet.level
    try:
        quiet.setLevel(logging.CRITICAL)
        for p in trained:
            p.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        quiet.setLevel(level)
        for p in trained:
            p.requires_grad_(True)


# ── another device, and long loops made short ────────────────────────────────────────────────────────────


@contextmanager
def _planned_for(device: str, copied: nn.Module) -> Iterator[None]:
    """Attention as a GPU computes it, NF4's blocks as large as there, and few of them."""
    config = getattr(copied, "config", None)
    if device == "cuda" and getattr(config, "_attn_implementation", None) in ("sdpa", PACKED):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(CUDA_ATTENTION, _attention_on_cuda)
        AttentionMaskInterface.register(CUDA_ATTENTION, sdpa_mask)
        copied.set_attn_implementation(CUDA_ATTENTION)
    few = {"split": _few_blocks, "dequantize": _one_piece, "_numbers": _numbers_of_shape}
    with patch.dict(nf4.DENSE, cpu=nf4.DENSE[device]), patch.multiple(nf4.NF4Tensor, **few):
        yield


def _attention_on_cuda(module, query, key, value, attention_mask, scaling=None, **_):
    """The kernels that torch's attention takes on a GPU: flash without a mask, else memory-efficient."""
    if attention_mask is None and query.shape[-1] <= 256:
        out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scaling)[0]
    else:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        mask = attention_mask
        if mask is not None:
            mask = mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        out = aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


_split = nf4.NF4Tensor.split


def _few_blocks(weight: nf4.NF4Tensor, rows: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """`NF4Tensor.split`: after its second block, the others are that one again."""
    blocks = _split(weight, rows, dtype)
    for start in range(0, weight.shape[0], rows):
        if start <= rows:
            block = next(blocks)
        yield block[: weight.shape[0] - start]


def _numbers_of_shape(weight: nf4.NF4Tensor, start: int, stop: int) -> Tensor:
    """`NF4Tensor._numbers`: what is alive at its worst moment, without the operations that lead there."""
    blocks = -(-stop // weight.block_size) - (first := start // weight.block_size)
    numbers = blocks * weight.block_size
    codes = weight.packed.new_empty(2 * numbers)
    dense = weight.packed.new_empty(numbers, dtype=torch.float32)
    scales = None if hasattr(weight, "absmax") else weight.packed.new_empty(20 * blocks)
    del codes, scales
    return dense[start - first * weight.block_size : stop - first * weight.block_size]


def _one_piece(weight: nf4.NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`NF4Tensor.dequantize`: the pieces, each freed before the next, are left out; they are small."""
    return weight.packed.new_empty(weight.shape, dtype=dtype or weight.dtype)
