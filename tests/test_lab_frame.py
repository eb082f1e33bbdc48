"""The frame around every answer: what it left, changed, raised or returned gets a sentence."""

import random
import warnings

import numpy as np
import pytest
import torch
from helpers import accepts, refuses
from torch import nn

from spark_ft.lab.checks import CheckFailed, call, check, require_close, require_gradient, require_pair
from spark_ft.lab.checks.kept import SETTINGS

guards = []
layer = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)).eval()  # a model that the answers can reach by name


@check
def check_double(answer) -> str:
    for shape in ((5,), (4, 3)):
        x = torch.randn(shape, requires_grad=True)
        reference = torch.randn(shape, requires_grad=True)
        right, what = 2 * x - reference.detach(), f"the result for shape {shape}"
        out = call(answer, what, x, reference)
        require_close(out, right, what, {"the reference is added": 2 * x + reference})
        require_gradient(out, {"x": x, "reference": reference}, right, what)
    return "twice x, less the reference"


@check
def check_value(answer) -> str:
    """A value that needs no gradient."""
    x, what = torch.tensor([1.0, 3.0]), "the mean"
    require_close(call(answer, what, x), 2.0, what, {"that is the sum": 4.0})
    return "the mean is 2"


def right(x, reference):
    return 2 * x - reference.detach()


def leaving(change):
    """The right answer, after it changed something for good."""

    def answer(x, reference):
        change()
        return right(x, reference)

    return answer


def state():
    settings = [str(setting.read()) for setting in SETTINGS]
    modes = [(m.training, len(m._forward_hooks), "forward" in vars(m)) for m in layer.modules()]
    switched = [p.requires_grad for p in layer.parameters()]
    generators = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    return settings, modes, switched, generators, list(warnings.filters)


