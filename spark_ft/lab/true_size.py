"""A model of true size with random weights: what a step takes and how long depends on their number, not on what they say.

    python -m spark_ft.lab.true_size                    all 80 layers of Llama-3.3-70B in NF4, LoRA r16, S = 512 and 2048
    python -m spark_ft.lab.true_size --layers 2 --lengths 512

Every weight is drawn and quantized on the device, one tensor at a time. On an 80 GB card it takes minutes and writes
`data/measurements/gpu/NAME.json`, with device, date, versions and settings.
"""

import argparse
import copy
import datetime
import json
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.files import ROOT, write_atomically
from spark_ft.memory.machine import free_at_once, measure
from spark_ft.memory.plan import CONTEXT, EMBEDDINGS, LOGITS, MOMENTS, MemoryPlan, plan_training
from spark_ft.memory.shapes import known_config
from spark_ft.methods.nf4 import NF4Linear, quantize_nf4
from spark_ft.scoring import sft_loss

MEASURED = ROOT / "data" / "measurements" / "gpu"


def giant_config(layers: int, name: str = "Llama-3.3-70B"):
    """A well-known model's own shape, with so many of its layers."""
    config = known_config(name)
    config.num_hidden_layers = layers
    return config


def random_nf4_model(config, device: str, dtype: torch.dtype, seed: int = 0):
    """A causal language model with random weights, its linear layers but the head in NF4, in training mode.

    Never more than the quantized model and one tensor is in memory.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model, device, dtype, seed, keep=(model.get_output_embeddings(),))
    model.tie_weights()
    return model.to(device).train()


def fill(
    model: nn.Module, device: str, dtype: torch.dtype, seed: int = 0, keep: Sequence[nn.Module] = ()
) -> None:
    """Draw every parameter of a model on the meta device, one at a time; linear layers not in `keep` become `NF4Linear`."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in list(model.named_modules()):
        for part, p in list(module.named_parameters(recurse=False)):
            if p.dim() == 1:  # a norm's
                tensor = torch.ones(p.shape, device=device, dtype=dtype)
            else:
                tensor = torch.randn(p.shape, generator=generator, device=device, dtype=dtype).mul_(0.02)
            if part == "weight" and isinstance(module, nn.Linear) and module not in keep:
                model.set_submodule(name, NF4Linear(quantize_nf4(tensor)))
            else:
                module.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
            del tensor


# ── one decoder layer ────────────────────────────────────────────────────────────────────────────────────────────────────


def random_layer(
    config, device: str = "cpu", dtype: torch.dtype = torch.float32, rank: int = 16, seed: int = 0
) -> nn.Module:
    """One decoder layer of a Llama of this shape, in NF4 with random weights, LoRA on all its linear layers."""
    from accelerate import init_empty_weights
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        layer = LlamaDecoderLayer(config, 0).to(dtype)
    fill(layer, device, dtype, seed)
    torch.manual_seed(seed)
    return add_adapters(layer, AdapterConfig(rank=rank)).train()


