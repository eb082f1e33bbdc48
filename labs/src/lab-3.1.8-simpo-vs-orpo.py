# %% [markdown]
# # 3.1.8 What do you lose without a reference?
#
# **Time**: about 60 minutes.
#
# ## What you will make
#
# SimPO and ORPO, from scratch and trained; one page that shows the whole family of preference losses; and a
# decision guide of your own, from runs that you judge yourself.
#
# ## What you should know first
#
# Lab 3.1.7: pairs, log-probabilities, DPO, its reference. Three words come back here:
#
# > **nat**: the unit of a natural logarithm. One nat less means a probability 2.7 times smaller.
# > **seed**: the number that starts a random generator. Other seeds are other runs of the same experiment.
# > **95% interval**: where the true mean lies, in 95 of 100 experiments like this one.
#
# ## The picture
#
# Four workouts with one goal. **DPO** is the gym: it needs equipment, the *reference model*, which tells how
# far the chef has moved from the old cooking. **IPO** is the gym with a stopwatch: it ends when the goal is
# reached. **SimPO** is bodyweight training: no equipment, and nothing holds you in place. **ORPO** is one
# dense session: learning to answer and learning to prefer, at once and without equipment.
#
# Where the picture ends: with LoRA you own the gym already. Switch the sticky notes off, and there is the
# reference. So what do you lose without it, and what do you save?

# %%
from functools import partial

import torch
from torch.nn import functional as F

from spark_ft import adapters_disabled, collate_preferences, pair_logps, preference_loss
from spark_ft.lab import headline, yours
from spark_ft.lab.checks import lab_3_1_8 as checks
from spark_ft.lab.experiments import agrees
from spark_ft.lab.experiments import lab_3_1_8 as experiment
from spark_ft.lab.experiments.preferences import pairs, prefer, sft_start
from spark_ft.lab.parity import orpo_against_trl, simpo_against_trl
from spark_ft.lab.study import lab_3_1_8 as study
from spark_ft.methods import preference

# %% [markdown]
# ## It works
#
# A model that answers in cups as gladly as in grams trains on 64 pairs with SimPO. Its loss sees two answers,
# and no second model.

# %%
start, tokenizer = sft_start()
before = study.answers(start, tokenizer)
simpo = preference_loss(preference.simpo_loss)
run = {"learning_rate": experiment.TUNED["SimPO"], **experiment.STEPS}
model, history = prefer(pairs("train"), 0, simpo, model=start, **run)
study.show_answers(before, study.answers(model, tokenizer))

# %% [markdown]
# Read the right column: grams and °C, in whole sentences. How does it know how far to go?
#
# ## Build it
#
# A model gives each token of an answer a log-probability. DPO adds them up. A long answer then has the lower
# sum, however good it is; in DPO the reference's sum cancels that. Without a reference something else must:
# the **mean per token**.
#
# ### Exercise 1: the mean per token
# ●●● importance · ●○○ difficulty · 5 minutes
#
# `logps` (rows, length) holds each token's log-probability, `mask` is true on the answer's own tokens; prompt
# and padding stand around them. Return each row's mean over its own tokens, shape (rows,).
#
# <details><summary>Hint</summary>
#
# True counts as 1: `logps * mask` is 0 where the mask is false, and `mask.sum(1)` counts.
# </details>

# %% nbgrader={"grade_id": "mean-logps", "solution": true}
def mean_logps(logps, mask):
    """Mean log-probability of each row's answer."""
    ### BEGIN SOLUTION
    total = (logps * mask).sum(1)
    tokens = mask.sum(1)
    return total / tokens
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-mean-logps", "grade": true, "points": 1}
checks.check_mean_logps(mean_logps)

# %% [markdown] tags=["predict"]
# **Predict, then run.** The model of the first cell reads 40 pairs that it was not trained on. In how many
# of them does the *sum* prefer the shorter answer, whichever that is?
#
# - about half
# - about two thirds
# - nearly all

