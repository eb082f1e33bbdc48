"""Writes train.jsonl, validation.jsonl and test.jsonl, the same bytes each time; `--check` only compares.

A row is a waiter's note and the kitchen ticket it stands for. An order is drawn first (dishes with what a
cook would leave off or add to them), then written down in one of the hand-written styles below; the ticket is
that order as JSON.
"""

import argparse
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SEED = 20
LEAD_IN = "Kitchen ticket as JSON:\n"
NEAR = 0.6  # word trigrams shared, |A∩B| / |A∪B|, from which two prompts count as near duplicates


class Dish(NamedTuple):
    name: str
    how: str  # what the kitchen may be asked; alternatives parted by |
    no: str
    add: str


GRILL = "rare|medium rare|medium|medium well|well done"
PINK = "rare|medium rare|medium"
HEAT = "mild|medium|hot|very hot"
EGGS = "over easy|sunny side up|poached|scrambled"

SEEN_DISHES = [
    Dish("ribeye steak", GRILL, "butter|mushrooms|watercress", "pepper sauce|fried onions"),
    Dish("sirloin", GRILL, "fries|butter|parsley", "blue cheese|mushrooms"),
    Dish("lamb chops", PINK, "mint sauce|rosemary", "gravy|roast garlic"),
    Dish("cheeseburger", GRILL, "pickles|onions|ketchup", "bacon|jalapenos"),
    Dish("duck breast", PINK, "cherry sauce|red cabbage", "orange sauce|lentils"),
    Dish("tuna steak", PINK, "sesame seeds|wasabi", "pickled ginger|avocado"),
    Dish("venison loin", PINK, "juniper|blackberries", "parsnips|red wine sauce"),
    Dish("chicken curry", HEAT, "cilantro|potatoes", "rice|yogurt"),
    Dish("lamb vindaloo", HEAT, "potatoes|chilies", "raita|naan"),
    Dish("pad thai", HEAT, "peanuts|bean sprouts", "tofu|lime"),
    Dish("green curry", HEAT, "eggplant|basil", "bamboo shoots|rice"),
    Dish("beef chili", HEAT, "beans|sour cream", "cheddar|cornbread"),
    Dish("kung pao chicken", HEAT, "bell peppers|scallions", "cashews|rice"),
    Dish("mapo tofu", HEAT, "pork|scallions", "rice|sichuan pepper"),
    Dish("chicken wings", HEAT, "celery sticks|honey", "ranch dip|blue cheese dip"),
    Dish("shrimp tacos", HEAT, "cabbage|cilantro", "guacamole|lime"),
    Dish("bean burrito", HEAT, "rice|sour cream", "salsa|cheese"),
    Dish("beef ramen", HEAT, "nori|egg|corn", "noodles|chili oil"),
    Dish("penne arrabbiata", HEAT, "garlic|parsley", "burrata|sausage"),
    Dish("breakfast plate", EGGS, "baked beans|tomato", "hash browns|bacon"),
    Dish("huevos rancheros", EGGS, "refried beans|salsa", "avocado|cheese"),
    Dish("corned beef hash", EGGS, "onions|peppers", "rye toast|horseradish"),
    Dish("eggs benedict", "", "hollandaise|ham", "spinach|smoked salmon"),
    Dish("veggie omelette", "runny|well done", "peppers|mushrooms", "goat cheese|spinach"),
    Dish("buttermilk pancakes", "", "butter|powdered sugar", "blueberries|maple syrup"),
    Dish("caesar salad", "", "anchovies|croutons", "grilled chicken|parmesan"),
    Dish("greek salad", "", "olives|red onion|feta", "capers|cucumber"),
    Dish("cobb salad", "", "bacon|blue cheese", "avocado|turkey"),
    Dish("club sandwich", "toasted|untoasted", "mayo|tomato", "turkey|cheese"),
    Dish("grilled cheese", "", "tomato|chutney", "ham|pickles"),
    Dish("reuben", "toasted|untoasted", "sauerkraut|dressing", "swiss|pickles"),
    Dish("falafel wrap", "", "tahini|pickled turnip", "hummus|hot sauce"),
    Dish("margherita pizza", "thin crust|well done", "basil|garlic", "olives|anchovies"),
    Dish("mushroom risotto", "", "parmesan|truffle oil", "peas|thyme"),
    Dish("spaghetti carbonara", "", "black pepper|pancetta", "parmesan|peas"),
    Dish("lasagna", "", "ricotta|basil", "marinara|garlic bread"),
    Dish("tomato soup", "", "cream|croutons", "basil|olive oil"),
    Dish("clam chowder", "", "bacon|celery", "crackers|chives"),
    Dish("onion soup", "", "gruyere|croutons", "thyme|bread"),
    Dish("miso salmon", "medium rare|medium|well done", "scallions|glaze", "bok choy|rice"),
    Dish("crab cakes", "fried|broiled", "remoulade|slaw", "lemon|tartar sauce"),
    Dish("grilled octopus", "", "capers|paprika", "lemon|potatoes"),
    Dish("steamed mussels", "", "cream|shallots", "fries|bread"),
    Dish("roast chicken", "white meat|dark meat", "stuffing|gravy", "carrots|mash"),
    Dish("pork schnitzel", "", "lemon|cranberries", "potato salad|gravy"),
    Dish("apple pie", "warm|cold", "cinnamon|whipped cream", "vanilla ice cream|custard"),
    Dish("chocolate brownie", "warm|cold", "walnuts|caramel", "raspberries|cream"),
]
UNSEEN_DISHES = [
    Dish("bavette", GRILL, "chimichurri|shallots", "roast tomatoes|fries"),
    Dish("bison burger", GRILL, "lettuce|mustard|cheddar", "onion rings|bacon"),
    Dish("elk medallions", PINK, "lingonberries|thyme", "barley|mushrooms"),
    Dish("butter chicken", HEAT, "cream|fenugreek", "garlic naan|rice"),
    Dish("beef rendang", HEAT, "coconut|lemongrass", "rice|peanuts"),
    Dish("tom yum", HEAT, "mushrooms|galangal", "prawns|lime"),
    Dish("bibimbap", HEAT, "kimchi|carrots", "tofu|sesame oil"),
    Dish("jerk pork", HEAT, "plantain|thyme", "mango salsa|rice"),
    Dish("shakshuka", "runny|well done", "feta|peppers", "pita|merguez"),
    Dish("seafood paella", "", "mussels|peas", "saffron aioli|lemon"),
    Dish("nicoise salad", "", "green beans|olives|tuna", "potatoes|capers"),
    Dish("potato gnocchi", "", "sage|walnuts", "gorgonzola|pesto"),
    Dish("pumpkin ravioli", "", "amaretti|sage", "brown butter|ricotta"),
    Dish("halloumi flatbread", "toasted|untoasted", "mint|zucchini", "hummus|harissa"),
    Dish("lobster roll", "warm|cold", "mayo|chives", "old bay|chips"),
    Dish("moussaka", "", "bechamel|raisins", "tzatziki|oregano"),
    Dish("sea bass", "grilled|steamed", "fennel|skin", "samphire|lemon butter"),
    Dish("cherry cobbler", "warm|cold", "almonds|sugar", "creme fraiche|honey"),
]


