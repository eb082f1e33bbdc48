"""The frame of the checks, on a realistic check with the wrong answers that people really give."""

import contextlib
import inspect
import io
import logging
import sys
import warnings
from importlib import import_module

import pytest
import torch
from helpers import printed_by, refuses
from IPython.core.interactiveshell import InteractiveShell

from spark_ft.files import ROOT
from spark_ft.lab.checks import CheckFailed, call, check, require, require_close

CHECKS = ROOT / "spark_ft/lab/checks"


@check
def check_adapter_output(answer) -> str:
    """(x Aᵀ) Bᵀ · α/r against the matrix it stands for."""
    for batch, width, out, rank, alpha in ((1, 8, 8, 2, 8.0), (5, 16, 12, 4, 2.0)):
        x, A, B = torch.randn(batch, width), torch.randn(rank, width), torch.randn(out, rank)
        right = x @ (alpha / rank * B @ A).T
        what = f"the output for alpha={alpha:g}, rank={rank}"
        mistakes = {"scaled by alpha, not alpha / rank": right * rank, "not scaled": right * rank / alpha}
        require_close(call(answer, what, x, A, B, alpha), right, what, mistakes)
    require(A.requires_grad is False, "A was changed")
    return "the adapter's output equals x·(α/r·BA)ᵀ on 2 shapes"


def right(x, A, B, alpha):
    return x @ A.T @ B.T * (alpha / A.shape[0])


def stub(*_, **__):
    raise NotImplementedError("your turn (exercise 3)")


MUTANTS = [
    ("scaled by alpha, not alpha / rank", lambda x, A, B, alpha: x @ A.T @ B.T * alpha),
    ("not scaled", lambda x, A, B, alpha: x @ A.T @ B.T),
    ("a return missing", lambda x, A, B, alpha: None),
    (r"shape \(12,\)|shape \(8,\), but", lambda x, A, B, alpha: right(x, A, B, alpha)[0]),
    ("nan", lambda x, A, B, alpha: right(x, A, B, alpha) / 0),
    ("off by up to", lambda x, A, B, alpha: right(x, A, B, alpha) + 0.01),
    (
        r"the output for alpha=8, rank=2: your code raised RuntimeError: .* \(line \d+ of test_lab",
        lambda x, A, B, alpha: x @ A @ B,
    ),
]
LABS = [import_module(f"spark_ft.lab.checks.{path.stem}") for path in CHECKS.glob("lab_*.py")]


@pytest.fixture(autouse=True)
def not_graded(monkeypatch):
    monkeypatch.delenv("SPARK_FT_STRICT", raising=False)
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)


def test_a_right_answer_prints_one_line_and_a_stub_is_reported(capsys):
    assert check_adapter_output(right) is None
    assert capsys.readouterr() == ("✓ the adapter's output equals x·(α/r·BA)ᵀ on 2 shapes\n", "")
    assert check_adapter_output(stub) is None
    assert capsys.readouterr().out == "not attempted yet – exercise 3\n"


def test_each_mutant_is_diagnosed():
    refuses(check_adapter_output, *MUTANTS)


def notebook_shows(code, folder):
    shell = InteractiveShell(colors="NoColor", ipython_dir=str(folder))
    shell.user_ns["check_adapter_output"] = check_adapter_output
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        shell.run_cell(code)
    return shown.getvalue().strip()


def test_a_notebook_shows_a_wrong_answers_message_alone_and_an_errors_own_lines(tmp_path):
    shown = notebook_shows("check_adapter_output(lambda x, A, B, alpha: None)", tmp_path)
    assert shown == "✗ the output for alpha=8, rank=2 is None; is a return missing?"
    shown = notebook_shows("def answer(*_):\n    return 1 / 0\ncheck_adapter_output(answer)", tmp_path)
    theirs = "your code raised ZeroDivisionError: division by zero (line 2 of your cell: `return 1 / 0`)"
    assert shown == f"✗ the output for alpha=8, rank=2: {theirs}"


@pytest.mark.parametrize("name", ["SPARK_FT_STRICT", "NBGRADER_EXECUTION"])
def test_stub_raises_where_it_is_graded(monkeypatch, name):
    monkeypatch.setenv("SPARK_FT_STRICT", "0")  # which is not strict
    check_adapter_output(stub)
    monkeypatch.setenv(name, "1" if name == "SPARK_FT_STRICT" else "validate")
    with pytest.raises(NotImplementedError, match="your turn"):
        check_adapter_output(stub)
    check_adapter_output(right)


def test_nbgraders_own_stub_counts_as_not_attempted_and_a_real_error_does_not(capsys):
    def nbgraders(*_):
        raise NotImplementedError()

    def broken(*_):
        raise NotImplementedError('"addmm" not implemented for this dtype')

    check_adapter_output(nbgraders)
    assert "not attempted yet – check_adapter_output" in capsys.readouterr().out
    with pytest.raises(CheckFailed, match='your code raised NotImplementedError: "addmm"'):
        check_adapter_output(broken)


def test_nothing_reaches_stderr_and_nothing_is_lost(capsys, monkeypatch):
    # pytest records warnings; a notebook prints them
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: print(message, file=sys.stderr))
    logger = logging.getLogger("spark_ft.test")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)

    def noisy(*arguments):
        warnings.warn("deprecated", stacklevel=1)
        print("debugging", file=sys.stderr)
        logger.warning("logged")
        return right(*arguments)

    try:
        check_adapter_output(noisy)
    finally:
        logger.removeHandler(handler)
    out, err = capsys.readouterr()
    assert err == ""
    assert all(word in out for word in ("deprecated", "debugging", "logged", "✓"))
    assert handler.stream is sys.stderr, "handlers are put back"


def test_inputs_are_fresh_the_generator_is_left_alone_and_a_check_must_say_something():
    seen = []

    @check
    def check_input(answer) -> str:
        answer(torch.randn(4))
        return "seen"

    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_input(seen.append)
    check_input(seen.append)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(*seen)
    with pytest.raises(TypeError, match="must return the line"):
        check(lambda answer: None)(right)


def test_every_check_of_every_lab_lets_a_stub_pass_and_refuses_an_answer_that_returns_nothing():
    @contextlib.contextmanager
    def manager_stub(*_, **__):
        raise NotImplementedError("your turn (exercise 3)")
        yield

    real = {"model", "tokenizer", "batch"}  # what a check takes beside answers, if it works on real things
    found = [(name, each) for lab in LABS for name, each in vars(lab).items() if name.startswith("check_")]
    assert len(found) > 30
    for name, each in found:
        taken = inspect.signature(each).parameters
        count = len(taken)
        if not real & set(taken):
            assert "not attempted yet – exercise 3" in printed_by(each, (stub,) * count), name
            if name != "check_parity":  # which comes after its answers' own checks
                refuses(
                    each, ("return missing|two |None|nothing was added", (lambda *_, **__: None,) * count)
                )
    assert "not attempted yet" in printed_by(dict(found)["check_embedding_noise"], manager_stub)
