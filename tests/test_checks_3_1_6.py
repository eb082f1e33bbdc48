"""Every check of lab 3.1.6 passes right answers in several styles and names each wrong one that people really give."""

import copy
import random
import re
from collections import Counter

import pytest
import torch

from spark_ft.data.cleaning import drop_leaked
from spark_ft.data.formats import GENERATION_TEMPLATE, messages_to_sharegpt, sharegpt_to_messages
from spark_ft.data.records import read_records
from spark_ft.files import ROOT
from spark_ft.lab.checks import CheckFailed
from spark_ft.lab.checks import lab_3_1_6 as checks
from spark_ft.lab.experiments import lab_3_1_6 as study
from spark_ft.models import load_tokenizer

ROLE = {"system": "system", "human": "user", "gpt": "assistant"}
SPEAKER = {role: name for name, role in ROLE.items()}


def refuse(check, match, *answers):
    for _ in range(3):
        with pytest.raises(CheckFailed, match=match):
            check(*answers)


def passes(check, capsys, *answers):
    for _ in range(20):
        check(*answers)
    assert capsys.readouterr().out.count("✓") == 20


# ── exercise 1 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def there(row, role=ROLE.get, text=lambda value: value, turns=lambda turns: turns, keep=lambda row: row):
    rest = {key: value for key, value in row.items() if key != "conversations"}
    messages = [
        {"role": role(turn["from"]), "content": text(turn["value"])} for turn in turns(row["conversations"])
    ]
    return {**keep(rest), "messages": messages}


def back(row, role=SPEAKER.get):
    rest = {key: value for key, value in row.items() if key != "messages"}
    return {
        **rest,
        "conversations": [{"from": role(m["role"]), "value": m["content"]} for m in row["messages"]],
    }


def popping(row):
    turns = row.pop("conversations")
    row["messages"] = [{"role": ROLE[turn["from"]], "content": turn["value"]} for turn in turns]
    return row


def renaming_turns(row):
    for turn in row["conversations"]:
        turn["role"], turn["content"] = ROLE[turn.pop("from")], turn.pop("value")
    return {
        **{key: value for key, value in row.items() if key != "conversations"},
        "messages": row["conversations"],
    }


def by_place(row):
    turns = [turn for turn in row["conversations"] if turn["from"] != "system"]
    first = [
        {"role": "system", "content": turn["value"]}
        for turn in row["conversations"]
        if turn["from"] == "system"
    ]
    rest = {key: value for key, value in row.items() if key != "conversations"}
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": turn["value"]} for i, turn in enumerate(turns)
    ]
    return {**rest, "messages": first + messages}


