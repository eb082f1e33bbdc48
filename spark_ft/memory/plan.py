"""Memory, told truly: what a training run needs, what the machine has, what a block of code took.

GB is 10⁹ bytes and GiB 2³⁰ bytes everywhere.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from spark_ft.adapters import ALL_LINEAR, AdapterConfig, add_adapters
from spark_ft.data.chat import IGNORE
from spark_ft.memory.machine import GIB, MemoryBudget, budget, held, measure
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import DENSE, NF4Linear, NF4Tensor
from spark_ft.scoring import PACKED, packed_row

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "MemoryBudget",
    "MemoryPlan",
    "budget",
    "cut",
    "measure",
    "nf4_bytes",
    "plan_step",
    "plan_training",
    "refuse_over_budget",
]

LOGIT_ROWS = 128  # token_logps' chunk_size
CUDA_CONTEXT_BYTES = (
    700_000_000  # what a CUDA process holds before its first tensor: driver, kernels, cuBLAS's workspace
)

METHODS, TASKS = ("full", "lora", "dora", "qlora"), ("sft", "preference")
LINEAR, EMBEDDINGS, NORMS, REFERENCE = "linear layers", "embeddings and head", "norms", "reference model"
ADAPTERS, GRADIENTS, MOMENTS = "adapters", "gradients", "optimizer moments"
CHECKPOINTS, SAVED, RECOMPUTED = "checkpoints", "saved activations", "one layer recomputed"
DEQUANTIZED, PASSING, LOGITS, CONTEXT = "dequantized weight", "gradients in passing", "logits", "CUDA context"


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step needs, term by term; `print(plan)` shows it as a table.

    Attributes:
        terms: name → bytes, each in full.
        peak: bytes held at the worst moment; less than the sum, since gradients come as saved activations go.
        settings: what was planned, name → value.
        total: the sum of the terms.
    """

    terms: dict[str, int]
    peak: int
    settings: dict[str, object]

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    def __str__(self) -> str:
        def row(name: str, size: int) -> str:
            return f"{name:<24}{size / 1e9:10.2f}{size / GIB:10.2f}"

        terms = [row(name, size) for name, size in self.terms.items() if size]
        sums = [row("sum", self.total), row("most at one moment", self.peak)]
        said = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return "\n".join([f"{'':<24}{'GB':>10}{'GiB':>10}", *terms, "─" * 44, *sums, said])


