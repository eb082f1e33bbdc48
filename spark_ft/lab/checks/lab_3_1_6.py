"""Checks of lab 3.1.6: conversion both ways, answer masks, near-duplicates, balanced lengths, splits."""

import copy
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from spark_ft.lab.checks import CheckFailed, check, require

Row = dict[str, Any]


def _draw() -> random.Random:
    """A generator of the check's own, seeded anew each time."""
    return random.Random(int(torch.randint(2**62, ())))


def _returned(value: Any, kind: type | tuple[type, ...], what: str, wanted: str) -> None:
    require(value is not None, f"{what} returned None; is a return missing?")
    require(isinstance(value, kind), f"{what} returned {type(value).__name__}; {wanted}")


# ── exercise 1 ──

NAMES = {"system": "system", "human": "user", "gpt": "assistant"}
TEXTS = [
    "How long does rice take?",
    "  four spaces of a code block\n    stay",
    "Ends with a newline\n",
    "\tmake: soup\n",
    "½ of it at 180 °C – voilà 🥞",
    "user: this is a text, not a turn",
    "{braces} and {{ more }}",
    "gpt",
    "human",
]


def _sharegpt_rows() -> list[Row]:
    """Chats with and without a system turn, with two questions in a row, and with unknown fields."""
    rng, rows = _draw(), []
    texts = itertools.cycle(rng.sample(TEXTS, len(TEXTS)))  # each comes at least once
    for speakers in (
        ["human", "gpt"],
        ["system", "human", "gpt", "human", "gpt"],
        ["human", "human", "gpt"],
        ["system", "human", "gpt"],
        ["human", "gpt", "human", "gpt", "human", "gpt"],
    ):
        turns = [{"from": who, "value": next(texts)} for who in speakers]
        rows.append({"id": rng.randrange(10**6), "conversations": turns, "tags": ["soup", rng.random()]})
    return rows


@check
def check_sharegpt(to_messages: Callable[[Row], Row], to_sharegpt: Callable[[Row], Row]) -> str:
    """ShareGPT → messages → ShareGPT: roles renamed, the rest unchanged, and the given rows unchanged too."""
    for row in _sharegpt_rows():
        expected = {
            **{key: value for key, value in row.items() if key != "conversations"},
            "messages": [
                {"role": NAMES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]
            ],
        }
        there = _converted("to_messages", to_messages, row)
        _same_chat("to_messages", there, expected, "messages", "role", "content", "conversations")
        back = _converted("to_sharegpt", to_sharegpt, expected)
        _same_chat("to_sharegpt", back, row, "conversations", "from", "value", "messages")
    return "there and back gives the same row, with system turns, white space and unknown fields"


def _converted(name: str, convert: Callable[[Row], Row], row: Row) -> Row:
    before = copy.deepcopy(row)
    try:
        result = convert(row)
    except KeyError as error:
        has = (
            "a chat may begin with a system turn"
            if "system" in str(error)
            else f"the row has {', '.join(row)}"
        )
        raise CheckFailed(f"{name} has no entry for {error}: {has}") from error
    _returned(result, dict, name, "a row (a dict) goes in and a row comes out")
    require(
        row == before,
        f"{name} changed the row it was given: make new dicts, since other code may need the old ones",
    )
    return result


def _same_chat(name: str, got: Row, expected: Row, field: str, who: str, what: str, old: str) -> None:
    require(field in got, f'{name}: there is no "{field}" in {sorted(got)}')
    require(
        old not in got,
        f'{name}: "{old}" is still there beside "{field}"; sooner or later two copies differ',
    )
    lost = sorted(key for key in expected if key not in got)
    require(not lost, f"{name}: {', '.join(lost)} is lost; keep the fields that you don't know")
    turns, wanted = got[field], expected[field]
    _returned(turns, list, f'{name}: "{field}"', "it must be a list of turns")
    require(
        all(isinstance(turn, dict) and who in turn and what in turn for turn in turns),
        f'{name}: each turn must have "{who}" and "{what}", not {_keys(turns)}',
    )
    speakers, right = [turn[who] for turn in turns], [turn[who] for turn in wanted]
    called = list(NAMES.values() if who == "role" else NAMES)
    foreign = [speaker for speaker in speakers if speaker not in called]
    require(
        not foreign, f'{name}: "{who}" is {foreign[:1]}; here the speakers are called {", ".join(called)}'
    )
    dropped_system = right[0] == "system" and speakers == right[1:]
    require(
        not dropped_system,
        f"{name}: the system turn is dropped; it holds the model's first instructions",
    )
    require(len(turns) == len(wanted), f"{name}: {len(wanted)} turns went in and {len(turns)} came out")
    require(speakers == right or speakers != right[::-1], f"{name}: the turns are in reverse order")
    require(
        speakers == right,
        f'{name}: "{who}" is {speakers}, but should be {right}; take it from the turn itself, not from its '
        "place: two questions may follow each other",
    )
    for turn, true in zip(turns, wanted, strict=True):
        said, text = turn[what], true[what]
        require(
            said == text or not isinstance(said, str) or said != text.strip(),
            f"{name}: {text!r} lost the white space at its ends, which has a meaning in code",
        )
        require(said == text, f"{name}: {text!r} became {said!r}; a conversion never touches the text")
    require(
        got == expected,
        f"{name} gave {json.dumps(got, ensure_ascii=False)[:300]}, but not all of it was in the row",
    )


