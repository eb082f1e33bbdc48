"""A model of true size with random weights: a step's memory and time depend on their number alone.

    python -m spark_ft.lab.true_size                           Llama-3.3-70B, all 80 layers, in NF4, LoRA r16,
                                                               rows of 512 and 2048 tokens
    python -m spark_ft.lab.true_size --layers 2 --lengths 512
    python -m spark_ft.lab.true_size --model Llama-3.1-8B --method lora --task preference

Every weight is drawn and quantized on the device, one tensor at a time. On an 80 GB card it takes a minute
or two and writes `data/measurements/gpu/NAME.json`, with device, date, versions and settings.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.experts import nf4_names, put_nf4
from spark_ft.files import ROOT, write_atomically
from spark_ft.memory.machine import Machine, free_at_once, measure
from spark_ft.memory.plan import (
    METHODS,
    TASKS,
    MemoryPlan,
    adapt,
    loss_of,
    plan_step,
    plan_training,
    rows_of,
)
from spark_ft.memory.shapes import known_config
from spark_ft.memory.trace import MOMENTS, Batch, Loss, kinds_of
from spark_ft.methods.nf4 import NF4Linear
from spark_ft.version import __version__

MEASURED = ROOT / "data" / "measurements" / "gpu"


def giant_config(layers: int | None, name: str = "Llama-3.3-70B"):
    """A well-known model's own shape, with so many of its layers; None: all."""
    config = known_config(name)
    if layers is not None:
        config.num_hidden_layers = layers
    return config


def random_model(config, device: str, dtype: torch.dtype, quantize: bool = True, seed: int = 0):
    """A causal language model with random weights in training mode, frozen, in NF4 as `load_model` makes it
    or, without `quantize`, in `dtype` alone.

    Never more than the model and one tensor in full precision is in memory.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model, device, seed, quantized=nf4_names(model) if quantize else ())
    model.tie_weights()
    return model.to(device).train()


def fill(model: nn.Module, device: str, seed: int, quantized: Sequence[str]) -> None:
    """Draw every parameter of a model on the meta device, one at a time; those in `quantized` go into NF4."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 1:  # a norm's
            tensor = torch.ones(parameter.shape, device=device, dtype=parameter.dtype)
        else:
            place = {"device": device, "dtype": parameter.dtype}
            tensor = torch.randn(parameter.shape, generator=generator, **place).mul_(0.02)
        if name in quantized:
            put_nf4(model, name, tensor)
        else:
            owner, _, part = name.rpartition(".")
            plain = nn.Parameter(tensor, requires_grad=False)
            model.get_submodule(owner).register_parameter(part, plain)
        del tensor, parameter


# ── one decoder layer ──────────────────────────────────────────────────────────────────────────────────────


