"""The hand-written data sets: files match cards and generators, rows are what they claim, splits apart."""

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from spark_ft.data.formats import sharegpt_to_messages
from spark_ft.data.judge import IMPERIAL, METRIC, is_metric
from spark_ft.data.records import read_records
from spark_ft.stats import wilson_interval

DATA = Path(__file__).parents[1] / "data"
SETS = ("kitchen_preferences", "kitchen_feedback", "kitchen_chats", "messy")
GENERATED = ("kitchen_tickets", "kitchen_preferences", "kitchen_feedback", "messy")
NEAR = 0.7  # word trigrams shared, |A∩B| / |A∪B|, from which two texts count as near duplicates

pairs = {s: read_records(DATA / f"kitchen_preferences/{s}.jsonl", "preference") for s in ("train", "test")}
feedback = read_records(DATA / "kitchen_feedback/train.jsonl", "feedback")
chats = [row["conversations"] for row in read_records(DATA / "kitchen_chats/train.jsonl", "sharegpt")]
messy = read_records(DATA / "messy/train.jsonl", "sft")
faults = json.loads((DATA / "messy/faults.json").read_text())

sys.path.insert(0, str(DATA / "kitchen_preferences"))
import cores  # noqa: E402


def test_the_card_states_the_hash_of_every_file_and_shows_a_row():
    for name in SETS:
        card = (DATA / name / "README.md").read_text(encoding="utf-8")
        files = [path for path in sorted((DATA / name).iterdir()) if path.suffix in (".jsonl", ".json")]
        assert files
        for path in files:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            (line,) = [line for line in card.splitlines() if line.startswith(f"| {path.name} |")]
            assert digest in line, f"{name}/README.md: the hash of {path.name} is {digest}"
        assert "Apache-2.0" in card
    card = (DATA / "kitchen_preferences/README.md").read_text(encoding="utf-8")
    assert any(f"| {row['chosen']} | {row['rejected']} |" in card for row in pairs["train"])


@pytest.mark.parametrize("name", GENERATED)
def test_the_generator_reproduces_its_files_and_notices_a_change(name, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "measurements")
    folder = shutil.copytree(DATA, tmp_path / "data", ignore=ignored) / name

    def files():
        return {p: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".jsonl", ".json")}

    def run(*arguments, hash_seed="0"):
        command = [sys.executable, str(folder / "generate.py"), *arguments]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    before, beside = files(), len([*folder.iterdir()])
    for hash_seed in ("1", "77"):
        for path in before:
            path.unlink()
        assert run("--check").returncode == 1
        assert files() == {}, "a check writes nothing"
        assert run(hash_seed=hash_seed).returncode == 0
        assert files() == before
        assert len([*folder.iterdir()]) == beside, "nothing else is written"
    assert run("--check").returncode == 0
    *others, last = before
    last.write_bytes(changed := before[last].replace(b"e", b"E", 1))
    for path in others:
        path.unlink()
    told = run("--check")
    assert told.returncode == 1
    assert all(path.name in told.stderr for path in before)
    assert "not what generate.py makes; run it without --check" in told.stderr
    assert files() == {last: changed}


def test_the_search_counts_in_whole_numbers_so_that_every_python_finds_the_same_plan():
    generator = runpy.run_path(str(DATA / "kitchen_preferences/generate.py"))
    core = cores.read_cores("test")[0]
    counts = [generator["cells"](generator["pairs"](core, plan)) for plan in generator["plans"](core)]
    assert {type(weight) for count in counts for weight in count.values()} == {int}


def test_pairs_are_as_many_as_the_card_says_metric_against_imperial_in_two_wordings():
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 300, "test": 100}
    names = {split: {row["core"] for row in rows} for split, rows in pairs.items()}
    assert len(names["train"]) == 100
    assert len(names["test"]) == 50
    assert not names["train"] & names["test"]
    for rows in pairs.values():
        assert len({row["prompt"] for row in rows}) == len(rows)
        assert len({row["chosen"] for row in rows}) == len(rows)
    for row in pairs["train"] + pairs["test"]:
        units = [[bool(u.search(row[key])) for u in (METRIC, IMPERIAL)] for key in ("rejected", "prompt")]
        assert is_metric(row["chosen"]), row["chosen"]
        assert units == [[False, True], [False, False]], row
        chosen, rejected = (re.sub(r"[\d½⅓⅔¼¾⅛⅜⅝⅞⅙/]+", "#", row[key]) for key in ("chosen", "rejected"))
        assert jaccard(trigrams(chosen), trigrams(rejected)) < 0.6, row


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answer_written_for_a_question_is_chosen_as_often_as_rejected(split):
    cored = cores.read_cores(split)
    written = {question: core.answers[i] for core in cored for i, question in enumerate(core.questions)}

    def own(row: dict, key: str, render) -> bool:
        return row[key] in [render(written[row["prompt"]], style) for style in range(3)]

    chosen = sum(own(row, "chosen", cores.metric) for row in pairs[split])
    rejected = sum(own(row, "rejected", cores.imperial) for row in pairs[split])
    assert chosen + rejected > len(pairs[split]) / 3
    assert abs(chosen - rejected) <= 0.05 * len(pairs[split]), (chosen, rejected)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_core_has_no_unit_outside_its_braces(split):
    for core in cores.read_cores(split):
        assert len(core.questions) == len(core.answers) == {"train": 3, "test": 2}[split]
        for answer in core.answers:
            assert cores.QUANTITY.search(answer), answer
            bare = cores.QUANTITY.sub("some", answer)
            found = METRIC.search(bare), IMPERIAL.search(bare), re.search(r"[{}|]", bare)
            assert found == (None, None, None), bare


