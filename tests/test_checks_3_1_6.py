"""Every check of lab 3.1.6 passes the right answers and names each wrong one that people really give."""

import copy
import random
import re
from collections import Counter
from functools import partial

import torch
from helpers import accepts, printed_by, refuses, then

from spark_ft.data.cleaning import drop_leaked
from spark_ft.data.formats import messages_to_sharegpt, sharegpt_to_messages
from spark_ft.data.records import read_records
from spark_ft.files import ROOT
from spark_ft.lab.checks import lab_3_1_6 as checks
from spark_ft.lab.experiments import lab_3_1_6 as study
from spark_ft.lab.parity import GENERATION_TEMPLATE
from spark_ft.models import load_tokenizer

ROLE = {"system": "system", "human": "user", "gpt": "assistant"}
SPEAKER = {role: name for name, role in ROLE.items()}


def without(row, field):
    return {key: value for key, value in row.items() if key != field}


def there(row, role=ROLE.get, text=lambda value: value, turns=lambda turns: turns):
    messages = [{"role": role(t["from"]), "content": text(t["value"])} for t in turns(row["conversations"])]
    return {**without(row, "conversations"), "messages": messages}


def back(row, role=SPEAKER.get):
    turns = [{"from": role(m["role"]), "value": m["content"]} for m in row["messages"]]
    return {**without(row, "messages"), "conversations": turns}


def with_messages(change):
    """The right row, its messages changed at last."""
    return lambda row: {**there(row), "messages": change(there(row)["messages"])}


def popping(row):
    turns = row.pop("conversations")
    row["messages"] = [{"role": ROLE[turn["from"]], "content": turn["value"]} for turn in turns]
    return row


def renaming_turns(row):
    for turn in row["conversations"]:
        turn["role"], turn["content"] = ROLE[turn.pop("from")], turn.pop("value")
    return {**without(row, "conversations"), "messages": row["conversations"]}


def by_place(messages):
    system = [m for m in messages if m["role"] == "system"]
    others = [m for m in messages if m["role"] != "system"]
    return system + [{**m, "role": ("user", "assistant")[i % 2]} for i, m in enumerate(others)]


def test_sharegpt():
    changed = partial(partial, there)
    on_a_copy = then(copy.deepcopy, popping)
    package = (sharegpt_to_messages, messages_to_sharegpt)
    accepts(checks.check_sharegpt, (there, back), package, (on_a_copy, back), times=20)
    refuses(
        checks.check_sharegpt,
        ("to_messages returned None; is a return missing", lambda row: None),
        ("to_messages returned list; a row", then(there, lambda row: row["messages"])),
        (r"\['(human|system)'\]; here the speakers are", changed(role=lambda name: name)),
        (r"\"role\" is \['bot'\]", changed(role={**ROLE, "gpt": "bot"}.get)),
        ("no entry for 'system'.*may begin", changed(role=without(ROLE, "system").__getitem__)),
        ("lost the white space at its ends", changed(text=str.strip)),
        ("never touches the text", changed(text=lambda value: " ".join(value.split()) + " ")),
        ("system turn is dropped", changed(turns=lambda turns: [t for t in turns if t["from"] != "system"])),
        ("turns went in and 2 came out|system turn is dropped", changed(turns=lambda turns: turns[:2])),
        ("reverse order", changed(turns=lambda turns: turns[::-1])),
        ("id, tags is lost", lambda row: {"messages": there(row)["messages"]}),
        ('"conversations" is still there', lambda row: {**row, **there(row)}),
        ("not all of it was in the row", lambda row: {**there(row), "conversation": there(row)["messages"]}),
        ("not all of it was in the row", lambda row: {**there(row), "id": str(row["id"])}),
        ('there is no "messages"', lambda row: {**row, "conversations": there(row)["messages"]}),
        ('must have "role"', with_messages(lambda messages: [[m["role"], m["content"]] for m in messages])),
        ('and "content", not', with_messages(lambda messages: [{"role": m["role"]} for m in messages])),
        ("must be a list of turns", with_messages(tuple)),
        ("changed the row it was given", popping),
        ("changed the row it was given", renaming_turns),
        ("not from its place: two questions may follow", with_messages(by_place)),
        times=3,
        answers=lambda to_messages: (to_messages, back),
    )
    refuses(
        checks.check_sharegpt,
        (r"to_sharegpt: .* is \['user'\]; here .* human, gpt", lambda row: back(row, lambda role: role)),
        (r"\"from\" is \[None\]", lambda row: back(row, {"user": "human", "assistant": "gpt"}.get)),
        ("to_sharegpt: id, tags is lost", lambda row: {"conversations": back(row)["conversations"]}),
        ('"messages" is still there', lambda row: {**row, **back(row)}),
        ("to_sharegpt returned None", lambda row: None),
        ("to_sharegpt has no entry for 'conversations': the row has", there),
        times=3,
        answers=lambda to_sharegpt: (there, to_sharegpt),
    )


