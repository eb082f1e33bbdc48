# %% [markdown]
# # 3.1.10 How does it get out of the notebook?
#
# **Time**: about 55 minutes.
#
# ## What you will make
#
# One file that holds the base model and your adapter. A real server, [llama.cpp](https://github.com/ggml-org/llama.cpp), loads it and
# writes kitchen tickets. You write the merge, the step that everyone forgets, the reader of a streamed answer and the recipe for
# [Ollama](https://ollama.com). Then you prove that the file is the model.
#
# ## What you should know first
#
# - LoRA, its $A$ and $B$, and merging ([3.1.1](lab-3.1.1-lora-theory.ipynb)). The adapter is the one of
#   [3.1.4](lab-3.1.4-8b-lora-finetuning.ipynb).
# - **log p**: a token's log-probability, in nats. 0 is certain.
# - Numbers in few bits ([3.1.5](lab-3.1.5-70b-qlora-finetuning.ipynb)).
#
# ## The picture
#
# Your recipe works in the test kitchen. Now it goes to a restaurant. You copy the sticky notes into the book, because the line cooks
# want one book and no loose paper. You translate it into the language of that kitchen. And before the first guest comes, you cook
# one dish in both kitchens and taste. Most bad exports taste wrong at the first spoon; the rest look fine and are not.

# %%
import json

import torch

from spark_ft import export_adapter, export_gguf, load_adapters, load_model, serve, use_adapter
from spark_ft.export.verify import verify_gguf
from spark_ft.lab import headline, yours
from spark_ft.lab.checks import lab_3_1_10 as checks
from spark_ft.lab.experiments import load
from spark_ft.lab.kitchen import kitchen_adapter
from spark_ft.lab.study import lab_3_1_10 as study

# %% [markdown]
# ## It works
#
# The package merges the adapter into the base, writes a GGUF file and starts a server on this machine. GGUF is llama.cpp's format: the
# weights, the tokenizer and the chat template in one file. All files of this lab go into a temporary folder.

# %%
place, adapter, order = study.workplace(), kitchen_adapter(), study.ORDERS[0]
model, tokenizer = load_model(dtype=torch.float32)
load_adapters(model, adapter, name="kitchen")
served = export_gguf(None, adapter, place / "kitchen.gguf", "f16")
with serve(served) as server:
    answer = server.chat(order, max_tokens=64)
print(f"{order}\n→ {answer.text}")
print(f"{answer.prefill:.0f} tokens per second read, {answer.decode:.0f} written")

# %% [markdown]
# No PyTorch took part in that answer. Reading the order (*prefill*) is faster per token than writing (*decode*): the order's tokens go
# through together, the answer's one after another.
#
# ## Build it
#
# The base lies on disk as named tensors. So does the adapter, under the names that PEFT gives them:

# %%
study.show_names(adapter)

# %% [markdown]
# ### Exercise 1: merge, tensor by tensor
# ●●● importance · ●●○ difficulty · 10 minutes
#
# A 70B model in 16 bits takes 141 GB. Nobody wants it in memory twice, or even once. So read one tensor, merge what belongs to it, hand
# it on, and forget it.
#
# `weights` is a mapping: `for name in weights` gives names, and `weights[name]` reads that tensor from disk. `adapter` is a dict of
# tensors. Yield `(name, tensor)` for *every* tensor: $W + \text{scaling} \cdot BA$ where the adapter has a note, and $W$ elsewhere.
# Read each tensor once.
#
# <details><summary>Hint: the names</summary>
#
# Take `.weight` off the end of the name (`removesuffix`). Put `base_model.model.` before it, and `.lora_A.weight` after it.
# </details>
# <details><summary>Hint: one at a time</summary>
#
# A function with `yield` in a loop stops there until the next tensor is asked for.
# </details>


# %% nbgrader={"grade_id": "merged", "solution": true}
def merged(weights, adapter, scaling):
    """Every (name, W + scaling · B A), one tensor at a time."""
    ### BEGIN SOLUTION
    for name in weights:
        W = weights[name]
        layer = "base_model.model." + name.removesuffix(".weight")
        A = adapter.get(f"{layer}.lora_A.weight")
        B = adapter.get(f"{layer}.lora_B.weight")
        if A is not None:
            W = W + scaling * (B @ A)
        yield name, W
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-merged", "grade": true, "points": 3}
checks.check_merged(merged)

