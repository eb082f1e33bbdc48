"""What an export writes: a model's original weights, read one at a time, each with its update merged in."""

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spark_ft.adapters import METHODS, adapted_layers, fill, read_adapter
from spark_ft.embedded import EMBEDDED, EMBEDDED_HUB_ID
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import NF4Tensor
from spark_ft.models import ModelOnDisk, load_model, load_tokenizer, open_model

GONE = (
    "the original weights are gone: what is exported is what 4 bits left of them. In 16 bits nothing more is "
    "lost. Quantized again it loses more than from the originals: in one run, held-out loss 0.068 instead of "
    "0.029 in Q4_0, and 1.99 instead of 0.022 on NF4's own grid. Export the original base and the adapter's "
    "folder where you have them"
)


class Weights:
    """A causal model's tensors under transformers' names, with an adapter merged in where one is given.

    Args:
        base: a name or folder as in `load_model`, whose weights stay on disk until they are read; or a model
            in memory: plain, or in 4 bits, for which the checkpoint that it was loaded from is read.
        adapter_folder: in PEFT's format, or None.

    Attributes:
        config, source (a folder or hub id, or None for a model in memory), title, architecture (its class);
        adapter (its config or None) and parts (each adapted layer's tensors); shapes of all tensors by name.

    Raises:
        ValueError: the model has an adapter attached, its tensors are not those of its config, or the adapter
            does not fit it. OSError: the model cannot be read.
    """

    def __init__(self, base: str | os.PathLike | nn.Module | None, adapter_folder: str | os.PathLike | None):
        self._read, names, self.config, self.source, self.title = _find(base)
        with torch.device("meta"):  # shapes and no numbers
            empty = AutoModelForCausalLM.from_config(self.config)
        self.architecture = type(empty).__name__
        self.shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
        self.tied, head = self.config.tie_word_embeddings, "lm_head.weight"
        unknown = {name for name in names - self.shapes.keys() if not name.endswith(".inv_freq")}
        missing = self.shapes.keys() - names - ({head} if self.tied else set())
        for which, what in ((missing, "missing"), (unknown, f"unknown to {self.config.model_type}")):
            listed = ", ".join(sorted(which)[:3])
            if which:
                raise ValueError(f"{self.title}: tensors {what}: {listed} ({len(which)} in all)")
        self.adapter, self.parts = None, {}
        if adapter_folder is not None:
            self.adapter, self.parts = read_adapter(empty, adapter_folder, self.original)
        if self.tied and "lm_head" not in self.parts:
            del self.shapes[head]

    def original(self, name: str) -> Tensor:
        """A tensor as it was before any adapter."""
        own = "model.embed_tokens.weight" if self.tied and name == "lm_head.weight" else name
        tensor, shape = self._read(own), self.shapes[own]
        if tensor.shape != shape:
            raise ValueError(
                f"{self.title}: {own} is {tuple(tensor.shape)}, and its config wants {tuple(shape)}"
            )
        return tensor

    def read(self, name: str) -> Tensor:
        """A tensor as it is to be written: W + ΔW in fp32 where the adapter has an update."""
        layer, _, part = name.rpartition(".")
        return self._merged(layer).weight if part == "weight" and layer in self.parts else self.original(name)

    def tokenizer(self):
        """The base's own."""
        embedded = self.title == EMBEDDED_HUB_ID != os.environ.get("SPARK_FT_MODEL")
        return load_tokenizer(self.source or (EMBEDDED if embedded else self.title))

    @torch.no_grad()
    def _merged(self, name: str) -> LoRALinear:
        """A layer as `load_adapters` makes it, in fp32, merged into a copy of W."""
        W, config = self.original(f"{name}.weight").to(torch.float32, copy=True), self.adapter
        base = nn.Linear(*reversed(W.shape), bias=False, device="meta")
        base.weight = nn.Parameter(W)
        with torch.random.fork_rng():  # a new A draws numbers
            layer = METHODS[config.method](base, config.rank, config.alpha, 0.0, config.rslora)
        fill(layer, self.parts[name])
        layer.merge()
        return layer.requires_grad_(False)


class Found(NamedTuple):
    """Where a model's tensors come from: what reads one by its name, and which names there are."""

    read: Callable[[str], Tensor]
    names: set[str]
    config: object
    source: str | None
    title: str


def _find(base) -> Found:
    if isinstance(base, nn.Module):
        return _in_memory(base)
    disk = open_model(base)
    if not disk.stored:
        return _on_disk(disk)
    if disk.stored == "bitsandbytes":
        _warn(f"{disk.title} is stored in 4 bits, and {GONE}")
    return _held_by(load_model(base)[0])._replace(source=disk.source, title=disk.title)


def _on_disk(disk: ModelOnDisk) -> Found:
    return Found(lambda n: disk.tensors[n][:], set(disk.tensors), disk.config, disk.source, disk.title)


def _in_memory(model: nn.Module) -> Found:
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} has no config; export a causal model of transformers")
    title = _title(model)
    if adapted_layers(model) or any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            f"the model {title} has an adapter attached and not merged, and an export of its weights would "
            "leave the adapter out. Merge it first (merge_adapters), or save it (save_adapters) and export "
            "the base with its folder"
        )
    if getattr(model, "dequantized", False):
        _warn(f"the adapter was merged into a model in 4 bits, and {GONE}")
    held = _held_by(model)
    if not any(isinstance(module, NF4Tensor) for module in model.modules()):
        return held
    try:
        disk = open_model(title)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'the model is in 4 bits, and its original weights cannot be read from "{title}" ({error}); '
            "export from the folder or hub id of the originals"
        ) from error
    if disk.stored:
        _warn(f"{title} is stored in 4 bits, and {GONE}")
        return held
    originals = _on_disk(disk)
    for name, tensor in model.named_parameters():  # what is not in 4 bits must still be the checkpoint's
        if name not in disk.tensors or not torch.equal(originals.read(name).to(tensor.dtype), tensor.cpu()):
            raise ValueError(
                f'"{name}" of the model is not that of {title}, and other weights are in 4 bits; save what '
                "was trained as an adapter, and export the base with it"
            )
    return originals


def _held_by(model: nn.Module) -> Found:
    """The tensors of a model in memory, those in 4 bits dequantized."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, NF4Tensor)}
    plain = {n: p for n, p in model.state_dict().items() if not n.startswith(tuple(f"{n}." for n in packed))}

    def read(name: str) -> Tensor:
        return (packed[name].dequantize() if name in packed else plain[name]).cpu()

    return Found(read, {*packed, *plain}, model.config, None, _title(model))


def _title(model: nn.Module) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
