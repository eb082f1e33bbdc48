"""The builder keeps its rules, and the notebooks in labs/ are what their sources say."""

import re
from functools import lru_cache
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_output

from spark_ft.lab import build
from spark_ft.lab.build import BEGIN, END, BuildError, learners, read_source, without_tag
from spark_ft.lab.form import tagged
from spark_ft.lab.run import headline_of

LAB = '''# %% [markdown]
# # Doubling

# %%
import math

# %% nbgrader={"grade_id": "double", "solution": true}
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    y = 2 * x
    return y
    ### END SOLUTION

# %% tags=["experiment"]
print("trained")

# %% nbgrader={"grade_id": "halve", "solution": true}
class Halver:
    def __init__(self, x):
        self.x = x

    def halve(self):
        ### BEGIN SOLUTION
        return self.x / 2
        ### END SOLUTION

# %%
print("same")

# %%
print("same")
'''


@pytest.fixture
def lab(tmp_path):
    path = tmp_path / "labs" / "src" / "lab-9.1.1-doubling.py"
    path.parent.mkdir(parents=True)
    path.write_text(LAB)
    return path


def outline(notebook):
    """What a built notebook is compared by: everything but outputs and execution counts."""
    cells = [(cell.id, cell.cell_type, cell.source, dict(cell.metadata)) for cell in notebook.cells]
    return cells, dict(notebook.metadata), notebook.nbformat, notebook.nbformat_minor


def outside_regions(source):
    return re.sub(rf"^ *{BEGIN}\n.*?^ *{END}$", "<region>", source, flags=re.M | re.S)


def test_read_source_is_deterministic_with_stable_ids_and_completes_nbgraders_fields(lab):
    once, twice = read_source(lab), read_source(lab)
    fields = {"grade_id": "double", "grade": False, "solution": True, "locked": False, "task": False}
    assert once.cells[2].metadata["nbgrader"] == {**fields, "schema_version": 3}
    assert outline(once) == outline(twice)
    ids = [cell.id for cell in once.cells]
    assert len(set(ids)) == len(ids)
    assert ids[2] == "double"
    assert ids[-1] == f"{ids[-2]}-2", "two equal cells still get two ids"
    lab.write_text("# %% [markdown]\n# A new first cell\n\n" + LAB)
    assert [cell.id for cell in read_source(lab).cells][1:] == ids, "an inserted cell changes no other's id"


def test_learners_has_numbered_stubs_and_nothing_of_the_solution_or_of_a_tag(lab):
    cells = learners(read_source(lab)).cells
    stub = '    """Twice x."""\n    raise NotImplementedError("your turn (exercise 1)")'
    assert cells[2].source.endswith(stub)
    assert cells[4].source.endswith('        raise NotImplementedError("your turn (exercise 2)")')
    assert "self.x / 2" not in nbformat.writes(learners(read_source(lab)))
    assert all(not cell.outputs for cell in cells if cell.cell_type == "code")
    notebook = read_source(lab)
    kept = without_tag(notebook, "experiment").cells
    assert len(kept) == len(notebook.cells) - 1
    assert all("trained" not in cell.source for cell in kept)


FOLDED = """# %% [markdown]
# ### Exercise 1: twice
# ●●○ importance · ●○○ difficulty · 5 minutes

# %% nbgrader={"grade_id": "double", "solution": true}
def double(x):
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION

# %% nbgrader={"grade_id": "halve", "solution": true}
def halve(x):
    ### BEGIN SOLUTION
    return x / 2
    ### END SOLUTION

# %%
assert True

# %% nbgrader={"grade_id": "check-both", "grade": true, "points": 1}
check_both(double, halve)

# %% [markdown]
# ### Exercise 2: in the old form
# ●●○ · 5 minutes

# %% nbgrader={"grade_id": "old", "solution": true}
def old(x):
    ### BEGIN SOLUTION
    return x
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-old", "grade": true, "points": 1}
check_old(old)

# %% [markdown] nbgrader={"grade_id": "explain", "grade": true, "solution": true, "points": 1}
# Why?
#
# ### BEGIN SOLUTION
# Because.
# ### END SOLUTION
"""


