"""Writes train.jsonl, validation.jsonl and test.jsonl, byte for byte the same each time; `--check` only compares.

A row is a waiter's note and the kitchen ticket it stands for. An order is drawn first (dishes with what a cook would
leave off or add to them), then written down in one of the hand-written styles below; the ticket is that order as JSON.
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
    has: str  # allergens in the dish or its extras: such a guest would not be served it


GRILL = "rare|medium rare|medium|medium well|well done"
PINK = "rare|medium rare|medium"
HEAT = "mild|medium|hot|extra hot"
EGGS = "over easy|sunny side up|poached|scrambled"
ALLERGENS = ("shellfish", "dairy", "gluten", "sesame", "soy", "egg", "fish", "mustard", "celery", "peanut")

SEEN_DISHES = [
    Dish("ribeye steak", GRILL, "butter|mushrooms|watercress", "pepper sauce|fried onions", "dairy gluten"),
    Dish("sirloin", GRILL, "fries|butter|parsley", "blue cheese|mushrooms", "dairy"),
    Dish("lamb chops", PINK, "mint sauce|rosemary", "gravy|roast garlic", "gluten celery"),
    Dish("cheeseburger", GRILL, "pickles|onions|ketchup", "bacon|jalapenos", "dairy gluten sesame mustard egg"),
    Dish("duck breast", PINK, "cherry sauce|red cabbage", "orange sauce|lentils", "celery"),
    Dish("tuna steak", PINK, "sesame seeds|wasabi", "pickled ginger|avocado", "fish sesame soy mustard"),
    Dish("venison loin", PINK, "juniper|blackberries", "parsnips|red wine sauce", "celery"),
    Dish("chicken curry", HEAT, "cilantro|potatoes", "rice|yogurt", "dairy mustard"),
    Dish("lamb vindaloo", HEAT, "potatoes|chilies", "raita|naan", "dairy gluten mustard"),
    Dish("pad thai", HEAT, "peanuts|bean sprouts", "tofu|lime", "peanut fish shellfish egg soy gluten"),
    Dish("green curry", HEAT, "eggplant|basil", "bamboo shoots|rice", "fish shellfish"),
    Dish("beef chili", HEAT, "beans|sour cream", "cheddar|cornbread", "dairy gluten egg"),
    Dish("kung pao chicken", HEAT, "bell peppers|scallions", "cashews|rice", "soy peanut gluten sesame"),
    Dish("mapo tofu", HEAT, "pork|scallions", "rice|sichuan pepper", "soy gluten sesame"),
    Dish("chicken wings", HEAT, "celery sticks|honey", "ranch dip|hot sauce", "celery dairy egg"),
    Dish("shrimp tacos", HEAT, "cabbage|cilantro", "guacamole|lime", "shellfish gluten"),
    Dish("bean burrito", HEAT, "rice|sour cream", "salsa|cheese", "gluten dairy"),
    Dish("beef ramen", HEAT, "nori|egg|corn", "noodles|chili oil", "gluten soy egg sesame"),
    Dish("penne arrabbiata", HEAT, "garlic|parsley", "burrata|sausage", "gluten dairy"),
    Dish("breakfast plate", EGGS, "baked beans|tomato", "hash browns|bacon", "egg"),
    Dish("huevos rancheros", EGGS, "refried beans|salsa", "avocado|cheese", "egg dairy"),
    Dish("corned beef hash", EGGS, "onions|peppers", "rye toast|horseradish", "egg gluten mustard"),
    Dish("eggs benedict", "", "hollandaise|ham", "spinach|smoked salmon", "egg dairy gluten fish"),
    Dish("veggie omelette", "runny|well done", "peppers|mushrooms", "goat cheese|spinach", "egg dairy"),
    Dish("buttermilk pancakes", "", "butter|powdered sugar", "blueberries|maple syrup", "gluten dairy egg"),
    Dish("caesar salad", "", "anchovies|croutons", "grilled chicken|parmesan", "fish dairy egg gluten mustard"),
    Dish("greek salad", "", "olives|red onion|feta", "capers|cucumber", "dairy"),
    Dish("cobb salad", "", "bacon|blue cheese", "avocado|turkey", "dairy egg mustard"),
    Dish("club sandwich", "toasted|untoasted", "mayo|tomato", "turkey|cheese", "gluten egg dairy"),
    Dish("grilled cheese", "", "tomato|chutney", "ham|pickles", "dairy gluten mustard"),
    Dish("reuben", "toasted|untoasted", "sauerkraut|dressing", "swiss|pickles", "gluten dairy egg mustard"),
    Dish("falafel wrap", "", "tahini|pickled turnip", "hummus|hot sauce", "sesame gluten"),
    Dish("margherita pizza", "thin crust|well done", "basil|garlic", "olives|anchovies", "gluten dairy fish"),
    Dish("mushroom risotto", "", "parmesan|truffle oil", "peas|thyme", "dairy celery"),
    Dish("spaghetti carbonara", "", "black pepper|pancetta", "parmesan|peas", "gluten egg dairy"),
    Dish("lasagna", "", "ricotta|basil", "marinara|garlic bread", "gluten dairy egg celery"),
    Dish("tomato soup", "", "cream|croutons", "basil|olive oil", "dairy gluten celery"),
    Dish("clam chowder", "", "bacon|celery", "crackers|chives", "shellfish dairy celery gluten fish"),
    Dish("onion soup", "", "gruyere|croutons", "thyme|bread", "dairy gluten celery"),
    Dish("miso salmon", "medium rare|medium|well done", "scallions|glaze", "bok choy|rice", "fish soy gluten sesame"),
    Dish("crab cakes", "fried|broiled", "remoulade|slaw", "lemon|tartar sauce", "shellfish egg gluten mustard"),
    Dish("grilled octopus", "", "capers|paprika", "lemon|potatoes", "shellfish"),
    Dish("steamed mussels", "", "cream|shallots", "fries|bread", "shellfish dairy gluten celery"),
    Dish("roast chicken", "white meat|dark meat", "stuffing|gravy", "carrots|mash", "gluten dairy celery"),
    Dish("pork schnitzel", "", "lemon|cranberries", "potato salad|gravy", "gluten egg mustard celery"),
    Dish("apple pie", "warm|cold", "cinnamon|whipped cream", "vanilla ice cream|custard", "gluten dairy egg"),
    Dish("chocolate brownie", "warm|cold", "walnuts|caramel", "raspberries|cream", "gluten dairy egg soy"),
]
UNSEEN_DISHES = [
    Dish("bavette", GRILL, "chimichurri|shallots", "roast tomatoes|fries", ""),
    Dish("bison burger", GRILL, "lettuce|mustard|cheddar", "onion rings|bacon", "dairy gluten sesame mustard egg"),
    Dish("elk medallions", PINK, "lingonberries|thyme", "barley|mushrooms", "gluten celery"),
    Dish("butter chicken", HEAT, "cream|fenugreek", "garlic naan|rice", "dairy gluten"),
    Dish("beef rendang", HEAT, "coconut|lemongrass", "rice|peanuts", "peanut shellfish"),
    Dish("tom yum", HEAT, "mushrooms|galangal", "prawns|lime", "shellfish fish"),
    Dish("bibimbap", HEAT, "kimchi|carrots", "tofu|sesame oil", "soy sesame egg gluten fish"),
    Dish("jerk pork", HEAT, "plantain|thyme", "mango salsa|rice", "soy"),
    Dish("shakshuka", "runny|well done", "feta|peppers", "pita|merguez", "egg dairy gluten"),
    Dish("seafood paella", "", "mussels|peas", "saffron aioli|lemon", "shellfish fish egg celery"),
    Dish("nicoise salad", "", "green beans|olives|tuna", "potatoes|capers", "fish egg mustard"),
    Dish("potato gnocchi", "", "sage|walnuts", "gorgonzola|pesto", "gluten dairy egg"),
    Dish("pumpkin ravioli", "", "amaretti|sage", "brown butter|ricotta", "gluten dairy egg"),
    Dish("halloumi flatbread", "toasted|untoasted", "mint|zucchini", "hummus|harissa", "dairy gluten sesame"),
    Dish("lobster roll", "warm|cold", "mayo|chives", "old bay|chips", "shellfish gluten egg celery"),
    Dish("moussaka", "", "bechamel|raisins", "tzatziki|oregano", "dairy gluten egg"),
    Dish("sea bass", "grilled|steamed", "fennel|skin", "samphire|lemon butter", "fish dairy"),
    Dish("cherry cobbler", "warm|cold", "almonds|sugar", "creme fraiche|honey", "gluten dairy egg"),
]


class Style(NamedTuple):
    """One way to write a whole note down. {} takes the thing itself; what an order lacks leaves nothing behind."""

    name: str
    note: str  # {table} {items} {allergy}
    item: str  # {n} {dish} {how} {no} {add}
    join: str
    numbers: str  # how one, two, three, four are written
    how: str  # from here on, alternatives parted by ~
    no: str
    add: str
    allergy: str


WORDS, DIGITS = "one two three four", "1 2 3 4"

SEEN_STYLES = [
    Style("colon", "Table {table}: {items}.{allergy}", "{n} {dish}{how}{no}{add}", "; ", WORDS,
          ", {}", ", no {}~, hold the {}", ", extra {}~, add {}", " Allergic to {}.~ Guest has a {} allergy."),
    Style("table_last", "{items} for table {table}{allergy}", "{n} {dish}{how}{no}{add}", " and ", WORDS,
          " {}", " no {}~ without {}", " with extra {}~ plus {}", ", {} allergy~, allergic to {}"),
    Style("slashes", "T{table} / {items}{allergy}", "{n} {dish}{how}{no}{add}", " / ", DIGITS,
          " {}", " no {}", " add {}~ xtra {}", " / ALLERGY {}"),
    Style("plus_minus", "#{table} {items}{allergy}", "{dish} x{n}{how}{no}{add}", ", ", DIGITS,
          " ({})", " -{}", " +{}", " !! {} allergy"),
    Style("dashes", "table {table}\n{items}{allergy}", "- {n} {dish}{how}{no}{add}", "\n", DIGITS,
          ", {}", ", no {}~, hold {}", ", add {}~, extra {}", "\nallergy: {}"),
    Style("polite", "Could I please have {items} for table {table}?{allergy}", "{n} {dish}{how}{no}{add}",
          ", and also ", WORDS, " cooked {}~, {}", " without the {}~, no {} please", " with some extra {}~, adding {}",
          " They mentioned a {} allergy.~ Please mind, they are allergic to {}."),
    Style("ok_so", "ok so table {table} wants {items}{allergy}", "{n} {dish}{how}{no}{add}", " and then ", WORDS,
          " {}", " but no {}~ hold the {}", " with {} added~ and extra {} on it", " oh and theyre allergic to {}"),
    Style("guests_would_like", "The guests at {table} would like {items}.{allergy}", "{n} {dish}{how}{no}{add}",
          ", as well as ", WORDS, " done {}~, {}", ", leaving out the {}~, without {}",
          ", with added {}~, with extra {}",
          " One guest is allergic to {}.~ Careful: {} allergy."),
    Style("allergy_first", "{allergy}Table {table} is having {items}.", "{n} {dish}{how}{no}{add}", ", plus ", WORDS,
          ", {}", ", no {}~, minus the {}", ", extra {}~, {} added", "Allergy alert, {}! ~Watch out for {}, allergy. "),
    Style("arrow", "{items} -> {table}{allergy}", "{n}x {dish}{how}{no}{add}", " & ", DIGITS,
          ", {}", ", no {}~, w/o {}", ", w/ {}~, extra {}", " (allergy: {})"),
    Style("fire", "Chef, fire {items}! That's table {table}.{allergy}", "{n} {dish}{how}{no}{add}", ", then ", WORDS,
          " {}", ", hold the {}~, no {}", ", extra {}~, add {}", " {} allergy on that one."),
    Style("brackets", "[{table}] {items}{allergy}", "{n} {dish}{how}{no}{add}", " + ", DIGITS,
          " [{}]", " [no {}]~ [hold {}]", " [add {}]~ [extra {}]", " [allergic: {}]"),
    Style("of_them", "{items}, all to table {table}.{allergy}", "{dish}, {n} of them{how}{no}{add}", "; also ", WORDS,
          ", {}", ", no {}~, leave off the {}", ", put extra {} on~, add {}", " Somebody can't have {}, allergy."),
    Style("pipes", "tbl {table} | {items}{allergy}", "qty {n} | {dish}{how}{no}{add}", " | ", DIGITS,
          " | {}", " | no {}", " | add {}", " | allergy {}"),
    Style("hey", "hey, can you put in {items}? its for {table}.{allergy}", "{n} {dish}{how}{no}{add}", " and ", WORDS,
          ", {}", ", no {}~, skip the {}", ", extra {}~, with {} too", " allergic to {} btw."),
    Style("decided", "Table {table} finally decided. {items}.{allergy}", "They'll take {n} {dish}{how}{no}{add}",
          ". ", WORDS, ", {}", ", hold the {}~, and no {}", ", and add {}~, and extra {}", " Also, {} allergy there."),
    Style("fragments", "New order. Table {table}. {items}{allergy}", "{n} {dish}.{how}{no}{add}", " ",
          "One Two Three Four", " Make it {}.~ Cooked {}.", " No {}.~ Without {}.", " Extra {}.~ Add {}.",
          " Allergy: {}.~ Allergic to {}."),
    Style("first_then", "For {table}: first {items}.{allergy}", "{n} {dish}{how}{no}{add}", ", second ", WORDS,
          " ({})", " with no {}~ without {}", " with extra {}~ plus {}", " Note the {} allergy."),
    Style("need_on", "need {items} on {table}{allergy}", "{n} {dish}{how}{no}{add}", " + ", DIGITS,
          " {}", " no {}~ minus {}", " extra {}~ add {}", ", allergy {}~, {} allergy"),
    Style("count_last", "{table}: {items}{allergy}", "{dish}{how}{no}{add} ({n})", ", ", DIGITS,
          " {}", " no {}~ hold {}", " extra {}~ with {}", ". {} allergy"),
    Style("please_make", "Please make {items}. It goes to table {table}.{allergy}", "{n} {dish}{how}{no}{add}",
          ", and ", WORDS, ", {}", ", without any {}~, no {}", ", with more {}~, with extra {}",
          " The guest is allergic to {}.~ There is a {} allergy at the table."),
    Style("letters", "Table {table} order:\n{items}{allergy}", "* {dish}: {n}{how}{no}{add}", "\n", DIGITS,
          ", {}", ", NO {}~, no {}", ", EXTRA {}~, extra {}", "\n* {} ALLERGY"),
    Style("my_guests", "My guests on {table} asked for {items}{allergy}.", "{n} {dish}{how}{no}{add}", ", followed by ",
          WORDS, ", {}", ", with the {} left off~, no {}", ", with {} on top~, extra {}",
          ", and one is allergic to {}"),
    Style("how_first", "t{table} {items}{allergy}", "{n} {how}{dish}{no}{add}", ", ", DIGITS,
          "{} ", " no {}", " extra {}~ plus {}", ", allergy {}"),
    Style("make_that", "Ticket for {table}, {items}, thanks.{allergy}", "make that {n} {dish}{how}{no}{add}", ", and ",
          WORDS, ", {}", ", hold {}~, without {}",
          ", add some {}~, extra {}", " {} allergy!"),
    Style("sitting_here", "I'm at table {table}: they say {items}{allergy}", "{n} {dish}{how}{no}{add}", ", also ",
          WORDS, ", {} please~, {}", ", no {}~, and take off the {}", ", and more {}~, extra {}",
          ". and an allergy to {}"),
    Style("up_next", "Up next {items}. Table is {table}.{allergy}", "{n} times {dish}{how}{no}{add}", ", ", WORDS,
          " {}", " hold {}~ no {}", " add {}~ extra {}", " Allergy is {}."),
    Style("sending", "sending table {table} {items}{allergy}", "{n} {dish}{how}{no}{add}", " / ", WORDS,
          " - {}", " - no {}~ - hold the {}", " - extra {}~ - add {}", " - {} allergy"),
]
UNSEEN_STYLES = [
    Style("window", "The party by the window, table {table}, settled on {items}.{allergy}", "{n} {dish}{how}{no}{add}",
          " together with ", WORDS, " prepared {}", ", nothing with {} in it~, omitting the {}",
          ", topped with {}~, and {} as an extra",
          " A lady there gets sick from {}, she has an allergy."),
    Style("put_me_down", "Put me down for {items}. I sit at table {table}.{allergy}", "{n} {dish}{how}{no}{add}",
          " and another thing, ", WORDS, ", {} if possible", ", I don't want {}~, keep the {} off",
          ", I'd love extra {}~, give me {} with it",
          " I have a {} allergy."),
    Style("semicolons", "tbl{table};{items}{allergy}", "{n};{dish}{how}{no}{add}", ";", DIGITS,
          ";{}", ";no {}", ";extra {}", ";allergy {}"),
    Style("thats_all", "{items}... that's everything for number {table}{allergy}", "{n} {dish}{how}{no}{add}",
          "... ", WORDS, " nice and {}", ", drop the {}~, zero {}", ", throw in {}~, load up on {}",
          ", heads up {} allergy"),
    Style("what_where", "What: {items}. Where: table {table}.{allergy}", "{n} {dish}{how}{no}{add}", " / ", DIGITS,
          ", how: {}", ", off: {}", ", on: {}", " Allergy: {}."),
    Style("signs", "tab.{table} {items}{allergy}", "{n}*{dish}{how}{no}{add}", " ... ", DIGITS,
          " @{}", " w/out {}", " w/ xtra {}", " *{} allergy*"),
    Style("when_you_can", "Kitchen, when you can: {table} is still waiting on {items}.{allergy}",
          "{dish} ({n}{how}{no}{add})", " and ", WORDS, ", {}", ", {} removed~, free of {}",
          ", {} on the side as an extra~, double {}",
          " Somebody reacts badly to {}, so treat it as an allergy."),
    Style("check", "add to the check of table {table}:{items}{allergy}", " {n} of the {dish}{how}{no}{add}", ",",
          DIGITS, " / {}", " / take out {}", " / put in {}", ". guest cannot eat {} (allergy)"),
    Style("repeat_back", "Repeating that back: {items}, table {table}. {allergy}Right?", "{n} {dish}{how}{no}{add}",
          ", ", WORDS, " {} style", " and absolutely no {}~ and lose the {}", " and a bit of extra {}~ and put {} on",
          "And the allergy was {}. "),
    Style("done_when", "once you're free do {items} ... {table} ordered it{allergy}",
          "{dish} times {n}{how}{no}{add}", ", next ", WORDS, ", want it {}", ", dont put {}~, {} not wanted",
          ", want more {}~, {} as well", " ... allergy there, its {}"),
]


def draw_order(rng: random.Random, menu: list[Dish]) -> dict:
    """An order as the ticket shows it: keys always in this order, what was not asked for left out."""
    dishes = rng.sample(menu, rng.choices((1, 2), (7, 3))[0])
    items = []
    for dish in dishes:
        item = {"qty": rng.choices((1, 2, 3, 4), (5, 4, 2, 1))[0], "dish": dish.name}
        chances = {"how": 0.8, "no": 0.6, "add": 0.45} if len(dishes) == 1 else {"how": 0.5, "no": 0.3, "add": 0.2}
        wishes = [wish for wish, chance in chances.items() if getattr(dish, wish) and rng.random() < chance]
        most = 3 - len(dishes)  # two wishes for one dish alone, one for each of two: a ticket stays short
        dropped = rng.sample(wishes, max(0, len(wishes) - most))
        item |= {wish: rng.choice(getattr(dish, wish).split("|")) for wish in wishes if wish not in dropped}
        items.append(item)
    order = {"table": rng.randint(1, 30), "items": items}
    safe = [a for a in ALLERGENS if all(a not in dish.has.split() for dish in dishes)]
    plain = all(len(item) == 2 for item in items)
    if plain or rng.random() < 0.25:
        order["allergy"] = rng.choice(safe)
    return order


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
    return style.note.format(table=order["table"], items=style.join.join(items), allergy=say("allergy", order))


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
    """`count` rows, the styles in turn: no two notes alike, and no note or order of an `earlier` split come again."""
    styles = SEEN_STYLES if phrasing == "seen" else UNSEEN_STYLES
    menu = SEEN_DISHES if dishes == "seen" else UNSEEN_DISHES
    own: list[set] = []
    others = [trigrams(row["prompt"]) for row in earlier]
    orders = {without_table(json.loads(row["completion"])) for row in earlier}
    rows: list[dict] = []
    while len(rows) < count:
        style = styles[len(rows) % len(styles)]
        order = draw_order(rng, menu)
        prompt = LEAD_IN + write_note(rng, order, style)
        grams = trigrams(prompt)
        if grams in own or without_table(order) in orders or any(near(grams, other) for other in others):
            continue
        own.append(grams)
        ticket = json.dumps(order, separators=(",", ":"))
        rows.append(
            {"prompt": prompt, "completion": ticket, "phrasing": phrasing, "dishes": dishes, "style": style.name}
        )
    rng.shuffle(rows)
    return rows


def make() -> dict[str, list[dict]]:
    """All three splits, the same on every machine and Python: one Random draws everything, in one order."""
    rng = random.Random(SEED)
    train = draw_rows(rng, 600, "seen", "seen", [])
    validation = draw_rows(rng, 100, "seen", "seen", train)
    test = [
        row
        for phrasing in ("seen", "unseen")
        for dishes in ("seen", "unseen")
        for row in draw_rows(rng, 50, phrasing, dishes, train + validation)
    ]
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
