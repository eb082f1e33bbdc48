"""The frame in which every lab's checks run: what they print, when they raise, and how they diagnose.

A check takes the learner's function or class, compares it with an independent oracle, and raises `CheckFailed` with a
message that says what is wrong, or returns the line to print after "✓".
"""

import contextlib
import functools
import inspect
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

STUB = "your turn"


class CheckFailed(AssertionError):
    """The answer is wrong; the message says how."""


def strict() -> bool:
    """True when an exercise left undone must count as wrong: SPARK_FT_STRICT=1, or nbgrader grading or validating."""
    return os.environ.get("SPARK_FT_STRICT", "0") not in ("", "0") or "NBGRADER_EXECUTION" in os.environ


def _is_stub(error: NotImplementedError) -> bool:
    # An empty message is nbgrader's own stub; PyTorch's NotImplementedErrors say what is missing, and are real errors.
    return not str(error) or str(error).startswith(STUB)


def check(function: Callable[..., str]) -> Callable[..., None]:
    """Make a check out of a function that takes an answer and returns its success line or raises `CheckFailed`.

    On success it prints "✓ <line>". On an untouched stub it prints "not attempted yet – …", or raises where `strict()`.
    A wrong answer always raises. Whatever is written to stderr meanwhile goes to stdout, since nbgrader gives no points
    to a cell that writes to stderr; random numbers are drawn from a generator of the check's own. Returns None, since
    nbgrader reads a returned number as partial credit.
    """

    @functools.wraps(function)
    def run(*answer: Any, **options: Any) -> None:
        __tracebackhide__ = (
            True  # IPython leaves this frame out, so the learner sees the cell and the message
        )
        noise = io.StringIO()
        try:
            with _private_randomness(), _captured(noise):
                line = function(*answer, **options)
        except CheckFailed as failure:
            raise failure.with_traceback(None) from None
        except NotImplementedError as error:
            if strict() or not _is_stub(error):
                raise
            which = str(error).removeprefix(STUB).strip(" ()")
            print(f"not attempted yet – {which or function.__name__}")
            return
        finally:
            if noise.getvalue():
                print(noise.getvalue(), end="")
        if not isinstance(line, str):
            raise TypeError(f"{function.__name__} must return the line to print after ✓, not {line!r}")
        print(f"✓ {line}")

    # The answer's own parameters would be hidden behind *answer: show the check's.
    run.__signature__ = inspect.signature(function).replace(return_annotation=None)
    return run


@contextlib.contextmanager
def _private_randomness():
    with torch.random.fork_rng(devices=[]):
        torch.seed()
        yield


@contextlib.contextmanager
def _captured(noise: io.StringIO):
    # A logging handler keeps the stderr of the moment it was made, out of redirect_stderr's reach.
    real = sys.stderr
    handlers = [h for logger in _loggers() for h in logger.handlers if vars(h).get("stream") is real]
    for handler in handlers:
        handler.setStream(noise)
    try:
        with contextlib.redirect_stderr(noise):
            yield
    finally:
        for handler in handlers:
            handler.setStream(real)


def _loggers() -> list[logging.Logger]:
    named = logging.Logger.manager.loggerDict.values()
    return [logging.getLogger(), *(x for x in named if isinstance(x, logging.Logger))]


def require(condition: Any, message: str) -> None:
    """Raise `CheckFailed(message)` unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


def require_close(
    actual: Any,
    expected: Tensor,
    what: str,
    mistakes: Mapping[str, Tensor] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Require |actual − expected| ≤ tolerance · max(1, max |expected|), and diagnose.

    Args:
        actual: the learner's tensor, any type accepted so that None and wrong types get a message too.
        expected: the oracle's tensor.
        what: what it is, for the message: "the output for alpha=8, rank=2".
        mistakes: message → the tensor that a known mistake would give; the first that fits is what the learner reads.
        tolerance: more of it forgives rounding; fp32 needs 1e-5 to 1e-4, bf16 1e-2.

    Raises:
        CheckFailed: not a tensor, another shape, not finite, or too far away.
    """
    require(
        isinstance(actual, Tensor), f"{what} is {type(actual).__name__}, not a tensor; is a return missing?"
    )
    require(
        actual.shape == expected.shape,
        f"{what} has shape {tuple(actual.shape)}, but should have {tuple(expected.shape)}",
    )
    actual = actual.detach().to(torch.float64)
    require(torch.isfinite(actual).all(), f"{what} holds nan or inf")
    if _close(actual, expected, tolerance):
        return
    for message, wrong in (mistakes or {}).items():
        if wrong.shape == actual.shape and _close(actual, wrong, tolerance):
            raise CheckFailed(f"{what}: {message}")
    error = (actual - expected.detach().to(torch.float64)).abs().max().item()
    raise CheckFailed(f"{what} is off by up to {error:.3g}, where rounding explains {tolerance:g}")


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    expected = expected.detach().to(torch.float64)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    return bool(((actual - expected).abs() <= tolerance * scale).all())