# %%
rows = pairs("test")[:40]
with torch.no_grad(), adapters_disabled(model):
    logps, tokens = pair_logps(model, collate_preferences(rows, tokenizer))
study.show_sum_and_mean(rows, logps, tokens)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The table's first line counts it. The sum is a poor judge between answers of different length; the mean is
# hardly touched by it. In the pair below the table the two disagree.
# </details>

# %% [markdown]
# ### Exercise 2: IPO, a target and not a race
# ●●○ importance · ●○○ difficulty · 4 minutes
#
# DPO's push never ends: a margin can always grow. IPO ([Azar 2023](https://arxiv.org/abs/2310.12036), eq. 17)
# sets a target, $1/(2\beta)$, and pulls back beyond it:
#
# $$\left(\left[(\text{chosen} - \text{ref chosen}) - (\text{rejected} - \text{ref rejected})\right]
# - \frac{1}{2\beta}\right)^2$$
#
# All four are means per token, shape (B,). Return one loss for each pair.
#
# <details><summary>Hint</summary>
#
# Mind the brackets: `1 / 2 * beta` is β/2.
# </details>

# %% nbgrader={"grade_id": "ipo-loss", "solution": true}
def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    """(margin − 1/(2β))² for each pair."""
    ### BEGIN SOLUTION
    gained, lost = chosen - ref_chosen, rejected - ref_rejected
    margin = gained - lost
    return (margin - 1 / (2 * beta)) ** 2
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-ipo-loss", "grade": true, "points": 1}
checks.check_ipo_loss(ipo_loss)

# %% [markdown]
# ### Exercise 3: SimPO
# ●●● importance · ●○○ difficulty · 6 minutes
#
# Drop the reference, and ask for a margin $\gamma$ instead
# ([Meng 2024](https://arxiv.org/abs/2405.14734), eq. 6):
#
# $$-\log \sigma\left(\beta\,(\text{chosen} - \text{rejected}) - \gamma\right)$$
#
# A larger $\gamma$ asks for more; a larger $\beta$ is satisfied sooner.
#
# <details><summary>Hint</summary>
#
# `torch.log(torch.sigmoid(x))` is −inf for x = −200; `F.logsigmoid(x)` is −200.
# </details>

# %% nbgrader={"grade_id": "simpo-loss", "solution": true}
def simpo_loss(chosen, rejected, *, beta=2.0, gamma=1.0):
    """−log σ(β (chosen − rejected) − γ) for each pair."""
    ### BEGIN SOLUTION
    margin = beta * (chosen - rejected) - gamma
    return -F.logsigmoid(margin)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-simpo-loss", "grade": true, "points": 2}
checks.check_simpo_loss(simpo_loss)

# %% [markdown]
# ### Exercise 4: log-odds
# ●●○ importance · ●●○ difficulty · 6 minutes
#
# ORPO compares **odds**: $p/(1-p)$, what a bookmaker says. With $p = e^{\text{logp}}$ their logarithm is
# $\text{logp} - \log(1 - p)$. Write it so that it holds for logp = −0.000001 and for logp = −200.
#
# <details><summary>Hint</summary>
#
# `torch.expm1(x)` is eˣ − 1, exact where eˣ is nearly 1. So 1 − p is `-torch.expm1(logp)`.
# </details>

# %% nbgrader={"grade_id": "log-odds", "solution": true}
def log_odds(logp):
    """log(p / (1 − p)) from log p."""
    ### BEGIN SOLUTION
    log_rest = torch.log(-torch.expm1(logp))
    return logp - log_rest
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-log-odds", "grade": true, "points": 1}
checks.check_log_odds(log_odds)

# %% [markdown]
# ### Exercise 5: ORPO
# ●●● importance · ●●○ difficulty · 6 minutes
#
# ORPO ([Hong 2024](https://arxiv.org/abs/2403.07691), eq. 6) imitates and compares:
#
# $$\text{nll} - \lambda \log \sigma\left(\text{log-odds(chosen)} - \text{log-odds(rejected)}\right)$$
#
# `chosen` and `rejected` are means per token; `nll`, the negative log-likelihood, is what a plain fine-tune on
# the chosen texts would minimise. It is given, for each pair or as one number. `weight` is λ.
#
# <details><summary>Hint</summary>
#
# log σ is negative, and a loss should fall as the odds move apart: so subtract it. `F.logsigmoid` again.
# </details>

