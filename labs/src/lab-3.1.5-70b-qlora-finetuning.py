# %% [markdown]
# # 3.1.5 How does 70B fit in one desktop?
#
# **Time**: about 90 minutes with the exercises; the notebook itself runs in about four minutes on two CPU cores.
#
# When you are done you can
#
# - put a weight matrix into 4 bits and back, byte for byte as bitsandbytes does it, and say what that costs in accuracy,
# - say how many bits a weight really takes, and how many gigabytes each part of a 70B fine-tune takes, by hand,
# - hold such a plan to a measurement, on a decoder layer of true size, on the machine in front of you,
# - tell what is free on a machine whose processor and GPU share one memory, and stop before it freezes,
# - merge a QLoRA adapter without losing what it learned.
#
# Nothing here pretends. What can be counted is counted, what can be run on this machine is run and measured, what comes from
# elsewhere names its source, and what nobody has measured is called unmeasured.

# %% [markdown]
# ## The compressed textbook
#
# Lab 3.1.1 put sticky notes into a textbook and left the print alone. With a 70B model the trouble is the book: 141 GB in bf16, too
# heavy for any bag you own. So have it **scanned with sixteen shades of grey**. Every patch of 64 dots notes its own brightness, so that
# pale pages stay readable. The print looks a little rough; you can read every word. Then stick your notes on, as sharp as ever.
#
# The scan is **NF4**, four-bit *NormalFloat*; scan and notes together are **QLoRA**
# ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)). For each block of 64 consecutive weights:
#
# $$w \;\approx\; \text{code}[c] \cdot \text{absmax}, \qquad c \in \{0, \dots, 15\}$$
#
# In words: absmax is the largest magnitude in the block; divided by it, all 64 weights lie between −1 and 1; each is replaced by the
# nearest of sixteen fixed levels, and only the *number* $c$ of that level is stored.
#
# Where the picture ends: a scanner's sixteen shades are evenly spaced. NF4's are not, and that is the first thing to understand.

# %%
import inspect

import numpy as np
import torch
from torch import nn

from spark_ft import (
    AdapterConfig,
    TrainConfig,
    add_adapters,
    doctor,
    load_model,
    profile,
    read_records,
    sft_batches,
    sft_loss,
    train,
)
from spark_ft.embedded import EMBEDDED, embedded_folder
from spark_ft.files import ROOT
from spark_ft.lab import headline, plots
from spark_ft.lab import true_size as giant
from spark_ft.lab.checks import lab_3_1_5 as checks
from spark_ft.lab.experiments import agrees, load
from spark_ft.lab.experiments.common import TRAIN, VALIDATION, held_out
from spark_ft.lab.experiments.lab_3_1_5 import (
    EQUAL_STEPS,
    SETTINGS,
    base,
    merged,
    quantized_again,
    rounded,
    tune_on,
)
from spark_ft.memory.guard import Guard, fit_report
from spark_ft.memory.machine import DGX_SPARK, GIB, Machine, MemoryBudget, budget, free_at_once, held, measure
from spark_ft.memory.plan import plan_step, plan_training
from spark_ft.memory.shapes import known_config
from spark_ft.methods.fused import NF4Product
from spark_ft.methods.nf4 import NF4_CODE, quantize_nf4
from spark_ft.models import load_nf4, preflight
from spark_ft.stats import mean_interval, paired_difference

CPU = torch.device("cpu")
train_rows = read_records(ROOT / TRAIN, "sft")
held_out_rows = read_records(ROOT / VALIDATION, "sft")[: SETTINGS["held-out tickets"]]
_ = torch.manual_seed(0)

# %% [markdown]
# ## Sixteen levels for a normal distribution
#
# A layer's weights look much like draws from a normal distribution: many small ones, few large ones. Evenly spaced levels would
# spend most of themselves on the few. Better to use every level equally often: cut the bell curve into slices of equal probability and put
# a level into each. The point below which a share $p$ of the distribution lies is called its **quantile**, so the levels are quantiles at evenly spaced $p$.
#
# Two wrinkles (the paper's appendix E). The outermost slices reach to infinity, so the outermost $p$ is pulled in, to $1 - \frac{1}{2}(\frac{1}{32} +
# \frac{1}{30})$. And zero should be exact, since zeros are common and mean something: eight levels for the positive side, seven for the negative, and
# zero itself. Then everything is divided by the largest.

# %%
from scipy.stats import norm

outermost = 1 - (1 / 32 + 1 / 30) / 2
positive = norm.ppf(np.linspace(outermost, 0.5, 9))[:-1]  # eight quantiles, without the one at p = 0.5, which is zero
negative = -norm.ppf(np.linspace(outermost, 0.5, 8))[:-1]  # seven
levels = np.sort([*negative, 0.0, *positive]) / positive.max()
print("levels:", " ".join(f"{level:+.3f}" for level in levels))
print("gaps:  ", " ".join(f"{gap:.3f}" for gap in np.diff(levels)))
from_paper = np.abs(levels - NF4_CODE.numpy()).max()
print(f"against the constants that bitsandbytes and spark_ft use: at most {from_paper:.0e} apart")
assert from_paper < 1e-6

# %% [markdown]
# Fine steps near zero, where the weights are; coarse steps at the ends. The constants are given from here on as `NF4_CODE`.
#
# ## Build it
#
# ### Exercise 1: to the nearest level
# ●●○ · 10 minutes
#
# `weight` has any shape; take its numbers in order, row after row, in blocks of `block_size` (it divides their number). Return
#
# - `codes`, shape (blocks, block_size), `uint8`: the index of the level in `code` nearest to each number, after the block is divided by its
#   absmax,
# - `absmax`, shape (blocks,): each block's largest *magnitude*.
#
# `code` is sorted and runs from −1 to 1. It is not always NF4's.
#
# <details><summary>Hint: the nearest of many</summary>
#
# `x[..., None] - code` holds the distance of every number to every level, in one more dimension. `abs()`, then `argmin(-1)`.
# </details>
# <details><summary>Hint: without sixteen times the memory</summary>
#
# Between two neighbouring levels the border is their midpoint. `torch.bucketize(x, midpoints)` counts the midpoints below each number, which is the
# nearest level's index.
# </details>

