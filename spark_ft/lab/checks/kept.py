"""What an answer may leave behind: the kernel's settings and the inputs, taken before and compared after."""

import contextlib
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

BIG = 20_000_000  # numbers in a module; a larger one's weights are compared by their version counters


class Setting(NamedTuple):
    """One global switch: how to read it, how to set it, and what to say about whoever left it changed."""

    read: Callable[[], Any]
    set: Callable[[Any], object]
    says: str


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _set_inference(value: bool) -> None:
    guard = torch.inference_mode(value)
    guard.__enter__()
    _GUARDS.append(guard)  # collected, it would undo itself


def _cudnn(name: str) -> Setting:
    backend = torch.backends.cudnn
    says = f"set torch.backends.cudnn.{name} and left it so"
    return Setting(lambda: getattr(backend, name), lambda value: setattr(backend, name, value), says)


_GUARDS: list[Any] = []
SETTINGS = (
    Setting(
        torch.is_inference_mode_enabled,
        _set_inference,
        "left inference mode on; write `with torch.no_grad():` around the lines that need it",
    ),
    Setting(
        torch.is_grad_enabled,
        torch.set_grad_enabled,
        "switched gradients off or on for good; write `with torch.no_grad():` around the lines that need it",
    ),
    Setting(torch.get_default_dtype, torch.set_default_dtype, "changed torch's default dtype; pass dtype="),
    Setting(
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
        "changed torch's default device; pass device=",
    ),
    Setting(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
        "switched torch's deterministic algorithms and left them so",
    ),
    _cudnn("deterministic"),
    _cudnn("benchmark"),
    Setting(
        lambda: torch.is_autocast_enabled("cpu"),
        lambda value: torch.set_autocast_enabled("cpu", value),
        "left autocast on; use `with torch.autocast(…):`",
    ),
    Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, "left anomaly detection on"),
    Setting(
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "changed the precision of matrix products",
    ),
    Setting(torch.get_num_threads, torch.set_num_threads, "changed the number of threads"),
    Setting(np.geterr, lambda value: np.seterr(**value), "changed NumPy's error settings"),
)


