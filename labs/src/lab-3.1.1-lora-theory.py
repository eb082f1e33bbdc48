# %% [markdown]
# # 3.1.1 Why are sticky notes enough?
#
# **Time**: about 75 minutes with the exercises; the notebook itself runs in about two minutes on two CPU cores.
#
# When you are done you can
#
# - say, byte by byte, what it costs to train every weight of a model,
# - look at what training really changed in a weight matrix, and say how much of it a small note can hold,
# - write a LoRA layer from nothing: start, scale, forward, count, merge, unmerge,
# - choose a rank by measuring, and recognise a comparison that proves nothing.
#
# Everything here happens on a real language model of 135 million parameters that came with the package. No download.

# %% [markdown]
# ## The textbook and the sticky notes
#
# You own a thick chemistry textbook, and next term you teach pharmacists. You could have the whole book typeset anew, with a
# word changed here and there on every page. Or you leave the print alone and put sticky notes in the margins: *for your
# patients, this reaction is the one that matters*. The notes are thin. You can peel them off. A colleague can put other notes
# into the same book.
#
# The book is a matrix of weights $W$. The typesetter's way is **full fine-tuning**: every number of $W$ may change. The notes
# are **LoRA**, low-rank adaptation ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)): $W$ stays as printed, and beside it
# stand two thin matrices whose product is added to it.
#
# $$W' = W + \frac{\alpha}{r}\, B A$$
#
# In words: $A$ has $r$ rows and reads the input; $B$ has $r$ columns and writes to the output; $r$, the **rank**, is how many
# separate things the notes can say; $\alpha$ (alpha) is how loudly they are read. For a matrix of 1000 × 1000 and $r$ = 16,
# $A$ is 16 × 1000 and $B$ is 1000 × 16: 32,000 numbers beside a million, 3.2%.
#
# One question decides whether that is a good idea: **is what training changes thin enough for a note?** You will measure it.

# %%
import inspect
import itertools

import torch
from torch import nn

from spark_ft import (
    AdapterConfig,
    LoRALinear,
    TrainConfig,
    add_adapters,
    load_model,
    read_records,
    sft_batches,
    sft_loss,
    train,
)
from spark_ft.adapters import adapted_layers
from spark_ft.embedded import EMBEDDED
from spark_ft.files import ROOT
from spark_ft.lab import headline, plots
from spark_ft.lab.checks import lab_3_1_1 as checks
from spark_ft.lab.experiments import agrees, load
from spark_ft.lab.experiments.common import held_out
from spark_ft.lab.experiments.lab_3_1_1 import SETTINGS, tune_rank
from spark_ft.memory import measure
from spark_ft.memory.plan import plan_step
from spark_ft.stats import mean_interval, paired_difference

TICKETS = ROOT / "data" / "kitchen_tickets"
train_rows = read_records(TICKETS / "train.jsonl", "sft")
held_out_rows = read_records(TICKETS / "validation.jsonl", "sft")[: SETTINGS["held-out tickets"]]
print(train_rows[0]["prompt"], "\n→", train_rows[0]["completion"])

# %% [markdown]
# That is the skill we teach in this lab: a waiter's note goes in, a ticket for the kitchen comes out. The training rows and the
# held-out rows share no order.
#
# ## What it costs to change every page
#
# Full fine-tuning keeps four numbers for every weight: the **weight**, its **gradient** (which way is downhill), and the two
# **moments** of AdamW (a running average of the gradient, and one of its square). The next cell takes one real training step on
# four tickets with every weight trainable, follows every tensor of the step from its birth to its death (`spark_ft.memory.measure`), and asks
# the plan what was there at the worst moment (`plan_step` runs the same step on tensors that have a shape and no memory).

# %%
KINDS_OF_WEIGHTS = ("linear layers", "embeddings and head", "norms", "adapters")


