"""What lab 3.1.10 shows: files filled by the learner, what each type changed, tickets, switches, sizes."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spark_ft.adapters import adapters_disabled, save_adapters, use_adapter
from spark_ft.data.records import read_records
from spark_ft.export.gguf import DTYPES, export_gguf, in_own_order, names_in_gguf
from spark_ft.export.ollama import Ollama, chat_template, commands, write_modelfile
from spark_ft.export.reader import read_gguf
from spark_ft.export.server import Server, serve
from spark_ft.export.verify import Verification, verify_gguf
from spark_ft.files import ROOT
from spark_ft.lab.checks import is_stub
from spark_ft.lab.experiments.common import tune
from spark_ft.lab.experiments.lab_3_1_10 import answer_logps
from spark_ft.lab.experiments.runner import Measurement
from spark_ft.lab.kitchen import tickets
from spark_ft.lab.study import show_differences, show_table, verdict, workplace  # noqa: F401
from spark_ft.memory.machine import DGX_SPARK, DGX_SPARK_SPEED
from spark_ft.memory.shapes import known_config
from spark_ft.models import load_model, open_model
from spark_ft.stats import Estimate, mean_interval, paired_difference

Merge = Callable[[Mapping[str, Tensor], dict[str, Tensor], float], Iterable[tuple[str, Tensor]]]
Pair = Callable[[Tensor, int], Tensor]
ORDERS = [row["prompt"] for row in tickets("test")[:3]]
HELD_OUT = tickets("validation")[:6]
HARD_ORDER = tickets("test")[100]["prompt"]  # a dish and a phrasing that training never saw
QUERY_AND_KEY = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def unwritten(error: NotImplementedError) -> str:
    """The sentence for an exercise that is not written yet; any other error is raised again."""
    if not is_stub(error):
        raise error
    return f"not written yet – {str(error).removeprefix('your turn').strip(' ()')}"


# ── the learner's file ──────────────────────────────────────────────────────────────────────────────────────


class OnDisk(Mapping):
    """The base's original weights by name; each look-up reads one tensor from disk."""

    def __init__(self):
        self.tensors = open_model().tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name][:]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def adapter_on_disk(folder: Path) -> tuple[dict[str, Tensor], float]:
    """An adapter's tensors under PEFT's names, and its scaling α/r."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]


def show_names(adapter: Path) -> None:
    """Print how one weight is called in the model, and its A and B in the adapter's file."""
    for where, tensors in (("model", OnDisk()), ("adapter", adapter_on_disk(adapter)[0])):
        for name in tensors:
            if "layers.0.self_attn.q_proj" in name:
                print(f"{where:<8} {name:<70} {tuple(tensors[name].shape)}")


def fill(base: Path, adapter: Path, merge: Merge, pair: Pair) -> Path:
    """Copy the base's file as `yours.gguf`, each tensor replaced by what `merge` and `pair` make."""
    path, config = base.with_name("yours.gguf"), open_model().config
    shutil.copyfile(base, path)
    places, (_, name_of) = read_gguf(base).tensors, names_in_gguf(config, base.name)
    with open(path, "r+b") as file:
        for name, tensor in merge(OnDisk(), *adapter_on_disk(adapter)):
            layer = name.split(".")[-2]
            if layer in QUERY_AND_KEY:
                tensor = pair(tensor, getattr(config, QUERY_AND_KEY[layer]))
            _, kind, place = places[name_of(name)]
            file.seek(place)
            file.write(gguf.quantize(tensor.float().contiguous().numpy(), kind).tobytes())
    return path


def losses_of(path: Path, tokenizer, tokens: int = 30) -> list[float]:
    """−log p of each token that a server writes with this file; one that ends inside a character counts 0."""
    with serve(path) as server:
        said = server.complete(_ids(tokenizer, HARD_ORDER), max_tokens=tokens)
    return [0.0 - (logp or 0.0) for logp in said.logps]