def masks(ranges):
    """A mask of the ranges that `ranges` makes of every answer's (head, first token, end mark)."""

    def answer_mask(ids, head, end):
        starts = [i for i in range(len(ids) - len(head)) if ids[i : i + len(head)] == head]
        after = [(i, i + len(head)) for i in starts]
        found = ranges([(i, first, ids.index(end, first)) for i, first in after if end in ids[first:]])
        return [any(start <= i < stop for start, stop in found) for i in range(len(ids))]

    return answer_mask


mask = masks(lambda found: [(first, last + 1) for _, first, last in found])
no_end = masks(lambda found: [(first, last) for _, first, last in found])


def by_state(ids, head, end, fits=None):
    """The right mask, token by token; `fits(ids before this token)`: an answer begins here."""
    fits = fits or (lambda before: before[-len(head) :] == head)
    marks, inside = [], False
    for i, token in enumerate(ids):
        inside = inside or fits(ids[:i])
        marks.append(int(inside))
        inside = inside and token != end
    return marks


def begun(fits):
    """A mask that begins after what `fits(the tokens before, head)`."""
    return lambda ids, head, end: by_state(ids, head, end, lambda before: fits(before, head))


def any_turn(before, head):
    """Questions, system turns and answers: control token, some role, newline."""
    return len(before) > 2 and before[-3] == head[0] and before[-1] == head[-1]


def labels(ids, *marks):
    return [token if mark else -100 for token, mark in zip(ids, mask(ids, *marks), strict=True)]


def every_end(ids, head, end):
    return [mark or token == end for token, mark in zip(ids, mask(ids, head, end), strict=True)]


def test_answer_mask():
    accepts(checks.check_answer_mask, mask, by_state, then(mask, torch.tensor), times=20)
    refuses(
        checks.check_answer_mask,
        ("is a return missing", lambda *_: None),
        ("there must be one for each", then(mask, lambda marks: marks[:-1])),
        ("labels of −100", labels),
        ("nothing is marked", masks(lambda found: [])),
        ("everything is marked", lambda ids, *_: [True] * len(ids)),
        ("wrong way round", then(mask, lambda marks: [not m for m in marks])),
        ("never learns to stop", no_end),
        ("only the last answer", masks(lambda found: [(a, b + 1) for _, a, b in found[-1:]])),
        ("only the first answer", masks(lambda found: [(a, b + 1) for _, a, b in found[:1]])),
        ("head of the answer is marked", masks(lambda found: [(h, b + 1) for h, _, b in found])),
        ("newline after the end mark", masks(lambda found: [(a, b + 2) for _, a, b in found])),
        ("of the questions too", every_end),
        ("questions are marked as well", begun(any_turn)),
        ("stop at the end mark", masks(lambda found: [(found[0][1], 10**9)])),
        ("not one token later", masks(lambda found: [(a + 1, b + 1) for _, a, b in found])),
        ("one place too early", then(mask, lambda marks: [*marks[1:], False])),
        ("one place too late", then(mask, lambda marks: [False, *marks[:-1]])),
        ("inside a text opens no answer", begun(lambda before, head: before[-2:] == head[1:])),
        ("one token of the head", begun(lambda before, head: before[-1:] == head[1:2])),
        ("every turn's first token", begun(lambda before, head: before[-1:] == head[:1])),
        ("is wrong; they should be", masks(lambda found: [(a, b + 1) for _, a, b in found if b > a])),
        times=3,
    )


def test_mask_parity_on_the_kitchen_chats():
    tokenizer = copy.deepcopy(load_tokenizer())
    tokenizer.chat_template = GENERATION_TEMPLATE
    rows = read_records(ROOT / "data/kitchen_chats/train.jsonl", "sharegpt")
    chats = [sharegpt_to_messages(row) for row in rows]
    assert "the same on 40 chats" in printed_by(checks.check_mask_parity, (mask, tokenizer, chats))
    differs = r"chat 0: your marks and TRL's differ at token \[\d+\]"
    refuses(checks.check_mask_parity, (differs, (no_end, tokenizer, chats[:3])))


def grams(text, size=3, pattern=r"\w+", lower=True):
    words = re.findall(pattern, text.lower() if lower else text)
    return [tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]


