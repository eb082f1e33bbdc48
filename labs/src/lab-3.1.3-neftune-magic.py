# %% [markdown]
# # 3.1.3 When does noise help?
#
# **Time**: about 80 minutes with the exercises; the notebook itself runs in under two minutes on two CPU cores.
#
# When you are done you can
#
# - write NEFTune in five lines, and say why it divides by √(L·d),
# - switch it on for a block of code so that it is always off again afterwards, whatever happens,
# - find it where it must not be: in evaluation, and in a reference model,
# - say what the famous 29.79 → 64.69 measured, and what a few seeds of your own can and cannot show.
#
# Everything here happens on a real language model of 135 million parameters that came with the package. No download.

# %% [markdown]
# ## A guitar in a café
#
# You practise a piece in a silent room, always on the same chair. You get it perfect, and can play it only there. Now practise in
# a café. Cups clatter, people talk, and you have to hold on to the tune and not to every accident of the room. On stage, in
# silence, the tune is still there.
#
# The room is the exact wording of your training texts. A small set, read several times, is soon known by heart. **NEFTune**, noisy
# embeddings for fine-tuning ([Jain et al. 2023](https://arxiv.org/abs/2310.05914)), adds clatter: in training, and only then, it shakes
# the numbers that stand for each token.
#
# $$e' = e + \varepsilon, \qquad \varepsilon \sim U\!\left(-\frac{\alpha}{\sqrt{L d}},\; +\frac{\alpha}{\sqrt{L d}}\right)$$
#
# In words: a text of $L$ tokens has become $L \times d$ numbers, $d$ for each token, the **embeddings**. Each of them gets its own
# random number, all equally likely between minus and plus a bound. $\alpha$ (alpha) says how loud the café is. The paper uses 5 to 15.
#
# That is the whole method. The question is **when it helps**. First see what is being shaken, on a waiter's note:

# %%
import inspect
import math
from contextlib import contextmanager, nullcontext

import torch
from torch.nn import functional as F

from spark_ft import (
    AdapterConfig,
    TrainConfig,
    adapters_disabled,
    add_adapters,
    collate_preferences,
    collate_sft,
    load_model,
    mean_interval,
    neftune,
    neftune_noise,
    paired_difference,
    read_records,
    render,
    sequence_logps,
    sft_loss,
    train,
    with_prompt,
)
from spark_ft.embedded import EMBEDDED
from spark_ft.files import ROOT
from spark_ft.lab import headline, plots
from spark_ft.lab.checks import lab_3_1_3 as checks
from spark_ft.lab.experiments import agrees, load
from spark_ft.lab.experiments import lab_3_1_3 as experiment
from spark_ft.methods.neftune import draws_noise
from spark_ft.scoring import packed_row

model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
model.cpu()
tickets, held_out_tickets = experiment.tickets(seed=0)
prompt_ids, completion_ids = render(tickets[0], tokenizer)
tokens = len(prompt_ids) + len(completion_ids)
with torch.no_grad():
    embeddings = model.get_input_embeddings()(torch.tensor([prompt_ids + completion_ids]))
print(tickets[0]["prompt"], "\n→", tickets[0]["completion"])
print(f"\n{tokens} tokens, each {embeddings.shape[-1]} numbers; a token's numbers have a norm of {embeddings.norm(dim=-1).mean():.2f} on average")
_ = torch.manual_seed(0)
for alpha in (5, 15, 45, 150):
    noise = neftune_noise(embeddings, alpha) - embeddings
    print(f"alpha {alpha:>3}: the noise on a token has a norm of {noise.norm(dim=-1).mean():.2f}")

# %% [markdown]
# (The **norm** of some numbers is the length of the arrow that they make: the square root of the sum of their squares.) Hold the noise's norms against
# the token's. They say how loud the café is *for this model*: what $\alpha$ = 5 means depends on how large a model's embeddings are.
#
# ## Build it
#
# ### Exercise 1: the five lines
# ●○○ · 8 minutes
#
# Return the embeddings with noise on them. `embeddings` is (batch, seq, width): take `seq` for $L$, as the transformers library does. With
# $\alpha$ = 0 return what came in, *before* any random number is drawn; a cell below shows what goes wrong otherwise. Leave
# the tensor that came in as it is.
#
# <details><summary>Hint: drawing</summary>
#
# `torch.empty_like(embeddings).uniform_(low, high)` gives a tensor of the same shape and type, filled from the uniform distribution.
# </details>

# %% nbgrader={"grade_id": "noisy-embeddings", "solution": true}
def noisy_embeddings(embeddings: torch.Tensor, alpha: float) -> torch.Tensor:
    """Embeddings (batch, seq, width) plus noise from U(−α/√(L·d), +α/√(L·d))."""
    ### BEGIN SOLUTION
    if alpha == 0:
        return embeddings
    length, width = embeddings.shape[1:]
    bound = alpha / math.sqrt(length * width)
    return embeddings + torch.empty_like(embeddings).uniform_(-bound, bound)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-noisy-embeddings", "grade": true, "points": 2}
