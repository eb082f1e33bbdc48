"""Every check of lab 3.1.6 passes the right answers and names each wrong one that people really give."""

import copy
import itertools
import random
import re
import string
import unicodedata
from collections import Counter, defaultdict

import numpy as np
import torch
from helpers import accepts, mutant, printed_by, refuses, then

from spark_ft.data.chat import all_answers
from spark_ft.data.cleaning import drop_leaked, mend_encoding
from spark_ft.data.formats import messages_to_sharegpt, sharegpt_to_messages
from spark_ft.data.own import own_rows
from spark_ft.data.records import read_records
from spark_ft.files import ROOT
from spark_ft.lab.checks import lab_3_1_6 as checks
from spark_ft.lab.experiments import lab_3_1_6 as study
from spark_ft.lab.kitchen import TICKETS
from spark_ft.lab.parity import GENERATION_TEMPLATE
from spark_ft.lab.study import lab_3_1_6 as shown
from spark_ft.models import load_tokenizer


def also(right, act):
    """The right answer, before which `act` is called with the inputs."""
    return lambda *given: (act(*given), right(*given))[1]


LEFT_BEHIND = (
    ("switched gradients off", lambda *_: torch.set_grad_enabled(False)),
    ("seeds torch's generator", lambda *_: torch.manual_seed(0)),
    ("default dtype", lambda *_: torch.set_default_dtype(torch.float64)),
)

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
        ("KeyError: 'system'.*may begin", role, '{"human": "user", "gpt": "assistant"}[t["from"]]'),
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
        ("its input `row` has other keys than before: make a new dict", *popping),
        ("its input `row` was changed at 'conversations'", text, 't.pop("value")'),
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
        ("to_sharegpt: the turns are in reverse order", 'row["messages"]]', 'row["messages"][::-1]]'),
        (r"to_sharegpt: .* lost the white space", 'm["content"]', 'm["content"].rstrip()'),
        (
            "to_sharegpt: the system turn is dropped",
            'row["messages"]]',
            'row["messages"] if m["role"] != "system"]',
        ),
        ('each turn must have "from" and "value"', '"value": m["content"]', '"content": m["content"]'),
        ("to_sharegpt: your code raised KeyError: 'conversations'", there),
        times=3,
        answers=lambda to_sharegpt: (there, to_sharegpt),
        right=back,
    )


def in_place_of_the_key(row):
    """Fields keep their order, and each turn's further fields come along."""
    turns = [
        dict(zip(("role", "content"), (ROLE[t["from"]], t["value"]), strict=True))
        for t in row["conversations"]
    ]
    return {"messages" if key == "conversations" else key: turns if key == "conversations" else value
            for key, value in row.items()}  # fmt: skip


