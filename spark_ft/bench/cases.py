"""What `spark-ft bench` and `spark-ft parity` compare: a row builds the same step twice, ours and theirs.

Both sides have the same weights and the same data. A later row is one more `Row` in ROWS.
"""

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spark_ft.adapters import AdapterConfig, adapted_layers, add_adapters
from spark_ft.bench import peers
from spark_ft.bench.harness import (
    Gemms,
    Row,
    Side,
    pass_flops,
    pass_gemms,
    step_flops,
    step_gemms,
    this_device,
)
from spark_ft.data.batches import collate_feedback, collate_preferences, collate_sft, with_prompt
from spark_ft.data.chat import IGNORE, render
from spark_ft.data.records import iter_records, read_records, write_records
from spark_ft.files import ROOT
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import quantize_nf4
from spark_ft.methods.preference import dpo_loss, kto_loss, orpo_loss, simpo_loss
from spark_ft.models import load_model
from spark_ft.preferences import feedback_loss, preference_loss
from spark_ft.scoring import packed_row, sft_loss
from spark_ft.training import Loss

# ── rows: one SFT step against TRL's SFTTrainer with PEFT ────────────────────────────────────────────────
# Both sides get our token ids. From the text, TRL would also score the newline that the template writes
# after the answer's last token; it takes a dataset with `input_ids` and `completion_mask` as it is.

SFT_ROWS, SFT_RANK, SFT_RATE, SFT_LENGTH, SFT_CLIP = 8, 16, 1e-4, 512, 1.0
DROPOUT = 0.05


def _sft_model(quantized: bool = False):
    if quantized:
        model, tokenizer = load_model(str(peers.four_bit_folder()), dtype=torch.float32)
    else:
        model, tokenizer = load_model(dtype=torch.float32)
    for parameter in model.parameters():
        parameter.sum()  # mapped from disk until read, which the first step's memory would count
    return model, tokenizer, _sft_records()


def _sft_records() -> list[dict]:
    return read_records(ROOT / "data/kitchen_tickets/train.jsonl", "sft")[:SFT_ROWS]


