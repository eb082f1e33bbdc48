"""Side by side with PEFT and TRL, in one run: `spark-ft bench`.

A row builds the same step twice, ours and theirs, on the same weights and the same data. Before anything is timed, both
sides' loss and gradient must be equal. Then the sides take turns, and what is reported is the median of the pairwise
ratios: whatever slows the machine for a while slows both halves of a pair. Memory is measured in a process of its own.
One row trains nothing: it reads records, and what must be equal first are the rows. A later row is one more `Row` in ROWS.
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from spark_ft.adapters import AdapterConfig, adapted_layers, add_adapters
from spark_ft.data.batches import collate_sft
from spark_ft.data.chat import IGNORE, render
from spark_ft.data.records import iter_records, read_records, write_records
from spark_ft.embedded import embedded_folder
from spark_ft.files import ROOT, write_atomically
from spark_ft.memory.machine import measure
from spark_ft.messages import quiet_known_messages
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import quantize_nf4
from spark_ft.models import load_model, load_tokenizer
from spark_ft.scoring import packed_row, sft_loss

TOLERANCE = 1e-5  # largest relative difference of the loss, fp32
# … and of the gradient: torch's softmax on CPU, which our head and transformers' loss use, is coarser than TRL's head, which
# exponentiates by itself; measured against fp64, 4e-5 and 4e-6 off with random adapters.
GRADIENT_TOLERANCE = 1e-4
Gemms = dict[tuple[int, int, int], int]  # (rows, in, out) of x Wᵀ → how often a step computes it


@dataclass(frozen=True)
class Side:
    """One library's version of a step.

    Args:
        step: the step, as it is timed.
        loss_and_gradient: (loss, gradient by parameter name), computed without changing any weight.
    """

    step: Callable[[], object]
    loss_and_gradient: Callable[[], tuple[float, dict[str, Tensor]]]


@dataclass(frozen=True)
class Row:
    """What is compared.

    Args:
        name: what it is called on the command line.
        says: what one step is, in a few words.
        ours, theirs: module-level functions (another process imports them by name) that build a side, the same each time.
        work: floating-point operations of one step, and its matrix products' shapes, called after ours is built.
        repeats: steps in one timing, for steps that are too short to time alone.
        records: rows that one step reads, where it reads and does not train.
    """

    name: str
    says: str
    ours: Callable[[], Side]
    theirs: Callable[[], Side]
    work: Callable[[], tuple[int, Gemms]]
    repeats: int = 1
    records: int = 0


@dataclass(frozen=True)
class Result:
    """What was measured; `seconds` are of one step, `order` is the order in which the sides were timed."""

    row: str
    says: str
    ours_seconds: list[float]
    theirs_seconds: list[float]
    order: str
    loss_difference: float
    gradient_difference: float
    ours_extra_bytes: int
    theirs_extra_bytes: int
    step_flops: int
    gemm_gflops: float
    records: int = 0

    @property
    def ratios(self) -> list[float]:
        """theirs / ours of each pair: 2 means that ours took half the time."""
        return [theirs / ours for ours, theirs in zip(self.ours_seconds, self.theirs_seconds, strict=True)]

    @property
    def gflops(self) -> float:
        """What our step reaches, at its median time."""
        return self.step_flops / median(self.ours_seconds) / 1e9


# ── the harness ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def compare(row: Row, pairs: int = 7) -> Result:
    """Check that both sides compute the same, then time them in turns, then measure each one's memory.

    Raises:
        ValueError: the sides' losses or gradients differ by more than is rounding; says which and by how much.
    """
    ours, theirs = row.ours(), row.theirs()
    loss_difference, gradient_difference = check_equal(row.name, ours, theirs)
    flops, gemms = row.work()
    rate = GemmRate(gemms)
    for side in (ours, theirs, ours, theirs):  # warm-up: allocator, thread pools, optimizer state
        side.step()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    order = ""
    for _ in range(pairs):
        for name, side in (("ours", ours), ("theirs", theirs)):
            seconds[name].append(_seconds(side.step, row.repeats))
            order += name[0]
        rate.sample()
    del ours, theirs, side
    gc.collect()
    extra = [peak_extra_bytes(build) for build in (row.ours, row.theirs)]
    return Result(
        row.name,
        row.says,
        seconds["ours"],
        seconds["theirs"],
        order,
        loss_difference,
        gradient_difference,
        *extra,
        flops,
        rate.gflops,
        row.records,
    )


def check_equal(name: str, ours: Side, theirs: Side) -> tuple[float, float]:
    """Relative differences of loss and of the whole gradient, ‖g − g'‖ / ‖g'‖.

    Raises:
        ValueError: either is above its tolerance or not a number, or the sides have gradients of different parameters.
    """
    (loss, gradient), (their_loss, their_gradient) = ours.loss_and_gradient(), theirs.loss_and_gradient()
    if gradient.keys() != their_gradient.keys():
        alone = sorted(gradient.keys() ^ their_gradient.keys())
        raise ValueError(f"{name}: only one side has a gradient of {', '.join(alone[:3])}; nothing was timed")
    loss_difference = abs(loss - their_loss) / abs(their_loss)
    if not loss_difference <= TOLERANCE:
        raise ValueError(
            f"{name}: the losses differ by {loss_difference:.1e} (ours {loss:.8g}, theirs {their_loss:.8g}; "
            f"at most {TOLERANCE:g}); nothing was timed"
        )
    apart = {key: (g.double() - their_gradient[key].double()).norm().item() for key, g in gradient.items()}
    whole = sum(g.double().norm().item() ** 2 for g in their_gradient.values()) ** 0.5
    difference = sum(d**2 for d in apart.values()) ** 0.5 / whole
    if not difference <= GRADIENT_TOLERANCE:
        raise ValueError(
            f"{name}: the gradients differ by {difference:.1e} (at most {GRADIENT_TOLERANCE:g}), most of all that of "
            f"{max(apart, key=apart.get)}; nothing was timed"
        )
    return loss_difference, difference


class GemmRate:
    """The machine's fp32 rate on a step's own matrix products: each shape's best of several runs, weighted as in the step."""

    def __init__(self, gemms: Gemms):
        self.gemms = gemms
        self.best = dict.fromkeys(gemms, float("inf"))

    def sample(self, runs: int = 3) -> None:
        device = _device()
        for rows, inner, out in self.gemms:
            x, w = torch.randn(rows, inner, device=device), torch.randn(out, inner, device=device)
            for _ in range(runs):
                seconds = _seconds(lambda x=x, w=w: x @ w.T, 1)
                self.best[rows, inner, out] = min(self.best[rows, inner, out], seconds)

    @property
    def gflops(self) -> float:
        flops = sum(2 * m * k * n * count for (m, k, n), count in self.gemms.items())
        return (
            flops / sum(self.best[shape] * count for shape, count in self.gemms.items()) / 1e9
            if flops
            else 0.0
        )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(step: Callable[[], object], repeats: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    _synchronize()
    return (time.perf_counter() - started) / repeats


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def peak_extra_bytes(build: Callable[[], Side], steps: int = 2) -> int:
    """Most memory that `steps` steps hold at once beyond what is resident once the side is built, in a fresh process.

    Gradients, optimizer state and whatever is kept for backward count; weights and libraries do not. On CPU it is
    resident memory; on CUDA, what torch allocates on the device.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start_process) as fresh:
        return fresh.submit(_peak_of_steps, build, steps, torch.get_num_threads()).result()


def _start_process() -> None:
    from transformers.utils import logging

    quiet_known_messages()
    logging.disable_progress_bar()


def _peak_of_steps(build: Callable[[], Side], steps: int, threads: int) -> int:
    torch.set_num_threads(threads)
    side = build()
    once = torch.randn(2048, 2048, device=_device(), requires_grad=True)
    (
        once @ once
    ).sum().backward()  # libraries make their workspaces at the first matrix product and keep them
    del once
    with measure() as memory:
        for _ in range(steps):
            side.step()
    return memory.extra


# ── counting a step's work ───────────────────────────────────────────────────────────────────────────────────────────────


def step_flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Floating-point operations that one SFT step on this batch needs, in its linear layers and its head.

        2·N·in·out   for each linear layer forward, and again for its input's gradient; once more where the layer trains
        6·N·r·(in + out)   for each adapter: forward, gradient of its input, gradients of A and B
        4·M·V·H      for the head: logits, and their gradient with respect to the hidden states

    N is the number of tokens that the step computes and M that of completion tokens: padding, copies of a common beginning,
    and prompt rows in the head, are not computed.
    Attention's scores, element-wise work and whatever is computed twice are left out, so a rate made from it is modest.
    """
    tokens, rows = _computed_tokens(model, batch), _completion_tokens(batch)
    head = model.get_output_embeddings()
    total = 0
    for module in model.modules():
        if isinstance(module, LoRALinear):
            total += 6 * tokens * module.rank * (module.in_features + module.out_features)
        elif isinstance(module, nn.Linear):
            passes = 3 if module.weight.requires_grad else 2
            total += passes * 2 * module.weight.numel() * (rows if module is head else tokens)
    return total


def step_gemms(model: nn.Module, batch: dict[str, Tensor]) -> Gemms:
    """The shapes of the model's linear layers at this batch's size, and how often each occurs."""
    tokens, gemms = _computed_tokens(model, batch), {}
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            rows = _completion_tokens(batch) if module is head else tokens
            shape = (rows, module.in_features, module.out_features)
            gemms[shape] = gemms.get(shape, 0) + 1
    return gemms


def _computed_tokens(model: nn.Module, batch: dict[str, Tensor]) -> int:
    row = packed_row(model, batch)
    return row.ids.numel() if row else int(batch["attention_mask"].sum())


def _completion_tokens(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORE).sum())