def worst_moment(model, batch) -> dict[str, int]:
    """The worst moment of an AdamW step in bytes, by what they are: planned, and held to the real step."""
    plan = plan_step(model.train(), batch)
    weights = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    for _ in range(2):  # AdamW makes its moments at the end of the first step
        optimizer.zero_grad(set_to_none=True)
        with measure("cpu") as memory:
            total, tokens = sft_loss(model, batch)
            (total / tokens).backward()
        optimizer.step()
    moments = sum(m.nbytes for state in optimizer.state.values() for name, m in state.items() if name != "step")
    counted = weights + moments + memory.extra
    print(f"counted {counted / 1e6:.0f} MB at the worst moment, planned {plan.peak / 1e6:.0f} MB: {plan.where}")
    assert abs(plan.peak / counted - 1) < 0.02
    parts = {
        "weights": sum(plan.terms.get(kind, 0) for kind in KINDS_OF_WEIGHTS),
        "gradients": plan.terms.get("gradients", 0),
        "AdamW moments": plan.terms["optimizer moments"],
    }
    return {**parts, "activations, scratch": plan.peak - sum(parts.values())}


model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
four_tickets = sft_batches(train_rows, tokenizer, 4)(0)
model.cpu().requires_grad_(True)
full = worst_moment(model, four_tickets)
parameters = sum(p.numel() for p in model.parameters())
for name, size in full.items():
    print(f"{name:<22}{size / 1e6:8.0f} MB {size / parameters:6.2f} bytes per parameter")
print(f"{'at the worst moment':<22}{sum(full.values()) / 1e6:8.0f} MB for {parameters / 1e6:.1f} M parameters")
del model

# %% [markdown]
# Four bytes each for a weight, its gradient and two moments: sixteen bytes per parameter, whatever the batch. They are not all there at once: at the worst
# moment of this step, activations are still there and most gradients are not. A longer batch moves that moment and makes the last row larger.
#
# The same count for models you may want: we build the published shapes of Llama 3 8B and 70B on PyTorch's `meta` device, where
# a tensor has a shape and no memory, put rank-16 adapters on them, and count. Sizes are in GB (10⁹ bytes).

