"""GGUF, llama.cpp's file format: a whole model with its tokenizer, or a LoRA adapter alone."""

import math
import os
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig

from spark_ft.export.tokens import add_tokenizer
from spark_ft.export.weights import Weights
from spark_ft.files import write_atomically
from spark_ft.models import open_model

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # transformers' name → llama.cpp's
# name → the matrices' type, llama.cpp's number for the file, and the embedding's and head's type
DTYPES = {
    "f16": (Type.F16, 1, Type.F16),
    "bf16": (Type.BF16, 32, Type.BF16),
    "q8_0": (Type.Q8_0, 7, Type.Q8_0),
    "q5_0": (Type.Q5_0, 8, Type.Q8_0),  # 8 bits there, as llama.cpp takes more for them too
    "q4_0": (Type.Q4_0, 2, Type.Q8_0),
    "q4_1": (Type.Q4_1, 3, Type.Q8_0),
}
ON_THE_GRID = 1e-3  # ‖Q(W) − W‖/‖W‖ of weights that were quantized with Q before; else 0.005 (Q8_0) or more


def export_gguf(
    base: str | os.PathLike | nn.Module | None,
    adapter_folder: str | os.PathLike | None,
    path: str | os.PathLike,
    dtype: str = "f16",
    *,
    tokenizer=None,
    progress: bool = False,
) -> Path:
    """Merge an adapter into the original weights and write the model as one GGUF file for llama.cpp.

    Tensors are read, merged, converted and written one at a time: Q(W + ΔW), from W as it is on disk. The
    file appears whole or not at all.

    Args:
        base: a name or folder as in `load_model`, or a model in memory (see `Weights`).
        adapter_folder: in PEFT's format, as `save_adapters` writes it; None exports the base.
        dtype: "f16", "bf16", "q8_0" (8.5 bits per weight), "q5_0" (5.5), "q4_0" (4.5) or "q4_1" (5). With
            4 and 5 bits, the embedding and the head are in q8_0. Norms and biases stay in fp32.
        tokenizer: the base's own if None; needed for a model in memory that names no base.
        progress: show a bar of the bytes written.

    Raises:
        ValueError: the model's kind, a setting of its config, its tokenizer or the dtype is not known here;
            a weight is too large for it; or the original weights lie on the dtype's own grid.
    """
    path = _gguf_path(path)
    if dtype not in DTYPES:
        raise ValueError(f'dtype="{dtype}" is unknown; choose one of {", ".join(DTYPES)}')
    weights = Weights(base, adapter_folder)
    arch, name_of = names_in_gguf(weights.config, weights.title)
    kind, file_type, ends_kind = DTYPES[dtype]
    _refuse_the_same_grid(weights, kind, dtype)
    tokenizer = tokenizer or weights.tokenizer()

    def write(temporary: Path) -> None:
        with closing(GGUFWriter(temporary, arch)) as writer:
            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_name(Path(weights.title).name)
            writer.add_file_type(file_type)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_config(writer, weights.config)
            add_tokenizer(writer, tokenizer, weights.config.vocab_size, _ends(weights))
            plan: list[Planned] = []
            if (factors := _rope_factors(weights.config)) is not None:
                plan.append(("rope_freqs.weight", tuple(factors.shape), Type.F32, lambda: factors))
            for name, shape in weights.shapes.items():
                own = ends_kind if name in ("model.embed_tokens.weight", "lm_head.weight") else kind
                own = own if len(shape) > 1 else Type.F32
                plan.append((name_of(name), tuple(shape), own, lambda n=name: _arranged(weights, n)))
            _write_tensors(writer, plan, f"{path.name} ({dtype})" if progress else None)

    write_atomically(path, write)
    return path