def plan_training(
    model_config: "PretrainedConfig",
    method: str = "lora",
    *,
    task: str = "sft",
    batch_size: int = 1,
    length: int = 2048,
    completion: int | None = None,
    rank: int = 16,
    targets: str | tuple[str, ...] = ALL_LINEAR,
    checkpointing: bool = True,
    gradient_accumulation_steps: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    gradient_dtype: torch.dtype | None = None,
    moment_dtype: torch.dtype | None = None,
    moments: int = 2,
    double_quant: bool = True,
    whole_matrices: bool = False,
    logit_rows: int | None = LOGIT_ROWS,
    device: str = "cuda",
) -> MemoryPlan:
    """Count, from a model's shape alone, the bytes that a training step holds; nothing is loaded.

        weights + adapters + gradients + moments + what is kept for backward + what one layer needs + logits + context

    Parameters are counted on the transformers model itself, made on the meta device, where a tensor has a shape and no memory.
    What is kept for backward is what this package's own step keeps. For dense models: llama, mistral, qwen2, qwen3.

    Args:
        model_config: a transformers config; `known_config` has those of well-known models.
        method: "full", "lora", "dora" or "qlora" (LoRA on NF4 layers).
        task: "sft" or "preference", where a pair is two rows. Its reference is the model with its adapters off, and costs
            nothing; full fine-tuning holds a second, frozen model for it.
        batch_size: rows (or pairs) computed at once.
        length: tokens a row. What is kept for backward grows with batch_size × length.
        completion: tokens a row that are learned, and so reach the head; default all.
        rank, targets: as in `AdapterConfig`.
        checkpointing: keep each layer's input only, and compute the layer again in backward.
        gradient_accumulation_steps: above 1, the gradients of earlier parts stay while a part is computed.
        dtype: of weights that are not NF4, and of activations.
        adapter_dtype: of adapters; `LoRALinear` makes them fp32.
        gradient_dtype, moment_dtype: default that of what they belong to.
        moments: numbers that the optimizer keeps for each one trained: AdamW 2, SGD with momentum 1, SGD 0.
        double_quant: NF4's scales are quantized too (4.127 bits a weight, else 4.5).
        whole_matrices: NF4 matrices are dequantized whole, to bf16, as bitsandbytes does; `NF4Linear` takes rows by rows.
        logit_rows: rows of logits at once; None keeps those of every position, as transformers' own loss does.
        device: "cuda", or "cpu": no context, and rows are packed without padding.

    Raises:
        ValueError: the method or task is unknown, or the model is of another kind.
    """
    for name, value, known in (
        ("method", method, METHODS),
        ("task", task, TASKS),
        ("device", device, ("cuda", "cpu")),
    ):
        if value not in known:
            raise ValueError(f'{name}="{value}" is unknown; choose one of {", ".join(known)}')
    for name, number in (
        ("batch_size", batch_size),
        ("length", length),
        ("gradient_accumulation_steps", gradient_accumulation_steps),
    ):
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    full, quantized, dora = method == "full", method == "qlora", method == "dora"
    adapters = (
        None if full else AdapterConfig(rank=rank, targets=targets)
    )  # DoRA has a norm to compute, and meta no numbers
    model = _on_meta(type(model_config), model_config.to_json_string(use_diff=False), adapters)
    if _widths(model) is None:
        raise ValueError(
            f'model_type="{model_config.model_type}" cannot be planned for; {", ".join(_PLANNED)} can'
        )

    def size(tensor: Tensor, kind: str) -> int:
        if quantized and kind == LINEAR and tensor.dim() == 2:
            return nf4_bytes(tensor.numel(), double_quant)
        return tensor.numel() * (adapter_dtype if kind == ADAPTERS else dtype).itemsize

    trained_dtype = dtype if full else adapter_dtype
    gradient_dtype, moment_dtype = gradient_dtype or trained_dtype, moment_dtype or trained_dtype
    held, trained = _weigh(model, size)
    numbers = sum(p.numel() for p in trained)
    if dora:
        numbers += sum(module.out_features for module in model.modules() if isinstance(module, LoRALinear))
        held[ADAPTERS] = numbers * adapter_dtype.itemsize * _remembered(device)
    if full and task == "preference":
        held[REFERENCE] = sum(held.values())
    head = model.get_output_embeddings()
    largest = max(
        x.in_features * x.out_features for x in model.modules() if hasattr(x, "in_features") and x is not head
    )
    rows = batch_size * (2 if task == "preference" else 1)
    terms, peak = _add_up(
        model,
        held
        | {GRADIENTS: numbers * gradient_dtype.itemsize, MOMENTS: moments * numbers * moment_dtype.itemsize},
        _Tokens(
            [length] * rows, rows * (length if completion is None else completion), packed=device == "cpu"
        ),
        width=dtype.itemsize,
        adapter_width=adapter_dtype.itemsize,
        dora=dora,
        checkpointing=checkpointing,
        accumulates=gradient_accumulation_steps > 1,
        logit_rows=logit_rows,
        dequantized=0
        if not quantized
        else 2 * largest
        if whole_matrices
        else _dequantized(largest, dtype.itemsize, device),
        context=CUDA_CONTEXT_BYTES if device == "cuda" else 0,
    )
    adapted = {"rank": rank, "targets": targets, "adapters": _short(adapter_dtype)}
    settings = {
        "method": method,
        **({} if full else adapted),
        "linear layers": "nf4" if quantized else _short(dtype),
        "other weights": _short(dtype),
        "gradients": _short(gradient_dtype),
        "moments": f"{moments} × {_short(moment_dtype)}",
        "task": task,
        "rows": rows,
        "length": length,
        "accumulation": gradient_accumulation_steps,
        "checkpointing": checkpointing,
        "logit rows": "all" if logit_rows is None else logit_rows,
        "device": device,
    }
    return MemoryPlan(terms, peak, settings)


def nf4_bytes(weights: int, double_quant: bool = True, block_size: int = 64) -> int:
    """Bytes of so many weights in NF4: 4 bits each, and a scale a block, in fp32, or in 8 bits with fp32 for 256 of them."""
    blocks = ceil(weights / block_size)
    return ceil(weights / 2) + (
        blocks + 4 * ceil(blocks / 256) + 4 if double_quant else 4 * blocks
    )  # + 4: their mean


def _dequantized(largest: int, width: int, device: str) -> int:
    """What `NF4Linear` needs for a block of its weight's rows: codes, numbers in fp32, and the block before."""
    at_once = min(largest, DENSE["cpu" if device == "cpu" else "cuda"])
    return at_once * (6 + (width if largest > at_once else 0))


