"""What lab 3.1.6 shows: a file's report, before and after, wrong marks in use, a clean-up marked, leaks."""

import ast
import copy
import csv
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spark_ft.adapters import adapters_disabled, add_adapters
from spark_ft.data import cleaning
from spark_ft.data.batches import Learn, collate_sft, sft_batches
from spark_ft.data.chat import all_answers, conversation
from spark_ft.data.own import OwnRows
from spark_ft.data.pairs import balance_lengths, length_baseline
from spark_ft.data.records import read_records
from spark_ft.embedded import EMBEDDED
from spark_ft.evaluation import answers_and_ends
from spark_ft.files import CACHE, ROOT
from spark_ft.lab.experiments.common import SHORT_RUN
from spark_ft.lab.experiments.runner import Measurement
from spark_ft.lab.kitchen import ADAPTER, tickets
from spark_ft.lab.parity import GENERATION_TEMPLATE
from spark_ft.lab.study import show_differences, show_table, verdict
from spark_ft.models import load_model, load_tokenizer
from spark_ft.scoring import completion_logps, sft_loss
from spark_ft.stats import Estimate, paired_difference, wilson_interval
from spark_ft.training import History, TrainConfig, train

DATA = ROOT / "data"
Row = dict[str, Any]


# ── a file, and what a training makes of it ─────────────────────────────────────────────────────────────────


def example_file(name: str = "orders.csv") -> Path:
    """Fifty rows as people keep them, ten of the orders with planted faults; or fifty questions as Alpaca."""
    path = CACHE / "examples" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "questions.json":
        rows = read_records(DATA / "messy/train.jsonl", "sft")[:50]
        alpaca = [{"instruction": r["prompt"], "input": "", "output": r["completion"]} for r in rows]
        path.write_text(json.dumps(alpaca, ensure_ascii=False, indent=1), encoding="utf-8")
        return path
    rows = [(row["prompt"], row["completion"]) for row in tickets("train")[:40]]
    rows += rows[5:8]  # exact duplicates
    rows += [(f"{prompt}, please", answer) for prompt, answer in rows[10:12]]
    rows += [(row["prompt"], row["completion"]) for row in tickets("validation")[:2]]  # leaked
    for table in (4, 9):  # UTF-8, read as cp1252
        order = f"Kitchen ticket as JSON:\nTable {table} wants two crème brûlée"
        ticket = f'{{"table":{table},"items":[{{"qty":2,"dish":"crème brûlée"}}]}}'
        rows.append(tuple(text.encode().decode("cp1252") for text in (order, ticket)))
    rows.append(("Kitchen ticket as JSON:\ntable 6: one ramen", ""))
    random.Random(0).shuffle(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *rows])
    return path


def show_report(rows: OwnRows) -> None:
    """What was found in a file: counts, and a sentence for each row that was left out."""
    print(str(rows).replace(f"{rows.path.parent}/", "").replace(f"{ROOT}/", ""))


def train_rows(
    rows: Sequence[Row], learn: Learn = all_answers, steps: int = SHORT_RUN["steps"], seed: int = 0
) -> tuple[nn.Module, History]:
    """The embedded model with LoRA of rank 16, trained on rows; `learn` says which tokens are learned."""
    model = load_model(EMBEDDED, dtype=torch.float32)[0]
    torch.manual_seed(seed)
    add_adapters(model, ADAPTER)
    run = {"warmup_steps": SHORT_RUN["warmup_steps"], "betas": (0.9, 0.999), "seed": seed, "progress": False}
    config = TrainConfig(steps, SHORT_RUN["learning_rate"], **run)
    batches = sft_batches(rows, load_tokenizer(EMBEDDED), SHORT_RUN["batch_size"], seed, learn=learn)
    return model, train(model, batches, sft_loss, config)


def show_before_after(model: nn.Module, rows: Sequence[Row], tokens: int = 48) -> None:
    """Held-out questions: answers without the adapters and with them, and the wanted ones."""
    tokenizer = load_tokenizer(EMBEDDED)
    turns = [conversation(row).turns for row in rows]
    asked = [chat[:-1] for chat in turns]
    after = answers_and_ends(model, tokenizer, asked, tokens)
    with adapters_disabled(model):
        before = answers_and_ends(model, tokenizer, asked, tokens)
    columns = ("question", "before", "after", "wanted")
    table = [
        dict(zip(columns, (_cut(chat[-2]["content"]), b, a, _cut(chat[-1]["content"])), strict=True))
        for chat, b, a in zip(turns, map(_ended, before), map(_ended, after), strict=True)
    ]
    show_table(table, f"held-out rows, greedy, at most {tokens} tokens; … is where an answer was cut")


