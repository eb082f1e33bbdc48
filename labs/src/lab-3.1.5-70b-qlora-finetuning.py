# %% [markdown]
# # 3.1.5 How does 70B fit in one desktop?
#
# **Time**: about 60 minutes.
#
# Llama-3.3-70B takes 141 GB in 16 bits. A desktop like the DGX Spark has 128 GB for everything. Yet it can be fine-tuned there. How?
#
# ## What you will make
#
# **NF4**, QLoRA's 4-bit format, byte for byte as the usual library makes it; a model that trains over it; a memory plan for 70B.
#
# ## What you should know first
#
# - LoRA ([3.1.1](lab-3.1.1-lora-theory.ipynb)): a frozen weight $W$, a thin note $\Delta W = \frac{\alpha}{r} BA$ beside it.
# - A byte has 8 bits. bf16 takes 2 bytes per number, fp32 takes 4. GB is 10⁹ bytes.
#
# ## The picture
#
# Your textbook is too heavy for any bag. So have it **scanned in sixteen shades of grey**. Every patch of 64 dots has its own
# brightness, so that pale pages stay readable. Your sticky notes go on top, as sharp as ever.
#
# The scan is NF4, four-bit *NormalFloat*. Scan and notes together are **QLoRA**
# ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)). For each block of 64 weights in a row:
#
# $$w \;\approx\; \text{code}[c] \cdot \text{absmax}, \qquad c \in \{0, \dots, 15\}$$
#
# absmax is the block's largest magnitude. Divided by it, all 64 weights lie between −1 and 1. Each becomes the nearest of sixteen fixed
# levels, and only the level's number $c$ is stored.

# %%
import torch

from spark_ft.embedded import EMBEDDED
from spark_ft.lab import headline, yours
from spark_ft.lab import true_size as giant
from spark_ft.lab.checks import lab_3_1_5 as checks
from spark_ft.lab.experiments import agrees, load
from spark_ft.lab.experiments.common import held_out
from spark_ft.lab.experiments.lab_3_1_5 import tune_on
from spark_ft.lab.kitchen import tickets
from spark_ft.lab.study import lab_3_1_5 as study
from spark_ft.lab.study import memory_70b as memory
from spark_ft.methods.nf4 import NF4_CODE, quantize_nf4
from spark_ft.models import load_tokenizer

# %% [markdown]
# ## It works
#
# The next cell puts the embedded model of 135 million weights into 4 bits and trains notes on it. Then it *plans* the same step for 70B.
#
# > **Held-out loss**: how surprised the model is by right answers that it never saw, in nats (units of log-probability) per token.

# %%
model, history = tune_on("NF4", seed=0)
tokenizer, rows = load_tokenizer(EMBEDDED), tickets("validation")[:32]
learned, stored = held_out(model, tokenizer, rows), load("qlora_against_lora")
study.show_start(model, stored.figures(0)["NF4"]["before"], learned)
plan = memory.plan_70b(length=512)
print(f"Llama-3.3-70B, the same step on a row of 512 tokens: {plan.peak / 1e9:.0f} GB")

# %% [markdown]
# Now build the scan.
#
# ## Build it
#
# ### Exercise 1: sixteen levels
# ●●○ importance · ●●○ difficulty · 8 minutes
#
# Weights look much like draws from a bell curve: many small ones, few large ones. So NF4 puts its levels where the weights are. The
# **quantile** of $p$ is the number below which a share $p$ of the curve lies. The levels are quantiles at evenly spaced $p$:
#
# - eight positive ones: nine shares from `outermost` down to ½, without ½ itself, whose quantile is 0,
# - seven negative ones: eight such shares, again without ½, mirrored,
# - zero itself.
#
# Divide all by the largest and sort them.
#
# <details><summary>Hint</summary>
#
# `torch.linspace(a, b, n)` gives evenly spaced numbers, `torch.special.ndtri(p)` their quantiles, `[:-1]` leaves out the last.
# </details>