def test_sharegpt_right(capsys):
    passes(checks.check_sharegpt, capsys, there, back)
    passes(checks.check_sharegpt, capsys, sharegpt_to_messages, messages_to_sharegpt)
    passes(checks.check_sharegpt, capsys, lambda row: popping(copy.deepcopy(row)), back)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda row: None, "to_messages returned None; is a return missing"),
        (lambda row: there(row)["messages"], "to_messages returned list; a row"),
        (
            lambda row: there(row, role=lambda name: name),
            r"\"role\" is \['(human|system)'\]; here the speakers are called",
        ),
        (
            lambda row: there(row, role={"human": "user", "gpt": "bot", "system": "system"}.get),
            r"\"role\" is \['bot'\]",
        ),
        (
            lambda row: there(row, role={"human": "user", "gpt": "assistant"}.__getitem__),
            "no entry for 'system'.*may begin",
        ),
        (lambda row: there(row, text=str.strip), "lost the white space at its ends"),
        (lambda row: there(row, text=lambda value: " ".join(value.split()) + " "), "never touches the text"),
        (
            lambda row: there(row, turns=lambda turns: [t for t in turns if t["from"] != "system"]),
            "system turn is dropped",
        ),
        (
            lambda row: there(row, turns=lambda turns: turns[:2]),
            "turns went in and 2 came out|system turn is dropped",
        ),
        (lambda row: there(row, turns=lambda turns: turns[::-1]), "reverse order"),
        (lambda row: {"messages": there(row)["messages"]}, "id, tags is lost"),
        (lambda row: {**row, **there(row)}, '"conversations" is still there'),
        (lambda row: {**there(row), "conversation": there(row)["messages"]}, "not all of it was in the row"),
        (lambda row: {**row, "conversations": there(row)["messages"]}, 'there is no "messages"'),
        (
            lambda row: {
                **there(row),
                "messages": [[m["role"], m["content"]] for m in there(row)["messages"]],
            },
            'must have "role"',
        ),
        (
            lambda row: {**there(row), "messages": [{"role": m["role"]} for m in there(row)["messages"]]},
            'and "content", not',
        ),
        (lambda row: {**there(row), "messages": tuple(there(row)["messages"])}, "must be a list of turns"),
        (popping, "changed the row it was given"),
        (renaming_turns, "changed the row it was given"),
        (by_place, "not from its place: two questions may follow"),
        (lambda row: {**there(row), "id": str(row["id"])}, "not all of it was in the row"),
    ],
)
def test_to_messages_mutants(mutant, message):
    refuse(checks.check_sharegpt, message, mutant, back)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (
            lambda row: back(row, role=lambda role: role),
            r"to_sharegpt: \"from\" is \['user'\]; here .* system, human, gpt",
        ),
        (lambda row: back(row, role={"user": "human", "assistant": "gpt"}.get), r"\"from\" is \[None\]"),
        (lambda row: {"conversations": back(row)["conversations"]}, "to_sharegpt: id, tags is lost"),
        (lambda row: {**row, **back(row)}, '"messages" is still there'),
        (lambda row: None, "to_sharegpt returned None"),
        (there, "to_sharegpt has no entry for 'conversations': the row has"),
    ],
)
def test_to_sharegpt_mutants(mutant, message):
    refuse(checks.check_sharegpt, message, there, mutant)


# ── exercise 2 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def spans(ids, head, end):
    """(place of the head, place of the first token, place of the end mark) of every answer."""
    found = []
    for i in range(len(ids) - len(head)):
        if ids[i : i + len(head)] == head and end in ids[i + len(head) :]:
            found.append((i, i + len(head), ids.index(end, i + len(head))))
    return found


def marked(ids, ranges):
    return [any(start <= i < stop for start, stop in ranges) for i in range(len(ids))]


def mask(ids, head, end):
    return marked(ids, [(first, last + 1) for _, first, last in spans(ids, head, end)])


def by_state(ids, head, end):
    marks, inside, i = [], False, 0
    while i < len(ids):
        if not inside and ids[i : i + len(head)] == head:
            marks += [0] * len(head)
            i, inside = i + len(head), True
            continue
        marks.append(int(inside))
        inside = inside and ids[i] != end
        i += 1
    return marks


def test_answer_mask_right(capsys):
    passes(checks.check_answer_mask, capsys, mask)
    passes(checks.check_answer_mask, capsys, by_state)
    passes(checks.check_answer_mask, capsys, lambda *a: torch.tensor(mask(*a)))