def show_unpaired(served: Path, order: str) -> None:
    """Put Q's and K's rows back into transformers' order, and print what the server answers then."""
    path, config = served.with_name("unpaired.gguf"), open_model().config
    shutil.copyfile(served, path)
    file = read_gguf(served)
    with open(path, "r+b") as out:
        for name, (_, kind, place) in file.tensors.items():
            for ours, theirs in (("q_proj", "attn_q.weight"), ("k_proj", "attn_k.weight")):
                if name.endswith(theirs):
                    out.seek(place)
                    rows = in_own_order(file.read(name), ours, config)
                    out.write(gguf.quantize(rows.contiguous().numpy(), kind).tobytes())
    with serve(path) as server:
        print(repr(server.chat(order, max_tokens=24).text))


def show_stream(path: Path, order: str, pieces: Callable[[Iterable[bytes]], Iterable[str]]) -> None:
    """Three raw lines of a streamed answer; then the whole of it, through the learner's reader."""
    with serve(path) as server:
        body = {"messages": [{"role": "user", "content": order}], "max_tokens": 64, "temperature": 0}
        for line in list(server.lines("/v1/chat/completions", {**body, "stream": True}))[:3]:
            print(line[:96], "…" if len(line) > 96 else "")
        try:
            for piece in pieces(server.lines("/v1/chat/completions", {**body, "stream": True})):
                print(piece, end="|", flush=True)
            print()
        except NotImplementedError as error:
            print(unwritten(error))


def show_modelfile(path: Path, tokenizer, yours: Callable[..., str]) -> None:
    """The learner's Modelfile for the served file, and whether it says what the package's does."""
    template = chat_template(tokenizer)
    try:
        text = yours(path.name, template.go(), template.default_system, [tokenizer.eos_token])
    except NotImplementedError as error:
        print(unwritten(error))
        return
    theirs = write_modelfile(path, tokenizer, parameters={"num_ctx": 4096}).read_text()
    print(text)
    missing = [line for line in theirs.splitlines() if line not in text.splitlines()]
    print("spark_ft's says the same" + (f", and also: {'; '.join(missing)}" if missing else ""))


# ── what each type changed ──────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def as_model(path: Path) -> nn.Module:
    """The numbers of a file, dequantized, in a transformers model."""
    file, (model, _) = read_gguf(path), load_model(dtype=torch.float32)
    _, name_of = names_in_gguf(model.config, path.name)
    for name, p in model.named_parameters():
        p.copy_(in_own_order(file.read(name_of(name)), name.rpartition(".")[0], model.config))
    return model


def loss_of(model: nn.Module, tokenizer) -> float:
    """Held-out loss on a few tickets, nats per token."""
    return -answer_logps(model, tokenizer, HELD_OUT).mean().item()


