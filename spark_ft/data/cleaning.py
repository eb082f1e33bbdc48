"""Cleaning a data set: each function returns the rows it kept, as they were, and why it dropped the others.

A row is of any kind that `read_records` knows. What is compared is a copy; a kept row is the very object that
came in. None of this knows right from wrong: a fluent false answer passes.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from operator import eq
from typing import Any, NamedTuple

from spark_ft.data.records import ALPACA_BESIDE, KINDS, Check, Record, given, text_fault

SAME = 0.7  # share of trigrams from which two texts count as one
# Thai to Burmese, Khmer, kana and Chinese characters: scripts without spaces between words
_UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
_UNSPACED += "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")  # a character where a script has no spaces


class Dropped(NamedTuple):
    """A row that was dropped: its index in what came in, itself, its fault, why, and whose copy it is."""

    index: int
    record: Record
    fault: str
    reason: str
    copy_of: int | None = None


class Cleaned(NamedTuple):
    """What a clean-up kept, in order and untouched, and what it dropped; `counts` says for which faults."""

    kept: list[Record]
    dropped: list[Dropped]

    def counts(self) -> dict[str, int]:
        return dict(Counter(drop.fault for drop in self.dropped))


def clean(
    records: Iterable[Record], held_out: Iterable[Record] = (), keep: Collection[str] = ()
) -> Cleaned:
    """All of the clean-ups in a row; every dropped row is listed once, with the first fault found.

    Args:
        records: the rows to train on.
        held_out: rows of validation and test sets, none of which may be among them.
        keep: faults not to look for, names as in `counts`: {"refusal"} where refusals are wanted.
    """
    rows, held_out, dropped = list(records), list(held_out), []
    places = list(range(len(rows)))
    steps = {**CLEAN_UPS, "leaked": lambda some: drop_leaked(some, held_out)}
    if unknown := set(keep) - set(steps):
        raise ValueError(f"keep: no fault is called {min(unknown)!r}; there are {', '.join(steps)}")
    for fault, step in steps.items():
        rows, out = step(rows) if fault not in keep else Cleaned(rows, [])
        for drop in out:  # a held-out row's number stays; other copies are of rows that came in
            copy_of = drop.copy_of if drop.fault == "leaked" or drop.copy_of is None else places[drop.copy_of]
            dropped.append(drop._replace(index=places[drop.index], copy_of=copy_of))
        gone = {drop.index for drop in out}
        places = [place for i, place in enumerate(places) if i not in gone]
    return Cleaned(rows, sorted(dropped))


def drop_exact_duplicates(records: Iterable[Record]) -> Cleaned:
    """Drop rows whose texts (all turns, and tools) equal an earlier row's, every space and newline."""
    first: dict[tuple, int] = {}

    def copy(index: int, record: Record) -> tuple[str, int] | None:
        original = first.setdefault((*_key(record), str(given(record, "tools"))), index)
        return None if original == index else (f"equals row {original}", original)

    return _drop(records, "exact_duplicate", copy)


def drop_near_duplicates(records: Iterable[Record], threshold: float = SAME) -> Cleaned:
    """Drop rows that share most of their trigrams with an earlier row that was kept.

        |A ∩ B| / |A ∪ B| ≥ threshold

    Trigrams are of words, or of characters where a script has no spaces. MinHash with locality-sensitive
    hashing proposes in about linear time, and the share is then counted exactly. Other indentation of code,
    or other tools, make another row, however alike the words.

    Args:
        threshold: higher drops fewer. Light edits of a sentence or two keep 0.7; unrelated rows share under
            0.3.
    """
    index = _Near(threshold)

    def copy(i: int, record: Record) -> tuple[str, int] | None:
        if found := index.find("\n".join(_key(record)), number=i, tools=str(given(record, "tools"))):
            return f"shares {found[0]:.0%} of its trigrams with row {found[1]}", found[1]
        return None

    return _drop(records, "near_duplicate", copy)


