"""The form of a lab holds for every lab, and each of its rules can fail."""

import inspect
import math
import re
import warnings
from importlib import import_module

import pytest
import torch
from helpers import printed_by

from spark_ft.lab import build, form, plots, yours
from spark_ft.lab.build import read_source
from spark_ft.lab.checks import CheckFailed, told
from spark_ft.training import History

SOURCES = build.sources()
REAL = {"model", "tokenizer", "batch"}  # what a check takes beside answers, if it works on real things
ODD = ["text", None, 1.5, 3, [1, 2], (1.0,), {"a": 1}, object(), print, iter([1])]


def exercise(number):
    lines = "\n".join(f"    y{i} = x + {i}" for i in range(13))
    return f"""# %% [markdown]
# ### Exercise {number}: adding
# ●●○ importance · ●○○ difficulty · 5 minutes
#
# <details><summary>Hint</summary>
#
# Add.
# </details>

# %% nbgrader={{"grade_id": "add-{number}", "solution": true}}
def add_{number}(x):
    ### BEGIN SOLUTION
    # a comment is no line of the learner's
{lines}
    return y12
    ### END SOLUTION

# %% nbgrader={{"grade_id": "check-add-{number}", "grade": true, "points": 1}}
check(add_{number})
"""


PREDICT = """# %% [markdown] tags=["predict"]
# Before you run it: which way?
#
# - up
# - down

# %%
print("shown")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Up.
# </details>
"""
LAB = f"""# %% [markdown]
# # 3.1.99 How does one add?
#
# **Time**: about 10 minutes.
#
# ## What you will make
# ## What you should know first
# ## The picture

# %%
import math

# %% [markdown]
# ## It works

# %%
print(math.pi)

# %% [markdown]
# ## Build it

{exercise(1)}
{exercise(2)}
# %% [markdown]
# ## Your code trains

# %% tags=["trains"]
yours.trains(lambda: [add_1(1)], lambda: [1.0], what="sum", y="sum", caption="one step, no model")

# %% [markdown]
# ## Is it true?

{PREDICT}
{PREDICT}
# %% tags=["knob"]
STEPS = 3  # turn this: 1, 10 and watch what is printed
print(STEPS)

# %% tags=["bug-hunt"]
print(1 + 1 == 3)

# %% [markdown] tags=["answer"]
# <details><summary>The bug</summary>
#
# It is 2.
# </details>

# %% [markdown]
# ## On a DGX Spark
# ## Explain it back

# %%
headline({{"sum": 2}})
"""
LONG = "\n".join(f"print({i})" for i in range(21))
LONGER = f"{LONG}\n" * 3
BROKEN = [
    ("its title", "How does one add?", "Adding"),
    ("its sections", "# ## The picture\n", ""),
    ("its sections", "# ## The picture", "# ## A picture"),
    ("1[0-9] are honest", "about 10 minutes", "about 60 minutes"),
    ("its time is None", "**Time**", "Time"),
    ("exercise 2 lacks the heading", "Exercise 2:", "Exercise 3:"),
    ("exercise 1 lacks the line", "importance · ", ""),
    ("exercise 1 lacks a folded hint", "<summary>Hint", "<summary>Help"),
    ("exercise 1 lacks a check", '"grade": true, "points": 1', '"grade": false'),
    ("not 25 to 45", "    y3 = x + 3\n    y4 = x + 4\n    y5 = x + 5\n", ""),
    ("not 25 to 45", "    y3 = x + 3\n", "    y3 = x + 3\n" * 12),
    (r"imports in the code cells \[1, 2\]", "print(math.pi)", "import os"),
    ("has 11 lines, more than 10", "print(math.pi)", LONG[: LONG.index("\nprint(11)")]),
    ("cell of 21 lines", 'print("shown")', LONG),
    ("cell of 21 lines", 'print("shown")', LONG[: LONG.index("\nprint(10)")] + "\n" * 11 + "print(0)"),
    ("line of 101 characters", "print(math.pi)", f"print({'1' * 94})"),
    ("6[0-9] lines of code between two", f"\n{exercise(2)}", f"\n# %%\n{LONGER}{exercise(2)}"),
    ("more than 250", "print(1 + 1 == 3)", "\n".join([LONG] * 12)),
    ("words, more than 2000", "# Add.", "# " + "add " * 2000),
    ("0 cells are tagged \"trains\"", 'tags=["trains"]', ""),
    ("does not call yours.trains", "yours.trains(", "train("),
    ("CI leaves it out", 'tags=["trains"]', 'tags=["trains", "experiment"]'),
    ("0 cells are tagged \"predict\"", 'tags=["predict"]', ""),
    ("a prediction has 1 answers", "# - up\n", ""),
    ("then a folded answer", "<details><summary>Answer", "<summary>Answer"),
    ("0 cells are tagged \"knob\"", 'tags=["knob"]', ""),
    ("the knob's cell", "  # turn this: 1, 10 and watch what is printed", ""),
    ("0 cells are tagged \"bug-hunt\"", 'tags=["bug-hunt"]', ""),
    ("the bug hunt is no code cell", "print(1 + 1 == 3)", LONG[:100]),
    ("no headline", "headline({", "print({"),
]  # fmt: skip


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "lab-3.1.99-adding.py"

    def faults(old="", new=""):
        assert old in LAB
        path.write_text(LAB.replace(old, new) if old else LAB)
        return form.faults(read_source(path), path.stem)

    return faults


