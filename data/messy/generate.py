"""Writes train.jsonl and faults.json: written rows with faults planted on purpose; `--check` only compares.

source.txt holds the clean rows and those written to be broken. This script breaks the encoding, spins the
loops, copies rows exactly and nearly, and lets rows of the two test sets leak in.
"""

import json
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE.parent
sys.path.insert(0, str(DATA / "kitchen_preferences"))

from cores import jsonl, write_or_check  # noqa: E402

SEED = 3
LOOP = re.compile(r"\{([^{}]+)\}x(\d+)")  # {text}x3 is the text three times
NEAR_COPIES = [  # how a clean row begins, then one light edit
    ("What can replace buttermilk?", "five minutes, or thin", "five minutes – or thin"),
    ("Why do I have to soak dried mushrooms?", "which is the better half", "the better half"),
    ("Does alcohol burn off", "Not all of it.", "Not all of it!"),
    ("How do restaurants serve", "How do restaurants", "How do big restaurants"),
    ("What do I tell a guest", "came in this morning", "arrived this morning"),
    ("How do I laminate dough", "Then roll out and shape.", "Then roll out, and shape!"),
    ("What is the white stuff", "more gently next time", "more gently another time"),
    ("How do I clean a burnt pot?", "Cover the bottom with", "cover the bottom with"),
    ("How do I open an oyster?", "until it pops, then", "until it pops and then"),
    ("How can I keep a sourdough starter", "thin layer and crumble it", "thin layer, crumble it"),
    ("How do I read a thermometer log", 'One "time temp" per line.', 'One "time temp" on each line.'),
    ("Can I freeze milk?", "thaw it in the fridge", "thaw it  in the fridge"),
]
CHARSETS = ("cp1252", "latin-1")  # what a UTF-8 file is mistaken for


def read_source() -> dict[str, list[dict]]:
    """Kind -> rows: `## kind`, then `Q: ` and `A: `, an answer running on to the next mark."""
    kinds: dict[str, list[dict]] = {}
    for part in re.split(r"^## ", (HERE / "source.txt").read_text(encoding="utf-8"), flags=re.M)[1:]:
        kind, text = part.split("\n", 1)
        blocks = re.findall(r"^Q: (.*?)\nA: (.*?)(?=\n+Q: |\n*\Z)", text, flags=re.M | re.S)
        kinds[kind] = [{"prompt": prompt, "completion": completion} for prompt, completion in blocks]
    return kinds


def read_rows(path: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / path).read_text(encoding="utf-8").splitlines()]


def garble(text: str, way: int) -> str:
    """The text as a wrong decoding leaves it, once or twice, or after what cannot be shown was replaced."""
    if way % 3 == 2:
        return "".join(letter if letter.isascii() else "\ufffd" for letter in text)
    for _ in range(2 if way % 6 == 4 else 1):
        pairs = (bytes([byte]) for byte in text.encode())
        text = "".join(_decode(byte, CHARSETS[way % 2]) for byte in pairs)
    return text


def _decode(byte: bytes, charset: str) -> str:
    try:
        return byte.decode(charset)
    except UnicodeDecodeError:  # five bytes mean nothing in cp1252; programs pass them through
        return byte.decode("latin-1")


def words(text: str) -> set[tuple[str, ...]]:
    """Word trigrams, numbers all alike, as kitchen_tickets compares its splits."""
    found = re.findall(r"[a-z]+|[0-9]", text.lower())
    return set(zip(found, found[1:], found[2:], strict=False))


def overlap(a: set, b: set) -> float:
    return len(a & b) / max(len(a | b), 1)


def honest_tickets(count: int) -> list[dict]:
    """Train tickets that resemble no test ticket and not each other: rows that look leaked and are not."""
    rows = read_rows("kitchen_tickets/test.jsonl")
    tests = [words(row["prompt"] + " " + row["completion"]) for row in rows]
    chosen: list[dict] = []
    for row in read_rows("kitchen_tickets/train.jsonl"):
        grams = words(row["prompt"] + " " + row["completion"])
        if all(overlap(grams, other) < 0.4 for other in tests) and len(row["prompt"]) > 90:
            chosen.append({key: row[key] for key in ("prompt", "completion")})
            tests.append(grams)
        if len(chosen) == count:
            return chosen
    told = f"kitchen_tickets/train.jsonl has fewer than {count} rows unlike its test rows"
    raise SystemExit(f"{told}; ask for fewer")


def leaks(rng: random.Random) -> list[dict]:
    """Six rows of each test set: three as they are, three with a light edit."""
    tickets = [row for row in read_rows("kitchen_tickets/test.jsonl") if len(row["prompt"]) > 100]
    pairs = [row for row in read_rows("kitchen_preferences/test.jsonl") if len(row["chosen"]) > 100]
    rows = []
    for row in rng.sample(tickets, 6):
        edit = len(rows) % 2
        rows.append({"prompt": row["prompt"] + " Thanks!" * edit, "completion": row["completion"]})
    for row in rng.sample(pairs, 6):
        edit = len(rows) % 2
        answer = row["chosen"].rstrip(".") + "!" if edit else row["chosen"]
        rows.append({"prompt": "Quick one: " * edit + row["prompt"], "completion": answer})
    return rows


def make() -> tuple[list[dict], dict[str, str]]:
    rng = random.Random(SEED)
    source = read_source()
    clean = source["clean"] + honest_tickets(9)
    # kind, row, what it copies
    rows: list[tuple[str, dict, dict | None]] = [("clean", row, None) for row in clean]
    originals = []
    for start, old, new in NEAR_COPIES:
        (row,) = [row for row in clean if row["prompt"].startswith(start)]
        copy = {key: value.replace(old, new) for key, value in row.items()}
        if copy == row:
            raise SystemExit(f"{start!r}: the edit {old!r} changes nothing; mend NEAR_COPIES")
        rows.append(("near_duplicate", copy, row))
        originals.append(row)
    code = [row for row in clean if "```" in row["completion"] and row not in originals]
    taken = code + originals
    prose = [row for row in source["clean"] if row not in taken and len(row["completion"]) > 40]
    for row in rng.sample(code, 2) + rng.sample(prose, 10):
        rows.append(("exact_duplicate", dict(row), row))
    for way, row in enumerate(source["encoding"]):
        rows.append(("encoding", {key: garble(text, way) for key, text in row.items()}, None))
    for row in source["repetition"]:
        text = LOOP.sub(lambda loop: loop[1] * int(loop[2]), row["completion"]).strip()
        rows.append(("repetition", {"prompt": row["prompt"], "completion": text}, None))
    rows += [(kind, row, None) for kind in ("cut_off", "refusal") for row in source[kind]]
    rows += [("leaked", row, None) for row in leaks(rng)]
    rng.shuffle(rows)
    for i, (_, _, original) in enumerate(rows):  # a copy comes after what it copies, so the first can stay
        if original is not None:
            j = next(j for j, other in enumerate(rows) if other[1] is original)
            if j > i:
                rows[i], rows[j] = rows[j], rows[i]
    numbered = [{"id": f"m{i:03}", **row} for i, (_, row, _) in enumerate(rows, start=1)]
    faults = {f"m{i:03}": kind for i, (kind, _, _) in enumerate(rows, start=1) if kind != "clean"}
    return numbered, faults


if __name__ == "__main__":
    rows, faults = make()
    texts = {"train.jsonl": jsonl(rows), "faults.json": json.dumps(faults, indent=1) + "\n"}
    sys.exit(write_or_check(HERE, texts, __doc__.splitlines()[0]))
