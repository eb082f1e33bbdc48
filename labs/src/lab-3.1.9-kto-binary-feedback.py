# %% [markdown]
# # 3.1.9 What if all you have is thumbs?
#
# **Time**: about 50 minutes.
#
# ## What you will make
#
# KTO, from scratch: its loss, its reference point, and the two weights for lopsided feedback. Your loss trains
# a real model on 👍 and 👎 until it cooks in grams.
#
# ## What you should know first
#
# Lab 3.1.7: log-probabilities of an answer, the reference model, β. Three words come back:
#
# > **nat**: the unit of a natural logarithm. One nat less means a probability 2.7 times smaller.
# > **seed**: the number that starts a random generator. Other seeds are other runs of the same experiment.
# > **95% interval**: where the true mean lies, in 95 of 100 experiments like this one.
#
# ## The picture
#
# Hardly any guest compares two plates. They eat one, and leave a 👍 or a 👎 in the guest book. The chef reads
# it. After a 👍 they cook that dish more often, after a 👎 less often. Two things keep them sane. A dish counts
# as changed only if it moved more than the whole menu did. And praise for a dish that everybody gets already
# changes little.
#
# Where the picture ends: guests who order soup may be grumpier than guests who order bread. The chef would
# blame the soup, and so would KTO.

# %%
import torch

from spark_ft import adapters_disabled, generate, kto_loss, sequence_logps, with_prompt
from spark_ft.embedded import EMBEDDED
from spark_ft.lab import headline, yours
from spark_ft.lab.checks import lab_3_1_9 as checks
from spark_ft.lab.experiments import agrees, load
from spark_ft.lab.experiments import lab_3_1_9 as experiment
from spark_ft.lab.parity import kto_against_trl
from spark_ft.lab.study import lab_3_1_9 as study
from spark_ft.models import load_tokenizer

# %% [markdown]
# ## It works
#
# 112 thumbs from the guest book: up where an answer measures in grams, down where it measures in cups. No
# answer comes with a better or worse twin.

# %%
rows, questions = experiment.thumbs(), experiment.asked()[:5]
for row in rows[:2] + [row for row in rows if not row["label"]][:1]:
    print("👍" if row["label"] else "👎", row["prompt"], "→", row["completion"])
weights = experiment.balanced(rows)
model, live = experiment.learn(rows, 0, weights)
answers = generate(model, load_tokenizer(EMBEDDED), questions, max_new_tokens=64)
study.show_answers(questions, load("dpo_kitchen"), answers)

# %% [markdown]
# The right column cooks in grams and °C. Yet no thumb said "grams are better than cups". How does a single
# mark become a gradient?
#
# ## Build it
#
# Kahneman and Tversky asked people how gains and losses of money *feel*
# ([1992](https://doi.org/10.1007/BF00122574)). What they found fits one curve:
#
# $$v(g) = \begin{cases} g^{\alpha} & g \ge 0 \\ -\lambda\,(-g)^{\alpha} & g < 0 \end{cases}
# \qquad \alpha = 0.88,\ \lambda = 2.25$$
#
# The power $\alpha$ bends it: the second hundred adds less joy than the first. The factor $\lambda$ is **loss
# aversion**: a loss hurts more than an equal gain pleases.
#
# ### Exercise 1: how a gain feels
# ●●○ importance · ●○○ difficulty · 5 minutes
#
# `gain` is a tensor of any shape. Return the value of each number in it.
#
# <details><summary>Hint</summary>
#
# A negative number has no power of 0.88: PyTorch gives nan. Take `gain.abs()`, then `torch.where`.
# </details>

# %% nbgrader={"grade_id": "felt-value", "solution": true}
def felt_value(gain, alpha=0.88, aversion=2.25):
    """How gains and losses feel."""
    ### BEGIN SOLUTION
    size = gain.abs() ** alpha
    return torch.where(gain < 0, -aversion * size, size)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-felt-value", "grade": true, "points": 1}
checks.check_felt_value(felt_value)

# %%
study.show_values(felt_value)