@lru_cache(maxsize=8)
def _on_meta(kind: type, fields: str, adapters: AdapterConfig | None) -> nn.Module:
    """The model without its memory; kept, since labs plan many lengths of one shape."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(fields)))
        return model if adapters is None else add_adapters(model, adapters)


def _remembered(device: str) -> int:
    """DoRA keeps its norms, and on a CPU what they were computed from: as much again as its adapters."""
    return 2 if device == "cpu" else 1


def _weigh(model: nn.Module, size: Callable[[Tensor, str], int]) -> tuple[dict[str, int], list[Tensor]]:
    """Bytes of the model's tensors by kind, and those that are trained; what is shared (tied embeddings) counts once."""
    head = model.get_output_embeddings()
    held, tensors = dict.fromkeys((LINEAR, EMBEDDINGS, NORMS, ADAPTERS), 0), {}
    for module in model.modules():
        if isinstance(module, LoRALinear):
            kind = ADAPTERS
        elif module is head or isinstance(module, nn.Embedding):
            kind = EMBEDDINGS
        else:
            kind = LINEAR if hasattr(module, "in_features") or isinstance(module, NF4Tensor) else NORMS
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in tensors:
                tensors[id(tensor)] = tensor
                held[kind] += size(tensor, kind)
    return held, [tensor for tensor in tensors.values() if tensor.requires_grad]


class _Tokens(NamedTuple):
    """What a part of a batch computes: tokens of each row after what all rows share, and how many reach the head."""

    lengths: list[int]
    scored: int
    packed: bool
    shared: int = 0
    masked: bool = False  # computed with an explicit mask: padding in it

    @property
    def computed(self) -> int:
        return self.shared + sum(self.lengths)


class _Widths(NamedTuple):
    """Numbers a token has in one decoder layer: in the residual stream, the MLP, all query heads, all key heads."""

    hidden: int
    mlp: int
    query: int
    kv: int
    heads: int
    kv_heads: int
    qk_norm: bool


_PLANNED = ("llama", "mistral", "qwen2", "qwen3")


