# %% [markdown]
# # 3.1.2 What do volume and direction buy, and what do they cost?
#
# **Time**: about 60 minutes.
#
# LoRA changes a weight matrix with one thin note. DoRA splits the job: a note *turns* each row, and one number per row says how
# *long* it is. Its paper reports clear gains. Will you see them?
#
# ## What you will make
#
# A **DoRA layer** of your own, which trains in a language model of 135 million weights. And a **verdict**: DoRA or LoRA?
#
# ## What you should know first
#
# - [Lab 3.1.1](lab-3.1.1-lora-theory.ipynb): LoRA's note $sBA$ with $s = \alpha/r$. $A$ is (rank, in), and $B$ is (out, rank).
# - PyTorch stores a weight $W$ as (out, in). Each *row* makes one output.
#
# > **Norm** ‖w‖ of a row: its length. Square its entries, add them up, take the root.
#
# ## The picture
#
# On a mixing desk each channel has a **fader**, how loud, and **knobs**, which mix of sources. A linear layer is such a desk, and
# each row of $W$ is a channel. The row's length is its volume, and its direction is its mix:
#
# $$W = m \cdot \frac{W}{\lVert W \rVert} \qquad \text{row by row, with } m = \lVert W \rVert$$
#
# LoRA's note changes volume and mix together. **DoRA** ([Liu et al. 2024](https://arxiv.org/abs/2402.09353)) gives each fader a
# handle of its own:
#
# $$W' = m \cdot \frac{W + sBA}{\lVert W + sBA \rVert}$$
#
# Add the note, cut each row to length one, stretch it to the magnitude $m$. What trains is $A$, $B$ and $m$.

# %%
import torch
from torch import nn
from torch.nn import functional as F

from spark_ft import AdapterConfig, DoRALinear, add_adapters, load_model, sft_batches
from spark_ft.adapters import adapters_disabled
from spark_ft.embedded import EMBEDDED
from spark_ft.evaluation import generate
from spark_ft.lab import headline, parity, yours
from spark_ft.lab.checks import lab_3_1_2 as checks
from spark_ft.lab.experiments import load
from spark_ft.lab.experiments.lab_3_1_2 import tune_dora
from spark_ft.lab.kitchen import tickets
from spark_ft.lab.study import lab_3_1_2 as study

# %% [markdown]
# ## It works
#
# A waiter writes an order; the kitchen wants a ticket in JSON. The next cell trains DoRA for 20 steps of four orders, and asks for
# three new tickets.

# %%
model, history = tune_dora(seed=0)
fresh, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
rows = tickets("validation")[:3]
orders = [row["prompt"] for row in rows]
after = generate(model, tokenizer, orders, max_new_tokens=48)
with adapters_disabled(model):
    before = generate(model, tokenizer, orders, max_new_tokens=48)
study.show_tickets(rows, before, after)

# %% [markdown]
# DoRA learns. Better than LoRA? First build it.
#
# ## Build it
#
# ### Exercise 1: take the desk apart
# ●●● importance · ●○○ difficulty · 5 minutes
#
# Return `(magnitude, direction)`: the length of each row, shape (out,), and the rows at length one, shape (out, in).
#
# <details><summary>Hint: which axis?</summary>
#
# `dim=1` runs along a row. `magnitude[:, None]` is (out, 1), and divides each row by its own number.
# </details>


# %% nbgrader={"grade_id": "decompose", "solution": true}
def decompose(W: torch.Tensor) -> tuple:
    """The length of each row of W (out, in), and the rows at length one."""
    ### BEGIN SOLUTION
    magnitude = W.square().sum(dim=1).sqrt()
    direction = W / magnitude[:, None]
    return magnitude, direction
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-decompose", "grade": true, "points": 1}
checks.check_decompose(decompose)