# %% [markdown]
# **How to read it.** On the left, money. On the right, what KTO
# ([Ethayarajh 2024](https://arxiv.org/abs/2402.01306)) makes of it: a sigmoid, which has no kink and no
# power. Its gain is how much likelier an answer has become since the start, less what answers gain on
# average, $z$. It is steep in the middle and flat at both ends. So a thumb teaches most while its answer has
# hardly moved, and nothing once it is far away. And KTO's two weights are 1 by default: the loss aversion in
# its name is yours to set.
#
# ### Exercise 2: the loss
# ●●● importance · ●●○ difficulty · 8 minutes
#
# With $r = \log \pi - \log \pi_\text{ref}$ of an answer, the loss of one thumb is
#
# $$👍:\ \lambda_D \left(1 - \sigma(\beta (r - z))\right) \qquad
# 👎:\ \lambda_U \left(1 - \sigma(\beta (z - r))\right)$$
#
# `policy` and `reference` hold $\log \pi$ and $\log \pi_\text{ref}$ of B answers, `desirable` is true for a
# thumb up, `kl` is $z$, one number. Return B losses, in the order of the batch.
#
# <details><summary>Hint</summary>
#
# `torch.where(desirable, …, …)` chooses per thumb: the sign of the gain, and the weight.
# </details>

# %% nbgrader={"grade_id": "thumb-loss", "solution": true}
def thumb_loss(policy, reference, desirable, kl, *,
               beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):  # fmt: skip
    """KTO's loss of each thumb."""
    ### BEGIN SOLUTION
    gain = policy - reference - kl
    signed = torch.where(desirable, gain, -gain)
    value = torch.sigmoid(beta * signed)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - value)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-thumb-loss", "grade": true, "points": 3}
checks.check_kto_loss(thumb_loss)

# %% [markdown] tags=["predict"]
# **Predict, then run.** Before the first step the policy *is* the reference. DPO's loss starts at ln 2 =
# 0.693. Where does KTO's start, for a thumb up and a thumb down with weights 1?
#
# - at 0 for both
# - at 0.5 for both
# - at 0.693 for both

# %%
zero = torch.zeros(2)
print(kto_loss(zero, zero, torch.tensor([True, False]), kl=0.0))

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# At 0.5: σ(0) is one half, and KTO takes 1 − σ where DPO takes −log σ. With weights other than 1 it is half
# of the mean weight in the batch. If yours starts elsewhere, dropout or noise is on.
# </details>

# %% [markdown]
# ### Where is the middle?
#
# Everything turns on $z$: an answer counts as better only if it gained more than *answers do anyway*. KTO
# asks for the distance KL(π ‖ π_ref). To measure it one would have to generate answers in every step. KTO
# takes a cheap stand-in: answers from the data that belong to *another question*.
#
# ### Exercise 3: mismatched pairs
# ●●○ importance · ●●○ difficulty · 8 minutes
#
# Return a list with one text per row: the completion of *another* row, one that asks something else. Two
# rows may share a prompt. Use every completion about once. And give the same list in every call: the
# reference's log-probability of a fixed pair is computed once and kept.
#
# <details><summary>Hint</summary>
#
# Take the nearest row before it whose prompt differs. In Python, `rows[i - n]` with a negative index counts
# from the end, so the row before the first is the last.
# </details>

# %% nbgrader={"grade_id": "mismatched", "solution": true}
def mismatched(rows):
    """For each row's prompt, an answer to another prompt."""
    ### BEGIN SOLUTION
    answers = []
    for i, row in enumerate(rows):
        before = (rows[i - n] for n in range(1, len(rows)))
        other = next(r for r in before if r["prompt"] != row["prompt"])
        answers.append(other["completion"])
    return answers
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-mismatched", "grade": true, "points": 2}
checks.check_mismatched(mismatched)

# %% [markdown]
# ### Exercise 4: the reference point
# ●●● importance · ●●○ difficulty · 10 minutes
#
# Now $z$ itself, for one batch. It is a yardstick, so it gets no gradient:
#
# $$z = \max\left(0,\ \operatorname{mean}(\log \pi - \log \pi_\text{ref})\right)
# \quad\text{over the batch's mismatched pairs}$$
#
# `with_prompt(batch, "mismatched")` puts prompts and mismatched answers together; `sequence_logps(model, …)`
# gives their summed log-probabilities and their token counts. The reference is the model inside
# `with adapters_disabled(model):`.
#
# <details><summary>Hint</summary>
#
# The same answers twice: once as the model is, once with its adapters off. All of it under
# `torch.no_grad()`. Take the mean first, then clamp.
# </details>

