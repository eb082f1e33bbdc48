"""The kitchen tickets: what the card says of them is so, and held-out rows are held out."""

import hashlib
import importlib.util
import json
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest

from spark_ft.data.chat import render
from spark_ft.data.records import read_records
from spark_ft.models import load_tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "kitchen_tickets"
SPLITS = ("train", "validation", "test")
rows = {split: read_records(FOLDER / f"{split}.jsonl", "sft") for split in SPLITS}
every_row = [row for split in SPLITS for row in rows[split]]
WORDS = {"one": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("kitchen_tickets_generate", FOLDER / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(text: str) -> list[str]:
    """Lower case, no punctuation, each number a #: what two notes are compared by."""
    return ["#" if w.isdigit() or w in WORDS else w for w in re.findall(r"[a-z]+|\d+", text.lower())]


def test_the_card_tells_each_files_counts_tokens_and_hash():
    card = (FOLDER / "README.md").read_text()
    tokenizer = load_tokenizer()
    for split in SPLITS:
        rendered = [render(row, tokenizer) for row in rows[split]]
        lengths = [len(prompt) + len(completion) for prompt, completion in rendered]
        answers = [len(completion) for _, completion in rendered]
        digest = hashlib.sha256((FOLDER / f"{split}.jsonl").read_bytes()).hexdigest()
        means = " | ".join(f"{statistics.mean(counts):.1f}" for counts in (lengths, answers))
        line = f"| {split}.jsonl | {len(lengths)} | {means} | {max(lengths)} | `{digest}` |"
        assert line in card, f"the card should have this line: {line}"
        assert max(answers) < 64, "labs generate 64 tokens at most"
    note = tokenizer(rows["train"][0]["prompt"], add_special_tokens=False).input_ids
    own = len(render(rows["train"][0], tokenizer)[0]) - len(note) + 1  # and the answer's end of turn
    assert f"{own} of them are the template's own" in card
    card = (FOLDER / "README.md").read_text()
    count = {}
    for phrasing in ("seen", "unseen"):
        count[phrasing] = len({r["style"] for s in SPLITS for r in rows[s] if r["phrasing"] == phrasing})
    seen, unseen = (dishes_of(kind) for kind in ("seen", "unseen"))
    assert f"| train, validation | {count['seen']} seen | {len(seen)} seen | 600, 100 |" in card
    assert f"| test | {count['unseen']} unseen | {len(unseen)} unseen | 50 |" in card
    assert (count["seen"] >= 12, count["unseen"] >= 8, len(seen) >= 40, len(unseen) >= 15) == (True,) * 4
    parts = {split: Counter((row["phrasing"], row["dishes"]) for row in rows[split]) for split in SPLITS}
    test = {("seen", "seen"): 100, ("unseen", "seen"): 50, ("unseen", "unseen"): 50}
    assert parts == {"train": {("seen", "seen"): 600}, "validation": {("seen", "seen"): 100}, "test": test}


def test_the_cards_example_is_a_ticket_that_the_generator_could_write(generator):
    card = (FOLDER / "README.md").read_text()
    note = re.search(r"> Kitchen ticket as JSON:\n> (.*)\n", card)[1]
    order = json.loads(re.search(r"```json\n(.*)\n```", card)[1])
    style = next(style for style in generator.SEEN_STYLES if style.name == "hey")
    notes = {generator.write_note(generator.random.Random(seed), order, style) for seed in range(40)}
    assert note in notes


def dishes_of(kind: str) -> set[str]:
    tickets = (json.loads(row["completion"]) for s in SPLITS for row in rows[s] if row["dishes"] == kind)
    return {item["dish"] for ticket in tickets for item in ticket["items"]}


def test_every_ticket_is_compact_ordered_and_what_its_note_says():
    for row in every_row:
        ticket = json.loads(row["completion"])
        assert row["completion"] == json.dumps(ticket, separators=(",", ":"))
        assert list(ticket) == ["table", "items"]
        assert 1 <= ticket["table"] <= 30
        assert 1 <= len(ticket["items"]) <= 2
        for item in ticket["items"]:
            assert list(item) == [key for key in ("qty", "dish", "how", "no", "add") if key in item]
            assert item["qty"] in (1, 2, 3, 4)
            assert all(text for text in item.values())
            wishes = len(item) - 2
            assert wishes <= (2 if len(ticket["items"]) == 1 else 1), "the card promises no more"
    for row in every_row:
        note = row["prompt"].removeprefix("Kitchen ticket as JSON:\n")
        assert note != row["prompt"], "the lead-in is the same in every row"
        ticket = json.loads(row["completion"])
        texts = [value for item in ticket["items"] for value in item.values() if isinstance(value, str)]
        for text in texts:
            assert re.search(rf"(?<![a-z]){re.escape(text)}(?![a-z])", note), f"{text!r} is not in {note!r}"
        numbers = Counter(WORDS.get(w) or int(w) for w in re.findall(r"\d+|one|two|three|four", note.lower()))
        wanted = Counter([ticket["table"], *(item["qty"] for item in ticket["items"])])
        assert wanted <= numbers, f"a number of {row['completion']} is not in {note!r}"


def test_a_note_says_nothing_of_food_that_its_ticket_leaves_out(generator):
    menu = {dish.name: dish for dish in [*generator.SEEN_DISHES, *generator.UNSEEN_DISHES]}
    for row in every_row:
        ticket = json.loads(row["completion"])
        rest = row["prompt"].lower()
        asked = [value for item in ticket["items"] for value in item.values() if isinstance(value, str)]
        for text in sorted(asked, key=len, reverse=True):
            rest = rest.replace(text, "", 1)
        for item in ticket["items"]:
            dish = menu[item["dish"]]
            for wish in filter(None, "|".join([dish.how, dish.no, dish.add]).split("|")):
                left = re.search(rf"(?<![a-z]){re.escape(wish)}(?![a-z])", rest)
                assert not left, f"{wish!r} is left in {rest!r}"


def test_unseen_dishes_and_phrasings_are_nowhere_in_train_or_validation_and_of_their_own(generator):
    learned = rows["train"] + rows["validation"]
    notes = "\n".join(row["prompt"].lower() for row in learned)
    unseen = dishes_of("unseen")
    assert not unseen & dishes_of("seen")
    assert not [dish for dish in unseen if dish in notes]
    styles = {"seen": set(), "unseen": set()}
    for row in rows["test"]:
        styles[row["phrasing"]].add(row["style"])
    assert styles["seen"] == {row["style"] for row in learned}, "each seen phrasing is trained on and tested"
    assert not styles["unseen"] & styles["seen"]
    """Two phrasings differ in what is left of a note once dishes, wishes and numbers are taken away."""
    order = {"table": 7, "items": [{"qty": 2, "dish": "dish", "how": "how", "no": "no", "add": "add"}] * 2}
    frames = {}
    for style in [*generator.SEEN_STYLES, *generator.UNSEEN_STYLES]:
        notes = (generator.write_note(generator.random.Random(seed), order, style) for seed in range(20))
        frames[style.name] = {re.sub(r"\w*\d+|two|dish|how|no|add", "", note, flags=re.I) for note in notes}
    names = list(frames)
    assert len(names) == len(set(names)) == len(generator.SEEN_STYLES) + len(generator.UNSEEN_STYLES)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert not frames[name] & frames[other], f"{name} and {other} can write the same note"


def test_no_note_is_nearly_equal_across_splits_or_twice_in_one_and_no_order_in_two():
    def trigrams(row):
        w = words(row["prompt"])
        return set(zip(w, w[1:], w[2:], strict=False))

    grams = {split: list(map(trigrams, rows[split])) for split in SPLITS}
    for held_out, earlier in (("validation", ["train"]), ("test", ["train", "validation"])):
        known = [g for split in earlier for g in grams[split]]
        for row, g in zip(rows[held_out], grams[held_out], strict=True):
            nearest = max(len(g & k) / len(g | k) for k in known)
            assert nearest < 0.6, f"{row['prompt']!r}: {nearest:.0%} of its trigrams are an earlier one's"

    def order(row):
        ticket = json.loads(row["completion"])
        return json.dumps({key: value for key, value in ticket.items() if key != "table"})

    orders = {split: {order(row) for row in rows[split]} for split in SPLITS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not orders[a] & orders[b], f"{a} and {b} share orders"
    for split in SPLITS:
        notes = [tuple(words(row["prompt"])) for row in rows[split]]
        assert len(set(notes)) == len(notes), f"{split} has a note twice"