def test_the_solution_is_folded_after_the_check_and_no_marker_is_a_heading(lab):
    lab.write_text(FOLDED)
    solved = read_source(lab)
    cells = learners(solved).cells
    assert len(cells) == len(solved.cells) + 1
    fold = cells[5]
    assert cells[4].id == "check-both"
    assert (fold.id, fold.cell_type, fold.metadata) == ("solution-double", "markdown", {"tags": ["solution"]})
    code = "def double(x):\n    return 2 * x\n\n\ndef halve(x):\n    return x / 2"
    assert fold.source == f"<details><summary>Solution</summary>\n\n```python\n{code}\n```\n\n</details>"
    assert sum("<details>" in cell.source for cell in cells) == 1, "the old form gets none"
    assert solved.cells[-1].source == f"Why?\n\n<!-- {BEGIN} -->\nBecause.\n<!-- {END} -->"
    assert cells[-1].source == "Why?\n\n*Your answer here.*"
    nbformat.validate(learners(solved))


MARKED = 'nbgrader={"grade_id": "a", "solution": true}'
BROKEN = [
    ("inside a function", f"{MARKED}\n{BEGIN}\nx = 1\n{END}"),
    ("inside a function", f"{MARKED}\ndef f():\n    {BEGIN}\n    return 1\n{END}\n"),
    ('marked "solution"', f"\ndef f():\n    {BEGIN}\n    return 1\n    {END}"),
    ('marked "solution"', f"{MARKED}\ndef f():\n    return 1"),
    ('marked "solution"', f"{MARKED}\ndef f():\n    {BEGIN}\n    return 1"),
    ("cell 1, line 1: not valid Python", f"{MARKED}\ndef f()\n    {BEGIN}\n    return 1\n    {END}"),
    ("grade_id", 'nbgrader={"solution": true}\nx = 1'),
    ("points", 'nbgrader={"grade_id": "a", "grade": true}\nx = 1'),
    ("twice", 'nbgrader={"grade_id": "a"}\nx = 1\n\n# %% nbgrader={"grade_id": "a"}\ny = 1'),
]


def test_build_executes_keeps_outputs_and_writes_both(lab):
    build.build(lab)
    solved_path = lab.parents[1] / "solutions" / "lab-9.1.1-doubling.ipynb"
    solved = nbformat.read(solved_path, 4)
    assert solved.cells[3].outputs[0].text == "trained\n"
    assert outline(solved) == outline(read_source(lab)), "execution must not touch the metadata"
    handed_out = nbformat.read(lab.parents[1] / "lab-9.1.1-doubling.ipynb", 4)
    assert outline(handed_out) == outline(learners(read_source(lab)))
    first = solved_path.read_bytes()

    lab.write_text(LAB.replace("# # Doubling", "# # Doubling, explained"))
    assert "outputs kept" in build.build(lab, run=False)
    kept = nbformat.read(solved_path, 4)
    assert kept.cells[0].source == "# Doubling, explained"
    assert kept.cells[3].outputs == solved.cells[3].outputs

    lab.write_text(LAB.replace('print("trained")', 'print("trained again")'))
    with pytest.raises(BuildError, match="code changed"):
        build.build(lab, run=False)

    lab.write_text(LAB)
    build.build(lab)
    assert solved_path.read_bytes() == first, "the same source and outputs give the same bytes"
    names = {path.name for path in lab.parents[1].rglob("*") if path.is_file()}
    assert names == {lab.name, "lab-9.1.1-doubling.ipynb"}, "nothing half-written stays"


def test_check_outputs_refuses_folders_warnings_and_weight(lab):
    home = new_output("stream", name="stdout", text=f"saved in {Path.home() / 'models'}")
    root = new_output("execute_result", data={"text/plain": f"'{build.ROOT}'"})
    warning = new_output("stream", name="stderr", text="UserWarning: old")
    heavy = new_output("stream", name="stdout", text="x" * 400_000)
    for output, message in (
        (home, "cell 2: .* names a folder"),
        (root, "cell 2: .* names a folder"),
        (warning, "cell 2: .* stderr: 'UserWarning: old'"),
        (heavy, "402 KB, more than 400"),
    ):
        notebook = read_source(lab)
        build.check_outputs(notebook, "lab")
        notebook.cells[1].outputs = [output]
        with pytest.raises(BuildError, match=message):
            build.check_outputs(notebook, "lab")