# %% nbgrader={"grade_id": "reference-point", "solution": true}
def reference_point(model, batch):
    """z of a batch: one number, without a gradient."""
    ### BEGIN SOLUTION
    answers = with_prompt(batch, "mismatched")
    with torch.no_grad():
        policy, _ = sequence_logps(model, answers)
        with adapters_disabled(model):
            reference, _ = sequence_logps(model, answers)
    gain = policy - reference
    return gain.mean().clamp(min=0)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-reference-point", "grade": true, "points": 3}
checks.check_reference_point(reference_point)

# %% [markdown]
# How good is the mean of so few? The next cell takes stored gains of mismatched pairs after training, and
# draws batches from them again and again.

# %% tags=["knob"]
BATCH = 8  # turn this: 2, 4, 16, 32 … and watch how far one batch can be off
stored = load("kto_thumbs")
study.show_reference_points(stored, BATCH)

# %% [markdown]
# **How to read it.** Each bar holds 95% of the batches of one size. A single batch knows $z$ badly; but β = 0.1
# shrinks the error before it meets the sigmoid, and the last line says what is left of it. That is why this
# lab takes 8 rows, and why two would do harm at a larger β. And is it a KL at all? A KL is never below zero. This
# mean is, because the data's answers are not the model's own. The clamp hides that.

# %% tags=["bug-hunt"]
# In parts of four rows, to save memory. It runs, and it is wrong. Why?
gain = torch.tensor(stored.figures(0)["gains"]["mismatched"][:32])
whole = gain.mean().clamp(min=0)
parts = [part.mean().clamp(min=0) for part in gain.split(4)]
print(f"z of the batch: {whole:.2f}; mean z of its parts: {torch.stack(parts).mean():.2f}")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Each part is clamped before the mean is taken. What is below zero is lost, what is above stays, so the mean
# of the parts can only be larger. The check that finds it: one batch, whole and in parts, must give the same
# loss. `train` sums the gains of all parts before it clamps. TRL 1.16 takes each micro-batch by itself.
# </details>

# %% [markdown]
# ### Exercise 5: the two weights
# ●●● importance · ●○○ difficulty · 6 minutes
#
# A feedback button collects ten 👍 for each 👎, or the other way about. Then one kind drowns the other. The
# paper's rule, and TRL's: choose the weights so that $\lambda_D n_D$ is 1 to 4/3 of $\lambda_U n_U$, with
# $n_D$ thumbs up and $n_U$ thumbs down. Take 1: both kinds pull alike in sum. Keep the commoner kind's weight
# at 1, and raise the rarer one's.
#
# `desirable` is a tensor of booleans. Return two numbers: the weight of thumbs up, the weight of thumbs down.
# If one kind is missing, return 1.0 and 1.0.
#
# <details><summary>Hint</summary>
#
# Count both kinds. The larger count divided by each count gives both weights at once.
# </details>

# %% nbgrader={"grade_id": "thumb-weights", "solution": true}
def thumb_weights(desirable):
    """(desirable_weight, undesirable_weight) with which both kinds pull alike."""
    ### BEGIN SOLUTION
    up = int(desirable.sum())
    down = len(desirable) - up
    if up == 0 or down == 0:
        return 1.0, 1.0
    most = max(up, down)
    return most / up, most / down
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-thumb-weights", "grade": true, "points": 2}
checks.check_thumb_weights(thumb_weights)

# %% [markdown]
# ## Your code trains
#
# The same run as in the first cell, with your loss in it. The package supplies the log-probabilities, the
# mismatched pairs and $z$ of the whole step.

# %% tags=["trains"]
yours.trains(
    lambda: experiment.learn(rows, 0, weights, thumb_loss, first=8)[1],
    lambda: live.losses[:8],
    what="loss",
    y="KTO loss (per thumb)",
    caption="embedded model, the first 8 of 14 steps of 8 thumbs, seed 0; weights 1 and 3",
)

# %% [markdown]
# And beside TRL's KTOTrainer, on a batch of its own, loss and gradient:

# %%
four = [row for row in rows if row["label"]][:2] + [row for row in rows if not row["label"]][:2]
parity = kto_against_trl(kto_loss, four, load_tokenizer(EMBEDDED))
print("spark_ft against TRL:", ", ".join(f"{name} {gap:.0e}" for name, gap in parity.items()))
print(agrees(live.losses[:5], stored.figures(0)["thumbs"]["losses"]))

# %% [markdown]
# ## Is it true?
#
# **The control: flip every thumb.** If KTO learns from the thumbs, and not merely from reading metric
# answers, the same rows must now teach cups. Three seeds, stored; imperial answers stand beside metric ones.

# %% tags=["experiment"]
before = load("dpo_kitchen")
flipped = study.show_flipped(stored, before)

# %% [markdown]
# **How to read it.** The same questions, rows and steps; only the thumbs differ. Flipped thumbs leave no answer
# in grams. So it is the thumbs that teach.

# %% [markdown] tags=["predict"]
# **Predict, then run.** Now the guest book is lopsided: the seed draws 10 of the file's 300 thumbs up, and
# all 100 thumbs down stay. What will the weights 10 and 1 change, against 1 and 1?
#
# - more answers in grams
# - as many, but the model drifts less far from its start
# - nothing that one could see

# %% tags=["experiment"]
lopsided = load("kto_lopsided")
weighed = study.show_weights(lopsided, before)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# More grams? Not with either: thumbs down alone turn this model to grams, since it knew two ways to measure and
# one was taken away. Less drift? Yes, in each of the five seeds (the table's last column), though by very different
# amounts. With three seeds the interval of the mean still held zero; with five it does not. The reason: a
# thumb down says where *not* to go, and a hundred of them push on and on. Ten heavy thumbs up hold the model
# near answers that people liked. The score alone would have shown nothing.
# </details>

# %% [markdown]
# **Pairs or thumbs?** Take the pairs of lab 3.1.7 apart: each becomes a 👍 and a 👎 that no longer know of
# each other. KTO gets the thumbs, DPO the pairs; start, reference, steps and answers per step are the same.

# %% tags=["experiment"]
on_pairs = load("kto_on_pairs")
beside_dpo = study.show_pairs_or_thumbs(on_pairs, before)

# %% [markdown]
# ## On a DGX Spark
#
# ```python
# loss = feedback_loss(partial(kto_loss, desirable_weight=10.0))
# train(model, feedback_batches(rows, tokenizer, 32), loss, TrainConfig(steps=200, learning_rate=5e-5))
# ```
#
# The same lines for 8B. The reference costs no second model: its log-probabilities are computed once per
# answer, with the adapters off, and kept. Each step has a second, shorter pass for $z$, without gradients.
# A larger batch steadies $z$; gradient accumulation does so too, since `train` takes $z$ over the whole
# step. We have not measured it there.
#
# ## Explain it back

# %% [markdown] nbgrader={"grade_id": "explain-z", "solution": true, "grade": true, "points": 0}
# **Why does KTO need $z$, and why does $z$ get no gradient?**
#
# ### BEGIN SOLUTION
# Training can make all answers likelier or less likely at once. Only what moves more than the average is
# evidence about this answer, so z is subtracted. It is the yardstick. With a gradient the model could lower
# its loss by moving the yardstick, through answers that nobody has rated.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-thumbs", "solution": true, "grade": true, "points": 0}
# **A friend's app has a thousand 👍 and twenty 👎. What do you advise?**
#
# ### BEGIN SOLUTION
# Keep the thumbs single and train with KTO. Give the thumbs down a weight of 50, so that both kinds pull
# alike. Use steps with enough rows for z. Keep questions aside, judge answers to them before and after, and
# flip the thumbs once: if that changes nothing, the thumbs were not what taught.
# ### END SOLUTION

# %% tags=["experiment"]
headline(
    {
        "metric answers, true thumbs less before (points)": flipped["thumbs"].signed(0),
        "metric answers, flipped thumbs less before": flipped["flipped"].signed(0),
        "imperial answers, flipped less before": flipped["flipped, imperial"].signed(0),
        "10 up, 100 down: metric, balanced less equal weights": weighed["metric"].signed(0),
        "10 up, 100 down: KL, balanced less equal (nats)": weighed["drift"].signed(2),
        "KTO less DPO on the same pairs": beside_dpo.signed(0),
        "against TRL, at most": max(parity.values()),
    }
)
