# %% [markdown]
# # 3.1.4 How does a whole fine-tune go, from rows to an adapter you can ship?
#
# **You will** turn 600 kitchen notes into trained tokens, watch a real language model learn a skill it does not have, measure
# it on notes it has never seen, save the result in a format that others read, and kill a run to see it come back.
#
# **Time**: about 45 minutes with the exercises; the notebook itself runs in under six minutes on two laptop cores.
# Everything below is computed while you watch, on a 135-million-parameter model that came with the set-up. The same cells train
# 8 billion parameters on a DGX Spark: see the last section.
#
# **The picture to keep in mind** (from [ELI5](../../ELI5.md)): a chef with ten years of French cooking takes a short course in Thai
# cooking. The knife skills stay. Here the chef is the model, the course is 80 small lessons, and the notes of the course fit
# on a few sticky notes: the adapter.

# %%
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from spark_ft import (
    AdapterConfig,
    adapters_disabled,
    add_adapters,
    collate_sft,
    field_f1,
    load_model,
    mean_interval,
    merge_adapters,
    profile,
    render,
    save_adapters,
    sft_loss,
)
from spark_ft.lab import headline, kitchen, plots
from spark_ft.lab.checks import lab_3_1_4 as checks
from spark_ft.lab.experiments import agrees, load
from spark_ft.lab.tokens import show_tokens

started = time.perf_counter()
here = profile()
print(f"profile {here.name}: {here.steps} steps of {here.batch_size} rows, peak learning rate {here.learning_rate:g}")

# %% [markdown]
# ## 1. Rows
#
# A waiter scribbles a note. The kitchen wants a ticket: JSON, always with the same keys in the same order. No base model knows
# *this* kitchen's format, and an answer is right or wrong without a judge. That makes it a good skill to teach and to measure.
#
# `read_records` checks each row as it reads: a missing field, an empty answer, a broken line are named with file and line.

# %%
rows, test = kitchen.tickets("train"), kitchen.tickets("test")
for row in rows[:3]:
    print(row["prompt"].split("\n", 1)[1], "\n   →", row["completion"])
print(f"\n{len(rows)} notes to learn from, {len(test)} held out.")

# %% [markdown]
# The held-out notes come in three kinds, reported apart. 100 use **seen phrasings**: ways of writing a note that training has, for
# orders it has not. 50 use **unseen phrasings**, ways of writing that training never shows. The last 50 are in unseen phrasings
# *and* name **unseen dishes**. The first kind says whether the skill was learned; the others, how far it carries.

# %%
seen = [row for row in test if row["phrasing"] == "seen"]
unseen = [row for row in test if row["phrasing"] == "unseen" and row["dishes"] == "seen"]
both = [row for row in test if row["dishes"] == "unseen"]
print(f"seen phrasing:            {seen[0]['prompt'].splitlines()[1]}")
print(f"unseen phrasing:          {unseen[0]['prompt'].splitlines()[1]}")
print(f"unseen phrasing and dish: {both[0]['prompt'].splitlines()[1]}")

# %% [markdown]
# ## 2. From text to tokens: the chat template
#
# A chat model was trained on conversations with marks between the turns. Those marks are part of the model: leave one out, and
# you train on a language it does not speak. So you never write them by hand; the tokenizer brings its own template.
# `render` asks it for two lists of token ids: what the model is given, and what it should answer.

# %%
model, tokenizer = load_model()
prompt_ids, completion_ids = render(rows[0], tokenizer)
print(tokenizer.decode(prompt_ids + completion_ids))
print(
    f"\n{len(prompt_ids)} prompt tokens, {len(completion_ids)} completion tokens; the last one is {tokenizer.decode(completion_ids[-1:])}"
)

# %% [markdown]
# ## 3. What is trained on: the label mask
#
# The loss asks, at every labelled place: how likely did you find this token? Places with the label −100 are not asked.
# You want the model to learn to *write tickets*, not to *write notes*, so the prompt gets −100. The stop token at the end must keep
# its label, or the model never learns to stop. That is easy to get wrong here, since this model pads with the very same token.
#
# ### Exercise 1 · the mask (3 minutes, ★☆☆)
# Return the labels of one row: −100 for each prompt token, the token itself for each completion token.
#
# <details><summary>Hint</summary>Lists add up: <code>[0] * 2 + [5]</code> is <code>[0, 0, 5]</code>. The ids themselves do not matter, only their places.</details>