UNITS = {
    "g": ("g", 1), "kg": ("g", 1000), "ounce": ("g", 28.35), "pound": ("g", 453.6), "ml": ("ml", 1),
    "litre": ("ml", 1000), "cup": ("ml", 240), "quart": ("ml", 946), "fluid ounce": ("ml", 29.57),
    "tablespoon": ("ml", 14.8), "cm": ("mm", 10), "mm": ("mm", 1), "inch": ("mm", 25.4),
    "°C": ("°C", 1), "°F": ("°F", 1),
}  # fmt: skip


def measure(text: str) -> tuple[list[float], str]:
    """Numbers in the base unit, and that unit: "1½ cups" is ([360], "ml"), "54 to 57°C" ([54, 57], "°C")."""
    text = re.sub(r"\b(?:a |scant |packed )", "", text).replace("inches", "inch")
    text = re.sub(r"(?<=\d|[½⅓⅔¼¾⅛⅜⅝⅞⅙])-", " ", text)
    units = r"(.*?)\s*(fluid ounce|ounce|pound|cup|quart|inch|litre|tablespoon|kg|g|ml|cm|mm|°C|°F)s?"
    number, unit = re.fullmatch(units, text).groups()
    base, factor = UNITS[unit]
    return [read_number(part) * factor for part in re.split(" (?:to|by|and) ", number)], base


def read_number(text: str) -> float:
    if "/" in text:
        return float(text.split("/")[0]) / float(text.split("/")[1])
    whole, fraction = re.fullmatch(r"(-?[\d.]*)([½⅓⅔¼¾⅛⅜⅝⅞⅙]?)", text).groups()
    parts = cores.FRACTIONS[fraction].split("/") if fraction else ("0", "1")
    return float(whole or (0 if fraction else 1)) + float(parts[0]) / float(parts[1])


@pytest.mark.parametrize("split", ["train", "test"])
def test_both_spellings_of_a_quantity_agree(split):
    """Within kitchen rounding; a weight against a volume has to be a density that food can have."""
    checked = Counter()
    for core in cores.read_cores(split):
        for answer in core.answers:
            for spellings in cores.QUANTITY.findall(answer):
                (metric, unit), (imperial, other) = map(measure, spellings)
                assert len(metric) == len(imperial)
                checked[unit] += 1
                for a, b in zip(metric, imperial, strict=True):
                    if unit == "°C":  # or a difference
                        near = abs(a * 9 / 5 + 32 - b) <= 8 or a * 9 / 5 == pytest.approx(b, abs=1)
                    elif unit == other:
                        near = abs(a / b - 1) <= {"mm": 0.25, "g": 0.15, "ml": 0.2}[unit]
                    else:
                        assert (unit, other) in (("g", "ml"), ("ml", "g"))
                        near = 0.1 <= (a / b if unit == "g" else b / a) <= 1.5
                    assert near, (core.name, spellings)
    assert min(checked.values()) > 20, checked


def lengths(rows: list[dict], tokenizer=None) -> np.ndarray:
    """(pairs, 2): the lengths of chosen and rejected, in tokens of the tokenizer or else in characters."""
    size = (lambda text: len(tokenizer(text)["input_ids"])) if tokenizer else len
    return np.array([[size(row["chosen"]), size(row["rejected"])] for row in rows], dtype=float)


def fit(sizes: np.ndarray) -> np.ndarray:
    """Logistic regression of "the first is chosen" on what the two lengths tell, by Newton's steps."""
    x = features(sizes)
    weights = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ weights))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(x.shape[1])
        weights += np.linalg.solve(curvature, x.T @ (1 - p) - 1e-3 * weights)
    return weights


