"""A merged model as a transformers folder: config, tokenizer, and safetensors written tensor by tensor."""

import json
import math
import os
import shutil
import struct
import tempfile
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from spark_ft.export.weights import Weights

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def export_safetensors(
    base: str | os.PathLike | nn.Module | None,
    adapter_folder: str | os.PathLike | None,
    folder: str | os.PathLike,
    dtype: str | None = None,
    *,
    tokenizer=None,
    progress: bool = False,
) -> Path:
    """Merge an adapter into the original weights and write a folder that `from_pretrained` loads.

    As in `export_gguf`, one tensor at a time is in memory, and the folder appears whole or not at all; an
    earlier export in its place is replaced, anything else is left alone.

    Args:
        base, adapter_folder, tokenizer, progress: as in `export_gguf`; any causal model whose tensors have
            the same names on disk and in transformers.
        dtype: "f32", "f16" or "bf16"; None keeps the base's own, as its config says.

    Raises:
        ValueError: see `Weights`; the dtype is unknown, or cannot hold a weight.
        FileExistsError: the folder holds other things than an export.
    """
    folder = Path(folder)
    if dtype not in (None, *DTYPES):
        raise ValueError(f'dtype="{dtype}" is unknown; choose one of {", ".join(DTYPES)}, or None')
    if folder.exists() and not _is_export(folder):
        raise FileExistsError(f"{folder} holds other things than an exported model; name a folder of its own")
    weights = Weights(base, adapter_folder)
    tokenizer = tokenizer or weights.tokenizer()
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        config = deepcopy(weights.config)
        config.architectures = [weights.architecture]
        config.tie_word_embeddings = "lm_head.weight" not in weights.shapes
        config.dtype = DTYPES.get(dtype) or config.dtype or torch.float32
        vars(config).pop("quantization_config", None)
        config.save_pretrained(building)
        if weights.source:
            with suppress(OSError):
                GenerationConfig.from_pretrained(weights.source).save_pretrained(building)
        tokenizer.save_pretrained(building)
        _write(weights, building / "model.safetensors", config.dtype, progress)
        building.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _is_export(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    return not names or {"config.json", "model.safetensors"} <= names


def _write(weights: Weights, path: Path, dtype: torch.dtype, progress: bool) -> None:
    """The format: the length of a JSON header, the header (name → dtype, shape, place), the numbers."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in weights.shapes.items():
        size = math.prod(shape) * dtype.itemsize
        where = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        header[name], place = where, place + size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (
        open(path, "wb") as file,
        tqdm(total=place, desc=path.parent.name, unit="B", unit_scale=True, disable=not progress) as shown,
    ):
        file.write(struct.pack("<Q", len(text)) + text)
        for name in weights.shapes:
            tensor = weights.read(name).to(dtype).contiguous()
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds nan, or a number too large for {dtype}; take bf16")
            tensor.view(-1).view(torch.uint8).numpy().tofile(file)
            shown.update(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())