checks.check_noisy_embeddings(noisy_embeddings)

# %% [markdown]
# ## Why √(L·d)?
#
# A number drawn evenly between $-b$ and $b$ has the mean square $b^2/3$. There are $L \cdot d$ of them. So the squared norm of a whole text's
# noise is about $L d \cdot b^2 / 3$, and with $b = \alpha/\sqrt{L d}$ everything but $\alpha$ cancels:
#
# $$\lVert \varepsilon \rVert \approx \frac{\alpha}{\sqrt 3}$$
#
# A long text and a short one, a wide model and a narrow one: all are shaken by the same amount in all. The next cell draws noise
# and measures, with the right bound and with one root forgotten.

# %%
_ = torch.manual_seed(0)
ALPHA, DRAWS = 5.0, 20


def measured_norm(length: int, width: int, bound: float) -> float:
    """The mean norm of a text's noise from U(−bound, bound)."""
    return torch.empty(DRAWS, length * width).uniform_(-bound, bound).norm(dim=1).mean().item()


lengths, widths = [8, 32, 128, 512], [64, 256, 1024, 4096]
theory = ALPHA / math.sqrt(3)
fig, (left, right) = plots.figure(
    f"Divided by √(L·d), the noise of a whole text has one norm, {theory:.2f}, for all lengths and widths",
    y="norm of a text's noise",
    columns=2,
    width=9.5,
    caption=f"α = {ALPHA:g}. Points: mean of {DRAWS} draws. Lines: theory, α/√3 times what was forgotten. Left d = 576, right L = 64.",
)
worst = 0.0
for ax, sizes, forgotten in ((left, lengths, "√L"), (right, widths, "√d")):
    for label, role, grows in (("α / √(L·d)", "yours", False), (f"{forgotten} forgotten", "package", True)):
        theirs, points = [], []
        for size in sizes:
            length, width = (size, 576) if ax is left else (64, size)
            bound = ALPHA / math.sqrt(length * width) * (math.sqrt(size) if grows else 1)
            points.append(measured_norm(length, width, bound))
            theirs.append(theory * (math.sqrt(size) if grows else 1))
        ax.plot(sizes, theirs, **{**plots.LINE[role], "marker": ""}, label=label)
        ax.plot(sizes, points, **{**plots.LINE[role], "linestyle": ""})
        worst = max(worst, *(abs(p / t - 1) for p, t in zip(points, theirs, strict=True)))
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.legend(fontsize=8)
left.set_xlabel("tokens of the text, L")
right.set_xlabel("numbers a token, d")
plots.show(
    fig,
    alt=f"Two panels on logarithmic axes. With α/√(L·d) the measured norm stays at {theory:.2f} from {lengths[0]} to {lengths[-1]} tokens "
    f"and from {widths[0]} to {widths[-1]} numbers a token. With √L forgotten it grows with the root of L, with √d forgotten with the root of d.",
)
print(f"measured and theory differ by at most {worst:.1%}")
assert worst < 0.05
for length in (lengths[0], lengths[-1]):
    print(f"{length:>4} tokens: {theory:.2f} in all, so {theory / math.sqrt(length):.3f} on each token")

# %% [markdown]
# **What you should see.** Points on lines; two flat, two rising. And one thing that the formula hides, in the last two printed rows: what is the same for all
# texts is the noise of the *whole text*. So a word in a long text is shaken less than a word in a short one.
#
# ## Which L? The padding question
#
# A batch is a rectangle. Short texts are filled up with padding until they are as long as the longest. Is $L$ the length of the
# rectangle or of the text? transformers takes the rectangle. The authors' code takes each text's own length and leaves
# the padding clean. Does it matter? Padding is masked out, so nobody sees its noise. But see what a text's own tokens get:

# %%
_ = torch.manual_seed(0)
by_length = sorted(tickets, key=lambda row: len(row["prompt"]))
batch = collate_sft([by_length[0], by_length[24], by_length[-1]], tokenizer)
own = batch["attention_mask"].sum(1)
real = batch["attention_mask"].bool()
with torch.no_grad():
    embeddings = model.get_input_embeddings()(batch["input_ids"])
padded_norms, true_norms = torch.zeros(3), torch.zeros(3)
for _ in range(DRAWS):
    for norms, given in ((padded_norms, None), (true_norms, own)):
        noise = (neftune_noise(embeddings, ALPHA, given) - embeddings) * real[..., None]
        norms += noise.flatten(1).norm(dim=1) / DRAWS
