# %% [markdown]
# # 3.1.7 How do you learn from "this one is better"?
#
# **Time**: about 60 minutes.
#
# Somebody shows you two answers and says: this one. Nobody says why, or how much better. Can a model learn from that, and how
# would you know that it did?
#
# ## What you will make
#
# **DPO** ([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)) in 26 lines of your own, and with it a model that measures in
# grams where it measured in cups. You will also meet a run that a judge loves and that writes nonsense.
#
# ## What you should know first
#
# - LoRA, and that an adapter can be switched off ([3.1.1](lab-3.1.1-lora-theory.ipynb), [3.1.4](lab-3.1.4-8b-lora-finetuning.ipynb)).
# - The **log-probability** of a token, log p: 0 is certain; each −1 makes it some three times less likely. Its unit is the **nat**.
# - σ, the sigmoid, turns any number into a probability: σ(0) = ½, σ(4) = 0.98.
#
# ## The picture
#
# You want a chef to cook to your guests' taste. You could train a critic on the guests' opinions, then let the chef cook for high
# marks: two trainings. Or you put two plates down. "This one." The chef makes the first a little more likely and the second a little
# less, and is never allowed to forget how they cooked before. That is DPO: **taste tests without a critic**.

# %%
import torch
from torch.nn import functional as F

from spark_ft import adapters_disabled, collate_preferences, dpo_loss, length_baseline
from spark_ft.data.batches import with_prompt
from spark_ft.data.judge import is_metric
from spark_ft.embedded import EMBEDDED
from spark_ft.evaluation import answers_and_ends
from spark_ft.lab import headline, parity, yours
from spark_ft.lab.checks import lab_3_1_7 as checks
from spark_ft.lab.experiments import agrees, lab_3_1_7, load
from spark_ft.lab.experiments.preferences import judged, pairs, questions, score
from spark_ft.lab.study import lab_3_1_7 as study
from spark_ft.models import load_tokenizer
from spark_ft.preferences import preference_loss
from spark_ft.scoring import sequence_logps

# %% [markdown]
# ## It works
#
# The data: 240 cooking questions, each with two right answers. `chosen` measures in grams, litres and °C, `rejected` in cups, ounces and
# °F. The next cell trains on 64 of these pairs, then asks about dishes that no pair is about.

# %%
model, history = lab_3_1_7.tune_dpo(seed=0)
tokenizer, asked = load_tokenizer(EMBEDDED), questions("test")
stored = load("dpo_kitchen")
answers = [text for text, _ in answers_and_ends(model, tokenizer, asked[:4], 64)]
study.show_answers(asked, stored.figures(0)["before"]["answers"], answers)

# %% [markdown]
# The cooking is a small model's; look at the units. Nobody told it "use grams". Now build what just ran.
#
# ## Build it
#
# ### How likely is an answer?
#
# A language model scores each next token. Add up the log-probabilities of an answer's tokens, given the question, and you have the
# log-probability of the whole answer. The question's own tokens do not count: nobody chose them.
#
# ### Exercise 1: the log-probability of an answer
# ●●● importance · ●●○ difficulty · 10 minutes
#
# `logits` is (batch, seq, vocabulary). `labels` (batch, seq) holds the answer's token ids, and −100 at question and padding.
# Return the sum of log p over each row's answer, shape (batch,). Row $t$ of the logits predicts token $t + 1$.
#
# <details><summary>Hint: picking</summary>
#
# `logps.gather(-1, ids[..., None])[..., 0]` takes one number per place. −100 is no id: put 0 there first, and mask the result.
# </details>


# %% nbgrader={"grade_id": "summed-logps", "solution": true}
def summed_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Σ log p(token) over each row's labelled tokens."""
    ### BEGIN SOLUTION
    logps = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    counted = targets != -100
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * counted).sum(-1)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-summed-logps", "grade": true, "points": 3}
checks.check_summed_logps(summed_logps)