# ── rows: one SFT step against TRL's SFTTrainer with PEFT ────────────────────────────────────────────────────────────────
# Both sides get our token ids. Left to itself TRL would also score the newline that the template writes after the answer's
# last token; a dataset that brings `input_ids` and `completion_mask` is taken as it is, and scores what ours does.

SFT_ROWS, SFT_RANK, SFT_RATE, SFT_LENGTH, SFT_CLIP = 8, 16, 1e-4, 512, 1.0
DROPOUT = 0.05


def _sft_model(quantized: bool = False):
    if quantized:
        model, tokenizer = load_model(four_bit_folder(), dtype=torch.float32)
    else:
        model, tokenizer = load_model(dtype=torch.float32)
    for parameter in model.parameters():
        parameter.sum()  # weights are mapped from disk: read them now, or the first step's memory would count them
    return model, tokenizer, _sft_records()


def _sft_records() -> list[dict]:
    return read_records(ROOT / "data/kitchen_tickets/train.jsonl", "sft")[:SFT_ROWS]


@lru_cache
def four_bit_folder() -> Path:
    """The embedded model as bitsandbytes quantizes it, saved: both sides then start from the same bytes."""
    model, tokenizer = bitsandbytes_model(embedded_folder())
    folder = Path(tempfile.mkdtemp(prefix="spark-ft-bench-"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weakref.finalize(four_bit_folder, shutil.rmtree, folder)
    return folder


def bitsandbytes_model(folder: Path):
    """The model in a folder and its tokenizer; bitsandbytes quantizes it to NF4 unless it is. Computes in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    told = (
        {}
        if hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
        else {"quantization_config": settings}
    )
    model = AutoModelForCausalLM.from_pretrained(folder, **told, dtype=torch.float32)
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = (
                False  # else an eval forward repacks its weights, and gradients go wrong
            )
    return model, load_tokenizer(folder)


def _fill_adapters(parameters: dict[str, Tensor]) -> None:
    """The same values on both sides, B not zero: at its usual start every gradient of A is zero, and hides mistakes.

    DoRA's magnitudes stay as they are, the lengths of the rows.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(parameters):
            if "magnitude" not in name:
                parameters[name].copy_(0.02 * torch.randn(parameters[name].shape, generator=generator))


def _gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the gradients off the parameters."""
    taken = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    return taken


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Two libraries draw their masks in different orders, so the sides are compared without, and timed with them."""
    layers = [(m, "dropout") for m in model.modules() if isinstance(m, LoRALinear)]
    layers += [(m, "p") for m in model.modules() if isinstance(m, nn.Dropout)]
    before = [getattr(*layer) for layer in layers]
    for layer, name in layers:
        setattr(layer, name, 0.0)
    try:
        yield
    finally:
        for (layer, name), value in zip(layers, before, strict=True):
            setattr(layer, name, value)


def _our_step(
    model: nn.Module, tokenizer, records: list[dict], compared: Callable[[str], bool] = lambda name: True
) -> Side:
    """The step of `train` on a model with adapters, ours or not."""
    parameters = {_our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    batch = {
        key: value.to(model.device) for key, value in collate_sft(records, tokenizer, SFT_LENGTH).items()
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=SFT_RATE, weight_decay=0.0, fused=True)

    def backward() -> float:  # as `train` does it: the sum's gradient, then divided by the count
        loss, count = sft_loss(model, batch)
        loss.backward()
        for p in parameters.values():
            p.grad /= count
        return loss.item() / count

    def step() -> None:
        backward()
        nn.utils.clip_grad_norm_(parameters.values(), SFT_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def loss_and_gradient() -> tuple[float, dict[str, Tensor]]:
        with _without_dropout(model):
            return backward(), {name: g for name, g in _gradients(parameters).items() if compared(name)}

    return Side(step, loss_and_gradient)


def _sft_ours(method: str = "lora", dropout: float = 0.0, quantized: bool = False) -> Side:
    model, tokenizer, records = _sft_model(quantized)
    add_adapters(model, AdapterConfig(method, rank=SFT_RANK, dropout=dropout)).train()
    _fill_adapters({name: p for name, p in model.named_parameters() if p.requires_grad})
    return _our_step(model, tokenizer, records)


def _lora_config(method: str, dropout: float):
    from peft import LoraConfig

    return LoraConfig(
        r=SFT_RANK,
        lora_alpha=32,
        lora_dropout=dropout,
        target_modules="all-linear",
        use_dora=method == "dora",
        task_type="CAUSAL_LM",
    )


def _sft_theirs(method: str = "lora", dropout: float = 0.0, quantized: bool = False) -> Side:
    import datasets
    from trl import SFTConfig, SFTTrainer

    if quantized:
        (model, tokenizer), records = bitsandbytes_model(four_bit_folder()), _sft_records()
    else:
        model, tokenizer, records = _sft_model()
        model.set_attn_implementation("sdpa")  # transformers' own, which ours replaces
    dataset = datasets.Dataset.from_list(
        [
            {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}
            for prompt, completion in (render(record, tokenizer) for record in records)
        ]
    )
    datasets.disable_progress_bars()
    config = SFTConfig(
        output_dir=tempfile.gettempdir(),  # nothing is written: no step of `trainer.train()` is taken
        bf16=False,
        activation_checkpointing=False,  # the new name of gradient_checkpointing
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        completion_only_loss=True,
        packing=False,
        max_length=SFT_LENGTH,
        per_device_train_batch_size=SFT_ROWS,
        learning_rate=SFT_RATE,
        max_grad_norm=SFT_CLIP,
        dataloader_pin_memory=False,
    )
    lora = _lora_config(method, dropout)
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    parameters = {_our_name(name): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    for p in parameters.values():
        p.data = p.data.float()  # on a 4-bit model TRL makes adapters bf16
    _fill_adapters(parameters)
    batch = next(iter(trainer.get_train_dataloader()))
    if _scored(batch) != _scored(collate_sft(records, tokenizer, SFT_LENGTH)):
        raise ValueError("sft-step: TRL's batch scores other tokens than ours; nothing was timed")
    trainer.current_gradient_accumulation_steps = 1  # as `trainer.train()` sets it
    optimizer = trainer.create_optimizer()

    def backward() -> float:
        return trainer.training_step(trainer.model, dict(batch)).item()

    def step() -> None:
        backward()
        trainer.accelerator.clip_grad_norm_(parameters.values(), SFT_CLIP)
        optimizer.step()
        optimizer.zero_grad()

    def loss_and_gradient() -> tuple[float, dict[str, Tensor]]:
        with _without_dropout(trainer.model):
            return backward(), _gradients(parameters)

    return Side(step, loss_and_gradient)


def _our_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "magnitude")
    return name.removesuffix(".weight").removesuffix(".default")


def _scored(batch: dict[str, Tensor]) -> list:
    """Each row's real tokens and labels, in an order of its own: a batch's rows may be shuffled."""
    rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
    return sorted((ids[real].tolist(), labels[real].tolist()) for ids, labels, real in rows)


def _sft_work() -> tuple[int, Gemms]:
    model, tokenizer, records = _sft_model()
    batch = collate_sft(records, tokenizer, SFT_LENGTH)
    add_adapters(model, AdapterConfig(rank=SFT_RANK))
    return step_flops(model, batch), step_gemms(model, batch)


# ── rows: what DoRA costs: PEFT's layers under our step, and our own LoRA ────────────────────────────────────────────────


def _peft_layers(dropout: float = 0.0) -> Side:
    """Our step, packed rows and all, with PEFT's DoRA layers in the place of ours."""
    from peft import inject_adapter_in_model

    model, tokenizer, records = _sft_model()
    inject_adapter_in_model(_lora_config("dora", dropout), model).train()
    _fill_adapters({_our_name(name): p for name, p in model.named_parameters() if p.requires_grad})
    return _our_step(model, tokenizer, records)


def _at_rest(name: str) -> bool:
    return not name.endswith("magnitude")


def _dora_as_lora() -> Side:
    """DoRA with each magnitude at its norm, where it computes what LoRA does, and A and B have the same gradients."""
    model, tokenizer, records = _sft_model()
    add_adapters(model, AdapterConfig("dora", rank=SFT_RANK)).train()
    _fill_adapters({name: p for name, p in model.named_parameters() if p.requires_grad})
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.magnitude.copy_(layer.norm())
    return _our_step(model, tokenizer, records, compared=_at_rest)


# ── rows: one LoRA layer against PEFT's ──────────────────────────────────────────────────────────────────────────────────

LAYER_TOKENS, LAYER_RANK = 1024, 16


def _layer_input(in_features: int, out_features: int) -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(in_features, out_features, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / in_features**0.5)
    x = torch.randn(LAYER_TOKENS, in_features, generator=generator)
    return layer.to(_device()), x.to(_device()).requires_grad_()


def _layer_side(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Side:
    _fill_adapters(parameters)
    parameters = {**parameters, "x": x}

    def loss_and_gradient() -> tuple[float, dict[str, Tensor]]:
        y = layer(x)
        y.backward(y.detach())  # the loss is ½‖y‖², whose gradient is y
        return 0.5 * y.detach().double().square().sum().item(), _gradients(parameters)

    def step() -> None:
        y = layer(x)
        y.backward(y.detach())
        _gradients(parameters)

    return Side(step, loss_and_gradient)


def _layer_ours(in_features: int, out_features: int) -> Side:
    base, x = _layer_input(in_features, out_features)
    layer = LoRALinear(base, LAYER_RANK)
    return _layer_side(layer, {"lora_A": layer.lora_A, "lora_B": layer.lora_B}, x)


def _layer_theirs(in_features: int, out_features: int) -> Side:
    from peft import LoraConfig, inject_adapter_in_model

    base, x = _layer_input(in_features, out_features)
    config = LoraConfig(r=LAYER_RANK, lora_alpha=32, lora_dropout=0.0, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(base))[0].train()
    return _layer_side(
        layer, {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}, x
    )


def _layer_work(in_features: int, out_features: int) -> tuple[int, Gemms]:
    base, adapter = in_features * out_features, LAYER_RANK * (in_features + out_features)
    return LAYER_TOKENS * (4 * base + 6 * adapter), {(LAYER_TOKENS, in_features, out_features): 1}


# ── row: an NF4 weight dequantized ───────────────────────────────────────────────────────────────────────────────────────

NF4_SHAPE = (
    512,
    8192,
)  # as many numbers as a product unpacks at a time; more would time the system's fresh pages


def _nf4_weight() -> Tensor:
    return torch.randn(NF4_SHAPE, generator=torch.Generator().manual_seed(2)).to(_device())


def _dequantizing(dequantize: Callable[[], Tensor]) -> Side:
    return Side(dequantize, lambda: ((w := dequantize()).double().abs().sum().item(), {"weight": w}))


def _nf4_ours() -> Side:
    return _dequantizing(quantize_nf4(_nf4_weight(), double_quant=False).dequantize)


def _nf4_theirs() -> Side:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(_nf4_weight(), blocksize=64, compress_statistics=False, quant_type="nf4")
    return _dequantizing(lambda: dequantize_4bit(packed, state))


# ── row: a million records read one by one, each checked, against `datasets` ────────────────────────────────────────────
# Theirs streams the same file and checks no field. The "loss" is the number of rows and the "gradient" the bytes of their
# SHA-256, so that a single row that differs stops the bench.

READ_ROWS = 1_000_000


def _reading(open_rows: Callable[[Path], Callable[[], Iterator[dict]]], count: int) -> Side:
    folder = Path(tempfile.mkdtemp(prefix="spark-ft-bench-"))
    path = folder / "rows.jsonl"
    ticket = '{"table":%d,"items":[{"qty":2,"dish":"leek soup","how":"medium","no":"cream"}]}'
    made = (
        {
            "prompt": f"Kitchen ticket as JSON:\nOrder {i}: two leek soups, medium, no cream.",
            "completion": ticket % (i % 40),
        }
        for i in range(count)
    )
    write_records(path, made)
    rows = open_rows(path)

    def step() -> int:
        return sum(1 for _ in rows())

    def count_and_digest() -> tuple[float, dict[str, Tensor]]:
        number, digest = 0, hashlib.sha256()
        for row in rows():
            number += 1
            digest.update(json.dumps(row, sort_keys=True).encode())
        return float(number), {"the rows": torch.tensor([*digest.digest()], dtype=torch.float64)}

    weakref.finalize(step, shutil.rmtree, folder)
    return Side(step, count_and_digest)


def _read_ours(count: int = READ_ROWS) -> Side:
    return _reading(lambda path: lambda: iter_records(path, "sft"), count)


def _read_theirs(count: int = READ_ROWS) -> Side:
    from datasets import load_dataset

    return _reading(
        lambda path: load_dataset("json", data_files=str(path), split="train", streaming=True).__iter__, count
    )


_TICKETS = f"one SFT step, {SFT_ROWS} kitchen tickets"
_LAYER = f"{LAYER_TOKENS} tokens, forward and backward; theirs PEFT"


def _no_products() -> tuple[int, Gemms]:
    return 0, {}


ROWS = {
    row.name: row
    for row in (
        Row(
            "sft-step",
            f"{_TICKETS}, LoRA r{SFT_RANK} on all linear layers, AdamW; theirs SFTTrainer + PEFT",
            _sft_ours,
            _sft_theirs,
            _sft_work,
        ),
        Row(
            "dora-step",
            "the same step with DoRA; theirs SFTTrainer + PEFT",
            partial(_sft_ours, "dora"),
            partial(_sft_theirs, "dora"),
            _sft_work,
        ),
        Row(
            "dora-dropout",
            f"the same with dropout {DROPOUT}, compared without it",
            partial(_sft_ours, "dora", DROPOUT),
            partial(_sft_theirs, "dora", DROPOUT),
            _no_products,
        ),
        Row(
            "dora-layers",
            "our step with DoRA; theirs the same step with PEFT's DoRA layers in it",
            partial(_sft_ours, "dora"),
            _peft_layers,
            _sft_work,
        ),
        Row(
            "dora-layers-dropout",
            f"the same with dropout {DROPOUT}, compared without it",
            partial(_sft_ours, "dora", DROPOUT),
            partial(_peft_layers, DROPOUT),
            _no_products,
        ),
        Row(
            "dora-over-lora",
            "our step with DoRA; «theirs» our own with LoRA",
            _dora_as_lora,
            _sft_ours,
            _sft_work,
        ),
        Row(
            "qlora-step",
            f"{_TICKETS}, LoRA r{SFT_RANK} on NF4 layers; theirs SFTTrainer + PEFT + bitsandbytes, from the same bytes",
            partial(_sft_ours, quantized=True),
            partial(_sft_theirs, quantized=True),
            _sft_work,
        ),
        Row(
            "lora-layer",
            f"one LoRA r{LAYER_RANK} layer 576→1536, {_LAYER}",
            partial(_layer_ours, 576, 1536),
            partial(_layer_theirs, 576, 1536),
            partial(_layer_work, 576, 1536),
            repeats=20,
        ),
        Row(
            "lora-layer-2048",
            f"one LoRA r{LAYER_RANK} layer 2048→2048, {_LAYER}",
            partial(_layer_ours, 2048, 2048),
            partial(_layer_theirs, 2048, 2048),
            partial(_layer_work, 2048, 2048),
            repeats=10,
        ),
        Row(
            "nf4-dequantize",
            f"an NF4 weight of {NF4_SHAPE[0]}×{NF4_SHAPE[1]} to fp32; theirs bitsandbytes",
            _nf4_ours,
            _nf4_theirs,
            _no_products,
            repeats=20,
        ),
        Row(
            "read-records",
            f"{READ_ROWS:,} rows of a JSONL file read one by one, each checked; theirs datasets, streaming, which checks none",
            _read_ours,
            _read_theirs,
            _no_products,
            records=READ_ROWS,
        ),
    )
}


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def machine() -> dict[str, object]:
    """Where, when and with what a measurement was taken."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "datasets")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def table(results: Sequence[Result], where: dict[str, object]) -> str:
    """A Markdown table of the results, what each row is, and where they were measured."""
    head = ("row", "ours", "theirs", "theirs / ours (range)")
    head += ("extra memory: ours", "theirs", "theirs / ours", "ours, GFLOP/s", "of the GEMM rate")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for r in results:
        cells = (
            r.row,
            _time(median(r.ours_seconds)),
            _time(median(r.theirs_seconds)),
            f"**{median(r.ratios):.2f}** ({min(r.ratios):.2f}–{max(r.ratios):.2f})",
            _megabytes(r.ours_extra_bytes),
            _megabytes(r.theirs_extra_bytes),
            f"**{r.theirs_extra_bytes / r.ours_extra_bytes:.2f}**" if r.ours_extra_bytes > 1e6 else "–",
            f"{r.gflops:.0f}" if r.step_flops else "–",
            f"{r.gflops / r.gemm_gflops:.0%} of {r.gemm_gflops:.0f}" if r.step_flops else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {r.row}: {r.says}. {_equality(r)}; {len(r.ratios)} pairs." for r in results)]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines.append(
        f"\n{where['device']}, {where['cores']} cores, {where['threads']} threads, load {where['load_average']} at the start, "
        f"fp32, {versions}, {where['date']}. MB = 10⁶ bytes."
    )
    return "\n".join(lines)


def _equality(r: Result) -> str:
    if r.records:
        rates = (r.records / median(seconds) for seconds in (r.ours_seconds, r.theirs_seconds))
        return "Equal first: every row; ours {:,.0f} rows a second, theirs {:,.0f}".format(*rates)
    return f"Equal first: loss to {r.loss_difference:.0e}, gradient to {r.gradient_difference:.0e}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def main(arguments: list[str] | None = None) -> int:
    """Measure the rows, print the table, and write the measurements where `--json` says."""
    parser = argparse.ArgumentParser(
        prog="spark-ft bench",
        description="Time and memory of a step beside PEFT's, TRL's or datasets', after checking that both do the same.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows:\n" + "\n".join(f"  {row.name:<16} {row.says}" for row in ROWS.values()),
    )
    parser.add_argument("rows", nargs="*", metavar="row", help="which rows; default all")
    parser.add_argument("--pairs", type=int, default=7, help="how often each side is timed (default 7)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every single measurement here")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f'no row is called "{unknown[0]}"; there are {", ".join(ROWS)}')
    if options.pairs < 1:
        parser.error(f"--pairs is {options.pairs}; at least one pair is needed")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}; make it first")
    _start_process()
    where, results = machine(), []
    for name in options.rows or ROWS:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            results.append(compare(ROWS[name], options.pairs))
        except ValueError as error:
            print(f"spark-ft bench: {error}", file=sys.stderr)
            return 1
    print(table(results, where))
    if options.json:
        text = json.dumps({**where, "rows": [asdict(r) for r in results]}, indent=1) + "\n"
        write_atomically(options.json, lambda path: path.write_text(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
