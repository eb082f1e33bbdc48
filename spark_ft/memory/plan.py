"""What a training step needs: the step itself, run on tensors that have a shape and no memory.

GB is 10⁹ bytes and GiB 2³⁰ bytes everywhere.
"""

import copy
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spark_ft.adapters import ALL_LINEAR, AdapterConfig, add_adapters
from spark_ft.data.chat import IGNORE
from spark_ft.experts import quantize_model
from spark_ft.memory.machine import GIB, Machine
from spark_ft.memory.trace import EXPERTS, KINDS, Batch, Loss, Trace, find_head_path, kinds_of, trace_step
from spark_ft.methods.nf4 import NF4Tensor
from spark_ft.methods.preference import dpo_loss, kto_loss
from spark_ft.preferences import feedback_loss, preference_loss
from spark_ft.scoring import sft_loss, takes_packed_rows, use_packed_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # of a mixture of experts, what adapters reach
METHODS, DEVICES = ("full", "lora", "dora", "qlora"), ("cuda", "cpu")
TASKS = ("sft", "preference", "feedback")
ANSWERS = {"preference": ("chosen", "rejected"), "feedback": ("completion", "mismatched")}


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step needs at its worst moment, term by term; `print(plan)` shows it as a table.

    Attributes:
        terms: name → bytes, as they are at the worst moment.
        where: in words, where in the step that moment is.
        settings: what was planned, name → value.
        moments: every part of the step, in words → its terms at that part's own worst moment.
        flops: floating-point operations of the step's matrix products and attention.
        moved: bytes that the step must read and write at least (`floor`).
    """

    terms: dict[str, int]
    where: str
    settings: dict[str, object]
    moments: dict[str, dict[str, int]] = field(repr=False)
    flops: int
    moved: int

    @property
    def peak(self) -> int:
        """Bytes held at the worst moment."""
        return sum(self.terms.values())

    @property
    def total(self) -> int:
        """The sum of the terms: the peak, since the terms are those of one moment."""
        return self.peak

    def floor(self, machine: Machine) -> float:
        """Seconds that no step on this machine can take less than: its products at the machine's own rate, or
        its bytes.

        max(FLOP / rate, bytes / bandwidth)
        """
        return max(self.flops / machine.flops, self.moved / machine.bandwidth)

    def __str__(self) -> str:
        rows = [
            f"{name:<24}{size / 1e9:10.2f}{size / GIB:10.2f}" for name, size in self.terms.items() if size
        ]
        peak = f"{'peak':<24}{self.peak / 1e9:10.2f}{self.peak / GIB:10.2f}   {self.where}"
        said = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return "\n".join([f"{'':<24}{'GB':>10}{'GiB':>10}", *rows, "─" * 44, peak, said])


def plan_training(
    model_config: "PretrainedConfig",
    method: str = "lora",
    *,
    task: str = "sft",
    batch_size: int = 1,
    length: int = 2048,
    completion: int | None = None,
    rank: int = 16,
    targets: str | tuple[str, ...] | None = None,
    checkpointing: bool = True,
    gradient_accumulation_steps: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    loss: Loss | None = None,
) -> MemoryPlan:
    """Find the bytes that a training step holds, from the model's config alone; nothing is loaded.

    The model is built on tensors without memory, the real step runs on it, and every tensor's birth and
    death is followed. One and two periods of layers give all of them.

    Args:
        model_config: a transformers config; `known_config` has those of well-known models.
        method: "full", "lora", "dora" or "qlora" (LoRA on NF4 layers).
        task: "sft"; "preference", DPO on pairs, each of two rows; or "feedback", KTO on thumbs, each with a
            mismatched row for the KL. The reference of both is the model with adapters off or, in full
            fine-tuning, a second, frozen model.
        batch_size: rows, pairs or thumbs computed at once.
        length: tokens per row. What is kept for backward grows with batch_size × length.
        completion: tokens per row that are learned, and so reach the head; default all but the first.
        rank, targets: as in `AdapterConfig`; default all linear layers, of experts attention's.
        checkpointing: keep each layer's input only, and compute the layer again in backward.
        gradient_accumulation_steps: above 1, the gradients of earlier parts stay while a part is computed.
        dtype: of weights that are not NF4, and of activations.
        adapter_dtype: of adapters, their gradients and moments; `LoRALinear` makes them fp32.
        device: "cuda" (which need not be there) or "cpu".
        loss: the step's loss, as `train` takes it; default `sft_loss`, or DPO's or KTO's.

    Raises:
        ValueError: the method, task or device is unknown, or a number is below 1.
    """
    asked = {"method": (method, METHODS), "task": (task, TASKS), "device": (device, DEVICES)}
    for name, (value, known) in asked.items():
        if value not in known:
            raise ValueError(f'{name}="{value}" is unknown; choose one of {", ".join(known)}')
    if min(batch_size, length, gradient_accumulation_steps) < 1:
        raise ValueError(
            f"batch_size={batch_size}, length={length}, gradient_accumulation_steps="
            f"{gradient_accumulation_steps}: each must be at least 1"
        )
    model = _model_of_shape(model_config, method, rank, targets, dtype, adapter_dtype)
    if device == "cpu" and takes_packed_rows(model.config):
        use_packed_attention(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    reference = None
    if task != "sft" and method == "full":
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    batch = rows_of(task, batch_size, length, completion)
    trace = trace_step(
        model, batch, loss or loss_of(task), device, gradient_accumulation_steps > 1, reference
    )
    settings = {
        "method": method,
        **({} if method == "full" else {"rank": rank, "adapters": _short(adapter_dtype)}),
        "linear layers": "nf4" if method == "qlora" else _short(dtype),
        "other weights": _short(dtype),
        "task": task,
        "rows": batch_size * (2 if task == "preference" else 1),
        "length": length,
        "accumulation": gradient_accumulation_steps,
        "checkpointing": checkpointing,
        "device": device,
    }
    return _plan(trace, settings)


def plan_step(
    model: nn.Module, batch: Batch, loss: Loss = sft_loss, gradient_accumulation_steps: int = 1
) -> MemoryPlan:
    """The plan of a step of a model as it stands; neither it nor its gradients change.

    Args:
        model: any module whose first parameter tells its device; of a language model few layers are run.
        batch, loss, gradient_accumulation_steps: as `train` has them; the largest part is planned.

    Raises:
        ValueError: the step reads numbers that only a real step has; says which operation does.
    """
    part = max(parts_of(batch, gradient_accumulation_steps), key=size_of)
    kind = "cuda" if device_of(model).type == "cuda" else "cpu"
    reference = getattr(getattr(loss, "reference", None), "model", None)  # a preference loss's frozen copy
    trace = trace_step(model, part, loss, kind, gradient_accumulation_steps > 1, reference)
    adapted = getattr(model, "adapter_config", None)
    quantized = any(isinstance(module, NF4Tensor) for module in model.modules())
    settings = {
        "method": adapted.method if adapted else "full",
        "linear layers": "nf4" if quantized else _short(next(model.parameters()).dtype),
        "rows": len(next(iter(part.values()))),
        "tokens": size_of(part)[0],
        "checkpointing": bool(getattr(model, "is_activation_checkpointing", False)),
        "device": kind,
    }
    return _plan(trace, settings)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    return next(model.parameters()).device


def parts_of(batch: Batch, parts: int) -> list[Batch]:
    """The parts that a step's batch is computed in, as `train` cuts it."""
    rows = torch.arange(len(next(iter(batch.values()))))
    return [{key: x[share] for key, x in batch.items()} for share in rows.tensor_split(parts) if len(share)]