def _ended(answer: tuple[str, bool]) -> str:
    return answer[0] if answer[1] else f"{answer[0]} …"


def _cut(text: str, most: int = 240) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


# ── your mask trains ────────────────────────────────────────────────────────────────────────────────────────


def marked_by(mask: Callable[[list[int], list[int], int], Sequence[bool]]) -> Learn:
    """Which tokens are learned, as a mask of the learner's says it."""

    def learn(row: Row, tokenizer) -> tuple[list[int], list[bool]]:
        ids, _ = all_answers(row, tokenizer)
        head = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
        return ids, [bool(mark) for mark in mask(list(ids), head, tokenizer.eos_token_id)]

    return learn


def with_generation_marks(tokenizer):
    """The tokenizer with a template that renders the same and says where TRL finds the answers."""
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = GENERATION_TEMPLATE
    return marked


# ── other marks, in use ─────────────────────────────────────────────────────────────────────────────────────


def by_hand(before: Callable[[str], str], end: str) -> Learn:
    """Rows under marks that somebody wrote by hand; the answer and its end are learned."""

    def learn(row: Row, tokenizer) -> tuple[list[int], list[bool]]:
        texts = (before(row["prompt"]), row["completion"] + end)
        context, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        return context + answer, [False] * len(context) + [True] * len(answer)

    return learn


def show_in_use(
    runs: Mapping[str, tuple[nn.Module, History]], rows: Sequence[Row], tokens: int = 44
) -> dict[str, dict[str, int]]:
    """Models asked through the tokenizer's own template: tickets that are right, answers that stop."""
    tokenizer, found, table = load_tokenizer(EMBEDDED), {}, []
    for name, (model, history) in runs.items():
        answers = answers_and_ends(model, tokenizer, [row["prompt"] for row in rows], tokens)
        checked = [(text, ends, row["completion"]) for (text, ends), row in zip(answers, rows, strict=True)]
        found[name] = {
            "begins": sum(text.startswith(wanted) for text, _, wanted in checked),
            "stops": sum(ends for _, ends, _ in checked),
            "exact": sum(text.strip() == wanted for text, _, wanted in checked),
        }
        table.append(
            {
                "trained under": name,
                "last training loss": history.losses[-1],
                "begins with the right ticket": f"{found[name]['begins']} of {len(rows)}",
                "never stops": f"{len(rows) - found[name]['stops']} of {len(rows)}",
                "exactly right": wilson_interval(found[name]["exact"], len(rows)).percent(),
                "the first answer": _cut(answers[0][0], 130),
            }
        )
    show_table(
        table,
        f"one run each, seed 0, on the same rows; {len(rows)} held-out orders, at most {tokens} tokens; "
        "exactly right: with Wilson's 95% interval, over the orders and not over seeds",
    )
    return found


# ── the clean-up ────────────────────────────────────────────────────────────────────────────────────────────


def mended(rows: Sequence[Row]) -> list[Row]:
    """The rows with their letters put right where that can be done; says how many are broken still."""
    fields = ("prompt", "completion")
    right = [{**row, **{name: cleaning.mend_encoding(row[name]) for name in fields}} for row in rows]
    broken = [len(cleaning.drop_broken_encoding(some).dropped) for some in (rows, right)]
    print(f"rows with broken letters: {broken[0]}; after mending: {broken[1]}, with letters lost for good")
    return right


def show_near(rows: Sequence[Row]) -> None:
    """Some near-duplicates that differ in a word or a mark, and how many rows go in all."""
    dropped = cleaning.drop_near_duplicates(rows).dropped
    edited = [drop for drop in dropped if drop.record["completion"] != rows[drop.copy_of]["completion"]]
    table = [
        {
            "shared": re.search(r"\d+%", drop.reason)[0],
            "an earlier row": _cut(rows[drop.copy_of]["completion"], 120),
            "and its copy": _cut(drop.record["completion"], 120),
        }
        for drop in edited[:3]
    ]
    show_table(table, f"three of {len(dropped)} rows that go; equal rows are among them")


