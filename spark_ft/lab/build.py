"""Build the notebooks from their source: labs/src/*.py → labs/solutions/*.ipynb (executed) and labs/*.ipynb.

Use:
    python -m spark_ft.lab.build                        every lab
    python -m spark_ft.lab.build 3.1.1 --no-execute     text changed, code did not: keep the stored outputs
    python -m spark_ft.lab.build --table                words, lines, minutes of each lab, and what is wrong
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from spark_ft.files import ROOT, write_atomically

LABS = ROOT / "labs"
MAX_BYTES = 400_000
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
HEADING = re.compile(r"^#{1,6} ", re.M)
# The line under an exercise's heading, by which the new form is known (LABS.md).
EXERCISE = re.compile(r"^([●○]{3}) importance · ([●○]{3}) difficulty · (\d+) minutes$", re.M)
# In Markdown these two would be headings; as HTML comments they are not seen, and nbgrader still finds them.
MARKERS = re.compile(f"^({BEGIN}|{END})$", re.M)
WIDGET = "application/vnd.jupyter.widget-view+json"


class BuildError(ValueError):
    """A lab's source or output breaks a rule; the message names the lab, the cell and the mend."""


def sources(names: list[str] | None = None, labs: Path = LABS) -> list[Path]:
    """The labs' sources in order; `names` picks some: "3.1.1", "lab-3.1.1" or the whole name."""
    found = sorted(
        (labs / "src").glob("lab-*.py"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)]
    )
    if not names:
        return found
    starts = ["lab-" + re.sub(r"\.(py|ipynb)$", "", Path(name).name).removeprefix("lab-") for name in names]
    for start in starts:
        if not any(_is(path, start) for path in found):
            raise BuildError(f"no lab is called {start!r} in {labs / 'src'}")
    return [path for path in found if any(_is(path, start) for start in starts)]


def _is(path: Path, start: str) -> bool:
    return path.stem == start or path.stem.startswith(f"{start}-")