def words_open(ids, head, end):
    return checks._scan(ids, head[1:])


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda ids, head, end: None, "is a return missing"),
        (lambda ids, head, end: mask(ids, head, end)[:-1], "there must be one for each"),
        (
            lambda ids, head, end: [i if m else -100 for i, m in zip(ids, mask(ids, head, end), strict=True)],
            "labels of −100",
        ),
        (lambda ids, head, end: [False] * len(ids), "nothing is marked"),
        (lambda ids, head, end: [True] * len(ids), "everything is marked"),
        (lambda ids, head, end: [not m for m in mask(ids, head, end)], "wrong way round"),
        (
            lambda ids, head, end: marked(ids, [(a, b) for _, a, b in spans(ids, head, end)]),
            "never learn to stop",
        ),
        (
            lambda ids, head, end: marked(ids, [(a, b + 1) for _, a, b in spans(ids, head, end)[-1:]]),
            "only the last answer",
        ),
        (
            lambda ids, head, end: marked(ids, [(a, b + 1) for _, a, b in spans(ids, head, end)[:1]]),
            "only the first answer",
        ),
        (
            lambda ids, head, end: marked(ids, [(h, b + 1) for h, _, b in spans(ids, head, end)]),
            "head of the answer is marked",
        ),
        (
            lambda ids, head, end: marked(ids, [(a, b + 2) for _, a, b in spans(ids, head, end)]),
            "newline after the end mark",
        ),
        (
            lambda ids, head, end: [m or i == end for m, i in zip(mask(ids, head, end), ids, strict=True)],
            "of the questions too",
        ),
        (
            lambda ids, head, end: [
                any(x)
                for x in zip(*(checks._scan(ids, h) for h in (head, checks.USER, checks.SYSTEM)), strict=True)
            ],
            "questions are marked as well",
        ),
        (
            lambda ids, head, end: marked(ids, [(spans(ids, head, end)[0][1], len(ids))]),
            "nothing switches it off",
        ),
        (
            lambda ids, head, end: marked(ids, [(a + 1, b + 1) for _, a, b in spans(ids, head, end)]),
            "not one token later",
        ),
        (lambda ids, head, end: [*mask(ids, head, end)[1:], False], "one place too early"),
        (lambda ids, head, end: [False, *mask(ids, head, end)[:-1]], "one place too late"),
        (words_open, "inside a text opens no answer"),
        (lambda ids, head, end: checks._scan(ids, head[1:2]), "one token of the head"),
        (lambda ids, head, end: checks._scan(ids, head[:1]), "every turn's first token"),
        (
            lambda ids, head, end: marked(ids, [(a, b + 1) for _, a, b in spans(ids, head, end) if b > a]),
            "is marked wrongly; right is",
        ),
    ],
)
def test_answer_mask_mutants(mutant, message):
    refuse(checks.check_answer_mask, message, mutant)


def test_mask_parity_on_the_kitchen_chats(capsys):
    tokenizer = copy.deepcopy(load_tokenizer())
    tokenizer.chat_template = GENERATION_TEMPLATE
    chats = [
        sharegpt_to_messages(row) for row in read_records(ROOT / "data/kitchen_chats/train.jsonl", "sharegpt")
    ]
    checks.check_mask_parity(mask, tokenizer, chats)
    assert "the same on 40 chats" in capsys.readouterr().out
    with pytest.raises(CheckFailed, match=r"chat 0: your marks and TRL's differ at token \[\d+\]"):
        checks.check_mask_parity(
            lambda *a: marked(a[0], [(f, e) for _, f, e in spans(*a)]), tokenizer, chats[:3]
        )


# ── exercise 3 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def grams(text, size=3, pattern=r"\w+", lower=True):
    words = re.findall(pattern, text.lower() if lower else text)
    return [tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]


def share(a, b, top=lambda x, y: len(x & y), bottom=lambda x, y: len(x | y), **how):
    x, y = set(grams(a, **how)), set(grams(b, **how))
    return top(x, y) / bottom(x, y)


def counted(a, b):
    x, y = Counter(grams(a)), Counter(grams(b))
    return (x & y).total() / (x | y).total()


def characters(a, b):
    x, y = ({t.lower()[i : i + 3] for i in range(max(1, len(t) - 2))} for t in (a, b))
    return len(x & y) / len(x | y)


def joined(a, b):
    x, y = ({" ".join(gram) for gram in grams(text.casefold())} for text in (a, b))
    return len(x.intersection(y)) / len(x.union(y))


def no_short_texts(a, b):
    x, y = (
        {tuple(w[i : i + 3]) for i in range(len(w) - 2)}
        for w in (re.findall(r"\w+", t.lower()) for t in (a, b))
    )
    return len(x & y) / len(x | y)


def short_texts_share_nothing(a, b):
    x, y = (
        {tuple(w[i : i + 3]) for i in range(len(w) - 2)}
        for w in (re.findall(r"\w+", t.lower()) for t in (a, b))
    )
    return len(x & y) / len(x | y) if x | y else 0.0


