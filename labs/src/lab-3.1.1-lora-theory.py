# %% [markdown]
# # 3.1.1 Why are sticky notes enough?
#
# **Time**: about 60 minutes.
#
# To teach a model something new, you could change every one of its weights. LoRA changes none of them. It puts thin notes beside
# them, 3% of the numbers or less, and often reaches the same quality. Why can that be enough?
#
# ## What you will make
#
# A **LoRA layer** of your own, which trains in a real language model of 135 million weights. Before that you measure how much of
# a real update a thin note can hold.
#
# ## What you should know first
#
# - Python, and a little PyTorch: tensors, `nn.Module`, what a gradient is.
# - A matrix times a vector. PyTorch stores a linear layer's weight as (out, in) and computes `x @ weight.T`.
# - Nothing about fine-tuning. New words come in a box, like this one:
#
# > **Loss**: how surprised the model is by the right answer, on average per token. Its unit is the *nat*; 0 is not surprised at all.
#
# ## The picture
#
# You own a thick chemistry textbook, and next term you teach pharmacists. You could have the whole book printed anew. Or you
# put sticky notes in the margins: *for your patients, this reaction matters*. The notes are thin, and you can peel them off.
#
# The book is a matrix of weights $W$. **Full fine-tuning** may change every number of it. With **LoRA**
# ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) $W$ stays as printed, and two thin matrices stand beside it:
#
# $$W' = W + \frac{\alpha}{r}\, B A$$
#
# $A$ has $r$ rows and reads the input. $B$ has $r$ columns and writes to the output. $r$, the **rank**, says how many separate
# things the note can say. $\alpha$ (alpha) says how loudly it is read. For a matrix of 1000 × 1000 and $r$ = 16, that is
# 32,000 numbers beside a million: 3.2%.

# %%
import inspect

import torch
from torch import nn

from spark_ft import AdapterConfig, LoRALinear, adapters_disabled, add_adapters, sft_batches
from spark_ft.embedded import EMBEDDED
from spark_ft.evaluation import generate
from spark_ft.lab import headline, parity, yours
from spark_ft.lab.checks import lab_3_1_1 as checks
from spark_ft.lab.experiments import agrees, load
from spark_ft.lab.experiments.lab_3_1_1 import tune_rank
from spark_ft.lab.kitchen import tickets
from spark_ft.lab.study import lab_3_1_1 as study
from spark_ft.models import load_model, load_tokenizer

# %% [markdown]
# ## It works
#
# A waiter writes an order, and the kitchen wants a ticket in JSON. The next cell puts a note of rank 16 beside every linear layer
# but the output head, and trains the notes for 20 steps of four orders. Then it asks for three new tickets.

# %%
model, history = tune_rank(rank=16, seed=0)
tokenizer, rows = load_tokenizer(EMBEDDED), tickets("validation")[:3]
orders = [row["prompt"] for row in rows]
after = generate(model, tokenizer, orders, max_new_tokens=48)
with adapters_disabled(model):  # the notes peeled off
    before = generate(model, tokenizer, orders, max_new_tokens=48)
study.show_tickets(rows, before, after)

# %% [markdown]
# The book itself is unchanged. Why was so little enough?
#
# ## Build it
#
# ### What does training change?
#
# Train with every number free, and subtract: $\Delta W = W_\text{after} - W_\text{before}$. A note can only hold $\Delta W$ if $\Delta W$ is thin.
#
# Any matrix is a sum of **layers of paint**. Each layer is one column times one row, and the layers are sorted from the
# strongest to the faintest. Each one's strength is its *singular value*. The SVD finds them:
#
# $$M = \sum_i S_i \; U_{:,i} \; V_{i,:}$$
#
# A matrix of $k$ layers has rank $k$, and fits a note of rank $k$ exactly. Keep the strongest $k$ layers, and you have the best
# copy of $M$ that any note of rank $k$ can hold (Eckart and Young, 1936).
#
# > **Norm** ‖M‖: how large a matrix is. Square all its entries, add them up, take the root. ‖M‖² is also the sum of the squared
# > singular values.
#
# ### Exercise 1: cut a matrix to rank k
# ●●● importance · ●●○ difficulty · 10 minutes
#
# `cut_to_rank` returns the sum of the $k$ strongest layers, in the matrix's own shape. `share_kept` returns one number for each
# $k$ = 1, 2, …: the share of ‖M‖² that the strongest $k$ layers hold. Its last number is 1.
#
# <details><summary>Hint</summary>
#
# `U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)` gives the layers in order: columns of `U`, rows of `Vh`, strengths `S`.
# `U[:, :k] * S[:k]` scales each column by its strength. `cumsum(0)` makes running sums.
# </details>