class Style(NamedTuple):
    """One way to write a note down. {} takes the thing itself; what an order lacks leaves nothing behind."""

    name: str
    note: str  # {table} {items}
    item: str  # {n} {dish} {how} {no} {add}
    join: str
    numbers: str  # how one, two, three, four are written
    how: str  # from here on, alternatives parted by ~
    no: str
    add: str


WORDS, DIGITS = "one two three four", "1 2 3 4"

SEEN_STYLES = [
    Style("colon", "Table {table}: {items}.", "{n} {dish}{how}{no}{add}", "; ", WORDS,
          ", {}", ", no {}~, hold the {}", ", extra {}~, add {}"),
    Style("table_last", "{items} for table {table}", "{n} {dish}{how}{no}{add}", " and ", WORDS,
          " {}", " no {}~ without {}", " with extra {}~ plus {}"),
    Style("slashes", "T{table} / {items}", "{n} {dish}{how}{no}{add}", " / ", DIGITS,
          " {}", " no {}", " add {}~ xtra {}"),
    Style("plus_minus", "#{table} {items}", "{dish} x{n}{how}{no}{add}", ", ", DIGITS,
          " ({})", " -{}", " +{}"),
    Style("dashes", "table {table}\n{items}", "- {n} {dish}{how}{no}{add}", "\n", DIGITS,
          ", {}", ", no {}~, hold {}", ", add {}~, extra {}"),
    Style("polite", "Could I please have {items} for table {table}?", "{n} {dish}{how}{no}{add}",
          ", and also ", WORDS,
          " cooked {}~, {}", " without the {}~, no {} please", " with some extra {}~, adding {}"),
    Style("ok_so", "ok so table {table} wants {items}", "{n} {dish}{how}{no}{add}", " and then ", WORDS,
          " {}", " but no {}~ hold the {}", " with {} added~ and extra {} on it"),
    Style("guests_would_like", "The guests at {table} would like {items}.", "{n} {dish}{how}{no}{add}",
          ", as well as ", WORDS,
          " done {}~, {}", ", leaving out the {}~, without {}", ", with added {}~, with extra {}"),
    Style("arrow", "{items} -> {table}", "{n}x {dish}{how}{no}{add}", " & ", DIGITS,
          ", {}", ", no {}~, w/o {}", ", w/ {}~, extra {}"),
    Style("brackets", "[{table}] {items}", "{n} {dish}{how}{no}{add}", " + ", DIGITS,
          " [{}]", " [no {}]~ [hold {}]", " [add {}]~ [extra {}]"),
    Style("hey", "hey, can you put in {items}? its for {table}.", "{n} {dish}{how}{no}{add}", " and ", WORDS,
          ", {}", ", no {}~, skip the {}", ", extra {}~, with {} too"),
    Style("fragments", "New order. Table {table}. {items}", "{n} {dish}.{how}{no}{add}", " ",
          "One Two Three Four",
          " Make it {}.~ Cooked {}.", " No {}.~ Without {}.", " Extra {}.~ Add {}."),
    Style("letters", "Table {table} order:\n{items}", "* {dish}: {n}{how}{no}{add}", "\n", DIGITS,
          ", {}", ", NO {}~, no {}", ", EXTRA {}~, extra {}"),
    Style("my_guests", "My guests on {table} asked for {items}.", "{n} {dish}{how}{no}{add}",
          ", followed by ", WORDS,
          ", {}", ", with the {} left off~, no {}", ", with {} on top~, extra {}"),
]
UNSEEN_STYLES = [
    Style("window", "The party by the window, table {table}, settled on {items}.", "{n} {dish}{how}{no}{add}",
          " together with ", WORDS,
          " prepared {}", ", nothing with {} in it~, omitting the {}",
          ", topped with {}~, and {} as an extra"),
    Style("put_me_down", "Put me down for {items}. I sit at table {table}.", "{n} {dish}{how}{no}{add}",
          " and another thing, ", WORDS,
          ", {} if possible", ", I don't want {}~, keep the {} off",
          ", I'd love extra {}~, give me {} with it"),
    Style("semicolons", "tbl{table};{items}", "{n};{dish}{how}{no}{add}", ";", DIGITS,
          ";{}", ";no {}", ";extra {}"),
    Style("thats_all", "{items}... that's everything for number {table}", "{n} {dish}{how}{no}{add}", "... ",
          WORDS,
          " nice and {}", ", drop the {}~, zero {}", ", throw in {}~, load up on {}"),
    Style("what_where", "What: {items}. Where: table {table}.", "{n} {dish}{how}{no}{add}", " / ", DIGITS,
          ", how: {}", ", off: {}", ", on: {}"),
    Style("signs", "tab.{table} {items}", "{n}*{dish}{how}{no}{add}", " ... ", DIGITS,
          " @{}", " w/out {}", " w/ xtra {}"),
    Style("when_you_can", "Kitchen, when you can: {table} is still waiting on {items}.",
          "{dish} ({n}{how}{no}{add})",
          " and ", WORDS,
          ", {}", ", {} removed~, free of {}", ", {} on the side as an extra~, double {}"),
    Style("check", "add to the check of table {table}:{items}", " {n} of the {dish}{how}{no}{add}", ",",
          DIGITS,
          " / {}", " / take out {}", " / put in {}"),
    Style("repeat_back", "Repeating that back: {items}, table {table}. Right?", "{n} {dish}{how}{no}{add}",
          ", ", WORDS,
          " {} style", " and absolutely no {}~ and lose the {}", " and a bit of extra {}~ and put {} on"),
    Style("done_when", "once you're free do {items} ... {table} ordered it", "{dish} times {n}{how}{no}{add}",
          ", next ", WORDS,
          ", want it {}", ", dont put {}~, {} not wanted", ", want more {}~, {} as well"),
]


