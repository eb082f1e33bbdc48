# %% [markdown]
# # 3.1.3 When does noise help?
#
# **Time**: about 55 minutes.
#
# ## What you will make
#
# **NEFTune** ([Jain et al. 2023](https://arxiv.org/abs/2310.05914)), noisy embeddings for fine-tuning: five lines that shake a model's words
# in training, and a switch that is always off again afterwards. Then you look for the places where noise must not be, and find out
# when it is of any use.
#
# ## What you should know first
#
# - An adapter and how it trains ([3.1.1](lab-3.1.1-lora-theory.ipynb), [3.1.4](lab-3.1.4-8b-lora-finetuning.ipynb)).
# - Python's `with`: what a block needs is set up at its start and cleared away at its end.
#
# > **Embedding**: the row of numbers that stands for a token, here 576 of them. The model computes with these, not with letters.
# > **Norm**: how long such a row is as an arrow, the square root of the sum of its squares.
#
# ## The picture
#
# You practise a piece on the guitar in a silent room, always on the same chair. You get it perfect, and can play it only there. Now
# practise in a café. Cups clatter, and you have to hold on to the tune and not to every accident of the room. On stage, in silence,
# the tune is still there.
#
# The room is the exact wording of your texts. A small set that is read several times is soon known by heart. NEFTune adds clatter to
# the embeddings $e$, in training and only then:
#
# $$e' = e + \varepsilon, \qquad \varepsilon \sim U\!\left(-\frac{\alpha}{\sqrt{L d}},\; +\frac{\alpha}{\sqrt{L d}}\right)$$
#
# A text of $L$ tokens has $L \times d$ numbers. Each gets its own random number, all equally likely between minus and plus a bound.
# $\alpha$ (alpha) says how loud the café is. The paper uses 5 to 15.

# %%
import math
from contextlib import contextmanager

import torch

from spark_ft import (
    adapters_disabled,
    neftune,
    neftune_noise,
    sequence_logps,
    sft_batches,
    sft_loss,
    train,
)
from spark_ft.lab import headline, parity, yours
from spark_ft.lab.checks import lab_3_1_3 as checks
from spark_ft.lab.experiments import agrees, load
from spark_ft.lab.experiments import lab_3_1_3 as experiment
from spark_ft.lab.study import lab_3_1_3 as study

# %% [markdown]
# ## It works
#
# 48 kitchen orders, a model with a fresh adapter, 20 steps in a café. Then the same four tickets go through the model again and again.

# %%
tickets, held_out = experiment.tickets(seed=0)
model, tokenizer = study.fresh_model()
batches = sft_batches(tickets, tokenizer, batch_size=4)
with neftune(model, alpha=5.0):
    history = train(model, batches, sft_loss, study.SHORT)
study.show_passes(model, batches(0))

# %% [markdown]
# In training every pass is shaken in another way. In evaluation, and after the block, every pass gives the same number.
#
# How loud is that? The next cell shakes an order that the model has never seen, and lets it write the ticket. (In use nobody would shake.)

# %% tags=["knob"]
ALPHA = 15  # turn this: 5, 25, 45. Which words get lost first?
study.show_shaken(model, tokenizer, held_out[1], ALPHA)

# %% [markdown]
# How far a given $\alpha$ shakes a word depends on how long *this model's* embeddings are. Look before you choose.
#
# ## Build it
#
# ### Exercise 1: the five lines
# ●●● importance · ●○○ difficulty · 8 minutes
#
# Return the embeddings with noise on them. `embeddings` is (batch, seq, width). Take `seq` for $L$, as the transformers library does. With
# $\alpha$ = 0 return what came in *before* any random number is drawn. Leave the tensor that came in as it is.
#
# <details><summary>Hint</summary>
#
# `torch.empty_like(embeddings).uniform_(low, high)` has the same shape and type, filled from the uniform distribution.
# </details>


# %% nbgrader={"grade_id": "noisy-embeddings", "solution": true}
def noisy_embeddings(embeddings: torch.Tensor, alpha: float) -> torch.Tensor:
    """Embeddings (batch, seq, width) plus noise from U(−α/√(L·d), +α/√(L·d))."""
    ### BEGIN SOLUTION
    if alpha == 0:
        return embeddings
    length, width = embeddings.shape[1:]
    bound = alpha / math.sqrt(length * width)
    noise = torch.empty_like(embeddings).uniform_(-bound, bound)
    return embeddings + noise
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-noisy-embeddings", "grade": true, "points": 2}
checks.check_noisy_embeddings(noisy_embeddings)