print("norm of the noise on a text's own tokens, alpha 5")
print(f"{'tokens':>8}{'padded to':>11}{'L padded':>10}{'L its own':>11}")
for i in range(3):
    print(f"{own[i]:>8}{real.shape[1]:>11}{padded_norms[i]:>10.2f}{true_norms[i]:>11.2f}")
print(f"with the padded length the shortest text gets {1 - padded_norms[0] / padded_norms[2]:.0%} less noise than the longest")

# %% [markdown]
# With the padded length, how much a text is shaken depends on *who else is in its batch*: a text that fills a share $s$ of the
# rectangle gets $\sqrt s$ of the noise. Put one long document among short notes, and the notes hardly feel a thing. With true lengths it
# depends on the text and $\alpha$ alone.
#
# ### Exercise 2: true lengths
# ●●○ · 10 minutes
#
# As exercise 1, but `lengths` (batch,) says how many tokens each text has; its padding stands on the right. Scale each text's noise by
# its own length, and leave the padding's embeddings as they are.
#
# <details><summary>Hint: a mask</summary>
#
# `torch.arange(seq) < lengths[:, None]` is (batch, seq): true on a text's own tokens.
# </details>
# <details><summary>Hint: one bound for each text</summary>
#
# Draw from −1 to 1, then multiply by the bounds. For that they need the shape (batch, 1, 1): `bounds[:, None, None]`.
# </details>

# %% nbgrader={"grade_id": "true-length-noise", "solution": true}
def true_length_noise(embeddings: torch.Tensor, alpha: float, lengths: torch.Tensor) -> torch.Tensor:
    """Embeddings (batch, seq, width) plus noise from U(−α/√(length·d), +α/√(length·d)) on each text's own tokens."""
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
# ●●○ · 15 minutes
#
# The noise belongs between the embedding layer and the rest of the model. A **forward hook** is a function that a layer calls with
# its output; what the hook returns takes the output's place. Hooks have one bad habit: they stay. Forget to remove one, and the
# model that you evaluate, save or serve is a model in a café.
#
# So write a **context manager**: inside `with embedding_noise(model, 5.0):` there is noise, after it there is none, even if the block
# ends with an error. And inside the block, noise only where something is trained, that is, where both hold:
#
# - the embedding layer is in training mode (`layer.training`),
# - gradients are on (`torch.is_grad_enabled()`).
#
# Draw the noise with the package's `neftune_noise(embeddings, alpha)`. Find the layer with `model.get_input_embeddings()`, and never touch
# its weight: noise that gets in there stays for ever.
#
# <details><summary>Hint: the frame</summary>
#
# `handle = layer.register_forward_hook(hook)` puts it on, with `hook(layer, inputs, output)`; `handle.remove()` takes it off. In a
# function under `@contextmanager`, what stands before `yield` happens on entering the block, what stands after it on leaving.
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
        return neftune_noise(output, alpha) if layer.training and torch.is_grad_enabled() else output

    handle = layer.register_forward_hook(hook)
    try:
        yield model
    finally:
        handle.remove()
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-embedding-noise", "grade": true, "points": 3}
checks.check_embedding_noise(embedding_noise)

# %% [markdown]
# ## The package's version
#
# `neftune` asks one question more than yours: is an adapter switched off? Then the pass is a reference's, and gets no noise either.
# And it knows texts that are packed into one row without padding, which is how this package trains on a CPU: each gets noise by its own
# length.

# %%
print(inspect.getsource(draws_noise))

# %% [markdown]
# ## Yours, the package's, transformers'
#
# `SFTConfig(neftune_noise_alpha=5)` in TRL, and `TrainingArguments` in transformers, put transformers' own hook onto the embedding layer.
# Noise can be compared like anything else: set the generator to the same state, and the same numbers must come out. The cell compares
# the noise itself, then the loss of a small model and the gradient of its adapters, in padded mode.

# %% nbgrader={"grade_id": "check-parity", "grade": true, "points": 1}
checks.check_parity(noisy_embeddings, embedding_noise)

# %%
from spark_ft.lab.parity import neftune_against_transformers

_ = torch.manual_seed(0)
parity = neftune_against_transformers(neftune_noise, neftune)
print("spark_ft against transformers:", ", ".join(f"{name} {difference:g}" for name, difference in parity.items()))
assert not any(parity.values()), "from one state of the generator the two should agree to the last bit"

# %% [markdown]
# Zero means: to the last bit.
#
# **And α = 0?** The baseline that you compare with must be the run without NEFTune, and not one like it. Training draws other random
# numbers too, for dropout here. If α = 0 draws noise and multiplies it by zero, each later dropout mask is another one. Three short
# runs: no NEFTune, the package's at α = 0, and one that draws and adds nothing.