# %% nbgrader={"grade_id": "cut-to-rank", "solution": true}
def cut_to_rank(matrix: torch.Tensor, k: int) -> torch.Tensor:
    """The best rank-k part of a matrix."""
    ### BEGIN SOLUTION
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    strongest = U[:, :k] * S[:k]
    return strongest @ Vh[:k]
    ### END SOLUTION


def share_kept(matrix: torch.Tensor) -> torch.Tensor:
    """The share of ‖matrix‖² in the strongest k layers, for k = 1, 2, …"""
    ### BEGIN SOLUTION
    squares = torch.linalg.svdvals(matrix) ** 2
    return squares.cumsum(0) / squares.sum()
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-cut-to-rank", "grade": true, "points": 3}
checks.check_cut(cut_to_rank, share_kept)

# %% [markdown] tags=["predict"]
# Now the real thing. The next cell frees three matrices of the model and trains them *fully* for 12 steps. A matrix of 576 × 576
# has 576 layers of paint.
#
# **Predict, then run.** How much of the squared norm of $\Delta W$ do its 16 strongest layers hold?
#
# - about 3%, since 16 of 576 layers are 3%
# - about three quarters
# - all of it, to within rounding

# %% tags=["experiment"]
update = study.Update()
for name, share in update.moved.items():
    print(f"{study.FREED[name]:<20} changed by {share:.1%} of its norm")
kept = study.show_kept(update, share_kept)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# About three quarters. The update is **not exactly** low-rank: its curve has a long tail. But most of the change sits in a few
# layers. In a random matrix all layers are nearly equally strong, so 16 of them hold little.
# </details>

# %% [markdown]
# Is the tail worth having? Ask the model. Keep only the best rank-$k$ part of each $\Delta W$, put it back into the model, and
# measure the loss on held-out tickets.

# %% tags=["experiment"]
learned = study.show_learned(update, cut_to_rank, (1, 4, 16))

# %% [markdown]
# The tail holds a good part of the norm and much less of the learning. That is why sticky notes are enough here, after a short
# training on an easy task. On large data full fine-tuning learns more than LoRA, and forgets more
# ([Biderman et al. 2024](https://arxiv.org/abs/2405.09673)).

# %% tags=["knob", "experiment"]
RANK = 2  # turn this: 8, 32, 128. From which rank on does the model miss nothing?
_ = study.show_learned(update, cut_to_rank, (RANK,))

# %% [markdown]
# ### Exercise 2: a start that changes nothing
# ●●● importance · ●○○ difficulty · 5 minutes
#
# LoRA trains inside rank $r$ from the start. Return `(A, B)`. Their product $BA$ must be zero, so that the model starts as it
# was, and yet both must be able to learn. Draw the random one uniformly from $-1/\sqrt{\text{in}}$ to $+1/\sqrt{\text{in}}$.
#
# <details><summary>Hint: which one is zero?</summary>
#
# The gradient of $A$ is multiplied by $B$, and the gradient of $B$ by $A$. $A$ reads the input, so let $A$ look in $r$ different
# directions. `torch.empty(…).uniform_(low, high)` draws.
# </details>