def size_of(batch: Batch) -> tuple[int, ...]:
    """What a step's memory grows with: numbers in the batch's masks, tokens in them, tokens scored, the
    longest row; and whether all rows begin alike, since attention to what they share takes masks of its
    own."""
    masks = {name: x for name, x in batch.items() if name.endswith("_mask")}
    shape = [(x.numel(), x[0].numel()) for x in (masks or batch).values()]
    numbers, longest = map(sum, zip(*shape, strict=True))
    if not masks:
        return numbers, numbers, numbers, longest, 0
    tokens = {name: int(x.sum()) for name, x in masks.items()}
    labels, begins = batch.get("labels"), "prompt" if "prompt_mask" in batch else "attention"
    answers = sum(count for name, count in tokens.items() if not name.startswith(begins))
    scored = answers if labels is None else int((labels != IGNORE).sum())
    ids, real = batch.get("prompt_ids" if begins == "prompt" else "input_ids"), masks.get(f"{begins}_mask")
    if ids is None or real is None:  # a batch of another make
        return numbers, sum(tokens.values()), scored, longest, 0
    first = ids.gather(1, real.argmax(1, keepdim=True))
    alike = len(first) > 1 and bool((first == first[0]).all())
    return numbers, sum(tokens.values()), scored, longest, int(alike)