# %% nbgrader={"grade_id": "quantize", "solution": true}
def quantize(weight: torch.Tensor, code: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, absmax): the nearest level's index for each number, and each block's scale."""
    ### BEGIN SOLUTION
    blocks = weight.reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax)[:, None]
    codes = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    return codes, absmax
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-quantize", "grade": true, "points": 3}
checks.check_quantize(quantize)

# %% [markdown]
# ### Exercise 2: two codes a byte
# ●○○ · 10 minutes
#
# A code needs 4 bits, and the smallest thing a computer stores has 8. So two neighbours share a byte, the first one in the **high** half:
# codes 3 and 9 become 3 · 16 + 9 = 57, in bits `0011 1001`. `pack` turns an even number of codes, shape (n,), into (n / 2,) bytes; `unpack` turns them
# back.
#
# <details><summary>Hint: every other one</summary>
#
# `codes[::2]` are the first, third, fifth …, `codes[1::2]` the others. To bring them together again:
# `torch.stack([a, b], 1).flatten()` gives a₀ b₀ a₁ b₁ …
# </details>
# <details><summary>Hint: halves of a byte</summary>
#
# `x << 4` shifts by four bits, which is times 16; `x >> 4` shifts back; `x & 15` keeps the low four bits.
# </details>

# %% nbgrader={"grade_id": "pack", "solution": true}
def pack(codes: torch.Tensor) -> torch.Tensor:
    """Bytes (n / 2,) from codes (n,), the first of two in the high half."""
    ### BEGIN SOLUTION
    return codes[::2] << 4 | codes[1::2]
    ### END SOLUTION


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Codes (n,) from bytes (n / 2,)."""
    ### BEGIN SOLUTION
    return torch.stack([packed >> 4, packed & 15], 1).flatten()
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-packing", "grade": true, "points": 2}
checks.check_packing(pack, unpack)

# %% [markdown]
# ### Exercise 3: and back
# ●○○ · 5 minutes
#
# From `codes` (blocks, block_size) and `absmax` (blocks,) make the weight again, in its `shape`. Where this one loses digits, that is the price.
#
# <details><summary>Hint</summary>
#
# `code[codes.long()]` looks all levels up at once. A scale belongs to a *row* of `codes`: `absmax[:, None]` stands it upright.
# </details>

