# %% [markdown]
# # 3.1.4 How does a whole fine-tune go, from rows to an adapter you can ship?
#
# **Time**: about 60 minutes.
#
# ## What you will make
#
# **The training loop**, with the mask, the loss and the learning rate that it needs. It trains a language model that writes kitchen
# tickets, and it gives the same losses as the package's. Then you measure the model on orders that it has never seen, save its
# adapter in a format that others read, and kill a run to see it come back.
#
# ## What you should know first
#
# - What an adapter is ([3.1.1](lab-3.1.1-lora-theory.ipynb)): thin notes beside frozen weights.
# - In PyTorch, `loss.backward()` writes each parameter's gradient into `.grad`, and an optimizer's `step()` uses it.
#
# > **Token**: a piece of text, a word or less. The model reads and writes tokens, each as a number, its id.
# > **Logits**: the model's scores for every token that could come next. A softmax makes probabilities of them.
#
# ## The picture
#
# A chef with ten years of French cooking takes a short course in Thai cooking. The knife skills stay. The chef is the model, the
# course is 80 short lessons, and what was learned fits on a few sticky notes.
#
# A course needs more than a chef: a pile of exercises (rows), a common language (the chat template), someone who says which part of
# an answer counts (the mask) and how far off it was (the loss), a pace (the learning rate), and an exam with dishes that no lesson
# had.

# %%
import json
import math

import torch
from torch.nn import functional as F

from spark_ft import load_model, profile, render, sft_batches, sft_loss
from spark_ft.adapters import AdapterConfig, add_adapters, save_adapters
from spark_ft.lab import headline, kitchen, parity, yours
from spark_ft.lab.checks import lab_3_1_4 as checks
from spark_ft.lab.experiments import agrees, load
from spark_ft.lab.study import lab_3_1_4 as study
from spark_ft.training import TrainConfig, train

# %% [markdown]
# ## It works
#
# A waiter writes an order, and the kitchen wants a ticket in JSON. The whole way in eight lines: rows, model, notes, batches, a
# run of 20 short steps, and three orders that training never had.

# %%
rows, test = kitchen.tickets("train"), kitchen.tickets("test")
model, tokenizer = load_model()
torch.manual_seed(0)
add_adapters(model, AdapterConfig(rank=16))
batches = sft_batches(rows, tokenizer, batch_size=4)
rate = profile().learning_rate
history = train(model, batches, sft_loss, TrainConfig(20, rate, warmup_steps=2, betas=(0.9, 0.99)))
study.show_tickets(model, tokenizer, test[:3])

# %% [markdown]
# Twenty steps teach the *form*. Read the values: are table, dish and number right? The long run comes later. First you build what
# happened in that call to `train`.
#
# ## Build it
#
# ### From rows to tokens
#
# A chat model was trained on conversations with marks between the turns. If you leave a mark out, you train on a language that the
# model does not speak. So nobody writes the marks by hand: the tokenizer brings a template, and `render` applies it. It returns
# two lists of ids, the *prompt* that is given and the *completion* that the model should write.

# %%
prompt_ids, completion_ids = render(rows[0], tokenizer)
print(tokenizer.decode(prompt_ids + completion_ids))

# %% [markdown]
# ### Exercise 1: the mask
# ●●● importance · ●○○ difficulty · 5 minutes
#
# You want a model that writes tickets, not one that writes orders. So every token gets a **label**: its own id where the loss should
# look, and −100 where it should not. Return the labels of prompt + completion, in a list. The prompt gets −100, and so does nothing
# else: the last token of the completion says *stop*, and a model that never learns it talks on for ever.
#
# <details><summary>Hint</summary>
#
# `[0] * 2 + [5]` is `[0, 0, 5]`. Go by position, not by value: the stop token occurs in the prompt as well.
# </details>


# %% nbgrader={"grade_id": "label-mask", "solution": true}
def label_mask(prompt_ids: list[int], completion_ids: list[int]) -> list[int]:
    """One label per token of prompt + completion: −100 where the loss does not look."""
    ### BEGIN SOLUTION
    hidden = [-100] * len(prompt_ids)
    return hidden + list(completion_ids)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-label-mask", "grade": true, "points": 2}
checks.check_label_mask(label_mask)

# %%
batch = batches(0)
study.show_labels(tokenizer, batch)