# %% [markdown]
# ### From "this one" to a loss, in five steps
#
# **1. Taste is a number, a choice is a coin.** Suppose each plate has a hidden score $r$. Guests choose plate $w$ over plate $l$ with
# probability $\sigma(r_w - r_l)$. That is the model of Bradley and Terry (1952). Equal scores: a fair coin.

# %%
for gap in (0.0, 1.0, 2.0, 4.0):
    print(f"r_w - r_l = {gap:g}: chosen with probability {torch.sigmoid(torch.tensor(gap)):.2f}")

# %% [markdown]
# **2. Good scores make what was said likely.** The loss of a choice is $-\log \sigma(r_w - r_l)$: small where the scores agree with
# the guest. A critic, or *reward model*, would be trained on it.
#
# **3. A chef on a leash.** Given the scores, which policy $\pi$ (which probabilities of answers) do you want? One with a high mean
# reward that stays near the reference $\pi_{\text{ref}}$. The distance is the **KL**, the mean of
# $\log \pi - \log \pi_{\text{ref}}$ over the policy's answers; $\beta$ is its price:
#
# $$\max_\pi \; \text{mean reward} - \beta \cdot \text{KL} \qquad\Rightarrow\qquad \pi^*(y) = \pi_{\text{ref}}(y)\, e^{r(y)/\beta} / Z$$
#
# $Z$ makes the probabilities add up to 1. Is that really the best? Here are three answers and 20,000 other policies:

# %%
reference = torch.tensor([0.6, 0.3, 0.1])
reward, beta = torch.tensor([0.0, 1.0, 2.0]), 0.5
best = torch.softmax(reference.log() + reward / beta, 0)
others = torch.distributions.Dirichlet(torch.ones(3)).sample((20_000,))


def objective(policy: torch.Tensor) -> torch.Tensor:
    kl = (policy * (policy / reference).log()).sum(-1)
    return policy @ reward - beta * kl


print(f"best by the formula: {objective(best):.4f}")
print(f"best of the others:  {objective(others).max():.4f}")
study.show_leash(reference, reward, {"reference": reference, "best": best})
assert objective(others).max() <= objective(best) + 1e-6

# %% [markdown]
# **4. Read the scores off the chef.** Turn the formula around: $r(y) = \beta\,(\log \pi^*(y) - \log \pi_{\text{ref}}(y)) + \beta \log Z$.
# So the change in the chef's habits *is* the score, up to a constant, which is the same for all answers to a question:

# %%
implied = beta * (best.log() - reference.log())
print("true scores, as differences:   ", (reward - reward[0]).tolist())
print("read off the policy, likewise: ", [round(x, 4) for x in (implied - implied[0]).tolist()])
assert torch.allclose(implied - implied[0], reward - reward[0], atol=1e-5)

# %% [markdown]
# **5. Put it in.** Only the difference of two scores stands in the loss, so $\beta \log Z$ cancels. No critic is left:
#
# $$\ell = -\log \sigma\Big(\beta\,\big[(\log \pi_w - \log \pi_{\text{ref},w}) - (\log \pi_l - \log \pi_{\text{ref},l})\big]\Big)$$
#
# ### Exercise 2: the loss
# ●●● importance · ●○○ difficulty · 8 minutes
#
# All inputs are log-probabilities of whole answers, shape (batch,). Return one loss for each pair. It must survive margins of ±10,000.
#
# <details><summary>Hint</summary>
#
# σ of a very negative number rounds to 0, and log 0 is −∞. `F.logsigmoid` takes both steps at once.
# </details>


# %% nbgrader={"grade_id": "my-dpo-loss", "solution": true}
def my_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1) -> torch.Tensor:
    """−log σ(β · margin) of each pair."""
    ### BEGIN SOLUTION
    chosen_gain = chosen - ref_chosen
    rejected_gain = rejected - ref_rejected
    margin = beta * (chosen_gain - rejected_gain)
    return -F.logsigmoid(margin)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-my-dpo-loss", "grade": true, "points": 3}