# %%
@contextmanager
def draws_and_adds_nothing(model):
    """α = 0, done wrong."""
    layer = model.get_input_embeddings()
    handle = layer.register_forward_hook(lambda layer, inputs, output: output + 0 * torch.empty_like(output).uniform_(-1, 1))
    try:
        yield model
    finally:
        handle.remove()


def short_run(noise) -> list[float]:
    """The losses of two steps on two tickets, with an adapter that has dropout, inside the block `noise(model)`."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
    torch.manual_seed(0)
    add_adapters(model, AdapterConfig(rank=4, dropout=0.2))
    batch = collate_sft(tickets[:2], tokenizer)
    with noise(model):
        return train(model, lambda step: batch, sft_loss, TrainConfig(steps=2, learning_rate=2e-3, progress=False)).losses


runs = {
    "no NEFTune": short_run(nullcontext),
    "alpha = 0": short_run(lambda model: neftune(model, 0)),
    "draws, adds nothing": short_run(draws_and_adds_nothing),
}
for name, losses in runs.items():
    print(f"{name:<22}" + "  ".join(f"{loss:.6f}" for loss in losses))
assert runs["alpha = 0"] == runs["no NEFTune"], "alpha = 0 must be the baseline, bit for bit"
assert runs["draws, adds nothing"] != runs["no NEFTune"]

# %% [markdown]
# ## Find the bug: noise in the reference
#
# Preference methods such as DPO (lab 3.1.7) compare the model in training, the **policy**, with a **reference**: the model as it was before.
# For each answer they ask how much likelier the policy makes it than the reference does. With adapters the reference costs nothing: same
# model, adapter off, no gradients. Here is how that is usually written:

# %%
def usual_reference(model, batch) -> torch.Tensor:
    """The reference's log-probability of each answer in the batch."""
    with torch.no_grad(), adapters_disabled(model):
        return sequence_logps(model, batch)[0]


# %% [markdown]
# Now somebody turns NEFTune on. transformers' hook asks one thing only: is the embedding layer in training mode? Call the reference a few times in the
# middle of training and see. (Padded batches, as TRL computes them; four pairs of cooking answers; a fresh adapter, so policy and reference
# are the same model.)

# %%
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
model.cpu().set_attn_implementation("sdpa")  # one padded row a text
_ = torch.manual_seed(0)
add_adapters(model, AdapterConfig(rank=16)).train()
pairs = read_records(ROOT / "data" / "kitchen_preferences" / "train.jsonl", "preference")[:4]
batch = collate_preferences(pairs, tokenizer)
chosen, rejected = with_prompt(batch, "chosen"), with_prompt(batch, "rejected")


def logps(function) -> torch.Tensor:
    """(2, 4): log-probabilities of the chosen and the rejected answers."""
    return torch.stack([function(model, chosen), function(model, rejected)])


def policy(model, batch) -> torch.Tensor:
    return sequence_logps(model, batch)[0].detach()


def dpo_start(policy: torch.Tensor, reference: torch.Tensor) -> float:
    """DPO's loss at β = 0.1: −log σ(β · (how much more the policy prefers the chosen answer than the reference does))."""
    more = (policy[0] - policy[1]) - (reference[0] - reference[1])
    return -F.logsigmoid(0.1 * more).mean().item()


clean = logps(usual_reference)
start = dpo_start(logps(policy), clean)
print(f"no noise: the loss starts at {start:.4f}; ln 2 is {math.log(2):.4f}")
assert abs(start - math.log(2)) < 1e-4

hook = activate_neftune(model, 5.0)
noisy_policies = [logps(policy) for _ in range(4)]
noisy_references = [logps(usual_reference) for _ in range(4)]
deactivate_neftune(model, hook)
with neftune(model, 5.0):
    package_reference = logps(usual_reference)
assert torch.equal(package_reference, clean), "the reference must not depend on the noise, not by a bit"

shift = torch.stack(noisy_references)[:, 0] - clean[0]
fig, ax = plots.figure(
    "With transformers' hook on, a reference differs from call to call",
    x="pair",
    y="log-probability of the chosen answer,\nless the clean one (nats)",
    caption="embedded model, α = 5, fresh adapter switched off, no gradients, training mode; 4 calls on the same 4 pairs.",
)
for call in range(len(shift)):
    ax.plot(range(1, 5), shift[call], **{**plots.LINE["package"], "linestyle": ""}, label=None if call else "usual reference, transformers' hook")
ax.plot(range(1, 5), (package_reference - clean)[0], **{**plots.LINE["yours"], "linestyle": ""}, label="the same, spark_ft's neftune: 0 at every call")
ax.set_xticks(range(1, 5))
ax.legend(fontsize=8)
plots.show(
    fig,
    alt=f"For four pairs, four calls of the usual reference scatter between {shift.min():+.1f} and {shift.max():+.1f} nats around the clean value; "
    "with spark_ft's neftune every point is at zero.",
)
losses = {
    "noise in the policy alone": [dpo_start(p, clean) for p in noisy_policies],
    "noise in both: the bug": [dpo_start(p, r) for p, r in zip(noisy_policies, noisy_references, strict=True)],
}
for name, values in losses.items():
    print(f"{name:<28}" + " ".join(f"{value:.3f}" for value in values))
