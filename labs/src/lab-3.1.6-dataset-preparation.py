# %% [markdown]
# # 3.1.6 What makes data good enough to train on?
#
# **Time**: about 60 minutes.
#
# A missing end mark, a broken letter, a test row in the training set: the loss falls all the same. How do you find out before you
# train?
#
# ## What you will make
#
# The tools that turn a file into a training set. At the end you train on **fifty rows of your own**.
#
# ## What you should know first
#
# - Python: lists, dicts, sets, `re.findall`.
# - A LoRA adapter can be switched off ([3.1.1](lab-3.1.1-lora-theory.ipynb)).
#
# > **Loss**: how surprised the model is by the right answer, on average per token. Its unit is the *nat*; 0 is not surprised at all.
#
# ## The picture
#
# Watch a good kitchen an hour before it opens. Nobody cooks. They wash, sort, throw out the soft onion, and put everything
# in labelled boxes: *mise en place*. No guest sees it, and no stove can replace it. A rotten onion does not get better in the pan.

# %%
import json
import random
import re
from collections import Counter

from spark_ft import all_answers, clean, collate_sft, read_records
from spark_ft.data.formats import messages_to_sharegpt, sharegpt_to_messages
from spark_ft.data.own import own_rows
from spark_ft.embedded import EMBEDDED
from spark_ft.lab import headline, yours
from spark_ft.lab.checks import lab_3_1_6 as checks
from spark_ft.lab.experiments import agrees, lab_3_1_6, load
from spark_ft.lab.kitchen import TICKETS, tickets
from spark_ft.lab.study import lab_3_1_6 as study
from spark_ft.lab.tokens import show_tokens
from spark_ft.models import load_tokenizer

# %% [markdown]
# ## It works
#
# A colleague sends fifty orders with their tickets, as a spreadsheet. The next cell keeps what is fit to train on, trains an adapter
# for 20 steps, and asks for three new tickets before and after.

# %%
tokenizer = load_tokenizer(EMBEDDED)
rows = own_rows(study.example_file("orders.csv")).rendered(tokenizer)
rows = rows.cleaned(held_out=own_rows(TICKETS / "validation.jsonl"))
study.show_report(rows)
model, history = study.train_rows(rows.records)
study.show_before_after(model, tickets("validation")[2:5])

# %% [markdown]
# Ten rows went, each with a line and a reason. The answers are tickets now, though not all are right. Build what just ran.
#
# ## Build it
#
# ### One shape
#
# | format | looks like |
# |---|---|
# | Alpaca | `instruction`, `input`, `output`: one question, one answer |
# | ShareGPT | `conversations` of `from` and `value` |
# | `messages` | `messages` of `role` and `content`: what libraries take today |
# | ChatML | one text with `<\|im_start\|>` and `<\|im_end\|>` |
#
# A conversion can lose something for ever: the system turn, an unknown field, the four spaces in front of a line of code. One
# rule keeps you honest: **there and back gives the row you had**.
#
# ### Exercise 1: ShareGPT and messages
# ●●○ importance · ●○○ difficulty · 10 minutes
#
# `human` becomes `user`, `gpt` becomes `assistant`, `system` stays. Write both ways. Keep texts, unknown fields, and the given row as
# they are.
#
# <details><summary>Hint: the other fields</summary>
#
# `{key: value for key, value in row.items() if key != "conversations"}` is a new dict with all the others.
# </details>