def features(sizes: np.ndarray) -> np.ndarray:
    """Odd in the order of the two, so that a pair and its mirror image are one example."""
    difference = (sizes[:, 0] - sizes[:, 1]) / sizes.mean()
    total = sizes.sum(axis=1) / sizes.mean() - 2
    return np.stack([difference, np.sign(difference), difference**3, difference * total], axis=1)


def hits(weights: np.ndarray, sizes: np.ndarray) -> float:
    score = features(sizes) @ weights
    return float((score > 0).sum() + (score == 0).sum() / 2)  # equal lengths: a coin


def at_chance(right: float, count: int) -> bool:
    interval = wilson_interval(round(right), count)
    return interval.low <= 0.5 <= interval.high


@pytest.mark.parametrize("unit", ["characters", "tokens"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_chosen_and_rejected_are_equally_long(split, unit, tokenizer):
    sizes = lengths(pairs[split], tokenizer if unit == "tokens" else None)
    assert 0.95 <= (sizes[:, 0] / sizes[:, 1]).mean() <= 1.05
    assert 0.95 <= sizes[:, 0].sum() / sizes[:, 1].sum() <= 1.05
    quarters = np.array_split(sizes[np.argsort(sizes.sum(axis=1))], 4)
    for quarter in [sizes, *quarters]:  # overall, and at every length
        longer = (quarter[:, 0] > quarter[:, 1]).sum() + (quarter[:, 0] == quarter[:, 1]).sum() / 2
        assert at_chance(longer, len(quarter)), (longer, len(quarter))


@pytest.mark.parametrize("unit", ["characters", "tokens"])
def test_a_classifier_that_sees_only_lengths_is_at_chance(unit, tokenizer):
    unit_tokenizer = tokenizer if unit == "tokens" else None
    train, test = lengths(pairs["train"], unit_tokenizer), lengths(pairs["test"], unit_tokenizer)
    right = hits(fit(train), test)
    assert at_chance(right, len(test)), right

    # and cross-validated inside train, a core in one fold only
    names = sorted({row["core"] for row in pairs["train"]})
    fold = np.array([names.index(row["core"]) % 10 for row in pairs["train"]])
    right = sum(hits(fit(train[fold != k]), train[fold == k]) for k in range(10))
    assert at_chance(right, len(train)), right


def test_that_classifier_does_find_a_length_bias():
    """The control: where most of the shorter chosen are left out, it must do better than chance."""

    train, test = (lengths(pairs[split]) for split in ("train", "test"))
    train, test = (x[(x[:, 0] > x[:, 1]) | (np.arange(len(x)) % 4 == 0)] for x in (train, test))
    assert not at_chance(hits(fit(train), test), len(test))


def test_thumbs_are_three_up_to_one_down_follow_the_judge_and_repeat_no_pair():
    assert Counter(row["label"] for row in feedback) == {True: 300, False: 100}
    assert all(is_metric(row["completion"]) == row["label"] for row in feedback)
    assert len({(row["prompt"], row["completion"]) for row in feedback}) == 400
    halves = {(row["prompt"], row[key]) for row in pairs["train"] for key in ("chosen", "rejected")}
    assert not halves & {(row["prompt"], row["completion"]) for row in feedback}
    assert not {row["prompt"] for row in pairs["test"]} & {row["prompt"] for row in feedback}


@pytest.mark.parametrize("unit", ["characters", "tokens"])
def test_thumbs_up_and_down_are_equally_long(unit, tokenizer):
    size = (lambda text: len(tokenizer(text)["input_ids"])) if unit == "tokens" else len
    thumbs = [(size(row["completion"]), row["label"]) for row in feedback]
    up, down = ([length for length, label in thumbs if label is it] for it in (True, False))
    assert 0.95 <= mean(up) / mean(down) <= 1.05
    wins = mean((a > b) + (a == b) / 2 for a in up for b in down)  # the area under the ROC curve
    error = (wins * (1 - wins) / len(down)) ** 0.5  # the smaller class bounds what is known
    assert abs(wins - 0.5) < 1.96 * error, wins


def test_chats_are_sharegpt_hold_what_stresses_a_converter_and_render(tokenizer):
    assert len(chats) == 40
    assert len({json.dumps(chat) for chat in chats}) == 40
    for chat in chats:
        assert all(set(turn) == {"from", "value"} and turn["value"] == turn["value"].strip() for turn in chat)
        speakers = [turn["from"] for turn in chat]
        turns = speakers[1:] if speakers[0] == "system" else speakers
        assert turns == ["human", "gpt"] * (len(turns) // 2)
        assert 2 <= len(turns) // 2 <= 5
    assert sum(chat[0]["from"] == "system" for chat in chats) == 7
    assert {sum(turn["from"] == "gpt" for turn in chat) for chat in chats} == {2, 3, 4, 5}
    text = "\n".join(turn["value"] for chat in chats for turn in chat)
    for sample in ("½", "°C", "è", "🥞", "```python\n", "\n    ", "\n|---|", "{{ title }}", "«", "€"):
        assert sample in text, sample
    assert "<|im_" not in text  # the template's own marks would be taken for its own
    for chat in chats:
        messages = sharegpt_to_messages({"conversations": chat})["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert all(turn["value"] in text for turn in chat)


def test_faults_are_listed_and_clean_rows_hold_what_a_careless_clean_up_destroys():
    assert [row["id"] for row in messy] == [f"m{i:03}" for i in range(1, 301)]
    assert set(faults) <= {row["id"] for row in messy}
    kinds = ("exact_duplicate", "near_duplicate", "refusal", "cut_off", "encoding", "leaked")
    assert Counter(faults.values()) == {**dict.fromkeys(kinds, 12), "repetition": 10}
    clean = [row["completion"] for row in messy if row["id"] not in faults]
    assert len(clean) == 218
    assert sum("```" in answer for answer in clean) >= 15
    assert sum(answer.endswith("```") for answer in clean) >= 10
    assert any("\n\tlp " in answer for answer in clean)  # a Makefile's tab
    assert any("  \n" in answer for answer in clean)  # Markdown's line break
    assert any("\n\n\ndef " in answer for answer in clean)  # Python's two empty lines
    assert any("PÃO" in answer for answer in clean)
    assert sum("sorry" in answer.lower() for answer in clean) >= 3
    assert sum(re.search(r"\n(?:- |\d\. ).*\w$", answer) is not None for answer in clean) >= 4


def test_duplicates_follow_a_clean_original_and_clean_rows_are_all_different():
    seen: dict[str, set] = {}
    for row in messy:
        kind, grams = faults.get(row["id"]), trigrams(text_of(row))
        best = max((jaccard(grams, other) for other in seen.values()), default=0.0)
        earlier = [other for other in messy if other["id"] in seen]
        if kind == "exact_duplicate":
            assert any({**other, "id": row["id"]} == row for other in earlier)
        elif kind == "near_duplicate":
            assert best >= 0.8
            assert not any(text_of(row) == text_of(other) for other in earlier)
        else:
            assert best < 0.4, row
        if kind is None:
            seen[row["id"]] = grams


def text_of(row: dict) -> str:
    return f"{row['prompt']} {row['completion']}"


def trigrams(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / max(len(a | b), 1)


def minhash(grams: set[str]) -> MinHash:
    sketch = MinHash(num_perm=64, seed=1)
    sketch.update_batch([gram.encode() for gram in grams])
    return sketch


def near_pairs(left: list[str], right: list[str]) -> list[tuple[str, str]]:
    """Pairs at or above NEAR: candidates by MinHash, with room for its error, then the true Jaccard."""
    grams = [trigrams(text) for text in left]
    index = MinHashLSH(threshold=NEAR - 0.2, num_perm=64)
    for i, each in enumerate(grams):
        index.insert(i, minhash(each))
    found = []
    for text in right:
        own = trigrams(text)
        found += [(left[i], text) for i in index.query(minhash(own)) if jaccard(grams[i], own) >= NEAR]
    return found


def test_no_test_row_of_any_set_is_near_a_train_row_of_any_set():
    test = [f"{row['prompt']} {row[key]}" for row in pairs["test"] for key in ("chosen", "rejected")]
    test += [row["prompt"] for row in pairs["test"]]
    splits = ("train", "validation", "test")
    rows = {split: read_records(DATA / f"kitchen_tickets/{split}.jsonl", "sft") for split in splits}
    tickets = {split: [row["prompt"] for row in rows[split]] for split in splits}
    test += tickets["test"]
    train = [f"{row['prompt']} {row[key]}" for row in pairs["train"] for key in ("chosen", "rejected")]
    train += [row["prompt"] for row in pairs["train"]]
    train += [text_of(row) for row in feedback] + tickets["train"] + tickets["validation"]
    train += [f"{chat[i - 1]['value']} {chat[i]['value']}" for chat in chats for i in range(1, len(chat))]
    train += [text_of(row) for row in messy if faults.get(row["id"]) != "leaked"]
    assert near_pairs(train, test) == []

    # the control: what did leak is found
    leaked = [row for row in messy if faults.get(row["id"]) == "leaked"]
    assert len(leaked) == 12
    assert all(near_pairs([row["prompt"], text_of(row)], test) for row in leaked)