# %%
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPES = {  # from each model's published config.json
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
SPARK_GB = 119.7 * 2**30 / 1e9  # what the system of a DGX Spark sees of its "128 GB"

print(f"{'':<6}{'parameters':>12}{'full, fp32':>12}{'full, bf16':>12}{'LoRA r16':>10}{'adapters':>10}{'of linear':>11}")
giants = {}
for name, shape in SHAPES.items():
    config = LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
    with torch.device("meta"):
        giant = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        number = sum(p.numel() for p in giant.parameters())
        linear = sum(m.weight.numel() for n, m in giant.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
        add_adapters(giant, AdapterConfig(rank=16))
    adapters = sum(p.numel() for p in giant.parameters() if p.requires_grad)
    giants[name] = {
        "full fp32": number * 16 / 1e9,
        "full bf16": number * 8 / 1e9,  # weights, gradients and both moments, two bytes each
        "LoRA": (number * 2 + adapters * 16) / 1e9,  # the book in bf16; notes, gradients, moments in fp32
        "share": adapters / linear,
    }
    g = giants[name]
    print(
        f"{name:<6}{number / 1e9:>10.2f} B{g['full fp32']:>9.0f} GB{g['full bf16']:>9.0f} GB{g['LoRA']:>7.0f} GB"
        f"{adapters / 1e6:>8.0f} M{g['share']:>10.2%}"
    )
print(f"\na DGX Spark has {SPARK_GB:.0f} GB for everything; activations come on top of each number above")

# %% [markdown]
# Read the columns from left to right. Full fine-tuning of 8B in fp32 just fails to leave room for anything else; of 70B it is
# hopeless either way. With LoRA the cost is the frozen book itself, and the notes weigh next to nothing. (The 70B book
# alone is still too large for the Spark in bf16. Lab 3.1.5 compresses it.)
#
# So the notes are cheap. Are they enough?
#
# ## Is the update really low-rank?
#
# Train with every number free to move, and subtract: $\Delta W = W_\text{after} - W_\text{before}$. Any matrix can be written as
# a sum of **layers of paint**, each one a column times a row, sorted from the strongest to the faintest. How strong each layer
# is, is called a **singular value**. A matrix that needs only $r$ of these layers has rank $r$, and fits into a note of rank
# $r$ exactly. Keeping the strongest $k$ layers is the best that any rank-$k$ note can do (Eckart and Young, 1936).
#
# The next cell frees three matrices, one from the middle of the model and two further up, and trains them fully for 12 steps of
# four tickets. As a yardstick it draws, for each, a **random matrix of the same shape and the same norm** (the norm is the
# square root of the sum of squares: how much changed in all).

# %% tags=["experiment"]
MATRICES = ["model.layers.14.self_attn.q_proj", "model.layers.20.mlp.down_proj", "model.layers.22.self_attn.o_proj"]

model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
base_figures = held_out(model, tokenizer, held_out_rows)
model.requires_grad_(False)
before = {}
for name in MATRICES:
    weight = model.get_submodule(name).weight.requires_grad_(True)
    before[name] = weight.detach().clone()
history = train(
    model, sft_batches(train_rows, tokenizer, 4), sft_loss, TrainConfig(steps=12, learning_rate=1e-3, progress=False)
)
delta = {name: model.get_submodule(name).weight.detach() - before[name] for name in MATRICES}
print("loss, step by step:", " ".join(f"{loss:.2f}" for loss in history.losses))
for name in MATRICES:
    print(f"{name:<34}{tuple(delta[name].shape)!s:<14}changed by {delta[name].norm() / before[name].norm():.1%} of its norm")

# %% tags=["experiment"]
def missing(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values, and the share of the norm that the best rank-k matrix leaves out, for k = 0, 1, 2, …"""
    values = torch.linalg.svdvals(matrix)
    rest = (values**2).flip(0).cumsum(0).flip(0)  # energy of layer k and all fainter ones
    return values, torch.cat([rest, torch.zeros(1)]).div(rest[0]).sqrt()


generator = torch.Generator().manual_seed(0)
fig, (left, right) = plots.figure(
    "What training changed is concentrated in a few layers of paint; noise is not",
    x="layer of paint, strongest first",
    columns=2,
    width=9.5,
    caption="solid: ΔW of three matrices, full fine-tuning, 12 steps of 4 kitchen tickets, seed 0. Dotted: random matrices of "
    "the same shapes and norms.",
)
left.set(ylabel="singular value (share of the norm)", xscale="log", yscale="log", ylim=(3e-4, 1))
right.set(xlabel="rank k of the note", ylabel="left out by the best note (% of ‖ΔW‖)", xscale="log", ylim=(0, 105))
energy, random_energy = {}, {}
for name, role in zip(MATRICES, ("yours", "package", "reference"), strict=True):
    noise = torch.randn(delta[name].shape, generator=generator)
    noise *= delta[name].norm().cpu() / noise.norm()
    for matrix, style, label, kept in (
        (delta[name].cpu(), {"color": plots.COLORS[role]}, f"layer {name.split('.')[2]}, {name.split('.')[-1]}", energy),
        (noise, {"color": plots.COLORS[role], "linestyle": ":", "alpha": 0.7}, None, random_energy),
    ):
        values, error = missing(matrix)
        left.plot(range(1, len(values) + 1), values / matrix.norm(), label=label, **style)
        right.plot(range(1, len(error)), 100 * error[1:], **style)
        kept[name] = {k: 1 - error[k].item() ** 2 for k in (1, 4, 16, 64)}
left.plot([], [], color=plots.INK, linestyle=":", label="random")
left.legend(fontsize=8)
mean_kept = {k: sum(e[k] for e in energy.values()) / len(energy) for k in (1, 4, 16, 64)}
mean_random = {k: sum(e[k] for e in random_energy.values()) / len(random_energy) for k in (1, 4, 16, 64)}
plots.show(
    fig,
    alt=f"Two panels. Left: singular values of three real updates fall steeply, those of random matrices are nearly flat. Right: "
    f"the best rank-16 note holds on average {mean_kept[16]:.0%} of the squared norm of a real update, and "
    f"{mean_random[16]:.0%} of a random one.",
)
print(f"{'share of ‖ΔW‖² in the first':<32}" + "".join(f"{k:>6}" for k in mean_kept) + "  layers of paint")
print(f"{'real update, mean of three':<32}" + "".join(f"{v:>6.0%}" for v in mean_kept.values()))
print(f"{'random matrix':<32}" + "".join(f"{v:>6.0%}" for v in mean_random.values()))

# %% [markdown]
# The real update is **not exactly** low-rank: the curve has a long tail, and even rank 64 leaves something out. But most of the
# change sits in a few layers of paint, where noise spreads over all of them. (A suspect for the tail: AdamW divides each entry by
# that entry's own size, which makes faint entries as loud as strong ones. Swap in `torch.optim.SGD` and see whether it shrinks.)
#
# Is the tail worth having? Ask the model. Keep only the best rank-$k$ part of each $\Delta W$, put it back, and look at the held-out
# tickets: does the model still know what it learned?

# %% tags=["experiment"]
@torch.no_grad()
def with_rank(k: int | None) -> dict[str, float]:
    """Held-out figures with each update cut to its best rank-k part; None keeps it whole."""
    for name in MATRICES:
        U, S, Vh = torch.linalg.svd(delta[name], full_matrices=False)
        update = delta[name] if k is None else (U[:, :k] * S[:k]) @ Vh[:k]
        model.get_submodule(name).weight.copy_(before[name] + update)
    return held_out(model, tokenizer, held_out_rows[:16])


cut = {k: with_rank(k)["held-out loss"] for k in (0, 1, 4, 16, None)}
gained = {k: (cut[0] - loss) / (cut[0] - cut[None]) for k, loss in cut.items()}
for k, loss in cut.items():
    label = "the whole update" if k is None else f"its best rank-{k} part" if k else "no update"
    print(f"{label:<24}held-out loss {loss:.3f}   {gained[k]:>5.0%} of the gain")
del model

# %% [markdown]
# **What you should see.** The tail holds a good part of the norm and much less of the learning: a rank-16 part of the update, which is
# what a rank-16 note could say, keeps most of the gain in held-out loss. This was a short training on an easy task. On large
# data sets full fine-tuning learns more than LoRA does, and forgets more
# ([Biderman et al. 2024](https://arxiv.org/abs/2405.09673)).
#
# One honest gap: cutting a finished update is not the same as *training* inside rank $k$ from the start. That comes below. First you
# build the layer.

# %% [markdown]
# ## Build it
#
# PyTorch stores a linear layer's weight as (out, in) and computes `x @ weight.T`. Keep that in mind for every shape here.
#
# ### Exercise 1: a start that changes nothing
# ●○○ · 5 minutes
#
# Return `(A, B)`. The product $BA$ must be zero, so that the adapted model starts as the model you had. And yet the two must be
# able to learn. Draw the entries of the random one uniformly from $-1/\sqrt{\text{in}}$ to $+1/\sqrt{\text{in}}$; then what it
# makes of an input is about as large as the input.
#
# <details><summary>Hint: which one is zero?</summary>
#
# The gradient of $A$ contains $B$, and the gradient of $B$ contains $A$. If both were zero, both gradients would be. One of them has
# to be random, and it is $A$: it reads the input, so it already looks in $r$ different directions when the first gradient
# arrives at $B$.
# </details>

# %% nbgrader={"grade_id": "init-adapter", "solution": true}
def init_adapter(in_features: int, out_features: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
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
# ### Exercise 2: the note's share of the output
# ●○○ · 5 minutes
#
# $\frac{\alpha}{r} B A x$ for a whole batch. Each input is a *row* of `x`, so the formula turns around: $x A^\top B^\top$. The rank
# is in `A`'s shape. Go through the narrow middle, and never build the large matrix $BA$.
#
# Why divide by $r$? $BAx$ is a sum of $r$ contributions. With $\alpha/r$ you can try another rank and keep the learning rate.
#
# <details><summary>Hint: shapes</summary>
#
# `x` is (…, in). `x @ A.T` is (…, rank). Times `B.T` it is (…, out).
# </details>

# %% nbgrader={"grade_id": "lora-update", "solution": true}
def lora_update(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha / rank · B A x for every row of x (…, in), as (…, out)."""
    ### BEGIN SOLUTION
    rank = A.shape[0]
    return alpha / rank * (x @ A.T @ B.T)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-lora-update", "grade": true, "points": 2}
checks.check_lora_update(lora_update)

# %% [markdown]
# ### Exercise 3: how many numbers is that?
# ●○○ · 5 minutes
#
# `shapes` lists the (out, in) of every matrix that gets a note. Return the number of trainable parameters. No tensors needed.
#
# <details><summary>Hint</summary>
#
# $A$ is (rank, in) and $B$ is (out, rank). Add their sizes, matrix by matrix. Most matrices of a language model are not square.
# </details>

# %% nbgrader={"grade_id": "lora-parameters", "solution": true}
def lora_parameters(shapes: list[tuple[int, int]], rank: int) -> int:
    """Trainable parameters of LoRA of one rank on matrices of these (out, in) shapes."""
    ### BEGIN SOLUTION
    return sum(rank * (out_features + in_features) for out_features, in_features in shapes)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-lora-parameters", "grade": true, "points": 1}
checks.check_lora_parameters(lora_parameters)

# %% [markdown]
# ### Exercise 4: the layer
# ●●○ · 15 minutes
#
# Now a layer that can stand where `nn.Linear` stood:
#
# - the base is **frozen**, weight and bias; `lora_A` and `lora_B` are `nn.Parameter`s and train;
# - `self.scaling` is $\alpha/r$;
# - the output is the base's plus the update;
# - **dropout** makes training forget some entries of the input at random, so that no single one is leaned on. It acts on the
#   *update's* input only, and only in training. The book is never smudged.
#
# <details><summary>Hint: freezing</summary>
#
# `base.requires_grad_(False)` freezes all parameters of a module at once.
# </details>
# <details><summary>Hint: dropout</summary>
#
# `nn.Dropout(p)` as a submodule follows `train()` and `eval()` by itself. `F.dropout(x, p)` does not, unless you pass
# `training=self.training`.
# </details>

# %% nbgrader={"grade_id": "lora-linear", "solution": true}
class MyLoRALinear(nn.Module):
    """base(x) + alpha / rank · B A dropout(x); only A and B train."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.merged = False
        ### BEGIN SOLUTION
        base.requires_grad_(False)
        bound = base.in_features**-0.5
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        ### END SOLUTION

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ### BEGIN SOLUTION
        return self.base(x) + self.scaling * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T)
        ### END SOLUTION


# %% nbgrader={"grade_id": "check-lora-linear", "grade": true, "points": 3}
checks.check_lora_linear(MyLoRALinear)

# %% [markdown]
# ### Exercise 5: print the notes into the book, and take them out again
# ●●○ · 10 minutes
#
# For serving you don't want two products where one will do. `merge` adds $\frac{\alpha}{r}BA$ to `layer.base.weight` and sets
# `layer.merged = True` (the forward of the layers you get here then leaves the update out). `unmerge` undoes both. Calling either
# twice must do no harm: sooner or later somebody will.
#
# <details><summary>Hint: PyTorch objects to changing a weight</summary>
#
# A weight is a parameter, and PyTorch guards those against changes behind its back. `@torch.no_grad()` above each function says:
# this is bookkeeping, and no gradient should know of it. Under it, `layer.base.weight += …` works in place.
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
checks.check_merge(merge, unmerge)

# %% [markdown]
# ## The package's version
#
# This is what all later labs train with. Two differences from yours: `enabled` lets you peel the notes off for a moment (lab 3.1.7
# gets its reference model that way, for free), and one `torch.addmm` makes the last product, the scaling and the sum at once.

# %%
print(inspect.getsource(LoRALinear.forward))

# %% [markdown]
# On the whole model, the promise of exercise 1, held to the last bit:

# %%
model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
with torch.no_grad():
    note = four_tickets["input_ids"][:1].to(model.device)
    plain = model(note).logits
    add_adapters(model, AdapterConfig(rank=16))
    adapted = model(note).logits
assert torch.equal(plain, adapted), "a new adapter must change nothing"
layers = adapted_layers(model)
trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{len(layers)} layers adapted; {trainable / 1e6:.2f} M of {parameters / 1e6:.1f} M parameters train, "
      f"{trainable / parameters:.1%}; logits unchanged, bit for bit: {torch.equal(plain, adapted)}")  # fmt: skip

# %% [markdown]
# That share is larger than those in the last column of the table above. A note grows with the *sides* of a matrix and the matrix
# with its *area*, so the larger the book, the thinner the notes beside it.
#
# ## Yours, the package's, PEFT's
#
# [PEFT](https://github.com/huggingface/peft) is the library most people use. Same weights, same A and B, same input; then every
# output, every gradient and the merged weight compared. The number is the largest difference as a share of the largest entry.

# %% nbgrader={"grade_id": "check-parity", "grade": true, "points": 1}
checks.check_parity(MyLoRALinear, merge)

# %%
from spark_ft.lab.parity import lora_against_peft

_ = torch.manual_seed(0)
parity = lora_against_peft(LoRALinear, LoRALinear.merge)
print("spark_ft against PEFT")
for name, difference in parity.items():
    print(f"  {name:<16}{difference:.1e}")

# %% [markdown]
# Differences of 10⁻⁷ are the rounding of fp32. It is the same layer three times.
#
# ## How much rank do you need?
#
# Cutting a finished update to rank 1 lost about half of what it had taught. *Training* at rank 1 may do better, since then every
# step is taken with the rank in mind, and every layer can help. Train it and see: every linear layer of the model but the output
# head gets a note; 20 steps of 4 tickets; $\alpha = 2r$, so the scale stays 2 and only the rank differs. Then three figures on 32
# held-out tickets:
#
# - **loss** on the answer's tokens,
# - **token accuracy**: how often the most probable token is the right one, given the right ones before it,
# - **exact match**: tickets in which *every* token is right. Those are just the tickets that greedy generation would write letter
#   by letter, so we get exact match without generating anything.
#
# You train rank 16 here and now. Three seeds of four ranks take too long to wait for, so those were measured before, with
# `make experiments`, and lie in `data/measurements/lora_rank.json`. Your run must match the stored one; the cell checks that.

# %% tags=["experiment"]
stored = load("lora_rank")
tuned, live = tune_rank(rank=16, seed=0)
live_figures = held_out(tuned, tokenizer, held_out_rows)
print("rank 16, seed 0: loss", " ".join(f"{loss:.2f}" for loss in live.losses[::3]))
print(agrees(live.losses[:5], stored.figures(0)["16"]["losses"]))
_, start = tune_rank(rank=1, seed=0, first=4)
print("rank 1, seed 0:", agrees(start.losses, stored.figures(0)["1"]["losses"]))
for name, figures in (("before", base_figures), ("after, rank 16", live_figures)):
    print(f"{name:<16}" + "   ".join(f"{key} {value:.3f}" for key, value in figures.items()))

# %% [markdown]
# Which ranks differ? Three seeds scatter, and so does every mean of them. Compare two ranks **seed by seed** (the same rows in
# the same order), and look at the 95% interval of the difference. If it contains zero, the honest words are *no measurable
# difference*, however much better one of the two looks in a figure.

# %% tags=["experiment"]
ranks = SETTINGS["ranks"]
helped_up_to = ranks[0]
for low, high in itertools.pairwise(ranks):
    fall = paired_difference(stored.values(low, "held-out loss"), stored.values(high, "held-out loss"))
    verdict = fall.verdict(f"rank {high} is better", f"rank {low} is better")
    helped_up_to = high if fall.low > 0 else helped_up_to
    print(f"rank {low:>2} → {high:>2}: held-out loss falls by {fall.signed()}: {verdict}")

# %% tags=["experiment"]
sweep = {key: [mean_interval(stored.values(rank, key)) for rank in ranks] for key in base_figures}
fig, (left, right) = plots.figure(
    f"More rank measurably helped up to rank {helped_up_to}" + ("; not beyond" if helped_up_to < ranks[-1] else ""),
    x="rank",
    columns=2,
    width=9.5,
    caption=f"{SETTINGS['steps']} steps of 4 kitchen tickets, 32 held-out tickets. Mean and 95% t interval. {stored.origin()}. "
    "Diamond: the run you just made.",
)


def draw(ax, key, role, label, scale=1.0):
    value = [scale * e.value for e in sweep[key]]
    spread = [[scale * (e.value - e.low) for e in sweep[key]], [scale * (e.high - e.value) for e in sweep[key]]]
    ax.errorbar(ranks, value, yerr=spread, capsize=3, label=label, **plots.LINE[role])


draw(left, "held-out loss", "yours", "LoRA")
left.axhline(base_figures["held-out loss"], color=plots.COLORS["control"], linestyle="--", label="no adapter")
left.plot(16, live_figures["held-out loss"], "D", color=plots.COLORS["other"], label="live, seed 0")
left.set(ylabel="held-out loss (nats per token)", ylim=(0, None))
draw(right, "token accuracy", "yours", "tokens right", 100)
draw(right, "exact match", "package", "whole tickets right", 100)
right.set(ylabel="held-out (%)", ylim=(0, 100))
for ax in (left, right):
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(rank) for rank in ranks])
    ax.legend(fontsize=8)
plots.show(
    fig,
    alt="Held-out loss by rank: "
    + ", ".join(f"rank {rank} {e.value:.2f}" for rank, e in zip(ranks, sweep["held-out loss"], strict=True))
    + f", against {base_figures['held-out loss']:.2f} with no adapter. Tokens right: "
    + ", ".join(f"{e.value:.0%}" for e in sweep["token accuracy"])
    + ". Whole tickets right: "
    + ", ".join(f"{e.value:.0%}" for e in sweep["exact match"])
    + ".",
)
print(f"{'rank':<6}{'held-out loss':<24}{'tokens right':<20}whole tickets right, seed by seed")
for i, rank in enumerate(ranks):
    tickets = ", ".join(f"{value:.0%}" for value in stored.values(rank, "exact match"))
    print(f"{rank:<6}{sweep['held-out loss'][i]!s:<24}{sweep['token accuracy'][i].percent():<20}{tickets}")

# %% [markdown]
# ## The control: notes with the right thickness and nothing on them
#
# Perhaps any small change of this size would help? A claim like ours needs a comparison that *must fail*. Take your trained model, and
# in every layer replace $\Delta W$ by a random one of the same rank and the same norm. Three draws.

# %% tags=["experiment"]
@torch.no_grad()
def scribble(model, norms: dict[str, float], seed: int) -> None:
    """Fill every adapter with noise, as strong as the trained one was."""
    torch.manual_seed(seed)
    for name, layer in adapted_layers(model).items():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
        layer.lora_B *= norms[name] / layer.delta_weight().norm()


with torch.no_grad():
    norms = {name: layer.delta_weight().norm().item() for name, layer in adapted_layers(tuned).items()}
random_losses = []
for seed in range(3):
    scribble(tuned, norms, seed)
    random_losses.append(held_out(tuned, tokenizer, held_out_rows)["held-out loss"])
random_loss = mean_interval(random_losses)
print(f"no adapter             held-out loss {base_figures['held-out loss']:.3f}")
print(f"trained, rank 16       held-out loss {live_figures['held-out loss']:.3f}")
print(f"random, same norm      held-out loss {random_loss.value:.3f}, 95% interval [{random_loss.low:.3f}, {random_loss.high:.3f}]")
random_gain = (base_figures["held-out loss"] - random_loss.value) / (base_figures["held-out loss"] - live_figures["held-out loss"])
inside = random_loss.low <= base_figures["held-out loss"] <= random_loss.high
verdict = "no measurable difference" if inside else "worse" if random_gain < 0 else "better"
print(f"random notes against no notes: {verdict}; they reach {random_gain:.1%} of what training gained")
assert random_gain < 0.1, "a random adapter should not do what a trained one does"
del tuned

# %% [markdown]
# It is not the size of the change that teaches the model its new trade. It is what the notes say.
#
# ## What did it cost?
#
# The same step as at the top, on the same four tickets, with rank-16 adapters instead of every weight.

# %%
model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
add_adapters(model.cpu(), AdapterConfig(rank=16))
lora = worst_moment(model, four_tickets)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
del model

fig, ax = plots.figure(
    f"At its worst moment a full step holds {sum(full.values()) / sum(lora.values()):.1f} times what a LoRA step holds",
    x="memory of one training step (MB)",
    y="what trains",
    width=9.5,
    height=3.0,
    caption="embedded model, fp32, 4 tickets, at the worst moment of each step; planned, and equal to the tensors that were counted.",
)
offset = {"full": 0.0, "LoRA r16": 0.0}
for part, role in zip(full, ("yours", "package", "reference", "control"), strict=True):
    sizes = [full[part] / 1e6, lora[part] / 1e6]
    ax.barh(list(offset), sizes, left=list(offset.values()), label=part, **plots.BAR[role])
    offset = {name: offset[name] + size for name, size in zip(offset, sizes, strict=True)}
ax.invert_yaxis()
ax.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plots.show(
    fig,
    alt=f"Stacked bars of one step's memory. Full: {offset['full']:.0f} MB, of which gradients {full['gradients'] / 1e6:.0f} and "
    f"moments {full['AdamW moments'] / 1e6:.0f}. LoRA: {offset['LoRA r16']:.0f} MB, gradients {lora['gradients'] / 1e6:.0f} and "
    f"moments {lora['AdamW moments'] / 1e6:.0f}.",
)
for part in full:
    print(f"{part:<22}full {full[part] / 1e6:7.0f} MB     LoRA {lora[part] / 1e6:7.0f} MB")
print(f"numbers that train, each with a gradient and two moments: {parameters / trained:.0f} times fewer; "
      f"the whole step: {offset['full'] / offset['LoRA r16']:.1f} times less")  # fmt: skip

# %% [markdown]
# **What you should see.** Gradients and moments shrink by the share of parameters that train. The weights stay, and so do most of the
# activations, since the gradient still has to travel down through every layer to reach the lowest note. That is why LoRA alone does
# not turn a 70B model into a small one, and why the next savings come from compressing the weights (3.1.5).

# %% [markdown]
# ## On your DGX Spark
#
# The table near the top holds the numbers, counted from the true shapes. The system sees 119.7 GiB or a little more.
#
# - **8B, full, fp32**: about all the memory there is, before any activation. Don't. In bf16 it fits, with the moments in bf16 too.
# - **8B, LoRA r16**: the book in bf16 and the notes; more than 100 GB stay free. Use them for longer texts and larger batches.
# - **70B, LoRA**: the book alone is 141 GB in bf16. It needs 4 bits: lab 3.1.5.
# - An overrun on unified memory can freeze the machine instead of raising an error. Count first.
#
# ## Common mistakes
#
# - **α without /r.** Works until you change the rank; then every learning rate is wrong. The update of rank 64 is 64 times too loud.
# - **Both matrices zero.** The loss stands still and nothing complains. **Both random**: the model is damaged before step one.
# - **The base left trainable.** Memory and results look like full fine-tuning, because it is. Count `requires_grad`.
# - **Dropout on the base's path.** It smudges the book itself. And dropout still on in eval: answers change from call to call.
# - **Merged twice.** Save, load, merge, and merge again: the update counts double and the model babbles.
# - **“Rank 16 means 16 × 16.”** It means 16 × in plus out × 16.
# - **Believing one run.** Look at the seeds' scatter before you prefer rank 64.
#
# ## Explain it back
#
# Write it for a friend who has never seen a matrix.

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
# ## The numbers of this lab

# %% tags=["experiment"]
best = sweep["held-out loss"][ranks.index(16)]
headline(
    {
        "ΔW in rank 16 (% of its energy)": 100 * mean_kept[16],
        "random matrix in rank 16 (%)": 100 * mean_random[16],
        "gain kept at rank 16 (%)": 100 * gained[16],
        "held-out loss, base": base_figures["held-out loss"],
        "rank 16": live_figures["held-out loss"],
        "random notes": random_loss.value,
        "rank 16, 3 seeds": best.value,
        "against PEFT, at most": max(parity.values()),
        "gradients and moments, full / LoRA": parameters / trained,
        "whole step, full / LoRA": offset["full"] / offset["LoRA r16"],
    }
)