bug_scatter = shift.std().item()
print(f"one reference log-probability scatters by {bug_scatter:.2f} nats (standard deviation)")

# %% [markdown]
# **What you should see.** A reference is a yardstick, and this one is another length at every call. Where reference log-probabilities are computed once and
# kept, the error is even frozen in for the whole run. We met it in TRL 1.16 with DPO, an adapter and $\alpha$ = 5: the first losses read 0.849, 0.715 and
# 0.698, where a new adapter must give 0.693.
#
# Careful with that last test, though. Look at the printed row *noise in the policy alone*: that is how it should be, and its losses are not
# 0.693 either, since the policy's own pass is noisy. A starting loss off ln 2 shows noise, not a bug. What shows the bug is the reference by itself:
# **with NEFTune on and off it must be the same to the last bit.** The cell above asserts it for the package.
#
# ### Exercise 4: a clean reference
# ●●○ · 10 minutes
#
# There are two ways out. One is on the noise's side, and you have built it: no noise without gradients. But it may be somebody else's hook.
# So write the reference that no hook of that kind can spoil: `sequence_logps(model, batch)[0]` with adapters off, no gradients, and the model *out of
# training mode* meanwhile. Leave everything as you found it, also when the pass ends with an error: a model that was in training trains on, one that was in
# eval mode stays there.
#
# <details><summary>Hint</summary>
#
# Remember `model.training` first. `model.eval()` and `model.train(mode)` switch the mode of all layers; put the second into a `finally`.
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

# %% [markdown]
# ## Does it help?
#
# A café is of use to somebody who plays one piece too often. So take sets that are small enough to be learned by heart, and read them
# four times:
#
# - **48 kitchen tickets.** A note goes in, JSON comes out. Only one answer is right, so we count *exact matches* on 64 held-out notes. (As in lab
#   3.1.1: a ticket counts when each of its tokens is the likeliest after the right ones before it.)
# - **48 answers to cooking questions**, one to three free sentences in metric units. Held out are 64 answers about other things. Here
#   the *length* of what the model writes may change too; it answers 32 of the questions.
#
# Both get $\alpha$ = 0, 5, 15 and 45, LoRA of rank 16, and a peak learning rate of 0.002. For the tickets that is a good rate. For the answers
# it is too hot: on other rows and another seed, 0.0005 came out better, so the answers get that one too, with and without noise. The seed
# draws the 48 rows, the adapter, the order and the noise; for one seed every $\alpha$ gets the same rows in the same order. That makes
# pairs, and pairs are what we compare. All held-out losses are measured without noise.
#
# You train the tickets with $\alpha$ = 15 here and now, for the first half of the run: each row is read twice. The rest was measured before, with `make experiments`, and lies in
# `data/measurements/`. The first losses of your run must be the stored ones; the cell checks that, and the baseline's too.

# %% tags=["experiment"]
stored = {"tickets": load("neftune_tickets"), "answers": load("neftune_answers")}
LIVE = 15
half = experiment.SETTINGS["epochs"] // 2 * len(tickets) // experiment.SETTINGS["batch_size"]
tuned, history = experiment.tune_noisy(tickets, LIVE, seed=0, first=half)
live = experiment.held_out(tuned, tokenizer, held_out_tickets)
del tuned
print(f"alpha {LIVE}, seed 0: loss", " ".join(f"{loss:.2f}" for loss in history.losses[::4]))
print(agrees(history.losses[:5], stored["tickets"].figures(0)[str(LIVE)]["losses"]))
_, first_steps = experiment.tune_noisy(tickets, 0, seed=0, first=3)
print("alpha 0, seed 0:", agrees(first_steps.losses, stored["tickets"].figures(0)["0"]["losses"]))
at_the_end = stored["tickets"].figures(0)[str(LIVE)]
for name, figures in ((f"your run, after {half} steps", live), (f"the stored one, after {len(at_the_end['losses'])}", at_the_end)):
    print(f"{name:<32}" + ", ".join(f"{key} {figures[key]:.3f}" for key in live))

# %% [markdown]
# The training loss of a noisy run is itself noisy: don't compare it with the baseline's. Compare on the same quiet texts. First, how
# well each model knows what it has read, and how well what it has not:

# %% tags=["experiment"]
ALPHAS, CONTROL = experiment.SETTINGS["alphas"], experiment.SETTINGS["alpha of the control"]
shown = {"tickets": [*ALPHAS, CONTROL], "answers": ALPHAS}
READ, HELD = "loss on rows read", "held-out loss"