def export_adapter(
    base: str | os.PathLike | nn.Module | None, adapter_folder: str | os.PathLike, path: str | os.PathLike
) -> Path:
    """Write a LoRA adapter alone as GGUF, for a llama.cpp server that runs its base; the file is fp32.

    llama.cpp scales by alpha/rank, so an rsLoRA adapter is written with alpha · √rank.

    Args:
        base, adapter_folder: as in `export_gguf`; no weight of the base is read.

    Raises:
        ValueError: a DoRA adapter, for which the format has no place; an adapted head that is the embedding
            too; and see `export_gguf`.
    """
    path, weights = _gguf_path(path), Weights(base, adapter_folder)
    arch, name_of = names_in_gguf(weights.config, weights.title)
    config = weights.adapter
    if config.method != "lora":
        raise ValueError(
            f"{adapter_folder}: a {config.method} adapter has no place in a GGUF adapter file, which holds A "
            "and B alone; merge it instead: export_gguf(base, adapter_folder, path)"
        )
    if weights.tied and "lm_head" in weights.parts:
        raise ValueError(
            f"{adapter_folder}: adapts the head, which is the embedding too in this base, and llama.cpp has "
            "no tensor to put it on; merge it instead: export_gguf(base, adapter_folder, path)"
        )

    def write(temporary: Path) -> None:
        with closing(GGUFWriter(temporary, arch)) as writer:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(
                gguf.Keys.Adapter.LORA_ALPHA, config.alpha * (math.sqrt(config.rank) if config.rslora else 1)
            )
            plan: list[Planned] = []
            for layer, parts in weights.parts.items():
                A, B = parts["lora_A"].float(), in_llama_order(parts["lora_B"].float(), layer, weights.config)
                for end, tensor in (("a", A), ("b", B)):
                    name = f"{name_of(f'{layer}.weight')}.lora_{end}"
                    plan.append((name, tuple(tensor.shape), Type.F32, lambda t=tensor: t))
            _write_tensors(writer, plan, None)

    write_atomically(path, write)
    return path


def _gguf_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f'"{path}" must end in .gguf, by which every program knows the format')
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ── what the model is ─────────────────────────────────────────────────────────────────────────────────────


def names_in_gguf(config, title: str) -> tuple[str, Callable[[str], str]]:
    """llama.cpp's name of the architecture, and what gives its name of a tensor; raises if unknown."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        mend = "convert it with llama.cpp's own convert_hf_to_gguf.py"
        raise ValueError(f'{title}: a "{config.model_type}" model; {known} are known here. {mend}')
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    rope = _rope(config)
    for right, what in (
        (config.hidden_act == "silu", f"hidden_act={config.hidden_act}"),
        (layers == {"full_attention"}, "sliding-window attention"),
        (rope["rope_type"] in ROPE_SCALINGS, f"rope_type={rope['rope_type']}"),
        (rope.get("partial_rotary_factor", 1) == 1, "a partial_rotary_factor"),
    ):
        if not right:
            raise ValueError(f"{title}: {what} is not known here for a {config.model_type} model")
    for key in rope.keys() - {
        *_ROPE_KEYS[rope["rope_type"]],
        "rope_theta",
        "rope_type",
        "partial_rotary_factor",
    }:
        raise ValueError(f'{title}: "{key}" of rope_parameters is not known here with {rope["rope_type"]}')
    arch = ARCHITECTURES[config.model_type]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def name_of(name: str) -> str:
        if (found := names.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise ValueError(f'{title}: GGUF has no name for "{name}" of a {config.model_type} model')
        return found

    return arch, name_of


ROPE_SCALINGS = {
    "default": None,
    "llama3": None,  # as a tensor of factors
    "linear": gguf.RopeScalingType.LINEAR,
    "yarn": gguf.RopeScalingType.YARN,
}
_ROPE_KEYS = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def _rope(config) -> dict:
    return {key: value for key, value in config.rope_parameters.items() if value is not None}


def _rope_factors(config) -> Tensor | None:
    """What each frequency of Llama 3's long context is divided by: the default's over transformers' own."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** (-torch.arange(0, 2 * len(scaled), 2).double() / (2 * len(scaled)))
    return (plain / scaled.double()).float()


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_config(writer: GGUFWriter, config) -> None:
    rope = _rope(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if scaling := ROPE_SCALINGS[rope["rope_type"]]:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)