# %% nbgrader={"grade_id": "nf4-levels", "solution": true}
def nf4_levels(outermost: float) -> torch.Tensor:
    """Sixteen levels from −1 to 1, sorted: seven negative, zero, eight positive."""
    ### BEGIN SOLUTION
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9))[:-1]
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8))[:-1]
    levels = torch.cat([negative, torch.zeros(1), positive])
    return levels.sort().values / positive.max()
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-levels", "grade": true, "points": 2}
checks.check_levels(nf4_levels)

# %% [markdown]
# ### Exercise 2: to the nearest level
# ●●● importance · ●●○ difficulty · 10 minutes
#
# `weight` has any shape. Take its numbers in order, row after row, in blocks of `block_size`, which divides their number. It may be in
# bf16: compute in fp32. Return
#
# - `codes`, shape (blocks, block_size), `uint8`: the index of the nearest level in `code`, after the block is divided by its absmax,
# - `absmax`, shape (blocks,), fp32: each block's largest *magnitude*.
#
# `code` is sorted, from −1 to 1, and not always NF4's.
#
# <details><summary>Hint: the nearest of many</summary>
#
# `torch.bucketize(x, midpoints)` counts how many midpoints between neighbouring levels lie below each number.
# </details>


# %% nbgrader={"grade_id": "quantize", "solution": true}
def quantize(weight: torch.Tensor, code: torch.Tensor, block_size: int) -> tuple:
    """(codes, absmax): the nearest level's index for each number, and each block's scale."""
    ### BEGIN SOLUTION
    blocks = weight.float().reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax)[:, None]
    midpoints = (code[1:] + code[:-1]) / 2
    codes = torch.bucketize(scaled, midpoints)
    return codes.to(torch.uint8), absmax
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-quantize", "grade": true, "points": 3}
checks.check_quantize(quantize)

# %% [markdown]
# ### Exercise 3: two codes per byte
# ●●○ importance · ●○○ difficulty · 8 minutes
#
# Two neighbours share a byte, the first one in the **high** half: codes 3 and 9 become 3 · 16 + 9 = 57, in bits `0011 1001`. `pack` turns
# an even number of codes, shape (n,), into n/2 bytes. `unpack` turns them back.
#
# <details><summary>Hint</summary>
#
# `codes[::2]` is every other one. `x << 4` is times 16, `x >> 4` shifts back, `x & 15` keeps the low half.
# `torch.stack([a, b], 1).flatten()` gives a₀ b₀ a₁ b₁ …
# </details>