def _keys(turns: list[Any]) -> str:
    return next((str(sorted(t)) if isinstance(t, dict) else type(t).__name__ for t in turns), "nothing")


# ── exercise 2 ──

HEAD, END, NEWLINE = [4, 5, 6], 2, 6  # <|im_start|>, "assistant", "\n"; <|im_end|>
USER, SYSTEM = [4, 7, 6], [4, 8, 6]


def _conversation(rng: random.Random, answers: int, waiting: bool) -> tuple[list[int], list[bool]]:
    """ChatML token ids, and whether each belongs to an answer; `waiting`: the last head has no answer yet."""
    ids, learned = [], []
    for head in [SYSTEM] * rng.randint(0, 1) + [USER, HEAD] * answers + [USER] * waiting:
        # Any text may contain "assistant" (5) and "\n" (6), but no control token; an answer may be empty.
        text = [rng.choice([5, 6, *range(10, 40)]) for _ in range(rng.randint(0 if head is HEAD else 1, 7))]
        text = rng.choice([text, [5, 6, *text]]) if head is USER else text
        ids += [*head, *text, END, NEWLINE]
        learned += [False] * len(head) + [head is HEAD] * (len(text) + 1) + [False]
    ids += HEAD * waiting
    return ids, learned + [False] * len(HEAD) * waiting


def _scan(ids: list[int], head: list[int]) -> list[bool]:
    """Marks from after each `head` to the end mark, included."""
    marks, inside = [], False
    for i, token in enumerate(ids):
        inside = inside or ids[max(0, i - len(head)) : i] == head
        marks.append(inside)
        inside = inside and token != END
    return marks


def _keep(condition: Callable[[int], bool]) -> Callable[[list[int], list[bool]], list[bool]]:
    return lambda ids, right: [mark and condition(token) for mark, token in zip(right, ids, strict=True)]


def _moved(before: int, after: int) -> Callable[[list[int], list[bool]], list[bool]]:
    """Every answer's span, extended by so many positions."""
    return lambda ids, right: _only([(start - before, end + after) for start, end in _spans(right)], len(ids))


MASK_MISTAKES: dict[str, Callable[[list[int], list[bool]], list[bool]]] = {
    "nothing is marked": lambda ids, right: [False] * len(ids),
    "everything is marked: the model learns to write the questions too": lambda ids, right: [True] * len(ids),
    "marked the wrong way round: the answers are missing": lambda ids, right: [not mark for mark in right],
    "the end mark is not marked: the model never learns to stop": _keep(lambda token: token != END),
    "only the last answer is marked": lambda ids, right: _only(_spans(right)[-1:], len(ids)),
    "only the first answer is marked": lambda ids, right: _only(_spans(right)[:1], len(ids)),
    "the head of the answer is marked too, but the template writes it, not the model": _moved(len(HEAD), 0),
    "the newline after the end mark is marked too, but generation stops before it": _moved(0, 1),
    "an answer begins right after the head, not one token later": _moved(-1, 0),
    "the end marks of all turns are marked: those of the questions too": lambda ids, right: [
        mark or token == END for mark, token in zip(right, ids, strict=True)
    ],
    "the questions are marked as well": lambda ids, right: [
        any(marks) for marks in zip(right, _scan(ids, USER), _scan(ids, SYSTEM), strict=True)
    ],
    "everything from the first answer on is marked: stop at the end mark": lambda ids, right: [
        i >= _spans(right)[0][0] for i in range(len(ids))
    ],
    "marked one place too early: mark the tokens themselves, the model shifts its labels": (
        lambda ids, right: [*right[1:], False]
    ),
    "marked one place too late": lambda ids, right: [False, *right[:-1]],
    "the word “assistant” inside a text opens no answer: the whole head must match": (
        lambda ids, right: _scan(ids, HEAD[1:])
    ),
    "one token of the head is not enough: all of it must match": lambda ids, right: _scan(ids, HEAD[1:2]),
    "every turn's first token opens an answer: the whole head must match": (
        lambda ids, right: _scan(ids, HEAD[:1])
    ),
}


