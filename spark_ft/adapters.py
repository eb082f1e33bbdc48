"""Put adapters onto a transformers model, merge them, read and write them in PEFT's own format on disk."""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from spark_ft.experts import NF4Experts
from spark_ft.files import write_atomically
from spark_ft.methods.dora import DoRALinear
from spark_ft.methods.lora import LoRALinear, refusal
from spark_ft.methods.nf4 import NF4Linear, NF4Tensor

METHODS = {"lora": LoRALinear, "dora": DoRALinear}
ALL_LINEAR = "all-linear"
OUT_OF_REACH = 0.05  # share of the weights that "all-linear" may leave out, embeddings and head aside
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PREFIX = "base_model.model."  # PEFT's name for "the model that I wrap"
_KEY = re.compile(  # the adapter's own name may stand in a key, as in q_proj.lora_A.default.weight
    r"(.+)\.(lora_(?:A|B|magnitude_vector|embedding_[AB]))(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
)
# Values of adapter_config.json that leave nothing to know but the tensors; other fields must be empty.
_HARMLESS = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_rslora": (True, False, None),
    "use_dora": (True, False, None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),  # W is left alone
}
_EMPTY = (None, False, "", [], {})
# Sizes, names, layers asked for, Conv1D's layout, and settings of what another field switches on.
_FREE = """r lora_alpha lora_dropout task_type auto_mapping peft_version base_model_name_or_path revision
    inference_mode runtime_config target_modules exclude_modules layers_to_transform layers_pattern
    fan_in_fan_out megatron_core qalora_group_size loftq_config eva_config corda_config
    lora_ga_config""".split()  # noqa: SIM905
_MERGED = "merge the adapter in PEFT (merge_and_unload) and load the model that this gives"


@dataclass(frozen=True)
class AdapterConfig:
    """What to adapt and how; the fields are those of `LoRALinear`.

    Args:
        method: "lora" or "dora".
        rank, alpha, dropout, rslora: see `LoRALinear`.
        targets: "all-linear" (every linear layer but the output head), or names: whole paths, or their ends
            after a dot, as in ("q_proj", "v_proj").
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False

    def __post_init__(self):
        rank, alpha, dropout, known = self.rank, self.alpha, self.dropout, ", ".join(METHODS)
        _require(self.method in METHODS, f'method="{self.method}" is unknown; choose one of {known}')
        _require(self.targets, f'targets is empty; use "{ALL_LINEAR}" or names such as ("q_proj", "v_proj")')
        _require(isinstance(rank, int) and rank > 0, f"rank={rank!r} is not a whole number above 0")
        right = isinstance(alpha, int | float) and math.isfinite(alpha)
        _require(right, f"alpha={alpha!r} is not a number")
        right = isinstance(dropout, int | float) and 0 <= dropout < 1
        _require(right, f"dropout={dropout!r} is not a probability below 1")
        if self.targets != ALL_LINEAR:
            names = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
            object.__setattr__(self, "targets", names)


def add_adapters(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Freeze the model and replace every target layer by an adapted one, in place; only the adapters train.

    A transformers model runs once on four tokens: that shows whether it calls each target as a layer.

    Returns:
        the same model, with its `adapter_config`.

    Raises:
        ValueError: the model has adapters already, a target matches no linear layer, or the rank is too
            large; a layer's class is not known to hold a plain weight, the weight is shared, or the model
            takes it and does not call the layer; "all-linear" leaves out more than 5% of the weights.
            The model is then unchanged.
    """
    again = "merge them first (merge_adapters), or load the model again"
    _require(not adapted_layers(model), f"the model has adapters already; {again}")
    known = ", ".join(_named(model))
    _require(not known, f"the model keeps adapters by name ({known}); load the model again to train another")
    return _adapt(model, _targets(model, config.targets), config)