def show_clean_up(result: cleaning.Cleaned, faults: Mapping[str, str], rows: list[Row]) -> dict[str, float]:
    """A clean-up marked with the list of planted faults: found, kind by kind, and good rows that went."""
    went = {drop.record["id"]: drop for drop in result.dropped}
    there = {row["id"] for row in rows}
    table, hits = [], 0
    for kind in sorted(set(faults.values())):
        planted = [name for name, fault in faults.items() if fault == kind and name in there]
        right = [name for name in planted if name in went and went[name].fault == kind]
        stayed = [row for row in rows if row["id"] in planted and row["id"] not in went]
        still = len(cleaning.drop_broken_encoding(stayed).dropped)
        mended = len(stayed) - still if kind == "encoding" else 0
        hits += len(right) + mended
        table.append(
            {
                "fault": kind.replace("_", " "),
                "planted": len(planted),
                "mended": mended or "",
                "went": len(right),
                "in the long run": wilson_interval(len(right) + mended, len(planted)).percent(),
                "why the first one went": _cut(went[right[0]].reason.replace("\n", " "), 60) if right else "",
            }
        )
    good = [name for name in there if name not in faults]
    alarms = wilson_interval(sum(name in went for name in good), len(good))
    show_table(
        table,
        f"{len(rows)} rows in, {len(result.kept)} kept; good rows that went: {alarms.percent()}, of "
        f"{len(good)}; Wilson's 95% intervals",
    )
    return {"found": hits / len(faults), "false alarms": alarms.value}


def show_white_space(rows: Sequence[Row]) -> None:
    """How many Python blocks in the answers Python can read, before and after "normalising" white space."""
    changes = {
        "as they are": str,
        "white space joined": lambda text: " ".join(text.split()),
        "each line stripped": lambda text: "\n".join(line.strip() for line in text.splitlines()),
    }
    table = []
    for name, change in changes.items():
        answers = (change(row["completion"]) for row in rows)
        blocks = [b for answer in answers for b in re.findall(r"```python(.*?)```", answer, re.DOTALL)]
        table.append({"answers": name, "Python can read": f"{sum(map(_parses, blocks))} of {len(blocks)}"})
    show_table(table, "code blocks in the rows that were kept; one shows a mistake on purpose")


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


# ── splits, pairs ───────────────────────────────────────────────────────────────────────────────────────────


def split_rows(rows: Sequence[Row], share: float, seed: int, group: str | None = None) -> tuple[list, list]:
    """(train, test): whole groups in test, until it holds `share` of the rows; else each row is a group."""
    names = [row[group] if group else i for i, row in enumerate(rows)]
    order, test = list(dict.fromkeys(names)), set()
    random.Random(seed).shuffle(order)
    while sum(name in test for name in names) < share * len(rows):
        test.add(order[len(test)])
    named = list(zip(rows, names, strict=True))
    return [row for row, name in named if name not in test], [row for row, name in named if name in test]


def show_splits(rows: Sequence[Row], share: float = 0.2, seed: int = 0) -> dict[str, int]:
    """What two ways to split leak, and whether a search for near-duplicates notices."""
    table, leaked = [], {}
    for name, group in (("by rows", None), ("by cores", "core")):
        train_side, test = split_rows(rows, share, seed, group)
        known = {row["core"] for row in train_side}
        leaked[name] = sum(row["core"] in known for row in test)
        noticed = len(cleaning.drop_leaked(train_side, test).dropped)
        row = {"split": name, "test rows": len(test), "with their core in training": leaked[name]}
        table.append({**row, "rows that drop_leaked notices": noticed})
    show_table(table, "training pairs of kitchen_preferences, three in other words per core; seed 0")
    return leaked


def pairs(split: str) -> list[Row]:
    """The rows of kitchen_preferences' "train" or "test" split."""
    return read_records(DATA / f"kitchen_preferences/{split}.jsonl", "preference")