@check
def check_answer_mask(answer: Callable[[list[int], list[int], int], list[bool]]) -> str:
    """answer_mask(ids, head, end): every answer's tokens and its end mark, in chats of every length."""
    rng = _draw()
    chats = [
        _conversation(rng, answers, waiting) for answers in (1, 2, 3, 4) * 3 for waiting in (False, True)
    ]
    found = []
    for ids, _ in chats:
        got = answer(list(ids), list(HEAD), END)
        require(got is not None, "answer_mask returned None; is a return missing?")
        got = list(got)
        require(len(got) == len(ids), f"{len(got)} marks for {len(ids)} tokens; there must be one for each")
        require(-100 not in got, "there are labels of −100; return True and False, not labels")
        found.append([bool(mark) for mark in got])
    for message, mistake in MASK_MISTAKES.items():
        if all(marks == mistake(*chat) for marks, chat in zip(found, chats, strict=True)):
            raise CheckFailed(message)
    for marks, (ids, right) in zip(found, chats, strict=True):
        place = next((i for i, pair in enumerate(zip(marks, right, strict=True)) if pair[0] != pair[1]), None)
        require(
            place is None,
            f"with head {HEAD} and end {END}, the mark at {place} of {ids} is wrong; they should be {right}",
        )
    return "every answer and its end mark, and nothing else"