def level(kind: str, run: int | str, key: str):
    """A stored figure of one run: mean over the seeds and 95% interval."""
    return mean_interval(stored[kind].values(run, key))


untrained = level("tickets", "untrained", HELD).value  # no seed is in it but the choice of rows read
gap = {alpha: level("answers", alpha, HELD).value - level("answers", alpha, READ).value for alpha in ALPHAS}
fig, (left, right) = plots.figure(
    f"Noise makes learning by heart harder: the answers' gap is {gap[0]:.1f} nats at α = 0, {gap[45]:.1f} at 45",
    x="α",
    columns=2,
    width=9.5,
    caption=f"48 rows read four times, 64 held out, all losses without noise. Gap: held-out loss less that of the rows read. Mean and 95% t interval. {stored['tickets'].origin()}.",
)
for ax, kind in ((left, "tickets"), (right, "answers")):
    x = range(len(shown[kind]))
    for key, role, label in ((READ, "package", "rows read"), (HELD, "yours", "held-out rows")):
        points = [level(kind, alpha, key) for alpha in shown[kind]]
        below = [min(p.value - p.low, 0.95 * p.value) for p in points]  # a loss has no logarithm below zero
        spread = [below, [p.high - p.value for p in points]]
        ax.errorbar(x, [p.value for p in points], yerr=spread, capsize=3, label=label, **plots.LINE[role])
    ax.set_xticks(list(x), [str(alpha) for alpha in shown[kind]])
    ax.set_ylabel(f"{kind}: loss (nats per token)")
left.axhline(untrained, color=plots.COLORS["reference"], linestyle="--", linewidth=1, label="held-out, untrained")
left.set_yscale("log")
gentle = {alpha: level("answers", f"{alpha}, gentle", HELD) for alpha in experiment.SETTINGS["alphas at the gentle rate"]}
right.plot(
    [ALPHAS.index(alpha) for alpha in gentle],
    [e.value for e in gentle.values()],
    **{**plots.LINE["reference"], "linestyle": ""},
    label="held-out, gentle rate",
)
right.set_ylim(0, None)
for ax in (left, right):
    ax.legend(fontsize=8)
plots.show(
    fig,
    alt="Loss against alpha. "
    + " ".join(
        f"{kind}, {name}: " + ", ".join(f"alpha {alpha} {level(kind, alpha, key).value:.2f}" for alpha in shown[kind]) + "."
        for kind in stored
        for key, name in ((READ, "rows read"), (HELD, "held-out rows"))
    )
    + " At the gentle rate, answers held out: "
    + ", ".join(f"alpha {alpha} {e.value:.2f}" for alpha, e in gentle.items())
    + ".",
)

# %% [markdown]
# Now the question itself: **is it better than without?** For each seed, subtract the figure without noise from the figure with noise, and look
# at the 95% interval of the differences. The verdicts follow one rule: an interval that contains zero is *no measurable difference*.

# %% tags=["experiment"]
MEASURES = [  # the set, the figure, its unit, and what more of it is called, and less
    ("tickets", HELD, "nats", ("worse", "better")),
    ("tickets", "exact match", "", ("better", "worse")),
    ("answers", HELD, "nats", ("worse", "better")),
    ("answers", "tokens an answer", "tokens", ("longer", "shorter")),
]


def difference(kind: str, key: str, run: int | str, against: int | str = 0):
    """One figure of a run less the other run's, seed by seed: mean and 95% interval."""
    return paired_difference(stored[kind].values(run, key), stored[kind].values(against, key))


changes, verdicts = {}, {}
for kind, key, unit, words in MEASURES:
    print(f"{kind}: {key}; without noise {level(kind, 0, key)}")
    for alpha in ALPHAS[1:]:
        change = changes[kind, key, alpha] = difference(kind, key, alpha)
        verdicts[kind, key, alpha] = change.verdict(*words)
        print(f"   alpha {alpha:>2}: {change.signed()} {unit:<7}{verdicts[kind, key, alpha]}")
print(f"answers that ran into the limit of {experiment.SETTINGS['max_new_tokens']} tokens: "
      + ", ".join(f"alpha {alpha} {level('answers', alpha, 'cut off').value:.0%}" for alpha in ALPHAS))  # fmt: skip
print("answers in metric units and no others: " + ", ".join(f"alpha {alpha} {level('answers', alpha, 'metric').value:.0%}" for alpha in ALPHAS))

# %% tags=["experiment"]
panels = {
    ("tickets", HELD): "tickets: held-out loss (nats)",
    ("answers", HELD): "answers: held-out loss (nats)",
    ("answers", "tokens an answer"): "answers: tokens written",
}
found = {kind: [f"α = {alpha} {verdicts[kind, HELD, alpha]}" for alpha in ALPHAS[1:] if verdicts[kind, HELD, alpha] in ("better", "worse")]
         for kind in stored}  # fmt: skip
