"""Cleaning: each planted fault is found by kind, what only looks guilty stays, what stays is untouched."""

import copy
import json
import math
import random

from helpers import complains
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ft.data import cleaning as c
from spark_ft.data.records import read_records
from spark_ft.files import ROOT

HELD_OUT = [("kitchen_tickets", "sft"), ("kitchen_preferences", "preference")]
DROPS = {
    "exact_duplicate": c.drop_exact_duplicates,
    "near_duplicate": c.drop_near_duplicates,
    "refusal": c.drop_refusals,
    "cut_off": c.drop_cut_off,
    "encoding": c.drop_broken_encoding,
    "repetition": c.drop_repetition,
    "leaked": lambda rows: c.drop_leaked(rows, held_out()),
}


messy = read_records(ROOT / "data/messy/train.jsonl", "sft")
faults = json.loads((ROOT / "data/messy/faults.json").read_text())


def held_out():
    return [row for name, kind in HELD_OUT for row in read_records(ROOT / f"data/{name}/test.jsonl", kind)]


def row(answer, prompt="How?"):
    return {"prompt": prompt, "completion": answer}


def chat(*texts):
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def judges(drop, *, dropped=(), stay=()):
    """Each answer is dropped, or stays; a failure names every one that is not so."""

    def are_dropped(answers):
        return [answer for answer in answers if drop([row(answer)]).dropped]

    assert not [answer for answer in dropped if answer not in are_dropped(dropped)], "should be dropped"
    assert not are_dropped(stay), "should stay"


def test_every_planted_fault_is_found_by_the_function_for_its_kind_and_no_clean_row_is_dropped():
    accused = set()
    for kind, function in DROPS.items():
        planted = {name for name, fault in faults.items() if fault == kind}
        assert len(planted) >= 10
        found = {drop.record["id"]: drop for drop in function(messy).dropped}
        accused |= found.keys()
        assert planted - set(found) == set(), kind
        assert {drop.fault for drop in found.values()} == {kind}
        assert all(drop.reason and messy[drop.index] is drop.record for drop in found.values())
    assert accused == set(faults)
    for name, kind in [*HELD_OUT, ("kitchen_feedback", "feedback"), ("kitchen_chats", "sharegpt")]:
        rows = read_records(ROOT / f"data/{name}/train.jsonl", kind)
        assert len(c.clean(rows).kept) >= 0.98 * len(rows), c.clean(rows).dropped


def test_clean_drops_every_fault_once_and_leaves_the_rest_in_order():
    before = copy.deepcopy(messy)
    result = c.clean(messy, held_out())
    assert messy == before
    assert len(result.kept) + len(result.dropped) == len(messy)
    assert sum(result.counts().values()) == len(result.dropped)
    gone = [drop.index for drop in result.dropped]
    assert gone == sorted(set(gone)), "each dropped row once, in order"
    stays = [record for i, record in enumerate(messy) if i not in gone]
    assert list(map(id, result.kept)) == list(map(id, stays)), "what is kept is the very row that came in"
    assert set(faults) <= {drop.record["id"] for drop in result.dropped}
    for drop in result.dropped:
        assert messy[drop.index] is drop.record
        assert drop.fault == faults.get(drop.record["id"], drop.fault), drop
        assert (drop.copy_of is not None) == (drop.fault in ("exact_duplicate", "near_duplicate", "leaked"))
        if drop.fault == "exact_duplicate":
            original = messy[drop.copy_of]
            assert {**original, "id": drop.record["id"]} == drop.record
            assert drop.copy_of < drop.index


CODE = "Here:\n```python\ndef total(prices):\n    sum = 0\n    for price in prices:\n        sum += price\n"
CODE += "{}return sum\n```"
MAKE = "all: soup\n\tcp leek pot\n\tboil pot for an hour and then serve it hot to all the guests"


def test_code_that_differs_only_in_its_indentation_is_no_duplicate():
    inside, after = (row(CODE.format(indent), "Add the prices up.") for indent in ("        ", "    "))
    for drop in (c.drop_exact_duplicates, c.drop_near_duplicates):
        assert drop([inside, after]).kept == [inside, after]
    asked = c.drop_near_duplicates([inside, {**inside, "prompt": "Add all prices up."}])
    assert asked.dropped[0].copy_of == 0
    tabs, spaces = row(MAKE), row(MAKE.replace("\t", "    "))
    assert len(c.drop_near_duplicates([tabs, spaces]).kept) == 2, "make takes tabs only"