checks.check_dpo_loss(my_dpo_loss)

# %% [markdown]
# Before the first step the policy is the reference, so both gains are 0 and the loss is $-\log \sigma(0) = \log 2$, for every pair and
# every β. If a run of yours starts elsewhere, with dropout and noise off, stop it: there is a bug.

# %%
print(f"the first loss of the run above: {history.losses[0]:.4f}")
assert abs(history.losses[0] - 0.6931) < 1e-3

# %% [markdown]
# ### Exercise 3: the implicit reward
# ●●○ importance · ●○○ difficulty · 6 minutes
#
# Step 4 says what to watch while it trains. Return each pair's two rewards, β · (log π − log π_ref), and the **accuracy**: the share of
# pairs in which chosen's reward is higher than rejected's (a tie is no success). They are for looking at: detach them.
#
# <details><summary>Hint</summary>
#
# A comparison gives booleans; `.float().mean()` makes a share of them.
# </details>


# %% nbgrader={"grade_id": "implicit-rewards", "solution": true}
def implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta=0.1) -> tuple:
    """(chosen_reward, rejected_reward, accuracy), without gradients."""
    ### BEGIN SOLUTION
    chosen_reward = beta * (chosen - ref_chosen).detach()
    rejected_reward = beta * (rejected - ref_rejected).detach()
    accuracy = (chosen_reward > rejected_reward).float().mean()
    return chosen_reward, rejected_reward, accuracy
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-implicit-rewards", "grade": true, "points": 2}
checks.check_implicit_rewards(implicit_rewards)

# %% [markdown]
# ### Exercise 4: the reference pass
# ●●● importance · ●●○ difficulty · 10 minutes
#
# With LoRA the reference is free: the same model, adapters off. But in training, dropout and noise are on, and they must not reach
# the reference. Return its log-probabilities, (batch,), without gradients. Afterwards the model must be in the mode that it came in,
# even if the pass fails. Inside, call the package's `sequence_logps(model, batch)`, which gives (sums, counts).
#
# <details><summary>Hint</summary>
#
# Remember `model.training`, call `model.eval()`, and put it back with `model.train(…)` in a `finally`. Two context managers fit in one
# `with`: `torch.no_grad(), adapters_disabled(model)`.
# </details>


# %% nbgrader={"grade_id": "reference-logps", "solution": true}
def reference_logps(model, batch) -> torch.Tensor:
    """Σ log π_ref of each row; the model is left as it came."""
    ### BEGIN SOLUTION
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), adapters_disabled(model):
            logps, _ = sequence_logps(model, batch)
    finally:
        model.train(training)
    return logps
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-reference-logps", "grade": true, "points": 3}
checks.check_reference_logps(reference_logps)

# %% [markdown]
# ### Exercise 5: a step
# ●●○ importance · ●●○ difficulty · 8 minutes
#
# Put it together: a loss that the training loop can call. `with_prompt(batch, "chosen")` is a batch of questions with their chosen answers;
# "rejected" likewise. Use `sequence_logps`, `adapters_disabled`, and the package's `dpo_loss`. Return the **sum** over the pairs and their number.
#
# <details><summary>Hint</summary>
#
# Four calls of `sequence_logps`: two sides with gradients, and the same two with adapters off and under `torch.no_grad()`.
# </details>


# %% nbgrader={"grade_id": "pair-loss", "solution": true}
def pair_loss(model, batch) -> tuple[torch.Tensor, int]:
    """(Σ DPO loss over the pairs, how many pairs)."""
    ### BEGIN SOLUTION
    sides = [with_prompt(batch, side) for side in ("chosen", "rejected")]
    policy = [sequence_logps(model, side)[0] for side in sides]
    with torch.no_grad(), adapters_disabled(model):
        reference = [sequence_logps(model, side)[0] for side in sides]
    losses = dpo_loss(*policy, *reference)
    return losses.sum(), len(losses)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-pair-loss", "grade": true, "points": 2}
