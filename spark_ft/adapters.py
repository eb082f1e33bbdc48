"""Put adapters onto a transformers model, merge them, and read and write them in PEFT's own on-disk format."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from spark_ft.files import write_atomically
from spark_ft.methods.dora import DoRALinear
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import NF4Linear

METHODS = {"lora": LoRALinear, "dora": DoRALinear}
LINEAR = (nn.Linear, NF4Linear, LoRALinear)
ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model."  # PEFT's name for "the model that I wrap"


@dataclass(frozen=True)
class AdapterConfig:
    """What to adapt and how; the fields are those of `LoRALinear`.

    Args:
        method: "lora" or "dora".
        rank, alpha, dropout, rslora: see `LoRALinear`.
        targets: "all-linear" (every linear layer but the output head), or names: a whole path, or its end after a dot,
            as in ("q_proj", "v_proj").
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f'method="{self.method}" is unknown; choose one of {", ".join(METHODS)}')
        if not self.targets:
            raise ValueError(f'targets is empty; use "{ALL_LINEAR}" or names such as ("q_proj", "v_proj")')
        if self.targets != ALL_LINEAR:
            names = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
            object.__setattr__(self, "targets", names)


def add_adapters(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Freeze the model and replace every target layer by an adapted one, in place; only the adapters train.

    Returns:
        the same model.

    Raises:
        ValueError: the model has adapters already, a target matches no linear layer, or the rank fits one of them not.
            The model is then unchanged.
    """
    if adapted_layers(model):
        raise ValueError(
            "the model has adapters already; merge them first (merge_adapters), or load the model anew"
        )
    names = _target_names(model, config.targets)
    for name in names:
        layer = model.get_submodule(name)
        if config.rank > min(layer.in_features, layer.out_features):
            raise ValueError(
                f"rank={config.rank} is larger than {name} ({layer.out_features}×{layer.in_features}); "
                f"choose at most {min(layer.in_features, layer.out_features)}"
            )
    bases = {name: model.get_submodule(name) for name in names}
    adapt, options = METHODS[config.method], (config.rank, config.alpha, config.dropout, config.rslora)
    layers = {
        name: adapt(base, *options).train(base.training) for name, base in bases.items()
    }  # raises before any change
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.adapter_config = config
    return model


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model computes what it computed before it was adapted: the reference model, for free."""
    layers = _require_adapters(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add every update into its base weight and take the adapters off: a plain transformers model, no slower than before.

    A model in 4 bits becomes one in bf16, all of it, at 2 bytes a weight: nothing is put into 4 bits again.

    Returns:
        the same model. Its parameters stay frozen.

    Raises:
        ValueError: no adapters, or an adapted weight is also another module's, which must not change with it.
    """
    layers = _require_adapters(model)
    quantized = any(isinstance(module, NF4Linear) for module in model.modules())
    elsewhere = {
        p: name
        for name, m in model.named_modules()
        if not hasattr(m, "in_features")
        for p in m.parameters(False)
    }
    for name, layer in layers.items():
        if other := elsewhere.get(layer.base.weight):
            raise ValueError(
                f"{name} shares its weight with {other}, which a merge would change too; keep the adapters on, "
                "or load the model with tie_word_embeddings=False"
            )
    for name, layer in layers.items():
        layer.merge()
        model.set_submodule(name, layer.base)
    del model.adapter_config
    return _dequantized(model) if quantized else model


def _dequantized(model: nn.Module) -> nn.Module:
    """All of it in bf16: the layers that no adapter was on, and what never was in 4 bits."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            model.set_submodule(name, layer.to_linear(torch.bfloat16))
    return model.to(torch.bfloat16)


def save_adapters(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the adapters as PEFT does: `adapter_model.safetensors` and `adapter_config.json`; PEFT can load them.

    Each file is put in place whole, by a rename.
    """
    layers = _require_adapters(model)
    config: AdapterConfig = model.adapter_config
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ends = {name.rsplit(".", 1)[-1] for name in layers}
    exact = set(_target_names(model, tuple(ends))) == set(layers)
    tensors = {
        f"{_PREFIX}{name}.{key}": tensor.detach().contiguous().cpu()
        for name, layer in layers.items()
        for key, tensor in _adapter_tensors(layer).items()
    }
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.method == "dora",
        "target_modules": sorted(ends if exact else layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_atomically(
        folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"})
    )
    write_atomically(
        folder / "adapter_config.json", lambda path: path.write_text(json.dumps(fields, indent=2) + "\n")
    )
    return folder


def load_adapters(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Load adapters that `save_adapters` or PEFT wrote, onto a plain model or over adapters of the same shape.

    Everything is checked before the model is touched.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the adapter is of a kind that is not supported here, or belongs to another model.
    """
    folder = Path(folder)
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_file, weights_file):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; an adapter folder holds {config_file.name} and {weights_file.name}"
            )
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{config_file}: not a JSON object; save the adapter again")
    try:
        tensors = load_file(weights_file)
    except SafetensorError as error:
        raise ValueError(f"{weights_file}: damaged ({error}); save or download the adapter again") from error
    _refuse_unsupported(fields, config_file)

    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        by_layer.setdefault(name, {})[part] = tensor
    if not by_layer:
        raise ValueError(f"{weights_file}: holds no adapter; save it again")
    config = AdapterConfig(
        method="dora" if fields.get("use_dora") else "lora",
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        dropout=fields.get("lora_dropout", 0.0),
        targets=tuple(sorted(by_layer)),
        rslora=fields.get("use_rslora", False),
    )
    existing = adapted_layers(model)
    _check_fit(model, existing, by_layer, config, weights_file)
    if not existing:
        add_adapters(model, config)
    for name, layer in adapted_layers(model).items():
        with torch.no_grad():
            for part, parameter in _adapter_tensors(layer).items():
                parameter.copy_(by_layer[name][part.removesuffix(".weight")])
    return model


def _adapter_tensors(layer: LoRALinear) -> dict[str, nn.Parameter]:
    """A layer's own parameters under PEFT's names; DoRA's magnitude is a bare parameter there too, without `.weight`."""
    tensors = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
    return {**tensors, "lora_magnitude_vector": layer.magnitude} if isinstance(layer, DoRALinear) else tensors


def _target_names(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {
        name: module
        for name, module in model.named_modules()
        # an adapted layer counts under its own name, its base does not
        if name and isinstance(module, LINEAR) and not isinstance(_parent(model, name), LoRALinear)
    }
    if targets == ALL_LINEAR:
        names = [name for name, module in linear.items() if module is not output]
        if not names:
            raise ValueError(f'targets="{ALL_LINEAR}" finds no linear layer in this {type(model).__name__}')
        return names
    for target in targets:
        if not any(_matches(name, target) for name in linear):
            ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ValueError(
                f'target "{target}" matches no linear layer of the model; it has {", ".join(ends)}'
            )
    return [name for name in linear if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _require_adapters(model: nn.Module) -> dict[str, LoRALinear]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters; put them on with add_adapters or load_adapters")
    return layers


def _refuse_unsupported(fields: dict, config_file: Path) -> None:
    if fields.get("peft_type") != "LORA":
        raise ValueError(
            f'{config_file}: peft_type is {fields.get("peft_type")!r}; only "LORA" adapters can be loaded here'
        )
    for field in ("r", "lora_alpha"):
        if not isinstance(fields.get(field), (int, float)):
            raise ValueError(
                f'{config_file}: "{field}" is {fields.get(field)!r}, not a number; save the adapter again'
            )
    plain = {"bias": "none"}
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "target_parameters",
                  "layer_replication", "fan_in_fan_out", "use_qalora", "use_bdlora", "arrow_config",
                  "alora_invocation_tokens", "bias", "lora_bias"):  # fmt: skip
        if fields.get(field) and fields[field] != plain.get(field):
            raise ValueError(
                f'{config_file}: "{field}" is {fields[field]!r}, which is not supported here; load this adapter with PEFT'
            )


def _check_fit(model, existing, by_layer, config, weights_file) -> None:
    """Raise unless every tensor has its layer, every layer its tensors, and all shapes agree."""
    modules = dict(model.named_modules())
    for name, parts in by_layer.items():
        module = modules.get(name)
        if not isinstance(module, LINEAR):
            raise ValueError(
                f'{weights_file}: adapts "{name}", which this model has not; it is an adapter of another model'
            )
        shapes = {"lora_A": (config.rank, module.in_features), "lora_B": (module.out_features, config.rank)}
        if config.method == "dora":
            shapes["lora_magnitude_vector"] = (module.out_features,)
        found = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        if found != shapes:
            raise ValueError(
                f'{weights_file}: "{name}" has {found} where this model needs {shapes}; it belongs to another model or rank'
            )
    if existing:
        here = model.adapter_config
        same = (here.method, here.rank, here.alpha, here.rslora) == (
            config.method,
            config.rank,
            config.alpha,
            config.rslora,
        )
        if set(existing) != set(by_layer) or not same:
            raise ValueError(
                f"{weights_file}: the model has other adapters already; merge_adapters first, or load the model anew"
            )