# ── the model and its batch, from a config ──────────────────────────────────────────────────────────────────


@lru_cache(maxsize=8)
def _skeleton(kind: type, fields: str, dtype: torch.dtype) -> nn.Module:
    """A model on the meta device; kept, since labs plan many steps of one shape."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(fields)), dtype=dtype)
    find_head_path(model)  # here, once: copies keep what is found
    return model


def _model_of_shape(config, method, rank, targets, dtype, adapter_dtype) -> nn.Module:
    model = copy.deepcopy(_skeleton(type(config), config.to_json_string(use_diff=False), dtype))
    if method == "qlora":
        quantize_model(model)
    if method != "full":
        adapt(model, method, rank, targets)
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.data = p.data.to(adapter_dtype)
    return model


def adapt(model: nn.Module, method: str, rank: int = 16, targets: str | tuple[str, ...] | None = None):
    """Put a method's adapters on all linear layers of a model; of a mixture of experts, on attention's."""
    kinds = {kind for _, kind in kinds_of(model)}
    targets = targets or (ATTENTION if EXPERTS in kinds else ALL_LINEAR)
    return add_adapters(model, AdapterConfig("dora" if method == "dora" else "lora", rank, targets=targets))


def loss_of(task: str) -> Loss:
    """SFT's loss, DPO's or KTO's; a new one each time, since what it keeps belongs to one run."""
    losses = {"preference": preference_loss(dpo_loss), "feedback": feedback_loss(kto_loss)}
    return losses.get(task, sft_loss)


def rows_of(task: str, rows: int, length: int, completion: int | None = None) -> Batch:
    """The batch that `plan_training` plans: full rows that have no beginning in common."""
    answers = ANSWERS.get(task, ())
    ids = torch.arange(length).remainder(7).repeat(rows, 1)
    ids[:, 0] = torch.arange(rows) % 7 + 1  # or their common beginning would be computed once
    begin = length - min(length, length if completion is None else completion)
    if not answers:
        labels = ids.clone()
        labels[:, :begin] = IGNORE
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    begin = max(1, begin)  # a prompt has a token, and so has an answer
    tokens = {"prompt": ids[:, :begin]}
    for i, side in enumerate(answers, start=1):  # that begin differently, or that too would be shared
        tokens[side] = ids[:, : max(1, length - begin)] + i
    batch = {f"{name}_ids": x for name, x in tokens.items()}
    batch |= {f"{name}_mask": torch.ones_like(x) for name, x in tokens.items()}
    return {**batch, "desirable": torch.arange(rows) % 2 == 0}


def _plan(trace: Trace, settings: dict[str, object]) -> MemoryPlan:
    moments = {
        _in_words(part): {name: round(terms[name]) for name in KINDS if terms.get(name)}
        for part, terms in trace.moments.items()
    }
    where = max(moments, key=lambda part: sum(moments[part].values()))
    return MemoryPlan(moments[where], where, settings, moments, round(trace.flops), round(trace.moved))


def _in_words(part: Any) -> str:
    if not isinstance(part, tuple):
        return part
    direction, i = part
    named = {0: "the first layer", -1: "the last layer"}
    place = named.get(i) or (f"layer {i + 1}" if i > 0 else f"the last layer but {-1 - i}")
    return f"{direction} of {place}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