fig, axes = plots.figure(
    "Held-out loss with noise, less without: " + "; ".join(f"{kind}: {', '.join(f) or 'no measurable difference'}" for kind, f in found.items()),
    x="α",
    columns=3,
    width=10.0,
    caption=f"Difference to α = 0, seed by seed: mean and 95% t interval; dots: the seeds. {stored['answers'].origin()}.",
)
for ax, ((kind, key), label) in zip(axes, panels.items(), strict=True):
    for i, alpha in enumerate(ALPHAS[1:]):
        each = [a - b for a, b in zip(stored[kind].values(alpha, key), stored[kind].values(0, key), strict=True)]
        ax.plot([i + 0.15] * len(each), each, ".", color=plots.COLORS["other"], markersize=5)
        change = changes[kind, key, alpha]
        spread = [[change.value - change.low], [change.high - change.value]]
        ax.errorbar(i, change.value, yerr=spread, capsize=3, **plots.LINE["yours"])
    ax.axhline(0, color=plots.INK, linewidth=0.8)
    ax.set_xticks(range(len(ALPHAS) - 1), [str(alpha) for alpha in ALPHAS[1:]])
    ax.set_xlim(-0.5, len(ALPHAS) - 1.5)
    ax.set_ylabel(label)
plots.show(
    fig,
    alt="Paired differences to no noise, mean and verdict. "
    + " ".join(
        f"{label}: " + ", ".join(f"alpha {alpha} {changes[kind, key, alpha].value:+.2f}, {verdicts[kind, key, alpha]}" for alpha in ALPHAS[1:]) + "."
        for (kind, key), label in panels.items()
    ),
)

# %% [markdown]
# ## Against what?
#
# A method that mends overfitting should be held against the other things that mend it. The simplest is a gentler learning rate:

# %% tags=["experiment"]
best = min(ALPHAS[1:], key=lambda alpha: changes["answers", HELD, alpha].value)
comparisons = {
    f"α = {best} at the hot rate, against none": (best, 0),
    "no noise at the gentle rate, against none at the hot one": ("0, gentle", 0),
    f"α = {best} at the hot rate, against none at the gentle one": (best, "0, gentle"),
    "α = 15 at the gentle rate, against none at the gentle one": ("15, gentle", "0, gentle"),
}
print("answers: held-out loss (nats per token)")
for name, (run, against) in comparisons.items():
    change = changes[name] = difference("answers", HELD, run, against)
    verdicts[name] = change.verdict("worse", "better")
    print(f"   {name:<62}{change.signed()} {verdicts[name]}")

# %% [markdown]
# **What you should see.**
#
# - On the **tickets**, noise up to $\alpha$ = 15 makes no measurable difference, and $\alpha$ = 45 makes things worse: a table number that is not heard cannot be copied. Yet
#   the baseline knew its 48 rows by heart all the same. Knowing rows by heart is no harm where the new rows follow the same rule.
# - On the **answers**, at the hot rate, noise helps: held-out loss falls from $\alpha$ = 15 on, and the rows read are known less well.
# - But a **gentler rate helps more**. It does so without any noise, and on top of it noise makes no measurable difference. Whoever compares NEFTune with a
#   badly tuned baseline measures how badly it was tuned.
# - The answers' **length** scatters more from seed to seed than from $\alpha$ to $\alpha$: no measurable difference, and three seeds could only have shown a large one.
#
# ## The control: a café in which nobody can hear
#
# If "noise helps" were all there is to say, more noise would help more. And if noise never reached the model, none could do harm. So
# turn it up until the words are drowned: $\alpha$ = 150, on each token some three times as large as the token. That must
# teach nothing: the model sees tickets go by, and never the note that they belong to.

# %% tags=["experiment"]
drowned = level("tickets", CONTROL, HELD)
matches = stored["tickets"].values(CONTROL, "exact match")
print(f"alpha {CONTROL}: held-out loss {drowned}; untrained {untrained:.3f}; exact matches, seed by seed: " + ", ".join(f"{m:.0%}" for m in matches))
print("without noise, seed by seed: " + ", ".join(f"{m:.0%}" for m in stored["tickets"].values(0, "exact match")))
assert max(matches) == 0, "noise that drowns the words must teach nothing; if it does, the noise never arrived"