# %% [markdown]
# Only the marked tokens train the model.
#
# ### Exercise 2: the loss
# ●●● importance · ●●○ difficulty · 8 minutes
#
# Row $t$ of the logits holds the scores for the token at $t+1$. With $p$ their softmax, the loss is the mean of
# $-\log p(\text{token}_{t+1})$ over the labelled tokens. Certainty is 0. A blind guess among this model's 49,152 tokens is
# $\log 49152 \approx 10.8$.
#
# `logits` is (seq, vocab), `labels` is (seq,), with −100 where the loss does not look. Return the mean, a tensor with a gradient.
#
# <details><summary>Hint</summary>
#
# The last row of logits predicts nothing that is there, and nothing predicts the first label. Drop both. `F.cross_entropy` leaves out
# −100 by itself.
# </details>


# %% nbgrader={"grade_id": "completion-loss", "solution": true}
def completion_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of −log p over the labelled tokens; row t of the logits predicts token t + 1."""
    ### BEGIN SOLUTION
    scores = logits[:-1]
    targets = labels[1:]
    return F.cross_entropy(scores, targets)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-completion-loss", "grade": true, "points": 2}
checks.check_completion_loss(completion_loss)

# %% nbgrader={"grade_id": "check-loss-parity", "grade": true, "points": 1}
checks.check_loss_parity(completion_loss, model, batch)

# %% [markdown]
# ### Exercise 3: a large batch in small parts
# ●●○ importance · ●●○ difficulty · 5 minutes
#
# Where memory is short, a batch goes through in parts, and the gradients add up: **gradient accumulation**. Each part gives the *sum* of
# its losses and how many tokens that was. Return the mean loss of the whole batch. It is not the mean of the parts' means: then
# tokens of short answers would count more than tokens of long ones. Trainers got this wrong for years.
#
# <details><summary>Hint</summary>
#
# Every token counts the same. Add up first, divide once.
# </details>


# %% nbgrader={"grade_id": "accumulated-loss", "solution": true}
def accumulated_loss(parts: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """The whole batch's mean loss, from each part's (sum of losses, number of tokens)."""
    ### BEGIN SOLUTION
    losses = sum(total for total, tokens in parts)
    count = sum(tokens for total, tokens in parts)
    return losses / count
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-accumulated-loss", "grade": true, "points": 2}
checks.check_accumulated_loss(accumulated_loss)

# %% [markdown]
# ### Exercise 4: the learning rate
# ●●○ importance · ●●○ difficulty · 6 minutes
#
# AdamW's first steps rest on almost no history, so they should be short. In the first `warmup` steps the rate rises in a straight
# line and reaches `peak` at the last of them. Then it falls along half a cosine:
#
# $$\text{peak} \cdot \frac{1 + \cos(\pi \cdot \text{progress})}{2}, \qquad
# \text{progress} = \frac{\text{step} - \text{warmup}}{\text{steps} - \text{warmup}}$$
#
# Steps count from 0. A rate of 0 in the first step would waste it.
#
# <details><summary>Hint</summary>
#
# While `step < warmup` the rate is `peak * (step + 1) / warmup`.
# </details>


# %% nbgrader={"grade_id": "learning-rate", "solution": true}
def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The rate of step 0 … steps − 1: a straight rise to `peak`, then half a cosine towards 0."""
    ### BEGIN SOLUTION
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-learning-rate", "grade": true, "points": 2}
checks.check_learning_rate(learning_rate)

# %% [markdown]
# ### Exercise 5: the training loop
# ●●● importance · ●●● difficulty · 15 minutes
#
# Everything meets here. Train what requires gradients with **one** AdamW, betas (0.9, 0.99) and no weight decay. In each of `steps` steps:
#
# 1. Set the optimizer's learning rate to `rate(step)`.
# 2. Compute `loss(model, batches(step))`, the mean loss, and its gradients.
# 3. **Clip**: where the norm of all gradients together is above 1, scale them down to 1. One odd batch then cannot throw the model far.
# 4. Let the optimizer take its step.
# 5. Clear the gradients. PyTorch *adds* new ones to what is there.
#
# Return the loss of each step, as a list of floats.
#
# <details><summary>Hint: the rate</summary>
#
# `for group in optimizer.param_groups: group["lr"] = …`
# </details>
# <details><summary>Hint: the rest</summary>
#
# `[p for p in model.parameters() if p.requires_grad]`; `torch.optim.AdamW(…, betas=…, weight_decay=0.0)`;
# `torch.nn.utils.clip_grad_norm_(…, 1.0)`; `optimizer.zero_grad()`; `.item()` makes a float of a loss, and lets go of its graph.
# </details>