def drop_leaked(records: Iterable[Record], held_out: Iterable[Record], threshold: float = SAME) -> Cleaned:
    """Drop rows that a held-out set has too: the same question, or nearly the same row, whatever its answer.

    Args:
        held_out: rows of validation and test sets, of any kind; `copy_of` is the index among them.
        threshold: as in `drop_near_duplicates`.
    """
    index, asked = _Near(threshold), {}

    def keep(i: int, record: Record) -> None:
        for question, answer in _views(record):
            if question:  # a text for a base model answers none
                asked.setdefault(tuple(_words(question)), i)
            index.find(f"{question}\n{answer}", number=i)

    def copy(_: int, record: Record) -> tuple[str, int] | None:
        for question, answer in _views(record):
            if (same := asked.get(tuple(_words(question)))) is not None:
                return f"asks what held-out row {same} asks", same
            if found := index.find(f"{question}\n{answer}"):
                return f"shares {found[0]:.0%} of its trigrams with held-out row {found[1]}", found[1]
        return None

    _drop(held_out, "", keep, name="held-out row")
    return _drop(records, "leaked", copy)


class _Near:
    """Texts by number; finds one that shares enough trigrams with a given one."""

    def __init__(self, threshold: float):
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        # The index only proposes, the exact count decides. Two texts that share a part s of their trigrams
        # are proposed with probability 1 − (1 − s^r)^(128/r): take the longest bands r that miss under one in
        # 1,000.
        size = next((r for r in range(8, 1, -1) if (1 - threshold**r) ** (128 // r) < 1e-3), 1)
        self.lsh = MinHashLSH(num_perm=128, params=(128 // size, size))
        self.empty = MinHash(num_perm=128)
        self.texts: list[tuple[int, set, list[str], str]] = []

    def find(self, text: str, number: int | None = None, tools: str = "") -> tuple[float, int] | None:
        """(share of trigrams, number) of the most alike text, the earliest of equals; without one, add it."""
        words, indents, sketch = _words(text), _indents(text), self.empty.copy()
        grams = {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        sketch.update_batch(["\x1f".join(gram).encode() for gram in grams])
        best = None
        for place in sorted(self.lsh.query(sketch)):
            other, others, other_indents, other_tools = self.texts[place]
            share = len(grams & others) / len(grams | others)
            code = any(indents) or any(other_indents)
            same = tools == other_tools and (not code or indents == other_indents)
            if share >= self.threshold and same and (not best or share > best[0]):
                best = share, other
        if best is None and number is not None:
            self.lsh.insert(len(self.texts), sketch)
            self.texts.append((number, grams, indents, tools))
        return best


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold()) or [text]


def _indents(text: str) -> list[str]:
    return [line[: len(line) - len(line.lstrip())] for line in text.splitlines() if line.strip()]


_WHO = r"\b(?:i|we)\b"
_CANNOT = (
    r"(?:ca(?:n['’]?t|nnot|n not)|could(?:n['’]t| not)|wo(?:n['’]t|uld rather not)|will not"
    r"|(?:['’]d|would) rather not|(?:['’]m|am|['’]re|are) (?:sorry|afraid|unable"
    r"|not (?:able|allowed|permitted|comfortable|in a position|designed|going))"
    r"|(?:must|have to|need to|will have to|['’]ll have to) (?:\w+ )?(?:decline|refuse)|decline|refuse"
    r"|do(?:n['’]t| not) (?:feel comfortable|think (?:it|that) (?:is|would be) appropriate|have the ability))"
)
_DOING = (
    r"(?:(?:help|assist|answer|provid|offer|giv|discuss|advis|recommend|compl|fulfil|respond|engag|shar|support"
    r"|continu|participat|generat|creat|produc|writ|tell|explain|talk)\w{0,5}"
    r"|do (?:that|this)|go into|with (?:that|this|your)|(?:this|that|your) request)"
)
REFUSAL = re.compile(
    rf"{_WHO} ?{_CANNOT}[^.!?\n]{{0,60}}?\b{_DOING}\b(?! (?:\w+ )?enough| you how)"
    rf"|{_WHO} (?:must|have to|need to) (?:\w+ )?(?:decline|refuse)\s*(?:[.!,;]|to\b|$)"
    r"|\bas an? (?:ai|artificial|(?:large )?language model)\b[^.!?\n]*(?:\bi\b|\bnot\b|n['’]t)"
    r"|\bas an? (?:\w+ )?assistant,? i\b"
    r"|(?:\bnot|n['’]t) (?:something|a (?:question|topic|request|subject)) (?:that )?(?:i|we)\b"
    r"|\b(?:unable|not able) to (?:help|assist|answer|provide|comply|fulfil\w*)"
    r"|\b(?:not (?:be )?(?:appropriate|right|responsible)|inappropriate|irresponsible|unethical)"
    r" (?:for|of) me\b"
    r"|\bagainst (?:my|our) (?:guidelines|polic\w+|programming|principles|rules)"
    r"|\b(?:request|question|topic)\b[^.!?\n]{0,40}\b(?:goes|falls|is) (?:against|outside|beyond)",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"(?sm:```.*?(?:```|\Z)|\"[^\"]*\"|“[^”]*”|„[^“”]*[“”]|«[^»]*»|^\s*[-–—>].*$)")
_SPEAKER = re.compile(r"^\s*[A-Z][\w ]{0,20}:\s.*$", re.MULTILINE)


def drop_refusals(records: Iterable[Record]) -> Cleaned:
    """Drop rows whose answer declines in its first two sentences; quotes and dialogue are left out."""

    def refusal(answer: str) -> str | None:
        said = _QUOTED.sub(" ", answer[:1000])
        if len(_SPEAKER.findall(said)) > 1:
            said = _SPEAKER.sub(" ", said)
        opening = " ".join(re.split(r"(?<=[.!?…])\s+", said.strip(), maxsplit=2)[:2])[:300]
        found = REFUSAL.search(opening)
        return f"declines: {found[0]!r}" if found else None

    return _drop_answers(records, "refusal", refusal)


_OPEN_END = re.compile(  # what no sentence ends with, be there a full stop or not
    r"(?i:[,;:(\[{–—-]|\b(?:a|an|the|and|or|but|nor|of|to|with|for|from|by|at|into|onto|than|because|if|when"
    r"|while|until|unless|whether|whose|your|my|their|our|its|every|between|without))$"
)
# a sentence's end, a closing mark, or an emoji
_CLOSED = re.compile(r"[.!?…。！？:;)\]}\"'”’»`*_|>]$|[^\w\s,(\[{–—-]$")
_NUMBER_END = re.compile(r"\d[^\w\s]?\s?[^\w\s]?\w{0,3}$")  # its unit too
_ITEM = re.compile(r"^\s*(?:[-*•+]|\d+[.)])\s+")


def drop_cut_off(records: Iterable[Record]) -> Cleaned:
    """Drop rows whose answer stops in the middle: in a code fence, brackets, a sentence or word, or a list.

    A last line without a full stop counts only where those before it have theirs, or where it ends in what
    nothing ends with ("and", "the", a comma): titles, lists, verses and bare numbers need no full stop.
    """
    return _drop_answers(records, "cut_off", _cut_off)


def _cut_off(answer: str) -> str | None:
    text = answer.rstrip()
    if text.count("```") % 2:
        return "a code fence is opened and never closed"
    if text[:1] in ("{", "[") and not text.endswith(("}", "]", "```")):
        return f"a bracket is opened by {text[:1]!r} and never closed"
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for line in prose.splitlines() if line.strip()]
    if text.endswith("```") or not lines:
        return None
    last = lines[-1].rstrip()
    ending = last[-30:]
    if (len(lines) > 1 and last[0].isspace() and not _ITEM.match(last)) or "\t" in last:
        return None  # code and tables end as they like
    said = _ITEM.sub("", last)
    if _OPEN_END.search(said[-20:]):
        return f"ends with {ending!r}"
    if said.count("(") > said.count(")"):
        return f"a bracket is never closed in {ending!r}"
    if _CLOSED.search(said[-2:]):
        return None
    before = re.split(r"(?<=[.!?…])\s+", said)[:-1]  # sentences of the last line itself
    if any(re.search(r"\w", sentence) for sentence in before) and not _NUMBER_END.search(said[-10:]):
        return f"the last sentence has no end: {ending!r}"
    item, earlier = bool(_ITEM.match(last)), (line.rstrip() for line in lines[:-1])
    kin = [line for line in earlier if bool(_ITEM.match(line)) == item and not line.endswith(":")]
    closed = sum(bool(_CLOSED.search(line[-2:])) for line in kin)
    short = not item and len(said.split()) < 5  # "Enjoy your meal", a name under a letter
    if kin and 2 * closed > len(kin) and not short and not _NUMBER_END.search(said[-10:]):
        return f"the last line has no end, those before it have: {ending!r}"
    if not kin and len(said.split()) > 12:
        return f"a long sentence has no end: {ending!r}"
    return None


# UTF-8 that was read as cp1252 or Latin-1: a lead byte's character and those of its continuation bytes
_CP1252 = {char: byte for byte in range(0x80, 0xA0) if (char := bytes([byte]).decode("cp1252", "ignore"))}
_BYTE = {**{chr(byte): byte for byte in range(0x80, 0x100)}, **_CP1252}
_LATER = "[" + "".join(re.escape(char) for char, byte in _BYTE.items() if byte < 0xC0) + "]"
_MOJIBAKE = re.compile(f"[Â-Û]{_LATER}|(?:[à-ï]{_LATER}{{2}})+|[ð-ô]{_LATER}{{3}}")


def mend_encoding(text: str) -> str:
    """UTF-8 that was read as cp1252 or Latin-1, perhaps more than once, put right: "CrÃ¨me" → "Crème".

    Only what comes out as common text is put right: letters from Latin to Arabic, punctuation, signs, emoji,
    Asian scripts from two characters on: "CAFÉ»" stays. What was lost (�) cannot be mended.
    """

    def right(found: re.Match) -> str:
        try:
            said = bytes(_BYTE[c] for c in found[0]).decode("utf-8")
        except UnicodeDecodeError:
            return found[0]
        code = ord(said[0])
        twice_latin1 = 0x80 <= code < 0xA0 and found[0][1] == said[0]
        letter = 0xA0 <= code < 0x180 or 0x370 <= code < 0x700 or said[0] in _CP1252  # ˜ ˆ ƒ: twice wrong
        sign = 0x2000 <= code < 0x2E80 or code in (0xFE0F, 0xFEFF) or code >= 0x1F000
        return said if twice_latin1 or letter or sign or len(said) > 1 else found[0]

    while (mended := _MOJIBAKE.sub(right, text)) != text:
        text = mended
    return text


def drop_broken_encoding(records: Iterable[Record]) -> Cleaned:
    """Drop rows with lost letters (�), control characters, or what `mend_encoding` would change."""

    def broken(_: int, record: Record) -> str | None:
        for text in _key(record):
            mended = mend_encoding(text)
            if found := re.search(r"[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|[\x80-\x9f]", mended):
                return f"holds {found[0]!r} in {text[max(0, found.start() - 10) : found.start() + 10]!r}"
            if mended != text:
                place = next(i for i, (a, b) in enumerate(zip(text, mended + "\0", strict=False)) if a != b)
                start = max(0, place - 8)
                return f"{text[start : place + 8]!r} should be {mended[start : place + 6]!r}"
        return None

    return _drop(records, "encoding", broken)


def drop_repetition(records: Iterable[Record]) -> Cleaned:
    """Drop rows whose answer runs in a loop: the same words over and over, with nothing between.

    A word or two must come five times in a row, a phrase four times, one of six words or more also three
    times at the answer's end: a step that is repeated for a reason is followed by another. Where a script has
    no spaces, two characters count as a word, and a single one (laughter) must come ten times. Code and
    tables are left alone.
    """

    def loop(answer: str) -> str | None:
        prose = re.sub(r"```.*?(?:```|\Z)", " ", answer, flags=re.DOTALL)
        words = _WORD.findall(re.sub(r"^\s*\|.*$", "", prose, flags=re.MULTILINE).casefold())
        size = 2 if 2 * len(re.findall(f"[{_UNSPACED}]", prose)) > len(words) else 1
        for period in range(1, min(len(words) // 3, 100 * size) + 1):
            again = bytes(map(eq, words[period:], words))  # 1 where a word is the one a period before
            times = 10 if period < size else 5 if period <= 2 * size else 4
            place = again.find(b"\1" * period * (times - 1))
            if place < 0 and period > 5 * size and again.endswith(b"\1" * period * 2):
                place, times = len(again) - 2 * period, 3
            if place >= 0:
                said = ("" if size == 2 else " ").join(words[place : place + period])
                return f"says {times} times in a row: {said[:60]!r}"
        return None

    return _drop_answers(records, "repetition", loop)


_CHATS = (("chat", "messages", "role", "content"), ("sharegpt", "conversations", "from", "value"))
_ASKING, _ANSWERING = ("prompt", "instruction", "input"), ("completion", "chosen", "rejected", "output")
_ANSWERER = ("assistant", "gpt", "chatgpt", "bot")


def _turns(record: Record) -> list[tuple[str, str]]:
    """(who, text) of every turn, whatever the record's kind; of several answers to one question, each."""
    turns = [("question", _field(record, "system", text_fault))]
    for kind, field, who, what in _CHATS:
        turns += [_said(turn, who, what) for turn in _field(record, field, KINDS[kind][field]) or ()]
    if len(turns) == 1:
        for question, answer in _field(record, "history", ALPACA_BESIDE["history"]) or ():
            turns += [("question", question), ("answer", answer)]
        for name in _ASKING:
            asked = _field(record, name, KINDS["sft"].get(name, text_fault))
            some = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
            turns += [_said(turn, "role", "content") for turn in some]
        turns += [("answer", _field(record, name, text_fault)) for name in _ANSWERING]
    if not any(text for _, text in turns):
        turns.append(("answer", _field(record, "text", text_fault)))  # a base model's
    if not any(text for _, text in turns):
        fields = list(record)
        raise ValueError(f"no text in a row with the fields {fields}; rename some to prompt and completion")
    return [turn for turn in turns if turn[1]]


def _said(turn: Record, who: str, what: str) -> tuple[str, str | None]:
    text = turn.get(what)
    if calls := turn.get("tool_calls"):
        text = f"{text or ''}\n{json.dumps(calls, ensure_ascii=False, default=str)}"
    return "answer" if turn[who] in _ANSWERER else "question", text


def _field(record: Record, name: str, check: Check) -> Any:
    if not isinstance(record, Mapping):
        raise ValueError("a row must be a JSON object; see read_records")
    value = given(record, name)
    if value is not None and (fault := check(value)):
        raise ValueError(f'"{name}" {fault}')
    return value


def _key(record: Record) -> tuple[str, ...]:
    return tuple(text for _, text in _turns(record))


def _views(record: Record) -> Iterator[tuple[str, str]]:
    """(question, answer) of a row; the question is all that stands before. A preference row has two."""
    turns = _turns(record)
    while turns and turns[-1][0] == "question":
        turns.pop()
    answers = []
    while turns and turns[-1][0] == "answer":
        answers.insert(0, turns.pop()[1])
    question = "\n".join(text for _, text in turns)
    yield from ((question, answer) for answer in answers)


def _drop(
    records: Iterable[Record], fault: str, why: Callable[[int, Record], Any], name: str = "row"
) -> Cleaned:
    """`why` gives the reason, or the reason and the row it copies, or None."""
    kept, dropped = [], []
    for index, record in enumerate(records):
        try:
            reason = why(index, record)
        except ValueError as error:
            raise ValueError(f"{name} {index}: {error}") from error
        if reason:
            dropped.append(Dropped(index, record, fault, *([reason] if isinstance(reason, str) else reason)))
        else:
            kept.append(record)
    return Cleaned(kept, dropped)


def _drop_answers(records: Iterable[Record], fault: str, why: Callable[[str], str | None]) -> Cleaned:
    """Drop rows any of whose answers is faulty; a rejected answer may be."""

    def first(_: int, record: Record) -> str | None:
        answers = (text for who, text in _turns(record) if who == "answer" and text != record.get("rejected"))
        return next(filter(None, map(why, answers)), None)

    return _drop(records, fault, first)


# What `clean` looks for, in this order; what is gone can no longer be the original of a copy
CLEAN_UPS: dict[str, Callable[..., Cleaned]] = {
    "encoding": drop_broken_encoding,
    "leaked": drop_leaked,
    "exact_duplicate": drop_exact_duplicates,
    "near_duplicate": drop_near_duplicates,
    "refusal": drop_refusals,
    "repetition": drop_repetition,
    "cut_off": drop_cut_off,
}
