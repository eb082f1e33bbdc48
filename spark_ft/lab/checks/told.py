"""Sentences about an answer: what it raised and where, what it returned, and what cuts its gradient."""

import inspect
import linecache
import re
import traceback
from collections.abc import Iterable
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spark_ft.lab.checks.kept import answers_globals

MESSAGE = 220  # characters: two lines of a notebook
CUTS = re.compile(r"\.detach\(|\.data\b|\.item\(|\.tolist\(|\.numpy\(|no_grad|inference_mode|torch\.tensor\("
                  r"|\bfloat\(|\bnp\.|\bmath\.|requires_grad_\(False")  # fmt: skip


def exception(error: Exception, answers: Iterable[Any], room: int = MESSAGE) -> str:
    """An exception in one line: as the learner's, with their line, where one of their lines raised it.

    Args:
        room: how long it may be; the exception's own words are cut first, then the line of code.
    """
    answers, kind = list(answers), type(error).__name__
    words = str(error).split("\n")[0]
    words = re.sub(r"^[\w.<>]*\.(?=[\w<>]+\(\))", "", words)  # a function's name without its home
    if where := _their_line(error, answers):
        said, after = f"your code raised {kind}: ", f" ({where})"
    elif isinstance(error, TypeError) and re.search(r"argument|callable", words):
        said, after = "your function cannot be called as the text says: ", ""
    else:
        said, after = f"the check cannot use what your code gave ({kind}: ", "): compare it with the text"
    return said + _short(words, max(30, room - len(said) - len(after))) + after


def _their_line(error: Exception, answers: list[Any]) -> str | None:
    """ "line 3 of your cell: `…`": the innermost line of the learner's that the exception went through."""
    spaces = [id(space) for space in answers_globals(answers)]

    def theirs(frame: FrameType) -> bool:
        return id(frame.f_globals) in spaces or frame.f_globals.get("__name__") == "__main__"

    frames = [(f, n) for f, n in traceback.walk_tb(error.__traceback__) if theirs(f)]
    if not frames:
        return None
    frame, number = frames[-1]
    file = frame.f_code.co_filename
    code = linecache.getline(file, number, frame.f_globals).strip()
    return f"line {number} of {_file(file)}" + (f": `{_short(code, 50)}`" if code else "")


def _file(name: str) -> str:
    cell = "ipykernel" in name or name.startswith("<ipython")
    return "your cell" if cell else name.replace("\\", "/").split("/")[-1]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def cut(answers: Iterable[Any]) -> str:
    """ "; line 3, `…`, may cut it": the first line of the answers that can lose a gradient, or ""."""
    for answer in answers:
        try:
            lines = inspect.getsource(inspect.unwrap(answer)).split("\n")
        except (TypeError, OSError):
            continue
        for number, line in enumerate(lines, 1):
            if CUTS.search(line.split("#")[0]):
                return f"; line {number} of yours, `{_short(line.strip(), 60)}`, may cut it off"
    return ""


def not_a_tensor(value: Any) -> str:
    """What is wrong with a value that is no tensor and cannot be read as one."""
    name = type(value).__name__
    if value is None:
        return "is None; is a return missing?"
    if isinstance(value, tuple):
        mend = "; take off the comma at the end" if len(value) == 1 else "; return one tensor"
        return f"is a tuple of {len(value)}{mend}"
    if isinstance(value, list):
        inside = sorted({type(item).__name__ for item in value})
        mend = "; torch.stack makes one tensor of them" if inside == ["Tensor"] else ""
        return f"is a list of {len(value)} ({', '.join(inside)}), not a tensor{mend}"
    if isinstance(value, nn.Module | type):
        return f"is a module or class ({name}), not a tensor; call it, and return what it gives"
    if inspect.isgenerator(value):
        return "is a generator, not a tensor; write return and not yield"
    if callable(value):
        return f"is a {name}, not a tensor; call it, and return what it gives"
    return f"is {name}, not a tensor"


def as_tensor(value: Any) -> Tensor | None:
    """A value's numbers as a tensor: of tensors, NumPy arrays, numbers and lists of numbers; else None."""
    if isinstance(value, Tensor):
        return value.to_dense() if value.layout != torch.strided else value
    try:
        if isinstance(value, bool | int | float | np.generic):
            return torch.tensor(float(value), dtype=torch.float64)
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.array(value))
        if isinstance(value, list) and value and not any(isinstance(item, Tensor) for item in value):
            return torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return None


def shapes(actual: torch.Size, expected: torch.Size) -> str:
    """A shape that is wrong, and what the usual cause of that one is."""
    said = f"has shape {tuple(actual)}, but should have {tuple(expected)}"
    if not actual and len(expected) == 1:
        return f"{said}: one number for the whole batch; give one per row, without .mean() or .sum()"
    if not expected and actual:
        return f"{said}: give one number"
    if len(expected) == 1 and len(actual) == 2 and actual[0] == actual[1] == expected[0] > 1:
        return f"{said}: a (B, 1) and a (B,) were combined, and broadcasting made a table of them"
    if [n for n in actual if n != 1] == [n for n in expected if n != 1]:
        return f"{said}: a dimension of size 1 is too many or missing (keepdim, squeeze, [None])"
    if len(actual) > 1 and tuple(actual) == tuple(reversed(expected)):
        return f"{said}: it is transposed"
    return said


def values(actual: Tensor, expected: Tensor, tolerance: float) -> str:
    """Numbers that are wrong: by how much, and whether a sign, a factor or a cut explains all of them."""
    difference = (actual.double() - expected).abs().max().item()
    said = f"is off by up to {difference:.3g}, where rounding explains {tolerance:g}"
    if not actual.is_floating_point() and not torch.equal(expected, expected.round()):
        return f"{said}; it holds {actual.dtype} and the fractions are lost"
    big = expected.abs() > 1e-3 * expected.abs().max()
    ratios = actual.double()[big] / expected[big]
    if len(ratios) > 1 and (ratios - ratios.mean()).abs().max() < 1e-4 * ratios.mean().abs():
        factor = ratios.mean().item()
        return (
            f"{said}: its sign is wrong"
            if abs(factor + 1) < 1e-4
            else f"{said}: it is {factor:.4g} times that"
        )
    return said