checks.check_pair_loss(pair_loss)

# %% [markdown]
# A curiosity: count the question's tokens too, and `pair_loss` stays the same. Both answers share the question, so it cancels in the
# margin. In a mean per token, as IPO and SimPO take it ([3.1.8](lab-3.1.8-simpo-vs-orpo.ipynb)), it would not.
#
# ## Your code trains
#
# The loss of exercise 2, in the run that you saw: same start, same pairs. `preference_loss` turns a loss on numbers into one for the
# training loop.

# %% tags=["trains"]
STEPS = 6
yours.trains(
    lambda: study.first_steps(my_dpo_loss, STEPS),
    lambda: history.losses[:STEPS],
    what="loss",
    y="DPO loss (nats per pair)",
    caption=f"embedded model from its SFT start, first {STEPS} steps of 4 pairs, seed 0",
)

# %% [markdown]
# ### TRL says the same
#
# `DPOTrainer` makes its batch and computes its log-probabilities; from these, its loss and slopes, and the package's:

# %%
differences = parity.dpo_against_trl(dpo_loss, pairs("train")[:2], tokenizer)
print(", ".join(f"{name} differs by {value:.0e}" for name, value in differences.items()))
assert max(differences.values()) < 1e-5

# %% [markdown]
# And faster: `preference_loss` computes what all rows share once, keeps what the reference said, and lets only answers reach the
# vocabulary. Your step of exercise 5 gives the same gradient. (`spark-ft bench dpo-step` times TRL's whole step beside it.)

# %%
batch = collate_preferences(pairs("train")[:4], tokenizer)
steps = {
    "four passes, as in exercise 5": lab_3_1_7.plain_pair_loss,
    "spark_ft, reference kept": preference_loss(dpo_loss, reference=lab_3_1_7.KEPT),
}
times = study.show_speed(model, batch, steps)

# %% [markdown] tags=["predict"]
# ## Is it true?
#
# **Predict, then run.** The loss asks that chosen gain *more than* rejected. While it trains, what happens to the log-probability of the
# chosen answers?
#
# - it rises
# - it can fall, as long as rejected falls further
# - it stays

# %%
study.show_training(history)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# It can fall; only the difference is in the loss. In this gentle run chosen rises by half a nat, and rejected does most of the work. In the
# run of the bug hunt below, both fall: chosen by some 40 nats, rejected by some 90. Pushing an answer down is easy, and part of what both
# share goes down with it. So a falling loss does not say that good answers become likelier: look at both curves, always.
# </details>

# %% [markdown]
# ### The score, and what keeps it honest
#
# A judge that cannot be charmed: a regular expression that finds metric units, and no others. 50 held-out questions; your run
# answers every second one. Beside it stand
#
# - **the guard**: does the *reference* still find the answer likely? Nonsense fails here,
# - answers that loop or were cut off, and the mean length of those that ended,
# - the KL, how far the answers have moved from the reference.
#
# The start is no raw model: it is a short SFT on *either* answer, drawn at random, merged into the weights. It taught the style, to give quantities at
# all, and no preference. It is the reference.

# %% tags=["experiment"]
live = judged(model, tokenizer, asked[::2])
said = agrees(history.losses[:4], stored.figures(0)["DPO"]["losses"][:4])
study.show_judged(stored, live)
print(said)

# %% [markdown]
# A **seed** fixes all that is random in a run; several show how much luck there is. The **95% interval** is the range that such a method would
# get right 19 times of 20. And the control: the same run with chosen and rejected exchanged in a random half of the pairs.

# %% tags=["experiment"]
study.show_gains(stored)
longer = length_baseline(pairs("train"))
print(f'"take the longer answer" would be right in {longer.percent()} of the pairs')

# %% [markdown]
# Shuffled labels use the same texts and as many steps. So what true labels gain more comes from the labels. And length cannot be what was
# learned: it tells nothing about which answer is chosen.
#
# ### What β does
#
# As a pair's margin grows, σ saturates and the pair stops pulling. β says where.