# %% nbgrader={"grade_id": "label-mask", "solution": true}
def label_mask(prompt_ids: list[int], completion_ids: list[int]) -> list[int]:
    """The labels of prompt + completion: one for each token, −100 where the loss must not look."""
    ### BEGIN SOLUTION
    return [-100] * len(prompt_ids) + list(completion_ids)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-label-mask", "grade": true, "points": 2}
checks.check_label_mask(label_mask)

# %% [markdown]
# Here is the first row as the collator of `spark_ft` labels it. Marked and underlined tokens are trained on.

# %%
batch = collate_sft(rows[:8], tokenizer)
labels = batch["labels"][0]
real = batch["attention_mask"][0].bool()
show_tokens(tokenizer, batch["input_ids"][0][real].tolist(), (labels[real] != -100).tolist())

# %% [markdown]
# ## 4. The loss
#
# A row of logits at place $t$ holds the model's scores for the token at $t+1$. With $p$ their softmax, the loss is the mean of
# $-\log p(\text{token}_{t+1})$ over the labelled tokens. A loss of 0 is certainty. $\log(49152) \approx 10.8$ is a blind guess
# among this model's 49,152 tokens.
#
# ### Exercise 2 · the shifted loss (5 minutes, ★★☆)
# `logits` has shape (seq, vocab), `labels` (seq,), with −100 where nothing is asked. Return the mean loss as a tensor.
#
# <details><summary>Hint</summary>Row t predicts label t + 1: drop the last row of logits and the first label. <code>torch.nn.functional.cross_entropy</code> leaves out −100 by itself.</details>


# %% nbgrader={"grade_id": "completion-loss", "solution": true}
def completion_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of −log p over the labelled tokens; row t of the logits predicts token t + 1."""
    ### BEGIN SOLUTION
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:])
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-completion-loss", "grade": true, "points": 2}
checks.check_completion_loss(completion_loss)

# %% [markdown]
# `spark_ft` computes the same number without ever making the whole table of logits. Only places that predict a completion
# token meet the vocabulary matrix, a chunk of them at a time (`methods/logprobs.py`). Compare it with what transformers computes
# the long way, from the same weights:

# %%
with torch.no_grad():
    total, count = sft_loss(model, batch)
    theirs = model(**batch).loss
print(f"spark_ft {total / count:.6f} over {count} tokens; transformers {theirs:.6f}")
assert torch.allclose(total / count, theirs, rtol=1e-5)
shown = int(batch["attention_mask"].sum())
print(f"{count} of {shown} tokens are trained on, so {shown - count} rows never meet the {model.config.vocab_size:,}-row head")

# %% [markdown]
# And yours? On the same model and two real rows, against both:

# %% nbgrader={"grade_id": "check-loss-parity", "grade": true, "points": 1}
checks.check_loss_parity(completion_loss, model, batch)

# %% [markdown]
# ### Exercise 3 · a big batch in small parts (5 minutes, ★★☆)
# Memory is short, so a step's batch is often computed in parts, its gradients added up: *gradient accumulation*. Each part gives a sum of losses
# and a number of tokens. Return the loss that the whole batch would have. (Trainers got this wrong for years: where
# the parts have different lengths, it is not the mean of the parts' means.)
#
# <details><summary>Hint</summary>Every token counts the same. Add first, divide once.</details>


# %% nbgrader={"grade_id": "accumulated-loss", "solution": true}
def accumulated_loss(parts: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """The whole batch's mean loss, from each part's (sum of losses, number of tokens)."""
    ### BEGIN SOLUTION
    return sum(total for total, _ in parts) / sum(count for _, count in parts)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-accumulated-loss", "grade": true, "points": 2}
checks.check_accumulated_loss(accumulated_loss)

# %% [markdown]
# ### Exercise 4 · the learning rate (5 minutes, ★★☆)
# AdamW's first steps rest on almost no history, so the rate rises in a straight line over `warmup` steps, reaches `peak` at the last of them,
# and then falls to 0 along half a cosine: $\text{peak} \cdot \frac{1 + \cos(\pi \cdot \text{progress})}{2}$, with progress $=
# \frac{\text{step} - \text{warmup}}{\text{steps} - \text{warmup}}$. Steps count from 0, and the first one must not be wasted on a rate of 0.
#
# <details><summary>Hint</summary>While <code>step &lt; warmup</code>: <code>peak * (step + 1) / warmup</code>.</details>


# %% nbgrader={"grade_id": "learning-rate", "solution": true}
def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The rate of step 0 … steps − 1: a straight rise to `peak`, then half a cosine towards 0."""
    ### BEGIN SOLUTION
    import math

    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-learning-rate", "grade": true, "points": 2}