def jaccard(pieces=grams, over=lambda x, y: len(x | y), kind=set):
    """|A ∩ B| / |A ∪ B| of the sets that `pieces` makes of two texts, or divided by `over(A, B)`."""

    def share(a, b):
        x, y = kind(pieces(a)), kind(pieces(b))
        return len(x & y) / over(x, y) if kind is set else (x & y).total() / (x | y).total()

    return share


share = jaccard()


def no_short_texts(text):
    return [gram for gram in grams(text) if len(gram) == 3]


def short_texts_share_nothing(a, b):
    return jaccard(no_short_texts)(a, b) if no_short_texts(a) + no_short_texts(b) else 0.0


def test_shared_trigrams():
    joined = jaccard(lambda text: [" ".join(gram) for gram in grams(text.casefold())])
    whole = then(share, lambda number: int(number) if number in (0, 1) else number)
    accepts(checks.check_shared_trigrams, share, joined, whole, times=20)
    refuses(
        checks.check_shared_trigrams,
        ("is a return missing", lambda *_: None),
        ("returned set; a number from 0 to 1", lambda a, b: set(grams(a)) & set(grams(b))),
        ("capitals count", jaccard(lambda text: grams(text, lower=False))),
        ("count as parts of words", jaccard(lambda text: grams(text, pattern=r"\S+"))),
        ("Dice", jaccard(over=lambda x, y: (len(x) + len(y)) / 2)),
        ("counts shared pieces twice", jaccard(over=lambda x, y: len(x) + len(y))),
        ("repeated trigrams", jaccard(kind=Counter)),
        ("that is the distance", then(share, lambda number: 1 - number)),
        ("single words", jaccard(lambda text: grams(text, size=1))),
        ("pairs of words", jaccard(lambda text: grams(text, size=2))),
        ("of characters", jaccard(lambda t: [t.lower()[i : i + 3] for i in range(max(1, len(t) - 2))])),
        ("return the share", then(share, lambda number: 100 * number)),
        ("number of shared trigrams", jaccard(over=lambda x, y: 1)),
        ("every third", jaccard(lambda text: grams(text)[::3])),
        ("divided by zero; a text of fewer than three words", jaccard(no_short_texts)),
        ("but should be .* count as one piece", short_texts_share_nothing),
        ("but should be", then(share, round)),
        times=3,
    )
    refuses(  # in every draw the order of the two texts matters, or these could not be told apart
        checks.check_shared_trigrams,
        ("smaller set", jaccard(over=lambda x, y: min(len(x), len(y)))),
        ("larger set", jaccard(over=lambda x, y: max(len(x), len(y)))),
        ("first text's pieces", jaccard(over=lambda x, y: len(x))),
        ("second text's pieces", jaccard(over=lambda x, y: len(y))),
        times=100,
    )


def gap(pair):
    return len(pair["chosen"]) - len(pair["rejected"])


def by_words(pair):
    return len(pair["chosen"].split()) - len(pair["rejected"].split())


def balancer(measure=gap, key=lambda pair: abs(gap(pair)), equal=True, fewer=lambda n: n):
    """The right answer with one of its parts changed."""

    def balance(pairs):
        ordered = sorted(pairs, key=key)
        longer, shorter = [p for p in ordered if measure(p) > 0], [p for p in ordered if measure(p) < 0]
        count = fewer(min(len(longer), len(shorter)))
        return [p for p in ordered if measure(p) == 0] * equal + longer[:count] + shorter[:count]

    return balance


balance = balancer()


def by_popping(pairs):
    kept = sorted(pairs, key=lambda pair: -abs(gap(pair)))
    while (over := sum((gap(p) > 0) - (gap(p) < 0) for p in kept)) != 0:
        kept.remove(next(p for p in kept if gap(p) * over > 0))
    return tuple(kept)


def cutting(pairs):
    for pair in pairs:
        size = min(len(pair["chosen"]), len(pair["rejected"]))
        pair["chosen"], pair["rejected"] = pair["chosen"][:size], pair["rejected"][:size]
    return pairs