# %% nbgrader={"grade_id": "orpo-loss", "solution": true}
def orpo_loss(chosen, rejected, nll, *, weight=0.1):
    """nll − λ log σ(log-odds(chosen) − log-odds(rejected)) for each pair."""
    ### BEGIN SOLUTION
    apart = log_odds(chosen) - log_odds(rejected)
    comparison = -F.logsigmoid(apart)
    return nll + weight * comparison
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-orpo-loss", "grade": true, "points": 2}
checks.check_orpo_loss(orpo_loss)

# %% [markdown]
# ### Bug hunt
#
# This ORPO runs, its loss falls, and it teaches the wrong thing. One line is at fault.

# %% tags=["bug-hunt"]
def suspicious_orpo(chosen, rejected, chosen_tokens, rejected_tokens, weight=0.1):
    """From sums over tokens, as `pair_logps` gives them, and the numbers of tokens."""
    odds = [p - torch.log(-torch.expm1(p)) for p in (chosen, rejected)]
    nll = -chosen.sum() / chosen_tokens.sum()
    return nll - weight * F.logsigmoid(odds[0] - odds[1])


study.show_suspicious(suspicious_orpo, logps, tokens)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# It takes the odds of *sums*. A whole answer has a tiny probability: then 1 − p is 1, odds are plain
# probabilities, and their difference is many nats, mostly in favour of the shorter answer. So length decides
# which pairs push with full force and which not at all. The NLL hides it: it falls anyway. A look at the table's
# last column finds it: for an untrained pair it should be near log 2 = 0.69.
# </details>

# %% [markdown]
# ### Exercise 6: mend it
# ●●○ importance · ●○○ difficulty · 5 minutes
#
# Same inputs, right loss: odds of means per token. The NLL was right as it stands.
#
# <details><summary>Hint</summary>
#
# A mean is a sum divided by its own number of tokens. Your `orpo_loss` does the rest.
# </details>

# %% nbgrader={"grade_id": "mended-orpo", "solution": true}
def mended_orpo(chosen, rejected, chosen_tokens, rejected_tokens, weight=0.1):
    """ORPO's loss for each pair, from sums over tokens and the numbers of tokens."""
    ### BEGIN SOLUTION
    chosen_mean = chosen / chosen_tokens
    rejected_mean = rejected / rejected_tokens
    nll = -chosen.sum() / chosen_tokens.sum()
    return orpo_loss(chosen_mean, rejected_mean, nll, weight=weight)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-mended-orpo", "grade": true, "points": 1}
checks.check_mended_orpo(mended_orpo)

# %% [markdown]
# ### Exercise 7: how hard does a loss push?
# ●●○ importance · ●●○ difficulty · 6 minutes
#
# Training follows minus the slope of a loss. That is its **push** on the margin: positive while it wants
# more, zero when it is content, negative when it pulls back. `loss` is any function from margins (N,) to
# losses (N,). Return its push at each margin, as plain numbers; leave the caller's `margin` as it is.
#
# <details><summary>Hint</summary>
#
# `x = margin.clone().requires_grad_()`, then `.backward()` on the *sum* of the losses; `x.grad` is each one's
# own slope.
# </details>

# %% nbgrader={"grade_id": "push", "solution": true}
def push(loss, margin):
    """−d loss / d margin at each margin."""
    ### BEGIN SOLUTION
    x = margin.clone().requires_grad_()
    loss(x).sum().backward()
    return -x.grad
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-push", "grade": true, "points": 1}
checks.check_push(push)

# %% [markdown]
# A knob: where does SimPO stop pushing?

# %% tags=["knob"]
GAMMA = 1.0  # turn this: 0, 1, 4, and watch where the push has fallen to half; then BETA: 1, 2, 10
BETA = 2.0
study.show_push(partial(preference.simpo_loss, beta=BETA, gamma=GAMMA), BETA, GAMMA)