def test_duplicates_are_equal_in_every_turn_space_and_tool_whatever_their_kind_and_other_fields():
    answers = [row("Leek."), row("Leek. "), row("Leek.", "Why?"), row("Leek."), row("Leek.")]
    rows = [{"id": i, **answer} for i, answer in enumerate(answers, start=1)]
    result = c.drop_exact_duplicates(rows)
    assert [record["id"] for record in result.kept] == [1, 2, 3]
    assert [(drop.index, drop.copy_of) for drop in result.dropped] == [(3, 0), (4, 0)]
    leek = "Leek, leek and leek."
    messages = chat("Soup?", leek)
    sharegpt = {"conversations": [{"from": "human", "value": "Soup?"}, {"from": "gpt", "value": leek}]}
    alpaca = {"instruction": "Soup?", "input": "", "output": leek, "system": None, "history": []}
    pair = {"prompt": "Fish?", "chosen": "Cod.", "rejected": "Ham."}
    earlier = {"instruction": "And?", "output": "Cod.", "history": [["Soup?", leek]]}
    later = chat("Soup?", leek, "And?", "Cod.")
    rows = [messages, sharegpt, alpaca, pair, {**pair, "rejected": "Tofu."}, earlier, later]
    assert [drop.index for drop in c.drop_exact_duplicates(rows).dropped] == [1, 2, 6]
    tools = [{**messages, "tools": [{"type": "function", "name": name}]} for name in "ab"]
    for drop in (c.drop_exact_duplicates, c.drop_near_duplicates):
        assert len(drop([messages, *tools, {**messages, "tools": []}]).kept) == 3, "other tools, another row"


WORDS = st.lists(st.integers(0, 400).map(lambda i: f"w{i}"), min_size=1, max_size=30)


