"""Models: the one table of profiles, and loading a model whole or in 4 bits."""

import inspect
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spark_ft.embedded import EMBEDDED, EMBEDDED_HUB_ID, embedded_folder, no_progress_bar
from spark_ft.experts import nf4_names, put_nf4, quantize_model
from spark_ft.memory.machine import give_back_caches
from spark_ft.methods.nf4 import NF4Linear, NF4Tensor
from spark_ft.scoring import takes_packed_rows, use_packed_attention


@dataclass(frozen=True)
class Profile:
    """What differs between a laptop, one discrete GPU and a DGX Spark; the labs' code is the same."""

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

    `spark` is an integrated CUDA device (unified memory), `gpu` a discrete one of 16 GB or more.

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


# ── loading ───────────────────────────────────────────────────────────────────────────────────────────────


def load_model(
    name: str | os.PathLike | None = None, *, dtype: torch.dtype | None = None, quantize: str | None = None
):
    """Load a causal language model and its tokenizer, in eval mode, on this machine's device.

    Args:
        name: a hub id or a folder; default SPARK_FT_MODEL, else the profile's model, else the embedded one.
        dtype: the weights' precision; default the profile's.
        quantize: None, or "nf4" (`load_nf4`). NF4 by bitsandbytes becomes `NF4Linear` either way, its bytes
            as they are; FP8 and MXFP4 are dequantized.

    Returns:
        (model, tokenizer), both from transformers.

    Raises:
        ValueError: `quantize` is unknown; or the checkpoint is quantized in another way, its tensors do not
            fit its config, it is no causal language model, or NF4 takes less than half of it.
        OSError: the model is missing, damaged, not reachable, or too large for the disk; says how to mend it.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(f'quantize="{quantize}" is unknown; use None or "nf4"')
    source, title = _source(name)
    if not Path(source).is_dir():
        preflight(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = (load_nf4 if quantize else _load_whole)(source, dtype or profile().dtype, device)
    except SafetensorError as error:
        raise OSError(f"{source}: its weights are damaged ({error}); download or save it again") from error
    except (OSError, ImportError) as error:
        raise OSError(_unreadable(source, error)) from error
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise ValueError(f"{source}: its tensors do not fit together, as shown above") from error
    model.config._name_or_path = title
    if device == "cpu" and takes_packed_rows(model.config):
        use_packed_attention(model)
    return model.eval(), load_tokenizer(source)


def load_tokenizer(name: str | os.PathLike | None = None):
    """The tokenizer that `load_model(name)` returns, alone: what data work needs, in a tenth of the time."""
    from transformers import AutoTokenizer

    source, _ = _source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise OSError(_unreadable(source, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _source(name: str | os.PathLike | None) -> tuple[str, str]:
    """A folder that exists or what may be a hub id, and how adapters should name it as their base."""
    name = name or os.environ.get("SPARK_FT_MODEL") or profile().model
    if name in (None, EMBEDDED):
        return str(embedded_folder()), EMBEDDED_HUB_ID  # no folder of this machine
    if (path := Path(name).expanduser()).is_dir():
        return str(path), str(name)
    if isinstance(name, Path) or name[0] in "./~" or name.count("/") > 1:
        raise FileNotFoundError(
            f'no model could be read from "{name}": there is no such folder; name one that exists, or a hub '
            "id such as Qwen/Qwen3-8B, or unset SPARK_FT_MODEL to use the embedded model"
        )
    return name, name


_TELL = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that `_require_all` can say it


@dataclass(frozen=True)
class ModelOnDisk:
    """A model that is found and not read: its folder or hub id, the name for it, its config and its tensors.

    `stored` is how the checkpoint is quantized, or None.
    """

    source: str
    title: str
    config: object
    stored: str | None
    tensors: dict[str, "TensorOnDisk"]


def open_model(name: str | os.PathLike | None = None) -> ModelOnDisk:
    """Find a model as `load_model` does, with the same errors, and read none of its weights yet."""
    if name == EMBEDDED_HUB_ID != os.environ.get("SPARK_FT_MODEL"):
        name = EMBEDDED  # which models and adapters made with it call by that id
    source, title = _source(name)
    if not Path(source).is_dir():
        preflight(source)
    try:
        config, stored = _config(source)
        return ModelOnDisk(source, title, config, stored, _open(source))
    except SafetensorError as error:
        raise OSError(f"{source}: its weights are damaged ({error}); download or save it again") from error
    except (OSError, ImportError) as error:
        raise OSError(_unreadable(source, error)) from error


@no_progress_bar()
def _load_whole(source: str | os.PathLike, dtype: torch.dtype, device: str):
    from transformers import AutoModelForCausalLM

    config, stored = _config(source)
    model, told = AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=dtype, device_map={"": device}, use_safetensors=True, **_TELL
    )
    _require_all(model, told, source)
    for path in _weight_files(source) if device != "cpu" else ():  # on the CPU the page cache is the model
        let_go_of(path)
    return _from_bitsandbytes(model) if stored == "bitsandbytes" else model


def _require_all(model: nn.Module, told: dict, source: str | os.PathLike) -> None:
    """Raise unless the checkpoint had every weight of the model, and nothing more for any of its layers."""
    for name, found, wanted in sorted(told["mismatched_keys"]):
        raise ValueError(f"{source}: {name} is {tuple(found)}, and the config wants {tuple(wanted)}")
    layers = {name for name, _ in model.named_modules() if name}
    unknown = [name for name in told["unexpected_keys"] if name.rpartition(".")[0] in layers]
    for names, what, says in (
        (told["missing_keys"], "missing", "download it again"),
        (unknown, f"unknown to the layers of a {type(model).__name__}", "it would compute without them"),
    ):
        if names:
            listed = ", ".join(sorted(names)[:3])
            raise ValueError(f"{source}: tensors {what}: {listed} ({len(names)} in all); {says}")


def _config(source: str | os.PathLike):
    """The config, and how the checkpoint is quantized; where transformers can undo that, it is told to."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KINDS

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        remote = "trust_remote_code" in str(error)
        says = "it needs code from the hub, which is never run here" if remote else error
        raise ValueError(f"{source}: transformers cannot use its config.json: {says}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f'{source}: a model of type "{config.model_type}" is no causal language model')
    holders = [c for c in (config, config.get_text_config()) if getattr(c, "quantization_config", None)]
    if not holders:
        return config, None
    stored = holders[0].quantization_config
    method = stored.get("quant_method")
    if method == "bitsandbytes" and stored.get("load_in_4bit"):
        return config, method
    if method not in KINDS or "dequantize" not in inspect.signature(KINDS[method]).parameters:
        bits = "to 8 bits " if stored.get("load_in_8bit") else ""
        raise ValueError(
            f"{source} is quantized {bits}by {method}, which cannot be trained or merged here; load the "
            'model that it was made from, with quantize="nf4" if memory is short'
        )
    holders[0].quantization_config = {**stored, "dequantize": True}
    return config, method


def _weight_files(source: str | os.PathLike) -> list[str]:
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    if one := cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False):
        return [one]
    return get_checkpoint_shard_files(source, cached_file(source, SAFE_WEIGHTS_INDEX_NAME))[0]