# %% nbgrader={"grade_id": "fine-tune", "solution": true}
def fine_tune(model, batches, loss, steps: int, rate) -> list[float]:
    """Train what requires gradients; the loss of each step, before that step."""
    ### BEGIN SOLUTION
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        mean = loss(model, batches(step))
        mean.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    return losses
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-fine-tune", "grade": true, "points": 4}
checks.check_fine_tune(fine_tune)

# %% [markdown]
# ### Exercise 6: is it the same ticket?
# ●●○ importance · ●○○ difficulty · 5 minutes
#
# A falling loss is no result. A ticket that a cook can use is. Return `True` if `answer` is JSON with the same content as `wanted`.
# Spaces and the order of keys do not matter. Everything else does: an item too many, a word around the JSON, half a ticket.
#
# <details><summary>Hint</summary>
#
# `json.loads` raises `ValueError` where the text is not JSON, and not only JSON. Python compares dicts without regard to their order.
# </details>


# %% nbgrader={"grade_id": "same-ticket", "solution": true}
def same_ticket(answer: str, wanted: str) -> bool:
    """Whether the answer is JSON with the same content."""
    ### BEGIN SOLUTION
    try:
        given = json.loads(answer)
    except ValueError:
        return False
    return given == json.loads(wanted)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-same-ticket", "grade": true, "points": 2}
checks.check_same_ticket(same_ticket)

# %% [markdown]
# ## Your code trains
#
# Your mask, loss, rate and loop, all together, in the run that you saw first: the same model, notes, orders and 20 steps. Your loss takes each
# row alone and exercise 3 puts the rows together.

# %% tags=["trains"]
pieces = label_mask, completion_loss, accumulated_loss, learning_rate
yours.trains(
    lambda: study.train_yours(fine_tune, *pieces, batches),
    lambda: history,
    what="loop",
    y="loss (nats per token)",
    caption="embedded model, rank 16, 20 steps of 4 kitchen tickets, seed 0",
)

# %% [markdown]
# From here on the lab uses the package's loop. It refuses a step that would not fit in memory, and it can go on after a kill.
#
# ### A bug hunt
#
# A colleague takes the model that you trained first and asks for a ticket. This order is answered well in the table at the top. What is
# wrong here, and which check would have found it?

# %% tags=["bug-hunt"]
ids = tokenizer(test[2]["prompt"], return_tensors="pt")["input_ids"].to(model.device)
written = model.generate(ids, max_new_tokens=32, do_sample=False)
print(repr(tokenizer.decode(written[0, ids.shape[1] :])))

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The order went in bare. Nothing says that a user has spoken and that the assistant is to write now. The model was trained behind those
# marks and knows nothing else. `render`, or `apply_chat_template(…, add_generation_prompt=True)`, writes them. To find it, decode the ids
# that go in and hold them against a row of training.
# </details>

# %% [markdown]
# One setting matters more than others. The next cell runs the first ten of your 20 steps with another peak rate.

# %% tags=["knob", "experiment"]
PEAK = 2e-2  # turn this: 2e-4, 1e-3, 4e-3. Which is too slow, and which tears the model apart?
study.show_rate(PEAK, batches, history)

# %% [markdown]
# ## Is it true?
#
# Now the whole course: 80 steps of eight orders, some minutes. Three seeds of this run were measured before and stored, and your
# first losses must be those of seed 0.
#
# > **Seed**: the number that fixes all that is random in a run. Several seeds show how much luck there is.

# %% tags=["experiment"]
model, tokenizer = load_model()
torch.manual_seed(0)
add_adapters(model, kitchen.ADAPTER)
history = kitchen.fine_tune(model, tokenizer, rows)
stored = load("kitchen_finetune")
print(agrees(history.losses[:5], stored.figures(0)["first_losses"], rel=1e-3))
study.show_losses(history)

# %% [markdown] tags=["predict"]
# The exam has three kinds of orders. 100 are written in ways that training had (*seen phrasings*). 50 are written in other ways. 50 are
# written in other ways and name dishes that training never had.
#
# **Predict, then run.** How does the model do on the second and third kind?
#
# - as on the first: it has understood what an order is
# - clearly worse, and worst on the third
# - at zero: it has learned texts by heart
#
# And the **control**? There each order got another order's ticket, and the model trained for as many steps. Only luck can be right.

# %% tags=["experiment"]
scores = study.show_scores(model, tokenizer, test, stored)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Clearly worse, and worst on the third. 600 rows teach *these* ways of writing an order. The control's loss fell as well, since the form of
# a ticket can be learned from wrong tickets too. But it gets none right.
# </details>