class Kept:
    """The kernel's settings and some modules' modes and hooks at one moment.

    Args:
        modules: the modules to look after, with all that is inside them.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()):
        self.settings = [setting.read() for setting in SETTINGS]
        self.global_hooks = [(hooks, dict(hooks)) for hooks in _global_hooks()]
        inside = {id(m): m for module in modules for m in module.modules()}
        self.modules = [(m, _mode(m)) for m in inside.values()]

    def left(self) -> str | None:
        """What differs now, as the end of a sentence that begins with "your code", or None."""
        for setting, before in zip(SETTINGS, self.settings, strict=True):
            if setting.read() != before:
                return setting.says
        if any(dict(hooks) != before for hooks, before in self.global_hooks):
            return "left a hook on all modules; remove it in a `finally`"
        for module, before in self.modules:
            if said := _mode_left(before, _mode(module)):
                return f"{said} ({type(module).__name__})"
        return None

    def restore(self) -> None:
        """Put back what differs."""
        for setting, before in zip(SETTINGS, self.settings, strict=True):
            if setting.read() != before:
                setting.set(before)
        for hooks, before in self.global_hooks:
            if dict(hooks) != before:
                hooks.clear()
                hooks.update(before)
        for module, (training, before, forward, requires) in self.modules:
            object.__setattr__(module, "training", training)
            for name, hooks in _hooks(module):
                if dict(hooks) != before.get(name, {}):
                    hooks.clear()
                    hooks.update(before.get(name, {}))
            if vars(module).get("forward") is not forward:
                vars(module).pop("forward", None)
                vars(module).update({} if forward is None else {"forward": forward})
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad != requires.get(name):
                    with contextlib.suppress(RuntimeError):  # a tensor of a graph cannot be switched
                        parameter.requires_grad_(requires.get(name, parameter.requires_grad))


def _global_hooks() -> list[dict]:
    names = vars(nn.modules.module)
    return [v for name, v in names.items() if name.startswith("_global_") and isinstance(v, dict)]


def _hooks(module: nn.Module) -> list[tuple[str, dict]]:
    return [(name, v) for name, v in vars(module).items() if "hooks" in name and isinstance(v, dict)]


def _mode(module: nn.Module) -> tuple[bool, dict, Any, dict]:
    hooks = {name: dict(found) for name, found in _hooks(module) if found}
    requires = {name: p.requires_grad for name, p in module._parameters.items() if p is not None}
    return module.training, hooks, vars(module).get("forward"), requires


def _mode_left(before: tuple, now: tuple) -> str | None:
    if now[0] != before[0]:
        return f"left the model in {'training' if now[0] else 'eval'} mode; put `model.training` back"
    if now[1] != before[1]:
        return "left a hook on the model, or took one off; remove your own in a `finally`"
    if now[2] is not before[2]:
        return "left a replaced `forward` on the model"
    if now[3] != before[3]:
        return "switched `requires_grad` of the model's weights"
    return None


@contextlib.contextmanager
def everything_kept(modules: Iterable[nn.Module]) -> Iterator[Kept]:
    """Inside, randomness is private; afterwards settings, modules, warnings and generators are as before."""
    kept = Kept(modules)
    python, numpy = random.getstate(), np.random.get_state()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=cuda):
            torch.seed()
            yield kept
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        kept.restore()


class Inputs:
    """Copies of an answer's inputs; `changed()` says which one is no longer what it was.

    Args:
        inputs: name → what the answer gets: tensors, arrays, lists and dicts of them, modules.
    """

    def __init__(self, inputs: Mapping[str, Any]):
        self.inputs = dict(inputs)
        self.copies = {name: _copy(value) for name, value in self.inputs.items()}

    def changed(self) -> str | None:
        """ "`x` was …", or None."""
        for name, value in self.inputs.items():
            if said := _difference(self.copies[name], value):
                return f"its input `{name}` {said}"
        return None


class _Tensor(NamedTuple):
    value: Tensor
    requires_grad: bool
    grad: Tensor | None


class _Module(NamedTuple):
    tensors: dict[str, Any]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Tensor(value.detach().clone(), value.requires_grad, value.grad if value.is_leaf else None)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, nn.Module):
        tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        small = sum(t.numel() for t in tensors.values()) <= BIG
        return _Module({n: _copy(t) if small else (t, t._version) for n, t in tensors.items()})
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    if isinstance(value, set):
        return set(value)
    return value


def _difference(before: Any, now: Any) -> str | None:
    if isinstance(before, _Tensor):
        return _tensor_difference(before, now)
    if isinstance(before, _Module):
        tensors = {**dict(now.named_parameters()), **dict(now.named_buffers())}
        for name, was in before.tensors.items():
            tensor = tensors.get(name)
            same = isinstance(was, tuple) and not isinstance(was, _Tensor)
            if tensor is None:
                return f"lost its `{name}`"
            if (tensor is not was[0] or tensor._version != was[1]) if same else _difference(was, tensor):
                return f"has another `{name}` than before: copy what you change"
        return None
    if isinstance(before, np.ndarray):
        same = before.shape == now.shape and np.array_equal(before, now, equal_nan=before.dtype.kind == "f")
        return None if same else "was changed in place: make a new array"
    if isinstance(before, dict):
        if list(before) != list(now):
            return "has other keys than before: make a new dict"
        return next((f"was changed at {key!r}" for key in before if _difference(before[key], now[key])), None)
    if isinstance(before, list):
        if len(before) != len(now):
            return f"had {len(before)} items and has {len(now)} now: make a new list"
        return next((said for a, b in zip(before, now, strict=True) if (said := _difference(a, b))), None)
    if isinstance(before, str | int | float | bool | set | type(None)):
        same = before == now or before != before  # NaN
        return None if same else "was changed: make a new one"
    return None


def _tensor_difference(before: _Tensor, now: Tensor) -> str | None:
    if now.shape != before.value.shape:
        return f"had shape {tuple(before.value.shape)} and has {tuple(now.shape)} now: make a new tensor"
    if now.requires_grad != before.requires_grad:
        return "has another `requires_grad` than before: leave that to the caller"
    if not now.is_meta:
        a, b = before.value, now.detach()
        if not torch.equal(a, b) and not bool(((a == b) | (a.isnan() & b.isnan())).all()):
            return "was changed in place (+=, copy_, a name ending in _): make a new tensor"
    if now.is_leaf and now.grad is not before.grad:
        return "got a gradient: .backward() is the training loop's job, not this function's"
    return None


# ── whose code is it ──


def answers_globals(answers: Iterable[Any]) -> list[dict[str, Any]]:
    """The namespaces that the answers were written in: the notebook's."""
    found = {}
    for answer in answers:
        while hasattr(answer, "func") and hasattr(answer, "keywords"):  # functools.partial
            answer = answer.func
        answer = inspect.unwrap(answer) if callable(answer) else answer
        kind = answer if isinstance(answer, type) else type(answer)
        functions = [answer, *vars(kind).values()]
        where = next((f.__globals__ for f in functions if hasattr(f, "__globals__")), None)
        if where is None:
            where = vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
        if not str(where.get("__name__", "")).startswith(
            ("spark_ft.", "torch.", "transformers.", "builtins")
        ):
            found[id(where)] = where
    return list(found.values())


def modules_near(answers: Iterable[Any]) -> list[nn.Module]:
    """The modules that the answers can reach by name, and those among the answers themselves."""
    answers = list(answers)
    values = [*answers, *(v for where in answers_globals(answers) for v in list(where.values()))]
    return list({id(v): v for v in values if isinstance(v, nn.Module)}.values())