@given(st.lists(WORDS, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_near_duplicates_are_those_that_brute_force_finds(lists, rng):
    lists += [[*words[:-1], "changed"] for words in rng.sample(lists, len(lists) // 2)]
    rows = [row(" ".join(words)) for words in lists]
    grams = []
    for words in lists:
        words = ["how", *words]
        grams.append({tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))})
    kept = []
    for i, mine in enumerate(grams):
        if all(len(mine & grams[k]) / len(mine | grams[k]) < 0.7 for k in kept):
            kept.append(i)
    assert c.drop_near_duplicates(rows).kept == [rows[i] for i in kept]


def test_near_duplicates_are_found_at_the_threshold_too():
    """MinHash guesses; over many pairs just above the threshold hardly any may be missed."""
    rng = random.Random(0)
    rows = []
    for i in range(150):
        words = [f"w{rng.randrange(10**6)}" for _ in range(40)]
        others = [f"x{rng.randrange(10**6)}" for _ in range(3)]
        edited = [*words[:10], "other", *words[11:-3], *others]  # 33 of 41 trigrams shared
        rows += [row(" ".join(words), f"question {i}"), row(" ".join(edited), f"question {i}")]
    shares = [drop.reason for drop in c.drop_near_duplicates(rows, threshold=0.7).dropped]
    assert len(shares) >= 148, len(shares)


def test_a_row_that_cannot_be_read_is_named_with_its_mend():
    good, call = row("Leek."), {"role": "assistant", "tool_calls": [{}]}
    alpaca = {"instruction": "a", "output": "b", "history": ["x"]}
    complains(
        (c.clean, ([good, chat("a", None)],), 'row 1: "messages" at [1]: "content" must be', "fill it in"),
        (c.clean, ([{"messages": [call]}],), '"tool_calls" must be a list of calls'),
        (c.clean, ([row(math.nan)],), 'row 0: "completion" must be a text, not NaN'),
        (c.clean, ([alpaca],), '"history" must be a list of earlier turns'),
        (c.clean, ([["a"]],), "row 0: a row must be a JSON object"),
        (c.drop_leaked, ([good], [good, row(3)]), 'held-out row 1: "completion" must be a text'),
        (c.clean, ([{"question": "a"}],), "no text in a row with the fields ['question']; rename some"),
    )


SOUP = "首先把番茄切成小块，鸡蛋打散备用，锅里放少许油，把鸡蛋炒熟盛出，再炒番茄出汁，加水煮开后下面条。"
NOODLES = "麺を茹でる間に、醤油とみりんで出汁を作り、ねぎを刻んで、最後に卵をのせて温かいうちに食べて。"
THAI = "ทำอาหารไทยต้องใช้น้ำปลา มะนาว พริก และน้ำตาลปี๊บ เพื่อให้ได้รสชาติที่กลมกล่อม และหอมอร่อย"


def test_scripts_without_spaces_are_compared_by_their_characters():
    edits = {SOUP: ("少许", "一点"), NOODLES: ("醤油", "塩"), THAI: ("มะนาว", "มะขาม")}
    for text, edit in edits.items():
        rows = [row(text, "问"), row(text.replace(*edit), "问"), row(text[::-1], "问")]
        assert [drop.copy_of for drop in c.drop_near_duplicates(rows).dropped] == [0]
        leaked = [row("好", text.replace("，", " ")), row("好", text[:20])]
        assert len(c.drop_leaked(leaked, [row("x", text)]).dropped) == 1
    loops = ["我很喜欢这个" * 40, "好吃" * 5, SOUP + SOUP + SOUP, "อร่อยมาก" * 4, "哈" * 10]
    fine = [SOUP, NOODLES, THAI, "哈哈哈哈哈，真好吃！", "看看，好好吃吧", SOUP + SOUP]
    judges(c.drop_repetition, dropped=loops, stay=fine)


ASKED = "Which oven heat do I need for a Basque cheesecake?"
TOLD = "Bake it at 230 °C until the top is nearly black and the middle trembles when you shake the tin."


def test_a_leak_is_the_same_question_or_nearly_the_same_row_with_any_answer():
    unrelated = row("Simmer it for two hours.", "How long does goulash take?")
    leaks = [
        row(TOLD, ASKED),
        row("450 °F.", ASKED),
        row("Hot.", "which oven heat do I need for a basque cheesecake"),
        row(TOLD, "Which oven heat do I really need for a Basque cheesecake?"),
        chat(ASKED, "Hot."),
    ]
    held_out = {"prompt": ASKED, "chosen": TOLD, "rejected": "450 °F."}
    result = c.drop_leaked([unrelated, *leaks], [row("y", "x"), held_out])
    assert result.kept == [unrelated]
    assert {drop.copy_of for drop in result.dropped} == {1}
    assert c.drop_leaked(leaks, []).kept == leaks


def test_a_refusal_is_found_and_an_answer_that_only_sounds_like_one_stays():
    judges(
        c.drop_refusals,
        dropped=[
            "I'm sorry, but I can't help with that.", "Sorry, I cannot provide instructions for that.",
            "As an AI language model, I don't have personal preferences.",
            "Unfortunately, I am not able to answer questions about knives.",
            "That's not something I can help with.", "My apologies, I must respectfully decline.",
            "I'd rather not discuss that topic.", "It would be irresponsible of me to give such advice.",
            "I’m afraid I can’t share that recipe.",
            "Thank you for asking. However, I cannot recommend any restaurant.",
            "I do not feel comfortable giving advice on meat.", "This request falls outside what I can do.",
        ],
        stay=[
            "I'm sorry for your sourdough: feed it twice a day and it will come back.",
            "I can't recommend enough that you rest the dough.",
            "I can't tell you how good it smells; add cumin.",
            'Cook: "Sorry, I can\'t give you more salt."\nWaiter: "Fine."',
            "Waiter: I'm sorry, we can't offer the duck tonight.\nGuest: Then the lamb.",
            "You can't help the crust if the oven is cold.", "Don't be afraid: I would use more salt.",
            "As an assistant cook you peel and chop, and you do not season.",
            "Write: “I am unable to attend your dinner.” That is polite enough.",
            "Boil it. Drain it. If it tastes of iron, I can't help you: throw the pan away.",
        ],
    )  # fmt: skip


def test_a_cut_off_answer_is_found_and_one_that_ends_as_its_kind_does_stays():
    judges(
        c.drop_cut_off,
        dropped=[
            "Peel the potatoes. Boil them for twenty min", "Add the butter, the eggs and",
            "Wash the rice until the water runs clear. Then", "```python\nprint(1)\n",
            "- Flour\n- Eggs and\n", "The sauce (which should be thick",
            "1. Wash it.\n2. Dry it.\n3. Slice it thin", '{"table": 4, "items": [',
            "The best pan is made of cast iron because it holds its heat for a long time even whe",
            "Wash it first.\n\nAfter that you should let it dry on a",
        ],
        stay=[
            "Leek", "42", "- flour\n- eggs\n- milk", "Use 3 g of salt. Bake at 180 °C",
            "It takes 20 min. That's it 🙂", "Roses are red\nViolets are blue\nSugar's sweet\nAnd so are you",
            "Here it is:\n```python\nx = (1,\n     2)\n```", "| a | b |\n|---|---|\n| 1 | 2 |",
            "Dear guest,\n\nthank you for coming.\n\nBest wishes\nAna", "Steps:\n1. Wash\n2. Dry\n3. Slice",
            '{"table": 4, "items": []}', "for dish in menu:\n    print(dish)", "Yes, you can",
            "The word you want is “al dente”",
        ],
    )  # fmt: skip


def test_broken_encoding_is_found_and_mended_and_letters_where_they_belong_stay():
    mends = {
        "CrÃ¨me brÃ»lÃ©e": "Crème brûlée", "180 Â°C": "180 °C", "donâ€™t": "don’t",
        "it\u00e2\u0080\u0099s": "it’s", "gruyÃƒÂ¨re": "gruyère", "ðŸ˜€ fun": "😀 fun",
        "ÐŸÑ€Ð¸Ð²ÐµÑ‚": "Привет", "caf\ufffd": "caf\ufffd", "a\x00b": "a\x00b",
    }  # fmt: skip
    texts = ["PÃO DE QUEIJO", "CAFÉ»", "« À la carte »", "château, 180 °C, ½", "Привет 日本 😀"]
    texts += ["TÊTE-À-TÊTE", "fiancé—“yes”"]
    judges(c.drop_broken_encoding, dropped=mends, stay=texts)
    mends |= dict(zip(texts, texts, strict=True))
    assert {broken: c.mend_encoding(broken) for broken in mends} == mends


LETTERS = [*"éèêçñöüßàâîôœ’“”–—…½¼°€×я😀", "日本語"]
UNIT = st.builds("{}{}{}".format, st.sampled_from("ab "), st.sampled_from(LETTERS), st.sampled_from("ab "))


@settings(max_examples=300)
@given(st.lists(UNIT, max_size=8).map("".join), st.sampled_from(["cp1252", "latin-1"]), st.integers(1, 2))
def test_mending_undoes_a_wrong_reading(text, wrong, times):
    broken = text
    for _ in range(times):
        try:
            broken = broken.encode().decode(wrong)
        except UnicodeDecodeError:  # cp1252 has no character for five of the bytes
            return
    assert c.mend_encoding(text) == text
    assert c.mend_encoding(broken) == text


def test_a_loop_is_found_and_what_repeats_for_a_reason_stays():
    judges(
        c.drop_repetition,
        dropped=[
            "It is very very very very very good.",
            "Salt and pepper, salt and pepper, salt and pepper, salt and pepper.",
            "Take the pan off the heat now. " * 3, "Stir.\nAdd some more stock to it.\n" * 4 + "Serve.",
        ],
        stay=[
            "Row, row, row your boat, gently down the stream.",
            "Fold. Rest 30 minutes. Fold. Rest 30 minutes. Fold. Rest 30 minutes. Bake.",
            "Turn it and wait for one minute. " * 3 + "Then it is done.",
            "\n".join(f"{n}. Fold it in three and chill it." for n in (1, 2, 3)),
            "```\n" + "beep(440)\n" * 8 + "```", "| a | a |\n" * 6,
        ],
    )  # fmt: skip


def test_only_the_answers_are_judged_and_a_rejected_one_may_be_faulty():
    refusal = "I'm sorry, but I can't help with that."
    pair = {"prompt": refusal, "chosen": "Leek.", "rejected": refusal}
    assert c.drop_refusals([pair]).kept == [pair]
    assert c.drop_refusals([{**pair, "chosen": refusal, "rejected": "Leek."}]).kept == []
    assert c.drop_cut_off([chat("Soup and")]).dropped == []
    assert c.drop_cut_off([chat("Soup and", "Leek and")]).kept == []


@given(st.lists(st.text(max_size=60).filter(str.strip), min_size=1, max_size=5))
def test_any_text_can_be_cleaned_and_what_stays_is_the_same_object(texts):
    rows = [row(text) for text in texts]
    result = c.clean(rows, rows[:0])
    assert all(any(kept is record for record in rows) for kept in result.kept)
    assert len(result.kept) + len(result.dropped) == len(rows)