def test_shared_trigrams_right(capsys):
    passes(checks.check_shared_trigrams, capsys, share)
    passes(checks.check_shared_trigrams, capsys, joined)
    passes(checks.check_shared_trigrams, capsys, lambda a, b: int(s) if (s := share(a, b)) in (0, 1) else s)


def test_in_every_draw_the_first_text_has_more_pieces_in_some_pairs_and_fewer_in_others():
    for seed in range(300):  # else "divided by the smaller" and "by the second" could not be told apart
        sizes = [[len(set(grams(text))) for text in pair] for pair in checks._texts(random.Random(seed))]
        assert any(a > b for a, b in sizes)
        assert any(a < b for a, b in sizes)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda a, b: None, "is a return missing"),
        (lambda a, b: set(grams(a)) & set(grams(b)), "returned set; a number from 0 to 1"),
        (lambda a, b: share(a, b, lower=False), "capitals count"),
        (lambda a, b: share(a, b, pattern=r"\S+"), "cling to the words"),
        (lambda a, b: share(a, b, bottom=lambda x, y: min(len(x), len(y))), "smaller set"),
        (lambda a, b: share(a, b, bottom=lambda x, y: max(len(x), len(y))), "larger set"),
        (lambda a, b: share(a, b, bottom=lambda x, y: len(x)), "first text's pieces"),
        (lambda a, b: share(a, b, bottom=lambda x, y: len(y)), "second text's pieces"),
        (lambda a, b: 2 * share(a, b, bottom=lambda x, y: len(x) + len(y)), "Dice"),
        (lambda a, b: share(a, b, bottom=lambda x, y: len(x) + len(y)), "counts twice what both share"),
        (counted, "repeated trigrams"),
        (lambda a, b: 1 - share(a, b), "that is the distance"),
        (lambda a, b: share(a, b, size=1), "single words"),
        (lambda a, b: share(a, b, size=2), "pairs of words"),
        (characters, "trigrams of characters"),
        (lambda a, b: 100 * share(a, b), "return the share"),
        (lambda a, b: share(a, b, bottom=lambda x, y: 1), "number of shared trigrams"),
        (
            lambda a, b: (
                len(set(grams(a)[::3]) & set(grams(b)[::3])) / len(set(grams(a)[::3]) | set(grams(b)[::3]))
            ),
            "every third",
        ),
        (no_short_texts, "divided by zero; a text of fewer than three words"),
        (short_texts_share_nothing, "but should be .* count as one piece"),
        (lambda a, b: round(share(a, b)), "but should be"),
    ],
)
def test_shared_trigrams_mutants(mutant, message):
    refuse(checks.check_shared_trigrams, message, mutant)


# ── exercise 4 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def gap(pair):
    return len(pair["chosen"]) - len(pair["rejected"])


def by_words(pair):
    return len(pair["chosen"].split()) - len(pair["rejected"].split())


def balance(pairs, measure=gap, key=lambda pair: abs(gap(pair)), equal=True, fewer=lambda n: n):
    ordered = sorted(pairs, key=key)
    longer, shorter = [p for p in ordered if measure(p) > 0], [p for p in ordered if measure(p) < 0]
    count = fewer(min(len(longer), len(shorter)))
    return [p for p in ordered if measure(p) == 0] * equal + longer[:count] + shorter[:count]


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


def cut_copies(pairs):
    return cutting(copy.deepcopy(pairs))


def random_ones(pairs):
    return balance(random.sample(pairs, len(pairs)), key=lambda pair: 0)