# %% [markdown]
# Why so careful about $\alpha$ = 0? It is the baseline that you compare with. Three short runs, with dropout:

# %%
study.show_zero(tickets)

# %% [markdown]
# Whoever draws noise and multiplies it by zero moves the generator, and every later dropout mask is another one. Then the baseline is
# not the run without NEFTune, but one like it.

# %% [markdown] tags=["predict"]
# ### Why √(L·d)?
#
# A number drawn evenly between $-b$ and $b$ has the mean square $b^2/3$, and there are $L \cdot d$ of them. So the squared norm of a
# whole text's noise is about $L d \, b^2 / 3$. With $b = \alpha/\sqrt{L d}$ everything cancels but $\alpha$: the norm is $\alpha/\sqrt 3$.
#
# **Predict, then run.** A text gets 64 times as long, with the same $\alpha$. What happens to a *single word* in it?
#
# - it is shaken as before
# - it is shaken 8 times less
# - it is shaken 64 times less

# %%
study.show_norms()

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# 8 times less. What stays the same is the noise of the *whole text*. It is shared out among more words, and norms add up by their squares.
# </details>

# %% [markdown]
# ### Which L?
#
# A batch is a rectangle: short texts are filled up with padding. Is $L$ the length of the rectangle, as in transformers, or the length of
# the text, as in the authors' code? Nobody sees the padding's noise. But look at what a text's own tokens get:

# %%
study.show_padding(model, tokenizer, tickets)

# %% [markdown]
# With the rectangle's length, how much a text is shaken depends on *who else is in its batch*.
#
# ### Exercise 2: true lengths
# ●●○ importance · ●●○ difficulty · 10 minutes
#
# `lengths` (batch,) says how many tokens each text has; its padding stands on the right. Scale each text's noise by its own length, and leave
# the padding's embeddings as they are.
#
# <details><summary>Hint: a mask</summary>
#
# `torch.arange(seq) < lengths[:, None]` is (batch, seq): true on a text's own tokens. `[..., None]` gives it a third dimension.
# </details>
# <details><summary>Hint: one bound per text</summary>
#
# Draw from −1 to 1, then multiply by the bounds in the shape (batch, 1, 1): `bounds[:, None, None]`.
# </details>


# %% nbgrader={"grade_id": "true-length-noise", "solution": true}
def true_length_noise(embeddings, alpha: float, lengths: torch.Tensor) -> torch.Tensor:
    """Embeddings plus U(−α/√(length·d), +α/√(length·d)) on each text's own tokens."""
    ### BEGIN SOLUTION
    if alpha == 0:
        return embeddings
    seq, width = embeddings.shape[1:]
    bounds = alpha / (lengths * width).sqrt()
    real = torch.arange(seq) < lengths[:, None]
    noise = torch.empty_like(embeddings).uniform_(-1, 1)
    return embeddings + noise * bounds[:, None, None] * real[..., None]
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-true-length-noise", "grade": true, "points": 2}
checks.check_true_length_noise(true_length_noise)

# %% [markdown]
# ### Exercise 3: on, and always off again
# ●●● importance · ●●○ difficulty · 15 minutes
#
# The noise belongs between the embedding layer and the rest of the model. A **forward hook** is a function that a layer calls with its
# output. What the hook returns takes the output's place. Hooks have one bad habit: they stay. If you forget one, the model that you
# evaluate, save or serve sits in a café.
#
# So write a **context manager**. Inside `with embedding_noise(model, 5.0):` there is noise. After it there is none, even if the block
# ends with an error. And inside, there is noise only where something is trained, that is, where both hold:
#
# - the embedding layer is in training mode (`layer.training`),
# - gradients are on (`torch.is_grad_enabled()`).
#
# Draw with `neftune_noise(embeddings, alpha)`. Find the layer with `model.get_input_embeddings()`, and leave its weight alone: noise that
# gets in there stays for ever.
#
# <details><summary>Hint: the frame</summary>
#
# `handle = layer.register_forward_hook(hook)` puts `hook(layer, inputs, output)` on, `handle.remove()` takes it off. What stands before
# `yield` happens on entering the block, what stands after it on leaving.
# </details>
# <details><summary>Hint: errors</summary>
#
# An error inside the block comes out of the `yield`. Then only a `finally` is still carried out.
# </details>


