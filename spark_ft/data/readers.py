"""Files as people have them, read row by row: JSONL, JSON, CSV, Parquet, paragraphs, each also as .gz."""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from spark_ft.data.formats import without_nulls
from spark_ft.data.records import decode_line

Numbered = Iterable[tuple[int, Any]]  # line or row number, and the row, or the ValueError that says its fault

_ALIEN = {  # how a file begins that is none of those read here
    b"PK\x03\x04": "an Excel workbook or a zip archive",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"ARROW1": "an Arrow file",
    b"%PDF": "a PDF",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_file(path: Path, is_row: Callable[[dict], object]) -> tuple[str, str, Numbered]:
    """How a file is written, what stands between its name and a row's number, and its rows.

    Args:
        is_row: whether a JSON object that is a file of its own is a row, and not a box with a list of rows.

    Raises:
        ValueError: the file cannot be read at all; a single row's fault comes in its place.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path (relative ones start at {Path.cwd()})")
    data, suffix, packed = path.read_bytes(), Path(path.name.lower().removesuffix(".gz")).suffix, ""
    if data.startswith(b"\x1f\x8b"):
        packed = ", packed by gzip"
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip file is damaged ({error}); get it again") from error
    if alien := next((what for start, what in _ALIEN.items() if data.startswith(start)), None):
        raise ValueError(f"{path}: this is {alien}; save it as CSV or JSONL, in UTF-8")
    if data.startswith(b"PAR1"):
        return f"Parquet{packed}", ", row ", _parquet(path, data)
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if not start:
        raise ValueError(f"{path}: an empty data set; it needs at least one row")
    if suffix not in (".csv", ".tsv", ".txt", ".md") and start != b"[" and not _is_json(data):
        if start != b"{" and suffix not in (".json", ".jsonl", ".ndjson"):
            kinds = ".jsonl, .json, .csv, .tsv, .parquet and .txt, each also as .gz"
            raise ValueError(f"{path}: what a {suffix or 'nameless'} file holds is unknown; use {kinds}")
        return f"JSONL{packed}", ":", _lines(data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8; save the file as UTF-8 (in Excel: CSV UTF-8)") from error
    if suffix in (".txt", ".md"):
        return f"plain text, a row per paragraph{packed}", ":", _paragraphs(text)
    if suffix in (".csv", ".tsv"):
        delimiter = max(",;\t|", key=text.partition("\n")[0].count)
        return f"CSV with {delimiter!r} between cells{packed}", ":", _table(path, text, delimiter)
    return f"JSON{packed}", ", row ", enumerate(_array(path, text, is_row), 1)


def _is_json(data: bytes) -> bool:
    """Whether a file is one JSON value, and not one per line."""
    with suppress(ValueError, RecursionError):
        json.loads(data)
        return True
    return False


def _lines(data: bytes) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                yield number, decode_line(line, number)
            except ValueError as error:
                yield number, error


def _array(path: Path, text: str, is_row: Callable[[dict], object]) -> list[Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        fault = f"{path}:{error.lineno}: malformed JSON at column {error.colno} ({error.msg})"
        raise ValueError(f"{fault}; mend it, or write JSONL, where other rows stay whole") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: JSON that cannot be read ({error}); write an object per line") from error
    if isinstance(value, dict) and not is_row(value):
        lists = [name for name, rows in value.items() if isinstance(rows, list)]
        if len(lists) > 1:
            said = ", ".join(f'"{name}"' for name in lists)
            raise ValueError(f"{path}: one object with {said}; write the rows of one of them as a JSON array")
        value = value[lists[0]] if lists else value
    return value if isinstance(value, list) else [value]


def _table(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    before, start = csv.field_size_limit(2**31 - 1), 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            if not columns:
                columns = [name.strip() or f"column {i}" for i, name in enumerate(cells, 1)]
                if twice := [name for name, count in Counter(columns).items() if count > 1]:
                    raise ValueError(f'{path}:1: two columns are called "{twice[0]}"; rename one')
            elif cells and len(cells) != len(columns):
                mend = f"put a cell that holds {delimiter!r} or a new line into double quotes"
                yield start, ValueError(f"{len(cells)} cells where the first line has {len(columns)}; {mend}")
            elif any(cells):
                yield start, dict(zip(columns, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        mend = "a quote inside a quoted cell is written twice; nothing from this line on was read"
        yield start, ValueError(f"a cell's quotes do not close ({error}); {mend}")
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: the Parquet file is damaged ({error}); get it again") from error
    return enumerate(map(without_nulls, rows), 1)


def _paragraphs(text: str) -> Iterator[tuple[int, Any]]:
    line = 1
    for piece in re.split(r"(\n\s*\n)", text.replace("\r\n", "\n")):
        if piece.strip():
            yield line, {"text": piece.strip("\n")}
        line += piece.count("\n")
