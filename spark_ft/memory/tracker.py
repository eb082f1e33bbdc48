"""The birth and death of every tensor's storage in a block of code, on real tensors or on tensors without
memory."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# A real tensor of indices with more numbers than this is not made for a plan; it gets no memory either.
LARGE = 2**26


def _attention_flop(query, key, value, *_, **__) -> int:
    """q kᵀ and its product with v, half of both where attention is causal is not taken off: as torch counts
    it."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def _attention_backward_flop(_, query, key, value, *__, **___) -> int:
    """The scores once more, and the gradients of q, k, v and of the scores."""
    return 5 * _attention_flop(query, key, value) // 2


_ATTENTIONS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
# torch.utils.flop_counter does not know these, or until torch 2.12 no attention in which several heads share
# a key; the formulas are those of the products that they compute.
_MORE_FLOPS: dict[Any, Callable[..., int]] = {
    aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    aten.baddbmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2],
    aten._grouped_mm: lambda a, b, *_, **__: 2 * a[-2] * a[-1] * b[-1],
    **{getattr(aten, f"_scaled_dot_product_{name}"): _attention_flop for name in _ATTENTIONS},
    **{
        getattr(aten, f"_scaled_dot_product_{name}_backward"): _attention_backward_flop
        for name in _ATTENTIONS
    },
}
# What a value is read for where there are no values: no row lost its digits, two tensors are still equal, a
# sum is 0.
_READ = {aten._local_scalar_dense.default: 0, aten.is_nonzero.default: False, aten.equal.default: True}


class Tracker(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most at once, inside a `with` block; views add
    nothing.

    Args:
        fake: where given, the block runs on tensors that have a shape and no storage. Tensors of integers,
            and what is computed from them alone, stay real, so that masks and positions come out as in the
            real step.

    Attributes:
        now, peak: bytes alive, and the most at once.
        live: label → bytes; `label` decides, at a tensor's birth.
        moments: name of a part of the block (`enter`) → live, at that part's worst moment.
        flops: floating-point operations of matrix products and attention.
    """

    def __init__(self, fake: FakeTensorMode | None = None):
        super().__init__()
        self.fake = fake
        self.now = self.peak = self.flops = 0
        self.live: Counter[str] = Counter()
        self.moments: dict[Any, tuple[int, dict[str, int]]] = {}
        self.part: Any = "start"
        self._of: dict[int, tuple[str, int]] = {}  # storage → label, bytes

    def enter(self, part: Any) -> None:
        """From now on the block is in this part of itself."""
        self.part = part
        self._note()

    def label(self, tensor: Tensor, inputs: list[Tensor]) -> str:
        """What a new tensor counts as; `inputs` are the tensors that it was computed from."""
        return "tensors"

    def count(self, tensor: Tensor, label: str) -> None:
        """Count a tensor that is there already, or from now on under another label."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._of:
            self.live[self._of[key][0]] -= size
        else:
            self.now += size
            weakref.finalize(storage, self._freed, key)
        self._of[key] = label, size
        self.live[label] += size
        self._note()

    def label_of(self, tensor: Tensor) -> str | None:
        """The label that a tensor's storage counts under, or None where it is not counted."""
        return self._of.get(tensor.untyped_storage()._cdata, (None, 0))[0]

    def _freed(self, key: int) -> None:
        if key in self._of:
            label, size = self._of.pop(key)
            self.live[label] -= size
            self.now -= size

    def _note(self) -> None:
        self.peak = max(self.peak, self.now)
        if self.now > self.moments.get(self.part, (-1,))[0]:
            self.moments[self.part] = self.now, dict(self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else function(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        run = self._without_memory if self.fake else lambda *_: function(*args, **kwargs)
        result = run(function, args, kwargs, inputs)
        self._count_flops(function, args, kwargs, result)
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        for x in tree_leaves(result):
            if not isinstance(x, Tensor) or x.is_meta or (isinstance(x, FakeTensor) and not self.fake):
                continue  # of a shape alone; a plan that runs inside a measured block takes no memory
            key = x.untyped_storage()._cdata
            if key not in given and key not in self._of:
                self.count(x, self.label(x, inputs))
        return result

    def _count_flops(self, function, args, kwargs, result) -> None:
        packet = function._overloadpacket
        if packet in _MORE_FLOPS:
            shapes = [x.shape if isinstance(x, Tensor) else x for x in args]
            self.flops += _MORE_FLOPS[packet](*shapes)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)

    def _without_memory(self, function, args, kwargs, inputs: list[Tensor]) -> Any:
        if not any(isinstance(x, FakeTensor) for x in inputs) and _stays_real(function, args, kwargs, inputs):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function in _READ:
            return _READ[function]
        if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], _indices(args[1]), *args[2:])
        if function is aten._grouped_mm.default:  # torch's own rule for its shape takes bf16 alone
            return _grouped(*args, **kwargs)
        return function(*args, **kwargs)


def _stays_real(function, args, kwargs, inputs: list[Tensor]) -> bool:
    if inputs:
        try:
            return torch.broadcast_shapes(*(x.shape for x in inputs)).numel() <= LARGE
        except RuntimeError:  # shapes that are not broadcast against each other, as in a product
            return True
    dtype = kwargs.get("dtype")
    whole = function._overloadpacket is aten.arange or (dtype is not None and not dtype.is_floating_point)
    sizes = args[0] if args and isinstance(args[0], list | tuple) else ()
    return whole and torch.Size(sizes).numel() <= LARGE


def _indices(indices) -> list[Tensor | None]:
    """Boolean masks as the places that they mark: how many there are is known, since masks are real."""
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *_, **__) -> Tensor:
    if a.dim() == b.dim() == 2:
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    return a.new_empty(*(a.shape[:-1] if a.dim() == 2 else (a.shape[0], a.shape[1])), b.shape[-1])


def real_tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor that a module itself holds: parameters, buffers, and what it keeps in plain attributes."""
    kept = (
        x for value in module.__dict__.values() for x in (value if isinstance(value, tuple) else (value,))
    )
    own = (*module._parameters.values(), *module._buffers.values(), *kept)
    return [x for x in own if isinstance(x, Tensor)]