# %% [markdown]
# ### Exercise 2: the length of a row with its note on
# ●●○ importance · ●●○ difficulty · 12 minutes
#
# $A$ and $B$ move, so DoRA needs $n = \lVert W + sBA \rVert$ anew after each step. The direct way builds $BA$, as large as $W$, to get one
# number per row. There is no need. For a row $w$ of $W$ and the same row $c$ of $sBA$:
#
# $$\lVert w + c \rVert^2 = \lVert w \rVert^2 + 2\, w \cdot c + \lVert c \rVert^2$$
#
# For all rows at once, with $\odot$ for "entry by entry":
#
# - $\lVert w \rVert^2$: the row sums of $W \odot W$.
# - $w \cdot c$: $s$ times the row sums of $(WA^\top) \odot B$. $WA^\top$ is thin, (out, rank).
# - $\lVert c \rVert^2$: $s^2$ times the row sums of $(B\,(AA^\top)) \odot B$. $AA^\top$ is tiny, (rank, rank).
#
# Return the *root* of the sum. The check watches for any new product as large as $W$.
#
# <details><summary>Hint: row sums</summary>
#
# `(x * y).sum(dim=1)` is the dot product of each row of x with the same row of y.
# </details>


# %% nbgrader={"grade_id": "row-norm", "solution": true}
def row_norm(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
    """‖W + s B A‖ of each row, shape (out,), without building B A."""
    ### BEGIN SOLUTION
    plain = (W * W).sum(dim=1)
    cross = (W @ A.T * B).sum(dim=1)
    note = (B @ (A @ A.T) * B).sum(dim=1)
    return (plain + 2 * s * cross + s**2 * note).sqrt()
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-row-norm", "grade": true, "points": 2}
checks.check_row_norm(row_norm)

# %% [markdown]
# ### Exercise 3: the layer
# ●●● importance · ●●○ difficulty · 15 minutes
#
# Now a layer that can stand where `nn.Linear` stood.
#
# - `base` is **frozen**, weight and bias. `self.scaling` is $s = \alpha/r$.
# - `self.lora_A` starts random, uniform within $\pm 1/\sqrt{\text{in}}$. `self.lora_B` starts at zero.
# - `self.magnitude` (out,) is an `nn.Parameter` too, and starts as $\lVert W \rVert$. So a new layer equals its base.
# - The output is $\frac{m}{n} \cdot (Wx + sBAx) + b$. The bias is no part of a row, so nothing scales it.
# - $n$ is **held still**: compute it from $A$ and $B$, and let no gradient flow through it. You will see why below.
#
# <details><summary>Hint: held still</summary>
#
# `.detach()` at the end of the norm's line.
# </details>
# <details><summary>Hint: W x without the bias</summary>
#
# `F.linear(x, W)` computes $Wx$ for each row of a batch.
# </details>


# %% nbgrader={"grade_id": "dora-linear", "solution": true}
class MyDoRALinear(nn.Module):
    """m/n · (W x + scaling · B A x) + b with n = ‖W + scaling · B A‖; A, B and m train."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        ### BEGIN SOLUTION
        base.requires_grad_(False)
        bound = base.in_features**-0.5
        A = torch.empty(rank, base.in_features).uniform_(-bound, bound)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.magnitude = nn.Parameter(base.weight.norm(dim=1))
        self.scaling = alpha / rank
        ### END SOLUTION

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        W, b, A, B, s = self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scaling
        ### BEGIN SOLUTION
        n = (W + s * B @ A).norm(dim=1).detach()
        Wx = F.linear(x, W)
        note = s * (x @ A.T @ B.T)
        out = self.magnitude / n * (Wx + note)
        return out if b is None else out + b
        ### END SOLUTION


# %% nbgrader={"grade_id": "check-dora-linear", "grade": true, "points": 3}
checks.check_dora_linear(MyDoRALinear)

# %% [markdown]
# **Why hold the norm still?** Make a row of $W + sBA$ longer, and $n$ divides the length away again. So the true gradient of a row has no
# part *along* the row. With $n$ held still it does. How large is that part?

# %%
four_orders = sft_batches(tickets("train"), tokenizer, 4)(0)
along = study.show_held_still(four_orders)

# %% [markdown]
# That part is, number for number, the magnitude's own gradient; the function behind the table asserts it. So with $n$ held still the
# note also tries to make rows longer, in vain. That is the price. The gain: no gradient travels back through a matrix as
# large as $W$. The authors report hardly any loss of accuracy (their section 4.3).
#
# ### Exercise 4: print it into the book
# ●●○ importance · ●○○ difficulty · 5 minutes
#
# For serving, DoRA costs nothing: the desk becomes one matrix again. Return the merged weight
# $m \cdot (W + sBA) / \lVert W + sBA \rVert$, shape (out, in).
#
# <details><summary>Hint</summary>
#
# Build $V = W + sBA$ first. Then exercise 1 tells you its rows' lengths.
# </details>


# %% nbgrader={"grade_id": "merged-weight", "solution": true}
def merged_weight(W, m, A, B, s: float) -> torch.Tensor:
    """m · (W + s B A) / ‖W + s B A‖, row by row."""
    ### BEGIN SOLUTION
    V = W + s * B @ A
    lengths = V.norm(dim=1, keepdim=True)
    return m[:, None] * V / lengths
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-merged-weight", "grade": true, "points": 2}
checks.check_merged_weight(merged_weight)

# %% [markdown]
# ### Exercise 5: how far did a row go?
# ●●○ importance · ●●○ difficulty · 8 minutes
#
# Compare a weight before and after training, as the paper does, and take means over its rows:
#
# $$\Delta M = \text{mean of } \bigl|\, \lVert w' \rVert - \lVert w \rVert \,\bigr| \qquad \Delta D = \text{mean of } 1 - \cos(w', w)$$
#
# <details><summary>Hint: absolute values</summary>
#
# Some rows grow and some shrink. Take the absolute value before the mean, or they cancel. `F.cosine_similarity` takes a `dim`.
# </details>


# %% nbgrader={"grade_id": "movement", "solution": true}
def movement(before: torch.Tensor, after: torch.Tensor) -> tuple:
    """ΔM, the mean |change of a row's length|, and ΔD, the mean 1 − cos."""
    ### BEGIN SOLUTION
    longer = after.norm(dim=1) - before.norm(dim=1)
    cosine = F.cosine_similarity(after, before, dim=1)
    return longer.abs().mean(), (1 - cosine).mean()
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-movement", "grade": true, "points": 2}
checks.check_movement(movement)

# %% [markdown]
# ## Your code trains
#
# Your layer, in all 210 places, in the run that you saw above: the same start, the same orders, 20 steps.

# %% tags=["trains"]
yours.trains(
    lambda: study.train_layer(MyDoRALinear),
    lambda: history,
    what="layer",
    y="loss (nats per token)",
    caption="embedded model, DoRA of rank 16 in 210 layers, 20 steps of 4 kitchen tickets, seed 0",
)

# %% [markdown]
# From here on the lab uses the package's layer. It is the same formula, and computes the norm once per optimizer step.
# [PEFT](https://github.com/huggingface/peft) has a DoRA layer too. Give all three the same numbers.

# %% nbgrader={"grade_id": "check-parity", "grade": true, "points": 1}
checks.check_parity(MyDoRALinear, merged_weight)

# %%
torch.manual_seed(0)
apart = parity.dora_against_peft(DoRALinear, lambda layer: layer.weight + layer.delta_weight())
print("spark_ft and PEFT: " + ", ".join(f"{name} {value:.0e}" for name, value in apart.items()))
assert max(apart.values()) < 1e-5

# %% [markdown]
# On the whole model, a new DoRA adapter changes nothing, to the last bit.

# %%
ids = four_orders["input_ids"][:1].to(fresh.device)
with torch.no_grad():
    plain = fresh(ids).logits
    add_adapters(fresh, AdapterConfig(method="dora", rank=16))
    assert torch.equal(fresh(ids).logits, plain), "a new adapter must change nothing"
trains = {n: p.numel() for n, p in fresh.named_parameters() if p.requires_grad}
faders = sum(size for name, size in trains.items() if name.endswith("magnitude"))
print(f"{sum(trains.values()):,} numbers train; {faders:,} of them are faders")

# %% [markdown]
# ### A bug hunt
#
# A colleague writes the formula by hand and tests it: a new layer equals its base. What is wrong, and which check would have found it?

# %% tags=["bug-hunt"]
W, A, B, x = torch.randn(6, 8), torch.randn(2, 8), torch.zeros(6, 2), torch.randn(3, 8)
m = W.norm(dim=1)
n = W.norm(dim=1)
theirs = m / n * (x @ W.T + 2 * x @ A.T @ B.T)
print("a new layer equals its base:", torch.allclose(theirs, x @ W.T))

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# $n$ is the norm of $W$ alone; it should be that of $W + sBA$. While $B$ is zero the two are equal, so a test at the start is blind to
# it. Put random numbers into $B$: then each row of the merged weight must be $m$ long. Here it is not.
# </details>

# %% [markdown]
# ## Is it true?
#
# The paper reports 78.4 for DoRA against 74.7 for LoRA: LLaMA-7B, the mean of eight commonsense tasks. But
# [the authors' own repository](https://github.com/NVlabs/DoRA/tree/main/commonsense_reasoning) lists a LoRA of rank 32 at 76.3. So
# compare for yourself: the same model, orders and steps, and *equal size*. DoRA of rank 16 trains a few more numbers than LoRA of
# rank 16, and a few fewer than LoRA of rank 17. The learning rates were chosen on other tickets and another seed.
#
# > **Seed**: the number that fixes all that is random in a run. Several seeds show how much luck there is.
# > **95% interval**: a range made by a method that contains the true value 19 times out of 20.

# %% [markdown] tags=["predict"]
# **Predict, then run.** At equal size, over five seeds:
#
# - DoRA has the lower held-out loss
# - LoRA has the lower held-out loss
# - these seeds cannot tell

# %% tags=["experiment"]
stored = load("dora_against_lora")
study.hold_to_stored(history, stored)
verdict = study.show_dora_against_lora(stored)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# They cannot tell. Zero is inside both intervals. The line below the figure says which difference the seeds would have found. The
# paper's gain may exist on its tasks. Here it is absent, or too small to see.
# </details>

# %% [markdown] tags=["predict"]
# ### Volume alone
#
# Now freeze every direction. Only the faders move: 155,520 numbers, 3% of DoRA's. The **control** is DoRA trained on shuffled
# answers, each ticket under another order. It can learn what a ticket looks like, and not what belongs in it.
#
# **Predict, then run.** How far do the faders alone go from the control's loss to DoRA's?
#
# - about 3% of the way
# - about half of the way
# - more than nine tenths of the way

# %% tags=["experiment"]
share = study.show_methods(stored)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# More than nine tenths. Volume alone buys a lot here, at a learning rate 50 times as high. Turning rows still helps: DoRA's loss is
# lower in every seed. The control writes no held-out ticket right, as it must.
# </details>

# %% [markdown]
# And what did the faders do in *your* run, beside its notes? Put them back to where they started, or push them further.

# %% tags=["knob", "experiment"]
FADERS = 3.0  # turn this: 10, 30, -10. From where on does the loss feel it?
pushed = study.show_faders(model, FADERS)

# %% [markdown]
# Taking the faders back changes little. In this run the notes carry nearly all that was learned.
#
# ### How far volume and direction move
#
# In the paper's runs, LoRA's $\Delta M$ and $\Delta D$ rise and fall together, with a correlation of +0.83. Full fine-tuning's go opposite
# ways, −0.62, and so do DoRA's, −0.31. The paper concludes that DoRA learns more like full fine-tuning. Is that so here?

# %% tags=["experiment"]
moves = study.show_movement(stored, model, movement)

# %% [markdown]
# DoRA changes lengths far more than LoRA does, and turns rows about as far. So the handle *is* used. Part of that is the optimizer:
# AdamW moves each number by about the learning rate per step, however small its gradient. The paper's correlations show only in
# part. That does not refute them: the paper trained another model on other tasks, for much longer.
#
# ### What does it cost?

# %% tags=["experiment"]
cost = study.show_step_cost(model, four_orders)
study.show_norm_cost()

# %% [markdown]
# A step costs somewhat more than LoRA's. The norm through $BA$ grows fast with the width; your way from exercise 2 stays small.
#
# <details><summary>With dropout it costs more</summary>
#
# LoRA drops entries of the note's input alone: $Wx + sBA\tilde x$. DoRA adds $(m/n - 1) \cdot Wx + m/n \cdot sBAx$ to its base, and all of
# that sees the dropped input $\tilde x$. So $W$ is applied twice, to $x$ and to $\tilde x$; in PEFT too
# ([issue 2107](https://github.com/huggingface/peft/issues/2107)). Leave dropout at 0 with DoRA, unless you measured that it helps.
# </details>
# <details><summary>On a GPU, by PEFT's own benchmark</summary>
#
# Llama-3.2-3B on MetaMathQA, rank 32, one seed: DoRA 46.9% in 1,191 s and 24.5 GB, LoRA 47.8% in 942 s and 22.3 GB
# ([PEFT's comparison](https://github.com/huggingface/peft/tree/main/method_comparison)). 1,319 questions cannot tell those two accuracies apart.
# </details>
#
# ## On a DGX Spark
#
# The same `AdapterConfig(method="dora")` works on large models. What do the faders add there?

# %%
study.show_giants()

# %% [markdown]
# Faders are small everywhere. The norm through $BA$ is not: its gigabytes must fit at the worst moment of a step. We have not
# measured a DoRA step on a DGX Spark; `make bench` does it on yours.
#
# ## Explain it back
#
# Write for a friend who has never seen a matrix.

# %% [markdown] nbgrader={"grade_id": "explain-desk", "solution": true, "grade": true, "points": 0}
# **What can a fader of its own do that LoRA's note cannot easily do?**
#
# ### BEGIN SOLUTION
# With LoRA, one note changes how strong a row is and where it points. To make a row louder without turning it, the note must hold a copy
# of the row itself, and a thin note has room for few copies. DoRA keeps one number per row for the strength, so the note is free to
# turn rows. Whether that helps depends on the task.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-verdict", "solution": true, "grade": true, "points": 0}
# **A colleague wants to switch all trainings to DoRA because of the paper's 3.7 points. What do you answer?**
#
# ### BEGIN SOLUTION
# That number belongs to one model, one set of tasks, and one LoRA with one learning rate. Run both on our task, at equal size, each with
# its own best rate, over several seeds, and look at the interval of the difference. If zero is inside, take LoRA: its step is
# cheaper. If not, and the gain is worth the longer step, take DoRA.
# ### END SOLUTION

# %% [markdown]
# [Lab 3.1.3](lab-3.1.3-neftune-magic.ipynb) changes no layer at all: it adds noise to what goes in.

# %% tags=["experiment"]
gap = study.difference(stored, "DoRA", "LoRA r16")
headline(
    {
        "DoRA − LoRA r16, held-out loss": gap.signed(4),
        "verdict": verdict,
        "magnitudes alone, % of the way": 100 * share,
        "ΔM, DoRA / LoRA": moves["longer"],
        "ΔD, DoRA / LoRA": moves["turned"],
        "pairs that go the paper's way, of 6": moves["alike"],
        "along the rows, at most (%)": 100 * max(along.values()),
        "against PEFT, at most": max(apart.values()),
        "step, DoRA / LoRA": cost,
    }
)
