"""Every check of lab 3.1.6 passes the right answers and names each wrong one that people really give."""

import copy
import random
import re
from collections import Counter

import torch
from helpers import accepts, printed_by, refuses

from spark_ft.data.cleaning import drop_leaked
from spark_ft.data.formats import GENERATION_TEMPLATE, messages_to_sharegpt, sharegpt_to_messages
from spark_ft.data.records import read_records
from spark_ft.files import ROOT
from spark_ft.lab.checks import lab_3_1_6 as checks
from spark_ft.lab.experiments import lab_3_1_6 as study
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


def to_messages(**parts):
    """The right answer with one of its parts changed."""
    return lambda row: there(row, **parts)


def with_messages(change):
    """The right row, `change` done to its list of messages at last."""
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


def no_system(turns):
    return [turn for turn in turns if turn["from"] != "system"]


def test_sharegpt():
    accepts(
        checks.check_sharegpt,
        (there, back),
        (sharegpt_to_messages, messages_to_sharegpt),
        (lambda row: popping(copy.deepcopy(row)), back),
        times=20,
    )
    refuses(
        checks.check_sharegpt,
        ("to_messages returned None; is a return missing", lambda row: None),
        ("to_messages returned list; a row", lambda row: there(row)["messages"]),
        (r"\['(human|system)'\]; here the speakers are", to_messages(role=lambda name: name)),
        (r"\"role\" is \['bot'\]", to_messages(role={**ROLE, "gpt": "bot"}.get)),
        ("no entry for 'system'.*may begin", to_messages(role=without(ROLE, "system").__getitem__)),
        ("lost the white space at its ends", to_messages(text=str.strip)),
        ("never touches the text", to_messages(text=lambda value: " ".join(value.split()) + " ")),
        ("system turn is dropped", to_messages(turns=no_system)),
        ("turns went in and 2 came out|system turn is dropped", to_messages(turns=lambda turns: turns[:2])),
        ("reverse order", to_messages(turns=lambda turns: turns[::-1])),
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


def spans(ids, head, end):
    """(place of the head, place of the first token, place of the end mark) of every answer."""
    starts = [i for i in range(len(ids) - len(head)) if ids[i : i + len(head)] == head]
    after = [(i, i + len(head)) for i in starts]
    return [(i, first, ids.index(end, first)) for i, first in after if end in ids[first:]]


def marked(ids, ranges):
    return [any(start <= i < stop for start, stop in ranges) for i in range(len(ids))]


def masks(ranges):
    """A mask of the ranges that `ranges` makes of all (head, first token, end mark)."""
    return lambda ids, head, end: marked(ids, ranges(spans(ids, head, end)))


mask = masks(lambda found: [(first, last + 1) for _, first, last in found])


def after_mask(change):
    """The right mask, changed by change(marks, ids, end) at last."""
    return lambda ids, head, end: change(mask(ids, head, end), ids, end)


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


def labels(ids, head, end):
    return [i if m else -100 for i, m in zip(ids, mask(ids, head, end), strict=True)]


def test_answer_mask():
    accepts(checks.check_answer_mask, mask, by_state, lambda *a: torch.tensor(mask(*a)), times=20)
    refuses(
        checks.check_answer_mask,
        ("is a return missing", lambda ids, head, end: None),
        ("there must be one for each", after_mask(lambda marks, ids, end: marks[:-1])),
        ("labels of −100", labels),
        ("nothing is marked", masks(lambda found: [])),
        ("everything is marked", lambda ids, head, end: [True] * len(ids)),
        ("wrong way round", after_mask(lambda marks, ids, end: [not m for m in marks])),
        ("never learns to stop", masks(lambda found: [(a, b) for _, a, b in found])),
        ("only the last answer", masks(lambda found: [(a, b + 1) for _, a, b in found[-1:]])),
        ("only the first answer", masks(lambda found: [(a, b + 1) for _, a, b in found[:1]])),
        ("head of the answer is marked", masks(lambda found: [(h, b + 1) for h, _, b in found])),
        ("newline after the end mark", masks(lambda found: [(a, b + 2) for _, a, b in found])),
        (
            "questions too",
            after_mask(lambda marks, ids, end: [marks[i] or ids[i] == end for i in range(len(ids))]),
        ),
        ("questions are marked as well", begun(any_turn)),
        ("stop at the end mark", masks(lambda found: [(found[0][1], 10**9)])),
        ("not one token later", masks(lambda found: [(a + 1, b + 1) for _, a, b in found])),
        ("one place too early", after_mask(lambda marks, ids, end: [*marks[1:], False])),
        ("one place too late", after_mask(lambda marks, ids, end: [False, *marks[:-1]])),
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
    no_end = masks(lambda found: [(a, b) for _, a, b in found])
    differs = r"chat 0: your marks and TRL's differ at token \[\d+\]"
    refuses(checks.check_mask_parity, (differs, (no_end, tokenizer, chats[:3])))


def grams(text, size=3, pattern=r"\w+", lower=True):
    words = re.findall(pattern, text.lower() if lower else text)
    return [tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]


def jaccard(pieces):
    """|A ∩ B| / |A ∪ B| of what `pieces` makes of each text."""

    def share(a, b):
        x, y = set(pieces(a)), set(pieces(b))
        return len(x & y) / len(x | y)

    return share


def over(bottom):
    """The shared trigrams divided by bottom(A, B)."""

    def share(a, b):
        x, y = set(grams(a)), set(grams(b))
        return len(x & y) / bottom(x, y)

    return share


share = jaccard(grams)


def counted(a, b):
    x, y = Counter(grams(a)), Counter(grams(b))
    return (x & y).total() / (x | y).total()


def no_short_texts(text):
    return [gram for gram in grams(text) if len(gram) == 3]


def short_texts_share_nothing(a, b):
    return jaccard(no_short_texts)(a, b) if no_short_texts(a) + no_short_texts(b) else 0.0


# An order of the two texts has to matter in every draw, or these could not be told from each other.


def test_shared_trigrams():
    joined = jaccard(lambda text: [" ".join(gram) for gram in grams(text.casefold())])
    whole = lambda a, b: int(s) if (s := share(a, b)) in (0, 1) else s  # noqa: E731
    accepts(checks.check_shared_trigrams, share, joined, whole, times=20)
    refuses(
        checks.check_shared_trigrams,
        ("is a return missing", lambda a, b: None),
        ("returned set; a number from 0 to 1", lambda a, b: set(grams(a)) & set(grams(b))),
        ("capitals count", jaccard(lambda text: grams(text, lower=False))),
        ("count as parts of words", jaccard(lambda text: grams(text, pattern=r"\S+"))),
        ("Dice", over(lambda x, y: (len(x) + len(y)) / 2)),
        ("counts shared pieces twice", over(lambda x, y: len(x) + len(y))),
        ("repeated trigrams", counted),
        ("that is the distance", lambda a, b: 1 - share(a, b)),
        ("single words", jaccard(lambda text: grams(text, size=1))),
        ("pairs of words", jaccard(lambda text: grams(text, size=2))),
        (
            "trigrams of characters",
            jaccard(lambda t: {t.lower()[i : i + 3] for i in range(max(1, len(t) - 2))}),
        ),
        ("return the share", lambda a, b: 100 * share(a, b)),
        ("number of shared trigrams", over(lambda x, y: 1)),
        ("every third", jaccard(lambda text: grams(text)[::3])),
        ("divided by zero; a text of fewer than three words", jaccard(no_short_texts)),
        ("but should be .* count as one piece", short_texts_share_nothing),
        ("but should be", lambda a, b: round(share(a, b))),
        times=3,
    )
    refuses(
        checks.check_shared_trigrams,
        ("smaller set", over(lambda x, y: min(len(x), len(y)))),
        ("larger set", over(lambda x, y: max(len(x), len(y)))),
        ("first text's pieces", over(lambda x, y: len(x))),
        ("second text's pieces", over(lambda x, y: len(y))),
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


def in_place(pairs):
    pairs.sort(key=lambda pair: abs(gap(pair)))
    return balance(pairs)


def cutting(pairs):
    for pair in pairs:
        size = min(len(pair["chosen"]), len(pair["rejected"]))
        pair["chosen"], pair["rejected"] = pair["chosen"][:size], pair["rejected"][:size]
    return pairs


def random_ones(pairs):
    return balancer(key=lambda pair: 0)(random.sample(pairs, len(pairs)))


def swapping(pairs):
    return [p if gap(p) <= 0 else {**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]


def test_balance():
    filtered = lambda pairs: [p for p in pairs if p in balance(pairs)]  # noqa: E731
    accepts(checks.check_balance, balance, by_popping, filtered, times=20)
    refuses(
        checks.check_balance,
        ("is a return missing", lambda pairs: None),
        ("all are kept: nothing was balanced", lambda pairs: list(pairs)),
        ("equal ones are kept|0 of each are kept", lambda pairs: []),
        ("keep all pairs of equal length", balancer(equal=False)),
        ("those with the largest difference are kept", balancer(key=lambda pair: -abs(gap(pair)))),
        ("difference are kept, others with a smaller", random_ones),
        ("keep as many|equal ones are kept|nothing was balanced", balancer(measure=by_words)),
        ("keep the equal ones", balancer(key=lambda pair: abs(by_words(pair)))),
        ("drop no more than necessary", balancer(fewer=lambda n: n // 2)),
        ("keep as many of both", lambda pairs: [p for p in pairs if gap(p) <= 0]),
        ("keep as many|of each are|smaller one not", lambda pairs: [p for p in pairs if abs(gap(p)) < 30]),
        ("kept twice", lambda pairs: balance(pairs) * 2),
        ("reordered", in_place),
        ("a text was changed: .* never cut", cutting),
        ("a returned pair is not among the given", lambda pairs: cutting(copy.deepcopy(pairs))),
        ("chosen and rejected are swapped", swapping),
        times=3,
    )


def in_order_of_coming(rows):
    return list(dict.fromkeys(row["core"] for row in rows))


def splitter(cores=in_order_of_coming, rng=random.Random, stop=lambda share: share):
    """The right answer with one of its parts changed."""

    def split(rows, share, seed):
        names, test, sizes = cores(rows), set(), Counter(row["core"] for row in rows)
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


def after_split(change):
    """The right split, changed by change(train, test) at last."""
    return lambda *a: change(*split(*a))


def in_place_rows(rows, share, seed):
    random.Random(seed).shuffle(rows)
    return split(rows, share, seed)


class Still(random.Random):
    def shuffle(self, x):
        pass


def test_split():
    sorted_cores = splitter(cores=lambda rows: sorted({row["core"] for row in rows}))
    accepts(checks.check_split, split, counting_down, sorted_cores, times=20)
    refuses(
        checks.check_split,
        ("is a return missing", lambda rows, share, seed: None),
        ("things; return|must each be a list", after_split(lambda train, test: test)),
        ("train and test are swapped", after_split(lambda train, test: (test, train))),
        (
            "lists? of the rows themselves",
            after_split(lambda *sides: tuple([r["id"] for r in side] for side in sides)),
        ),
        ("cores are on both sides, so train answers what test asks", by_rows),
        ("take cores until|swapped", splitter(stop=lambda share: 1 - share)),
        ("then stop", splitter(stop=lambda share: share + 0.2)),
        ("0 rows in test; take cores", splitter(stop=lambda share: 0)),
        ("not the global generator", splitter(rng=lambda seed: random)),
        ("another Python process splits", splitter(cores=lambda rows: list({row["core"] for row in rows}))),
        ("every seed gives the same split", splitter(rng=Still)),
        ("every seed gives the same split", lambda rows, share, seed: split(rows, share, 0)),
        ("the given list was reordered", in_place_rows),
        ("1 rows are on neither side", after_split(lambda train, test: (train[:-1], test))),
        ("is on both sides", after_split(lambda train, test: (train + test[:1], test))),
        ("twice on the same side", after_split(lambda train, test: ([*train, train[0]], test))),
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