def bits(kind: gguf.GGMLQuantizationType) -> float:
    """What a number takes in a type of GGUF, its share of the block's scale included."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return 8 * nbytes / block


def show_types(f16: Verification, model: nn.Module, adapter: Path, tokenizer) -> dict[str, float]:
    """What each type takes and what it changed; returns the share of training's gain that each keeps.

    Args:
        f16: what `verify_gguf` said of the file in F16; the others are written beside it.
    """
    with adapters_disabled(model):
        before = loss_of(model, tokenizer)
    after, kept, rows = loss_of(model, tokenizer), {}, []

    def made(dtype: str) -> Verification:
        path = export_gguf(None, adapter, f16.path.with_name(f"kitchen-{dtype}.gguf"), dtype)
        return verify_gguf(path, model, tokenizer, prompts=ORDERS)

    fewer = ("q8_0", "q4_0")
    with ThreadPoolExecutor(len(fewer)) as pool:  # a server takes one core
        reports = {"f16": f16, **dict(zip(fewer, pool.map(made, fewer), strict=True))}
    for dtype, said in reports.items():
        loss = loss_of(as_model(said.path), tokenizer)
        kept[dtype] = (before - loss) / (before - after)
        rows.append({
            "type": dtype,
            "bits per weight": f"{bits(DTYPES[dtype][0]):g}",
            "MB": f"{said.path.stat().st_size / 1e6:.0f}",
            "held-out loss": f"{loss:.4f}",
            "of the gain": f"{kept[dtype]:.1%}",
            "same answers": f"{said.greedy} of {said.prompts}",
            "|Δ log p|": f"{said.mean:.4f}",
        })  # fmt: skip
    show_table(
        rows,
        f"loss (nats per token): {len(HELD_OUT)} held-out tickets, weights dequantized; {before:.4f} before "
        f"training, {after:.4f} with the adapter on; answers and log-probabilities: the server against "
        f"transformers, {len(ORDERS)} orders; one adapter, seed 0",
    )
    return kept


def show_type(dtype: str, adapter: Path, place: Path, tokenizer) -> None:
    """One type: its size and held-out loss, or why it is refused."""
    try:
        path = export_gguf(None, adapter, place / "knob.gguf", dtype)
    except ValueError as error:
        print(f"refused: {error}")
        return
    size, width = path.stat().st_size / 1e6, bits(DTYPES[dtype][0])
    loss = loss_of(as_model(path), tokenizer)
    print(f"{dtype}: {width:g} bits per weight, {size:.0f} MB, held-out loss {loss:.4f} nats per token")


# ── several adapters ────────────────────────────────────────────────────────────────────────────────────────


def tune_grams(folder: Path) -> Path:
    """A second adapter, trained for three steps on cooking answers in grams; saved."""
    pairs = read_records(ROOT / "data" / "kitchen_preferences" / "train.jsonl", "preference")[:12]
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    model, _ = tune(rows, 0, steps=3, warmup_steps=1, learning_rate=2e-3)
    return save_adapters(model, folder)


def show_four_bits(stored: Measurement) -> Estimate:
    """A stored adapter over 4 bits, where it was trained and on the originals; the mean |Δ log p|."""
    apart = mean_interval(stored.values("apart"))
    names = {
        "before training": "before",
        "4 bits, as trained": "on 4 bits",
        "originals, as exported": "on the originals",
    }
    show_table(
        [
            {"the adapter lies on": name, "held-out loss (nats per token)": mean_interval(stored.values(key))}
            for name, key in names.items()
        ],
        f"16 held-out tickets; from row 2 to row 3 a token's log-probability moves by {apart} on average; "
        f"{stored.origin()}; mean and 95% t interval",
    )
    return apart


def show_switches(model: nn.Module, server: Server, tokenizer, times: int = 8) -> float:
    """Switch on the model and on the server in a random order; returns the slowest switch of the model."""
    names: list[str | None] = [None, *server.adapters]
    ids = _ids(tokenizer, "How do I cook rice?")
    row = torch.tensor([ids])

    @torch.no_grad()
    def logits(name: str | None) -> tuple[Tensor, float]:
        started = time.perf_counter()
        use_adapter(model, name)
        seconds = time.perf_counter() - started
        return model(input_ids=row).logits[0, -1], seconds

    def said(name: str | None):
        return server.complete(ids, adapter=name, max_tokens=2)

    first = {name: (logits(name)[0], said(name)) for name in names}
    order = torch.randint(len(names), (times,), generator=torch.Generator().manual_seed(0)).tolist()
    same, tokens, gaps, slowest = 0, 0, [0.0], 0.0
    for name in (names[i] for i in order):
        now, seconds = logits(name)
        again, (logit, before) = said(name), first[name]
        same, slowest = same + torch.equal(now, logit), max(slowest, seconds)
        tokens += again.tokens == before.tokens
        both = zip(again.logps, before.logps, strict=False)
        gaps += [abs(a - b) for a, b in both if None not in (a, b)]
    use_adapter(model, "kitchen")
    show_table(
        [
            {
                "where": "the model",
                "as at first": f"{same} of {times}, bit for bit",
                "|Δ log p|, at most": "0",
            },
            {
                "where": "the server",
                "as at first": f"{tokens} of {times}, 2 tokens each",
                "|Δ log p|, at most": f"{max(gaps):.4f}",
            },
        ],
        f"{times} switches between {', '.join(map(str, names))}; the slowest switch of the model took "
        f"{slowest:.3f} s",
    )
    assert same == tokens == times, "a switch must change nothing but the adapter"
    return slowest


def show_stale(server: Server, tokenizer, order: str) -> None:
    """Read an order with the kitchen's notes, switch them off for all requests, and ask again."""
    ids = _ids(tokenizer, order)

    def globally(scale: float, cached: bool) -> str:
        scales = [{"id": i, "scale": scale * (i == 0)} for i in range(len(server.adapters))]
        server.post("/lora-adapters", scales)
        body = {"prompt": ids, "n_predict": 12, "temperature": 0.0, "cache_prompt": cached}
        return server.post("/completion", body)["content"]

    globally(1.0, cached=False)
    said = {
        "switched off for all": globally(0.0, cached=True),
        "… and the order read anew": globally(0.0, cached=False),
        "asked without, per request": tokenizer.decode(server.complete(ids, max_tokens=12).tokens),
    }
    for how, text in said.items():
        print(f"{how:<27} {text!r}")


