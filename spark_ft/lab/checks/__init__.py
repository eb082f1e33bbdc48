"""The frame of every lab's checks: what they print, when they raise, and how they diagnose.

A check takes the learner's function or class and compares it with an independent oracle. It raises
`CheckFailed` with a message that says what is wrong, or returns the line to print after "✓".
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

    def _render_traceback_(self) -> list[str]:
        # IPython prints this in place of a traceback, which would show the check's code and not the mistake.
        return [f"✗ {self}"]


def strict() -> bool:
    """True if an exercise left undone counts as wrong: SPARK_FT_STRICT=1, or nbgrader grades or validates."""
    return os.environ.get("SPARK_FT_STRICT", "0") not in ("", "0") or "NBGRADER_EXECUTION" in os.environ


def _is_stub(error: NotImplementedError) -> bool:
    # nbgrader's own stub has an empty message; PyTorch's NotImplementedErrors say what is missing.
    return not str(error) or str(error).startswith(STUB)


def check(function: Callable[..., str]) -> Callable[..., None]:
    """Turn a function that takes an answer, and returns a success line or raises `CheckFailed`, into a check.

    A check prints "✓ <line>" on success. On an untouched stub it prints "not attempted yet – …", or raises if
    `strict()`. A wrong answer always raises. What is written to stderr meanwhile goes to stdout, since
    nbgrader gives no points to a cell that writes to stderr. Random numbers come from the check's own
    generator. A check returns None, since nbgrader reads a returned number as partial credit.
    """

    @functools.wraps(function)
    def run(*answer: Any, **options: Any) -> None:
        __tracebackhide__ = True  # where the answer itself raises, IPython leaves this frame out
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

    # Without this, help() would show *answer in place of the check's own parameters.
    run.__signature__ = inspect.signature(function).replace(return_annotation=None)
    return run


@contextlib.contextmanager
def _private_randomness():
    with torch.random.fork_rng(devices=[]):
        torch.seed()
        yield


@contextlib.contextmanager
def _captured(noise: io.StringIO):
    # A logging handler keeps the stderr it was made with, and redirect_stderr does not change that.
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
    """Require |actual − expected| ≤ tolerance · max(1, max |expected|), and diagnose what is not.

    Args:
        actual: the learner's tensor, or whatever they returned instead.
        expected: the oracle's tensor.
        what: its name in messages: "the output for alpha=8, rank=2".
        mistakes: message → what a known mistake would give; the learner reads the first that fits.
        tolerance: a larger one forgives more rounding: 1e-5 to 1e-4 for fp32, 1e-2 for bf16.

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
        require(wrong.shape != actual.shape or not _close(actual, wrong, tolerance), f"{what}: {message}")
    error = (actual - expected.detach().to(torch.float64)).abs().max().item()
    raise CheckFailed(f"{what} is off by up to {error:.3g}, where rounding explains {tolerance:g}")


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    expected = expected.detach().to(torch.float64)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    return bool(((actual - expected).abs() <= tolerance * scale).all())


def require_pair(value: Any, what: str) -> tuple[Tensor, Tensor]:
    """Require two tensors; `what` says which: "init_adapter should return two tensors, (A, B)"."""
    two = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(t, Tensor) for t in value)
    require(two, f"{what}, not {type(value).__name__}")
    return tuple(value)


def require_parity(differences: Mapping[str, float], theirs: str) -> None:
    """Require relative differences of rounding's size; `theirs` names the library: "PEFT's"."""
    for name, difference in differences.items():
        require(
            difference < 1e-5, f"{name}: yours and {theirs} differ by {difference:.2g} of the largest entry"
        )


def call(answer: Callable, what: str, *arguments: Any, mends: Mapping[str, str] | None = None) -> Any:
    """Call an answer, and turn PyTorch's complaint into a failure that names the input.

    Args:
        mends: a word of PyTorch's message → advice to add; the first that fits, "" for any message.
    """
    try:
        return answer(*arguments)
    except NotImplementedError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        first = str(error).split("\n")[0]
        mend = next((f"; {mend}" for word, mend in (mends or {}).items() if word in first), "")
        raise CheckFailed(f"{what}: PyTorch says “{first}”{mend}") from None