def layer_step(layer: nn.Module, config, length: int, seed: int = 0) -> float:
    """Forward and backward of one row of random hidden states through a layer, its activations computed again in backward.

    Returns the output's mean square, to look at; gradients stay on the adapters.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameter = next(p for p in layer.parameters() if not p.requires_grad)
    generator = torch.Generator(parameter.device).manual_seed(seed)
    place = {"device": parameter.device, "dtype": parameter.dtype}
    x = torch.randn(1, length, config.hidden_size, generator=generator, **place).requires_grad_()
    positions = torch.arange(length, device=parameter.device)[None]
    rotation = LlamaRotaryEmbedding(config).to(parameter.device)(x, positions)

    def forward(hidden: Tensor) -> Tensor:
        return layer(hidden, position_embeddings=rotation, position_ids=positions)

    out = checkpoint(forward, x, use_reentrant=False)
    loss = out.float().square().mean()
    loss.backward()
    return loss.item()


def plan_layer(
    config, length: int, dtype: torch.dtype = torch.float32, rank: int = 16, device: str = "cpu"
) -> MemoryPlan:
    """The plan of `layer_step`: that of a model of one such layer, without embeddings, head, optimizer and CUDA context."""
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    settings = {
        "length": length,
        "completion": 1,
        "rank": rank,
        "dtype": dtype,
        "moments": 0,
        "device": device,
    }
    plan = plan_training(one, "qlora", **settings)
    left_out = {EMBEDDINGS, LOGITS, MOMENTS, CONTEXT}
    terms = {name: size for name, size in plan.terms.items() if name not in left_out}
    return MemoryPlan(terms, plan.peak - plan.terms[EMBEDDINGS] - plan.terms[CONTEXT], plan.settings)


def measure_layer(config, length: int) -> dict[str, float]:
    """Make one layer of this shape in fp32 on the CPU and take it through `layer_step`, in a process of its own.

    In a process that has computed before, what that left in the heap is filled first, and what is needed looks like more.

    Returns:
        "weights", how many; in bytes "in 4 bits", "layer" (all its tensors), "making" (the peak while it was made), and
        "counted" and "process" (the step's peak as `Allocated` and the system see it, the layer included); "seconds making",
        "seconds a step".
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(_layer_figures, config, length).result()


def _layer_figures(config, length: int) -> dict[str, float]:
    free_at_once()
    small = giant_config(1, "SmolLM2-135M")
    layer_step(random_layer(small), small, 16)  # libraries load and make their workspaces
    started = time.perf_counter()
    with measure("cpu", anonymous=True) as making:
        layer = random_layer(config)
    made = time.perf_counter()
    quantized = [module.weight for module in layer.modules() if isinstance(module, NF4Linear)]
    own = sum({id(t): t.nbytes for t in (*layer.parameters(), *layer.buffers())}.values())
    begun = time.perf_counter()
    with measure("cpu") as process, Allocated() as counted:
        layer_step(layer, config, length)
    return {
        "weights": sum(weight.numel() for weight in quantized),
        "in 4 bits": sum(weight.nbytes for weight in quantized),
        "layer": own,
        "making": making.extra,
        "counted": own + counted.peak,
        "process": own + process.extra,
        "seconds making": made - started,
        "seconds a step": time.perf_counter() - begun,
    }


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors made inside a `with` block that are alive, and the most at once; a view adds nothing."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = _storages((args, kwargs)).keys()
        for key, storage in _storages(result).items():
            if key not in self._alive and key not in given:
                self._alive.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


# ── the whole model ──────────────────────────────────────────────────────────────────────────────────────────────────────


def measure_run(
    config,
    device: str,
    lengths: Sequence[int],
    steps: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 16,
) -> dict[str, Any]:
    """QLoRA steps on a model of this shape, batch 1 and checkpointing: peak bytes, seconds a step, tokens a second.

    Args:
        config: a transformers config.
        lengths: tokens a row, each measured by itself.
        steps: optimizer steps of each; the first, which warms up, has no part in the median.
    """
    started = time.perf_counter()
    with measure(device) as making:
        model = random_nf4_model(config, device, dtype)
    seconds = {"making the model": time.perf_counter() - started}
    torch.manual_seed(0)
    add_adapters(model, AdapterConfig(rank=rank))
    model.activation_checkpointing_enable()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    runs = []
    for length in lengths:
        ids = torch.randint(
            config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length)
        ).to(device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        times, losses = [], []
        with measure(device) as memory:
            for _ in range(steps):
                with _timed(times, device):
                    total, count = sft_loss(model, batch)
                    (total / count).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                losses.append((total / count).item())
        plan = plan_training(
            config, "qlora", length=length, dtype=dtype, rank=rank, device=torch.device(device).type
        )
        runs.append(
            {
                "length": length,
                "peak bytes": memory.peak,
                "planned peak bytes": plan.peak,
                "planned terms": plan.terms,
                "seconds a step": median(times[1:] or times),
                "tokens a second": length / median(times[1:] or times),
                "losses": losses,
            }
        )
        print(
            f"{length} tokens: {memory.peak / 1e9:.1f} GB, {runs[-1]['seconds a step']:.2f} s a step",
            flush=True,
        )
    return {
        "parameters": _count(model),
        "trained": sum(p.numel() for p in trained),
        "peak bytes while making": making.peak,
        "seconds": seconds,
        "runs": runs,
    }


def _count(model: nn.Module) -> int:
    dense = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return dense + sum(module.weight.numel() for module in model.modules() if isinstance(module, NF4Linear))


@contextmanager
def _timed(times: list[float], device: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - started)


def stored() -> list[dict[str, Any]]:
    """What was measured on GPUs so far, newest last; empty where nothing was."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in MEASURED.glob("*.json")]
    return sorted(found, key=lambda one: one["date"])


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and store."""
    parser = argparse.ArgumentParser(
        prog="python -m spark_ft.lab.true_size", description="QLoRA at true size, random weights."
    )
    parser.add_argument("--model", default="Llama-3.3-70B", help="a known shape (see spark-ft plan --help)")
    parser.add_argument("--layers", type=int, default=80, help="decoder layers (80)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens a row (512 2048)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps for each length (4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, help="where to write; default data/measurements/gpu/, on a GPU only"
    )
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), torch.bfloat16 if options.device != "cpu" else torch.float32
    config = giant_config(options.layers, options.model)
    result = {
        "what": f"{options.model}, {options.layers} layers, random weights, NF4, LoRA r16 on all linear layers, AdamW, "
        "checkpointing, batch 1",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "device bytes": torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else None,
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("spark-ft", "torch", "transformers")},
        "settings": {
            "layers": options.layers,
            "steps": options.steps,
            "dtype": str(dtype),
            "adapters": "float32",
        },
        **measure_run(config, options.device, options.lengths, options.steps, dtype),
    }
    text = json.dumps(result, indent=1) + "\n"
    name = f"{options.model}-{options.layers}-layers-{result['device'].replace(' ', '-')}.json"
    path = options.out or (MEASURED / name if device.type == "cuda" else None)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