# %% [markdown]
# > **95% interval**: a range made by a method that contains the true value 19 times out of 20. 0 right of 100 does not prove "never".
#
# Read what it writes, and judge with your own `same_ticket`. Could a cook work from the wrong ones?

# %% tags=["experiment"]
study.show_answers(model, tokenizer, test, same_ticket)

# %% [markdown]
# ### Ship it
#
# An adapter is two files: the numbers, and a JSON file that says how to use them. The format is
# [PEFT](https://github.com/huggingface/peft)'s. Prove it: PEFT loads the folder onto a fresh base model. Logits and gradients must be the
# same, on eight *wrong* tickets, because on right ones the gradients are nearly zero by now.

# %%
folder = save_adapters(model, study.workplace() / "kitchen-adapter")
for path in sorted(folder.iterdir()):
    print(f"{path.name}: {path.stat().st_size / 1e3:,.1f} kB")
wrong = sft_batches(kitchen.with_shuffled_answers(rows), tokenizer, batch_size=8)(0)
apart = parity.adapter_against_peft(folder, model, wrong)
print("spark_ft and PEFT: " + ", ".join(f"{name} {value:.0e}" for name, value in apart.items()))
assert max(apart.values()) < 1e-4

# %% [markdown] tags=["predict"]
# `merge_adapters` prints the notes into the book: afterwards there are plain weights, and one product per layer.
#
# **Predict, then run.** How do the merged model's logits compare?
#
# - equal, bit for bit
# - equal up to rounding
# - a few percent off

# %%
merged_apart = study.show_merged(model, wrong)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Equal up to rounding. $(W + sBA)x$ and $Wx + sB(Ax)$ are the same number on paper. In fp32 they round in other places.
# </details>

# %% [markdown]
# ### Kill it
#
# Long runs get killed: power, a full disk, a colleague. `train` writes a checkpoint and goes on from it. The next cell starts a short run in
# another process, kills it without warning when the first checkpoint is there, starts it again, and compares with a run that
# nobody disturbed.

# %%
same, tensors = study.kill_and_resume()
assert same == tensors

# %% [markdown]
# Not "about the same": the same bits.
#
# ## On a DGX Spark
#
# Nothing changes but a row of a table. With `SPARK_FT_PROFILE=spark`, which a Spark finds by itself, `load_model()` takes 8 billion weights.
# Does that fit? Count before you load: the plan runs the real step on tensors that have a shape and no memory.

# %%
study.show_profiles()
study.show_plans("Qwen3-8B")

# %% [markdown]
# We have not measured a step there. [Lab 3.1.5](lab-3.1.5-70b-qlora-finetuning.ipynb) takes such a plan apart.
#
# | you want | you change |
# |---|---|
# | a larger rank that still learns | `AdapterConfig(rank=64, rslora=True)` |
# | fewer numbers that train | `AdapterConfig(targets=("q_proj", "v_proj"))` |
# | volume and direction apart | `AdapterConfig(method="dora")`, [lab 3.1.2](lab-3.1.2-dora-comparison.ipynb) |
# | noise on the embeddings | `with neftune(model, 5): train(…)`, [lab 3.1.3](lab-3.1.3-neftune-magic.ipynb) |
# | half the activations | `TrainConfig(…, gradient_accumulation_steps=2)` |
#
# ## Explain it back

# %% [markdown] nbgrader={"grade_id": "explain-mask", "solution": true, "grade": true, "points": 0}
# **Why does the prompt get the label −100, and why must the stop token keep its own?**
#
# ### BEGIN SOLUTION
# The model should learn to write tickets, not orders, so the loss looks only at the ticket's tokens. The stop token is the last of them. If
# it has no label, nothing ever teaches the model that a ticket ends, and it writes on after the last brace.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-control", "solution": true, "grade": true, "points": 0}
# **The control's loss falls, yet it gets no ticket right. What did it learn?**
#
# ### BEGIN SOLUTION
# The form: braces, keys, the names of dishes that are common. All of that is in wrong tickets too. What it could not learn is which ticket
# belongs to which order. So a falling loss proves nothing; right answers to held-out orders do.
# ### END SOLUTION

# %% tags=["experiment"]
headline(
    {
        **{f"exact, {kind} (%)": 100 * score.value for kind, score in scores.items()},
        "adapter against PEFT": max(apart.values()),
        "merged against adapted": merged_apart,
        "equal after a kill": f"{same} of {tensors}",
        "seconds per step": history.seconds_per_step,
    }
)