def _adapt(model: nn.Module, bases: dict[str, nn.Module], config: AdapterConfig) -> nn.Module:
    _check_layers(model, bases, config)
    adapt, options = METHODS[config.method], (config.rank, config.alpha, config.dropout, config.rslora)
    layers = {name: adapt(base, *options).train(base.training) for name, base in bases.items()}
    model.requires_grad_(False)
    for name, layer in layers.items():  # nothing raises from here on
        model.set_submodule(name, layer)
    model.adapter_config = config
    return model


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model computes what it did before it was adapted: a reference model, for free."""
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
    """Add every update into its base weight and take the adapters off: a plain model, as fast as before.

    A model in 4 bits becomes one in bf16, all of it: in 4 bits again, the sum would lose what was learned.

    Returns:
        the same model. Its parameters stay frozen.

    Raises:
        ValueError: no adapters, or an adapted head is also the embedding, which must not change with it; or
            the model keeps another adapter by name, whose base this would change.
    """
    layers, owners = _require_adapters(model), _owners(model)
    known = ", ".join(_named(model))
    why = "a merge would change the base under each; load the model again with the one to merge"
    _require(len(_named(model)) < 2, f"the model keeps adapters by name ({known}), and {why}")
    for name, layer in layers.items():
        other = next(iter(owners[id(layer.base.weight)]), "")
        mend = "keep the adapters on, or load the model with tie_word_embeddings=False"
        _require(not other, f"{name} shares its weight with {other}, which a merge would change too; {mend}")
    in_4_bits = any(isinstance(module, NF4Tensor) for module in model.modules())
    for name, layer in layers.items():
        if isinstance(layer.base, NF4Linear):
            layer.base = layer.base.to_linear(torch.float32)
        layer.merge()
        model.set_submodule(name, layer.base.to(torch.bfloat16) if in_4_bits else layer.base)
    if in_4_bits:
        for name, module in list(model.named_modules()):
            if isinstance(module, NF4Linear):
                model.set_submodule(name, module.to_linear(torch.bfloat16))
            elif isinstance(module, NF4Experts):
                module.dequantize_(torch.bfloat16)
        model.to(torch.bfloat16)
        model.dequantized = True  # so that an export can say what that cost
    for gone in ("adapter_config", "named_adapters"):
        vars(model).pop(gone, None)
    return model


def save_adapters(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json` for PEFT and us, each by one rename.

    `target_modules` holds short names if these match the adapted layers and no other module, else whole
    paths, else an expression that matches just these paths.

    Raises:
        ValueError: the model has no adapters, or add_adapters did not put them on.
    """
    layers, config, folder = _require_adapters(model), getattr(model, "adapter_config", None), Path(folder)
    _require(config, "the model has no adapter_config; put the adapters on with add_adapters")
    tensors = {
        f"{_PREFIX}{name}.{key}": tensor.detach().contiguous().cpu()
        for name, layer in layers.items()
        for key, tensor in _adapter_tensors(layer).items()
    }
    for targets in (_ends(layers), sorted(layers), "|".join(map(re.escape, sorted(layers)))):
        if {name for name in _modules(model) if _matches(name, targets)} == set(layers):
            break  # PEFT matches a list against modules of every class, and a string as an expression
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    task = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    fields = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": base}
    fields |= {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    fields |= {"use_rslora": config.rslora, "use_dora": config.method == "dora", "target_modules": targets}
    fields |= {"bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _FILES[1], lambda path: save_file(tensors, path, {"format": "pt"}))
    write_atomically(folder / _FILES[0], lambda path: path.write_text(json.dumps(fields, indent=2) + "\n"))
    return folder


def load_adapters(model: nn.Module, folder: str | os.PathLike, name: str | None = None) -> nn.Module:
    """Load what `save_adapters` or PEFT wrote, onto a plain model or over adapters of the same shape.

    Everything is checked before the model is touched. A weight of the base that PEFT saved too, as it does
    beside an adapted head, must equal the model's own.

    Args:
        name: keep the adapter under this name, beside others of any method, rank and targets, and switch to
            it; `use_adapter` switches. A name that is taken gets the new adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds a field, a value or a tensor that is not supported here, or
            belongs to another model; or `add_adapters` refuses a layer; or adapters with and without a name
            would meet on one model.
    """
    if name is None:
        known = ", ".join(_named(model))
        _require(not known, f"the model's adapters have names ({known}); give this one a name too")
        return _load(model, folder)
    before = _take_off(model)
    try:
        _load(model, folder)
    except Exception:
        _put_on(model, before)
        raise
    model.named_adapters = {**_named(model), name: (model.adapter_config, adapted_layers(model))}
    return model


def use_adapter(model: nn.Module, name: str | None) -> nn.Module:
    """Switch to an adapter that `load_adapters` keeps under this name; None is the model without any.

    Whole layers change places over the same frozen weights, so the model computes bit for bit what one with
    this adapter alone computes. A switch takes some 0.03 s.

    Returns:
        the same model.

    Raises:
        ValueError: no adapter has this name, or the adapters that are on have none or are merged.
    """
    known = ", ".join(_named(model)) or "none; load_adapters(model, folder, name) brings one"
    _require(name is None or name in _named(model), f'no adapter is called "{name}"; there are {known}')
    _take_off(model)
    return _put_on(model, None if name is None else _named(model)[name])


_Adapter = tuple[AdapterConfig, dict[str, LoRALinear]]


def _named(model: nn.Module) -> dict[str, _Adapter]:
    return vars(model).get("named_adapters", {})


def _take_off(model: nn.Module) -> _Adapter | None:
    """Leave the model without adapters; the one with a name that was on."""
    layers = adapted_layers(model)
    if not layers:
        return None
    same = (kept for kept in _named(model).values() if list(kept[1].values()) == list(layers.values()))
    mend = "merge it (merge_adapters), or save it, and load it with a name onto a model without adapters"
    _require(kept := next(same, None), f"the model has an adapter without a name; {mend}")
    _require(not any(layer.merged for layer in layers.values()), "the adapter is merged; unmerge() it first")
    for path, layer in layers.items():
        model.set_submodule(path, layer.base)
    del model.adapter_config
    return kept


def _put_on(model: nn.Module, adapter: _Adapter | None) -> nn.Module:
    config, layers = adapter or (None, {})
    for path, layer in layers.items():  # the base may have moved, or changed its mode, in the meantime
        model.set_submodule(path, layer.to(layer.weight.device).train(layer.base.training))
    if config:
        model.adapter_config = config
    return model


def _load(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    config, by_layer = read_adapter(model, folder)
    if not adapted_layers(model):
        _adapt(model, {name: model.get_submodule(name) for name in by_layer}, config)
    for name, layer in adapted_layers(model).items():
        fill(layer, by_layer[name])
    return model


@torch.no_grad()
def fill(layer: LoRALinear, parts: dict[str, Tensor]) -> None:
    """Copy an adapter's tensors, by `read_adapter`'s names for them, into a layer."""
    for key, parameter in _adapter_tensors(layer).items():
        parameter.copy_(parts[key.removesuffix(".weight")])


def read_adapter(
    model: nn.Module, folder: str | os.PathLike, original: Callable[[str], Tensor] | None = None
) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]]]:
    """What an adapter folder holds, checked against a model; raises what `load_adapters` raises.

    Args:
        original: gives a weight of the model by its name, where `model` has shapes and no numbers.

    Returns:
        its config, and for each layer its tensors "lora_A", "lora_B" and DoRA's "lora_magnitude_vector".
    """
    config_file, file = (Path(folder) / name for name in _FILES)
    for path in (config_file, file):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; an adapter folder holds {' and '.join(_FILES)}")
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file}: not valid JSON ({error}); save the adapter again") from error
    _require(isinstance(fields, dict), f"{config_file}: not a JSON object; save the adapter again")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error}); save or download the adapter again") from error
    for name, value in {"peft_type": None, **fields}.items():
        why = "which is not supported here; use the adapter with PEFT"
        if name == "init_lora_weights":
            why = f"a start that changes the base too, so that the folder is half of the adapter; {_MERGED}"
        harmless = name in _FREE or value in _HARMLESS.get(name, _EMPTY)
        _require(harmless, f'{config_file}: "{name}" is {value!r}, {why}')
    by_layer, method = _by_layer(model, tensors, file, original), "dora" if fields.get("use_dora") else "lora"
    numbers = fields.get("r"), fields.get("lora_alpha"), fields.get("lora_dropout") or 0.0
    try:
        config = AdapterConfig(method, *numbers, tuple(sorted(by_layer)), bool(fields.get("use_rslora")))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}; save the adapter again") from error
    _check_fit(model, by_layer, config, file)
    return config, by_layer


