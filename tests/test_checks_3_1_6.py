"""Every check of lab 3.1.6 passes the right answers and names each wrong one that people really give."""

import copy
import random
import re
from collections import Counter

import torch
from helpers import accepts, mutant, printed_by, refuses, then

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


def there(row):
    rest = {key: value for key, value in row.items() if key != "conversations"}
    turns = [{"role": ROLE[t["from"]], "content": t["value"]} for t in row["conversations"]]
    return {**rest, "messages": turns}


def back(row):
    rest = {key: value for key, value in row.items() if key != "messages"}
    turns = [{"from": SPEAKER[m["role"]], "value": m["content"]} for m in row["messages"]]
    return {**rest, "conversations": turns}


def test_sharegpt():
    role, text, each, out = 'ROLE[t["from"]]', 't["value"]', 'in row["conversations"]]', '"messages": turns'
    popping, package = (each, 'in row.pop("conversations")]'), (sharegpt_to_messages, messages_to_sharegpt)
    on_a_copy = then(copy.deepcopy, mutant(there, *popping))
    accepts(checks.check_sharegpt, (there, back), package, (on_a_copy, back), times=20)
    numbered = 'enumerate(row["conversations"], row["conversations"][0]["from"] != "system")]'
    place = '("assistant", "user")[i % 2] if t["from"] != "system" else "system"'
    refuses(
        checks.check_sharegpt,
        ("to_messages returned list; a row", "{**rest, " + out + "}", "turns"),
        (r"\['(human|system)'\]; here the speakers are", role, 't["from"]'),
        (r"\"role\" is \['bot'\]", role, '{**ROLE, "gpt": "bot"}[t["from"]]'),
        ("no entry for 'system'.*may begin", role, '{"human": "user", "gpt": "assistant"}[t["from"]]'),
        ("lost the white space at its ends", text, f"{text}.strip()"),
        ("never touches the text", text, f'" ".join({text}.split()) + " "'),
        ("system turn is dropped", each, each[:-1] + ' if t["from"] != "system"]'),
        ("turns went in and 2 came out|system turn is dropped", each, each[:-1] + "[:2]]"),
        ("reverse order", each, each[:-1] + "[::-1]]"),
        ("id, tags is lost", "**rest, ", ""),
        ('"conversations" is still there', "**rest", "**row"),
        ("not all of it was in the row", out, f'{out}, "conversation": turns'),
        ("not all of it was in the row", out, f'{out}, "id": str(row["id"])'),
        ('there is no "messages"', '**rest, "messages"', '**row, "conversations"'),
        ('must have "role"', out, '"messages": [[*turn.values()] for turn in turns]'),
        ('and "content", not', ', "content": t["value"]', ""),
        ("must be a list of turns", out, '"messages": tuple(turns)'),
        ("changed the row it was given", *popping),
        ("changed the row it was given", text, 't.pop("value")'),
        ("not from its place: two questions may follow", role, place, f"t {each}", f"i, t in {numbered}"),
        times=3,
        answers=lambda to_messages: (to_messages, back),
        right=there,
    )
    refuses(
        checks.check_sharegpt,
        (r"to_sharegpt: .* is \['user'\]; here .* human, gpt", 'SPEAKER[m["role"]]', 'm["role"]'),
        (r"\"from\" is \[None\]", "SPEAKER[m", '{"user": "human", "assistant": "gpt", "system": None}[m'),
        ("to_sharegpt: id, tags is lost", "**rest, ", ""),
        ('"messages" is still there', "**rest", "**row"),
        ("to_sharegpt returned None", lambda row: None),
        ("to_sharegpt has no entry for 'conversations': the row has", there),
        times=3,
        answers=lambda to_sharegpt: (there, to_sharegpt),
        right=back,
    )


def mask(ids, head, end):
    starts = [i + len(head) for i in range(len(ids) - len(head)) if ids[i : i + len(head)] == head]
    found = [(i, ids.index(end, i) + 1) for i in starts if end in ids[i:]]
    return [any(start <= i < stop for start, stop in found) for i in range(len(ids))]


def by_state(ids, head, end):
    marks, inside = [], False
    for i, token in enumerate(ids):
        inside = inside or ids[:i][-len(head) :] == head
        marks.append(int(inside))
        inside = inside and token != end
    return marks


no_end = mutant(mask, "(end, i) + 1", "(end, i)")