# %% nbgrader={"grade_id": "sharegpt", "solution": true}
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def to_messages(row: dict) -> dict:
    """conversations (from, value) → messages (role, content); other fields as they are."""
    ### BEGIN SOLUTION
    rest = {key: value for key, value in row.items() if key != "conversations"}
    turns = [(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
    return {**rest, "messages": [{"role": role, "content": text} for role, text in turns]}
    ### END SOLUTION


def to_sharegpt(row: dict) -> dict:
    """messages (role, content) → conversations (from, value); other fields as they are."""
    ### BEGIN SOLUTION
    names = {role: name for name, role in ROLES.items()}
    rest = {key: value for key, value in row.items() if key != "messages"}
    turns = [(names[message["role"]], message["content"]) for message in row["messages"]]
    return {**rest, "conversations": [{"from": name, "value": text} for name, text in turns]}
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-sharegpt", "grade": true, "points": 2}
checks.check_sharegpt(to_messages, to_sharegpt)

# %% [markdown]
# The package converts all four formats. Here are forty chats, there and back:

# %%
sharegpt = read_records(study.DATA / "kitchen_chats/train.jsonl", "sharegpt")
chats = [sharegpt_to_messages(row) for row in sharegpt]
assert [messages_to_sharegpt(chat) for chat in chats] == sharegpt
print(tokenizer.apply_chat_template(chats[26]["messages"][:1], tokenize=False))

# %% [markdown]
# ### The template, and what is learned
#
# That is a question as the model reads it. The tokenizer's **chat template** wrote the marks, and a system turn that nobody asked for.
# The model should learn **every answer, with the end mark behind it**, and nothing that the user said:

# %%
show_tokens(tokenizer, *all_answers(chats[26], tokenizer))

# %% [markdown]
# ### Exercise 2: the mask
# ●●● importance · ●●○ difficulty · 12 minutes
#
# You get a chat's token ids, the ids of an answer's **head** (`<|im_start|>assistant` and a line break), and the id of the
# **end** mark. Return `True` or `False` per token: `True` for what the assistant says and for the end mark that closes it. The
# template writes the head: `False`. The last head may have no answer yet.
#
# <details><summary>Hint</summary>
#
# Walk through the ids and remember whether you are inside an answer. You get in right after a whole head, where
# `ids[max(0, i - len(head)) : i] == head`. You get out after an end mark. Mark first, then look whether to leave.
# </details>


# %% nbgrader={"grade_id": "answer-mask", "solution": true}
def answer_mask(ids: list[int], head: list[int], end: int) -> list[bool]:
    """True for every answer's tokens and the end mark that closes it; False for all others."""
    ### BEGIN SOLUTION
    marks, inside = [], False
    for i, token in enumerate(ids):
        inside = inside or ids[max(0, i - len(head)) : i] == head
        marks.append(inside)
        inside = inside and token != end
    return marks
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-answer-mask", "grade": true, "points": 3}
checks.check_answer_mask(answer_mask)

# %% [markdown]
# [TRL](https://github.com/huggingface/trl) is the library that most people train with. Give it the forty chats too:

# %% nbgrader={"grade_id": "check-mask-parity", "grade": true, "points": 1}
checks.check_mask_parity(answer_mask, study.with_generation_marks(tokenizer), chats)

# %% [markdown]
# ### Sort, and mend what can be mended
#
# `data/messy` holds 300 rows as they come from the wild. 82 of them have a planted fault, and `faults.json` lists which. One is
# `KÃ¤sespÃ¤tzle`: somebody saved the text as UTF-8, and somebody else read it as cp1252, the old encoding of Windows. That can be
# undone.
#
# ### Exercise 3: mend the letters
# ●○○ importance · ●○○ difficulty · 5 minutes
#
# Turn the text back into its bytes, and read those as UTF-8: `Donâ€™t` becomes `Don’t`. A text that was fine (`château`, `寿司`)
# nearly always fails in one of the two steps. Return it as it is.
#
# <details><summary>Hint</summary>
#
# `text.encode("cp1252")` gives bytes, `.decode("utf-8")` reads bytes. Both raise a `UnicodeError` where something does not fit.
# </details>


# %% nbgrader={"grade_id": "mend", "solution": true}
def mend(text: str) -> str:
    """UTF-8 that was read as cp1252, put right; any other text as it is."""
    ### BEGIN SOLUTION
    try:
        return text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return text
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-mend", "grade": true, "points": 1}
checks.check_mend(mend)

# %% [markdown]
# The package also mends texts that are broken in one place, or twice. What is left holds �: there the letter is gone.

# %%
messy = read_records(study.DATA / "messy/train.jsonl", "sft")
faults = json.loads((study.DATA / "messy/faults.json").read_text(encoding="utf-8"))
mended = study.mended(messy)

# %% [markdown]
# Equal rows are easy to find, but one comma makes two rows unequal. How alike are two texts? Cut each into overlapping pieces of
# three words, **trigrams**, and take the share of all pieces that is in both:
#
# $$J(A, B) = \frac{|A \cap B|}{|A \cup B|}$$
#
# ### Exercise 4: near-copies
# ●●○ importance · ●●○ difficulty · 10 minutes
#
# Return $J$ for two texts. Words are what `\w+` finds, in lower case: one in `crème`, two in `don't` and in `stir-fry`. A text of fewer
# than three words is one piece. A piece that comes twice counts once.
#
# <details><summary>Hint: the pieces</summary>
#
# `tuple(words[i : i + 3])` is the piece at place i. With `range(max(1, len(words) - 2))` a short text gives one piece.
# </details>


# %% nbgrader={"grade_id": "shared-trigrams", "solution": true}
def shared_trigrams(a: str, b: str) -> float:
    """The share of word trigrams that two texts have in common, from 0 to 1."""
    ### BEGIN SOLUTION
    sets = []
    for text in (a, b):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-shared-trigrams", "grade": true, "points": 2}
checks.check_shared_trigrams(shared_trigrams)

# %% [markdown]
# A million rows make half a trillion comparisons. So `drop_near_duplicates` lets **MinHash**, a small fingerprint of each text,
# propose pairs ([Broder 1997](https://doi.org/10.1109/SEQUEN.1997.666900)), and then counts exactly.

# %%
study.show_near(mended)

# %% [markdown]
# `clean` runs seven such functions, and says why each row went. It also drops rows of the project's test sets.

# %%
tests = [*tickets("test"), *study.pairs("test")]
result = clean(mended, tests)
marked = study.show_clean_up(result, faults, mended)

# %% [markdown]
# Nothing missed, and no good row gone. Be suspicious: whoever planted these faults knew the rules, and real dirt is fainter. No rule
# finds a false answer in good English. For that, somebody must read.
#
# > **95% interval**: a range made by a method that contains the true value 19 times out of 20.
#
# A clean-up can also spoil good rows. Many begin with `" ".join(text.split())`. Some answers here are Python, and afterwards none of
# them is:

# %%
study.show_white_space(result.kept)

# %% [markdown]
# ### Keep the test out
#
# A test asks: can the model do what it was *not* shown? So rows that were made from the same thing belong on the same side. In
# `kitchen_preferences`, each **core** (one thing to know) gives three rows in other words.
#
# ### Exercise 5: a split that does not leak
# ●●● importance · ●●○ difficulty · 10 minutes
#
# Return `(train, test)`. Shuffle the *cores* with `random.Random(seed)`. Move whole cores to the test side until it holds at least
# `share` of the rows; then stop. The same seed must give the same split, in another Python process too.
#
# <details><summary>Hint: an order that you can rely on</summary>
#
# `Counter(row["core"] for row in rows)` counts each core's rows, in the order of the file. A `set` of texts has another order in each
# Python process.
# </details>


# %% nbgrader={"grade_id": "split-by-core", "solution": true}
def split_by_core(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, test): whole cores in test, drawn at random until it holds `share` of the rows."""
    ### BEGIN SOLUTION
    sizes = Counter(row["core"] for row in rows)
    cores = list(sizes)
    random.Random(seed).shuffle(cores)
    chosen, size = set(), 0
    while size < share * len(rows):
        core = cores.pop()
        chosen.add(core)
        size += sizes[core]
    train = [row for row in rows if row["core"] not in chosen]
    return train, [row for row in rows if row["core"] in chosen]
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-split", "grade": true, "points": 2}
checks.check_split(split_by_core)

# %%
split = study.show_splits(study.pairs("train"))

# %% [markdown]
# Split by rows, and every test row has its core in training. The search for near-copies notices none of them, since it compares words:
# "How hot for bread?" and "What oven for a loaf?" have one in common. So **write the group down when you make the row**.
#
# Pairs ([3.1.7](lab-3.1.7-dpo-training.ipynb)) and thumbs ([3.1.9](lab-3.1.9-kto-binary-feedback.ipynb)) need one more look. Where
# the better answer is mostly the longer one, a model learns to write long. How often is it, and would this count notice?

# %%
lengths = study.show_lengths()

# %% [markdown]
# ## Your code trains
#
# Your mask decides what the model learns, in the run that you saw: same start, same rows, 20 steps.

# %% tags=["trains"]
yours.trains(
    lambda: study.train_rows(rows.records, learn=study.marked_by(answer_mask))[1],
    lambda: history,
    what="mask",
    y="loss (nats per token)",
    caption="embedded model, LoRA r16, 20 steps of 4 rows of orders.csv, seed 0",
)

# %% [markdown]
# ### A bug hunt
#
# A colleague builds labels by hand. −100 means "do not learn this token". She hides the padding. What is wrong, and which check would
# have found it?

# %% tags=["bug-hunt"]
batch = collate_sft(rows.records[:4], tokenizer)
labels = batch["labels"].clone()
labels[batch["input_ids"] == tokenizer.pad_token_id] = -100
for name, those in (("collate_sft", batch["labels"]), ("hers", labels)):
    print(f"{name:<12}{(those != -100).sum()} tokens are learned")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Four labels are missing, one per row. This model pads with `<|im_end|>`, which also ends an answer, so she hid the end marks too. Her
# model never learns to stop. Know padding by its place (`attention_mask`), never by its id. The check of exercise 2 finds it:
# "the end mark is not marked".
# </details>

# %% [markdown] tags=["predict"]
# ## Is it true?
#
# ### A wrong template, in use
#
# The next cell trains on the same rows with another model's marks, `[INST] … [/INST] … </s>`. Then the model gets questions
# through its *own* template.
#
# **Predict, then run.** The training loss falls just as low. Of 24 new orders, how many answers are exactly right?
#
# - about as many as with the right template
# - fewer, because the tickets are worse
# - none, although about as many tickets are right

# %% tags=["knob", "experiment"]
END = "</s>"  # turn this: "\n", then "<|im_end|>". Which part of the marks did the harm?
learn = study.by_hand(lambda order: f"[INST] {order} [/INST] ", END)
runs = {
    "its own template": (model, history),
    f"[INST] marks, {END!r}": study.train_rows(rows.records, learn=learn),
}
used = study.show_in_use(runs, tickets("validation")[2:18])

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# None, although 5 of 16 answers begin with the right ticket (6 with the right template). To this tokenizer `</s>` is plain text, so
# the model never learned to stop. A line break as `END` is as bad. With `END = "<|im_end|>"` 14 of 16 answers stop and 6 are
# right: in this one seed, the marks around the *question* did no harm that we can see. Do not rely on that. Let the tokenizer
# write all marks.
# </details>

# %% [markdown] tags=["predict"]
# ### What a leak does
#
# One set has sixteen tickets. In a second set, eight of them are replaced by rows *of the test*. Both models are scored on those eight
# rows, and on forty that nobody has seen. In the **control** the same eight orders leak, each with another order's ticket. If the
# answers are learned by heart, the control must not look better. Five seeds are stored; you run the first five steps of one.
#
# > **Seed**: the number that fixes all that is random in a run. Several seeds show how much luck there is.
#
# **Predict, then run.** How does the model with the leak do on the forty untouched rows, against the clean one?
#
# - better: it has seen the kind of order that the test asks for
# - much worse
# - no difference that five seeds can show

# %% tags=["experiment"]
stored = load("leaked_test_rows")
sets, _ = lab_3_1_6.draw(seed=0)
_, cheated = lab_3_1_6.tune_drawn(sets["leaked"], seed=0, first=5)
print(agrees(cheated.losses, stored.figures(0)["leaked"]["losses"]))
leak = study.show_leak(stored)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# On the rows that leaked it gains some 58 points. On untouched rows the interval contains zero: we cannot tell. The control shows no
# gain. So a score on a leaked test is the score of a memory.
# </details>

# %% [markdown]
# ### Fifty rows of your own
#
# Name a file: CSV, a JSON array or JSONL, with Alpaca, ShareGPT, messages, or columns called `question` and `answer`. The cell checks,
# cleans, splits and trains. Without a file it takes fifty of the messy questions. **Read the report first.** (In a terminal,
# `spark-ft data FILE` checks and cleans, and writes what is left.)

# %% tags=["experiment"]
FILE = None  # yours: "/home/you/questions.csv"
own = own_rows(FILE or study.example_file("questions.json")).rendered(tokenizer).cleaned()
study.show_report(own)
mine = study.train_own(own, group=None)  # or a field that says which rows belong together: "core"

# %% [markdown]
# A lower held-out loss says that the answers sound like yours, not that they are true.
#
# ## On a DGX Spark
#
# - All of this but the training is work for the processor: twenty cores read, hash and render.
# - Memory grows with the longest row. Above `max_length`, `collate_sft` cuts the *start*; a plain tokenizer cuts the answer.
#
# ## Explain it back

# %% [markdown] nbgrader={"grade_id": "explain-leak", "solution": true, "grade": true, "points": 0}
# **A colleague's model went from 30% to 90% on the test, after "more data". What do you ask?**
#
# ### BEGIN SOLUTION
# Whether any of the new rows is in the test set, close to a row of it, or made from the same source. Then I ask for a score on
# rows that have never been near the training data. If the gain is gone there, the model learned those rows by heart.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-mask", "solution": true, "grade": true, "points": 0}
# **Why does the end mark of an answer belong to what is learned, and the head of the answer not?**
#
# ### BEGIN SOLUTION
# The model writes the end mark itself: that is how it stops. The template writes the head before the model begins, so the model
# never has to.
# ### END SOLUTION

# %% [markdown]
# The next step is a judgement instead of an answer: [lab 3.1.7](lab-3.1.7-dpo-training.ipynb) learns from "this one is better".

# %% tags=["experiment"]
headline(
    {
        "rows fit to train on, of 50": len(rows.records),
        "planted faults mended or found (%)": 100 * marked["found"],
        "false alarms (%)": 100 * marked["false alarms"],
        "split by rows: test rows leaked": split["by rows"],
        "longer is chosen, test pairs (%)": 100 * lengths["kitchen_preferences, test"].value,
        "exact, own template, of 16": used["its own template"]["exact"],
        "exact, other marks": used[f"[INST] marks, {END!r}"]["exact"],
        "leaked − clean, leaked rows (points)": leak["leaked rows"].value,
        "on untouched rows (points)": leak["untouched rows"].value,
        "own rows: held-out loss": mine["change"],
    }
)