checks.check_learning_rate(learning_rate)

# %% [markdown]
# ## 5. Before
#
# Does the model know the format already? Ask it, on held-out notes, greedily (always its likeliest token). An answer counts when it
# is the same ticket, value for value. The interval is Wilson's, 95%: 0 right of 100 does not prove "never".

# %%
before, answers_before = kitchen.score(model, tokenizer, seen)
print(f"exact before: {before.percent()}")
print("note:  ", seen[0]["prompt"].splitlines()[1])
print("answer:", answers_before[0][:300])

# %% [markdown]
# ## 6. The adapter
#
# LoRA on every linear layer but the head ([lab 3.1.1](lab-3.1.1-lora-theory.ipynb) builds it by hand). `add_adapters` freezes all
# else. B starts at zero, so right now the adapted model *is* the base model; the cell asserts it.

# %%
with torch.no_grad():
    plain = model(batch["input_ids"]).logits
torch.manual_seed(0)
add_adapters(model, kitchen.ADAPTER)
with torch.no_grad():
    assert torch.equal(model(batch["input_ids"]).logits, plain)
trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
everything = sum(p.numel() for p in model.parameters())
print(f"{trainable:,} of {everything:,} parameters train: {trainable / everything:.1%}")
print(
    f"the update is scaled by α/r = {kitchen.ADAPTER.alpha:g}/{kitchen.ADAPTER.rank} = {kitchen.ADAPTER.alpha / kitchen.ADAPTER.rank:g}"
)

# %% [markdown]
# ## 7. Train
#
# One call. Watch the loss: it falls fast, then slowly. (How far the *form* alone would take it, braces and keys, the control in section 9 shows.)

# %% tags=["experiment"]
history = kitchen.fine_tune(model, tokenizer, rows)

# %% [markdown]
# How hard did the machine work? Count the arithmetic of a step (each weight multiplies and adds once per token on the way
# forward, and once more to carry the gradient back; frozen weights need no gradient of their own), divide by the seconds, and hold it
# against the rate that plain matrix products reach on this machine right now.

# %% tags=["experiment"]
from spark_ft.bench.harness import GemmRate, step_flops, step_gemms

seconds = history.seconds_per_step
batches = kitchen.ticket_batches(rows, tokenizer)
flops = sum(step_flops(model, batches(step)) for step in range(here.steps)) / here.steps
plain_products = GemmRate(step_gemms(model, batch))
plain_products.sample()
machine = plain_products.gflops * 1e9
print(f"{seconds:.2f} s a step, {sum(history.tokens) / sum(history.seconds):.0f} tokens/s")
print(
    f"{flops / seconds / 1e9:.0f} GFLOP/s, {flops / seconds / machine:.0%} of the {machine / 1e9:.0f} GFLOP/s of plain matrix products"
)

# %% [markdown]
# Is this run typical? `make experiments` trained the same thing with three seeds and stored what came out.
# Your first losses must be those of its seed 0: same rows, same order, same start.

# %% tags=["experiment"]
stored = load("kitchen_finetune")
print(agrees(history.losses[:5], stored.figures(0)["first_losses"], rel=1e-3))

fig, ax = plots.figure(
    f"The loss falls {history.losses[0] / min(history.losses):.0f}-fold, most of it in the first ten steps",
    x="optimizer step (8 notes each)",
    y="loss: mean −log p of a ticket's tokens",
    caption=f"kitchen tickets, embedded model, LoRA r16 on all linear layers, seed 0, this run; lowest loss {min(history.losses):.3f}",
)
ax.plot(history.steps, history.losses, **{**plots.LINE["package"], "marker": ""})
ax.set_yscale("log")
plots.show(
    fig,
    alt=f"Training loss on a log scale falls from {history.losses[0]:.2f} at step 1 to {history.losses[-1]:.3f} at step {len(history.losses)}.",
)

# %% [markdown]
# ## 8. After
#
# All 200 held-out notes, kind by kind.