def _spans(marks: list[bool]) -> list[tuple[int, int]]:
    edges = [i for i in range(len(marks) + 1) if (i < len(marks) and marks[i]) != (i > 0 and marks[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _only(spans: list[tuple[int, int]], length: int) -> list[bool]:
    return [any(start <= i < end for start, end in spans) for i in range(length)]


@check
def check_mask_parity(
    answer: Callable[[list[int], list[int], int], list[bool]], tokenizer, chats: list[Row]
) -> str:
    """Yours, spark_ft's and TRL's marks on real chats."""
    from spark_ft.data.chat import all_answers
    from spark_ft.lab.parity import trl_marks

    head, (end,) = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in ("<|im_start|>assistant\n", "<|im_end|>")
    )
    learned = 0
    for number, (chat, (ids, theirs)) in enumerate(
        zip(chats, trl_marks(chats, tokenizer, assistant_only=True), strict=True)
    ):
        yours = [bool(mark) for mark in answer(list(ids), list(head), end)]
        ours = all_answers(chat, tokenizer)[1]
        ours += [False] * (len(ids) - len(ours))  # TRL keeps the newline after the last end mark
        require(ours == theirs, f"chat {number}: spark_ft's marks and TRL's differ")
        differ = [i for i, marks in enumerate(zip(yours, theirs, strict=True)) if marks[0] != marks[1]]
        require(not differ, f"chat {number}: your marks and TRL's differ at token {differ[:1]}")
        learned += sum(theirs)
    return (
        f"yours, spark_ft's and TRL's marks are the same on {len(chats)} chats: {learned:,} tokens to learn"
    )


# ── exercise 3 ──


def _pieces(text: str, size: int = 3, pattern: str = r"\w+", lower: bool = True) -> list[tuple[str, ...]]:
    words = re.findall(pattern, text.lower() if lower else text)
    return [tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]


def _jaccard(a: Any, b: Any) -> float:
    a, b = set(a), set(b)
    return len(a & b) / len(a | b)


def _characters(text: str) -> set[str]:
    return {text.lower()[i : i + 3] for i in range(max(1, len(text) - 2))}


def _counted(a: str, b: str) -> float:
    x, y = Counter(_pieces(a)), Counter(_pieces(b))
    return (x & y).total() / (x | y).total()


def _over(divisor: Callable[[set, set], int]) -> Callable[[str, str], float]:
    def share(a: str, b: str) -> float:
        x, y = set(_pieces(a)), set(_pieces(b))
        return len(x & y) / divisor(x, y)

    return share


def _of(**how: Any) -> Callable[[str, str], float]:
    return lambda a, b: _jaccard(_pieces(a, **how), _pieces(b, **how))


SHARE_MISTAKES: dict[str, Callable[[str, str], float]] = {
    "capitals count: lower-case both texts first": _of(lower=False),
    "commas and full stops count as parts of words: use the pattern \\w+": _of(pattern=r"\S+"),
    "divided by the smaller set, so a short text inside a long one is a copy; divide by the union": _over(
        lambda x, y: min(len(x), len(y))
    ),
    "divided by the larger set; divide by the union": _over(lambda x, y: max(len(x), len(y))),
    "divided by the first text's pieces, so order matters; divide by the union": _over(lambda x, y: len(x)),
    "divided by the second text's pieces, so order matters; divide by the union": _over(lambda x, y: len(y)),
    "that is Dice's coefficient, 2|A ∩ B| / (|A| + |B|); divide by the union": _over(
        lambda x, y: (len(x) + len(y)) / 2
    ),
    "divided by |A| + |B|, which counts shared pieces twice": _over(lambda x, y: len(x) + len(y)),
    "repeated trigrams are counted each time; a set holds each once": _counted,
    "that is the distance, 1 − the share": lambda a, b: 1 - _of()(a, b),
    "those are single words, in any order; take three in a row": _of(size=1),
    "those are pairs of words; take three in a row": _of(size=2),
    "those are trigrams of characters; take words": lambda a, b: _jaccard(_characters(a), _characters(b)),
    "every third trigram only: the windows must overlap": (
        lambda a, b: _jaccard(_pieces(a)[::3], _pieces(b)[::3])
    ),
    "a number from 0 to 100; return the share": lambda a, b: 100 * _of()(a, b),
    "the number of shared trigrams; divide it by that of all": _over(lambda x, y: 1),
}


def _texts(rng: random.Random) -> list[tuple[str, str]]:
    """Pairs of texts: equal, unrelated, short, and edited with capitals, commas and a repeated stretch."""
    words = [f"w{i}" for i in range(12)]

    def text(count: int) -> str:
        return " ".join(rng.choice([word, word.title()]) for word in rng.choices(words, k=count))

    same = text(9)
    pairs = [
        (same, same),
        (text(4), "nothing of the kind"),
        ("Soup?", "soup"),
        ("leek soup", "leek"),
        ("Soup", "ham and eggs"),
    ]
    for i in range(16):  # in one of four pairs the first text is the longer one, in another the second
        whole = text(rng.randint(6, 14))
        edited = [rng.choice([word.lower(), word.upper()]) for word in whole.split(" ")]
        edited[rng.randrange(len(edited))] = "other"
        edited += edited[:5] * (i % 2)
        pair = (whole.replace(" ", ", ", 1) + ".", " ".join(edited))
        pairs.append(pair if i % 4 < 2 else pair[::-1])
    return pairs


@check
def check_shared_trigrams(answer: Callable[[str, str], float]) -> str:
    """shared_trigrams(a, b): Jaccard similarity of the sets of word trigrams."""
    pairs, found = _texts(_draw()), []
    for a, b in pairs:
        try:
            got = answer(a, b)
        except ZeroDivisionError:
            raise CheckFailed(
                f"{a!r} and {b!r}: divided by zero; a text of fewer than three words counts as one piece"
            ) from None
        _returned(got, (int, float), "shared_trigrams", "a number from 0 to 1")
        found.append(float(got))

    def explained(share: Callable[[str, str], float]) -> bool:
        return all(
            math.isclose(got, share(*pair), abs_tol=1e-9) for got, pair in zip(found, pairs, strict=True)
        )

    for message, mistake in SHARE_MISTAKES.items():
        require(not explained(mistake), message)
    for got, (a, b) in zip(found, pairs, strict=True):
        right = _of()(a, b)
        few = min(len(_pieces(a)[0]), len(_pieces(b)[0])) < 3
        short = "; fewer than three words count as one piece" if few else ""
        require(
            math.isclose(got, right, abs_tol=1e-9),
            f"{got:.3g} for {a!r} and {b!r}, but should be {right:.3g}{short}",
        )
    return f"|A ∩ B| / |A ∪ B| of word trigrams, on {len(pairs)} pairs of texts"


# ── exercise 4 ──


def _gap(pair: Row) -> int:
    return len(pair["chosen"]) - len(pair["rejected"])


def _balanced(pairs: list[Row]) -> list[Row]:
    ordered = sorted(pairs, key=lambda pair: abs(_gap(pair)))
    longer, shorter = [p for p in ordered if _gap(p) > 0], [p for p in ordered if _gap(p) < 0]
    count = min(len(longer), len(shorter))
    return [p for p in ordered if _gap(p) == 0] + longer[:count] + shorter[:count]


def _lengthy_pairs(rng: random.Random, longer: int, shorter: int, equal: int) -> list[Row]:
    """Pairs with distinct gaps; few long words against many short ones, so that counts of words mislead."""
    gaps = rng.sample(range(1, 90), longer + shorter)
    signed = [gap if i < longer else -gap for i, gap in enumerate(gaps)] + [0] * equal
    pairs = []
    for gap in signed:
        base = rng.randint(100, 160)
        a, b = base + max(gap, 0), base + max(-gap, 0)
        few = "".join(rng.choice("aeiou") for _ in range(max(a, b)))
        many = (" " + rng.choice("aeiou")) * max(a, b)
        chosen, rejected = rng.choice([(few, many), (many, few)])
        pairs.append(
            {
                "prompt": f"question {rng.randrange(10**9)}",
                "chosen": "c" + chosen[: a - 1],
                "rejected": "r" + rejected[: b - 1],
            }
        )
    rng.shuffle(pairs)
    return pairs


@check
def check_balance(answer: Callable[[list[Row]], list[Row]]) -> str:
    """balance(pairs): as many with the longer answer chosen as with the shorter; the most equal are kept."""
    rng = _draw()
    for longer, shorter, equal in ((6, 3, 1), (2, 7, 0), (4, 4, 2), (5, 0, 2), (0, 0, 3), (9, 5, 1)):
        pairs = _lengthy_pairs(rng, longer, shorter, equal)
        what = (
            f"of {longer} pairs with the longer answer chosen, {shorter} with the shorter and {equal} equal"
        )
        given, before = list(pairs), copy.deepcopy(pairs)
        kept = answer(given)
        _returned(kept, (list, tuple), "balance", "it must be a list of pairs")
        require(pairs == before, "a text was changed: keep or drop whole pairs, never cut a text")
        require(
            given == pairs,
            "the given list was reordered or shortened: use sorted(), not .sort(), and build a new list",
        )
        _balance_is_right(list(kept), pairs, what)
    return "as many longer as shorter ones, the most equal ones, and no more dropped than necessary"


def _balance_is_right(kept: list[Row], pairs: list[Row], what: str) -> None:
    for pair in kept:
        known = pair in pairs
        swapped = not known and any(
            pair.get("chosen") == p["rejected"] and pair.get("rejected") == p["chosen"] for p in pairs
        )
        require(not swapped, "chosen and rejected are swapped: that teaches the worse answer")
        require(known, "a returned pair is not among the given ones: keep or drop whole pairs")
    require(len({pair["prompt"] for pair in kept}) == len(kept), "a pair is kept twice")
    right = _balanced(pairs)
    count = {sign: sum(sign * _gap(pair) > 0 for pair in kept) for sign in (1, -1)}
    every = {sign: sum(sign * _gap(pair) > 0 for pair in pairs) for sign in (1, -1)}
    equal = sum(_gap(pair) == 0 for pair in kept)
    require(
        equal == sum(_gap(pair) == 0 for pair in pairs),
        f"{what}, {equal} equal ones are kept: keep all pairs of equal length, they show no preference",
    )
    by_words = {
        sign: sum(sign * (len(p["chosen"].split()) - len(p["rejected"].split())) > 0 for p in kept)
        for sign in (1, -1)
    }
    measured = "; measure characters with len(text), not words" if by_words[1] == by_words[-1] else ""
    if count[1] != count[-1]:
        require(len(kept) < len(pairs), f"{what}, all are kept: nothing was balanced")
        raise CheckFailed(f"{what}, {count[1]} and {count[-1]} are kept: keep as many of both{measured}")
    fewer = min(every.values())
    require(
        count[1] == fewer,
        f"{what}, {count[1]} of each are kept, but {fewer} could be: drop no more than necessary",
    )
    ids = {pair["prompt"] for pair in right}
    if {pair["prompt"] for pair in kept} != ids:
        farthest = sorted(pairs, key=lambda pair: -abs(_gap(pair)))
        unequal = {
            p["prompt"] for sign in (1, -1) for p in [p for p in farthest if sign * _gap(p) > 0][:fewer]
        }
        worst = unequal | {p["prompt"] for p in pairs if _gap(p) == 0} == {pair["prompt"] for pair in kept}
        which = "those with the largest difference" if worst else "some with a larger difference"
        raise CheckFailed(
            f"{what}, {which} are kept, others with a smaller one not: keep the equal ones{measured}"
        )


# ── exercise 5 ──


class _Group(str):
    """A text whose hash, and so a set's order, changes with `salt`, as it does between Python processes."""

    salt = 0

    def __hash__(self) -> int:
        return hash((str(self), _Group.salt))


def _grouped_rows(rng: random.Random, groups: int, most: int) -> list[Row]:
    rows = [
        {"prompt": f"{name}, question {i}", "core": _Group(name)}
        for name in (f"core {rng.randrange(10**6)}" for _ in range(groups))
        for i in range(rng.randint(1, most))
    ]
    return [{"id": number, **row} for number, row in enumerate(rows)]


@check
def check_split(answer: Callable[[list[Row], float, int], tuple[list[Row], list[Row]]]) -> str:
    """split_by_core(rows, share, seed): whole cores on each side, drawn at random from the seed."""
    rng = _draw()
    for groups, most, share in ((40, 3, 0.2), (25, 5, 0.3), (60, 2, 0.1)):
        rows = _grouped_rows(rng, groups, most)
        ids = [row["id"] for row in rows]
        what = f"{len(rows)} rows of {groups} cores, a share of {share:g}"
        train, test = _split(answer, rows, share, 0)
        require(
            [row["id"] for row in rows] == ids,
            "the given list was reordered; shuffle a copy",
        )
        in_train, in_test = ({row["id"] for row in side} for side in (train, test))
        require(not in_train & in_test, f"{what}: row {min(in_train & in_test, default=0)} is on both sides")
        require(
            len(train) == len(in_train) and len(test) == len(in_test),
            f"{what}: a row appears twice on the same side",
        )
        lost = set(ids) - in_train - in_test
        require(not lost, f"{what}: {len(lost)} rows are on neither side")
        size = len(rows) * share
        largest = max(Counter(str(row["core"]) for row in rows).values())
        swapped = size <= len(train) < size + largest
        require(
            not swapped or size <= len(test) < size + largest,
            f"{what}: train and test are swapped; return (train, test)",
        )
        both = {str(row["core"]) for row in train} & {str(row["core"]) for row in test}
        require(
            not both,
            f"{what}: {len(both)} cores are on both sides, so train answers what test asks; draw whole cores",
        )
        require(
            size <= len(test) < size + largest,
            f"{what}: {len(test)} rows in test; take cores until it holds {size:.0f} rows, then stop",
        )
        state = random.getstate()
        random.seed(rng.randrange(10**6))
        try:
            again = _split(answer, rows, share, 0)
        finally:
            random.setstate(state)
        require(
            {row["id"] for row in again[1]} == in_test,
            f"{what}: the same seed gave another split; use random.Random(seed), not the global generator",
        )
        _Group.salt += 1
        salted = _split(answer, [{**row} for row in rows], share, 0)
        require(
            {row["id"] for row in salted[1]} == in_test,
            f"{what}: another Python process splits differently, since a set has no fixed order; sort it, or "
            "use dict.fromkeys",
        )
        others = [{row["id"] for row in _split(answer, rows, share, seed)[1]} for seed in range(1, 6)]
        require(
            any(other != in_test for other in others),
            f"{what}: every seed gives the same split; shuffle the cores",
        )
    return "whole cores, every row once, the requested share, and the same split for the same seed"


def _split(answer: Callable, rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    got = answer(rows, share, seed)
    _returned(got, (tuple, list), "split_by_core", "return (train, test)")
    require(len(got) == 2, f"split_by_core returned {len(got)} things; return (train, test)")
    require(
        all(
            isinstance(side, list) and all(isinstance(row, dict) and "id" in row for row in side)
            for side in got
        ),
        "train and test must each be a list of the rows themselves",
    )
    return got[0], got[1]