def _ids(tokenizer, text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def show_averages(stored: Measurement) -> dict[str, float]:
    """Held-out loss: A and B averaged apart, and single adapters, less the mean of ΔW."""
    right = stored.values("mean of ΔW")
    others = {"A and B apart": stored.values("A and B apart"), "one adapter": stored.values("alone, mean")}
    found = {name: paired_difference(values, right) for name, values in others.items()}
    said = [f"{name} {verdict(each, 'is worse', 'is better')}" for name, each in found.items()]
    told = f"Beside the mean of ΔW: {', '.join(said)}"
    show_differences(
        told,
        {f"{name} − mean of ΔW": (values, right) for name, values in others.items()},
        unit="difference in held-out loss (nats per token)",
        caption=f"each seed: three adapters of 20 steps; the mean of ΔW has loss {mean(right):.3f}; "
        f"{stored.origin()};",
    )
    return found


# ── sizes, and Ollama ───────────────────────────────────────────────────────────────────────────────────────


def show_sizes(names: Sequence[str] = ("Qwen3-8B", "Llama-3.3-70B"), rank: int = 16) -> None:
    """Each file's size on disk, and the tokens per second that a DGX Spark's memory allows at most."""
    rows = []
    for name in names:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known_config(name))
        ends = [p.numel() for n, p in model.named_parameters() if n.startswith(("model.embed", "lm_head"))]
        inner = [p.shape for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("model.layers")]
        for dtype in ("f16", "q8_0", "q4_0"):
            kind, _, ends_kind = DTYPES[dtype]
            layers = bits(kind) / 8 * sum(a * b for a, b in inner)
            size = layers + bits(ends_kind) / 8 * sum(ends)
            read = layers + bits(ends_kind) / 8 * ends[-1]  # of the embedding, a token reads one row
            fits = size <= DGX_SPARK.available
            rows.append({
                "model": name,
                "file": dtype,
                "GB": f"{size / 1e9:.1f}",
                "fits": "yes" if fits else "no",
                "tokens per second, at most": f"{DGX_SPARK_SPEED.bandwidth / read:.1f}" if fits else "–",
            })  # fmt: skip
        alone = 4 * rank * sum(a + b for a, b in inner)
        rows.append({
            "model": name, "file": f"adapter alone, rank {rank}", "GB": f"{alone / 1e9:.2f}", "fits": "yes",
            "tokens per second, at most": "–",
        })  # fmt: skip
    show_table(
        rows,
        f"counted from the shapes, not measured; at most: every weight is read once per token, at "
        f"{DGX_SPARK_SPEED.bandwidth / 1e9:.0f} GB per second, one answer at a time",
    )


def show_ollama(path: Path, tokenizer, order: str, name: str = "kitchen") -> None:
    """Create and ask a model where an Ollama answers; else the commands that do it."""
    ollama, modelfile = Ollama(), write_modelfile(path, tokenizer)
    version = ollama.version()
    if version is None:
        print("No Ollama answers on this machine. On one that has it:\n")
        print(commands(name, Path("your-folder") / modelfile.name))
        return
    ollama.create(name, path, tokenizer)
    print(f"Ollama {version}, model {name}: {ollama.chat(name, order)}")