# %% tags=["experiment"]
after_seen, answers_seen = kitchen.score(model, tokenizer, seen)
after_unseen, answers_unseen = kitchen.score(model, tokenizer, unseen)
after_both, answers_both = kitchen.score(model, tokenizer, both)
print(f"exact, seen phrasings:              {after_seen.percent()}   (before: {before.percent()})")
print(f"exact, unseen phrasings:            {after_unseen.percent()}")
print(f"exact, unseen phrasings and dishes: {after_both.percent()}")
print("field F1 on all of them:")
answers, wanted = answers_seen + answers_unseen + answers_both, [row["completion"] for row in seen + unseen + both]
for name, value in field_f1(answers, wanted).items():
    print(f"   {name:<12}{value:.3f}")

# %% [markdown]
# Read some: of each kind the first misses, then one more note. What is wrong with a miss, and could a cook still work from it?

# %% tags=["experiment"]
for kind, notes, answers in (("seen phrasing", seen, answers_seen), ("unseen phrasing", unseen, answers_unseen)):
    missed = [i for i, row in enumerate(notes) if answers[i] != row["completion"]]
    for i in [*missed[:2], 0]:
        print(f"[{kind}] {notes[i]['prompt'].splitlines()[1]}")
        print(f"   wanted {notes[i]['completion']}\n   got    {answers[i]}\n")

# %% [markdown]
# ## 9. The control: shuffled answers
#
# Did the model learn *the task*, or does any training on JSON look this good? Give each note another note's ticket: the same notes, the same
# tickets, and as many steps. The loss falls here too, for the form can be learned. But no answer can be
# right except by luck. If this run scored well, the measure would be broken. Its three seeds are stored, beside three of the true run. (There
# a ticket counts when each of its tokens is the likeliest after the right ones before it, which is when greedy generation writes it.)

# %% tags=["experiment"]
kinds = ("seen", "unseen phrasings", "unseen phrasings and dishes", "shuffled")
across_seeds = {kind: mean_interval(stored.values(kind)) for kind in kinds}
control = across_seeds["shuffled"]
print(f"stored, {len(stored['runs'])} seeds: mean of exact match on held-out notes, with its 95% t interval")
for kind, estimate in across_seeds.items():
    answers = "shuffled answers, seen phrasings" if kind == "shuffled" else f"true answers, {kind}"
    print(f"   {answers:<42}{estimate.percent()}")
losses = {kind: mean_interval(stored.values(key)) for kind, key in (("true", "last_loss"), ("shuffled", "shuffled_last_loss"))}
print(f"mean training loss of the last five steps: true {losses['true']}, shuffled {losses['shuffled']}")

fig, ax = plots.figure(
    "The skill is learned, and only from true answers",
    x="",
    y="held-out exact match (%)",
    caption=f"bars: this run (seed 0), Wilson 95% interval; control: mean with t interval; {stored.origin()}",
)
bars = [
    ("before", before, "reference"),
    ("after, seen\nphrasings", after_seen, "package"),
    ("after, unseen\nphrasings", after_unseen, "other"),
    ("after, unseen phr.\nand dishes", after_both, "yours"),
    ("control: shuffled\nanswers (stored)", control, "control"),
]
for name, estimate, role in bars:
    low, high = max(0.0, estimate.low), min(1.0, estimate.high)
    error = [[100 * max(0.0, estimate.value - low)], [100 * max(0.0, high - estimate.value)]]
    ax.bar(name, 100 * estimate.value, yerr=error, capsize=4, **plots.BAR[role])
ax.set_xlabel("training")
ax.set_ylim(0, 105)
plots.show(
    fig,
    alt="Bars of exact match: " + "; ".join(f"{name.replace(chr(10), ' ')} {estimate.percent()}" for name, estimate, _ in bars),
)
assert control.value < 0.05, "shuffled answers must teach nothing; if they do, the measure is broken"

# %% [markdown]
# ## 10. Ship it
#
# An adapter is two files: the numbers, and a small JSON that says how to use them. The format is PEFT's, so anything that reads PEFT
# reads yours. Prove it: PEFT itself loads the folder onto a fresh base model and must give the same logits.

# %%
folder = save_adapters(model, Path(tempfile.mkdtemp()) / "kitchen-adapter")
for path in sorted(folder.iterdir()):
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")

from peft import PeftModel

theirs = PeftModel.from_pretrained(load_model()[0], str(folder), is_trainable=True).eval()
real = batch["attention_mask"].bool()
with torch.no_grad():
    ours = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
    other = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