def let_go_of(path: str | os.PathLike) -> None:
    """Have the system drop a file from its page cache, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ── 4-bit models ──────────────────────────────────────────────────────────────────────────────────────────


@no_progress_bar()
def load_nf4(source: str | os.PathLike, dtype: torch.dtype, device: str):
    """A causal language model in NF4 (`nf4_names` says which weights), read and quantized tensor by tensor.

    Never more is in memory than the quantized model and one tensor, or twice the experts of a layer where
    they lie in the checkpoint one by one. Only a checkpoint in FP8 or MXFP4 is first dequantized whole.

    Args:
        source: a folder with config.json and safetensors, or a hub id.
        dtype: of what is not quantized, and of the numbers before they are.
        device: where each tensor is quantized and stays.

    Raises:
        ValueError: tensors and model do not fit, or see `nf4_names`.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config, stored = _config(source)
    if stored:
        model = _load_whole(source, dtype, device)
        return model if stored == "bitsandbytes" else quantize_model(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    quantizer, failed = _nf4_quantizer(set(nf4_names(empty)))
    model, told = type(empty).from_pretrained(
        None, config=empty.config, state_dict=_open(source), dtype=dtype, device_map={"": device},
        quantization_config=quantizer, **_TELL,
    )  # fmt: skip
    for path in _weight_files(source):
        let_go_of(path)
    for name, error in failed.items():
        raise ValueError(f"{source}: {name}: {error}")
    _require_all(model, told, source)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model.requires_grad_(False)


def _open(source: str | os.PathLike) -> dict[str, "TensorOnDisk"]:
    cached: dict[str, int] = {}
    files = [(path, safe_open(path, "pt", backend="pread")) for path in _weight_files(source)]
    return {
        key: TensorOnDisk(path, file.get_slice(key), cached)
        for path, file in files
        for key in file.keys()  # noqa: SIM118
    }


IN_PAGE_CACHE = 256_000_000  # bytes; to let go of a file after each tensor took half of an export's time


class TensorOnDisk:
    """A tensor that is read, not mapped, when it is sliced; little of the model stays in the page cache.

    `cached` is shared by all tensors of a model: each file's bytes read since the system last let go of them.
    """

    def __init__(self, path: str, tensor, cached: dict[str, int]):
        self.path, self.tensor, self.cached = path, tensor, cached
        self.shape = torch.Size(tensor.get_shape())

    def __getitem__(self, index) -> Tensor:
        tensor = self.tensor[index]
        self.cached[self.path] = self.cached.get(self.path, 0) + tensor.nbytes
        if sum(self.cached.values()) > IN_PAGE_CACHE:
            for path in self.cached:
                let_go_of(path)
            self.cached.clear()
        return tensor


def _nf4_quantizer(names: set[str]):
    """Transformers renames, splits and fuses tensors as it reads them; last, it puts these into NF4."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    failed = {}

    class PutNF4(ConversionOps):
        def convert(self, tensors, model, missing_keys, **_):
            for name in list(tensors):
                tensor = tensors.pop(name)
                try:
                    put_nf4(model, name, tensor[0] if isinstance(tensor, list) else tensor)
                except ValueError as error:  # transformers would bury it in a table
                    failed[name] = error
                missing_keys.discard(name)
            give_back_caches(torch.device("cpu"))  # or holes between the small ones add up to as much again
            return {}

    class Quantizer(HfQuantizer):
        quantized_element_size = 0.52  # bytes, to be reserved on a GPU
        is_serializable = is_trainable = lambda self: True
        param_needs_quantization = lambda self, model, name, **_: name in names  # noqa: E731
        get_quantize_ops = lambda self: PutNF4()  # noqa: E731

        def postprocess_model(self, model, **_):
            self.remove_quantization_config(model)

    AUTO_QUANTIZER_MAPPING["spark_ft_nf4"] = Quantizer
    return QuantizationConfigMixin("spark_ft_nf4"), failed


def _from_bitsandbytes(model):
    """Its Linear4bit layers as `NF4Linear`, byte for byte."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Linear4bit":
            state, packed = layer.weight.quant_state, layer.weight.data.view(-1)
            if state.quant_type != "nf4":
                raise ValueError(
                    f'{name} is in "{state.quant_type}"; of 4-bit formats only nf4 is known here'
                )
            scales = {"absmax": state.absmax}
            if state.nested:
                scales = {"scale_codes": state.absmax, "scale_absmax": state.state2.absmax}
                scales["offset"] = state.offset
            weight = NF4Tensor(state.shape, state.dtype, state.blocksize, packed=packed, **scales)
            model.set_submodule(name, NF4Linear(weight, layer.bias))
    model.hf_quantizer.remove_quantization_config(model)
    return model


# ── hub models ────────────────────────────────────────────────────────────────────────────────────────────


def preflight(name: str) -> None:
    """Refuse a hub model before anything is fetched: no licence, token or disk space; a cached one passes.

    Raises:
        OSError: says what is missing and how to mend it.
    """
    from huggingface_hub import HfApi, auth_check, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    # of httpx or httpx2, by the hub's version; without a network it comes bare
    http_error = HfHubHTTPError.__bases__[0]
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        files = HfApi().model_info(name, files_metadata=True).siblings
        auth_check(name)
    except GatedRepoError as error:
        raise OSError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then `hf auth login` "
            "with a token of the same account; or take an open model (README, profiles)"
        ) from error
    except (OSError, HFValidationError, http_error) as error:  # the hub's own errors are OSErrors
        raise OSError(_unreadable(name, error)) from error
    size = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if size > free:
        raise OSError(
            f"{name} takes {size / 1e9:.0f} GB of disk, and {free / 1e9:.0f} are free for the hub's cache; "
            "free some, or set HF_HOME to a larger disk"
        )


def _unreadable(name: str | os.PathLike, error: Exception) -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "unset")
    says = (
        "it is neither a folder with a model in it nor a hub id that is cached or reachable. Check the "
        f"spelling and the network (HF_HUB_OFFLINE={offline}; a gated model needs its licence accepted and "
        "`hf auth login`), or unset SPARK_FT_MODEL to use the embedded model"
    )
    return f'no model could be read from "{name}": {error if Path(name).is_dir() else says}'
