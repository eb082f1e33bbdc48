"""The frame of every lab's checks: what they print, when they raise, and how they diagnose.

A check takes the learner's function or class and compares it with an independent oracle. It raises
`CheckFailed` with a message that says what is wrong, or returns the line to print after "✓". Whatever the
answer does, the kernel is left as it was: `kept`. What it raised or returned becomes a sentence: `told`.
"""

import contextlib
import functools
import inspect
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from spark_ft.lab.checks import told
from spark_ft.lab.checks.kept import Inputs, Kept, everything_kept, modules_near

STUB = "your turn"
_ANSWERS: ContextVar[tuple] = ContextVar("answers", default=())  # those of the check that runs now


class CheckFailed(AssertionError):
    """The answer is wrong; the message says how, in at most two lines of a notebook."""

    def _render_traceback_(self) -> list[str]:
        # IPython prints this in place of a traceback, which would show the check's code and not the mistake.
        return [f"✗ {self}"]


def strict() -> bool:
    """True if an exercise left undone counts as wrong: SPARK_FT_STRICT=1, or nbgrader grades or validates."""
    return os.environ.get("SPARK_FT_STRICT", "0") not in ("", "0") or "NBGRADER_EXECUTION" in os.environ


def is_stub(error: NotImplementedError) -> bool:
    # nbgrader's own stub has an empty message; PyTorch's NotImplementedErrors say what is missing.
    return not str(error) or str(error).startswith(STUB)


def check(function: Callable[..., str]) -> Callable[..., None]:
    """Turn a function that takes an answer, and returns a success line or raises `CheckFailed`, into a check.

    A check prints "✓ <line>" on success. On an untouched stub it prints "not attempted yet – …", or raises if
    `strict()`. A wrong answer always raises, and so does one that raises an exception, or that leaves
    gradients, dtype, modes or hooks changed; all of these are put back. What is written to stderr meanwhile
    goes to stdout, since nbgrader gives no points to a cell that writes to stderr. Random numbers come from
    the check's own generators. A check returns None, since nbgrader reads a number as partial credit.
    """

    @functools.wraps(function)
    def run(*answer: Any, **options: Any) -> None:
        __tracebackhide__ = True
        noise = io.StringIO()
        answers = (*answer, *options.values())
        token = _ANSWERS.set(answers)
        try:
            with _captured(noise), everything_kept(modules_near(answers)) as kept:
                line = function(*answer, **options)
                left = kept.left()
        except CheckFailed as failure:
            raise failure.with_traceback(None) from None
        except NotImplementedError as error:
            if not is_stub(error):
                raise CheckFailed(told.exception(error, answers)) from error
            if strict():
                raise
            which = str(error).removeprefix(STUB).strip(" ()")
            print(f"not attempted yet – {which or function.__name__}")
            return
        except Exception as error:
            raise CheckFailed(told.exception(error, answers)) from error
        finally:
            _ANSWERS.reset(token)
            if noise.getvalue():
                print(noise.getvalue(), end="")
        require(left is None, f"your code {left}")
        if not isinstance(line, str):
            raise TypeError(f"{function.__name__} must return the line to print after ✓, not {line!r}")
        print(f"✓ {line}")

    # Without this, help() would show *answer in place of the check's own parameters.
    run.__signature__ = inspect.signature(function).replace(return_annotation=None)
    return run


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


def require_tensor(value: Any, what: str, shape: Sequence[int] | None = None, dtype: Any = None) -> Tensor:
    """Require numbers: a tensor, a NumPy array, a number or a list of numbers; return them as a tensor.

    Args:
        what: its name in messages: "the loss for beta=0.1".
        shape: the shape that it must have; None takes any.
        dtype: the dtype that it must have; None takes any.

    Raises:
        CheckFailed: of another type, shape or dtype, without values, complex, or not finite.
    """
    tensor = told.as_tensor(value)
    require(tensor is not None, f"{what} {told.not_a_tensor(value)}")
    require(not tensor.is_meta, f"{what} is on the device meta, where tensors have no values")
    require(not tensor.is_complex(), f"{what} holds complex numbers")
    if shape is not None and tensor.shape != tuple(shape):
        raise CheckFailed(f"{what} {told.shapes(tensor.shape, torch.Size(shape))}")
    require(
        dtype is None or tensor.dtype == dtype,
        f"{what} is {tensor.dtype}, but should be {dtype}, as what came in",
    )
    require(torch.isfinite(tensor).all(), f"{what} holds nan or inf")
    return tensor


def require_close(
    actual: Any,
    expected: Tensor | float,
    what: str,
    mistakes: Mapping[str, Tensor | float] | None = None,
    tolerance: float = 1e-5,
    dtype: Any = None,
) -> None:
    """Require |actual − expected| ≤ tolerance · max(1, max |expected|), and diagnose what is not.

    Args:
        actual: what the learner returned, of any type; arrays and numbers pass where their values are right.
        expected: the oracle's tensor or number.
        what: its name in messages: "the output for alpha=8, rank=2".
        mistakes: message → what a known mistake would give; the learner reads the first that fits.
        tolerance: a larger one forgives more rounding: 1e-5 to 1e-4 for fp32, 1e-2 for bf16.
        dtype: the dtype that it must have; None takes any.

    Raises:
        CheckFailed: no numbers, another shape or dtype, not finite, or too far away.
    """
    expected = _exact(expected)
    given = require_tensor(actual, what, expected.shape, dtype).detach().cpu()
    if _close(given.double(), expected, tolerance):
        return
    for message, wrong in (mistakes or {}).items():
        wrong = _exact(wrong)
        fits = wrong.shape == given.shape and _close(given.double(), wrong, tolerance)
        require(not fits, f"{what}: {message}")
    raise CheckFailed(f"{what} {told.values(given, expected, tolerance)}")