def draw_order(rng: random.Random, menu: list[Dish], count: int) -> dict:
    """An order of one or two dishes as its ticket: keys in this order, what was not asked for left out."""
    dishes = rng.sample(menu, count)
    most = 3 - len(dishes)  # two wishes for one dish alone, one for each of two: a ticket stays short
    items = []
    for dish in dishes:
        wishes = [wish for wish in ("how", "no", "add") if getattr(dish, wish)]
        least = 2 - len(dishes)  # a dish alone comes with a wish, or notes would be too much alike
        asked = rng.sample(wishes, rng.randint(least, min(most, len(wishes))))
        item = {"qty": rng.choices((1, 2, 3, 4), (5, 4, 2, 1))[0], "dish": dish.name}
        item |= {wish: rng.choice(getattr(dish, wish).split("|")) for wish in wishes if wish in asked}
        items.append(item)
    return {"table": rng.randint(1, 30), "items": items}


def write_note(rng: random.Random, order: dict, style: Style) -> str:
    def say(key: str, holder: dict) -> str:
        forms = getattr(style, key).split("~")
        return rng.choice(forms).format(holder[key]) if key in holder else ""

    items = [
        style.item.format(
            n=style.numbers.split()[item["qty"] - 1],
            dish=item["dish"],
            **{wish: say(wish, item) for wish in ("how", "no", "add")},
        )
        for item in order["items"]
    ]
    return style.note.format(table=order["table"], items=style.join.join(items))


