"""The form of a lab (LABS.md) as numbers and rules: what is read, what is written, what is missing.

python -m spark_ft.lab.build --table          words, code lines, learner's lines … of every lab
python -m spark_ft.lab.build --table 3.1.7    and the rules that this one breaks
"""

import ast
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from nbformat import NotebookNode

from spark_ft.lab.build import BEGIN, END, EXERCISE, read_source

SECTIONS = [
    "What you will make",
    "What you should know first",
    "The picture",
    "It works",
    "Build it",
    "Your code trains",
    "Is it true?",
    "On a DGX Spark",
    "Explain it back",
]
CELL_LINES, LINE_WIDTH, CODE_LINES, WORDS = 20, 100, 250, 2_000
FIRST_CELL, BUG_HUNT, BETWEEN, LEARNERS = 10, 8, 60, (25, 45)
WORDS_A_MINUTE, LINES_A_MINUTE = 200, 15

REGION = re.compile(rf"^[^\n]*{BEGIN}.*?{END}[^\n]*$", re.M | re.S)
STATED = re.compile(r"^\*\*Time\*\*: about (\d+) minutes", re.M)
MINUTES = re.compile(r"^[●○]{3}.* (\d+) minutes", re.M)


@dataclass(frozen=True)
class Form:
    """One lab counted. Blank lines and the two marker lines of a solution do not count."""

    name: str
    words: int  # of Markdown, folds included, model answers and formulas left out
    code_lines: int
    learners_lines: int  # code inside solution regions, without comments
    longest_cell: int
    widest_line: int
    exercises: int
    between: int  # most lines of code between an exercise and the next
    stated_minutes: int | None
    minutes: float  # words at 200 and code lines at 15 a minute, and what the exercises say

    def row(self) -> dict[str, object]:
        """A row of the table."""
        stated = self.stated_minutes or "–"
        return {
            "lab": self.name.removeprefix("lab-").split("-")[0],
            "words": self.words,
            "code lines": self.code_lines,
            "learner's": self.learners_lines,
            "longest cell": self.longest_cell,
            "widest line": self.widest_line,
            "exercises": self.exercises,
            "between": self.between,
            "minutes": f"{self.minutes:.0f} ({stated} stated)",
        }