# %% tags=["knob"]
BETA = 1.0  # turn this: 0.02, 0.1, 5. Where does a pair stop pulling?
study.show_pull(dpo_loss, BETA)

# %% [markdown] tags=["predict"]
# **Predict, then run.** With β fifty times higher, will the answers drift further from the reference, or less far?
#
# - further: a higher β multiplies the gradient
# - less far
# - no difference

# %%
sweep = load("dpo_beta")
study.show_beta_sweep(stored, sweep)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Less far. A larger gradient does not make larger steps, since AdamW divides by its size. But a high β is content with a small
# margin: pairs stop pulling sooner. It is the price of the leash.
# </details>

# %% [markdown]
# ### A bug hunt
#
# A colleague turned the learning rate up, from 1.5e-4 to 1e-3, and reports this. The code runs, the numbers are
# right. What is wrong with the claim? Decide what you would look at, then open the answer.

# %% tags=["bug-hunt"]
fooled = load("dpo_fooled")
theirs = [answer for run in fooled["runs"] for answer in run["figures"]["answers"]]
metric = sum(map(is_metric, theirs)) / len(theirs)
print(f"rate 1e-3: {metric:.0%} of the answers are metric. Our best run so far!")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Nobody read an answer. The judge looks for units, and nothing else, so a model that has fallen apart into grams passes. Any score
# can be fooled like that by a run that pushes hard enough. The next cell reads, and lets the guard look.
# </details>

# %%
for run in fooled["runs"]:
    answer, drift = run["figures"]["answers"][2], run["figures"]["kl"]
    print(f"seed {run['seed']}, KL {drift:.0f} nats:", answer[:120].replace("\n", " "))
print(f"after DPO, KL {stored.figures(0)['DPO']['kl']:.1f} nats per answer")
study.show_guard(stored, fooled)

# %% [markdown]
# Two of the three runs write gibberish, and the guard stops most of it. The third writes whole sentences without
# sense, and most of them pass. What gives it away is its KL, many times that of DPO. So never trust one number alone.
#
# ## On a DGX Spark
#
# A second copy of the model as reference would double the weights. With adapters it costs one more pass and no memory. Planned by running the
# step itself on tensors without memory:

# %%
peaks = study.show_plans()

# %% [markdown]
# The paper's own default, for full fine-tuning of models of billions of weights, is β = 0.1 and a rate of 1e-6 (appendix B). The 1.5e-4 above suits LoRA
# on 135 million weights. Tune the rate first, on held-out questions, and read samples.
#
# ## Explain it back

# %% [markdown] nbgrader={"grade_id": "explain-dpo", "solution": true, "grade": true, "points": 0}
# In three sentences: why does DPO need no critic, why must it start from a model that already answers in the right form, and what would
# you show beside a score?
#
# ### BEGIN SOLUTION
# The best policy for a reward and the reward itself are two views of one thing: β · (log π − log π_ref) is the reward up to a constant that cancels
# within a pair, so training the policy on choices trains the critic implicitly. Pairs only say which of two forms is better; what both
# forms share, such as giving quantities at all, they cannot teach. Beside a score: an interval over seeds, a control with shuffled labels, lengths, the drift from
# the reference, a guard that nonsense fails, and a few answers that somebody has read.
# ### END SOLUTION

# %% tags=["experiment"]
gained = study.gain(stored)
headline(
    {
        "points gained, stored seeds": round(gained.value, 1),
        "interval's low end": round(gained.low, 1),
        "metric answers, this run %": 100 * score(live).value,
        "pass the guard %": 100 * score(live, "sound").value,
        "KL, nats per answer": live["kl"],
        "times as fast as four passes": max(times.values()) / min(times.values()),
        "8B QLoRA pair, planned peak GB": peaks["Qwen3-8B qlora"],
    }
)