# %% [markdown]
# The push is at half of its height where the margin is γ/β nats per token. γ/β says how far, β how abruptly.
#
# Now the family on one page. Variants: label smoothing (cDPO, robust) for pairs that may be wrong, APO, which says
# where chosen itself should go, and DPO on means per token.

# %%
study.show_family()

# %% [markdown]
# **How to read it.** On the left, where a curve ends: DPO and SimPO only flatten, IPO and cDPO have a lowest point.
# On the right, the same told as a push: what crosses zero pulls back.
#
# ### The same as TRL's?
#
# TRL has no SimPO trainer. Its experimental CPO trainer becomes SimPO with `loss_type="simpo"`,
# **`cpo_alpha=0`**, `beta=2` and `simpo_gamma=1`; its defaults (β 0.1, an NLL on top) are another method. Loss
# and gradient, on the trainers' own batch:

# %%
parity = {
    "SimPO": simpo_against_trl(preference.simpo_loss, pairs("train")[:4], tokenizer),
    "ORPO": orpo_against_trl(preference.orpo_loss, pairs("train")[:4], tokenizer),
}
study.show_parity(parity)

# %% nbgrader={"grade_id": "check-parity", "grade": true, "points": 1}
checks.check_parity(simpo_loss, orpo_loss, tokenizer)

# %% [markdown]
# ## Your code trains
#
# Your SimPO for eight steps, over the run of the first cell; then your ORPO for five, over the package's.

# %% tags=["trains"]
yours.trains(
    lambda: study.first_steps(preference_loss(simpo_loss, per_token=True), "SimPO", 8),
    lambda: history.losses[:8],
    what="SimPO loss",
    y="SimPO loss (nats per pair)",
    caption="The embedded model after its SFT start, 4 pairs a step, seed 0.",
)

# %% tags=["trains"]
yours.trains(
    lambda: study.first_steps(preference_loss(orpo_loss, per_token=True), "ORPO", 5),
    lambda: study.first_steps(preference_loss(preference.orpo_loss), "ORPO", 5),
    what="ORPO loss",
    y="ORPO loss (nats)",
    caption="The embedded model after its SFT start, 4 pairs a step, seed 0.",
)

# %% [markdown]
# ## Is it true?
#
# "SimPO is better than DPO." "ORPO is enough." To compare, everything else must be equal: one start, the same
# 64 pairs in the same order, 16 steps, and for each method **its own learning rate**, tuned on 20 things to
# know in a kitchen that are neither trained on nor tested on.

# %%
stored = study.Runs()
print(agrees(history.losses[:5], stored.runs["SimPO"][0]["losses"]))
study.show_rates()

# %% [markdown]
# We took the rate with the most good answers; where two differed by one answer of twenty, the one that moves
# the model less. After the runs we tried half of the smaller rate, too: SimPO gave 13 good answers of 20 and
# ORPO 9. With 20 questions nobody can tell 13 from 11. Now the runs, on 50 test questions:

# %%
study.show_methods(stored)

# %% [markdown]
# *Metric* is the judge: grams and °C, no cups. *Sound* passes the guard, and gibberish does not. *Good* is metric,
# sound, and no loop. *KL*: how far the model has moved, in nats per answer. Judge a method by all of them.
#
# ### Exercise 8: a verdict
# ●●● importance · ●●○ difficulty · 8 minutes
#
# Write the verdict on two methods from their scores, seed by seed. Subtract seed by seed, take the mean of the
# differences, and their 95% interval: mean ± t·s/√n, where s is their standard deviation and t is in the table.
# Say `"better"` if it lies above zero, `"worse"` if below, else `"cannot tell"`.
#
# <details><summary>Hint</summary>
#
# A tensor's `.std()` divides by n − 1, as it should. `T95[len(differences)]` is t.
# </details>

# %% nbgrader={"grade_id": "verdict", "solution": true}
T95 = {3: 4.303, 4: 3.182, 5: 2.776}  # number of seeds → t