def by_pop_on_a_deep_copy(row):
    row = copy.deepcopy(row)
    row["messages"] = row.pop("conversations")
    for turn in row["messages"]:
        turn["role"] = {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"])
        turn["content"] = turn.pop("value")
        del turn["from"]
    return row


def test_more_ways_to_convert():
    accepts(checks.check_sharegpt, (in_place_of_the_key, back), (by_pop_on_a_deep_copy, back), times=100)
    text, out = 't["value"]', '"messages": turns'
    refuses(
        checks.check_sharegpt,
        ("is spelled with other characters", text, f'unicodedata.normalize("NFKD", {text})'),
        ("became .*; a conversion never touches", text, f'{text}.replace("’", "\'")'),
        ("became .*; a conversion never touches", text, f'{text}.encode("ascii", "ignore").decode()'),
        ("became .*; a conversion never touches", text, f"{text}.capitalize()"),
        ('a turn has "from, value" too', '"role"', '**t, "role"'),
        ("gave back the very row", lambda row: row),
        ('"tags" was changed', out, f'{out}, "tags": []'),
        ('"source" is new', out, f'{out}, "source": "sharegpt"'),
        ("returned a generator", lambda row: (turn for turn in row)),
        ("returned str", then(there, str)),
        ("system turn is dropped", 'ROLE[t["from"]]', 'ROLE[t["from"]]', ' for t in row["conversations"]',
         ' for t in row["conversations"] if t["from"] in ("human", "gpt")'),
        *((said, also(there, act)) for said, act in LEFT_BEHIND),
        answers=lambda to_messages: (to_messages, back),
        right=there,
    )  # fmt: skip


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
        ("is wrong: False, but they should be", "if end in ids[i:]", "if end in ids[i:] and ids[i] != end"),
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


def by_searching(ids, head, end):
    marks, i = torch.zeros(len(ids), dtype=torch.bool), 0
    while i < len(ids):
        if ids[i : i + len(head)] == head:
            i += len(head)
            while i < len(ids):
                marks[i] = True
                i += 1
                if ids[i - 1] == end:
                    break
        else:
            i += 1
    return marks


def by_text(ids, head, end):
    """The first places are no trouble when the ids are padded in front."""
    padded, marks, inside = [None] * len(head) + ids, [], False
    for i in range(len(ids)):
        inside = inside or padded[i : i + len(head)] == head
        marks.append(np.bool_(inside))
        if ids[i] == end:
            inside = False
    return tuple(marks)


def test_more_ways_to_mark():
    accepts(checks.check_answer_mask, by_searching, by_text, then(by_text, np.array), times=100)
    marks = "any(start <= i < stop for start, stop in found)"
    refuses(
        checks.check_answer_mask,
        ("a mark is 1?\\d; return True or False", marks, f"ids[i] * ({marks})"),
        ("a mark is of type str", marks, f"str({marks})"),
        ("a mark is of type NoneType", marks, f"{marks} or None"),
        ("a mark is of type list", marks, f"[{marks}]"),
        ("returned None", lambda ids, head, end: None),
        ("returned a generator", then(mask, iter, lambda marks: (mark for mark in marks))),
        ("returned dict", then(mask, lambda marks: dict(enumerate(marks)))),
        ("returned bool", then(mask, any)),
        (r"there must be one for each", then(mask, lambda marks: [i for i, m in enumerate(marks) if m])),
        ("its input .* had \\d+ items", also(mask, lambda ids, *_: ids.append(2))),
        ("its input .* had 3 items", also(mask, lambda ids, head, end: head.pop())),
        ("your code raised TypeError", "ids[i : i + len(head)] == head", "ids[i] in end"),
        *((said, also(mask, act)) for said, act in LEFT_BEHIND),
        right=mask,
    )


def test_mask_parity_on_the_kitchen_chats():
    tokenizer = copy.deepcopy(load_tokenizer())
    tokenizer.chat_template = GENERATION_TEMPLATE
    rows = read_records(ROOT / "data/kitchen_chats/train.jsonl", "sharegpt")
    chats = [sharegpt_to_messages(row) for row in rows]
    assert "the same on 40 chats" in printed_by(checks.check_mask_parity, (mask, tokenizer, chats))
    differs = r"chat 0: your marks and TRL's differ at token \[\d+\]"
    refuses(checks.check_mask_parity, (differs, (no_end, tokenizer, chats[:3])))


def mend(text):
    try:
        return text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return text


def mend_until_it_stays(text):
    while (better := mend(text)) != text:
        text = better
    return text


def mend_by_bytes(text):
    try:
        data = bytes(text, "windows-1252")
    except UnicodeEncodeError:
        return text
    try:
        return str(data, encoding="utf8")
    except UnicodeDecodeError:
        return text


def mend_where_it_looks_broken(text):
    return mend(text) if any(mark in text for mark in "ÃÂâÅ") else text


def test_mend():
    accepts(
        checks.check_mend,
        mend, mend_until_it_stays, mend_by_bytes, mend_where_it_looks_broken, mend_encoding, times=100,
    )  # fmt: skip
    both, encoded = "except UnicodeError", 'text.encode("cp1252")'
    refuses(
        checks.check_mend,
        ("nothing is mended", lambda text: text),
        ("“â€™” and “â€“” stay", "cp1252", "latin-1"),
        ("no errors='ignore'", '"utf-8")', '"utf-8", "ignore")', '"cp1252")', '"cp1252", "ignore")'),
        ("no errors='replace'", '"utf-8")', '"utf-8", "replace")', '"cp1252")', '"cp1252", "replace")'),
        ("was fine, and it became", '"utf-8")', '"utf-8", "ignore")'),
        ("not the other way round", "cp1252", "X", "utf-8", "cp1252", "X", "utf-8"),
        ("accents are gone", then(mend, checks._plain)),
        ("accents are gone|became", then(mend, lambda t: t.encode("ascii", "ignore").decode())),
        ("white space at the ends", then(mend, str.strip)),
        ("capitals are lost", then(mend, str.lower)),
        ("two characters now", then(mend, lambda t: unicodedata.normalize("NFD", t))),
        ("raised UnicodeEncodeError.*give a text that does not fit back", both, "except UnicodeDecodeError"),
        ("raised UnicodeDecodeError.*give a text that does not fit back", both, "except UnicodeEncodeError"),
        ("comes back as it is|is a return missing", "return text\n", "pass\n"),
        ("returned None; is a return missing", f"return {encoded}", encoded),
        ("returned bytes", "return text.encode", "return text.encode", '.decode("utf-8")', ""),
        ("was fine, and it became ''", "return text\n", "return ''\n"),
        ("became", lambda text: text.replace("Ã©", "é").replace("Ã¨", "è")),
        ("was fine, and it became", lambda text: mend(text).replace("’", "'")),
        ("was fine, and it became", lambda text: mend(text).replace("-", " ")),
        ("was fine, and it became", lambda text: " ".join(mend(text).split(" ")).replace("\t", " ")),
        ("returned list", then(mend, list)),
        ("returned tuple", then(mend, lambda text: (text, True))),
        *((said, also(mend, act)) for said, act in LEFT_BEHIND),
        right=mend,
    )  # fmt: skip


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
        ("ZeroDivisionError.*; fewer than three words", jaccard(no_short_texts)),
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


def words_by_hand(text):
    """Letters and digits one by one; all else parts words."""
    kept = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return [tuple(kept)] if len(kept) < 3 else list(itertools.pairwise(itertools.pairwise(kept)))


def no_marks(text):
    return text.translate(str.maketrans("", "", string.punctuation + "’"))


def test_words_with_accents_hyphens_and_apostrophes():
    split = jaccard(lambda text: grams(text, pattern=r"[^\W_]+"))
    as_tensor = then(share, torch.tensor)
    by_hand = jaccard(lambda text: [str(gram) for gram in words_by_hand(text)])
    accepts(checks.check_shared_trigrams, split, as_tensor, by_hand, then(share, np.float64), times=100)
    of = lambda pattern: jaccard(lambda text: grams(text, pattern=pattern))  # noqa: E731
    plain = lambda text: unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()  # noqa: E731
    refuses(
        checks.check_shared_trigrams,
        ("accented letters end a word", of("[a-z0-9]+")),
        ("accented letters end a word", of(r"(?a:\w+)")),
        ("accents and digits end a word", of("[a-z]+")),
        ("digits are no parts", of(r"[^\W\d]+")),
        ("an apostrophe ends a word", of(r"[\w'’]+")),
        ("a hyphen ends a word", of(r"[\w-]+")),
        ("“don't” and “stir-fry” are one word", of(r"[\w'’-]+")),
        ("marks are taken out before", jaccard(lambda text: grams(re.sub(r"[^\w\s]", "", text)))),
        ("but should be|marks are taken out", jaccard(lambda text: grams(no_marks(text)))),
        ("accents are taken off", jaccard(lambda text: grams(plain(text)))),
        ("words of one letter", of(r"\w\w+")),
        ("commas and full stops|but should be", jaccard(lambda text: grams(text, pattern=r"[^ ]+"))),
        ("but should be", jaccard(lambda text: grams(text, pattern=r"\w+|[^\w\s]"))),
        ("but should be", jaccard(lambda text: grams(" ".join(sorted(text.split()))))),
        ("returned None", lambda a, b: None),
        ("returned str", then(share, str)),
        ("returned tuple", then(share, lambda number: (number,))),
        ("is nan", lambda a, b: float("nan")),
        ("pairs of words|but should be", jaccard(lambda text: grams(text)[:-1] or grams(text))),
        ("your code raised TypeError", jaccard(lambda text: grams(text, kind=set))),
        *((said, also(share, act)) for said, act in LEFT_BEHIND),
        times=3,
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
        ("global generator", "random.Random(seed)", "random"),
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


def by_index(rows, share, seed):
    by_core = defaultdict(list)
    for i, row in enumerate(rows):
        by_core[row["core"]].append(i)
    order, taken = list(by_core), []
    np.random.default_rng(seed).shuffle(order)
    for core in order:
        if len(taken) >= share * len(rows):
            break
        taken += by_core[core]
    return [rows[i] for i in range(len(rows)) if i not in set(taken)], [rows[i] for i in taken]


def with_torch(rows, share, seed):
    cores = sorted({row["core"] for row in rows})
    order = torch.randperm(len(cores), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = Counter(row["core"] for row in rows)
    sums = itertools.accumulate((sizes[cores[i]] for i in order), initial=0)
    test = {cores[i] for i, before in zip(order, sums, strict=False) if before < share * len(rows)}
    return [r for r in rows if r["core"] not in test], [r for r in rows if r["core"] in test]


def test_more_ways_to_split():
    accepts(checks.check_split, by_index, with_torch, then(split, list), times=25)
    count = "sum(sizes[name] for name in test)"
    refuses(
        checks.check_split,
        ("the generator that all code shares", also(split, lambda rows, share, seed: random.seed(seed))),
        ("the generator that all code shares", also(split, lambda rows, share, seed: np.random.seed(seed))),
        ("count rows, not cores|take cores until", f"{count} >= share * len(rows)",
         "len(test) >= share * len(names)"),
        ("0 rows in test|swapped|cores are on both", then(split, lambda sides: (sides[0] + sides[1], []))),
        ("returned None", lambda rows, share, seed: None),
        ("returned dict", then(split, lambda sides: dict(zip(("train", "test"), sides, strict=True)))),
        ("returned 3 things", then(split, lambda sides: (*sides, []))),
        ("list of the rows", then(split, lambda sides: tuple(map(tuple, sides)))),
        ("a row was changed|other keys", also(split, lambda rows, *_: rows[0].pop("prompt"))),
        ("rows were not among", then(split, lambda sides: (sides[0] + [{"id": -1, "core": "?"}], sides[1]))),
        ("core was changed",
         then(split, lambda sides: ([{**row, "core": ""} for row in sides[0]], sides[1]))),
        ("core was changed", then(split, lambda sides: [[{"id": r["id"]} for r in s] for s in sides])),
        ("reordered or shortened|its input", also(split, lambda rows, *_: rows.reverse())),
        ("reordered or shortened|its input", also(split, lambda rows, *_: rows.pop())),
        ("returned a generator", then(split, lambda sides: (side for side in sides))),
        ("your code raised KeyError", 'row["core"] for row in rows]', 'row["group"] for row in rows]'),
        *((said, also(split, act)) for said, act in LEFT_BEHIND),
        right=split,
    )  # fmt: skip


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


def test_the_example_files_hold_fifty_rows_and_their_faults():
    orders = own_rows(shown.example_file()).cleaned(own_rows(TICKETS / "validation.jsonl"))
    kinds = Counter(said.split(":")[0] for _, said in orders.faults)
    assert len(orders.records) == 40
    assert kinds["exact duplicate"] == 3
    assert kinds["near duplicate"] == kinds["leaked"] == kinds["encoding"] == 2
    questions = own_rows(shown.example_file("questions.json"))
    assert (questions.kind, len(questions.records)) == ("sft", 50)


def test_a_split_by_group_never_parts_a_group_and_one_by_rows_does():
    rows = shown.pairs("train")
    for group, shared in (("core", False), (None, True)):
        train, held_out = shown.split_rows(rows, 0.2, 0, group)
        assert len(train) + len(held_out) == len(rows)
        assert bool({row["core"] for row in train} & {row["core"] for row in held_out}) is shared


def test_rows_under_marks_by_hand_learn_the_answer_and_its_end():
    tokenizer = load_tokenizer()
    row = {"prompt": "two soups", "completion": '{"qty":2}'}
    ids, learned = shown.by_hand(lambda order: f"[INST] {order} [/INST] ", "</s>")(row, tokenizer)
    assert tokenizer.decode(ids) == '[INST] two soups [/INST] {"qty":2}</s>'
    assert tokenizer.decode(ids[learned.index(True) :]) == '{"qty":2}</s>'
    assert shown.marked_by(mask)(row, tokenizer) == all_answers(row, tokenizer)