def counts(notebook: NotebookNode, name: str) -> Form:
    """Count a solved notebook, from `read_source`."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    lines = [lines_of(cell.source) for cell in code]
    learners = [learners_lines(cell.source) for cell in code]
    words = sum(len(prose(text).split()) for text in texts)
    reading = sum(len(_outside(cell.source)) for cell in code)
    stated = next((int(found[1]) for text in texts if (found := STATED.search(text))), None)
    exercise = sum(int(minutes) for text in texts for minutes in MINUTES.findall(text))
    return Form(
        name,
        words,
        sum(map(len, lines)),
        sum(map(len, learners)),
        max((cell_lines(cell.source) for cell in code), default=0),
        max((len(line) for each in lines for line in each), default=0),
        sum(map(is_exercise, code)),
        _between(code),
        stated,
        words / WORDS_A_MINUTE + reading / LINES_A_MINUTE + exercise,
    )


def lines_of(source: str) -> list[str]:
    """The lines that a reader sees: not blank, and no marker."""
    return [line for line in source.split("\n") if line.strip() and BEGIN not in line and END not in line]


def cell_lines(source: str) -> int:
    """How many lines a cell has: unsolved with its blank lines, or solved without them; the larger number."""
    return max(len(REGION.sub("…", source).strip().split("\n")), len(lines_of(source)))


def learners_lines(source: str) -> list[str]:
    """The lines inside solution regions that are code."""
    inside = [line for region in REGION.findall(source) for line in lines_of(region)]
    return [line for line in inside if not line.strip().startswith("#")]


def _outside(source: str) -> list[str]:
    """The lines that a learner reads: outside solution regions."""
    return lines_of(REGION.sub("", source))


def prose(text: str) -> str:
    """Markdown as it is read: without tags, addresses, formulas, model answers and the signs of tables."""
    text = REGION.sub("", text)
    for pattern, by in (
        (r"\$\$.*?\$\$", " "),
        (r"\$[^$\n]+\$", "x"),
        (r"<!--.*?-->", " "),
        (r"</?[a-z][^>]*>", " "),
        (r"\]\([^)]*\)", "]"),
        (r"^[|\s:-]+$", " "),
        (r"[|#*]", " "),
        (r"(?<!\S)[-–·=→>]+(?!\S)", " "),
    ):
        text = re.sub(pattern, by, text, flags=re.M | re.S if ".*?" in pattern else re.M)
    return text


def is_exercise(cell: NotebookNode) -> bool:
    """A code cell with a solution."""
    return cell.cell_type == "code" and BEGIN in cell.source


def _is_check(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and bool(cell.metadata.get("nbgrader", {}).get("grade"))


def tagged(notebook: NotebookNode, tag: str) -> list[int]:
    """Where the cells with a tag are."""
    return [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]


def _between(code: list[NotebookNode]) -> int:
    """The most lines of code that a learner reads between one exercise's cell and the next one's."""
    places = [i for i, cell in enumerate(code) if is_exercise(cell)]
    read = [len(_outside(cell.source)) for cell in code]
    gaps = [sum(read[first + 1 : second + 1]) for first, second in pairwise(places)]
    return max(gaps, default=0)


def faults(notebook: NotebookNode, name: str) -> list[str]:
    """The rules of the form that a solved notebook breaks, each with its number or its cell."""
    form, cells = counts(notebook, name), notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    importing = [i for i, cell in enumerate(code) if _imports(cell.source)]
    first = len(lines_of(code[1].source)) if len(code) > 1 else 0
    found = {
        f"{form.words} words, more than {WORDS}": form.words > WORDS,
        f"{form.code_lines} lines of code, more than {CODE_LINES}": form.code_lines > CODE_LINES,
        f"{form.learners_lines} learner's lines, not {LEARNERS[0]} to {LEARNERS[1]}": (
            not LEARNERS[0] <= form.learners_lines <= LEARNERS[1]
        ),
        f"{form.between} lines of code between two exercises, more than {BETWEEN}": form.between > BETWEEN,
        f"imports in the code cells {[i + 1 for i in importing]}, and not in the first alone": importing
        != [0],
        f"the first cell after the imports has {first} lines, more than {FIRST_CELL}": first > FIRST_CELL,
        f"its time is {form.stated_minutes} minutes, but {form.minutes:.0f} are honest": not _honest(form),
        "its last code cell has no headline({…})": "headline(" not in (code[-1].source if code else ""),
    }
    said = [fault for fault, is_so in found.items() if is_so]
    for cell in code:
        lines = lines_of(cell.source)
        wide = [line for line in lines if len(line) > LINE_WIDTH]
        if (long := cell_lines(cell.source)) > CELL_LINES:
            said.append(f"cell of {long} lines, more than {CELL_LINES}: {lines[0]}")
        said += [f"line of {len(line)} characters: {line.strip()[:60]}…" for line in wide]
    return [*said, *_section_faults(cells), *_exercise_faults(cells), *_tag_faults(notebook)]


def _honest(form: Form) -> bool:
    return form.stated_minutes is not None and abs(form.stated_minutes - form.minutes) <= max(
        5, 0.1 * form.minutes
    )


def _imports(source: str) -> bool:
    clean = "\n".join(line for line in source.split("\n") if not line.lstrip().startswith(("%", "!")))
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(clean)))


def _section_faults(cells: list[NotebookNode]) -> list[str]:
    texts = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    titles = re.findall(r"^## (.+)$", REGION.sub("", texts), re.M)
    question = re.match(r"# 3\.1\.\d+ .+\?\n", texts)
    said = [] if question else ['its title is not "# 3.1.N …?", a question']
    if titles != SECTIONS:
        said.append(f"its sections are {titles}, not {SECTIONS}")
    return said


def _exercise_faults(cells: list[NotebookNode]) -> list[str]:
    """Each exercise: a numbered heading, its line, a folded hint, the solved cell, the check after it."""
    said, number = [], 0
    for i, cell in enumerate(cells):
        if not is_exercise(cell) or (i and is_exercise(cells[i - 1])):
            continue
        number += 1
        before = cells[i - 1].source if i and cells[i - 1].cell_type == "markdown" else ""
        after = next(each for each in [*cells[i + 1 :], NotebookNode(cell_type="none")] if not _follows(each))
        missing = {
            f'the heading "### Exercise {number}: …"': f"### Exercise {number}: " not in before,
            "the line of importance, difficulty and minutes": not EXERCISE.search(before),
            "a folded hint": "<details><summary>Hint" not in before,
            "a check in the next cell": not _is_check(after),
        }
        said += [f"exercise {number} lacks {what}" for what, is_so in missing.items() if is_so]
    return said


def _follows(cell: NotebookNode) -> bool:
    """Another part of the same exercise."""
    return cell.cell_type == "code" and BEGIN in cell.source


def _tag_faults(notebook: NotebookNode) -> list[str]:
    """Predict, then run, twice; a knob; a bug hunt; and the cell where the learner's code trains."""
    cells, said = notebook.cells, []
    places = {tag: tagged(notebook, tag) for tag in ("predict", "knob", "bug-hunt", "trains", "answer")}
    for tag, least, most in (("predict", 2, 4), ("knob", 1, 1), ("bug-hunt", 1, 1), ("trains", 1, 2)):
        if not least <= len(places[tag]) <= most:
            said.append(f'{len(places[tag])} cells are tagged "{tag}", and {least} should be')
    for i in places["predict"]:
        choices = len(re.findall(r"^[-*] ", cells[i].source, re.M))
        if cells[i].cell_type != "markdown" or not 2 <= choices <= 3:
            said.append(
                f"a prediction has {choices} answers as a list, not two or three: {cells[i].source[:50]}…"
            )
    for i in [*places["predict"], *places["bug-hunt"]]:
        reply = next((j for j in places["answer"] if j > i), None)
        folded = reply is not None and "<details>" in cells[reply].source
        run = folded and any(cell.cell_type == "code" for cell in cells[i:reply])
        if not run:
            said.append(f"no code and then a folded answer (tag answer) after: {cells[i].source[:50]}…")
    for i in places["knob"]:
        if not re.match(r"[A-Z][A-Z_]* = .+  # turn this: ", cells[i].source):
            said.append('the knob\'s cell does not begin with "NAME = value  # turn this: …"')
    for i in places["bug-hunt"]:
        if cells[i].cell_type != "code" or len(lines_of(cells[i].source)) > BUG_HUNT:
            said.append(f"the bug hunt is no code cell of at most {BUG_HUNT} lines")
    for i in places["trains"]:
        if "yours.trains(" not in cells[i].source or "experiment" in cells[i].metadata["tags"]:
            said.append("a cell tagged trains does not call yours.trains(…), or CI leaves it out")
    return said


def table(sources: list[Path]) -> str:
    """Each lab's numbers in a row, and below them the rules that are broken."""
    notebooks = {path: read_source(path) for path in sources}
    rows = [counts(notebook, path.stem).row() for path, notebook in notebooks.items()]
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    said = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    for path, notebook in notebooks.items():
        said += [f"{path.stem}: {fault}" for fault in faults(notebook, path.stem)]
    return "\n".join(said)
