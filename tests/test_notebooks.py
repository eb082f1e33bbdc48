"""Every notebook executed as it is opened, solved and unsolved; and a lab graded by nbgrader."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbmake.nb_run import NotebookRun

from spark_ft.lab import build
from spark_ft.lab.build import BEGIN, LABS, learners, read_source, without_tag
from spark_ft.lab.form import tagged
from spark_ft.lab.run import headline_of

pytestmark = pytest.mark.notebooks

SOURCES = build.sources()
# On a quiet two-core machine 120 s, 3.1.4 six minutes; 3.1.10 may train its adapter first. CI is slower.
SECONDS = 1200


def executed(notebook, folder):
    """A notebook run by nbmake in an empty folder, without earlier results or relative paths."""
    path = folder / "notebook.ipynb"
    nbformat.write(notebook, path)
    result = NotebookRun(path, SECONDS).execute()
    assert result.error is None, result.error.trace
    return result.nb


def printed(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def trained(notebook):
    """What each cell says in which the learner's code trains; a lab has one or two."""
    return [printed(notebook.cells[i]).lstrip() for i in tagged(notebook, "trains")]


def stderr_of(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.text for output in outputs if output.get("name") == "stderr"]


@pytest.fixture(autouse=True)
def not_strict(monkeypatch):
    monkeypatch.delenv("SPARK_FT_STRICT", raising=False)
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("name", [path.stem for path in SOURCES])
def test_solved_notebook_runs_whole(name, tmp_path):
    notebook = executed(nbformat.read(LABS / "solutions" / f"{name}.ipynb", 4), tmp_path)
    assert headline_of(notebook)
    assert not stderr_of(notebook)
    for said in trained(notebook):
        assert said.startswith("✓ your "), f"the right answers do not train as the package does: {said}"


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("name", [path.stem for path in SOURCES])
def test_learners_notebook_runs_unsolved(name, tmp_path):
    unsolved = without_tag(nbformat.read(LABS / f"{name}.ipynb", 4), "experiment")
    notebook = executed(unsolved, tmp_path)
    graded = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    checks = [
        cell for cell in graded if cell.cell_type == "code"
    ]  # the others are questions answered in words
    assert checks
    passed = [cell.source for cell in checks if "not attempted yet" not in printed(cell)]
    assert not passed, "these pass although their exercises are not done"
    assert not stderr_of(notebook)
    for said in trained(notebook):
        assert said.startswith("not written yet – exercise "), f"nothing is written, and yet it says: {said}"


LAB = """# %%
import sys
import torch
from spark_ft.lab.checks import check, require_close

@check
def check_double(double) -> str:
    x = torch.randn(3)
    require_close(double(x), x + x, "double(x)", {"x squared": x * x})
    return "double doubles"

@check
def check_halve(halve) -> str:
    x = torch.randn(3)
    require_close(halve(x), x / 2, "halve(x)")
    return "halve halves"

# %% nbgrader={"grade_id": "double", "solution": true}
def double(x):
    ### BEGIN SOLUTION
    print("a stray line on stderr must not cost points", file=sys.stderr)
    return 2 * x
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-double", "grade": true, "points": 2}
check_double(double)

# %% nbgrader={"grade_id": "halve", "solution": true}
def halve(x):
    ### BEGIN SOLUTION
    return x / 2
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-halve", "grade": true, "points": 3}
check_halve(halve)
"""


def test_nbgrader_gives_points_for_what_is_solved_and_for_nothing_else(tmp_path, monkeypatch):
    # nbgrader calls alembic by its bare name
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    from nbgrader.apps.api import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import Config

    source = tmp_path / "lab-9.1.1-grading.py"
    source.write_text(LAB)
    solved = read_source(source)
    wrong = nbformat.reads(nbformat.writes(solved).replace("return x / 2", "return x / 3"), 4)
    assert wrong != solved

    course = tmp_path / "course"
    build.write(solved, course / "source" / "lab" / "lab.ipynb")
    config = Config()
    config.CourseDirectory.root = str(course)
    config.CourseDirectory.db_url = f"sqlite:///{course}/gradebook.db"
    config.Exchange.root = str(tmp_path / "exchange")
    config.Execute.timeout = 300
    config.Execute.extra_arguments = ["--IPKernelApp.log_level=ERROR"]
    api = NbGraderAPI(coursedir=CourseDirectory(config=config), config=config)
    made = api.generate_assignment("lab")
    assert made["success"], made["log"]
    assert BEGIN not in (course / "release" / "lab" / "lab.ipynb").read_text()

    # Three ways in which a lab comes back: done, half wrong, and as our own builder handed it out.
    for student, notebook in {"solved": solved, "wrong": wrong, "unsolved": learners(solved)}.items():
        build.write(notebook, course / "submitted" / student / "lab" / "lab.ipynb")
    untouched = nbformat.read(course / "release" / "lab" / "lab.ipynb", 4)
    build.write(untouched, course / "submitted/untouched/lab/lab.ipynb")

    points = {}
    for student in ("solved", "wrong", "unsolved", "untouched"):
        graded = api.autograde("lab", student)
        assert graded["success"], graded["log"]
        points[student] = api.get_submission("lab", student)["score"]
    assert points == {"solved": 5, "wrong": 2, "unsolved": 0, "untouched": 0}