# %% [markdown]
# ## What 29.79 → 64.69 measured
#
# The most quoted number of the paper, with all that belongs to it:
#
# - **Model and data**: LLaMA-2-7B on Alpaca, a set of tens of thousands of instructions, not 48 rows.
# - **Measure**: AlpacaEval, where GPT-4 reads two answers and says which is better. The percentages are how often the trained model's answer wins.
# - **What changed**: how it answers. Part of the gain is length: with NEFTune that model writes longer answers, and such judges
#   prefer longer answers, which is why later versions of the benchmark correct for it
#   ([Dubois et al. 2024](https://arxiv.org/abs/2404.04475)).
# - **What did not**: what it knows. On the Open LLM Leaderboard's tasks the authors themselves report the same performance with and without
#   ([abstract](https://arxiv.org/abs/2310.05914)).
#
# Our sets have no such judge. A ticket is right or wrong, and a held-out loss does not care how long an answer is. So this lab cannot confirm those two
# numbers and does not contradict them; it asks another question on another scale. What you can carry over is the way of asking.
#
# ## What does it cost?
#
# One addition a number; next to the matrix products that is nothing. This package pays one more price. A batch's rows often
# begin alike, with the same system prompt, and without noise that beginning is computed once for all of them. Under NEFTune each row is shaken in
# its own way, and there is nothing left to share:

# %%
packed, _ = load_model(EMBEDDED, dtype=torch.float32)
four = collate_sft(tickets[:4], tokenizer)
packed.train()
quiet = packed_row(packed, four)
with neftune(packed, 5.0):
    shaken = packed_row(packed, four)
if quiet is None:
    print("on this device batches are padded, and nothing is shared either way")
else:
    print(f"four tickets, {int(four['attention_mask'].sum())} tokens: {quiet.ids.shape[1]} are computed without noise, {shaken.ids.shape[1]} with it")
del packed

# %% [markdown]
# ## On your DGX Spark
#
# ```python
# with neftune(model, alpha=5.0):
#     history = train(model, batches, sft_loss, config)
# ```
#
# The same two lines for 8B, LoRA or QLoRA. On a GPU batches are padded, so you choose: `neftune(model, 5.0)` scales by the padded
# length, as transformers and TRL do; `neftune(model, 5.0, true_lengths=True)` by each text's own, as the authors did. Print the first cell's norms for
# your model before you choose $\alpha$. It takes no memory to speak of, gradient checkpointing replays the same noise, and the weights
# that you save are clean. We have not measured it there.
#
# ## Common mistakes
#
# - **A root forgotten.** Without √L long texts drown, without √d wide models do; $\alpha$ from a paper then means something else.
# - **Noise in evaluation.** Figures that change from run to run with nothing random in sight. Look for a hook, or a model left in training mode.
# - **The hook left on**, after an error most of all. Use a context manager, with `finally`.
# - **Noise in the reference.** In DPO, KTO and every method with a reference: compare it with NEFTune on and off, bit for bit.
# - **The weight shaken, not the output.** That noise is never taken off again, and adds up step by step.
# - **α = 0 that draws.** Your baseline is another run than you think.
# - **Training losses compared.** The noisy run's is higher because it is noisy. Compare on quiet held-out texts.
# - **One seed.** Look at the small dots in the last figure before you believe a difference.
#
# ## Explain it back
#
# Write it for a friend who plays the guitar and no computer.

# %% [markdown] nbgrader={"grade_id": "explain-noise", "solution": true, "grade": true, "points": 0}
# **When can noise in training help, and when can it not?**
#
# ### BEGIN SOLUTION
# It can help where the alternative is learning by heart: few texts, read often. Then each reading is a little different, and what
# stays the same in all of them, the sense, is what can be learned. It cannot add knowledge. Where every word of the input matters, as
# in copying a table number from a note, loud noise hides just what is to be learned. And reading less often can do the same job as noise.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-reference", "solution": true, "grade": true, "points": 0}
# **Why is noise in the policy all right, and noise in the reference a bug?**
#
# ### BEGIN SOLUTION
# The policy is what is being trained, and practising amid noise is the idea. The reference is the yardstick that it is measured with. A
# yardstick has to have the same length every time; with noise each comparison is made with another one.
# ### END SOLUTION

# %% [markdown]
# ## The numbers of this lab

# %% tags=["experiment"]
def said(key) -> str:
    return f"{changes[key].value:+.3f}, {verdicts[key]}"


_, *against_gentle = comparisons
headline(
    {
        **{f"tickets, held-out loss, α={alpha}": said(("tickets", HELD, alpha)) for alpha in ALPHAS[1:]},
        **{f"answers, held-out loss, α={alpha}": said(("answers", HELD, alpha)) for alpha in ALPHAS[1:]},
        **{name: said(name) for name in against_gentle},
        "tokens an answer, α=15": said(("answers", "tokens an answer", 15)),
        "tickets exact without noise (%)": 100 * level("tickets", 0, "exact match").value,
        f"tickets exact, words drowned at α={CONTROL} (%)": 100 * max(matches),
        "against transformers, at most": max(parity.values()),
        "the bug: a reference log-probability scatters by (nats)": bug_scatter,
    }
)