def read_source(path: Path) -> NotebookNode:
    """The solved notebook of a py:percent source, not executed; equal texts give equal notebooks."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for number, cell in enumerate(notebook.cells, 1):
        for field in ("lines_to_next_cell", "title"):  # jupytext's own, of no use in a notebook
            cell.metadata.pop(field, None)
        if "nbgrader" in cell.metadata:
            cell.metadata["nbgrader"] = _complete_grading(
                cell.metadata["nbgrader"], f"{path.name}, cell {number}"
            )
        if cell.cell_type == "markdown":
            cell.source = MARKERS.sub(r"<!-- \1 -->", cell.source)
        cell.id = _cell_id(cell, seen)
        _check_solution(cell, f"{path.name}, cell {number}")
    nbformat.validate(notebook)
    return notebook


def _complete_grading(given: dict, where: str) -> NotebookNode:
    """All the fields that nbgrader requires; a source states only those that differ from the default."""
    if not re.fullmatch(r"[A-Za-z][\w-]{0,63}", given.get("grade_id", "")):
        raise BuildError(f'{where}: nbgrader needs a "grade_id" of letters, digits and dashes')
    grade, solution = given.get("grade", False), given.get("solution", False)
    if grade and "points" not in given:
        raise BuildError(f'{where}: a graded cell needs "points"')
    full = {
        "schema_version": 3,
        "grade": grade,
        "solution": solution,
        "locked": not solution,
        "task": False,
        **given,
    }
    return nbformat.from_dict(full)


def _cell_id(cell: NotebookNode, seen: dict[str, int]) -> str:
    name = cell.metadata.get("nbgrader", {}).get("grade_id")
    if name:
        if name in seen:
            raise BuildError(f"grade_id {name!r} is used twice")
        seen[name] = 1
        return name
    name = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else f"{name}-{seen[name]}"


def _check_solution(cell: NotebookNode, where: str) -> None:
    """Require solution regions in marked cells and inside functions, so that no stub stops the notebook."""
    lines = cell.source.split("\n")
    begins = [i for i, line in enumerate(lines, 1) if BEGIN in line]
    ends = [i for i, line in enumerate(lines, 1) if END in line]
    marked = cell.metadata.get("nbgrader", {}).get("solution", False)
    if marked != bool(begins) or len(begins) != len(ends):
        raise BuildError(f'{where}: cells marked "solution", and no others, hold {BEGIN} and {END}')
    if not begins or cell.cell_type != "code":
        return
    try:
        functions = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.FunctionDef)]
    except SyntaxError as error:
        raise BuildError(f"{where}, line {error.lineno}: not valid Python: {error.msg}") from None
    for begin, end in zip(begins, ends, strict=True):
        # The END comment may come after the function's last statement, so its indentation counts.
        inside = any(
            f.body[0].lineno > f.lineno and f.lineno < begin < end and _covers(f, begin, end, lines)
            for f in functions
        )
        if not inside:
            raise BuildError(
                f"{where}, line {begin}: put the solution region inside a function, since its stub raises"
            )


def _covers(function: ast.FunctionDef, begin: int, end: int, lines: list[str]) -> bool:
    indent = function.body[0].col_offset
    within = [line for line in lines[begin - 1 : end] if line.strip()]
    return begin <= function.end_lineno and all(len(line) - len(line.lstrip()) >= indent for line in within)


def learners(solved: NotebookNode) -> NotebookNode:
    """A solved notebook's learner version: numbered stubs by nbgrader's ClearSolutions, and no outputs.

    Exercises in the new form get their solution, folded, after the check. An instructor who wants none of
    that hands out what `nbgrader generate_assignment` makes of the solved notebook.
    """
    from nbgrader.preprocessors import ClearSolutions  # takes 1 s to import

    class NumberedStubs(ClearSolutions):
        exercise = 0

        def preprocess_cell(self, cell, resources, cell_index):
            if cell.cell_type == "code" and BEGIN in cell.source:
                self.exercise += 1
                self.code_stub = {
                    "python": f'raise NotImplementedError("your turn (exercise {self.exercise})")'
                }
            return super().preprocess_cell(cell, resources, cell_index)

    clear = NumberedStubs(
        begin_solution_delimeter=BEGIN, end_solution_delimeter=END, text_stub="*Your answer here.*"
    )
    notebook, _ = clear.preprocess(copy.deepcopy(solved), {})
    _fold_solutions(notebook, solved)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            # links are written for labs/solutions/, one folder deeper
            cell.source = cell.source.replace("](../../", "](../")
    return without_outputs(notebook)


def _fold_solutions(notebook: NotebookNode, solved: NotebookNode) -> None:
    """After each check, insert the solutions that it checks, folded, if the exercise is in the new form."""
    cells, shown, form = [], [], False
    for cell, full in zip(notebook.cells, solved.cells, strict=True):
        cells.append(cell)
        grading = full.metadata.get("nbgrader", {})
        if cell.cell_type == "markdown":
            form = bool(EXERCISE.search(full.source)) or (form and not HEADING.search(full.source))
        elif form and grading.get("solution"):
            shown.append(full)
        elif shown and grading.get("grade"):
            cells.append(_folded(shown))
            shown = []
    notebook.cells = cells


def _folded(solutions: list[NotebookNode]) -> NotebookNode:
    code = "\n\n\n".join(
        "\n".join(line for line in cell.source.split("\n") if BEGIN not in line and END not in line)
        for cell in solutions
    )
    text = f"<details><summary>Solution</summary>\n\n```python\n{code}\n```\n\n</details>"
    return new_markdown_cell(text, id=f"solution-{solutions[0].id}"[:64], metadata={"tags": ["solution"]})


def without_outputs(notebook: NotebookNode) -> NotebookNode:
    """The same notebook with no outputs and no execution counts."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def without_tag(notebook: NotebookNode, tag: str) -> NotebookNode:
    """The same notebook without the cells that have a tag."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if tag not in cell.metadata.get("tags", [])]
    return notebook


def execute(notebook: NotebookNode, on_cell: Callable[[int], None] | None = None) -> NotebookNode:
    """Execute a notebook in place, inside a temporary folder, and set constant metadata.

    Args:
        notebook: from `read_source` or `learners`.
        on_cell: called with each cell's index before it runs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the notebook then holds its traceback.
        nbclient.exceptions.DeadKernelError: the kernel died, usually for lack of memory.
    """
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        client = NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns that localhost is not encrypted
            resources={"metadata": {"path": folder}},
            on_cell_execute=(lambda cell, cell_index: on_cell(cell_index)) if on_cell else None,
        )
        try:
            client.execute()
        finally:
            notebook.metadata = nbformat.from_dict(METADATA)
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    # A widget does not work without its kernel, and its id changes in every run.
                    cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    return notebook


def check_outputs(
    notebook: NotebookNode, name: str, private: tuple[str, ...] = (str(ROOT), f"{Path.home()}/")
) -> None:
    """Refuse outputs that name this machine's folders, contain warnings, or are too large."""
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", []):
            text = json.dumps(output, ensure_ascii=False)
            for path in private:
                if path in text:
                    raise BuildError(
                        f"{name}, cell {number}: its output names a folder of this machine, {path}"
                    )
            if output.output_type == "stream" and output.name == "stderr":
                raise BuildError(f"{name}, cell {number}: it writes to stderr: {output.text.strip()[:200]!r}")
    size = len(nbformat.writes(notebook).encode())
    if size > MAX_BYTES:
        raise BuildError(
            f"{name}: {size / 1000:.0f} KB, more than {MAX_BYTES // 1000}; print less, or shrink figures"
        )