def _widths(model: nn.Module) -> _Widths | None:
    """None where the model is of a kind whose layers are not known here."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in _PLANNED:
        return None
    attention, mlp = model.base_model.layers[0].self_attn, model.base_model.layers[0].mlp
    query, kv = attention.q_proj.out_features, attention.k_proj.out_features
    heads, kv_heads = query // attention.head_dim, kv // attention.head_dim
    return _Widths(
        config.hidden_size, mlp.up_proj.out_features, query, kv, heads, kv_heads, hasattr(attention, "q_norm")
    )


def _kept(model: nn.Module, tokens: _Tokens, width: int, adapter_width: int, dora: bool) -> int:
    """Bytes that one decoder layer keeps for backward beside its input (tests hold this to autograd's own saved tensors)."""
    w, a, n = _widths(model), adapter_width, tokens.computed
    layer = model.base_model.layers[0]
    attention, mlp, norms_train = layer.self_attn, layer.mlp, layer.input_layernorm.weight.requires_grad
    fp32 = max(width, 4)

    def keeps(*linears: nn.Module) -> int:
        """Bytes of each number of the input that these linear layers share."""
        adapted = sum(isinstance(linear, LoRALinear) for linear in linears)
        if adapted and a > width:
            return a * adapted  # each casts it for itself
        return (
            width
            if adapted or any(getattr(linear.weight, "requires_grad", False) for linear in linears)
            else 0
        )

    # RMSNorm works in fp32: it keeps its input so (of the first norm, that is the layer's input unless it is cast), and 1/rms
    kept = n * (w.hidden * (2 * fp32 if width < 4 else fp32) + 8)
    kept += (
        n
        * w.hidden
        * (keeps(attention.q_proj, attention.k_proj, attention.v_proj) + keeps(mlp.gate_proj, mlp.up_proj))
    )
    if norms_train:
        kept += n * w.hidden * 2 * width
    if w.qk_norm:
        kept += n * ((w.query + w.kv) * (fp32 + norms_train * width) + 4 * (w.heads + w.kv_heads))
    # attention: query, key, value, output, and the softmax's log-sum-exp
    kept += n * (2 * (w.query + w.kv) * width + 4 * w.heads)
    into_o = keeps(attention.o_proj)
    kept += (
        n * w.query * (into_o if tokens.packed or into_o != width else 0)
    )  # unpacked, it is the attention's output itself
    if tokens.packed and tokens.shared:  # each row's keys and values behind the shared ones, and its mask
        seen = [tokens.shared + length for length in tokens.lengths]
        kept += width * (
            2 * w.kv * sum(seen) + sum(x * length for x, length in zip(seen, tokens.lengths, strict=True))
        )
    if tokens.masked:  # keys and values repeated for each head, and the mask as numbers
        kept += width * (2 * (w.query - w.kv) * n + sum(length**2 for length in tokens.lengths))
    if dora:  # an adapted layer's norm, gain and output before the bias; some outputs are kept anyway, by what takes them
        adapted = [linear for linear in layer.modules() if isinstance(linear, LoRALinear)]
        normed, biased = w.qk_norm and width >= 4, attention.q_proj.bias is not None
        taken = [mlp.gate_proj, mlp.up_proj]
        taken += [attention.q_proj, attention.k_proj] if normed else []
        taken += [] if biased else [attention.v_proj]
        kept += sum(linear.out_features * (8 + n * width * (linear not in taken)) for linear in adapted)
    # SwiGLU: gate, silu(gate), up; and their product, which goes into down
    return kept + n * w.mlp * (3 * width + keeps(mlp.down_proj))


def _add_up(
    model: nn.Module,
    held: dict[str, int],
    tokens: _Tokens,
    *,
    width: int,
    adapter_width: int,
    dora: bool,
    checkpointing: bool,
    accumulates: bool,
    logit_rows: int | None,
    dequantized: int,
    context: int,
) -> tuple[dict[str, int], int]:
    """All terms, and how much of them is there at the worst moment."""
    w, layers, n = _widths(model), model.config.num_hidden_layers, tokens.computed
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    stream, kept = n * w.hidden * width, _kept(model, tokens, width, adapter_width, dora)
    if checkpointing:
        activations, recomputed = {CHECKPOINTS: (layers + 1) * stream}, kept
    else:
        activations, recomputed = {SAVED: layers * (kept + (stream if width >= 4 else 0)) + stream}, 0
    # SwiGLU's backward: the gradients of its two factors. Where adapters are wider, gradients are there in both precisions.
    passing = n * (
        2 * w.mlp * width + (w.hidden * (2 * adapter_width + width) if adapter_width > width else 0)
    )
    # a block of down's weight is there before the gradients of both factors are
    before = n * w.mlp * width if adapter_width <= width else passing - 2 * n * w.mlp * width
    busy = max(passing, before + dequantized) if dequantized else passing
    vocabulary = len(head)
    if logit_rows is None:  # logits, their log-softmax and the gradients of both, the last three in fp32
        logits = n * vocabulary * (width + 12)
    else:
        chunk = min(logit_rows, tokens.scored) * vocabulary
        scored = tokens.scored * w.hidden * width
        # frozen: the scored rows, their slopes, a chunk in fp32 and, for the product, in the head's own precision
        logits = (
            scored + chunk * 12
            if head.requires_grad
            else 2 * scored + chunk * (4 if width >= 4 else 4 + width)
        )
    # a head that trains gathers its gradient over all chunks; tied, until the embedding's own, as large again, comes
    table = head.numel() * width if head.requires_grad else 0
    gradients, earlier = held[GRADIENTS], held[GRADIENTS] if accumulates else 0
    always = sum(held.values()) - gradients + context
    moments = (
        sum(activations.values()) + logits + 2 * table + earlier,  # the head's backward
        sum(activations.values()) + recomputed + busy + table + earlier,  # the last layer's
        gradients + kept + stream + busy,  # the first layer's
        gradients + (table + bool(earlier) * table if head is embeddings else 0),  # the embedding's
    )
    needs = {
        RECOMPUTED: recomputed,
        DEQUANTIZED: dequantized,
        PASSING: max(passing, table),
        LOGITS: logits,
        CONTEXT: context,
    }
    return {**held, **activations, **needs}, always + max(moments)


def plan_step(
    model: nn.Module, batch: dict[str, Tensor], gradient_accumulation_steps: int = 1
) -> MemoryPlan | None:
    """The plan of a model as it stands, for this batch computed in so many parts; None for a model that cannot be planned for.

    Args:
        model: a transformers model, adapted or not, on its device.
        batch: as `collate_sft`, `collate_preferences` or `collate_feedback` make it.
    """
    parts = [_tokens(model, part) for part in _parts(batch, gradient_accumulation_steps)]
    if _widths(model) is None or not parts or None in parts:
        return None
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    quantized = [module for module in model.modules() if isinstance(module, NF4Linear)]
    method = model.adapter_config.method if adapted else "full"
    held, trained = _weigh(model, lambda tensor, kind: tensor.nbytes)
    if method == "dora":
        held[ADAPTERS] *= _remembered(model.device.type)
    size = sum(p.nbytes for p in trained)
    tokens = max(parts, key=lambda part: part.computed)
    width = model.get_input_embeddings().weight.element_size()
    largest = max((nf4.weight.numel() for nf4 in quantized), default=0)
    checkpointing = model.base_model.layers[0].gradient_checkpointing
    terms, peak = _add_up(
        model,
        held | {GRADIENTS: size, MOMENTS: 2 * size},
        tokens,
        width=width,
        adapter_width=adapted[0].lora_A.element_size() if adapted else 0,
        dora=method == "dora",
        checkpointing=checkpointing,
        accumulates=len(parts) > 1,
        logit_rows=LOGIT_ROWS,
        dequantized=_dequantized(largest, width, model.device.type),
        context=CUDA_CONTEXT_BYTES if model.device.type == "cuda" else 0,
    )
    layers = "nf4" if quantized else _short(model.dtype)
    tokens_at_once = {"rows": len(tokens.lengths), "tokens": tokens.computed}
    return MemoryPlan(
        terms,
        peak,
        {"method": method, "linear layers": layers, **tokens_at_once, "checkpointing": checkpointing},
    )


def _parts(batch: dict[str, Tensor], parts: int) -> Iterator[dict[str, Tensor]]:
    rows = len(next(iter(batch.values())))
    for share in torch.arange(rows).tensor_split(parts):
        if len(share):
            yield {key: value[share] for key, value in batch.items()}


def _tokens(model: nn.Module, part: dict[str, Tensor]) -> _Tokens | None:
    if "input_ids" in part and "labels" in part:
        scored = int((part["labels"][:, 1:] != IGNORE).sum())
        if row := packed_row(model, part):
            return _Tokens(row.lengths, scored, True, row.prefix)
        rows, length = part["input_ids"].shape
        return _Tokens([length] * rows, scored, False, masked=not part["attention_mask"].all())
    answers = [mask for name, mask in part.items() if name.endswith("_mask") and name != "prompt_mask"]
    if "prompt_mask" not in part or not answers:
        return None
    prompts, packed = part["prompt_mask"].sum(1), model.config._attn_implementation == PACKED
    lengths = [length for answer in answers for length in (prompts + answer.sum(1)).tolist()]
    return _Tokens(lengths, sum(int(answer.sum()) for answer in answers), packed, masked=not packed)


def refuse_over_budget(
    model: nn.Module, batch: dict[str, Tensor], gradient_accumulation_steps: int = 1
) -> None:
    """Raise if a step on this batch needs more than the model's device has left; where either is unknown, do nothing.

    Raises:
        MemoryError: says how much is missing, and which term can be cut, and how.
    """
    plan = plan_step(model, batch, gradient_accumulation_steps)
    room = budget(model.device) if plan else None
    if plan is None or room.available is None:
        return
    here = sum(
        plan.terms[kind] for kind in (LINEAR, EMBEDDINGS, NORMS, ADAPTERS, MOMENTS)
    )  # moments: of a resumed run
    to_come = plan.peak - plan.terms[CONTEXT] - min(here, held(model.device, anonymous=True))
    if to_come > room.available:
        raise MemoryError(
            f"this run would take {to_come / 1e9:.1f} GB more than it holds now, and there are {room.available / 1e9:.1f} GB "
            f"({room}). {cut(plan)}; or set ignore_budget=True"
        )


def fits(plan: MemoryPlan, room: MemoryBudget) -> str:
    """In words, whether the plan's peak fits what is available, and if not, what to cut."""
    if room.available is None:
        return f"unknown: {room}"
    spare = room.available - plan.peak
    if spare >= 0:
        return f"fits, {spare / GIB:.1f} GiB to spare: {room}"
    return f"does not fit, {-spare / GIB:.1f} GiB missing: {room}. {cut(plan)}"


def cut(plan: MemoryPlan) -> str:
    """The largest term of a plan that can be made smaller, and how."""
    adapted = plan.settings["method"] != "full"
    fewer = "compute fewer rows at once" if plan.settings["rows"] > 1 else "shorten the rows"
    how = {
        LINEAR: 'load the model in 4 bits (quantize="nf4")'
        if adapted and plan.settings["linear layers"] != "nf4"
        else "",
        GRADIENTS: "use a smaller rank" if adapted else "train adapters instead (add_adapters)",
        MOMENTS: "use a smaller rank" if adapted else "train adapters instead (add_adapters)",
        SAVED: "turn checkpointing on (model.activation_checkpointing_enable())",
        CHECKPOINTS: fewer,
        RECOMPUTED: fewer,
        PASSING: fewer,
        LOGITS: fewer,
    }
    name = max((name for name in plan.terms if how.get(name)), key=plan.terms.get)
    return f"The largest term that can be cut: {name}, {plan.terms[name] / 1e9:.1f} GB; {how[name]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