def random_layer(
    config, device: str = "cpu", dtype: torch.dtype = torch.float32, rank: int = 16, seed: int = 0
) -> nn.Module:
    """One decoder layer of a Llama of this shape, in NF4 with random weights, LoRA on its linear layers.

    On the meta device it has sizes and no weights.
    """
    from accelerate import init_empty_weights
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        layer = LlamaDecoderLayer(config, 0).to(dtype)
    linear = [f"{name}.weight" for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    if device == "meta":
        for name in linear:
            put_nf4(layer, name)
    else:
        fill(layer, device, seed, linear)
    torch.manual_seed(seed)
    return add_adapters(layer, AdapterConfig(rank=rank)).train()


def layer_loss(layer: nn.Module, config, length: int, seed: int = 0) -> Tensor:
    """Mean square of what a layer makes of one row of random hidden states; its activations are not kept for
    backward."""
    from torch.utils.checkpoint import checkpoint
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameter = next(p for p in layer.parameters() if not p.requires_grad)
    place = {"device": parameter.device, "dtype": parameter.dtype}
    torch.manual_seed(seed)
    x = torch.randn(1, length, config.hidden_size, **place).requires_grad_()
    positions = torch.arange(length, device=parameter.device)[None]
    rotation = LlamaRotaryEmbedding(config).to(parameter.device)(x, positions)

    def forward(hidden: Tensor) -> Tensor:
        return layer(hidden, position_embeddings=rotation, position_ids=positions)

    return checkpoint(forward, x, use_reentrant=False).float().square().mean()


def layer_step(layer: nn.Module, config, length: int) -> float:
    """Forward and backward of `layer_loss`; returns it, and leaves gradients on the adapters."""
    loss = layer_loss(layer, config, length)
    loss.backward()
    return loss.item()


def plan_layer(config, length: int, dtype: torch.dtype = torch.float32, rank: int = 16) -> MemoryPlan:
    """The plan of `layer_step`, which has no optimizer."""
    layer = random_layer(config, "meta", dtype, rank)
    plan = plan_step(layer, {"row": torch.zeros(1)}, lambda layer, _: (layer_loss(layer, config, length), 1))
    return dataclasses.replace(plan, terms={name: n for name, n in plan.terms.items() if name != MOMENTS})


def measure_layer(config, length: int) -> dict[str, float]:
    """Make one layer of this shape in fp32 on the CPU and take it through `layer_step`, in a process of its
    own.

    In a process that has computed before, what that left in the heap is filled first, and what is needed
    looks like more. There, large tensors come in pages of 2 MiB where the system has them: it is faster.

    Returns:
        "weights", how many; in bytes "in 4 bits", "layer" (all its tensors), "making" (the peak of its
        tensors while it was made), and "counted" and "process" (the step's peak as the tracker and the system
        see it, the layer included); "seconds making", "seconds a step".
    """
    pages = patch.dict(os.environ, THP_MEM_ALLOC_ENABLE="1")  # read by torch when it is imported
    with pages, ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(_layer_figures, config, length).result()


def _layer_figures(config, length: int) -> dict[str, float]:
    small = giant_config(1, "SmolLM2-135M")
    layer_step(random_layer(small), small, 16)  # libraries load and make their workspaces
    started = time.perf_counter()
    with measure("cpu") as making:
        layer = random_layer(config)
    made = time.perf_counter()
    free_at_once()
    quantized = [module.weight for module in layer.modules() if isinstance(module, NF4Linear)]
    own = sum({id(t): t.nbytes for t in (*layer.parameters(), *layer.buffers())}.values())
    begun = time.perf_counter()
    with measure("cpu", process=True) as process, measure("cpu") as counted:
        layer_step(layer, config, length)
    return {
        "weights": sum(weight.numel() for weight in quantized),
        "in 4 bits": sum(weight.nbytes for weight in quantized),
        "layer": own,
        "making": making.peak,
        "counted": own + counted.extra,
        "process": own + process.extra,
        "seconds making": made - started,
        "seconds a step": time.perf_counter() - begun,
    }


# ── the whole model ─────────────────────────────────────────────────────────────────────────────────────────


def measure_run(
    config,
    device: str,
    lengths: Sequence[int],
    steps: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    method: str = "qlora",
    task: str = "sft",
    rank: int = 16,
) -> dict[str, Any]:
    """Training steps on a model of this shape, with checkpointing, beside their plan.

    Args:
        config: a transformers config.
        lengths: tokens a row, each measured by itself.
        steps: optimizer steps of each; the first, which warms up, has no part in the median.
        method, task: as in `plan_training`. A step takes one row; of "preference" one pair, half of each row
            the answer.

    Returns:
        For each length in "runs": "peak bytes" (on CUDA what torch allocated), on CUDA "reserved bytes" (what
        torch took from the device for it) and "context bytes" (what the process holds besides), the plan's
        peak and terms, "seconds a step", the plan's floor on this device, and the losses.
    """
    on_cuda = torch.device(device).type == "cuda"
    started = time.perf_counter()
    with measure(device) as making:
        model = random_model(config, device, dtype, quantize=method == "qlora")
    seconds, parameters = {"making the model": time.perf_counter() - started}, _count(model)
    torch.manual_seed(0)
    if method == "full":
        model.requires_grad_(True)
    else:
        adapt(model, method, rank)
    model.activation_checkpointing_enable()
    model.train()
    reference = (
        copy.deepcopy(model).requires_grad_(False).eval() if task != "sft" and method == "full" else None
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    # on a CPU only what a step makes is counted
    kept = [] if on_cuda else [tensor for lm in (model, reference) if lm for tensor, _ in kinds_of(lm)]
    held = sum(tensor.nbytes for tensor in kept)
    speed = machine_speed(device, dtype) if on_cuda else None
    runs = []
    for length in lengths:
        part = None if task == "sft" else length // 2
        batch = {name: x.to(device) for name, x in rows_of(task, 1, length, part).items()}
        loss = loss_of(task)
        if reference is not None:
            loss.reference.model = reference
        free_at_once()
        with measure(device) as memory:
            times, losses = _steps(model, optimizer, loss, batch, steps)
        where = {"dtype": dtype, "rank": rank, "device": torch.device(device).type}
        plan = plan_training(config, method, task=task, length=length, completion=part, **where)
        seconds_a_step = median(times[1:] or times)
        runs.append(
            {
                "length": length,
                "peak bytes": memory.peak + held,
                **(_of_gpu(plan, speed) if speed else {}),
                "planned peak bytes": plan.peak,
                "planned terms": plan.terms,
                "worst moment": plan.where,
                "seconds a step": seconds_a_step,
                "tokens a second": length / seconds_a_step,
                "losses": losses,
            }
        )
        took, planned = (f"{size / 1e9:.2f} GB" for size in (runs[-1]["peak bytes"], plan.peak))
        print(f"{length} tokens: {took}, planned {planned}, {seconds_a_step:.2f} s a step", flush=True)
    return {
        "parameters": parameters,
        "trained": sum(p.numel() for p in trained),
        "peak bytes while making": making.peak,
        "seconds": seconds,
        **({"device FLOP/s": speed.flops, "device bytes a second": speed.bandwidth} if speed else {}),
        "runs": runs,
    }


def _steps(model: nn.Module, optimizer, loss: Loss, batch: Batch, steps: int) -> tuple[list, list]:
    times: list[float] = []
    losses: list[float] = []
    for _ in range(steps):
        with _timed(times, model.device):
            total, count, *_ = loss(model, batch)
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append((total / count).item())
    return times, losses


def _of_gpu(plan: MemoryPlan, speed: Machine) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info()
    return {
        "reserved bytes": torch.cuda.max_memory_reserved(),
        "context bytes": total - free - torch.cuda.memory_reserved(),
        "floor seconds": plan.floor(speed),
    }


def machine_speed(device: str, dtype: torch.dtype = torch.bfloat16) -> Machine:
    """What a GPU reaches here: FLOP/s of a matrix product of 8,192 rows, columns and inner numbers, and the
    bytes a second that a copy reads and writes; each the best of ten."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def best(run) -> float:
        times: list[float] = []
        for _ in range(10):
            with _timed(times, device):
                run()
        return min(times)

    name = torch.cuda.get_device_name(device)
    return Machine(
        name, 2 * 8192**3 / best(lambda: a @ b), 2 * source.nbytes / best(lambda: target.copy_(source))
    )


def _count(model: nn.Module) -> int:
    dense = sum(p.numel() for p in model.parameters())
    return dense + sum(module.weight.numel() for module in model.modules() if isinstance(module, NF4Linear))


@contextmanager
def _timed(times: list[float], device: str | torch.device) -> Iterator[None]:
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
    parser.add_argument("--layers", type=int, help="decoder layers (all)")
    parser.add_argument("--method", choices=METHODS, default="qlora")
    parser.add_argument("--task", choices=TASKS, default="sft")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens a row (512 2048)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps for each length (4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, help="where to write; default data/measurements/gpu/, on a GPU only"
    )
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), torch.bfloat16 if options.device != "cpu" else torch.float32
    config = giant_config(options.layers, options.model)
    layers, method, task = config.num_hidden_layers, options.method, options.task
    result = {
        "what": f"{options.model}, {layers} layers, random weights, {method}, {task}, AdamW, checkpointing, "
        "one row (of preference one pair, of feedback one thumb) a step; adapters of rank 16, in fp32",
        "model": options.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "device bytes": torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else None,
        "date": datetime.date.today().isoformat(),
        "versions": {
            "spark_ft": __version__,
            **{name: version(name) for name in ("torch", "transformers")},
            "cuda": torch.version.cuda,
        },
        "settings": {
            "layers": layers,
            "steps": options.steps,
            "method": method,
            "task": task,
            "dtype": str(dtype),
        },
        **measure_run(config, options.device, options.lengths, options.steps, dtype, method, task),
    }
    text = json.dumps(result, indent=1) + "\n"
    name = f"{options.model}-{layers}-layers-{method}-{task}-{result['device'].replace(' ', '-')}.json"
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