def swapping(pairs):
    return [p if gap(p) <= 0 else {**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]


def near_ones(pairs):
    return [pair for pair in pairs if abs(gap(pair)) < 30]


def test_balance_right(capsys):
    passes(checks.check_balance, capsys, balance)
    passes(checks.check_balance, capsys, by_popping)
    passes(checks.check_balance, capsys, lambda pairs: [p for p in pairs if p in balance(pairs)])


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda pairs: None, "is a return missing"),
        (lambda pairs: list(pairs), "all are kept: nothing was balanced"),
        (lambda pairs: [], "equal ones are kept|0 of each are kept"),
        (lambda pairs: balance(pairs, equal=False), "pairs of equal length give nothing away"),
        (
            lambda pairs: balance(pairs, key=lambda pair: -abs(gap(pair))),
            "those with the largest difference are kept",
        ),
        (random_ones, "difference are kept, and others with a smaller"),
        (
            lambda pairs: balance(pairs, measure=by_words),
            "must be as many|equal ones are kept|nothing was balanced",
        ),
        (lambda pairs: balance(pairs, key=lambda pair: abs(by_words(pair))), "keep the most equal"),
        (lambda pairs: balance(pairs, fewer=lambda n: n // 2), "throw away no more than you must"),
        (lambda pairs: [p for p in pairs if gap(p) <= 0], "as many of the one as of the other"),
        (near_ones, "as many of the one|of each are kept|smaller one are not"),
        (lambda pairs: balance(pairs) * 2, "kept twice"),
        (in_place, "in another order now"),
        (cutting, "a text was changed: .* never cut"),
        (cut_copies, "a pair came out that did not go in"),
        (swapping, "chosen and rejected are swapped"),
    ],
)
def test_balance_mutants(mutant, message):
    refuse(checks.check_balance, message, mutant)


# ── exercise 5 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def split(
    rows,
    share,
    seed,
    names=lambda rows: list(dict.fromkeys(row["core"] for row in rows)),
    rng=random.Random,
    stop=0.0,
):
    cores = names(rows)
    rng(seed).shuffle(cores)
    test, sizes = set(), Counter(row["core"] for row in rows)
    for core in cores:
        if sum(sizes[name] for name in test) >= (share + stop) * len(rows):
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


def unseeded(rows, share, seed):
    return split(rows, share, seed, rng=lambda seed: random)


def losing(rows, share, seed):
    train, test = split(rows, share, seed)
    return train[:-1], test


def twice(rows, share, seed):
    train, test = split(rows, share, seed)
    return train + test[:1], test


def repeated(rows, share, seed):
    train, test = split(rows, share, seed)
    return [*train, train[0]], test


def in_place_rows(rows, share, seed):
    random.Random(seed).shuffle(rows)
    return split(rows, share, seed)


def unshuffled(rows, share, seed):
    return split(rows, share, 0)


def first_ones(rows, share, seed):
    class Still(random.Random):
        def shuffle(self, x):
            pass

    return split(rows, share, seed, rng=Still)


def test_split_right(capsys):
    passes(checks.check_split, capsys, split)
    passes(checks.check_split, capsys, counting_down)
    passes(
        checks.check_split,
        capsys,
        lambda *a: split(*a, names=lambda rows: sorted({row["core"] for row in rows})),
    )


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda rows, share, seed: None, "is a return missing"),
        (lambda rows, share, seed: split(rows, share, seed)[1], "things; return|must each be a list"),
        (lambda rows, share, seed: split(rows, share, seed)[::-1], "train and test are swapped"),
        (
            lambda rows, share, seed: tuple([r["id"] for r in s] for s in split(rows, share, seed)),
            "lists? of the rows themselves",
        ),
        (by_rows, "cores are on both sides, so test asks what train has answered"),
        (lambda rows, share, seed: split(rows, 1 - share, seed), "take cores until|swapped"),
        (lambda rows, share, seed: split(rows, share, seed, stop=0.2), "and then no more"),
        (lambda rows, share, seed: split(rows, share, seed, stop=-share), "0 rows in test; take cores"),
        (unseeded, "not with the global generator"),
        (
            lambda *a: split(*a, names=lambda rows: list({row["core"] for row in rows})),
            "another Python process would split",
        ),
        (first_ones, "every seed gives the same split"),
        (unshuffled, "every seed gives the same split"),
        (in_place_rows, "list that was given in is in another order"),
        (losing, "1 rows are on neither side"),
        (twice, "is on both sides"),
        (repeated, "comes twice on the same side"),
    ],
)
def test_split_mutants(mutant, message):
    refuse(checks.check_split, message, mutant)


# ── the experiment ───────────────────────────────────────────────────────────────────────────────────────────────────────


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