def keep_outputs(notebook: NotebookNode, old: NotebookNode) -> bool:
    """Copy the outputs of an executed notebook if its code is the same; otherwise return False."""

    def code(nb: NotebookNode) -> list[NotebookNode]:
        return [cell for cell in nb.cells if cell.cell_type == "code"]

    if [cell.source for cell in code(notebook)] != [cell.source for cell in code(old)]:
        return False
    for cell, before in zip(code(notebook), code(old), strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    return True


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path, lambda partial: partial.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    )


def build(path: Path, run: bool = True) -> str:
    """Build one lab's two notebooks from its source, and return a line about it.

    Args:
        path: labs/src/lab-3.1.N-name.py.
        run: execute it; otherwise keep the outputs of the existing solved notebook if its code is the same.

    Raises:
        BuildError: the source or an output breaks a rule, or `run` is false and the code has changed.
    """
    labs, name = path.parents[1], path.stem
    solved = read_source(path)
    write(learners(solved), labs / f"{name}.ipynb")
    target = labs / "solutions" / f"{name}.ipynb"
    started = time.perf_counter()
    if run:
        execute(solved)
    elif not target.exists() or not keep_outputs(solved, nbformat.read(target, 4)):
        raise BuildError(f"{name}: its code changed since it was executed; build it without --no-execute")
    check_outputs(solved, name)
    write(solved, target)
    done = f"executed in {time.perf_counter() - started:.0f} s" if run else "outputs kept"
    return f"{name}: {done}, {target.stat().st_size / 1000:.0f} KB"


def chosen_labs(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[argparse.Namespace, list[Path]]:
    """Parse a command line that names labs: its options and the labs' sources."""
    parser.add_argument("names", nargs="*", help="labs, as 3.1.1 or by whole name; default: all")
    parser.add_argument("--labs", type=Path, default=LABS, help="the labs folder, which holds src/")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("SPARK_FT_PROFILE", "laptop")  # so that everybody can reproduce the outputs
    try:
        found = sources(options.names, options.labs)
    except BuildError as error:
        parser.error(str(error))
    if not found:
        parser.error(f"no labs in {options.labs / 'src'}")
    return options, found


def main(arguments: list[str] | None = None) -> int:
    """Build the labs named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m spark_ft.lab.build", description="Build labs from labs/src."
    )
    parser.add_argument(
        "--no-execute", action="store_true", help="only text changed: keep the stored outputs"
    )
    parser.add_argument("--table", action="store_true", help="build nothing: count words, lines and minutes")
    options, chosen = chosen_labs(parser, arguments)
    if options.table:
        from spark_ft.lab.form import table  # which imports this module

        print(table(chosen))
        return 0
    failed = 0
    for path in chosen:
        try:
            print(build(path, run=not options.no_execute), flush=True)
        except Exception as error:  # the other labs can still be built; a failed cell brings its traceback
            print(f"{path.stem}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