# %% nbgrader={"grade_id": "pack", "solution": true}
def pack(codes: torch.Tensor) -> torch.Tensor:
    """Bytes (n / 2,) from codes (n,), the first of two in the high half."""
    ### BEGIN SOLUTION
    high, low = codes[::2], codes[1::2]
    return (high << 4) | low
    ### END SOLUTION


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Codes (n,) from bytes (n / 2,)."""
    ### BEGIN SOLUTION
    high, low = packed >> 4, packed & 15
    return torch.stack([high, low], 1).flatten()
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-packing", "grade": true, "points": 2}
checks.check_packing(pack, unpack)

# %% [markdown]
# ### Exercise 4: and back
# ●●● importance · ●○○ difficulty · 5 minutes
#
# From `codes` (blocks, block_size) and `absmax` (blocks,) make the weight again, in its `shape`.
#
# <details><summary>Hint</summary>
#
# `code[codes.long()]` looks all levels up at once. A scale belongs to a *row* of `codes`, so stand it upright: `absmax[:, None]`.
# </details>


# %% nbgrader={"grade_id": "dequantize", "solution": true}
def dequantize(codes, absmax, code, shape: tuple) -> torch.Tensor:
    """The weight that codes and scales stand for."""
    ### BEGIN SOLUTION
    blocks = code[codes.long()] * absmax[:, None]
    return blocks.reshape(shape)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-dequantize", "grade": true, "points": 2}
checks.check_dequantize(dequantize)

# %% [markdown]
# ### Exercise 5: how many bits is that?
# ●●○ importance · ●○○ difficulty · 5 minutes
#
# Not four. Each block stores a scale too, in fp32. **Double quantization** puts each scale into 8 bits, and `scales_per_group` of them
# share one fp32 scale. Return the bits per weight. `scales_per_group=None` means that the scales stay in fp32.
#
# <details><summary>Hint</summary>
#
# A block's scale serves `block_size` numbers. A group's scale serves `block_size * scales_per_group` of them.
# </details>


# %% nbgrader={"grade_id": "bits-per-number", "solution": true}
def bits_per_number(block_size: int, scales_per_group: int | None) -> float:
    """Bits that one number takes: its code, and its share of the scales."""
    ### BEGIN SOLUTION
    if scales_per_group is None:
        return 4 + 32 / block_size
    return 4 + 8 / block_size + 32 / (block_size * scales_per_group)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-bits", "grade": true, "points": 1}
checks.check_bits(bits_per_number)

# %% [markdown]
# ### Exercise 6: 70B by hand
# ●●● importance · ●●○ difficulty · 12 minutes
#
# Return a dict of **bytes**. `shape` has the keys hidden, mlp, kv (the keys' width), layers and vocabulary. Blocks of 64, groups
# of 256. What is not in NF4 is in bf16, 2 bytes.
#
# - `"linear layers"`: each layer has query and output (hidden × hidden), key and value (kv × hidden), gate, up and down (mlp × hidden), in
#   doubly quantized NF4.
# - `"embeddings and head"`: two tables, vocabulary × hidden, in bf16.
# - `"notes"`: LoRA of this `rank` on all seven matrices. Each of its numbers has a gradient and AdamW's two moments.
# - `"checkpoints"`: for one row of `length` tokens, the input of every layer, and the output of the last one.
#
# > **Checkpointing**: a layer keeps only its input. Backward computes it again, one layer at a time.
#
# <details><summary>Hint</summary>
#
# List the seven matrices as (out, in). Sum out · in for the weights, rank · (out + in) for the notes.
# </details>


# %% nbgrader={"grade_id": "qlora-terms", "solution": true}
def qlora_terms(shape: dict, rank: int, length: int) -> dict[str, float]:
    """Bytes of the four largest terms of a QLoRA step: one row, with checkpointing."""
    ### BEGIN SOLUTION
    hidden, mlp, kv, layers = (shape[key] for key in ("hidden", "mlp", "kv", "layers"))
    matrices = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(mlp, hidden)] * 3
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    return {
        "linear layers": layers * sum(o * i for o, i in matrices) * bits / 8,
        "embeddings and head": 2 * shape["vocabulary"] * hidden * 2,
        "notes": layers * sum(rank * (o + i) for o, i in matrices) * 4 * 2,
        "checkpoints": (layers + 1) * length * hidden * 2,
    }
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-terms", "grade": true, "points": 3}
checks.check_terms(qlora_terms)

# %% [markdown]
# ## Your code trains
#
# Every linear layer but the head goes through *your* four functions. Then notes train on it, in the run that you saw.

# %% tags=["trains"]
STEPS = 10
yours.trains(
    lambda: study.train_over(quantize, pack, unpack, dequantize, STEPS),
    lambda: history.losses[:STEPS],
    what="NF4",
    y="loss (nats per token)",
    caption=f"embedded model in 4 bits, rank 16, first {STEPS} steps of 4 kitchen tickets, seed 0",
)

# %% [markdown]
# The small gap is the scales: yours are in fp32, the package's are doubly quantized. Over twenty steps it grows, as it would between
# two seeds, so ten are compared. From here on the lab uses the package.
#
# [bitsandbytes](https://github.com/bitsandbytes-foundation/bitsandbytes) is the library behind `load_in_4bit=True`. Its bytes against
# yours, then against the package's:

# %% nbgrader={"grade_id": "check-parity", "grade": true, "points": 1}
checks.check_parity(quantize, pack, dequantize)

# %%
equal = study.show_bytes()

# %% [markdown]
# A few 8-bit scales fall on a neighbouring code; the error stays the same.
#
# ### A bug hunt
#
# A colleague reads 4-bit weights with their own loader. Size, mean and spread are right. What is wrong, and which check would have found
# it?

# %% tags=["bug-hunt"]
weight = torch.randn(512, 512)
stored_weight = quantize_nf4(weight, double_quant=False)
halves = [stored_weight.packed & 15, stored_weight.packed >> 4]
codes = torch.stack(halves, 1).view(-1, 64).long()
theirs = (NF4_CODE[codes] * stored_weight.absmax[:, None]).view(512, 512)
print(*(f"mean {w.mean():+.4f}, spread {w.std():.3f}" for w in (weight, theirs)), sep="\n")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The low half comes first, so every two neighbours are swapped. Shapes, sizes and statistics cannot see that. Compare entry by
# entry: `(theirs - weight).abs().mean()` is above 1 here, and 0.07 in the right order.
# </details>

# %% [markdown]
# ## Is it true?
#
# ### Is NF4 a good code?
#
# Four codes, on three kinds of numbers:

# %%
errors = study.show_codes()

# %% [markdown]
# Even better codes exist ([Yoshida 2023](https://arxiv.org/abs/2306.06965)). A caveat: this model's file had once been rounded to 4 bits in
# another format.
#
# ### Does a rough book teach worse?
#
# The same notes, orders and steps on three books: fp32 (plain LoRA), NF4 (QLoRA) and sixteen equal steps. Five seeds, stored.
#
# > **Seed**: the number that fixes all that is random in a run. **95% interval**: a range that in 19 of 20 experiments contains the
# > true value.

# %%
print(agrees(history.losses[:5], stored.figures(0)["NF4"]["losses"]))
books = study.show_rough_book(stored)

# %% [markdown]
# The scanned book *starts* almost half a nat behind. The notes make up for nearly all of it. NF4 against equal steps: cannot tell.

# %% [markdown] tags=["predict"]
# ### Merging, told whole
#
# To serve a model, you want one weight and no notes. `merge_adapters` adds $\Delta W$ and keeps **16 bits**. To get 4 bits back, you can
# add $\Delta W$ to the *dequantized* weight that you trained on, or to the *original* one.
#
# **Predict, then run.** How much of what training gained is left after each?
#
# - about all in both cases
# - about all from the dequantized weights, less from the originals, which the notes never saw
# - little from the dequantized weights, about all from the originals

# %% tags=["experiment"]
merges = study.show_merges(stored, load("merges_into_4_bits"), model)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The third. Dequantized weights lie *on* the levels. A note moves most of them by less than half a gap, so the nearest level is the old
# one. Original weights lie anywhere. There a small shift pushes the right share of them over an edge, and on average $\Delta W$
# arrives; see the table.
# </details>

# %% [markdown]
# So merge into the originals, then quantize, as an export does ([3.1.10](lab-3.1.10-ollama-integration.ipynb)). The last row is
# *merge-aware* training: every forward pass uses $W + \Delta W$ rounded to 4 bits, and the gradient is LoRA's. Whether that is better than
# the row above, these five seeds cannot tell.
#
# ### 70B without pretending
#
# A training step can run on tensors that have a shape and no memory. Follow every tensor from birth to death, and you have a **plan**.

# %%
plans = memory.show_plans()

# %% [markdown] tags=["predict"]
# A plan on paper is a claim. You cannot run 80 layers here, but **one** of true size runs: 856 million random weights, 0.44 GB in NF4,
# with notes on all seven matrices, forward and backward of 512 tokens.
#
# **Predict, then run.** What does it take at its worst moment?
#
# - about 0.45 GB
# - about twice its weights
# - about ten times its weights

# %% tags=["experiment"]
one = giant.giant_config(layers=1)
layer = memory.show_layer(giant.plan_layer(one, 512), giant.measure_layer(one, 512))

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# About twice. Only a few rows are unpacked at a time; the rest is the layer's activations, which 4 bits do not shrink.
# </details>

# %% [markdown]
# ### The control: a plan that forgets the embeddings
#
# The usual plan is "half a byte per weight". It forgets embeddings and head, which stay in 16 bits or more. It must fail.

# %%
forgetful = memory.show_forgetful(model, tokenizer)

# %% [markdown]
# ## On a DGX Spark
#
# Other models, in the same call. In the last two, mixtures of experts, few experts work on each token, but all must be in memory.

# %%
memory.show_models(("Llama-3.3-70B", "gpt-oss-20b", "Qwen3-30B-A3B"))

# %% tags=["knob"]
ROWS = 4  # turn this: 1, 16, 32. When does a DGX Spark no longer hold it, and which terms grew?
memory.show_fit(memory.plan_70b(length=2048, batch_size=ROWS))

# %% [markdown]
# ### How fast, at most?
#
# We have not measured this step there. Here is a **floor**: a step's arithmetic and its bytes, divided by the chip's rates.

# %%
floors = memory.show_floors(plans)
excess = memory.show_published()

# %% [markdown]
# The second table takes
# [published rates](https://developer.nvidia.com/blog/how-nvidia-dgx-sparks-performance-enables-intensive-ai-tasks) at their word. The
# chip would need more than ten times its dense bf16 rate; a user
# [measured a tenth of the steps](https://github.com/NVIDIA/dgx-spark-playbooks/issues/29). And all 80 layers on a GPU?

# %%
on_gpu = memory.show_gpu_runs()

# %% [markdown]
# The plan of 80 layers holds to a percent. The device gave somewhat more, since torch keeps freed blocks for later. And the time? Our
# NF4 layers unpack their weights in many small steps, so on short rows a fast GPU mostly waits, far above its floor.

# %% [markdown]
# ### Before you start
#
# On a DGX Spark processor and GPU share one memory. A step that does not fit can **freeze the machine**: no error, only the power button.
# And `torch.cuda.mem_get_info()` misleads there: it counts the page cache as used, which the system would give back. On one GB10, after a
# large file was written, [both numbers were read](https://github.com/unslothai/unsloth/pull/10704). The 70B plan against each, then what
# `train` says to a step of 64 rows:

# %%
memory.show_readings(plans[2048])
memory.show_refusal()

# %% [markdown]
# The real run is lab 3.1.4's with `load_model("Qwen/Qwen2.5-72B-Instruct", quantize="nf4")` and then
# `model.activation_checkpointing_enable()`. The first time it fetches 145 GB. Run `spark-ft doctor` and `spark-ft plan` before, switch
# swap off (`swapoff -a`), and watch `free -h`, column *available*. Measure three steps, then multiply.
#
# ## Explain it back

# %% [markdown] nbgrader={"grade_id": "explain-shades", "solution": true, "grade": true, "points": 0}
# **Why sixteen uneven levels, and why a scale for every 64 weights?**
#
# ### BEGIN SOLUTION
# Weights are mostly small, so levels near zero are used more. Spaced like the quantiles of a bell curve, the levels are used about
# equally often, and the mean error falls. The scale adapts the levels to each block: one large number makes its own 64 coarse and no others.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-merge", "solution": true, "grade": true, "points": 0}
# **Why must a merge not be rounded to the levels that it came from, and what works?**
#
# ### BEGIN SOLUTION
# Dequantized weights lie on the levels, and a note moves them by less than half a gap, so rounding gives the old level. From the
# original weights the same shift pushes the right share over an edge. Or keep 16 bits, or the notes alone.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-plan", "solution": true, "grade": true, "points": 0}
# **A friend says: "70B in 4 bits is 35 GB, so my 40 GB card can train it." What do you ask?**
#
# ### BEGIN SOLUTION
# Where are the embeddings and the head (4.2 GB in bf16), the notes with gradients and moments (1.7 GB), the checkpoints (0.7 GB at 512
# tokens, 2.7 at 2,048), one layer computed again, the context? It is 43 GB at 512 tokens. And was the plan held to a measurement?
# ### END SOLUTION

# %% [markdown]
# [Lab 3.1.6](lab-3.1.6-dataset-preparation.ipynb) is about the data.

# %% tags=["experiment"]
headline(
    {
        "70B QLoRA, 512 tokens: planned (GB)": plans[512].peak / 1e9,
        "2,048 tokens (GB)": plans[2048].peak / 1e9,
        "true-size layer: planned (GB)": layer["planned"],
        "its tensors (GB)": layer["its tensors"],
        "plan without embeddings is off by (%)": forgetful,
        "bytes equal to bitsandbytes (%)": equal,
        "NF4's mean error on normal numbers": errors["NF4"],
        "QLoRA − LoRA (nats)": books["gap"].value,
        "gain kept, NF4 again (%)": merges["again"],
        "from the originals (%)": merges["originals"],
        "published rates / chip, at least": excess,
        "80 layers on a GPU, off the plan by (%)": on_gpu,
    }
)