# %% nbgrader={"grade_id": "init-adapter", "solution": true}
def init_adapter(in_features: int, out_features: int, rank: int) -> tuple:
    """A (rank, in) and B (out, rank), so that B A is zero and can become anything."""
    ### BEGIN SOLUTION
    bound = in_features**-0.5
    A = torch.empty(rank, in_features).uniform_(-bound, bound)
    B = torch.zeros(out_features, rank)
    return A, B
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-init-adapter", "grade": true, "points": 1}
checks.check_init_adapter(init_adapter)

# %% [markdown]
# ### Exercise 3: the update, through the narrow middle
# ●●● importance · ●○○ difficulty · 6 minutes
#
# Compute $\frac{\alpha}{r} B A x$ for a whole batch. Each input is a *row* of `x`, so the formula turns around: $x A^\top B^\top$.
# Never build the large matrix $BA$: first go down to $r$ numbers, then up again.
#
# <details><summary>Hint: shapes</summary>
#
# `x` is (…, in). `x @ A.T` is (…, rank). Times `B.T` it is (…, out). Python multiplies from left to right.
# </details>


# %% nbgrader={"grade_id": "lora-update", "solution": true}
def lora_update(x, A, B, alpha: float) -> torch.Tensor:
    """alpha / rank · B A x for every row of x (…, in), as (…, out)."""
    ### BEGIN SOLUTION
    rank = A.shape[0]
    low = x @ A.T
    return alpha / rank * (low @ B.T)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-lora-update", "grade": true, "points": 2}
checks.check_lora_update(lora_update)

# %% [markdown]
# ### Exercise 4: the layer
# ●●● importance · ●●○ difficulty · 15 minutes
#
# Now a layer that can stand where `nn.Linear` stood.
#
# - `base` is **frozen**, weight and bias. `self.lora_A` and `self.lora_B` are `nn.Parameter`s and train.
# - `self.scaling` is $\alpha/r$.
# - The output is the base's plus the update, through the narrow middle.
# - **Dropout** forgets some entries of the input at random, so that training does not lean on a single one. It acts on the *update's*
#   input only, and only in training. The book is never smudged.
# - `self.merged` says that the update is in the base's weight already (exercise 5). Then the output is the base's alone.
#
# <details><summary>Hint: freezing</summary>
#
# `base.requires_grad_(False)` freezes all parameters of a module at once.
# </details>
# <details><summary>Hint: dropout</summary>
#
# `nn.Dropout(p)` as a part of the layer follows `train()` and `eval()` by itself. `F.dropout(x, p)` does not, unless you pass
# `training=self.training`.
# </details>