# %% [markdown]
# ### Exercise 2: queries and keys, in pairs
# ●●● importance · ●●○ difficulty · 8 minutes
#
# A model knows a token's place because its queries and keys are *turned*, two numbers at a time. transformers turns number $i$ with number
# $i + \text{half}$ of each head. llama.cpp turns neighbours. So the rows of every head must be dealt like two halves of a deck: with 6
# rows, `0 1 2 | 3 4 5` becomes `0 3 1 4 2 5`.
#
# `W` is (heads · size, in), the heads one below the other. Return the same rows in llama.cpp's order.
#
# <details><summary>Hint</summary>
#
# `W.reshape(heads, 2, -1, W.shape[-1])` has the two halves of each head along dimension 1. Swap dimensions 1 and 2, and take the shape
# back.
# </details>


# %% nbgrader={"grade_id": "in-pairs", "solution": true}
def in_pairs(W, heads):
    """The rows of each head, its two halves dealt one by one."""
    ### BEGIN SOLUTION
    halves = W.reshape(heads, 2, -1, W.shape[-1])
    dealt = halves.transpose(1, 2)
    return dealt.reshape(W.shape)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-in-pairs", "grade": true, "points": 2}
checks.check_in_pairs(in_pairs)

# %% [markdown] tags=["predict"]
# **Predict, then run.** The next cell takes a good file and puts only Q and K back into transformers' order. Every number is there, some
# rows in the wrong place. What happens?
#
# - the server refuses the file
# - it answers nonsense
# - it answers as before, since attention sums over all rows

# %%
study.show_unpaired(served, order)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Nonsense, without any error. Shapes and names fit, so nothing can complain. Queries and keys are turned by wrong angles, and the model
# no longer knows where a word stands. For an *adapter* alone it is worse: with unpaired rows in $B$ the answers look nearly right. Only
# the log-probabilities tell.
# </details>

# %% [markdown]
# ### Exercise 3: read a stream
# ●●○ importance · ●○○ difficulty · 8 minutes
#
# Nobody likes to wait for the last word. A server can send an answer piece by piece, one line of text per piece. Many
# servers send the same lines, since they follow OpenAI's API.
#
# - A line that matters begins with `data: `. Skip all others; empty ones too.
# - After it stands JSON. The piece is at `["choices"][0]["delta"]`, under `"content"`, if there is one. It can be missing or `None`.
# - `data: [DONE]` is the end.
#
# `lines` gives `bytes`. Yield each piece of text as soon as its line is there.
#
# <details><summary>Hint</summary>
#
# `line.startswith(b"data: ")`, then `line.removeprefix(b"data: ").strip()`. `json.loads` takes bytes. `delta.get("content")` is `None`
# where there is nothing.
# </details>


# %% nbgrader={"grade_id": "pieces", "solution": true}
def pieces(lines):
    """The pieces of text in a streamed answer."""
    ### BEGIN SOLUTION
    for line in lines:
        if not line.startswith(b"data: "):
            continue
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        delta = json.loads(data)["choices"][0]["delta"]
        if delta.get("content"):
            yield delta["content"]
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-pieces", "grade": true, "points": 2}
checks.check_pieces(pieces)

# %%
study.show_stream(served, order, pieces)

# %% [markdown]
# Three raw lines as they came, then your reader's pieces with a bar after each.
#
# ### Exercise 4: a recipe for Ollama
# ●●○ importance · ●○○ difficulty · 8 minutes
#
# Ollama runs llama.cpp too. It wants a `Modelfile`. Write out the chat template and the system prompt: if you leave them out, Ollama takes
# the nearest template that it knows, and the system prompt of the training gets lost. Return this text:
#
# ```
# FROM ./model.gguf
# TEMPLATE """the template"""
# SYSTEM """the system prompt"""
# PARAMETER temperature 0
# PARAMETER num_ctx 4096
# PARAMETER stop "<|im_end|>"
# ```
#
# There is one `stop` line for each entry of `stops`, in JSON's quotes. If `system` is None, there is no `SYSTEM` line.
#
# <details><summary>Hint</summary>
#
# Collect lines in a list and join them with `"\n"`. `json.dumps(stop)` puts the quotes on and escapes what needs it.
# </details>