# %% nbgrader={"grade_id": "embedding-noise", "solution": true}
@contextmanager
def embedding_noise(model: torch.nn.Module, alpha: float):
    """Inside the block the model trains on noisy embeddings."""
    ### BEGIN SOLUTION
    layer = model.get_input_embeddings()

    def hook(layer, inputs, output):
        trains = layer.training and torch.is_grad_enabled()
        return neftune_noise(output, alpha) if trains else output

    handle = layer.register_forward_hook(hook)
    try:
        yield model
    finally:
        handle.remove()
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-embedding-noise", "grade": true, "points": 3}
checks.check_embedding_noise(embedding_noise)

# %% nbgrader={"grade_id": "check-parity", "grade": true, "points": 1}
checks.check_parity(noisy_embeddings, embedding_noise)

# %% [markdown]
# That was your noise beside the hook of transformers, which TRL uses too, from the same state of the random generator.
#
# ### A bug hunt
#
# Preference methods such as DPO ([3.1.7](lab-3.1.7-dpo-training.ipynb)) compare the model with a **reference**: the model as it was before. With
# adapters the reference costs nothing, since it is the same model with the adapter off. Here a colleague trains with the hook of
# transformers. The next cell asks for the reference's log-probabilities of four answers, three times. What is wrong?

# %% tags=["bug-hunt"]
answers = study.four_answers(tokenizer)
hook = study.activate_neftune(model.train(), 5.0)  # transformers' own
for _ in range(3):
    with torch.no_grad(), adapters_disabled(model):
        print([round(logp, 1) for logp in sequence_logps(model, answers)[0].tolist()])
study.deactivate_neftune(model, hook)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# A reference is a yardstick, and this one has another length at every call. That hook asks only whether the layer is in training mode, and in the
# middle of training it is. We met the bug in TRL 1.16 with DPO, an adapter and α = 5: the first losses read 0.849, 0.715 and 0.698, where a new
# adapter must give 0.693. The check that finds it: with NEFTune on and off, the reference must be the same to the last bit.
# </details>

# %% [markdown]
# ### Exercise 4: a clean reference
# ●●○ importance · ●●○ difficulty · 8 minutes
#
# Your own hook stays silent without gradients. But the hook may be somebody else's. So write a reference that no such hook can spoil:
# `sequence_logps(model, batch)[0]` with adapters off, no gradients, and the model *out of training mode* meanwhile. Leave everything as you
# found it, also after an error: a model that was in training trains on, and one in eval mode stays there.
#
# <details><summary>Hint</summary>
#
# Remember `model.training` first. `model.eval()` and `model.train(mode)` switch all layers. Put the second into a `finally`.
# </details>


# %% nbgrader={"grade_id": "reference-logps", "solution": true}
def reference_logps(model, batch) -> torch.Tensor:
    """The reference's log-probability of each answer, untouched by any noise of training."""
    ### BEGIN SOLUTION
    mode = model.training
    model.eval()
    try:
        with torch.no_grad(), adapters_disabled(model):
            return sequence_logps(model, batch)[0]
    finally:
        model.train(mode)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-reference-logps", "grade": true, "points": 2}
checks.check_reference_logps(reference_logps)

# %%
scatter = study.show_references(model, answers, reference_logps)

# %% [markdown]
# ## Your code trains
#
# Your context manager around the run that you saw first: the same model, orders, 20 steps, and the same random numbers.

# %% tags=["trains"]
yours.trains(
    lambda: study.train_noisy(embedding_noise, batches),
    lambda: history,
    what="noise",
    y="loss (nats per token)",
    caption="embedded model, rank 16, α = 5, 20 steps of 4 kitchen tickets, seed 0",
)

# %% [markdown]
# From here on the lab uses the package's `neftune`. It knows two more things: an adapter that is switched off (then the pass is a
# reference's), and texts that are packed into one row without padding.
#
# ## Is it true?
#
# A café is of use to somebody who plays one piece too often. So take sets that are small enough to be learned by heart, 48 rows, and read
# them four times:
#
# - **kitchen tickets**, where one answer is right;
# - **answers to cooking questions**, one to three free sentences.
#
# Both get α = 0, 5, 15 and 45 at a peak rate of 0.002, three seeds each. That is a good rate for the tickets. For the answers it is too hot; on
# other rows 0.0005 was better, so they get that too. All losses are measured without noise, on 64 rows that training did not have. The runs are
# stored, and the first losses of yours must be theirs.
#
# > **Seed**: the number that fixes all that is random in a run.
# > **95% interval**: a range made by a method that contains the true value 19 times out of 20.

