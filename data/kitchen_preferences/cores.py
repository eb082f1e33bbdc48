"""What the generators of data/ share: hand-written cores, both spellings of a quantity, and writing files."""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
QUANTITY = re.compile(r"\{([^|{}]+)\|([^|{}]+)\}")  # {metric|imperial}
FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4"}
FRACTIONS |= {"⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅙": "1/6"}


class Core(NamedTuple):
    name: str
    questions: list[str]  # several ways to ask for the same thing
    answers: list[str]  # several wordings that each answer any of the questions, quantities in both spellings


def read_cores(split: str) -> list[Core]:
    """The cores of cores_train.txt or cores_test.txt: `# name`, `Q: question`, `A: answer`."""
    cores = []
    for line in (HERE / f"cores_{split}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            cores.append(Core(line[2:], [], []))
        elif line:
            (cores[-1].questions if line.startswith("Q: ") else cores[-1].answers).append(line[3:])
    return cores


def metric(answer: str, style: int) -> str:
    """The answer in metric units; styles 0, 1, 2 differ in how they write grams and degrees."""
    text = QUANTITY.sub(r"\1", answer).replace("-18°", "−18°")
    if style != 2:
        text = re.sub(r"(?<=\d) g\b", " grams", text)
    if style > 0:
        text = text.replace("°C", " degrees Celsius" if style == 1 else " degrees C", 1)
    return re.sub(r"(?<=\d)°", " °", text)


def imperial(answer: str, style: int) -> str:
    """The answer in imperial units; styles 0, 1, 2 differ in how they write fractions, ounces and degrees."""
    text = QUANTITY.sub(r"\2", answer)
    if style == 0:
        text = re.sub(r"(\d?)([½⅓⅔¼¾⅛⅜⅝⅞⅙])", lambda m: f"{m[1]} {FRACTIONS[m[2]]}".strip(), text)
    if style == 1:
        text = text.replace("°F", " degrees Fahrenheit", 1)
    if style != 1:
        text = re.sub(r"(?<=[\d½¾])([ -])ounces?\b", r"\1oz", text)
    return re.sub(r"(?<=\d)°", " °", text)


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_or_check(folder: Path, texts: dict[str, str], about: str) -> int:
    """Write each file whole, or with --check only compare; the exit status is 1 if one differs."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    check = parser.parse_args().check
    stale = []
    for name, text in texts.items():
        path = folder / name
        if check:
            if not path.exists() or path.read_bytes() != text.encode():
                stale.append(name)
        else:
            part = path.with_name(path.name + ".part")
            part.write_bytes(text.encode())
            os.replace(part, path)
    if stale:
        print(f"{', '.join(stale)}: not what generate.py makes; run it without --check", file=sys.stderr)
    return 1 if stale else 0