def _require(true: object, message: str) -> None:
    if not true:
        raise ValueError(message)


def _require_adapters(model: nn.Module) -> dict[str, LoRALinear]:
    layers = adapted_layers(model)
    _require(layers, "the model has no adapters; put them on with add_adapters or load_adapters")
    return layers


def _adapter_tensors(layer: LoRALinear) -> dict[str, nn.Parameter]:
    """A layer's own parameters under PEFT's names; there too, the magnitude's has no `.weight`."""
    tensors = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
    return {**tensors, "lora_magnitude_vector": layer.magnitude} if isinstance(layer, DoRALinear) else tensors


# ── which layers ──────────────────────────────────────────────────────────────────────────────────────────


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module, under each name that it has, without what lies inside an adapted layer."""
    inside = tuple(f"{name}." for name in adapted_layers(model))
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if name and not name.startswith(inside)}


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that hold a weight, by the weight's id."""
    owners = defaultdict(list)
    for name, module in _modules(model).items():
        for weight in (*module.parameters(recurse=False), *module.children()):  # an NF4Tensor is a child
            owners[id(weight)].append(name)
    return owners


def _is_linear(module: nn.Module) -> bool:
    """It looks like a linear layer, plain or quantized, of whatever library."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _targets(model: nn.Module, targets: str | tuple[str, ...]) -> dict[str, nn.Module]:
    modules = _modules(model)
    linear = {name: module for name, module in modules.items() if _is_linear(module)}
    if targets == ALL_LINEAR:
        linear = {name: module for name, module in linear.items() if module is not _head(model)}
        kinds = ", ".join(sorted({type(m).__name__ for m in modules.values() if m._parameters}))
        nothing = (
            f"finds no linear layer in this {type(model).__name__}; its weights lie in {kinds or 'none'}"
        )
        _require(linear, f'targets="{ALL_LINEAR}" {nothing}')
        return linear
    for target in targets:
        if not any(_matches(name, [target]) for name in linear):
            others = (f"{n} ({type(m).__name__}) and " for n, m in modules.items() if _matches(n, [target]))
            nothing = f"matches {next(others, '')}no linear layer of the model"
            raise ValueError(f'target "{target}" {nothing}; it has {", ".join(_ends(linear))}')
    return {name: module for name, module in linear.items() if _matches(name, targets)}


def _matches(name: str, targets: str | Iterable[str]) -> bool:
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _ends(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


# ── what cannot be adapted ────────────────────────────────────────────────────────────────────────────────


def _check_layers(model: nn.Module, bases: dict[str, nn.Module], config: AdapterConfig) -> None:
    owners = _owners(model)
    bad = {name: why for name, base in bases.items() if (why := refusal(base))}
    for name in bases.keys() - bad:
        for other in owners[id(bases[name].weight)]:
            # a head that is also the embedding can be adapted, only not merged
            if other != name and not isinstance(model.get_submodule(other), nn.Embedding):
                bad[name] = f"it shares its weight with {other}, which a merge would change too"
    for name in {} if bad else _used_without_a_call(model, bases):
        bad[name] = "the model takes its weight and does not call it, so an adapter has no effect"
    ends = [end for end in _ends(bases.keys() - bad) if not any(_matches(name, [end]) for name in bad)]
    mend = f"; name the others, targets={tuple(ends)}" if ends else ""
    if config.targets == ALL_LINEAR:
        share, where = _out_of_reach(model, bases)
        why = f"leaves out {share:.0%} of the weights, which lie in no linear layer ({where})"
        _require(share <= OUT_OF_REACH, f'targets="{ALL_LINEAR}" {why}; no adapter fits those yet{mend}')
    for name in bases:
        kinds = ", ".join(sorted({type(bases[name]).__name__ for name in bad}))
        share = f"{len(bad)} of {len(bases)} targets cannot be adapted ({kinds})"
        _require(name not in bad, f"{share}; {name}: {bad.get(name)}{mend}")
        out_features, in_features = bases[name].out_features, bases[name].in_features
        most = min(out_features, in_features)
        why = f"is larger than {name} ({out_features}×{in_features}); choose at most {most}"
        _require(config.rank <= most, f"rank={config.rank} {why}")


def _out_of_reach(model: nn.Module, bases: dict[str, nn.Module]) -> tuple[float, str]:
    """Share of the weights, embeddings and head aside, that no linear layer holds; names of the largest."""
    weights = dict(model.named_parameters())
    weights |= {name: module for name, module in model.named_modules() if isinstance(module, NF4Tensor)}
    aside = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is _head(model)]
    aside = {id(weight) for module in aside for weight in module.parameters()}
    sizes = {n: w.numel() for n, w in weights.items() if len(w.shape) > 1 and id(w) not in aside}
    inside = {id(base.weight) for base in bases.values()}
    beyond = sorted((n for n in sizes if id(weights[n]) not in inside), key=sizes.get, reverse=True)
    names = dict.fromkeys(".".join(name.split(".")[-2:]) for name in beyond)
    return sum(map(sizes.get, beyond)) / max(1, sum(sizes.values())), ", ".join([*names][:3])


def _used_without_a_call(model: nn.Module, bases: dict[str, nn.Module]) -> dict[str, None]:
    """Layers whose weight the model takes while it does not call them (Jamba's dt_proj); on four tokens."""
    real = all(type(p) is nn.Parameter and not p.is_meta for p in model.parameters())
    fed = getattr(model, "main_input_name", "") == "input_ids" and not model.config.is_encoder_decoder
    if not (bases and real and fed):
        return {}  # nothing to compute with, or nothing to feed it
    names, running, found = {id(base.weight): name for name, base in bases.items()}, set(), {}

    class Uses(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is not F.embedding and any(isinstance(x, Tensor) for x in tree_leaves(result)):
                used = {names.get(id(x)) for x in tree_leaves((args, kwargs))} - {None}
                found.update(dict.fromkeys(name for name in used if bases[name] not in running))
            return result

    begins = register_module_forward_pre_hook(lambda module, _: running.add(module))
    ends = register_module_forward_hook(lambda module, *_: running.discard(module))
    modes = {module: module.training for module in model.modules()}
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    try:
        with torch.random.fork_rng(), torch.no_grad(), begins, ends, Uses():
            model.train()  # fused kernels take weights in training only
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return found


# ── what a folder holds ───────────────────────────────────────────────────────────────────────────────────


def _by_layer(
    model: nn.Module, tensors: dict[str, Tensor], file: Path, original: Callable[[str], Tensor] | None
) -> dict[str, dict[str, Tensor]]:
    """Each layer's tensors by part, "lora_A" and so on."""
    modules, by_layer = _modules(model), {}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            name, part = match[1].removeprefix(_PREFIX), match[2]
            why = f'adapts the embedding "{name}" ({part}), which is not supported here; {_MERGED}'
            _require("embedding" not in part, f"{file}: {why}")
            parts = by_layer.setdefault(name, {})
            why = f'holds {part} of "{name}" twice; save each adapter by itself'
            _require(part not in parts, f"{file}: {why}")
            parts[part] = tensor
        else:  # a weight of the base
            name, _, part = key.removeprefix(_PREFIX).replace(".base_layer.", ".").rpartition(".")
            own = getattr(modules.get(name), part, None)
            why = "which this model does not have; it is an adapter of another model"
            _require(isinstance(own, Tensor), f'{file}: holds "{key}", {why}')
            own = original(f"{name}.{part}") if original else own
            own, why = own.detach().cpu(), "unlike this model's own; if it was trained or resized"
            same = torch.equal(own, tensor.to(own.dtype)) or torch.equal(own.to(tensor.dtype), tensor)
            _require(same, f'{file}: holds "{key}", {why}, {_MERGED}')
    _require(by_layer, f"{file}: holds no adapter; save it again")
    return by_layer


def _check_fit(model: nn.Module, by_layer: dict, config: AdapterConfig, file: Path) -> None:
    """Every tensor has its layer, every layer its tensors, and all shapes agree."""
    modules, existing = _modules(model), adapted_layers(model)
    for name, parts in by_layer.items():
        module = modules.get(name)
        what = "missing here" if module is None else f"of class {type(module).__name__} here"
        why = f'adapts "{name}" as a linear layer, which is {what}; it is an adapter of another model'
        _require(module is not None and _is_linear(module), f"{file}: {why}")
        shapes = {"lora_A": (config.rank, module.in_features), "lora_B": (module.out_features, config.rank)}
        if config.method == "dora":
            shapes["lora_magnitude_vector"] = (module.out_features,)
        found = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        why = f'"{name}" has {found} where this model needs {shapes}; it belongs to another model or rank'
        _require(found == shapes, f"{file}: {why}")
    if existing:
        alike = ("method", "rank", "alpha", "rslora")
        here = getattr(model, "adapter_config", None)
        same = here and all(getattr(here, field) == getattr(config, field) for field in alike)
        why = "the model has other adapters already; merge_adapters first, or load the model again"
        _require(same and set(existing) == set(by_layer), f"{file}: {why}")