def swapping(pairs):
    return [p if gap(p) <= 0 else {**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]


def test_balance():
    accepts(checks.check_balance, balance, by_popping, then(balance, reversed, list), times=20)
    refuses(
        checks.check_balance,
        ("is a return missing", lambda pairs: None),
        ("all are kept: nothing was balanced", lambda pairs: list(pairs)),
        ("equal ones are kept|0 of each are kept", lambda pairs: []),
        ("keep all pairs of equal length", balancer(equal=False)),
        ("those with the largest difference are kept", balancer(key=lambda pair: -abs(gap(pair)))),
        ("difference are kept, others with a smaller", balancer(key=lambda pair: random.random())),
        ("keep as many|equal ones are kept|nothing was balanced", balancer(measure=by_words)),
        ("keep the equal ones", balancer(key=lambda pair: abs(by_words(pair)))),
        ("drop no more than necessary", balancer(fewer=lambda n: n // 2)),
        ("keep as many of both", lambda pairs: [p for p in pairs if gap(p) <= 0]),
        ("keep as many|of each are|smaller one not", lambda pairs: [p for p in pairs if abs(gap(p)) < 30]),
        ("kept twice", then(balance, lambda pairs: pairs * 2)),
        ("reordered", lambda pairs: pairs.sort(key=gap) or balance(pairs)),
        ("a text was changed: .* never cut", cutting),
        ("a returned pair is not among the given", then(copy.deepcopy, cutting)),
        ("chosen and rejected are swapped", swapping),
        times=3,
    )


def splitter(cores=lambda names: list(dict.fromkeys(names)), rng=random.Random, stop=lambda share: share):
    """The right answer with one of its parts changed."""

    def split(rows, share, seed):
        names, test, sizes = cores(row["core"] for row in rows), set(), Counter(row["core"] for row in rows)
        rng(seed).shuffle(names)
        for core in names:
            if sum(sizes[name] for name in test) >= stop(share) * len(rows):
                break
            test.add(core)
        return [row for row in rows if row["core"] not in test], [row for row in rows if row["core"] in test]

    return split


split = splitter()


def by_rows(rows, share, seed):
    rows = random.Random(seed).sample(rows, len(rows))
    cut = round(share * len(rows))
    return rows[cut:], rows[:cut]


def counting_down(rows, share, seed):
    cores = sorted({str(row["core"]) for row in rows})
    random.Random(seed).shuffle(cores)
    test = []
    while len(test) < share * len(rows):
        core = cores.pop()
        test += [row for row in rows if str(row["core"]) == core]
    taken = {row["id"] for row in test}
    return [row for row in rows if row["id"] not in taken], test


class Still(random.Random):
    def shuffle(self, x):
        pass


def test_split():
    accepts(checks.check_split, split, counting_down, splitter(then(set, sorted)), times=20)
    refuses(
        checks.check_split,
        ("is a return missing", lambda *_: None),
        ("things; return|must each be a list", then(split, lambda sides: sides[1])),
        ("train and test are swapped", then(split, lambda sides: sides[::-1])),
        ("list of the rows", then(split, lambda sides: [[row["id"] for row in side] for side in sides])),
        ("cores are on both sides, so train answers what test asks", by_rows),
        ("take cores until|swapped", splitter(stop=lambda share: 1 - share)),
        ("then stop", splitter(stop=lambda share: share + 0.2)),
        ("0 rows in test; take cores", splitter(stop=lambda share: 0)),
        ("not the global generator", splitter(rng=lambda seed: random)),
        ("another Python process splits", splitter(then(set, list))),
        ("every seed gives the same split", splitter(rng=Still)),
        ("every seed gives the same split", lambda rows, share, seed: split(rows, share, 0)),
        ("the given list was reordered", lambda rows, *a: random.shuffle(rows) or split(rows, *a)),
        ("1 rows are on neither side", then(split, lambda sides: (sides[0][:-1], sides[1]))),
        ("is on both sides", then(split, lambda sides: (sides[0] + sides[1][:1], sides[1]))),
        ("twice on the same side", then(split, lambda sides: (sides[0] + sides[0][:1], sides[1]))),
        times=3,
    )


def test_the_three_training_sets_differ_in_what_leaked_and_in_nothing_else():
    for seed in range(5):
        sets, tests = study.draw(seed)
        leaked, untouched = tests["leaked rows"], tests["untouched rows"]
        half = study.SETTINGS["rows"] - study.SETTINGS["leaked"]
        assert {len(rows) for rows in sets.values()} == {study.SETTINGS["rows"]}
        assert sets["leaked"][:-half] == leaked
        assert sets["leaked"][-half:] == sets["clean"][-half:] == sets["wrong tickets"][-half:]
        assert [row["prompt"] for row in sets["wrong tickets"]] == [row["prompt"] for row in sets["leaked"]]
        wrong = [row["completion"] for row in sets["wrong tickets"][:-half]]
        assert sorted(wrong) == sorted(row["completion"] for row in leaked)
        assert not any(a == row["completion"] for a, row in zip(wrong, leaked, strict=True))
        trained_on = {row["prompt"] for rows in sets.values() for row in rows}
        assert not trained_on & {row["prompt"] for row in untouched}
        assert len(drop_leaked(sets["leaked"], leaked).dropped) == len(leaked)
        assert not drop_leaked(sets["clean"], leaked + untouched).dropped
    assert study.draw(0) == study.draw(0) != study.draw(1)