def test_a_lab_that_keeps_every_rule_has_no_faults_and_each_rule_can_fail(broken):
    assert broken() == []
    missed = []
    for pattern, old, new in BROKEN:
        found = broken(old, new)
        if not any(re.search(pattern, fault) for fault in found):
            missed.append(f"{pattern}: {found}")
    assert not missed, "\n".join(missed)


def test_what_is_counted(tmp_path):
    path = tmp_path / "lab-3.1.99-adding.py"
    path.write_text(LAB)
    found = form.counts(read_source(path), path.stem)
    assert (found.exercises, found.learners_lines, found.longest_cell, found.between) == (2, 28, 16, 2)
    assert found.stated_minutes == 10
    assert form.prose("a **b** [c](https://d.e) | $x + y$ |\n$$z = 1$$\n<details>f</details>").split() == [
        "a", "b", "[c]", "x", "f",
    ]  # fmt: skip
    row = form.table([path]).split("\n")
    assert row[1].split()[:4] == ["3.1.99", str(found.words), str(found.code_lines), "28"]


def test_every_lab_keeps_the_form():
    wrong = [
        f"{path.stem}: {fault}" for path in SOURCES for fault in form.faults(read_source(path), path.stem)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_what_a_check_says_about_odd_answers_fits_on_two_lines(source):
    number = source.stem.split("-")[1].replace(".", "_")
    module = import_module(f"spark_ft.lab.checks.lab_{number}")
    checks = [(name, check) for name, check in vars(module).items() if name.startswith("check_")]
    assert checks

    def raises(*_, **__):
        raise ValueError("a long message " * 30)

    answers = [raises, *(lambda *_, odd=odd, **__: odd for odd in ODD)]
    wrong = []
    for name, check in checks:
        taken = inspect.signature(check).parameters
        count = len(taken)
        for answer in answers if "parity" not in name and not REAL & set(taken) else []:
            try:
                wrong.append(f"{name} accepts it: {printed_by(check, (answer,) * count)}")
            except CheckFailed as failure:
                if len(str(failure)) > told.MESSAGE or "\n" in str(failure):
                    wrong.append(f"{name}, {len(str(failure))} characters: {failure}")
    assert not wrong, "\n".join(wrong)


def stub():
    raise NotImplementedError("your turn (exercise 2)")


def divided():
    return [1 / 0]


def ends_in_nan():
    raise FloatingPointError("step 3: the loss is nan; lower learning_rate=0.1")


def leaves_gradients_off():
    torch.set_grad_enabled(False)
    return [1.0, 0.8, 0.6]


PACKAGE = [1.0, 0.8, 0.6]
RUNS = [
    ("✓ your loss trains: 3 steps, at most 0.5%", "lies on spark_ft's", lambda: [1.0, 0.805, 0.6]),
    ("✓ your loss trains", "lies on", leaves_gradients_off),
    ("✓ your loss trains", "lies on", lambda: History(losses=PACKAGE)),
    ("not written yet – exercise 2; the lab goes on", "yours is not written yet", stub),
    (r"✗ your code raised ZeroDivisionError: .* \(line \d+ of .*`return \[1 / 0\]`\)", "an error", divided),
    ("✗ your loss ends in nan or inf: step 3", "ends in nan", ends_in_nan),
    ("✗ your loss ends in nan or inf: step 2", "ends in nan", lambda: [1.0, math.nan, 0.6]),
    (
        "✗ .* something else; at step 2 yours is 0.9, spark_ft's 0.8",
        "not spark_ft's",
        lambda: [1.0, 0.9, 0.6],
    ),
    ("✗ your loss diverges: its loss goes from 1 to 3", "the loss rises", lambda: [1.0, 2.0, 3.0]),
    ("✗ yours took 1 steps, spark_ft's 3", "not spark_ft's", lambda: [1.0]),
    ("✗ the run returned NoneType and no losses", "gave no losses", lambda: None),
]


def test_your_code_trains_beside_the_packages_and_says_how_near_it_is(monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(plots, "show", lambda fig, alt: figures.append((fig, alt)))
    for said, title, run in RUNS:
        yours.trains(run, lambda: PACKAGE, what="loss", y="loss (nats)", caption="three steps of no model")
        assert re.match(said, capsys.readouterr().out), said
        fig, alt = figures.pop()
        assert title in fig.get_suptitle()
        assert "spark_ft's loss goes from 1 to 0.6 in 3 steps" in alt
        labels = [line.get_label() for line in fig.axes[0].lines]
        assert labels == (["spark_ft", "yours"] if "yours from" in alt else ["spark_ft"])
        assert torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError):  # the package's own fault is no sentence about the learner
        yours.trains(lambda: PACKAGE, divided, what="loss", y="loss (nats)", caption="no model at all")


def test_what_is_no_training_is_told_in_its_own_words(monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(plots, "show", lambda fig, alt: figures.append((fig, alt)))
    words = {"what": "export", "does": "serves", "x": "token", "y": "−log p (nats)", "caption": "no model"}
    for said, title, run in (
        ("✓ your export serves: 3 tokens, at most 0.0%", "Your export serves", lambda: PACKAGE),
        ("not written yet", "export serves; yours is not", stub),
        ("✗ .* your export serves something else; at token 2 yours", "not spark_ft", lambda: [1.0, 2.0, 3.0]),
        ("✗ yours took 1 tokens", "serves something else", lambda: [1.0]),
    ):
        yours.trains(run, lambda: PACKAGE, **words)
        assert re.match(said, capsys.readouterr().out), said
        fig, alt = figures.pop()
        assert title in fig.get_suptitle()
        assert fig.axes[0].get_xlabel() == "token"
        assert "in 3 tokens" in alt


def test_both_runs_start_from_the_same_random_state_and_leave_it_alone(monkeypatch):
    monkeypatch.setattr(plots, "show", lambda fig, alt: None)
    drawn, state = [], torch.get_rng_state()
    run = lambda: drawn.append(torch.rand(3)) or PACKAGE  # noqa: E731
    yours.trains(run, run, what="loss", y="loss (nats)", caption="no model at all")
    assert torch.equal(*drawn)
    assert torch.equal(state, torch.get_rng_state())


def test_a_plan_that_stumbles_over_an_unwritten_exercise_says_nothing_beside_what_the_step_says(capsys):
    """A guard plans a step before it runs it, and warns of what it cannot plan."""

    def run():
        warnings.warn("this step can't be planned, so its memory is not watched: your turn", stacklevel=1)
        raise NotImplementedError("your turn (exercise 2)")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yours.trains(run, lambda: PACKAGE, what="loss", y="loss (nats)", caption="no model at all")
    assert not told
    assert "not written yet – exercise 2" in capsys.readouterr().out