def _fill_adapters(parameters: dict[str, Tensor]) -> None:
    """Give both sides the same values, B not zero: at B = 0 the gradient of A is zero, which hides mistakes.

    DoRA's magnitudes stay what they are, the norms of the rows.
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
    """Libraries draw masks in different orders, so sides are compared without dropout and timed with it."""
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


def _our_sft_step(
    model: nn.Module, tokenizer, records: list[dict], compared: Callable[[str], bool] = lambda name: True
) -> Side:
    return _our_step(model, collate_sft(records, tokenizer, SFT_LENGTH), sft_loss, compared)


def _our_step(
    model: nn.Module, batch: dict[str, Tensor], loss_of: Loss, compared: Callable[[str], bool]
) -> Side:
    """The step of `train` on a model with adapters, ours or not."""
    parameters = {peers.our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    batch = {key: value.to(model.device) for key, value in batch.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=SFT_RATE, weight_decay=0.0, fused=True)

    def backward() -> float:  # as `train` does it: the sum's gradient, then divided by the count
        loss, count, *_ = loss_of(model, batch)
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
    return _our_sft_step(model, tokenizer, records)


def _sft_theirs(method: str = "lora", dropout: float = 0.0, quantized: bool = False) -> Side:
    if quantized:
        (model, tokenizer), records = peers.bitsandbytes_model(peers.four_bit_folder()), _sft_records()
    else:
        model, tokenizer, records = _sft_model()
        model.set_attn_implementation("sdpa")  # transformers' own, which ours replaces
    rows = [
        {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}
        for prompt, completion in (render(record, tokenizer) for record in records)
    ]
    adapter = peers.peft_config(SFT_RANK, dropout=dropout, dora=method == "dora")
    trainer = peers.sft_trainer(
        model, tokenizer, rows, adapter, max_length=SFT_LENGTH, learning_rate=SFT_RATE, max_grad_norm=SFT_CLIP
    )
    batch = next(iter(trainer.get_train_dataloader()))
    if _scored(batch) != _scored(collate_sft(records, tokenizer, SFT_LENGTH)):
        raise ValueError("sft-step: TRL's batch scores other tokens than ours")
    return _their_step(trainer, batch)


def _their_step(trainer, batch: dict[str, Tensor]) -> Side:
    """TRL's own step on its batch, from adapters filled as ours are."""
    parameters = {peers.our_name(name): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    for p in parameters.values():
        p.data = p.data.float()  # on a 4-bit model TRL makes adapters bf16
    _fill_adapters(parameters)
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


def _scored(batch: dict[str, Tensor]) -> list:
    """Each row's real tokens and labels, sorted, since a batch's rows may be shuffled."""
    rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
    return sorted((ids[real].tolist(), labels[real].tolist()) for ids, labels, real in rows)


def _sft_work() -> tuple[int, Gemms]:
    model, tokenizer, records = _sft_model()
    batch = collate_sft(records, tokenizer, SFT_LENGTH)
    add_adapters(model, AdapterConfig(rank=SFT_RANK))
    return step_flops(model, batch), step_gemms(model, batch)


# ── rows: what DoRA costs: PEFT's layers under our step, and our own LoRA ───────────────────────────────────


def _peft_layers(dropout: float = 0.0) -> Side:
    """Our step, packed rows and all, with PEFT's DoRA layers in the place of ours."""
    model, tokenizer, records = _sft_model()
    peers.peft_layers(model, peers.peft_config(SFT_RANK, dropout=dropout, dora=True))
    _fill_adapters({peers.our_name(name): p for name, p in model.named_parameters() if p.requires_grad})
    return _our_sft_step(model, tokenizer, records)


def _at_rest(name: str) -> bool:
    return not name.endswith("magnitude")


def _dora_as_lora() -> Side:
    """DoRA with each magnitude at its row's norm: its output and its gradients of A and B are LoRA's."""
    model, tokenizer, records = _sft_model()
    add_adapters(model, AdapterConfig("dora", rank=SFT_RANK)).train()
    _fill_adapters({name: p for name, p in model.named_parameters() if p.requires_grad})
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.magnitude.copy_(layer.norm())
    return _our_sft_step(model, tokenizer, records, compared=_at_rest)


# ── rows: one step of preference learning against TRL's trainers with PEFT ─────────────────────────────────
# Theirs gets our rows as text, and must make the same tokens of them. "kept": both sides compute the
# reference's log-probabilities once, before anything is timed.

PAIRS, THUMBS = 4, 8
ANSWERS = ("chosen", "rejected", "completion")


def kitchen_rows(kind: str, count: int, joined: int = 1) -> list[dict]:
    """Rows of the kitchen sets; joined: prompts that make one, of which two are answered."""
    folder = {"preference": "kitchen_preferences", "feedback": "kitchen_feedback"}[kind]
    rows, made = read_records(ROOT / f"data/{folder}/train.jsonl", kind), []
    if kind == "feedback":  # as many down as up, and no two after each other with one prompt
        up, down = ([row for row in rows if row["label"] == label] for label in (True, False))
        rows = [row for both in zip(up[: len(down)], down, strict=True) for row in both]
    for i in range(count):
        few = rows[joined * i : joined * (i + 1)]
        answers = {key: " ".join(row[key] for row in few[:2]) for key in few[0] if key in ANSWERS}
        label = {"label": few[0]["label"]} if "label" in few[0] else {}
        made.append({"prompt": " ".join(row["prompt"] for row in few), **answers, **label})
    return made


def _sides(records: list[dict]) -> tuple[str, str]:
    return ("completion", "mismatched") if "label" in records[0] else ("chosen", "rejected")


def _collated(records: list[dict], tokenizer) -> dict[str, Tensor]:
    collate = collate_feedback if "label" in records[0] else collate_preferences
    return collate(records, tokenizer)


def preference_ours(
    load: Callable[[], tuple], rows: Callable[[], list[dict]], loss: Callable[..., Tensor], keep: bool = True
) -> Side:
    """Our step with a preference loss; without `keep` the reference is computed in every step."""
    (model, tokenizer), records = load(), rows()
    add_adapters(model, AdapterConfig(rank=SFT_RANK)).train()
    _fill_adapters({name: p for name, p in model.named_parameters() if p.requires_grad})
    step_loss = (feedback_loss if "label" in records[0] else preference_loss)(loss)

    def of_step(model: nn.Module, batch: dict[str, Tensor]) -> tuple:
        if not keep:
            step_loss.reference.kept.clear()
        return step_loss(model, batch)

    return _our_step(model, _collated(records, tokenizer), of_step, lambda name: True)


def preference_theirs(
    load: Callable[[], tuple], rows: Callable[[], list[dict]], trainer: Callable, settings: dict[str, Any]
) -> Side:
    """TRL's step: `trainer` is one of `peers`, with its settings."""
    (model, tokenizer), records = load(), rows()
    model.set_attn_implementation("sdpa")  # transformers' own, which ours replaces
    texts, adapter = peers.text_rows(records, tokenizer), peers.peft_config(SFT_RANK)
    built = trainer(model, tokenizer, texts, adapter, learning_rate=SFT_RATE, **settings)
    if peers.trl_tokens(built) != _answered(_collated(records, tokenizer), _sides(records)):
        raise ValueError("TRL's batch scores other tokens than ours")
    return _their_step(built, peers.trl_batch(built))


def _answered(batch: dict[str, Tensor], sides: tuple[str, ...]) -> list:
    rows = with_prompt(batch, *sides)
    scored, real = rows["labels"] != IGNORE, rows["attention_mask"].bool()
    rows = zip(rows["input_ids"], scored, real, strict=True)
    return sorted((ids[mask].tolist(), said[mask].tolist()) for ids, said, mask in rows)


def preference_work(
    load: Callable[[], tuple], rows: Callable[[], list[dict]], loss: Callable[..., Tensor], keep: bool = True
) -> tuple[int, Gemms]:
    """Operations of our step's passes, and their products; a pass with a backward counts twice in these."""
    (model, tokenizer), records = load(), rows()
    batch, sides = _collated(records, tokenizer), _sides(records)
    add_adapters(model, AdapterConfig(rank=SFT_RANK))

    def size(*sides: str) -> tuple[int, int]:
        rows = with_prompt(batch, *sides)
        row = packed_row(model, rows, together=len(sides))
        tokens = row.ids.numel() if row else int(rows["attention_mask"].sum())
        return tokens, int((rows["labels"][:, 1:] != IGNORE).sum())

    thumbs = "label" in records[0]
    tokens, scored = size("completion") if thumbs else size(*sides)
    if loss is orpo_loss:
        scored += int(batch["prompt_mask"].sum()) - len(records)  # its NLL is over the prompts too
    passes = [(tokens, scored, True, True)]
    if thumbs:
        passes.append((*size("mismatched"), False, True))
    if not keep:
        passes.append((*size(*sides), False, False))
    gemms: Gemms = {}
    for tokens, scored, backward, _ in passes:
        for shape, count in pass_gemms(model, tokens, scored).items():
            gemms[shape] = gemms.get(shape, 0) + count * (1 + backward)
    return sum(pass_flops(model, *each) for each in passes), gemms


def _fp32_model() -> tuple:
    return _sft_model()[:2]


def _preference_rows() -> Iterator[Row]:
    """DPO with its reference in the step and kept, KTO, SimPO, ORPO, each at two lengths."""
    long, kitchen = "some 95 prompt and 60 completion tokens", "kitchen lengths"
    for name, kind, says, loss, trainer, keep in (
        (
            "dpo-step",
            "preference",
            "DPO, the reference in the step; theirs DPOTrainer",
            dpo_loss,
            "dpo",
            False,
        ),
        ("dpo-kept", "preference", "DPO, the reference kept; theirs DPOTrainer", dpo_loss, "dpo", True),
        ("kto-kept", "feedback", "KTO, the reference kept; theirs KTOTrainer", kto_loss, "kto", True),
        ("simpo-step", "preference", "SimPO; theirs CPOTrainer", simpo_loss, "simpo", True),
        ("orpo-step", "preference", "ORPO; theirs ORPOTrainer", orpo_loss, "orpo", True),
    ):
        build = getattr(peers, f"{trainer}_trainer")
        settings = {"keep_reference": keep} if trainer in ("dpo", "kto") else {}
        count, what = (THUMBS, "thumbs") if kind == "feedback" else (PAIRS, "pairs")
        for suffix, lengths, joined in (("", long, 5), ("-kitchen", kitchen, 1)):
            given = _fp32_model, partial(kitchen_rows, kind, count, joined)
            yield Row(
                f"{name}{suffix}",
                f"{says} + PEFT; {count} {what} of {lengths}, LoRA r{SFT_RANK} on all linear layers, AdamW",
                partial(preference_ours, *given, loss, keep),
                partial(preference_theirs, *given, build, settings),
                partial(preference_work, *given, loss, keep),
            )


# ── rows: one LoRA layer against PEFT's ─────────────────────────────────────────────────────────────────────

LAYER_TOKENS, LAYER_RANK = 1024, 16


def layer_input(in_features: int, out_features: int) -> tuple[nn.Linear, Tensor]:
    """A linear layer and an input for it, the same each time."""
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(in_features, out_features, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / in_features**0.5)
    x = torch.randn(LAYER_TOKENS, in_features, generator=generator)
    return layer.to(this_device()), x.to(this_device()).requires_grad_()


def layer_side(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Side:
    """A step of one layer: forward, and backward from the loss ½‖y‖², whose gradient is y."""
    _fill_adapters(parameters)
    parameters = {**parameters, "x": x}

    def loss_and_gradient() -> tuple[float, dict[str, Tensor]]:
        y = layer(x)
        y.backward(y.detach())
        return 0.5 * y.detach().double().square().sum().item(), _gradients(parameters)

    def step() -> None:
        y = layer(x)
        y.backward(y.detach())
        _gradients(parameters)

    return Side(step, loss_and_gradient)


def layer_ours(in_features: int, out_features: int) -> Side:
    """`LoRALinear` around that layer."""
    base, x = layer_input(in_features, out_features)
    layer = LoRALinear(base, LAYER_RANK)
    return layer_side(layer, {"lora_A": layer.lora_A, "lora_B": layer.lora_B}, x)


def layer_theirs(in_features: int, out_features: int) -> Side:
    """PEFT's LoRA layer around that layer."""
    base, x = layer_input(in_features, out_features)
    layer = peers.peft_layer(base, LAYER_RANK)
    adapters = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    return layer_side(layer, adapters, x)


def _layer_work(in_features: int, out_features: int) -> tuple[int, Gemms]:
    base, adapter = in_features * out_features, LAYER_RANK * (in_features + out_features)
    return LAYER_TOKENS * (4 * base + 6 * adapter), {(LAYER_TOKENS, in_features, out_features): 1}


# ── row: an NF4 weight dequantized ──────────────────────────────────────────────────────────────────────────

# as many numbers as a product unpacks at a time; more would time the system's fresh pages
NF4_SHAPE = (512, 8192)


def _nf4_weight() -> Tensor:
    return torch.randn(NF4_SHAPE, generator=torch.Generator().manual_seed(2)).to(this_device())


def _dequantizing(dequantize: Callable[[], Tensor]) -> Side:
    return Side(dequantize, lambda: ((w := dequantize()).double().abs().sum().item(), {"weight": w}))


def _nf4_ours() -> Side:
    return _dequantizing(quantize_nf4(_nf4_weight(), double_quant=False).dequantize)


def _nf4_theirs() -> Side:
    return _dequantizing(peers.bitsandbytes_nf4(_nf4_weight(), double_quant=False)[2])


# ── row: a million records read one by one, each checked, against `datasets` ─────────────────────────────
# Theirs streams the same file and checks no field. The "loss" is the number of rows and the "gradient" the
# bytes of their SHA-256, so that a single row that differs stops the bench.

READ_ROWS = 1_000_000


def reading(open_rows: Callable[[Path], Callable[[], Iterator[dict]]], count: int) -> Side:
    """Make a file of records and read it: the step reads all of them, the comparison hashes them."""
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


def read_ours(count: int = READ_ROWS) -> Side:
    """Our reader, which checks each row."""
    return reading(lambda path: lambda: iter_records(path, "sft"), count)


def read_theirs(count: int = READ_ROWS) -> Side:
    """datasets' streaming reader."""
    return reading(peers.streamed, count)


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
            f"{_TICKETS}, LoRA r{SFT_RANK} on NF4 layers; theirs SFTTrainer + PEFT + bitsandbytes",
            partial(_sft_ours, quantized=True),
            partial(_sft_theirs, quantized=True),
            _sft_work,
        ),
        *_preference_rows(),
        Row(
            "lora-layer",
            f"one LoRA r{LAYER_RANK} layer 576→1536, {_LAYER}",
            partial(layer_ours, 576, 1536),
            partial(layer_theirs, 576, 1536),
            partial(_layer_work, 576, 1536),
            repeats=20,
        ),
        Row(
            "lora-layer-2048",
            f"one LoRA r{LAYER_RANK} layer 2048→2048, {_LAYER}",
            partial(layer_ours, 2048, 2048),
            partial(layer_theirs, 2048, 2048),
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
            f"{READ_ROWS:,} rows of a JSONL file read and checked; theirs datasets, streaming, not checked",
            read_ours,
            read_theirs,
            _no_products,
            records=READ_ROWS,
        ),
    )
}
# one row per method and library: what `spark-ft parity` checks unless it is told otherwise
PARITY = (
    "sft-step",
    "dora-step",
    "qlora-step",
    "dpo-step-kitchen",
    "simpo-step-kitchen",
    "orpo-step-kitchen",
    "kto-kept-kitchen",
    "lora-layer",
    "nf4-dequantize",
)
