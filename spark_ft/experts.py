"""A whole model in NF4: which weights, putting them there, and experts, whose weights are 3-D parameters."""

import inspect
import re
from collections import Counter
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from spark_ft.methods.nf4 import SCALE_GROUP, NF4Linear, NF4Tensor, quantize_nf4


def quantize_model(model: nn.Module) -> nn.Module:
    """Put the weights that `nf4_names` lists into NF4, in place, one at a time, and freeze the model.

    A model on the meta device, or of fake tensors, gets NF4 weights of the right sizes: what a plan needs.
    """
    for name in nf4_names(model):
        put_nf4(model, name)
    return model.requires_grad_(False)


def nf4_names(model: nn.Module) -> list[str]:
    """Names of the weights that NF4 takes: of linear layers but the head, and of experts (experts, out, in).

    Tied weights stay as they are, as do those that the model reads instead of calling their layer (Mamba).

    Raises:
        ValueError: they are less than half of the weights outside the embeddings; says where the others are.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = getattr(model, "all_tied_weights_keys", {})
    kept = {*tied, *tied.values()}
    sizes, others = {}, Counter()
    for owner, module in model.named_modules():
        parent, _, layer = owner.rpartition(".")
        kind = type(module)
        linear = kind is nn.Linear and layer not in _read_by(type(model.get_submodule(parent)))
        for name, p in module.named_parameters(owner, recurse=False):
            fits = p.dim() == 2 if linear else p.dim() == 3 and "Experts" in kind.__name__
            if fits and module is not head and name not in kept:
                sizes[name] = p.numel()
            elif module is not head and not isinstance(module, nn.Embedding):
                others["tied weights" if name in kept else kind.__name__] += p.numel()
    taken, total = sum(sizes.values()), sum(sizes.values()) + others.total()
    if taken < total / 2:
        shares = ", ".join(f"{kind} ({size / total:.0%})" for kind, size in others.most_common(3))
        raise ValueError(
            f"NF4 takes linear layers and experts, which hold only {taken / total:.0%} of what a "
            f"{type(model).__name__} has outside its embeddings; the rest is in {shares}; load it without "
            "quantize"
        )
    return list(sizes)


@lru_cache
def _read_by(parent: type) -> set[str]:
    """Layers whose weight a class of transformers reads as a tensor: `self.dt_proj.weight @ x`."""
    source = inspect.getsource(parent) if parent.__module__.startswith("transformers.") else ""
    return set(re.findall(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))", source))


def put_nf4(model: nn.Module, name: str, weight: Tensor | None = None) -> None:
    """Replace a parameter of a linear layer or of experts by `weight`, default its own, in NF4.

    Of a weight without numbers, on the meta device or under FakeTensorMode, only the sizes are made.
    """
    owner, _, part = name.rpartition(".")
    module = model.get_submodule(owner)
    here = getattr(module, part)
    weight = here.detach() if weight is None else weight
    if weight.shape != here.shape:
        raise ValueError(f"it is {tuple(weight.shape)}, and the config wants {tuple(here.shape)}")
    nf4 = _sizes_only(weight) if weight.is_meta or isinstance(weight, FakeTensor) else quantize_nf4(weight)
    if isinstance(module, nn.Linear):
        model.set_submodule(owner, NF4Linear(nf4, module.bias).train(module.training))
    else:
        delattr(module, part)
        setattr(module, part, nf4)
        module.__class__ = _nf4_class(type(module))


def _sizes_only(weight: Tensor, block_size: int = 64) -> NF4Tensor:
    blocks = -(-weight.numel() // block_size)
    codes = {"packed": (-(-weight.numel() // 2),), "scale_codes": (blocks,)}
    scales = {"scale_absmax": (-(-blocks // SCALE_GROUP),), "offset": ()}
    stored = {name: weight.new_empty(size, dtype=torch.uint8) for name, size in codes.items()}
    stored |= {name: weight.new_empty(size, dtype=torch.float32) for name, size in scales.items()}
    return NF4Tensor(weight.shape, weight.dtype, block_size, **stored)


class NF4Experts:
    """Experts whose 3-D weights lie in NF4: out = experts(x; W = dequantize(NF4)).

    The forward of the experts' own class runs on dequantized weights, which are freed when it returns: where
    backward needs one, only a note is kept, and the weight is dequantized again.
    """

    def forward(self, hidden: Tensor, *args, **kwargs):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        dense = {name: nf4.dequantize(dtype) for name, nf4 in self._nf4()}
        origin = {dense[name].untyped_storage()._cdata: nf4 for name, nf4 in self._nf4()}
        # what is no weight goes to the hooks outside, as those of activation checkpointing
        outside = torch._C._autograd._top_saved_tensors_default_hooks(True)
        keep, fetch = outside or (lambda tensor: tensor, lambda kept: kept)

        def pack(tensor: Tensor) -> tuple:
            nf4 = origin.get(tensor.untyped_storage()._cdata)
            place = (tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())
            return (nf4, *place) if nf4 else (None, keep(tensor))

        def unpack(kept: tuple) -> Tensor:
            return _view(*kept) if kept[0] else fetch(kept[1])

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            vars(self).update(dense)  # found before the NF4Tensors, which are submodules of the same names
            try:
                return super().forward(hidden, *args, **kwargs)
            finally:
                for name in dense:
                    del vars(self)[name]

    def _nf4(self) -> list[tuple[str, NF4Tensor]]:
        return [(name, part) for name, part in self.named_children() if isinstance(part, NF4Tensor)]

    def dequantize_(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Become the experts' own class again, with plain frozen parameters."""
        for name, nf4 in self._nf4():
            delattr(self, name)
            setattr(self, name, nn.Parameter(nf4.dequantize(dtype), requires_grad=False))
        self.__class__ = type(self).__bases__[1]


@lru_cache
def _nf4_class(cls: type) -> type:
    return cls if issubclass(cls, NF4Experts) else type(f"NF4{cls.__name__}", (NF4Experts, cls), {})


def _view(nf4: NF4Tensor, dtype: torch.dtype, size: torch.Size, stride: tuple, start: int) -> Tensor:
    """The part of a weight that backward asks for, dequantized, in the layout that forward used."""
    length = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    whole = length == nf4.numel()
    numbers = nf4.dequantize(dtype) if whole else nf4._numbers(start, start + length)
    return numbers.to(dtype).as_strided(size, stride)