# %% nbgrader={"grade_id": "dequantize", "solution": true}
def dequantize(codes: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight that codes and scales stand for."""
    ### BEGIN SOLUTION
    return (code[codes.long()] * absmax[:, None]).reshape(shape)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-dequantize", "grade": true, "points": 2}
checks.check_dequantize(dequantize)

# %% [markdown]
# ### Exercise 4: how many bits is that?
# ●●○ · 5 minutes
#
# Not four. Each block stores a scale too, 32 bits in fp32. **Double quantization** quantizes the scales: 8 bits each, and a group of them (256 in the paper)
# shares one fp32 scale of its own. Return the bits for one number of a large weight. `scales_per_group=None` means that the scales stay in fp32.
#
# <details><summary>Hint</summary>
#
# A block's scale is shared by `block_size` numbers; a group's scale by `block_size * scales_per_group` of them.
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
# ## The package's version
#
# The same, in pieces that fit the cache, for any shape, with double quantization. Its layer, `NF4Linear`, is frozen. Its product is the part to look at. The forward
# pass unpacks some rows at a time, multiplies, drops them, and keeps nothing for later. The backward pass needs $W$ again; it is still there in 4 bits, so its rows are
# unpacked a second time.

# %%
print(inspect.getsource(NF4Product))

# %%
weight = torch.randn(1024, 1024)
for double_quant in (False, True):
    stored = quantize_nf4(weight, double_quant=double_quant)
    print(f"double_quant={double_quant!s:<6} {8 * stored.nbytes / weight.numel():.3f} bits a number, stored: "
          + ", ".join(f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in stored.named_buffers()))  # fmt: skip

# %% [markdown]
# ## What does it cost in accuracy?
#
# Four codes, each with blocks of 64: NF4; sixteen evenly spaced levels; int4, the whole numbers −7 … 7, which leave one of sixteen codes unused; and fp4, a tiny
# floating-point number with one bit for the sign, two for the exponent and one for the mantissa (E2M1, as in the
# [OCP Microscaling formats](https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf)).
#
# Three kinds of numbers: draws from a normal distribution; linear layers of the embedded model; its embedding table. The error is the
# mean of $|w - \hat w|$, in standard deviations of $w$. (One thing to know about this model: it came to us as a file whose linear layers had once been rounded to
# 4 bits with other blocks, 32 numbers with a scale and an offset each, and its embeddings to 8 bits. Those roundings have shaped the numbers a little.)

# %%
signs, exponents, mantissas = (1, -1), range(4), (0, 1)
fp4 = {s * (m / 2 if e == 0 else 2.0 ** (e - 1) * (1 + m / 2)) for s in signs for e in exponents for m in mantissas}
CODES = {
    "NF4": NF4_CODE,
    "16 equal steps": EQUAL_STEPS,
    "int4: −7 … 7": torch.arange(-7, 8) / 7,
    "fp4: E2M1": torch.tensor(sorted(fp4)) / max(fp4),
}
whole, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
whole.cpu()
embeddings = whole.get_input_embeddings().weight.detach()
SOURCES = {
    "normal": [torch.randn(2**21)],
    "linear layers": [
        layer.weight.detach()
        for name, layer in whole.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head" and int(name.split(".")[2]) % 10 == 0
    ],
    "embeddings": [embeddings[::8]],
}


def mean_error(w: torch.Tensor, code: torch.Tensor) -> float:
    return ((rounded(w, code) - w).abs().mean() / w.std()).item()


errors = {
    source: {name: [mean_error(w, code) for w in weights] for name, code in CODES.items()} for source, weights in SOURCES.items()
}
print(f"{'mean error (std)':<18}" + "".join(f"{name:>16}" for name in CODES) + "   matrices")
for source, by_code in errors.items():
    print(f"{source:<18}" + "".join(f"{np.mean(e):>16.4f}" for e in by_code.values()) + f"{len(SOURCES[source]):>11}")
for name in ("NF4", "16 equal steps"):
    codes, _ = torch.bucketize(SOURCES["normal"][0].view(-1, 64) / SOURCES["normal"][0].view(-1, 64).abs().amax(1, keepdim=True),
                               (CODES[name][1:] + CODES[name][:-1]) / 2).unique(return_counts=True)[1].sort()  # fmt: skip
    share = codes / codes.sum()
    print(f"{name}: of its 16 levels the least used stands for {share[0]:.1%} of the normal numbers, the most used for {share[-1]:.1%}")
nf4_error, equal_error = errors["normal"]["NF4"][0], errors["normal"]["16 equal steps"][0]

# %%
fig, (left, right) = plots.figure(
    "NF4 puts its levels where the numbers are, and errs least on all three kinds",
    x="number / largest magnitude of its block",
    columns=2,
    width=9.5,
    caption=f"blocks of 64. Linear layers: {len(SOURCES['linear layers'])} matrices of the embedded model; bars are their mean, whiskers from the "
    "best matrix to the worst. Normal: 2²¹ numbers. Embeddings: every eighth row.",
)
edges = torch.linspace(-1, 1, 41)
for (source, weights), role in zip(SOURCES.items(), ("yours", "package", "reference"), strict=True):
    blocks = torch.cat([w.flatten()[: 2**18 // len(weights) // 64 * 64] for w in weights]).view(-1, 64)
    density = torch.histogram(blocks / blocks.abs().amax(1, keepdim=True), edges, density=True).hist
    left.plot((edges[1:] + edges[:-1]) / 2, density, label=source, **{**plots.LINE[role], "marker": ""})
for height, name in ((-0.08, "NF4"), (-0.18, "16 equal steps")):
    left.plot(CODES[name], torch.full((len(CODES[name]),), height), "|", color=plots.INK, markersize=9)
    left.annotate(name, (1.04, height), va="center", fontsize=8, annotation_clip=False)
left.set(ylabel="density", ylim=(-0.25, 1.4), xlim=(-1.02, 1.02))
left.legend(fontsize=8)
for i, (name, role) in enumerate(zip(CODES, ("package", "reference", "other", "control"), strict=True)):
    means = [np.mean(by_code[name]) for by_code in errors.values()]
    spread = [[m - min(e[name]) for m, e in zip(means, errors.values(), strict=True)],
              [max(e[name]) - m for m, e in zip(means, errors.values(), strict=True)]]  # fmt: skip
    right.bar(np.arange(3) + 0.2 * (i - 1.5), means, 0.2, yerr=spread, capsize=2, label=name, **plots.BAR[role])
right.set_xticks(range(3), list(errors))
right.set(xlabel="kind of numbers", ylabel="mean error (standard deviations)", ylim=(0, 0.17))
right.legend(fontsize=8, ncols=2, loc="upper left")
plots.show(
    fig,
    alt="Left: density of scaled numbers, a bell around zero for all three kinds; NF4's levels crowd near zero, the equal ones do not. Right, mean "
    "errors in standard deviations: "
    + "; ".join(f"{source}: " + ", ".join(f"{name} {np.mean(e):.3f}" for name, e in by_code.items()) for source, by_code in errors.items())
    + ".",
)
assert all(np.mean(by_code["NF4"]) < min(np.mean(e) for name, e in by_code.items() if name != "NF4") for by_code in errors.values())

# %% [markdown]
# Same bits, and a mean error that is smaller by a sixth on a normal distribution. Is NF4 the best there is? No: its levels are not quite used equally, since the
# largest of 64 numbers is not a fixed quantile, and codes with a smaller error exist ([Yoshida 2023](https://arxiv.org/abs/2306.06965)). It is good, and everybody reads it.
#
# ## Yours, the package's, bitsandbytes'
#
# [bitsandbytes](https://github.com/bitsandbytes-foundation/bitsandbytes) is the library behind `load_in_4bit=True`. Not "about the same numbers": the same bytes.

# %% nbgrader={"grade_id": "check-parity", "grade": true, "points": 1}
checks.check_parity(quantize, pack, dequantize)

# %%
from spark_ft.lab.parity import (
    double_quantization_against_bitsandbytes,
    nf4_against_bitsandbytes,
    qlora_against_peft,
)

bytes_equal = []
for what, w in (
    ("a layer of the model", whole.model.layers[0].mlp.down_proj.weight.detach()),
    ("1000 × 2048, normal", torch.randn(1000, 2048)),
    ("300 × 333, normal: blocks run over the rows' ends", torch.randn(300, 333)),
):
    plain, double = quantize_nf4(w, double_quant=False), quantize_nf4(w)
    first = nf4_against_bitsandbytes(w, plain.packed, plain.absmax, plain.dequantize())
    second = double_quantization_against_bitsandbytes(w, double)
    bytes_equal += [first["bytes equal"], second["bytes equal"]]
    print(what)
    print("  scales in fp32:      ", ", ".join(f"{name} {value:.7g}" for name, value in first.items()))
    print("  doubly quantized:    ", ", ".join(f"{name} {value:.5g}" for name, value in second.items()))
assert min(bytes_equal) == 1

# %% [markdown]
# Every byte. Two details decide that, and neither is in the paper: the block is *multiplied by the reciprocal* of its absmax, since a division rounds one number in
# millions to another code; and the high half of a byte comes first. The 8-bit scales differ in a few places, between neighbouring codes near zero: the error stays the same.
#
# Now a whole training step. `load_model` reads a checkpoint that bitsandbytes has quantized, so both sides stand on the same bytes. They get the same adapter through PEFT's own file format, see the same tickets, take the same AdamW steps. (Two
# warnings from practice. On processors with avx512_bf16, bitsandbytes 0.50 repacks its weights at the first forward in eval mode, and gradients are silently wrong after it; the
# parity code switches that off. And whoever trains with TRL should know that its `SFTTrainer` casts the adapters of a quantized model to bf16, and PEFT's
# `prepare_model_for_kbit_training` everything else to fp32. Here all is fp32.)

# %%
beside_peft = qlora_against_peft(train_rows, steps=2)
print(f"4-bit bytes of the whole model, quantized by spark_ft and by bitsandbytes: {beside_peft['bytes equal']:.4%} equal")
print("loss, spark_ft:             ", " ".join(f"{loss:.6f}" for loss in beside_peft["ours"]))
print("loss, bitsandbytes and PEFT:", " ".join(f"{loss:.6f}" for loss in beside_peft["theirs"]))
loss_difference = max(abs(a - b) for a, b in zip(beside_peft["ours"], beside_peft["theirs"], strict=True))
print(f"at most {loss_difference:.1e} apart (a test holds ten steps to 1e-4)")
assert loss_difference < 1e-4

# %% [markdown]
# ## Does a rough book teach worse?
#
# The same notes (rank 16 on every linear layer), the same tickets, the same 20 steps as in lab 3.1.1, on three books: fp32, NF4, and 16 equal steps. Five seeds of each lie in
# `data/measurements/qlora_against_lora.json`. You train QLoRA here and now; its first losses must be the stored ones. (On fp32 you trained the very same run in lab 3.1.1.)

# %% tags=["experiment"]
stored = load("qlora_against_lora")
tuned, live = tune_on("NF4", seed=0)
live_figures = held_out(tuned, tokenizer, held_out_rows)
print("QLoRA, seed 0: loss", " ".join(f"{loss:.2f}" for loss in live.losses[::3]))
print(agrees(live.losses[:5], stored.figures(0)["NF4"]["losses"]))
print(f"live, after training: held-out loss {live_figures['held-out loss']:.3f}, tokens right {live_figures['token accuracy']:.1%}")

# %% tags=["experiment"]
before = {weights: stored.figures(0)[weights]["before"]["held-out loss"] for weights in SETTINGS["weights"]}
after = {weights: mean_interval(stored.values(weights, "held-out loss")) for weights in SETTINGS["weights"]}


def difference(one: str, other: str):
    """How much higher one's held-out loss ends than the other's, seed by seed."""
    return paired_difference(stored.values(one, "held-out loss"), stored.values(other, "held-out loss"))


print(f"{'held-out loss':<18}{'before':>8}   after, mean of {len(stored['runs'])} seeds")
for weights in SETTINGS["weights"]:
    print(f"{weights:<18}{before[weights]:>8.3f}   {after[weights]}")
gap, equal_gap = difference("NF4", "fp32"), difference("16 equal steps", "NF4")
verdict = gap.verdict("LoRA is better", "QLoRA is better")
print(f"NF4 − fp32:           {gap.signed(4)}: {verdict}")
print(f"equal steps − NF4:    {equal_gap.signed(4)}: {equal_gap.verdict('NF4 is better', 'equal steps are better')}")

# %% [markdown]
# ## Merging, and the mistake that looks like one
#
# In use you would like one weight and no notes. `merge_adapters` unpacks the book to **bf16** and writes the notes in: four times as large, and it says so in its name and in its docs. It would be tempting to
# put the sum into 4 bits again, in silence. Try that. A note moves most weights by less than half the gap between two levels, and the nearest level is then the old one.

# %% tags=["experiment"]
def loss_now(model) -> float:
    return held_out(model, tokenizer, held_out_rows)["held-out loss"]


in_bf16 = merged(tuned)
merges = {"notes on": live_figures["held-out loss"], "merged to bf16": loss_now(in_bf16)}
merges["merged, NF4 again"] = loss_now(quantized_again(in_bf16))
for name, loss in merges.items():
    lost = (loss - merges["notes on"]) / (before["NF4"] - merges["notes on"])
    print(f"{name:<20}held-out loss {loss:.3f}   {lost:>6.1%} of the gain lost")
merging, again = difference("merged", "NF4"), difference("quantized again", "merged")
print(f"stored, {len(stored['runs'])} seeds: merged − notes on {merging.signed(4)}: {merging.verdict('merging loses', 'merging helps')}; "
      f"NF4 again − merged {again.signed(2)}: {again.verdict('quantizing again loses', 'quantizing again helps')}")  # fmt: skip
assert abs(merges["merged to bf16"] - merges["notes on"]) < 0.02 * (before["NF4"] - merges["notes on"])
del tuned, in_bf16

# %% [markdown]
# ## What a step takes, planned and measured
#
# Loading first. `load_model(quantize="nf4")` reads one tensor at a time, quantizes it, and forgets the original, so that the peak is the quantized model and one tensor. That is
# measured here in *anonymous* memory, which is no file's and cannot be dropped. Then one training step each with LoRA and QLoRA, three times told:
#
# - **planned**: `plan_step` runs the step on tensors that have a shape and no memory,
# - **counted**: every tensor that PyTorch makes during the step, followed until it is freed,
# - **process**: what the operating system sees, workspaces and leftovers of the allocator included.
#
# (The C library normally keeps freed memory for later, with holes in it, and a process then looks a third to a half larger than its tensors. From here on it is told to give
# freed memory back at once; what earlier cells left in its heap stays.)

# %%
del whole, embeddings, SOURCES
free_at_once()
with measure("cpu", process=True) as loading:
    model = load_nf4(embedded_folder(), torch.float32, "cpu")
loaded = held(CPU, anonymous=True) - loading.start
tensors = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
largest = max(p.nbytes for p in model.parameters())
print(f"in NF4: tensors {tensors / 1e6:.0f} MB, largest {largest / 1e6:.0f} MB (embeddings, fp32)")
print(f"peak while loading {loading.extra / 1e6:.0f} MB, against a file of {(embedded_folder() / 'model.safetensors').stat().st_size / 1e6:.0f} MB; kept {loaded / 1e6:.0f} MB")
three_tickets = sft_batches(train_rows, tokenizer, 3)(0)


def one_step(model) -> dict[str, float]:
    """A second AdamW step on three tickets: bytes planned, counted and taken by the process; what it holds before is in each."""
    add_adapters(model, AdapterConfig(rank=16)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    own = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    plan = plan_step(model, three_tickets)
    for _ in range(2):  # AdamW makes its moments at the end of the first step
        optimizer.zero_grad(set_to_none=True)
        with measure("cpu", process=True) as process, measure("cpu") as made:
            total, count = sft_loss(model, three_tickets)
            (total / count).backward()
        optimizer.step()
    held = own + sum(m.nbytes for state in optimizer.state.values() for name, m in state.items() if name != "step")
    return {"weights": own, "plan": plan, "planned": plan.peak, "counted": held + made.extra, "process": held + process.extra}


steps = {"QLoRA": one_step(model)}
model, _ = base("fp32")
for p in model.cpu().parameters():
    p.sum()  # read from disk now, not in the step
steps["LoRA"] = one_step(model)
del model
print(f"\n{'MB, one step':<14}" + "".join(f"{key:>10}" for key in ("weights", "planned", "counted", "process")))
for name, s in steps.items():
    print(f"{name:<14}" + "".join(f"{s[key] / 1e6:>10.0f}" for key in ("weights", "planned", "counted", "process")))
saved_in_all = 1 - steps["QLoRA"]["counted"] / steps["LoRA"]["counted"]
saved_weights = 1 - steps["QLoRA"]["weights"] / steps["LoRA"]["weights"]
print(f"QLoRA takes {saved_weights:.0%} less for weights and adapters, {saved_in_all:.0%} less of a whole step: activations do not shrink")

# %% tags=["experiment"]
fig, (left, right) = plots.figure(
    f"Notes on NF4 or on fp32: {verdict} after 20 steps; NF4 is {steps['LoRA']['weights'] / steps['QLoRA']['weights']:.1f} times less to hold",
    x="",
    columns=2,
    width=9.5,
    caption=f"left: mean and 95% t interval. {stored.origin()}; diamond: the run you just made; dashes: before training. Right: one step on "
    "3 tickets, embedded model, fp32 but for NF4; counted from the tensors that were made.",
)
for i, (weights, role) in enumerate(zip(SETTINGS["weights"], ("reference", "package", "other"), strict=True)):
    e = after[weights]
    left.errorbar([i], [e.value], yerr=[[e.value - e.low], [e.high - e.value]], capsize=4, **plots.LINE[role])
    left.plot([i - 0.25, i + 0.25], [before[weights]] * 2, color=plots.COLORS[role], linestyle="--")
left.plot([1], [live_figures["held-out loss"]], "D", color=plots.COLORS["yours"], markersize=4)
left.set_xticks(range(3), [f"notes on\n{name}" for name in SETTINGS["weights"]])
left.set(xlabel="the book", ylabel="held-out loss (nats per token)", ylim=(0, None), xlim=(-0.5, 2.5))
bottom = np.zeros(2)
parts = {"weights": [s["weights"] / 1e6 for s in steps.values()],
         "all else at the peak": [(s["counted"] - s["weights"]) / 1e6 for s in steps.values()]}  # fmt: skip
for (part, sizes), role in zip(parts.items(), ("package", "control"), strict=True):
    right.bar(list(steps), sizes, 0.5, bottom=bottom, label=part, **plots.BAR[role])
    bottom += sizes
right.plot(list(steps), [s["process"] / 1e6 for s in steps.values()], "x", color=plots.INK, label="process", markersize=8)
right.set(xlabel="method", ylabel="memory of one step (MB)", ylim=(0, 1.35 * max(s["process"] / 1e6 for s in steps.values())))
right.legend(fontsize=8, loc="upper left")
plots.show(
    fig,
    alt="Left, held-out loss before and after training: "
    + "; ".join(f"{weights} {before[weights]:.2f} and {after[weights].value:.3f}" for weights in SETTINGS["weights"])
    + ". Right, one step: "
    + "; ".join(f"{name} {s['weights'] / 1e6:.0f} MB of weights and {s['counted'] / 1e6:.0f} MB in all" for name, s in steps.items())
    + ".",
)

# %% [markdown]
# ## The control: a plan that forgets the embeddings
#
# A plan proves nothing if any plan would do. "4 bits a parameter, so divide by four" is the usual one: it forgets that embeddings and head stay in 16 bits or more. That one
# must disagree with the measurement, and it does.

# %%
plan = steps["QLoRA"]["plan"]
honest, forgetful = plan.peak, plan.peak - plan.terms["embeddings and head"]
for name, size in (("the plan", honest), ("without embeddings", forgetful)):
    print(f"{name:<20}{size / 1e6:>6.0f} MB, {size / steps['QLoRA']['counted'] - 1:+.0%} against the counted {steps['QLoRA']['counted'] / 1e6:.0f} MB")
assert abs(honest / steps["QLoRA"]["counted"] - 1) < 0.10, "the plan should be within a tenth of what was counted"
assert abs(forgetful / steps["QLoRA"]["counted"] - 1) > 0.10, "a plan without the embeddings must be noticed"
in_weights = sum(plan.terms[name] for name in ("linear layers", "embeddings and head", "norms"))
print(f"weights alone: planned {in_weights / 1e6:.0f} MB, kept by the process after loading {loaded / 1e6:.0f} MB, without embeddings {plan.terms['linear layers'] / 1e6:.0f} MB")
assert abs((in_weights - plan.terms["embeddings and head"]) / loaded - 1) > 0.3

# %% [markdown]
# ## Seventy billion, by hand
#
# Now the real thing. Llama-3.3-70B: 80 layers, 8,192 numbers a token, an MLP of 28,672, 64 query heads of 128 and 8 key-value heads, 128,256 tokens, and a head of its own.
#
# ### Exercise 5: four terms
# ●●○ · 15 minutes
#
# Return a dict of **bytes**. `shape` has the keys hidden, mlp, kv (width of the keys: 8 · 128 = 1024), layers, vocabulary. Everything that is not in NF4 is in bf16, 2 bytes.
#
# - `"linear layers"`: in each layer query and output (hidden × hidden), key and value (kv × hidden), gate, up and down (mlp × hidden), in doubly quantized NF4,
# - `"embeddings and head"`: two tables, vocabulary × hidden,
# - `"notes"`: LoRA of this `rank` on all seven matrices; with each of its numbers come a gradient and AdamW's two moments,
# - `"checkpoints"`: for one row of `length` tokens, the input of every layer, and the output of the last one.
#
# <details><summary>Hint: seven matrices</summary>
#
# Write them down as a list of (out, in). Weights are the sum of out · in, a note's numbers the sum of rank · (out + in).
# </details>
# <details><summary>Hint: why only checkpoints?</summary>
#
# With checkpointing a layer keeps its input and nothing else. Backward computes the layer again from it, one layer at a time.
# </details>

# %% nbgrader={"grade_id": "qlora-terms", "solution": true}
def qlora_terms(shape: dict[str, int], rank: int, length: int) -> dict[str, float]:
    """Bytes of the four largest terms of a QLoRA run, one row at a time, with checkpointing."""
    ### BEGIN SOLUTION
    hidden, mlp, kv, layers = shape["hidden"], shape["mlp"], shape["kv"], shape["layers"]
    matrices = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(mlp, hidden)] * 3
    nf4_bits = 4 + 8 / 64 + 32 / (64 * 256)
    return {
        "linear layers": layers * sum(o * i for o, i in matrices) * nf4_bits / 8,
        "embeddings and head": 2 * shape["vocabulary"] * hidden * 2,
        "notes": layers * sum(rank * (o + i) for o, i in matrices) * 4 * 2,
        "checkpoints": (layers + 1) * length * hidden * 2,
    }
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-terms", "grade": true, "points": 3}
checks.check_terms(qlora_terms)

# %% [markdown]
# The rest is smaller: one layer computed again, a block of rows unpacked, gradients on their way through, a piece of the logits, and on a GPU the CUDA context. `plan_training` builds the
# model's true shape on tensors without memory, runs the real step on it, and says what is there at the worst moment. Batch 1, rank 16 on all linear layers; notes, gradients and moments in bf16.

# %%
shape_70b = known_config("Llama-3.3-70B")
plans = {length: plan_training(shape_70b, "qlora", length=length, adapter_dtype=torch.bfloat16) for length in (512, 2048)}
print(plans[2048])

# %%
room_here = budget()
GROUPS = {
    "linear layers, NF4": ("linear layers", "norms"),
    "embeddings, head": ("embeddings and head",),
    "notes, gradients, moments": ("adapters", "gradients", "optimizer moments"),
    "checkpoints": ("checkpoints",),
    "one layer, logits, context": ("one layer recomputed", "dequantized weight", "gradients in passing", "logits", "masks and positions", "CUDA context"),
}


def whole_logits(model, batch):
    """transformers' own loss, which keeps the logits of every position."""
    return model(**batch, use_cache=False).loss, 1


unusual = {"dtype": torch.float32, "loss": whole_logits}
bars = {f"S = {length:,}": plan for length, plan in plans.items()}
bars["S = 2,048, PEFT's\nusual preparation"] = plan_training(shape_70b, "qlora", length=2048, **unusual)
fig, ax = plots.figure(
    f"QLoRA of 70B needs {plans[512].peak / 1e9:.0f} to {plans[2048].peak / 1e9:.0f} GB at its worst moment: a DGX Spark holds it twice",
    x="memory of one training step (GB)",
    y="tokens a row",
    width=9.5,
    height=3.4,
    caption="planned for Llama-3.3-70B's shape: batch 1, LoRA r16 on all linear layers, checkpointing. Top two: all but NF4 in bf16, logits in pieces. Third: "
    "everything else in fp32, all logits kept. Lines: what this machine and an idle DGX Spark have to plan with.",
)
offset = np.zeros(len(bars))
for (group, names), role in zip(GROUPS.items(), ("yours", "package", "reference", "other", "control"), strict=True):
    sizes = [sum(plan.terms.get(name, 0) for name in names) / 1e9 for plan in bars.values()]
    ax.barh(list(bars), sizes, 0.6, left=offset, label=group, **plots.BAR[role])
    offset += sizes
limits = {"this machine": room_here, "DGX Spark": DGX_SPARK}
for name, room in limits.items():
    if room.available is not None and room.available < 150e9:
        ax.axvline(room.available / 1e9, color=plots.INK, linestyle=":")
        ax.annotate(f" {name}", (room.available / 1e9, -0.42), fontsize=8)
ax.set_xlim(0, 1.1 * DGX_SPARK.available / 1e9)
ax.invert_yaxis()
ax.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plots.show(
    fig,
    alt="Stacked bars in GB. "
    + " ".join(
        f"{name.replace(chr(10), ' ')}: {plan.peak / 1e9:.1f} in all, of which "
        + ", ".join(f"{group} {sum(plan.terms.get(n, 0) for n in names) / 1e9:.1f}" for group, names in GROUPS.items())
        + "."
        for name, plan in bars.items()
    )
    + f" A DGX Spark has {DGX_SPARK.available / 1e9:.0f} to plan with.",
)
for length, plan in plans.items():
    print(f"S = {length}: {plan.peak / 1e9:.1f} GB at the worst moment, the {plan.where}")
    on_this = plan_training(shape_70b, "qlora", length=length, adapter_dtype=torch.bfloat16, device="cpu" if room_here.device == "cpu" else "cuda")
    print(f"   this machine {fit_report(on_this, room_here)}")
    print(f"   a DGX Spark  {fit_report(plan, DGX_SPARK)}")

# %% [markdown]
# Every other choice is a setting of its own. What each does to the worst moment, at S = 2,048:

# %%
variants = {
    "as above": {},
    "notes, gradients, moments in fp32": {"adapter_dtype": torch.float32},
    "rank 64": {"rank": 64},
    "all logits kept": {"loss": whole_logits},
    "no checkpointing": {"checkpointing": False},
    "8 rows at once": {"batch_size": 8},
}
print(f"{'QLoRA, 70B, S = 2,048':<36}{'GB':>8}{'GiB':>8}   on an idle DGX Spark")
for name, settings in variants.items():
    plan = plan_training(shape_70b, "qlora", length=2048, **{"adapter_dtype": torch.bfloat16, **settings})
    word = "fits" if plan.peak <= DGX_SPARK.available else "does not fit"
    print(f"{name:<36}{plan.peak / 1e9:>8.1f}{plan.peak / GIB:>8.1f}   {word}")
for method in ("lora", "full"):
    plan = plan_training(shape_70b, method, length=2048, adapter_dtype=torch.bfloat16)
    print(f"{method + ', weights in bf16':<36}{plan.peak / 1e9:>8.1f}{plan.peak / GIB:>8.1f}   {'fits' if plan.peak <= DGX_SPARK.available else 'does not fit'}")

# %% [markdown]
# ## One layer of true size, here
#
# A plan on paper is a claim. You can't run 80 layers here, but **one** of them is the same 856 million weights as in the real model: 8192/28672, 64 heads, 8 key-value heads. Make it
# with random weights (memory does not care what they say), quantize it tensor by tensor, put notes on all seven matrices, and take it through forward and backward on 512 tokens with checkpointing. That takes
# less than a minute. It happens in a process of its own, so that nothing of what this notebook has computed before is in the count.

# %% tags=["experiment"]
one = giant.giant_config(1)
layer_plan, layer = giant.plan_layer(one, 512), giant.measure_layer(one, 512)
layer_tensors, stepped_in = layer["layer"], layer["seconds a step"]
largest = 4 * one.hidden_size * one.intermediate_size
measured = {"planned": layer_plan.peak, "counted": layer["counted"], "process": layer["process"]}
print(f"{layer['weights'] / 1e6:.1f} M weights in {layer['in 4 bits'] / 1e9:.4f} GB, made in {layer['seconds making']:.1f} s, "
      f"forward and backward in {stepped_in:.1f} s")  # fmt: skip
print(f"peak while making it {layer['making'] / 1e9:.2f} GB: the layer and one fp32 tensor would be {(layer_tensors + largest) / 1e9:.2f} GB")
print(layer_plan)
for name, size in measured.items():
    print(f"{name:<10}{size / 1e9:.3f} GB" + ("" if name == "planned" else f"   the plan is {layer_plan.peak / size - 1:+.1%} of it off"))
assert abs(layer_plan.peak / measured["counted"] - 1) < 0.05

# %% tags=["experiment"]
fig, ax = plots.figure(
    f"The plan of a true-size layer is {abs(layer_plan.peak / measured['counted'] - 1):.1%} off what its tensors take",
    x="memory (GB)",
    y="",
    width=9.5,
    height=3.0,
    caption="one decoder layer of Llama-3.3-70B's shape, random weights in NF4, LoRA r16 on all linear layers, forward and backward of 512 tokens, checkpointing, fp32; "
    "this machine, one run.",
)
rows = list(measured)
offset = 0.0
layer_groups = {
    "weights, NF4": ("linear layers", "norms"),
    "notes and gradients": ("adapters", "gradients"),
    "the layer computed again, its unpacked block, gradients in passing": ("saved activations", "masks and positions"),
}
for (group, names), role in zip(layer_groups.items(), ("yours", "package", "reference"), strict=True):
    size = sum(layer_plan.terms.get(name, 0) for name in names) / 1e9
    ax.barh(["planned"], [size], 0.6, left=[offset], label=group, **plots.BAR[role])
    offset += size
ax.plot([layer_plan.peak / 1e9] * 2, [-0.3, 0.3], color=plots.INK)
for name in ("counted", "process"):
    ax.barh([name], [layer_tensors / 1e9], 0.6, **plots.BAR["yours"])
    ax.barh([name], [(measured[name] - layer_tensors) / 1e9], 0.6, left=[layer_tensors / 1e9], color="white", edgecolor=plots.INK)
ax.set_ylabel("one layer")
ax.invert_yaxis()
ax.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plots.show(
    fig,
    alt=f"Horizontal bars: planned {measured['planned'] / 1e9:.2f} GB at the worst moment, counted {measured['counted'] / 1e9:.2f} GB, process "
    f"{measured['process'] / 1e9:.2f} GB; the 4-bit weights are {layer['in 4 bits'] / 1e9:.2f} GB of each.",
)

# %% [markdown]
# **How to read it.** The coloured terms are what is there at the worst moment. White is what was measured on top of the layer itself. The process holds more than
# its tensors: the maths library's workspaces, for one.
#
# Eighty of these, the embeddings and the head are the model. And the time, honestly: 80 layers at this speed would be

# %% tags=["experiment"]
print(f"80 × {stepped_in:.1f} s = {80 * stepped_in / 60:.0f} minutes for one step on one row of 512 tokens, on this machine")

# %% [markdown]
# ## Before you start: what is free, what lies, when to stop
#
# On a laptop, a program that asks for too much memory is killed. On a DGX Spark, where processor and GPU share one memory, an overrun swaps or **freezes the machine** instead: no error, no prompt, a power button. So
# look first.
#
# And look at the right number. `torch.cuda.mem_get_info()` reports the kernel's *MemFree* there, in which the page cache (files the kernel keeps around, and drops as soon as
# somebody needs the room) counts as used. On a GB10 after a 60 GiB file was written it read 41.52 GiB, while MemAvailable was 115.65
# ([measured in unslothai/unsloth #10704](https://github.com/unslothai/unsloth/pull/10704); NVIDIA's page of
# [known issues](https://docs.nvidia.com/dgx/dgx-spark/known-issues.html) describes it). Download a model, and the machine seems full of it.
#
# Take the 70B plan to both readings:

# %%
readings = {"mem_get_info": 41.52, "MemAvailable": 115.65}  # GiB, from the report above
for name, free in readings.items():
    room = MemoryBudget(f"by {name}", True, DGX_SPARK.total, round(free * GIB), DGX_SPARK.reserve)
    print(f"S = 2,048 {fit_report(plans[2048], room)}\n")

# %% [markdown]
# `budget()` takes the larger of the two, less a reserve: 8 GiB on a machine like that, so that it stays alive. `train` asks it before a step starts, and refuses. Here is such a refusal: 64 rows of 2,048 tokens at once, on the
# small model.

# %%
model, _ = load_model(EMBEDDED, dtype=torch.float32)
add_adapters(model.cpu(), AdapterConfig(rank=16)).train()
ids = torch.arange(2048) % 1000 + torch.arange(64)[:, None]
try:
    Guard(model).check({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
except MemoryError as refusal:
    print(refusal)
del model, ids

# %% [markdown]
# And what `spark-ft doctor` says of the machine in front of you, with the traps that apply to it:

# %%
print(doctor.describe(doctor.look()))

# %% [markdown]
# ## The real run
#
# Llama-3.3-70B is gated: you accept its licence on its page, and log in with a token of the same account. Its weights are 141 GB on disk. [Qwen2.5-72B-Instruct](https://huggingface.co/Qwen/Qwen2.5-72B-Instruct) is as large and open. `load_model`
# checks licence, token and disk *before* it fetches anything. This cell runs only those checks; without a network, or with the hub switched off, it says so.

# %%
import shutil

from transformers import AutoModelForCausalLM

for name in ("meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen2.5-72B-Instruct"):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(known_config(name)).parameters())
    print(f"{name}: {parameters / 1e9:.2f} billion weights, {2 * parameters / 1e9:.0f} GB of disk; {shutil.disk_usage(ROOT).free / 1e9:.0f} GB are free where this lab lies")
    try:
        preflight(name)
        print("   ready to be fetched, or here already\n")
    except OSError as missing:
        print(f"   not ready. {missing}\n")

# %% [markdown]
# The run itself is five lines. On a DGX Spark (`SPARK_FT_PROFILE=spark`, found by itself) the profile's large model is the open 72B, read into 4 bits tensor by tensor; here it is the embedded one. Same cell. A few
# steps are enough to know how long an epoch would take: **measure, then multiply**.

# %% tags=["experiment"]
large, large_tokenizer = load_model(profile().large_model, quantize="nf4")
torch.manual_seed(0)
add_adapters(large, AdapterConfig(rank=16))
large.activation_checkpointing_enable()
history = train(large, sft_batches(train_rows, large_tokenizer, 1), sft_loss, TrainConfig(steps=3, learning_rate=2e-4, progress=False))
seconds = history.seconds_per_step
epoch_minutes = seconds * len(train_rows) / 60
print(f"{large.config._name_or_path}: {seconds:.2f} s a step of one ticket, {sum(history.tokens) / sum(history.seconds):.0f} tokens/s; losses {history.losses[0]:.2f} … {history.losses[-1]:.2f}")
print(f"one epoch of {len(train_rows)} tickets at this rate: {epoch_minutes:.0f} minutes")
del large

# %% [markdown]
# ### How long on a DGX Spark?
#
# We have not measured it there, so here is what can be said without making a number up: **a floor**. The same run on tensors without memory counts the arithmetic of a step and the bytes that it must move; divide by the rates of the chip (273 GB/s for bytes) and take the larger. No software can be faster. NVIDIA's datasheet amounts to about 125 TFLOP/s dense bf16; 93 to 95 have been measured in attention kernels.

# %%
floor = {}
for length, plan in plans.items():
    floor[length] = {rate: plan.floor(Machine("", rate * 1e12, 273e9)) for rate in (125, 94)}
    print(f"S = {length}: {plan.flops / 1e12:.0f} TFLOP and {plan.moved / 1e9:.0f} GB a step; at least {floor[length][125]:.1f} s at 125 TFLOP/s, "
          f"{floor[length][94]:.1f} s at 94: at most {length / floor[length][125]:.0f} tokens/s")  # fmt: skip

# %% [markdown]
# A floor is not an estimate: unpacking 68 billion weights three times a step, and short rows that leave the chip idle, take their time. (Beware of tables in tokens a second: they may multiply rows by their *padded* length.
# Somebody who took 80,000 tokens a second for a 3B model from one [measured a tenth of the steps](https://github.com/NVIDIA/dgx-spark-playbooks/issues/29) that it promised.) On your own, the cell above gives an estimate from measured steps in a minute or two.
#
# ### All 80 layers on a GPU: stored measurements
#
# `python -m spark_ft.lab.true_size` makes all 80 layers at true size on one 80 GB card, random weights, quantized on the device, and measures peak memory and seconds a step at S = 512 and 2,048. What has been measured so far:

# %%
gpu_runs = giant.stored()
for run in gpu_runs:
    print(f"{run['device']}, {run['date']}, torch {run['versions']['torch']}: {run['what']}")
    for one_run in run["runs"]:
        off = one_run["planned peak bytes"] / one_run["peak bytes"] - 1
        print(f"   S = {one_run['length']}: peak {one_run['peak bytes'] / 1e9:.1f} GB (planned {one_run['planned peak bytes'] / 1e9:.1f}, {off:+.1%}), "
              f"{one_run['seconds a step']:.2f} s a step, {one_run['tokens a second']:.0f} tokens/s")  # fmt: skip
if not gpu_runs:
    print("nothing: the full 80-layer run is still unmeasured. `python -m spark_ft.lab.true_size` on an 80 GB card makes it.")

# %% [markdown]
# ## What you should see
#
# - NF4 errs by about 7.3% of a standard deviation on a normal distribution, equal steps by 8.5%; on real weights the order is the same.
# - Your bytes, the package's and bitsandbytes' are the same bytes.
# - QLoRA starts from a slightly worse book and, after 20 steps of notes, ends a little behind LoRA: by few hundredths of a nat out of two, which five seeds can tell from zero. Between
#   NF4's levels and equal ones, where NF4 errs less on the weights, the same seeds can *not* tell who ends lower.
# - A merge to bf16 keeps what was learned. Put back into 4 bits, nearly all of it is gone, and nothing warns you.
# - The plan of a true-size 70B layer agrees with its tensors to a few percent, and the plan without embeddings does not agree with anything.
# - 70B with QLoRA is a matter of 43 to 46 GB, of which the 4-bit weights are 35.
#
# ## On your DGX Spark
#
# - Use `SPARK_FT_PROFILE=spark` and run this notebook from the top. The cell under *The real run* loads 72B; the first time it fetches 145 GB.
# - Close what you don't need, `swapoff -a` for the time of the run, keep 8 to 16 GiB of MemAvailable. Watch it with `free -h`, column *available*; nvidia-smi's memory fields read N/A there.
# - Load tensor by tensor (`quantize="nf4"` does) or a checkpoint that is 4-bit already: copying from a mapped file can keep both copies, and a 70 GB load has been seen growing towards 148.
# - Leave out CPU offload and paged optimizers; there is no other memory to offload to.
# - Ship the adapter, not the merge: a merged 70B is 141 GB in bf16.
#
# ## Common mistakes
#
# - **One scale for the whole matrix.** A single outlier then takes the resolution from everybody. That is why there are blocks.
# - **"4-bit is a quarter".** 4.127 bits, and embeddings and head are not in it: 3.6 times smaller for the whole of 70B.
# - **Low half first.** Every second pair of neighbours swapped; the model babbles, and shapes and sizes all look right.
# - **Merging into 4 bits.** You saw what is left of the notes. Keep the adapter, or merge to bf16.
# - **Planning weights only.** The 70B run needs 8 to 11 GB beside its 4-bit weights, and several times that with eight rows at once.
# - **Believing "free".** On unified memory it is not what you can have. MemAvailable is.
# - **Expecting small models to shrink.** Activations don't: see the step on the embedded model.
#
# ## Explain it back

# %% [markdown] nbgrader={"grade_id": "explain-shades", "solution": true, "grade": true, "points": 0}
# **Why sixteen uneven levels, and why a scale for every 64 numbers?**
#
# ### BEGIN SOLUTION
# Weights are mostly small, so levels near zero are used more; spacing them like the quantiles of a bell curve uses each about equally often, and the mean error falls. The scale adapts the levels to
# each block: one large number makes its own 64 coarse and no others.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-merge", "solution": true, "grade": true, "points": 0}
# **The notes are trained on a rough book. Why can they still be sharp, and why must a merge not go back into 4 bits?**
#
# ### BEGIN SOLUTION
# The notes are in full precision, and the gradient reaches them through the unpacked weights; they also learn to make up for the roughness. Their changes are smaller than half a step between two
# levels, so rounding the sum to a level mostly gives the old level, and the change is gone.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-plan", "solution": true, "grade": true, "points": 0}
# **A friend says: "70B in 4 bits is 35 GB, so my 40 GB card can train it." What do you ask?**
#
# ### BEGIN SOLUTION
# Where are the embeddings and the head (4.2 GB in bf16), the notes with gradients and moments (1.7 to 3.3), the checkpoints (0.7 GB at 512 tokens, 2.7 at 2,048), one layer computed again, the context? It is 43 GB at 512 tokens. And has
# the plan been held to a measurement?
# ### END SOLUTION

# %% [markdown]
# ## The numbers of this lab

# %% tags=["experiment"]
headline(
    {
        "70B QLoRA, S 2048: planned (GB)": plans[2048].total / 1e9,
        "at S 512 (GB)": plans[512].total / 1e9,
        "true-size layer: planned (GB)": measured["planned"] / 1e9,
        "counted (GB)": measured["counted"] / 1e9,
        "process (GB)": measured["process"] / 1e9,
        "NF4 error on a normal": nf4_error,
        "16 equal steps": equal_error,
        "bytes equal to bitsandbytes (%)": 100 * min(bytes_equal),
        "held-out loss, QLoRA": after["NF4"].value,
        "LoRA": after["fp32"].value,
        "verdict": verdict,
        "merged": merges["merged to bf16"],
        "merged into NF4": merges["merged, NF4 again"],
        "loss beside PEFT, at most": loss_difference,
        "80 layers on a GPU": "measured" if gpu_runs else "unmeasured",
    }
)