# %% nbgrader={"grade_id": "modelfile", "solution": true}
def modelfile(file, template, system, stops):
    """The text of a Modelfile for the GGUF file beside it."""
    ### BEGIN SOLUTION
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""']
    if system is not None:
        lines.append(f'SYSTEM """{system}"""')
    lines += ["PARAMETER temperature 0", "PARAMETER num_ctx 4096"]
    for stop in stops:
        lines.append(f"PARAMETER stop {json.dumps(stop)}")
    return "\n".join(lines) + "\n"
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-modelfile", "grade": true, "points": 2}
checks.check_modelfile(modelfile)

# %%
study.show_modelfile(served, tokenizer, modelfile)

# %% [markdown]
# ### Exercise 5: several notes become one
# ●●○ importance · ●●○ difficulty · 8 minutes
#
# Three people trained the same task with three seeds. Can you ship the mean? Averaging the $A$s and the $B$s apart is wrong:
# $\bar B \bar A$ is not the mean of the products. The mean of $B_1A_1, \dots, B_nA_n$ is an ordinary, thicker note: all $A$s one below
# the other, all $B$s side by side, divided once by $n$.
#
# `adapters` is a list of pairs `(A, B)` for one layer, $A$ (r, in) and $B$ (out, r). Ranks may differ. Return one pair `(A, B)` whose
# product $BA$ is the mean.
#
# <details><summary>Hint</summary>
#
# `torch.cat(list, dim=0)` stacks, `dim=1` puts side by side. Divide only one of the two.
# </details>


# %% nbgrader={"grade_id": "average", "solution": true}
def average(adapters):
    """(A, B) with B A the mean of the adapters' products."""
    ### BEGIN SOLUTION
    A = torch.cat([A for A, B in adapters], dim=0)
    B = torch.cat([B for A, B in adapters], dim=1)
    return A, B / len(adapters)
    ### END SOLUTION


# %% nbgrader={"grade_id": "check-average", "grade": true, "points": 2}
checks.check_average(average)

# %% [markdown]
# ## Your code trains
#
# In this lab your code serves. Take the untrained base as a file. Every tensor in it is replaced by what *your* `merged` and `in_pairs`
# give. The server loads the result and takes an order with a dish that training never saw. The curve is −log p of each token that it writes: a
# file with another model in it would choose other words, or be less sure of them.

# %% tags=["trains"]
base = export_gguf(None, None, place / "base.gguf", "f16")
yours.trains(
    lambda: study.losses_of(study.fill(base, adapter, merged, in_pairs), tokenizer),
    lambda: study.losses_of(served, tokenizer),
    what="export",
    does="serves",
    x="token",
    y="−log p of the token (nats)",
    caption="an order to llama.cpp, F16, embedded model with the kitchen adapter",
)

# %% [markdown]
# ## Is it true?
#
# `verify_gguf` holds a file to the model in memory: the same tokens from the same text, the same greedy answers, nearly the same
# log-probability for every token, and the numbers themselves.

# %%
report = verify_gguf(served, model, tokenizer, prompts=study.ORDERS)
print(report)

# %% [markdown]
# 16 bits round a little, so the log-probabilities are not *equal*. The limits are 0.003 on average and 0.05 at most.
#
# ### A bug hunt
#
# A colleague compares the model with and without its notes, then exports. The file loads and answers. What is wrong?

# %% tags=["bug-hunt"]
theirs = load_adapters(load_model(dtype=torch.float32)[0], adapter, name="kitchen")
use_adapter(theirs, None)  # how good is the base?
print(f"{study.loss_of(theirs, tokenizer):.2f} nats per token without notes")
export_gguf(theirs, None, place / "theirs.gguf")
with serve(place / "theirs.gguf") as server:
    print(server.chat(order, max_tokens=16).text)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# `use_adapter(theirs, None)` took the notes off, and nobody put them on again. The file holds the base: the classic of bad exports.
# `verify_gguf` says so by name, as the next cell shows. It is also the control: a check that passes here would be worth nothing.
# </details>

# %%
print(verify_gguf(place / "theirs.gguf", model, tokenizer, prompts=[order]))

# %% [markdown] tags=["predict"]
# ### Fewer bits
#
# Q8_0 keeps 32 weights as whole numbers from −127 to 127 with one scale, Q4_0 as numbers from −8 to 7. Both are made here from the
# *original* weights plus the update.
#
# **Predict, then run.** How much of what training gained (held-out loss before, less after) survives in Q4_0?
#
# - about half
# - more than 95%
# - all of it, to the last digit