# %% tags=["experiment"]
stored = {"tickets": load("neftune_tickets"), "answers": load("neftune_answers")}
for alpha in (0, 15):
    _, first = experiment.tune_noisy(tickets, alpha, seed=0, first=5)
    theirs = stored["tickets"].figures(0)[str(alpha)]["losses"]
    print(f"α = {alpha}:", agrees(first.losses, theirs))
study.show_by_heart(stored)

# %% [markdown]
# Noise makes learning by heart harder. Is that of any use? For each seed, subtract the held-out loss without noise from the one with noise.

# %% tags=["experiment"]
changes = study.show_changes(stored)

# %% [markdown]
# Every dot is a seed. On the tickets loud noise hides what is to be copied: a table number that is not heard cannot be written down. On the answers, at
# the hot rate, noise helps. Their *length* scatters more from seed to seed than from α to α.

# %% [markdown] tags=["predict"]
# ### Against what?
#
# A method that mends overfitting should be held against other things that mend it. The simplest is a gentler learning rate.
#
# **Predict, then run.** What does noise do on top of the gentle rate?
#
# - it helps further
# - nothing that three seeds can show
# - it harms

# %% tags=["experiment"]
against = study.show_gentle(stored["answers"])

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Nothing that three seeds can show. And the gentle rate *without* noise is better than noise at the hot one. If you compare NEFTune with a badly
# tuned baseline, you measure how badly it was tuned.
# </details>

# %% [markdown]
# ### The control: a café in which nobody can hear
#
# If noise never reached the model, none could do harm. So turn it up until the words are drowned, α = 150. That must teach nothing.

# %% tags=["experiment"]
drowned = study.show_drowned(stored["tickets"])

# %% [markdown]
# ### What 29.79 → 64.69 measured
#
# These are the most quoted numbers of the paper. *Model and data*: LLaMA-2-7B on Alpaca, tens of thousands of instructions, not 48 rows. *Measure*:
# AlpacaEval, where GPT-4 reads two answers and says which is better. *What changed*: how it answers. With NEFTune that model writes longer answers, and
# such judges prefer longer answers, which is why later versions of the benchmark correct for length
# ([Dubois et al. 2024](https://arxiv.org/abs/2404.04475)). *What did not*: what it knows. On the Open LLM Leaderboard's tasks the authors report the
# same performance with and without. Our sets have no such judge, so this lab neither confirms nor contradicts those numbers.
#
# ## On a DGX Spark
#
# ```python
# with neftune(model, alpha=5.0):
#     history = train(model, batches, sft_loss, config)
# ```
#
# The same two lines hold for 8B, with LoRA or QLoRA. The noise is one addition per number. This package pays one more price: rows that begin
# alike, with the same system prompt, share that beginning, and shaken rows cannot.

# %%
study.show_shared(tickets)

# %% [markdown]
# `neftune(model, 5.0, true_lengths=True)` scales by true lengths. We have not measured NEFTune on a Spark.
#
# ## Explain it back

# %% [markdown] nbgrader={"grade_id": "explain-noise", "solution": true, "grade": true, "points": 0}
# **For a friend who plays the guitar: when can noise in training help, and when can it not?**
#
# ### BEGIN SOLUTION
# It can help where the alternative is learning by heart: few texts, read often. Then each reading is a little different, and what stays the same in all
# of them, the sense, is what can be learned. It cannot add knowledge. Where every word of the input matters, as in copying a table number from an order,
# loud noise hides just what is to be learned. And reading less greedily can do the same job as noise.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-reference", "solution": true, "grade": true, "points": 0}
# **Why is noise in the policy all right, and noise in the reference a bug?**
#
# ### BEGIN SOLUTION
# The policy is what is being trained, and practising amid noise is the idea. The reference is the yardstick that it is measured with. A yardstick has to
# have the same length every time; with noise each comparison is made with another one.
# ### END SOLUTION

# %% tags=["experiment"]
apart = parity.neftune_against_transformers(neftune_noise, neftune)
headline(
    {
        **{f"held-out loss, {name}": told for name, told in {**changes, **against}.items()},
        "tickets exact, words drowned (%)": drowned,
        "against transformers, at most": max(apart.values()),
        "the bug: a reference scatters by (nats)": scatter,
    }
)