CHANGES = [
    ("switched gradients off", lambda: torch.set_grad_enabled(False)),
    ("left inference mode on", lambda: guards.append(torch.inference_mode()) or guards[-1].__enter__()),
    ("default dtype", lambda: torch.set_default_dtype(torch.float64)),
    ("default device", lambda: torch.set_default_device("meta")),
    ("deterministic algorithms", lambda: torch.use_deterministic_algorithms(True)),
    ("cudnn.deterministic", lambda: setattr(torch.backends.cudnn, "deterministic", True)),
    ("cudnn.benchmark", lambda: setattr(torch.backends.cudnn, "benchmark", True)),
    ("left autocast on", lambda: torch.set_autocast_enabled("cpu", True)),
    ("anomaly detection", lambda: torch.autograd.set_detect_anomaly(True)),
    ("precision of matrix products", lambda: torch.set_float32_matmul_precision("medium")),
    ("number of threads", lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    ("NumPy's error settings", lambda: np.seterr(all="ignore", divide="raise")),
    ("hook on all modules", lambda: nn.modules.module.register_module_forward_hook(lambda *_: None)),
    (r"in training mode.*\(Sequential\)", lambda: layer.train()),
    ("left a hook on the model", lambda: layer[0].register_forward_hook(lambda *_: None)),
    ("replaced `forward`", lambda: setattr(layer[0], "forward", lambda x: x)),
    ("`requires_grad` of the model's weights", lambda: layer.requires_grad_(False)),
    ("seeds torch's generator", lambda: torch.manual_seed(0)),
]


def test_what_an_answer_leaves_behind_is_named_and_put_back():
    accepts(check_double, right)
    before = state()
    for message, change in CHANGES:
        refuses(check_double, (message, leaving(change)))
        assert state() == before, message

    def everything(x, reference):
        for _, change in CHANGES:
            change()
        raise ValueError("and then an error")

    refuses(check_double, ("raised ValueError: and then an error", everything))
    assert state() == before


def test_generators_and_warnings_are_put_back_without_a_word():
    def draws(x, reference):
        random.seed(1), np.random.seed(1), torch.rand(3)
        warnings.simplefilter("ignore")
        return right(x, reference)

    before = state()
    accepts(check_double, draws)
    assert state() == before


def in_place(change):
    def answer(x, reference):
        change(x, reference)
        return right(x, reference)

    return answer


def test_an_input_that_changed_is_named():
    refuses(
        check_double,
        ("`reference` was changed in place", in_place(lambda x, r: r.data.mul_(2))),
        ("`x` was changed in place", in_place(lambda x, r: x.data.add_(1))),
        ("`reference` had shape", in_place(lambda x, r: r.data.unsqueeze_(0) is r.detach_().unsqueeze_(0))),
        ("`x` has another `requires_grad`", in_place(lambda x, r: x.requires_grad_(False))),
        ("`x` got a gradient", in_place(lambda x, r: (x * 2).sum().backward())),
    )
    for message, value, change in (
        ("`given` had 2 items and has 3 now", [1, 2], lambda given: given.append(3)),
        ("`given` was changed: make a new one", [1, "a"], lambda given: given.__setitem__(1, "b")),
        ("`given` has other keys", {"a": 1}, lambda given: given.pop("a")),
        ("`given` was changed at 'a'", {"a": torch.zeros(2)}, lambda given: given["a"].add_(1)),
        ("`given` was changed in place: make a new array", np.zeros(2), lambda given: given.fill(1)),
        ("`given` was changed: make a new one", {1, 2}, lambda given: given.add(3)),
        ("has another `weight`", nn.Linear(2, 2), lambda given: given.weight.data.zero_()),
        ("left the model in eval mode", nn.Linear(2, 2), lambda given: given.eval()),
    ):
        with pytest.raises(CheckFailed, match=message):
            call(lambda given, change=change: change(given), "the call", value)
    nan = torch.tensor([float("nan"), 1.0])
    merged = nn.Linear(2, 2)
    assert call(lambda given: given.isnan().sum().item(), "nan", nan) == 1
    call(lambda given: nn.init.zeros_(given.weight), "merge", merged, may_change=[merged])
    assert not merged.weight.any()


class Holder:
    def __call__(self, x, reference):
        return right(x, reference).view(7)


def test_an_exception_is_shown_as_the_learners_own_with_their_line():
    mends = {"size": "look at the shapes"}
    with pytest.raises(
        CheckFailed, match=r"^the sum: your code raised RuntimeError: .*; look at the shapes$"
    ):
        call(lambda a, b: a + b, "the sum", torch.zeros(2), torch.zeros(3), mends=mends)
    refuses(
        check_double,
        (r"your code raised KeyError: 'loss' \(line \d+ of test_lab_frame.py: `return \{\}\[.loss.\]`\)",
         lambda x, reference: __import__("test_lab_frame").missing_key()),
        (r"your code raised RuntimeError: .*`return right\(x, reference\).view\(7\)`\)", Holder()),
        (r"your function cannot be called as the text says: .*takes 1 positional argument", lambda x: x),
        ("your function cannot be called as the text says: 'NoneType' object is not callable", None),
    )  # fmt: skip

    careless = "@check\ndef check_careless(answer) -> str:\n    return answer(1).shape"
    exec(careless, scope := {"check": check, "__name__": "spark_ft.lab.checks.lab_9"})
    refuses(scope["check_careless"], (r"cannot use what your code gave \(AttributeError: 'int'", lambda x: x))


def missing_key():
    return {}["loss"]


def test_any_type_gets_a_sentence_and_right_values_pass_in_every_type():
    values = [2.0, 2, np.float32(2), np.array(2.0), torch.tensor(2), torch.tensor(2.0).double(), True + 1]
    accepts(check_value, *(lambda x, value=value: value for value in values))
    accepts(check_value, lambda x: float(np.mean(x.numpy())), lambda x: x.bfloat16().mean())
    refuses(
        check_value,
        ("the mean is None; is a return missing", lambda x: None),
        ("a tuple of 1; take off the comma", lambda x: (x.mean(),)),
        ("a tuple of 2; return one tensor", lambda x: (x.mean(), x)),
        (r"a list of 2 \(Tensor\), not a tensor; torch.stack", lambda x: [x.mean(), x.mean()]),
        ("is str, not a tensor", lambda x: "2"),
        ("is dict, not a tensor", lambda x: {"mean": x.mean()}),
        ("module or class", lambda x: nn.Linear(1, 1)),
        ("is a function, not a tensor; call it", lambda x: lambda: x),
        ("generator, not a tensor; write return and not yield", lambda x: (y for y in x)),
        ("device meta", lambda x: x.mean().to("meta")),
        ("complex", lambda x: x.mean() + 0j),
        ("nan or inf", lambda x: x.mean() / 0),
        ("that is the sum", lambda x: x.sum()),
        ("that is the sum", lambda x: float(x.sum())),
        (r"shape \(1,\), but should have \(\)", lambda x: x.mean(0, keepdim=True)),
        (r"shape \(2,\), but should have \(\): give one number", lambda x: x),
    )
    assert [t.tolist() for t in require_pair((np.ones(1), 2.0), "two")] == [[1.0], 2.0]


def test_shapes_signs_factors_and_cut_fractions_are_diagnosed():
    expected = torch.randn(4) * 3
    for message, actual in (
        (r"\(\), but should have \(4,\): one number for the whole batch", expected.mean()),
        (r"\(4, 4\), .*broadcasting made a table", expected[:, None] - expected),
        (r"\(4, 1\), .*a dimension of size 1", expected[:, None]),
        ("its sign is wrong", -expected),
        ("it is 2 times that", 2 * expected),
        ("torch.int64 and the fractions are lost", expected.long()),
        ("where rounding explains 1e-05$", expected + torch.rand(4)),
    ):
        with pytest.raises(CheckFailed, match=message):
            require_close(actual, expected, "it")
    with pytest.raises(CheckFailed, match="it is transposed"):
        require_close(torch.ones(2, 3), torch.ones(3, 2), "it")
    with pytest.raises(CheckFailed, match=r"it is torch\.float32, but should be torch\.bfloat16"):
        require_close(expected, expected, "it", dtype=torch.bfloat16)
    require_close(expected.numpy(), expected, "it", tolerance=1e-6)
    require_close(expected.tolist(), expected, "it", tolerance=1e-6)


def test_a_lost_gradient_is_diagnosed_with_the_line_that_may_cut_it():
    def detached(x, reference):
        y = x.detach()
        return 2 * y - reference.detach()

    def half(x, reference):
        return x + x.data - reference.detach()

    refuses(
        check_double,
        ("carries no gradient, so nothing would train; line 2 of yours, `y = x.detach\\(\\)`, may", detached),
        ("is ndarray: its value is right, but it has no gradient", lambda x, r: (2 * x - r).detach().numpy()),
        ("the gradient of .* with respect to x is off by .*: it is 0.5 times that", half),
        ("a gradient reaches reference from .* is a constant: detach it", lambda x, r: 2 * x - r),
        ("no gradient reaches x", lambda x, r: 2 * x.detach() - r),
    )