# %% tags=["experiment"]
kept = study.show_types(report, model, adapter, tokenizer)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# More than 95%, on this task and with this model. The last two columns say how far the answers themselves moved. With such weights llama.cpp
# rounds the *activations* to 8 bits as well.
# </details>

# %% tags=["knob", "experiment"]
DTYPE = "q5_0"  # turn this: "bf16", "q8_0", "q4_1". One of them is refused; read why
study.show_type(DTYPE, adapter, place, tokenizer)

# %% [markdown]
# And an adapter that was trained over 4-bit weights, as in lab 3.1.5? An export takes the originals, not the rounded weights that the adapter
# learned to live with. Three such adapters were trained on kitchen tickets and stored.

# %% tags=["experiment"]
four_bits = study.show_four_bits(load("trained_over_4_bits"))

# %% [markdown]
# The adapter works on the originals too. Single log-probabilities move a little, by much more than F16's rounding. So hold such an export to
# W + ΔW in fp32, and not to the model that was trained.
#
# ### One book, several sets of notes
#
# An adapter can also stay alone, as a small GGUF file beside the base. Each request then says which one it wants. The model in your
# notebook switches as well.

# %% tags=["experiment"]
files = {}
for name, folder in {"kitchen": adapter, "grams": study.tune_grams(place / "grams")}.items():
    files[name] = export_adapter(None, folder, place / f"{name}-alone.gguf")
    load_adapters(model, folder, name=name)
with serve(base, files) as server:
    slowest = study.show_switches(model, server, tokenizer)
    study.show_stale(server, tokenizer, order)

# %% [markdown]
# **The second trap** is in the last three lines. llama.cpp also has a switch for *all* requests. It keeps its memory of the prompt, which was
# read with the old notes. So the first answer after the switch comes from a mixture of both models. Without that memory it is the
# base's again. `server.chat(…, adapter="grams")` names the adapter in the request, and is right.
#
# ### The mean of three
#
# Five times, three adapters were trained and averaged in both ways; stored.

# %% tags=["experiment"]
averages = study.show_averages(load("averaged_adapters"))

# %% [markdown]
# ## On a DGX Spark

# %%
study.show_sizes()
study.show_ollama(served, tokenizer, order)

# %% [markdown]
# Every weight is read once per token, so bytes set the pace: fewer bits, more tokens per second. A 70B model in 16 bits does not fit. In
# Q4_0 it does. If a merge does not fit on your disk either, ship the adapter alone: it is small, and llama.cpp puts it on the base.
# Ollama takes no adapters any more. The same from a terminal:
#
# ```bash
# spark-ft export out.gguf --model meta-llama/Llama-3.3-70B-Instruct --adapter my-adapter --dtype q4_0 --no-verify
# ```
#
# ## Explain it back

# %% [markdown] nbgrader={"grade_id": "explain-verify", "solution": true, "grade": true, "points": 0}
# **Your exported model answers well. Why is that no proof, and what would be one?**
#
# ### BEGIN SOLUTION
# A base model without its adapter answers well too, and so does a file whose adapter is slightly wrong. A proof compares the file with the
# model: the same tokens from the same text, the same greedy answers, and log-probabilities that differ no more than rounding explains. And
# the comparison must fail for a file that is known to be wrong.
# ### END SOLUTION

# %% [markdown] nbgrader={"grade_id": "explain-grid", "solution": true, "grade": true, "points": 0}
# **A friend wants 4 bits: merge first, or quantize first?**
#
# ### BEGIN SOLUTION
# Merge into the original 16-bit weights, then quantize the sum once. If you merge into weights that were rounded to a grid and round to the
# same grid again, most numbers go back to where they were, because the update is smaller than a step. Then training is largely lost.
# ### END SOLUTION

# %% tags=["experiment"]
headline(
    {
        "greedy answers equal": f"{report.greedy} of {report.prompts}",
        "|Δ log p|, F16, on average": report.mean,
        "gain kept in Q8_0 (%)": 100 * kept["q8_0"],
        "gain kept in Q4_0 (%)": 100 * kept["q4_0"],
        "trained on 4 bits, |Δ log p| on the originals": four_bits.value,
        "A and B averaged apart, more loss": averages["A and B apart"].signed(3),
        "slowest switch (s)": slowest,
    }
)
