"""What a GGUF file says and holds; read in a blink, where gguf's own reader takes seconds."""

import math
import mmap
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

_SCALARS = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)  # GGUF's type → struct's
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's fields, and for each tensor its shape (as torch has it), type and place in the file."""

    path: Path
    fields: dict
    tensors: dict[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType, int]]

    def read(self, name: str) -> Tensor:
        """A tensor in fp32, dequantized."""
        shape, kind, start = self.tensors[name]
        stored = np.fromfile(self.path, np.uint8, _nbytes(shape, kind), offset=start)
        rows = stored.reshape(math.prod(shape[:-1]), -1)
        return torch.from_numpy(gguf.dequantize(rows, kind).astype(np.float32).reshape(shape))


def read_gguf(path: str | os.PathLike) -> GGUFFile:
    """Read what a GGUF file says about itself; its numbers stay on disk.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a GGUF file, of another version, or shorter than it says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; export_gguf writes one")
    found = path.stat()
    return _read(path.absolute(), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=8)  # a verification asks three times, and a tokenizer of 49,152 words takes 0.4 s
def _read(path: Path, size: int, changed: int) -> GGUFFile:
    mend = "export or download it again"
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file (it does not begin with those letters); {mend}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, _Cursor(data, 4), len(data))
            except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
                raise ValueError(f"{path}: damaged or cut off; {mend}") from error


class _Cursor:
    def __init__(self, data: mmap.mmap, place: int):
        self.data, self.place = data, place

    def take(self, form: str) -> tuple:
        values = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        self.place += length
        if self.place > len(self.data):
            raise struct.error("a text beyond the end")
        return self.data[self.place - length : self.place].decode("utf-8")

    def value(self, kind: int):
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, length = self.take("IQ")
            if inner in _SCALARS:
                return list(self.take(f"{length}{_SCALARS[inner]}"))
            return [self.value(inner) for _ in range(length)]
        return self.take(_SCALARS[kind])[0]


def _parse(path: Path, cursor: _Cursor, size: int) -> GGUFFile:
    version, tensors, fields = cursor.take("IQQ")
    if version not in (2, 3):
        raise ValueError(f"{path}: version {version} of GGUF; 2 and 3 are known here")
    said = {}
    for _ in range(fields):
        key, (kind,) = cursor.text(), cursor.take("I")
        said[key] = cursor.value(kind)
    found = {}
    for _ in range(tensors):
        name, (dims,) = cursor.text(), cursor.take("I")
        shape = cursor.take(f"{dims}Q")[::-1]
        number, start = cursor.take("IQ")
        found[name] = (shape, gguf.GGMLQuantizationType(number), start)
    align = said.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    first = -(-cursor.place // align) * align
    found = {name: (shape, kind, first + start) for name, (shape, kind, start) in found.items()}
    needs = max((start + _nbytes(shape, kind) for shape, kind, start in found.values()), default=0)
    if needs > size:
        raise ValueError(f"{path}: cut off at byte {size:,} of {needs:,}; export or download it again")
    return GGUFFile(path, said, found)


def _nbytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * nbytes
