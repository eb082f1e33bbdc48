"""Checks of lab 3.1.6: conversion both ways, answer masks, mended letters, near-duplicates, splits."""

import inspect
import itertools
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from spark_ft.lab.checks import CheckFailed, call, check, require

Row = dict[str, Any]


def _draw() -> random.Random:
    """A generator of the check's own, seeded anew each time."""
    return random.Random(int(torch.randint(2**62, ())))


def _returned(value: Any, kind: type | tuple[type, ...], what: str, wanted: str) -> None:
    require(value is not None, f"{what} returned None; is a return missing?")
    require(
        not inspect.isgenerator(value), f"{what} returned a generator: write return and not yield; {wanted}"
    )
    require(isinstance(value, kind), f"{what} returned {type(value).__name__}; {wanted}")


def _short(value: Any, most: int = 50) -> str:
    """A value as Python writes it, cut to what a message has room for."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


# ── exercise 1 ──

NAMES = {"system": "system", "human": "user", "gpt": "assistant"}
TEXTS = [
    "How long does rice take?",
    "  four spaces of a code block\n    stay",
    "Ends with a newline\n",
    "\tmake: soup\n",
    "½ of it at 180 °C – voilà 🥞",
    "user: this is a text, not a turn",
    "Don’t stir-fry the crème fraîche: it’s done",
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


SYSTEM_TURN = "a chat may begin with a system turn"
CONVERT_MENDS = {"'system'": SYSTEM_TURN, "'from'": "only ShareGPT has it", "'role'": "ShareGPT has none"}


def _converted(name: str, convert: Callable[[Row], Row], row: Row) -> Row:
    result = call(convert, name, row, mends=CONVERT_MENDS)
    _returned(result, dict, name, "a row (a dict) goes in and a row comes out")
    require(
        result is not row, f"{name} gave back the very row that it got: make a new dict and leave the old one"
    )
    return result


def _same_chat(name: str, got: Row, expected: Row, field: str, who: str, what: str, old: str) -> None:
    require(field in got, f'{name}: there is no "{field}" in {_short(list(got), 100)}')
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
        not foreign,
        f'{name}: "{who}" is {_short(foreign[:1])}; here the speakers are called {", ".join(called)}',
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
        f'{name}: "{who}" is {_short(speakers, 36)}, but should be {_short(right, 36)}; take it from the '
        "turn and not from its place: two questions may follow each other",
    )
    for turn, true in zip(turns, wanted, strict=True):
        said, text = turn[what], true[what]
        require(
            said == text or not isinstance(said, str) or said not in (text.strip(), text.rstrip()),
            f"{name}: {_short(text)} lost the white space at its ends, which has a meaning in code",
        )
        require(
            said == text or not isinstance(said, str) or said != unicodedata.normalize("NFKD", text),
            f"{name}: {_short(text)} is spelled with other characters now; a conversion never touches a text",
        )
        require(
            said == text,
            f"{name}: {_short(text)} became {_short(said)}; a conversion never touches the text",
        )
        extra = sorted(map(str, turn.keys() - true.keys()))
        require(
            not extra, f'{name}: a turn has "{", ".join(extra)[:40]}" too; it has only "{who}" and "{what}"'
        )
    added = sorted(map(str, got.keys() - expected.keys()))
    require(not added, f'{name}: "{", ".join(added)[:40]}" is new; not all of it was in the row')
    changed = [key for key in expected if got[key] != expected[key]]
    require(not changed, f'{name}: "{"".join(changed[:1])}" was changed; not all of it was in the row')


def _keys(turns: list[Any]) -> str:
    said = (_short(list(t), 60) if isinstance(t, dict) else type(t).__name__ for t in turns)
    return next(said, "nothing")


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
        found.append(_marks(call(answer, "answer_mask", list(ids), list(HEAD), END), ids))
    for message, mistake in MASK_MISTAKES.items():
        if all(marks == mistake(*chat) for marks, chat in zip(found, chats, strict=True)):
            raise CheckFailed(message)
    for marks, (ids, right) in zip(found, chats, strict=True):
        place = next((i for i, pair in enumerate(zip(marks, right, strict=True)) if pair[0] != pair[1]), None)
        if place is not None:
            near = slice(max(0, place - 4), place + 2)
            raise CheckFailed(
                f"with head {HEAD} and end {END}, the mark of {ids[place]} in … {ids[near]} … is wrong: "
                f"{marks[place]}, but they should be {right[near]}"
            )
    return "every answer and its end mark, and nothing else"


def _marks(got: Any, ids: list[int]) -> list[bool]:
    """The marks as a list of bools; tensors, arrays, zeros and ones pass."""
    name = "answer_mask"
    got = got.tolist() if isinstance(got, torch.Tensor | np.ndarray) else got
    _returned(got, (list, tuple), name, "give a list of True and False")
    require(len(got) == len(ids), f"{len(got)} marks for {len(ids)} tokens; there must be one for each")
    numbers = [mark for mark in got if isinstance(mark, bool | int | float | np.generic | torch.Tensor)]
    require(
        len(numbers) == len(got),
        f"a mark is of type {_odd_type(got, numbers)}; give one True or False per token",
    )
    require(-100 not in numbers, "there are labels of −100; return True and False, not labels")
    odd = [mark for mark in numbers if mark not in (0, 1)]
    require(not odd, f"a mark is {_short(odd[:1])[1:-1]}; return True or False, not tokens or places")
    return [bool(mark) for mark in got]


def _odd_type(got: Iterable[Any], numbers: list[Any]) -> str:
    return next((type(mark).__name__ for mark in got if not any(mark is one for one in numbers)), "?")


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

WHOLE = [  # as they should be; broken, each holds characters of cp1252 alone
    "Crème brûlée",
    "Don’t stir – it’s done…",
    "Käsespätzle at 180 °C",
    "stir-fried jalapeños",
    "œufs à la neige",
    "½ l of crème fraîche",
    "  smørrebrød\n\twith a tab",
    "2 € for a piece of pão",
]
FINE = [  # nothing is wrong with them
    "Don't touch: plain letters, well-known marks",
    "château-bottled, naïve, café",
    "PÃO DE QUEIJO",
    "🥞 pancakes – voilà",
    "寿司 with 2 cm of daikon",
    "Ärger mit Öl",
    "",
]


def _broken(text: str) -> str:
    return text.encode("utf-8").decode("cp1252")


def _by(encode: str, decode: str, errors: str = "strict") -> Callable[[str], str]:
    def change(text: str) -> str:
        try:
            return text.encode(encode, errors).decode(decode, errors)
        except UnicodeError:
            return text

    return change


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


_mended = _by("cp1252", "utf-8")
MEND_MISTAKES: dict[str, Callable[[str], str]] = {
    "nothing is mended": lambda text: text,
    "“â€™” and “â€“” stay: they come from cp1252, and latin-1 has no €": _by("latin-1", "utf-8"),
    "letters are lost: no errors='ignore'; give a text that does not fit back as it is": (
        _by("cp1252", "utf-8", "ignore")
    ),
    "letters became � or ?: no errors='replace'; give a text that does not fit back as it is": (
        _by("cp1252", "utf-8", "replace")
    ),
    "it is broken once more: encode with cp1252 and decode as UTF-8, not the other way round": (
        _by("utf-8", "cp1252")
    ),
    "the accents are gone; “crème” keeps its è": lambda text: _plain(_mended(text)),
    "white space at the ends is gone": lambda text: _mended(text).strip(),
    "capitals are lost": lambda text: _mended(text).lower(),
    "é is two characters now: leave out unicodedata": lambda text: unicodedata.normalize(
        "NFD", _mended(text)
    ),
    "it is bytes now written as text: decode, not str()": lambda text: str(text.encode("cp1252", "ignore")),
}


@check
def check_mend(answer: Callable[[str], str]) -> str:
    """mend(text): UTF-8 that was read as cp1252 put right, and every other text as it is."""
    pairs = [(_broken(text), text) for text in WHOLE] + [(text, text) for text in [*FINE, *WHOLE]]
    found = []
    for given, right in _draw().sample(pairs, len(pairs)):
        name = f"mend({_short(given, 40)})"
        fine = "give a text that does not fit back as it is"
        got = call(answer, name, given, mends={"codec": fine})
        require(
            got is not None or given == right,
            f"{name} returned None; is a return missing?",
        )
        require(got is not None, f"{name} returned None; a text that is fine comes back as it is")
        require(not isinstance(got, bytes), f"{name} returned bytes; decode them: .decode('utf-8')")
        _returned(got, str, name, "a text goes in and a text comes out")
        found.append((given, got, right))
    for message, mistake in MEND_MISTAKES.items():
        if all(got == mistake(given) for given, got, _ in found):
            raise CheckFailed(message)
    for given, got, right in found:
        if got == right:
            continue
        if given == right:
            raise CheckFailed(f"{_short(given)} was fine, and it became {_short(got)}; leave it as it is")
        raise CheckFailed(f"{_short(given)} became {_short(got)}, but should be {_short(right)}")
    return f"{len(WHOLE)} broken texts mended, and {len(FINE) + len(WHOLE)} fine ones left as they are"


# ── exercise 4 ──


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
    "accented letters end a word: “crème” is one word; use the pattern \\w+": _of(pattern=r"[a-z0-9]+"),
    "accents and digits end a word: “crème” is one word; use the pattern \\w+": _of(pattern=r"[a-z]+"),
    "digits are no parts of words: use the pattern \\w+": _of(pattern=r"[^\W\d]+"),
    "the parts of “don't” are one word: an apostrophe ends a word; use the pattern \\w+": (
        _of(pattern=r"[\w'’]+")
    ),
    "the parts of “stir-fry” are one word: a hyphen ends a word; use the pattern \\w+": (
        _of(pattern=r"[\w-]+")
    ),
    "the parts of “don't” and “stir-fry” are one word; use the pattern \\w+": _of(pattern=r"[\w'’-]+"),
    "marks are taken out before the words are: “don't” is two words; use the pattern \\w+": (
        lambda a, b: _of()(*(re.sub(r"[^\w\s]", "", text) for text in (a, b)))
    ),
    "accents are taken off: “crème” is not “creme”": lambda a, b: _of()(_plain(a), _plain(b)),
    "words of one letter are left out; use the pattern \\w+": _of(pattern=r"\w\w+"),
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


HARD_WORDS = ["crème", "jalapeño", "don't", "it’s", "stir-fry", "é", "x"]  # where patterns differ


def _texts(rng: random.Random) -> list[tuple[str, str]]:
    """Pairs of texts: equal, unrelated, short, edited, and such as differ by an accent or a mark."""
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
        ("Grilled crème on top", "grilled creme on top"),
        ("Don't stir it yet", "dont stir it yet"),
        ("A stir-fry for 2 today", "a stir fry for 2 today"),
        ("A stirfry for 2 today", "a stir-fry for 3 today"),
        ("Bake 10 minutes at 180 °C", "bake 12 minutes at 180 °C"),
        ("it’s a jalapeño-free well-done one", "it's a jalapeño free well done one"),
    ]
    for i in range(16):  # in one of four pairs the first text is the longer one, in another the second
        whole = text(rng.randint(6, 14))
        places = rng.sample(range(len(whole.split(" "))), 2)
        hard = dict(zip(places, rng.sample(HARD_WORDS, 2), strict=True))
        whole = " ".join(hard.get(place, word) for place, word in enumerate(whole.split(" ")))
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
        name = f"{_short(a, 22)} and {_short(b, 22)}"
        mends = {"zero": "fewer than three words count as one piece"}
        got = call(answer, name, a, b, mends=mends)
        _returned(got, (int, float, np.generic, torch.Tensor), name, "a number from 0 to 1")
        one = not isinstance(got, torch.Tensor) or got.numel() == 1
        require(one, f"{name} returned {np.shape(got)}; a number from 0 to 1")
        require(not math.isnan(float(got)), f"{name} is nan")
        found.append(float(got))

    def explained(share: Callable[[str, str], float]) -> bool:
        return all(
            math.isclose(got, share(*pair), abs_tol=1e-6) for got, pair in zip(found, pairs, strict=True)
        )

    for message, mistake in SHARE_MISTAKES.items():
        require(not explained(mistake), message)
    for got, (a, b) in zip(found, pairs, strict=True):
        right = _of()(a, b)
        few = min(len(_pieces(a)[0]), len(_pieces(b)[0])) < 3
        short = "; fewer than three words count as one piece" if few else ""
        require(
            math.isclose(got, right, abs_tol=1e-6),
            f"{got:.3g} for {_short(a, 60)} and {_short(b, 60)}, but should be {right:.3g}{short}",
        )
    return f"|A ∩ B| / |A ∪ B| of word trigrams, on {len(pairs)} pairs of texts"


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
        in_train, in_test = ({row["id"] for row in side} for side in (train, test))
        require(not in_train & in_test, f"{what}: row {min(in_train & in_test, default=0)} is on both sides")
        require(
            len(train) == len(in_train) and len(test) == len(in_test),
            f"{what}: a row appears twice on the same side",
        )
        lost = set(ids) - in_train - in_test
        require(not lost, f"{what}: {len(lost)} rows are on neither side")
        new = (in_train | in_test) - set(ids)
        require(not new, f"{what}: {len(new)} rows were not among the given ones")
        cores = {row["id"]: row["core"] for row in rows}
        require(
            all(cores[row["id"]] == row.get("core") for row in (*train, *test)),
            f"{what}: a row's core was changed; return the rows as they are",
        )
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
        by_cores = len({str(row["core"]) for row in test})
        hint = "; count rows, not cores" if by_cores == math.ceil(share * groups) else ""
        require(
            size <= len(test) < size + largest,
            f"{what}: {len(test)} rows in test; take cores until it holds {size:.0f} rows, then stop{hint}",
        )
        again = _split(answer, rows, share, 0)
        require(
            {row["id"] for row in again[1]} == in_test,
            f"{what}: the same seed gave another split; use random.Random(seed)",
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
            f"{what}: every seed gives the same split; shuffle the cores with random.Random(seed)",
        )
    return "whole cores, every row once, the requested share, and the same split for the same seed"


def _split(answer: Callable, rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    before = [(id(row), dict(row)) for row in rows]
    python, numpy = random.getstate(), str(np.random.get_state())
    got = call(answer, "split_by_core", rows, share, seed, may_change=[rows])
    require(
        [id(row) for row in rows] == [place for place, _ in before],
        "the given list was reordered or shortened; shuffle a copy",
    )
    require(
        all(row == old for row, (_, old) in zip(rows, before, strict=True)), "a row was changed; leave it"
    )
    require(
        random.getstate() == python and str(np.random.get_state()) == numpy,
        "that draws from the generator that all code shares, or seeds it; use random.Random(seed), not the "
        "global generator",
    )
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