# %% nbgrader={"grade_id": "lora-linear", "solution": true}
class MyLoRALinear(nn.Module):
    """base(x) + alpha / rank · B A dropout(x); only A and B train."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.merged = base, False
        ### BEGIN SOLUTION
        base.requires_grad_(False)
        bound = base.in_features**-0.5
        A = torch.empty(rank, base.in_features).uniform_(-bound, bound)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        ### END SOLUTION

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ### BEGIN SOLUTION
        out = self.base(x)
        if self.merged:
            return out
        low = self.dropout(x) @ self.lora_A.T
        return out + self.scaling * (low @ self.lora_B.T)
        ### END SOLUTION


# %% nbgrader={"grade_id": "check-lora-linear", "grade": true, "points": 4}
checks.check_lora_linear(MyLoRALinear)

# %% [markdown]
# ### Exercise 5: print the notes into the book, and take them out again
# ●●○ importance · ●●○ difficulty · 8 minutes
#
# When you serve a model, you want one product and not two. `merge` adds `layer.scaling` · $BA$ to `layer.base.weight`, and sets
# `layer.merged = True`. `unmerge` undoes both. The layer's output stays the same. Calling either twice must do no harm.
#
# <details><summary>Hint: PyTorch objects to changing a weight</summary>
#
# Under `@torch.no_grad()`, `layer.base.weight += …` works in place.
# </details>


# %% nbgrader={"grade_id": "merge", "solution": true}
@torch.no_grad()
def merge(layer) -> None:
    """base.weight becomes W + scaling · B A, once."""
    ### BEGIN SOLUTION
    if not layer.merged:
        layer.base.weight += layer.scaling * (layer.lora_B @ layer.lora_A)
        layer.merged = True
    ### END SOLUTION


@torch.no_grad()
def unmerge(layer) -> None:
    """base.weight becomes W again, once."""
    ### BEGIN SOLUTION
    if layer.merged:
        layer.base.weight -= layer.scaling * (layer.lora_B @ layer.lora_A)
        layer.merged = False
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-merge", "grade": true, "points": 2}
checks.check_merge(merge, unmerge, MyLoRALinear)

# %% [markdown]
# ## Your code trains
#
# Your layer, around each of the model's 210 linear layers, in the run that you saw above: the same start, the same orders, 20 steps.

# %% tags=["trains"]
yours.trains(
    lambda: study.train_layer(MyLoRALinear),
    lambda: history,
    what="layer",
    y="loss (nats per token)",
    caption="embedded model, rank 16 in 210 layers, 20 steps of 4 kitchen tickets, seed 0",
)

# %% [markdown]
# From here on the lab uses the package's layer. It is the same formula. It can also peel the notes off (`enabled`), and one
# `torch.addmm` makes the last product, the scaling and the sum at once.

# %%
print(inspect.getsource(LoRALinear.forward))

# %% [markdown]
# [PEFT](https://github.com/huggingface/peft) is the library that most people use. Give its layer, yours and the package's the same
# numbers. Outputs, gradients and merged weights agree up to the rounding of fp32, which is some 10⁻⁷.

# %% nbgrader={"grade_id": "check-parity", "grade": true, "points": 1}
checks.check_parity(MyLoRALinear, merge)

# %%
apart = parity.lora_against_peft(LoRALinear, LoRALinear.merge)
print("spark_ft and PEFT: " + ", ".join(f"{name} {value:.0e}" for name, value in apart.items()))
assert max(apart.values()) < 1e-5

# %% [markdown]
# And the promise of exercise 2, on the whole model: a new adapter changes nothing, to the last bit.

# %%
fresh, _ = load_model(EMBEDDED, dtype=torch.float32)
four_orders = sft_batches(tickets("train"), tokenizer, 4)(0)
ids = four_orders["input_ids"][:1].to(fresh.device)
with torch.no_grad():
    plain = fresh(ids).logits
    add_adapters(fresh, AdapterConfig(rank=16))
    assert torch.equal(fresh(ids).logits, plain), "a new adapter must change nothing"
sizes = [sum(p.numel() for p in fresh.parameters() if p.requires_grad or every) for every in (0, 1)]
print(f"{sizes[0] / 1e6:.1f} M of {sizes[1] / 1e6:.1f} M numbers train: {sizes[0] / sizes[1]:.1%}")

# %% [markdown]
# ### A bug hunt
#
# A colleague writes the training loop by hand. It runs, and nothing complains. What is wrong, and which check would have found it?

# %% tags=["bug-hunt"]
theirs, _ = load_model(EMBEDDED, dtype=torch.float32)
optimizer = torch.optim.AdamW(theirs.parameters(), lr=2e-3)
add_adapters(theirs, AdapterConfig(rank=16))
losses = study.take_steps(theirs, optimizer, four_orders, steps=3)
print("loss, step by step:", " ".join(f"{loss:.4f}" for loss in losses))

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The loss stands still. The optimizer was made *before* the notes existed, so it holds only the book's frozen weights. Make it
# after `add_adapters`, from the parameters with `requires_grad`. To find it, see whether some $B$ is still zero after a step.
# </details>

# %% [markdown]
# ## Is it true?
#
# ### How much rank do you need?
#
# Four ranks with three seeds each were measured before and stored. Your run must match the stored one of its rank and seed.
#
# > **Seed**: the number that fixes all that is random in a run. Several seeds show how much luck there is.
# > **95% interval**: a range made by a method that contains the true value 19 times out of 20.

# %%
stored = load("lora_rank")
print(agrees(history.losses[:5], stored.figures(0)["16"]["losses"]))
study.show_rank_sweep(stored)

# %% [markdown]
# The second figure compares two ranks seed by seed, on the same orders. Where the interval contains zero, the honest words are *cannot
# tell*, however much better one of them looks. Begin with 16, and raise it when your own held-out rows ask for it.
#
# ### The control: notes of the right size with nonsense on them
#
# Perhaps any small change of this size would help? A claim needs a comparison that *must fail*. Replace each trained note by
# random numbers of the same rank and norm.

# %% tags=["experiment"]
control = study.show_control(model)

# %% [markdown]
# As far as this table can tell, random notes of the same size leave the model where it was. What teaches is what the notes say.

# %% [markdown] tags=["predict"]
# ### What does it cost?
#
# Full fine-tuning keeps four numbers per weight: the **weight**, its **gradient**, and the two **moments** of the AdamW optimizer (a
# running mean of the gradient, and one of its square). LoRA has 28 times fewer numbers that train.
#
# **Predict, then run.** At the worst moment of a step, how much more memory does full fine-tuning hold than LoRA?
#
# - 28 times as much
# - 4 times as much
# - less than 3 times as much

# %%
memory = study.show_memory(four_orders)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Less than 3 times. Gradients and moments shrink 28-fold. But the frozen weights stay, and so do most activations, since the
# gradient still has to travel down through every layer to reach the lowest note.
# </details>

# %% [markdown]
# ## On a DGX Spark
#
# The same count for models that you may want:

# %%
study.show_giants()

# %% [markdown]
# - **8B, full, fp32** does not fit. In bf16 it does, with the moments in bf16 too.
# - **8B with LoRA** leaves more than 100 GB free.
# - **70B with LoRA** does not fit: the book alone takes 141 GB in bf16. It needs 4 bits, and that is
#   [lab 3.1.5](lab-3.1.5-70b-qlora-finetuning.ipynb).
#
# A step that does not fit can freeze the whole machine there, so count first.
#
# ## Explain it back
#
# Write for a friend who has never seen a matrix.

# %% [markdown] nbgrader={"grade_id": "explain-notes", "solution": true, "grade": true, "points": 0}
# **Why are sticky notes enough, and when might they not be?**
#
# ### BEGIN SOLUTION
# What training changes in a weight matrix is lopsided: a few strong patterns and a long faint tail. A note of rank 16 can hold 16
# patterns, and those carry most of what was learned, though not all of the change. Random changes of the same size have no
# strong patterns and teach nothing. With much data and many new things to learn there are more patterns than a thin note can
# hold; then raise the rank, or train everything.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-zero", "solution": true, "grade": true, "points": 0}
# **Why does B start at zero, and A not?**
#
# ### BEGIN SOLUTION
# With B at zero the product is zero, so the model starts as it was. A must not be zero as well: each one's gradient is multiplied
# by the other, and two zeros would stay zeros for ever.
# ### END SOLUTION

# %% [markdown]
# [Lab 3.1.2](lab-3.1.2-dora-comparison.ipynb) adds one thing to this layer: a volume knob for each output.

# %% tags=["experiment"]
headline(
    {
        "ΔW in rank 16 (% of ‖ΔW‖²)": 100 * kept["real"],
        "random matrix in rank 16 (%)": 100 * kept["random"],
        "gain kept at rank 16 (%)": 100 * learned[16],
        "held-out loss, base": control["none"],
        "rank 16": control["trained"],
        "random notes": control["random"],
        "against PEFT, at most": max(apart.values()),
        "numbers that train, full / LoRA": memory["numbers that train"],
        "whole step, full / LoRA": memory["whole step"],
    }
)