def test_answer_mask():
    accepts(checks.check_answer_mask, mask, by_state, then(mask, torch.tensor), times=20)
    marks, begins = "any(start <= i < stop for start, stop in found)", "ids[:i][-len(head) :] == head"
    any_turn = "i > 2 and ids[i - 3] == head[0] and ids[i - 1] == head[-1]"
    refuses(
        checks.check_answer_mask,
        ("there must be one for each", then(mask, lambda marks: marks[:-1])),
        ("never learns to stop", no_end),
        ("one place too early", then(mask, lambda marks: [*marks[1:], False])),
        ("one place too late", then(mask, lambda marks: [False, *marks[:-1]])),
        ("labels of −100", marks, f"(ids[i] if {marks} else -100)"),
        ("nothing is marked", marks, "False"),
        ("everything is marked", marks, "True"),
        ("wrong way round", marks, f"not {marks}"),
        ("only the last answer", "in found)", "in found[-1:])"),
        ("only the first answer", "in found)", "in found[:1])"),
        ("head of the answer is marked", "[(i, ", "[(i - len(head), "),
        ("newline after the end mark", "(end, i) + 1", "(end, i) + 2"),
        ("of the questions too", marks, f"ids[i] == end or {marks}"),
        ("stop at the end mark", "ids.index(end, i) + 1", "10**9"),
        ("not one token later", "[(i, ", "[(i + 1, "),
        ("is wrong; they should be", "if end in ids[i:]", "if end in ids[i:] and ids[i] != end"),
        right=mask,
        times=3,
    )
    refuses(
        checks.check_answer_mask,
        ("questions are marked as well", begins, any_turn),
        ("inside a text opens no answer", begins, "ids[:i][-2:] == head[1:]"),
        ("one token of the head", begins, "ids[:i][-1:] == head[1:2]"),
        ("every turn's first token", begins, "ids[:i][-1:] == head[:1]"),
        right=by_state,
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


def balance(pairs):
    ordered = sorted(pairs, key=lambda pair: abs(gap(pair)))
    longer, shorter = [p for p in ordered if gap(p) > 0], [p for p in ordered if gap(p) < 0]
    count = min(len(longer), len(shorter))
    return [p for p in ordered if gap(p) == 0] + longer[:count] + shorter[:count]


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
        ("all are kept: nothing was balanced", lambda pairs: list(pairs)),
        ("equal ones are kept|0 of each are kept", lambda pairs: []),
        ("keep all pairs of equal length", "[p for p in ordered if gap(p) == 0] + ", ""),
        ("those with the largest difference are kept", "abs(gap(pair))", "-abs(gap(pair))"),
        ("difference are kept, others with a smaller", "abs(gap(pair))", "random.random()"),
        ("keep as many|equal ones are kept|nothing was balanced", "gap(p)", "by_words(p)"),
        ("keep the equal ones", "abs(gap(pair))", "abs(by_words(pair))"),
        ("drop no more than necessary", "len(shorter))", "len(shorter)) // 2"),
        ("keep as many of both", lambda pairs: [p for p in pairs if gap(p) <= 0]),
        ("keep as many|of each are|smaller one not", lambda pairs: [p for p in pairs if abs(gap(p)) < 30]),
        ("kept twice", then(balance, lambda pairs: pairs * 2)),
        ("reordered", lambda pairs: pairs.sort(key=gap) or balance(pairs)),
        ("a text was changed: .* never cut", cutting),
        ("a returned pair is not among the given", then(copy.deepcopy, cutting)),
        ("chosen and rejected are swapped", swapping),
        times=3,
        right=balance,
    )


def split(rows, share, seed):
    cores, sizes, test = [row["core"] for row in rows], Counter(row["core"] for row in rows), set()
    names = list(dict.fromkeys(cores))
    random.Random(seed).shuffle(names)
    for core in names:
        if sum(sizes[name] for name in test) >= share * len(rows):
            break
        test.add(core)
    return [row for row in rows if row["core"] not in test], [row for row in rows if row["core"] in test]


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


def test_split():
    from_sorted = mutant(split, "list(dict.fromkeys(cores))", "sorted(set(cores))")
    accepts(checks.check_split, split, counting_down, from_sorted, times=20)
    refuses(
        checks.check_split,
        ("things; return|must each be a list", then(split, lambda sides: sides[1])),
        ("train and test are swapped", then(split, lambda sides: sides[::-1])),
        ("list of the rows", then(split, lambda sides: [[row["id"] for row in side] for side in sides])),
        ("cores are on both sides, so train answers what test asks", by_rows),
        ("take cores until|swapped", ">= share *", ">= (1 - share) *"),
        ("then stop", ">= share *", ">= (share + 0.2) *"),
        ("0 rows in test; take cores", ">= share *", ">= 0 *"),
        ("not the global generator", "random.Random(seed)", "random"),
        ("another Python process splits", "dict.fromkeys(cores)", "set(cores)"),
        ("every seed gives the same split", "random.Random(seed).shuffle(names)", "pass"),
        ("every seed gives the same split", "Random(seed)", "Random(0)"),
        ("the given list was reordered", lambda rows, *a: random.shuffle(rows) or split(rows, *a)),
        ("1 rows are on neither side", then(split, lambda sides: (sides[0][:-1], sides[1]))),
        ("is on both sides", then(split, lambda sides: (sides[0] + sides[1][:1], sides[1]))),
        ("twice on the same side", then(split, lambda sides: (sides[0] + sides[0][:1], sides[1]))),
        times=3,
        right=split,
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