def _exact(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).detach().cpu().to(torch.float64)


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    return bool(((actual - expected).abs() <= tolerance * scale).all())


def require_gradient(
    output: Any,
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    what: str,
    mistakes: Mapping[str, Tensor] | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Require that the output's gradient reaches the inputs as the oracle's does; say where it is lost.

    Args:
        output: what the learner returned.
        inputs: name → a tensor with `requires_grad` from which both were computed.
        expected: the oracle's output, of the same inputs. An input that it does not depend on (a reference)
            must get no gradient.
        what: the output's name in messages: "the loss".
        mistakes: message → what a known mistake would give as output; its gradient is compared.

    Raises:
        CheckFailed: no tensor, no gradient at all, none for an input, one for a constant, or a wrong one.
    """
    lost = f"{told.cut(_ANSWERS.get())}"
    require(
        isinstance(output, Tensor),
        f"{what} is {type(output).__name__}: its value is right, but it has no gradient, so nothing would "
        f"train; stay in torch{lost}",
    )
    require(output.requires_grad, f"{what} carries no gradient, so nothing would train{lost}")
    slope = torch.randn_like(expected)
    mine, right = _gradients(output, inputs, slope), _gradients(expected, inputs, slope)
    for name in inputs:
        if right[name] is None or not right[name].any():
            reached = mine[name] is not None and mine[name].any()
            require(
                not reached, f"a gradient reaches {name} from {what}, but {name} is a constant: detach it"
            )
            continue
        require(mine[name] is not None and mine[name].any(), f"no gradient reaches {name} from {what}{lost}")
        wrong = {
            message: _gradients(other, inputs, slope)[name] for message, other in (mistakes or {}).items()
        }
        known = {message: gradient for message, gradient in wrong.items() if gradient is not None}
        require_close(
            mine[name], right[name], f"the gradient of {what} with respect to {name}", known, tolerance
        )


def _gradients(output: Tensor, inputs: Mapping[str, Tensor], slope: Tensor) -> dict[str, Tensor | None]:
    slope = slope.to(output.dtype)
    found = torch.autograd.grad(output, list(inputs.values()), slope, retain_graph=True, allow_unused=True)
    return dict(zip(inputs, found, strict=True))


def require_pair(value: Any, what: str) -> tuple[Tensor, Tensor]:
    """Require two tensors; `what` says which: "init_adapter should return two tensors, (A, B)"."""
    two = isinstance(value, tuple | list) and len(value) == 2
    parts = [told.as_tensor(part) for part in value] if two else [None]
    require(all(part is not None for part in parts), f"{what}, not {type(value).__name__}")
    return tuple(parts)


def require_parity(differences: Mapping[str, float], theirs: str) -> None:
    """Require relative differences of rounding's size; `theirs` names the library: "PEFT's"."""
    for name, difference in differences.items():
        require(
            difference < 1e-5, f"{name}: yours and {theirs} differ by {difference:.2g} of the largest entry"
        )


def call(
    answer: Callable,
    what: str,
    *arguments: Any,
    mends: Mapping[str, str] | None = None,
    may_change: Sequence[Any] = (),
    **keywords: Any,
) -> Any:
    """Call an answer; refuse an exception, a changed input, and a setting left changed, in one line each.

    Args:
        what: what is asked of it, in messages: "the loss for beta=0.1".
        arguments, keywords: the answer's own.
        mends: a word of an exception's message → advice to add; the first that fits, "" for any message.
        may_change: the arguments that the answer is asked to change.

    Raises:
        CheckFailed: see above. The stub's NotImplementedError goes through.
    """
    given = _named(answer, arguments, keywords)
    watched = {name: value for name, value in given.items() if all(value is not one for one in may_change)}
    inputs = Inputs(watched)
    kept = Kept(value for value in watched.values() if isinstance(value, nn.Module))
    seed = torch.initial_seed()
    try:
        result = answer(*arguments, **keywords)
    except CheckFailed:
        raise
    except NotImplementedError as error:
        if is_stub(error):
            raise
        raise CheckFailed(_exception(error, answer, what, mends)) from error
    except Exception as error:
        raise CheckFailed(_exception(error, answer, what, mends)) from error
    finally:
        left = kept.left()
        kept.restore()
    if said := inputs.changed():
        raise CheckFailed(f"{what}: {said}")
    require(left is None, f"{what}: your code {left}")
    require(
        torch.initial_seed() == seed,
        f"{what}: your code seeds torch's generator, so later random numbers repeat; leave the seed alone",
    )
    return result


def _named(answer: Callable, arguments: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names that the answer gives them; by number where it does not say."""
    try:
        bound = inspect.signature(answer).bind(*arguments, **keywords).arguments
    except (TypeError, ValueError):
        bound = {f"number {i}": value for i, value in enumerate(arguments, 1)} | keywords
    return dict(bound)


def _exception(error: Exception, answer: Callable, what: str, mends: Mapping[str, str] | None) -> str:
    mend = next((f"; {mend}" for word, mend in (mends or {}).items() if word in str(error)), "")
    room = told.MESSAGE - len(f"{what}: {mend}")
    return f"{what}: {told.exception(error, [*_ANSWERS.get(), answer], room)}{mend}"