def show_lengths() -> dict[str, Estimate]:
    """How often the longer answer is the chosen one: in the project's pairs, in biased ones, and balanced."""
    rows = pairs("train")
    longer = [len(pair["chosen"]) > len(pair["rejected"]) for pair in rows]
    biased = [pair for i, pair in enumerate(rows) if longer[i] or i % 5 == 0]
    selections = {
        "kitchen_preferences, train": rows,
        "kitchen_preferences, test": pairs("test"),
        "control: most of the shorter ones thrown out": biased,
        "the control, balanced again": balance_lengths(biased),
    }
    found = {name: length_baseline(some) for name, some in selections.items()}
    table = [
        {
            "pairs": name,
            "how many": len(selections[name]),
            "longer is chosen": share.percent(),
            "length": "tells nothing measurable" if share.low <= 0.5 <= share.high else "gives it away",
        }
        for name, share in found.items()
    ]
    show_table(table, "Wilson's 95% intervals; pairs of equal length left out; a coin says 50%")
    return found


# ── what a leak does ────────────────────────────────────────────────────────────────────────────────────────


def show_leak(stored: Measurement) -> dict[str, Estimate]:
    """Tickets right on leaked and on untouched rows, against a clean set of the same size, seed by seed."""

    def points(name: str, which: str) -> list[float]:
        return [100 * value for value in stored.values(name, which, "exact match")]

    against = {
        f"{name} − clean,\non the {which}": (points(key, which), points("clean", which))
        for name, key in (("leaked", "leaked"), ("control", "wrong tickets"))
        for which in ("leaked rows", "untouched rows")
    }
    found = {name: paired_difference(*values) for name, values in against.items()}
    leaked, untouched, control, _ = found.values()
    show_differences(
        f"A leak: {leaked.value:+.0f} points on the rows that leaked; on untouched rows: "
        + verdict(untouched, "better", "worse"),
        against,
        unit="difference in tickets exactly right (points)",
        caption=f"16 rows, 14 steps of 4; control: leaked with wrong tickets; {stored.origin()};",
    )
    assert control.low <= 0, "orders that leaked with wrong tickets must not look better"
    return {"leaked rows": leaked, "untouched rows": untouched, "control": control}


# ── your own rows ───────────────────────────────────────────────────────────────────────────────────────────


def train_own(own: OwnRows, group: str | None, longest: int = 320, most: int = 100) -> dict[str, Any]:
    """Split a file's rows, train twelve steps on the larger part, and show the other before and after."""
    if own.kind not in ("sft", "chat", "preference"):
        raise ValueError(f"{own.path}: rows of kind {own.kind!r}; bring questions with answers, or pairs")
    short = [row for row, length in zip(own.records, own.lengths, strict=True) if length <= longest]
    rows = short[:most]
    if len(rows) < len(own.records):
        print(f"taken here: {len(rows)} of {len(own.records)} rows, at most {longest} tokens each")
    if group and any(group not in row for row in rows):
        raise ValueError(f"{own.path}: not every row has the field {group!r}; name one that all have")
    if own.kind == "preference":
        print("pairs: trained on `chosen` alone; lab 3.1.7 uses both")
        rows = [{**row, "completion": row["chosen"]} for row in rows]
    if len(rows) < 15:
        raise ValueError(f"{len(rows)} rows are left; bring 15 or more, better 50")
    rest, test = split_rows(rows, 0.2, seed=0, group=group)
    kept = cleaning.drop_leaked(rest, test).kept
    print(f"{len(kept)} rows to train on, {len(test)} held out, {len(rest) - len(kept)} too near to those")
    model, history = train_rows(kept, steps=12)
    after = row_losses(model, test)
    with adapters_disabled(model):
        before = row_losses(model, test)
    change = paired_difference(after, before)
    show_before_after(model, test[:3], tokens=64)
    said = {"better": "lower", "worse": "higher"}.get(verdict(change, "worse", "better"), "cannot tell")
    print(f"training loss, {len(history.losses)} steps: {history.losses[0]:.2f} to {history.losses[-1]:.2f}")
    print(f"held-out loss, after − before: {change.signed(2)} nats per token ({said}); one seed")
    return {"rows": len(kept), "change": change.value, "verdict": said}


@torch.no_grad()
def row_losses(model: nn.Module, rows: Sequence[Row]) -> list[float]:
    """−log p per token of each row's last answer."""
    batch = collate_sft(rows, load_tokenizer(EMBEDDED))
    logps, places = completion_logps(model, {key: tensor.to(model.device) for key, tensor in batch.items()})
    return [-logps[places == i].mean().item() for i in range(len(rows))]