def trigrams(prompt: str) -> set[tuple[str, ...]]:
    """Word trigrams of the normalised prompt: lower case, no punctuation, every number the same."""
    numbers = {*WORDS.split()}
    words = ["#" if w.isdigit() or w in numbers else w for w in re.findall(r"[a-z]+|[0-9]+", prompt.lower())]
    return set(zip(words, words[1:], words[2:], strict=False))


def near(a: set, b: set) -> bool:
    return len(a & b) >= NEAR * len(a | b)


def without_table(order: dict) -> str:
    return json.dumps({key: value for key, value in order.items() if key != "table"})


def draw_rows(rng: random.Random, count: int, phrasing: str, dishes: str, earlier: list[dict]) -> list[dict]:
    """`count` rows, the styles in turn: no two notes alike, no note or order of an `earlier` split again."""
    styles = SEEN_STYLES if phrasing == "seen" else UNSEEN_STYLES
    menu = SEEN_DISHES if dishes == "seen" else UNSEEN_DISHES
    own: list[set] = []
    others = [trigrams(row["prompt"]) for row in earlier]
    orders = {without_table(json.loads(row["completion"])) for row in earlier}
    rows: list[dict] = []
    while len(rows) < count:
        style = styles[len(rows) % len(styles)]
        order = draw_order(rng, menu, 2 if len(rows) % 5 == 4 else 1)
        prompt = LEAD_IN + write_note(rng, order, style)
        grams = trigrams(prompt)
        if grams in own or without_table(order) in orders or any(near(grams, other) for other in others):
            continue
        own.append(grams)
        ticket = json.dumps(order, separators=(",", ":"))
        kind = {"phrasing": phrasing, "dishes": dishes, "style": style.name}
        rows.append({"prompt": prompt, "completion": ticket, **kind})
    rng.shuffle(rows)
    return rows


def make() -> dict[str, list[dict]]:
    """All three splits, the same on every machine and Python: one Random draws everything, in one order."""
    rng = random.Random(SEED)
    train = draw_rows(rng, 600, "seen", "seen", [])
    validation = draw_rows(rng, 100, "seen", "seen", train)
    parts = (("seen", "seen", 100), ("unseen", "seen", 50), ("unseen", "unseen", 50))
    known = train + validation
    test = [row for phrasing, dishes, n in parts for row in draw_rows(rng, n, phrasing, dishes, known)]
    return {"train": train, "validation": validation, "test": test}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    check = parser.parse_args().check
    stale = []
    for split, rows in make().items():
        path = HERE / f"{split}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if check:
            if not path.exists() or path.read_bytes() != text:
                stale.append(path.name)
        else:
            part = path.with_suffix(".part")
            part.write_bytes(text)
            os.replace(part, path)
    if stale:
        print(f"{', '.join(stale)}: not what generate.py makes; run it without --check", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
