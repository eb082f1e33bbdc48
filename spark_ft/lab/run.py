"""Execute every lab from its source, headless, with a line per lab as it goes and a table at the end."""

import argparse
import re
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from spark_ft.lab import HEADLINE_TYPE
from spark_ft.lab.build import BuildError, chosen_labs, execute, read_source

CLEAR = "\r\x1b[K"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Result:
    """How one lab went: `headline` is what its last cell returned; `error` is empty if it passed."""

    name: str
    seconds: float
    headline: str
    error: str


def headline_of(notebook: NotebookNode) -> NotebookNode | None:
    """The `headline` output of an executed lab's last code cell, by MIME type, or None."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    bundles = [output.get("data", {}) for output in cells[-1].outputs] if cells else []
    return next((bundle for bundle in bundles if HEADLINE_TYPE in bundle), None)


def run_lab(source: Path) -> Result:
    """Execute one lab's solved notebook from its source; nothing is written."""
    started = time.perf_counter()
    said, error = "", ""
    try:
        notebook = read_source(source)
        execute(notebook, on_cell=_progress(source.stem, notebook))
        closing = headline_of(notebook)
        if closing:
            said = closing["text/plain"]
        else:
            error = "its last code cell does not end with headline({...})"
    except BuildError as broken:
        error = str(broken)
    except DeadKernelError:
        error = "the kernel died; the usual reason is too little memory"
    except CellExecutionError as failed:
        cell = next(
            i
            for i, c in enumerate(notebook.cells, 1)
            if any(o.output_type == "error" for o in c.get("outputs", []))
        )
        traceback = textwrap.indent(ANSI.sub("", failed.traceback).strip(), "    ")
        error = f"cell {cell} of {len(notebook.cells)}: {failed.ename}: {failed.evalue}\n{traceback}"
    return Result(source.stem, time.perf_counter() - started, said, error)


def _progress(name: str, notebook: NotebookNode):
    if not sys.stdout.isatty():
        return None
    return lambda index: print(
        f"{CLEAR}{name}: cell {index + 1} of {len(notebook.cells)}", end="", flush=True
    )


def table(results: list[Result], width: int = 120) -> str:
    """The closing table: lab, seconds, pass or FAIL, headline result."""
    name = max(len(r.name) for r in results)
    room = max(30, width - name - 18)
    lines = [f"{'lab':<{name}}  {'seconds':>7}  {'':<4}  headline result", "-" * min(width, name + 17 + room)]
    for r in results:
        said = r.headline or r.error.split("\n")[0]
        said = textwrap.shorten(said, room, placeholder=" …")
        lines.append(f"{r.name:<{name}}  {r.seconds:>7.0f}  {'FAIL' if r.error else 'pass'}  {said}")
    passed = sum(not r.error for r in results)
    lines.append(f"{passed} of {len(results)} labs passed in {sum(r.seconds for r in results):.0f} s")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the labs named on the command line; prints tracebacks, and returns 1 if a lab failed."""
    parser = argparse.ArgumentParser(
        prog="spark-ft labs", description="Execute the labs from labs/src, headless."
    )
    _, chosen = chosen_labs(parser, arguments)
    results = []
    live = sys.stdout.isatty()  # a terminal's line is overwritten; a log gets new lines
    for number, source in enumerate(chosen, 1):
        label = f"[{number}/{len(chosen)}] {source.stem}"
        print(f"{label} …", end="" if live else "\n", flush=True)
        result = run_lab(source)
        results.append(result)
        how = "FAIL" if result.error else "pass"
        print(f"{CLEAR if live else ''}{label}: {how}, {result.seconds:.0f} s", flush=True)
        if result.error:
            print(f"\n{result.error}\n", flush=True)
    print("\n" + table(results, shutil.get_terminal_size((120, 24)).columns))
    return 1 if any(r.error for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