difference = ((ours - other).norm() / other.norm()).item()
print(f"logits, spark_ft against PEFT: relative difference {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# The same for what training needs: the gradient of every adapter weight, ours from `sft_loss`, theirs from PEFT's model and transformers'
# own loss. On notes that it has learned a model's gradient is nearly zero, and you would compare rounding with rounding. So take
# eight notes with *wrong* answers.


# %%
def gradients(model) -> torch.Tensor:
    """All adapter gradients, in the order of their names, as one long vector; taken off the model."""
    taken = sorted((name.replace("base_model.model.", "").replace(".default", ""), p) for name, p in model.named_parameters())
    vector = torch.cat([p.grad.flatten() for name, p in taken if "lora_" in name])
    model.zero_grad()
    return vector


wrong = collate_sft(kitchen.with_shuffled_answers(rows[:8]), tokenizer)
total, count = sft_loss(model, wrong)
(total / count).backward()
theirs(**wrong).loss.backward()
ours_gradient, their_gradient = gradients(model), gradients(theirs)
gradient_difference = ((ours_gradient - their_gradient).norm() / their_gradient.norm()).item()
print(f"gradient of {len(ours_gradient):,} adapter weights: relative difference {gradient_difference:.1e}")
assert gradient_difference < 1e-4
del theirs

# %% [markdown]
# **Switch it off**, and the base model is back, bit for bit. That is how a preference method gets its reference model for free (lab 3.1.7).
# **Merge it**, and the adapter is gone: plain weights, no extra work, the same answers up to rounding.

# %%
with torch.no_grad(), adapters_disabled(model):
    assert torch.equal(model(batch["input_ids"]).logits, plain)
merge_adapters(model)
with torch.no_grad():
    merged = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
merge_difference = ((merged - ours).norm() / ours.norm()).item()
print(
    f"merged against adapted: {merge_difference:.1e}; layers are {type(model.model.layers[0].self_attn.q_proj).__name__} again"
)
assert merge_difference < 1e-5

# %% [markdown]
# ## 11. Kill it
#
# Long runs get killed: power, a full disk, a colleague. `train` writes a checkpoint (one file, put in place by one rename) and goes on from it.
# The cell below starts a short run in another process, kills it without warning (`SIGKILL`) as soon as a checkpoint appears, starts the
# same call again, and compares with a run that nobody disturbed. Not "about the same": the same bits.

# %%
calm, killed = (Path(tempfile.mkdtemp()) for _ in range(2))
process = subprocess.Popen([sys.executable, "-c", f"from spark_ft.lab import kitchen; kitchen.short_run({str(killed)!r})"])
while not list(killed.glob("step-*.safetensors")) and process.poll() is None:
    time.sleep(0.02)
process.kill()
print(
    "killed" if process.wait() < 0 else "it ended before the kill",
    "- left behind:",
    ", ".join(sorted(p.name for p in killed.glob("step-*"))),
)
resumed, undisturbed = kitchen.short_run(killed), kitchen.short_run(calm)
same = sum(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
print(f"{same} of {len(undisturbed)} tensors are equal, bit for bit")
assert same == len(undisturbed)

# %% [markdown]
# ## Options are one-line changes
#
# | you want | you change | what it does |
# |---|---|---|
# | a larger rank that still learns | `AdapterConfig(rank=64, rslora=True)` | scales by α/√r in place of α/r |
# | fewer trained numbers | `AdapterConfig(targets=("q_proj", "v_proj"))` | the original paper's choice; learns less per step |
# | to guard against overfitting | `AdapterConfig(dropout=0.05)` | drops inputs of the adapter, never of the base |
# | volume and direction apart | `AdapterConfig(method="dora")` | one magnitude a row beside LoRA's two strips ([lab 3.1.2](lab-3.1.2-dora-comparison.ipynb)) |
# | noise on the embeddings | `with neftune(model, 5): train(...)` | off again after the block ([lab 3.1.3](lab-3.1.3-neftune-magic.ipynb)) |
# | half the activations | `TrainConfig(..., gradient_accumulation_steps=2)` | the same step, in two parts |
# | another learning rate | `TrainConfig(..., learning_rate=2e-4)` | ten times less: right for 8B, slow for 135M |
#
# What each costs in parameters is computed here:

# %%
for config in (
    AdapterConfig(rank=16),
    AdapterConfig(rank=64, rslora=True),
    AdapterConfig(method="dora", rank=16),
    AdapterConfig(rank=16, targets=("q_proj", "v_proj")),
):
    fresh = add_adapters(load_model()[0], config)
    count = sum(p.numel() for p in fresh.parameters() if p.requires_grad)
    scaling = next(m.scaling for m in fresh.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A"))
    targets = config.targets if isinstance(config.targets, str) else ", ".join(config.targets)
    print(f"{config.method:<5} r={config.rank:<3} {targets:<16} {count:>11,} parameters, scaled by {scaling:g}")
del fresh

# %% [markdown]
# ## What you should see
#
# - Before training, no ticket is right. After 80 steps of 8 notes, nine in ten or more are, on notes that training never saw.
# - Unseen phrasings score far lower than seen ones, unseen dishes lower still. 600 rows teach *these* ways to write a note; more ways of writing would carry further than more rows of the same.
# - Shuffled answers: the loss falls, and nothing is learned that is worth having. **A falling loss is not a result.** Held-out answers are.
# - PEFT reads your adapter, and gives the same logits.
#
# ## On your DGX Spark
#
# Nothing in this notebook changes but one table row. With `SPARK_FT_PROFILE=spark` (found by itself on a GB10) the same cells load:

# %%
from spark_ft.models import PROFILES

for p in PROFILES.values():
    print(
        f"{p.name:<7} model {p.model or 'embedded 135M':<22} {p.dtype!s:<15} {p.steps} steps of {p.batch_size} rows "
        f"in {p.gradient_accumulation_steps} part(s), up to {p.max_length} tokens, peak rate {p.learning_rate:g}"
    )

# %% [markdown]
# Does 8B fit? Count before you load. `plan_training` builds the model's true shape without its memory and adds up what a step
# holds at its worst moment: weights, adapters, gradients, AdamW's moments, what backward needs. Rows of 2,048 tokens, one at a time,
# checkpointing; the last column says whether it would fit this machine now, and a DGX Spark with nothing else on it.

# %%
from spark_ft.memory import plan_training
from spark_ft.memory.machine import DGX_SPARK, budget
from spark_ft.memory.shapes import known_config

eight = known_config("Qwen3-8B")
plans = {method: plan_training(eight, method, length=2048) for method in ("full", "lora", "qlora")}
print(f"{'GB':<14}" + "".join(f"{name:>18}" for name in ("weights", "trained: all of it", "the rest", "at the peak")) + "   fits here, a Spark")
for method, plan in plans.items():
    weights = sum(plan.terms[name] for name in ("linear layers", "embeddings and head", "norms"))
    trained = sum(plan.terms.get(name, 0) for name in ("adapters", "gradients", "optimizer moments"))
    fits = [room.available is not None and plan.peak <= room.available for room in (budget(), DGX_SPARK)]
    sizes = (weights, trained, plan.peak - weights - trained, plan.peak)
    print(f"8B, {method:<10}" + "".join(f"{size / 1e9:>18.1f}" for size in sizes) + f"   {' and '.join('yes' if fit else 'no' for fit in fits)}")

# %% [markdown]
# How long a step takes there is not written here, because we have not measured it there. Where each number comes from, and how
# near such a plan is to a measurement, is the subject of [lab 3.1.5](lab-3.1.5-70b-qlora-finetuning.ipynb).
#
# ## Common mistakes
#
# - **Writing the chat template by hand.** One missing mark, and training and use speak two dialects.
# - **Masking labels by the pad id.** Where pad and stop are the same token, the model never learns to stop.
# - **Averaging the means of micro-batches.** Short answers then count more than long ones.
# - **Trusting the training loss.** The control's loss fell as well.
# - **Testing on notes that resemble training notes.** Then you measure memory. Keep phrasings and dishes apart, and say which is which.
# - **A learning rate from another size.** 2e-3 suits this 135M model with LoRA; 8B wants about a tenth.
#
# ## Explain it back
#
# 1. Why does the prompt get the label −100, and why must the stop token not?
# 2. The control's loss falls, yet it gets no ticket right. What did it learn?
# 3. Why is an adapter file so much smaller than the model, and what must the receiver have to use it?
# 4. You train in four parts instead of one. What must stay the same for the result to be equal?

# %% tags=["experiment"]
headline(
    {
        "exact match, seen phrasings %": 100 * after_seen.value,
        "unseen phrasings %": 100 * after_unseen.value,
        "unseen dishes too %": 100 * after_both.value,
        "before %": 100 * before.value,
        "shuffled control %": 100 * control.value,
        "s/step": seconds,
        "GFLOP/s": flops / seconds / 1e9,
        "of GEMM rate %": 100 * flops / seconds / machine,
        "minutes": (time.perf_counter() - started) / 60,
    }
)