def _ends(weights: Weights) -> list[int]:
    """The tokens that end an answer, from generation_config.json where there is one."""
    ends = weights.config.eos_token_id
    if weights.source:
        with suppress(OSError):
            ends = GenerationConfig.from_pretrained(weights.source).eos_token_id or ends
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


# ── tensors ───────────────────────────────────────────────────────────────────────────────────────────────


def _arranged(weights: Weights, name: str) -> Tensor:
    """A tensor as llama.cpp wants it."""
    return in_llama_order(weights.read(name), name.rpartition(".")[0], weights.config)


def in_llama_order(tensor: Tensor, layer: str, config) -> Tensor:
    """Llama's Q and K with the rows of each head in pairs: i and i + half, which rotary embeddings turn.

    transformers keeps all first halves before all second ones. Qwen's are taken as they are.
    """
    if heads := _heads(layer, config):
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def in_own_order(tensor: Tensor, layer: str, config) -> Tensor:
    """`in_llama_order` undone."""
    if heads := _heads(layer, config):
        pairs = tensor.shape[0] // heads // 2
        return tensor.reshape(heads, pairs, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _heads(layer: str, config) -> int | None:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(layer.rpartition(".")[2]) if config.model_type == "llama" else None


Planned = tuple[str, tuple[int, ...], Type, Callable[[], Tensor]]  # name, shape, type, and what reads it


def _write_tensors(writer: GGUFWriter, plan: list[Planned], bar: str | None) -> None:
    """Write one tensor after another; no two are in memory at a time."""
    sizes = []
    for name, shape, kind, _ in plan:
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"{name}: its rows of {shape[-1]} do not divide by {block}; take f16 or bf16")
        sizes.append(math.prod(shape) // block * nbytes)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[-1], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with tqdm(total=sum(sizes), desc=bar, unit="B", unit_scale=True, disable=bar is None) as shown:
        for (name, _, kind, read), size in zip(plan, sizes, strict=True):
            writer.write_tensor_data(_as(read(), kind, name))
            shown.update(size)


def _as(tensor: Tensor, kind: Type, name: str) -> np.ndarray:
    numbers = tensor.detach().float().contiguous().numpy()
    with np.errstate(over="ignore"):
        stored = gguf.quantize(numbers, kind)
    if not np.isfinite(stored if kind == Type.F16 else numbers).all():
        what = "a number too large for f16; take bf16" if np.isfinite(numbers).all() else "nan or inf"
        raise ValueError(f"{name} holds {what}")
    return stored


def _refuse_the_same_grid(weights: Weights, kind: Type, dtype: str) -> None:
    """Refuse to quantize W + ΔW with what W was quantized with: nearly every number would go back to W."""
    layer = "model.layers.0.self_attn.q_proj"
    if gguf.GGML_QUANT_SIZES[kind][0] == 1 or weights.shapes[f"{layer}.weight"][1] % 32:
        return
    W = weights.original(f"{layer}.weight").float()
    if not weights.parts:
        if weights.source:
            return  # nothing is merged
        here = W  # a model in memory, which may have been trained or merged
        with suppress(OSError, ValueError, KeyError):
            W = open_model(weights.title).tensors[f"{layer}.weight"][:].float()
        if torch.equal(W, here):
            return
    W = W.numpy()
    off = np.linalg.norm(gguf.dequantize(gguf.quantize(W, kind), kind) - W) / np.linalg.norm(W)
    if off < ON_THE_GRID:
        raise ValueError(
            f"{weights.title}: its own weights already lie on the grid of {dtype} ({layer} is {off:.1%} off "
            "it), and an update is smaller than the grid's steps: rounded to the same grid, most numbers go "
            "back to where they were, and what training taught is largely lost (for this project's embedded "
            f"model in q4_1, a third of it). Take another type: {', '.join(d for d in DTYPES if d != dtype)}"
        )