def verdict(ours, theirs):
    """better, worse or cannot tell: two lists of scores, one per seed."""
    ### BEGIN SOLUTION
    differences = torch.tensor(ours) - torch.tensor(theirs)
    seeds = len(differences)
    half = T95[seeds] * differences.std() / seeds**0.5
    low, high = differences.mean() - half, differences.mean() + half
    return "better" if low > 0 else "worse" if high < 0 else "cannot tell"
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-verdict", "grade": true, "points": 2}
checks.check_verdict(verdict)

# %%
study.show_verdicts(stored)

# %% [markdown]
# Here DPO, IPO and SimPO cannot be told apart, and ORPO gives fewer good answers than each of them although it
# moves the model further. One small model and one habit: yours may differ. And six pairs are six looks: with
# 95% intervals, one of four such tables has a false "better" somewhere.
#
# ### What does ORPO's imitation teach by itself?

# %% [markdown] tags=["predict"]
# **Predict, then run.** Take ORPO's comparison away. What is left is a plain fine-tune on the chosen answers; it
# never sees a rejected one. How much of ORPO's gain in metric answers stays?
#
# - none: it is the comparison that teaches the preference
# - about half
# - nearly all

# %%
study.show_nll(stored)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Nine tenths, and we cannot tell whether the comparison adds anything. The chosen answers are all metric, so
# imitating them teaches it. It would teach any other habit of the chosen answers, too. λ = 0.1 adds a small push.
# </details>

# %% [markdown]
# ### What does a reference cost?
#
# One step of each method on the same four pairs, here and now, every tensor followed from birth to death.

# %%
costs = experiment.step_costs()
study.show_costs(costs)

# %% [markdown]
# ## On a DGX Spark
#
# "ORPO takes half the memory." Half of what? An 8B model in bf16, two pairs of 1,024 tokens, planned by running the
# step without memory:

# %%
plans = experiment.memory_plans()
study.show_plans(plans)

# %% [markdown]
# - **LoRA, reference loaded as a second model**: dropping it saves nearly half. There the sentence is true.
# - **LoRA, adapter off**: there is no second model to save.
# - **Full fine-tuning**: the second copy is one of five; gradients and two moments stay.
#
# "SimPO gains 6.4 points." The abstract says *up to* 6.4, AlpacaEval 2, length-controlled; for
# Llama-3-Instruct it is 4.4. The authors tune β, γ and rate for each model.
#
# The same lines train 8B or 70B; only the model's name changes:
#
# ```python
# history = train(model, preference_batches(rows, tokenizer, 4), preference_loss(simpo_loss), config)
# ```
#
# ## Explain it back
#
# Write the guide that you would hand to a colleague. Use the tables above, and say where they cannot tell.

# %% [markdown] nbgrader={"grade_id": "decision-guide", "solution": true, "grade": true, "points": 0}
# **Which method, for whom, and what to watch?**
#
# ### BEGIN SOLUTION
# You have pairs and LoRA: take DPO. Its reference is the model with the adapter off, so it costs no memory.
# You fine-tune all weights and memory is short: take SimPO. In our runs it gave as many good answers as DPO.
# Your pairs are also the texts that the model should learn to write: ORPO does both at once. In our runs it
# gave fewer good answers, and nine tenths of its gain came from imitation. You have thumbs only: take KTO (lab
# 3.1.9). Whatever you take: tune its rate, and watch the guard, the loops and the KL beside the judge.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-reference", "solution": true, "grade": true, "points": 0}
# **What does the reference do, and what takes its place in SimPO and in ORPO?**
#
# ### BEGIN SOLUTION
# The reference says how likely each answer was before training. It cancels length and everything else that makes an
# answer likely anyway, and it is what β holds you near. SimPO cancels length by the mean per token and stops by
# its margin γ, but nothing holds it near the start. ORPO is held by its imitation of the chosen texts.
# ### END SOLUTION

# %%
headline(study.headline(stored, parity, costs, plans))