def test_broken_cells_are_refused_and_a_refused_lab_writes_no_solved_notebook(lab, capsys):
    lab.write_text(f'# %%\nprint("{build.ROOT}")\n')
    assert build.main(["9.1.1", "--labs", str(lab.parents[1])]) == 1
    assert "names a folder of this machine" in capsys.readouterr().err
    assert not list(lab.parents[1].glob("solutions/*"))
    for message, cell in BROKEN:
        lab.write_text(f"# %% {cell}\n")
        with pytest.raises(BuildError, match=message):
            read_source(lab)


def test_sources_are_picked_by_number_and_ordered(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("lab-3.1.10-z", "lab-3.1.2-b", "lab-3.1.1-a"):
        (tmp_path / "src" / f"{name}.py").touch()
    assert [p.stem for p in build.sources(None, tmp_path)] == ["lab-3.1.1-a", "lab-3.1.2-b", "lab-3.1.10-z"]
    assert [p.stem for p in build.sources(["3.1.1"], tmp_path)] == ["lab-3.1.1-a"]
    assert [p.stem for p in build.sources(["labs/lab-3.1.2-b.ipynb"], tmp_path)] == ["lab-3.1.2-b"]
    with pytest.raises(BuildError, match="no lab"):
        build.sources(["3.1.7"], tmp_path)


NAMES = [path.stem for path in build.sources()]


@lru_cache
def built(name, *folder):
    return nbformat.read(build.LABS.joinpath(*folder, f"{name}.ipynb"), 4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_built_notebooks_match_their_source_and_none_is_without_one():
    assert NAMES
    for folder in (build.LABS, build.LABS / "solutions"):
        assert {path.stem for path in folder.glob("*.ipynb")} == set(NAMES)
    stale = []
    for source in build.sources():
        solved = read_source(source)
        if outline(built(source.stem, "solutions")) != outline(solved):
            stale.append(f"labs/solutions/{source.stem}.ipynb")
        if outline(built(source.stem)) != outline(learners(solved)):
            stale.append(f"labs/{source.stem}.ipynb")
    assert not stale, f"run `make build`: {', '.join(stale)}"


def test_learners_equal_solved_outside_solution_regions():
    stub = re.compile(r'^ *raise NotImplementedError\("your turn \(exercise \d+\)"\)$', re.M)
    for name in NAMES:
        unsolved = without_tag(built(name), "solution").cells
        for mine, solved in zip(unsolved, built(name, "solutions").cells, strict=True):
            where = f"{name}, cell {mine.id}"
            same = (solved.id, solved.cell_type, solved.metadata)
            assert (mine.id, mine.cell_type, mine.metadata) == same, where
            if BEGIN not in solved.source:  # solutions/ is one folder deeper
                assert mine.source == solved.source.replace("](../../", "](../"), where
            elif mine.cell_type == "code":
                assert stub.sub("<region>", mine.source) == outside_regions(solved.source), where


def test_solved_are_executed_and_fit_to_publish_and_learners_have_no_outputs():
    wrong = []
    for name in NAMES:
        solved, unsolved = built(name, "solutions"), code_cells(built(name))
        build.check_outputs(solved, name)
        code = [cell for cell in code_cells(solved) if cell.source.strip()]
        outputs = [output for cell in code for output in cell.outputs]
        images = [output for output in outputs if "image/png" in output.get("data", {})]
        alts = [image.metadata.get("image/png", {}).get("alt", "") for image in images]
        counts = [cell.execution_count for cell in code]
        found = {
            "is not executed from top to bottom": counts != [*range(1, len(code) + 1)],
            "shows an error": any(output.output_type == "error" for output in outputs),
            "has fewer than two figures": len(images) < 2,
            "has a figure without alt text (draw with plots)": any(len(alt.split()) < 6 for alt in alts),
            "does not end with a headline": not headline_of(solved),
            "has right answers that do not train (tag trains)": any(
                not any(output.get("text", "").startswith("✓ your ") for output in solved.cells[i].outputs)
                for i in tagged(solved, "trains")
            ),
            "has outputs for learners": any(c.outputs or c.execution_count is not None for c in unsolved),
        }
        wrong += [f"{name} {fault}" for fault, is_so in found.items() if is_so]
    assert not wrong, "\n".join(wrong)
