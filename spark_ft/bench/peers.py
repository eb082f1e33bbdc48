"""Every object of PEFT, TRL, bitsandbytes and datasets that the bench and the parity cells compare with."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from spark_ft.data.chat import IGNORE, conversation, render_turns
from spark_ft.embedded import embedded_folder
from spark_ft.models import load_tokenizer

# ── PEFT ────────────────────────────────────────────────────────────────────────────────────────────────────


def peft_config(
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    dora: bool = False,
    targets: str | list[str] = "all-linear",
):
    """PEFT's LoraConfig with the settings of an `AdapterConfig`."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )


def peft_layers(model: nn.Module, config) -> nn.Module:
    """Put PEFT's adapter layers into a model, in place; its base weights are frozen."""
    from peft import inject_adapter_in_model

    return inject_adapter_in_model(config, model).train()


def peft_layer(base: nn.Linear, rank: int, alpha: float = 32.0, dora: bool = False) -> nn.Module:
    """PEFT's LoRA or DoRA layer around one linear layer."""
    return peft_layers(nn.Sequential(base), peft_config(rank, alpha, dora=dora, targets=["0"]))[0]


def peft_model(model: nn.Module, folder: str) -> nn.Module:
    """PEFT's model with the adapter in a folder, ready to train."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder, is_trainable=True).train()


def our_name(name: str) -> str:
    """The name that spark_ft gives to a parameter of PEFT's adapters."""
    name = name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "magnitude")
    return name.removesuffix(".weight").removesuffix(".default")


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────────────────


def sft_trainer(
    model: nn.Module,
    tokenizer,
    rows: list[dict[str, Any]],
    adapter=None,
    *,
    completion_only: bool = True,
    assistant_only: bool = False,
    max_length: int | None = None,
    learning_rate: float = 1e-4,
    max_grad_norm: float = 1.0,
):
    """TRL's SFTTrainer over these rows, all of them one batch, in fp32; nothing is written.

    Args:
        rows: messages, prompt and completion, or `input_ids` and `completion_mask`, which TRL leaves alone.
        adapter: a `peft_config`, or None.
        completion_only, assistant_only: which tokens TRL learns.
        max_length, learning_rate, max_grad_norm: as in TRL.
    """
    from trl import SFTConfig, SFTTrainer

    settings = {
        "completion_only_loss": completion_only,
        "assistant_only_loss": assistant_only,
        "max_length": max_length,
        "learning_rate": learning_rate,
        "max_grad_norm": max_grad_norm,
        "packing": False,
    }
    return _trainer(SFTTrainer, SFTConfig, model, tokenizer, rows, adapter, settings)


def dpo_trainer(
    model: nn.Module,
    tokenizer,
    rows: list[dict[str, str]],
    adapter,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    keep_reference: bool = False,
    learning_rate: float = 1e-4,
):
    """TRL's DPOTrainer over these rows, as `sft_trainer`.

    Args:
        rows: prompt, chosen and rejected as text that is tokenized as it is.
        loss_type, beta, label_smoothing: as in TRL.
        keep_reference: TRL's `precompute_ref_log_probs`.
    """
    from trl import DPOConfig, DPOTrainer

    settings = {
        "loss_type": [loss_type],
        "beta": beta,
        "label_smoothing": label_smoothing,
        "precompute_ref_log_probs": keep_reference,
        "learning_rate": learning_rate,
    }
    return _trainer(DPOTrainer, DPOConfig, model, tokenizer, rows, adapter, settings)


def kto_trainer(
    model: nn.Module,
    tokenizer,
    rows: list[dict[str, Any]],
    adapter,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    keep_reference: bool = False,
    learning_rate: float = 1e-4,
):
    """TRL's KTOTrainer over these rows (prompt, completion, label), as `dpo_trainer`."""
    from trl import KTOConfig, KTOTrainer

    settings = {
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
        "precompute_ref_log_probs": keep_reference,
        "learning_rate": learning_rate,
    }
    return _trainer(KTOTrainer, KTOConfig, model, tokenizer, rows, adapter, settings)


def simpo_trainer(
    model: nn.Module,
    tokenizer,
    rows: list[dict[str, str]],
    adapter,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    learning_rate: float = 1e-4,
):
    """TRL's CPOTrainer with the settings that make it SimPO, over rows as `dpo_trainer` takes them."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    settings = {
        "loss_type": "simpo",
        "cpo_alpha": 0.0,
        "beta": beta,
        "simpo_gamma": gamma,
        "max_length": 1024,
        "remove_unused_columns": False,
        "learning_rate": learning_rate,
    }
    return _trainer(CPOTrainer, CPOConfig, model, tokenizer, rows, adapter, settings)


def orpo_trainer(
    model: nn.Module,
    tokenizer,
    rows: list[dict[str, str]],
    adapter,
    *,
    weight: float = 0.1,
    learning_rate: float = 1e-4,
):
    """TRL's ORPOTrainer, whose `beta` is ORPO's λ, over rows as `dpo_trainer` takes them."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    settings = {
        "beta": weight,
        "max_length": 1024,
        "remove_unused_columns": False,
        "learning_rate": learning_rate,
    }
    return _trainer(ORPOTrainer, ORPOConfig, model, tokenizer, rows, adapter, settings)


def _trainer(trainer, config, model: nn.Module, tokenizer, rows: list[dict], adapter, settings: dict):
    import datasets

    arguments = config(
        output_dir=tempfile.gettempdir(),  # nothing is written: no step of `trainer.train()` is taken
        per_device_train_batch_size=len(rows),
        use_cpu=next(model.parameters()).device.type == "cpu",
        bf16=False,
        activation_checkpointing=False,  # the new name of gradient_checkpointing
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        data = datasets.Dataset.from_list(rows)
        with patch.dict(os.environ, TQDM_DISABLE="1"):
            built = trainer(
                model=model,
                args=arguments,
                train_dataset=data,
                processing_class=tokenizer,
                peft_config=adapter,
            )
    finally:
        if not silent:
            datasets.enable_progress_bars()
    built.current_gradient_accumulation_steps = 1  # as `trainer.train()` sets it
    return built


class TrlNumbers(NamedTuple):
    """TRL's loss on a batch, the log-probabilities it was made from, and its slopes with respect to them."""

    loss: Tensor
    logps: tuple[Tensor, ...]  # in the order in which our loss takes them, so those of the policy first
    slopes: tuple[Tensor, ...]  # for each of the policy's
    tokens: tuple[Tensor, ...] = ()  # completion tokens of each sequence, where `logps` are sums


def text_rows(records: list[dict[str, Any]], tokenizer) -> list[dict[str, Any]]:
    """Preference or feedback records as texts that TRL tokenizes to the ids that we train on."""
    rows = []
    for record in records:
        fields = ("completion",) if "completion" in record else ("chosen", "rejected")
        row = {"label": record["label"]} if "label" in record else {}
        for field in fields:
            prompt, answer = render_turns(conversation(record, field), tokenizer)
            row |= {"prompt": tokenizer.decode(prompt), field: tokenizer.decode(answer)}
        rows.append(row)
    return rows


def trl_batch(trainer) -> dict[str, Any]:
    """The trainer's own batch."""
    return next(iter(trainer.get_train_dataloader()))


def trl_tokens(trainer) -> list[tuple[list[int], list[bool]]]:
    """Ids of each sequence in the trainer's batch and which of them are scored, sorted."""
    batch, found = trl_batch(trainer), []
    for side in ("", "chosen_", "rejected_", "KL_"):
        if f"{side}input_ids" in batch:
            scored = batch.get(f"{side}completion_mask", batch.get(f"{side}labels"))
            scored = scored > 0 if f"{side}completion_mask" in batch else scored != IGNORE
            real = batch[f"{side}attention_mask"].bool()
            rows = zip(batch[f"{side}input_ids"], scored, real, strict=True)
            found += [(ids[mask].tolist(), said[mask].tolist()) for ids, said, mask in rows]
    return sorted(found)


def dpo_numbers(trainer) -> TrlNumbers:
    """chosen, rejected, ref_chosen and ref_rejected of a DPOTrainer's batch, as sums."""
    batch = trl_batch(trainer)
    loss, (policy, reference) = _log_probs(trainer, batch)
    said = batch["completion_mask"][:, 1:]
    slopes = (torch.autograd.grad(loss, policy)[0] * said).sum(1) / said.sum(1)  # alike for all of a row
    sums = [x for logps in (policy, reference) for x in logps.detach().sum(1).chunk(2)]
    return TrlNumbers(loss.detach(), tuple(sums), slopes.chunk(2), said.sum(1).chunk(2) * 2)


def kto_numbers(trainer) -> TrlNumbers:
    """policy, reference, desirable and the KL before it is clamped, of a KTOTrainer's batch."""
    batch = trl_batch(trainer)
    loss, (mismatched, policy, ref_mismatched, reference) = _log_probs(trainer, batch)
    said = batch["completion_mask"][:, 1:]
    slopes = (torch.autograd.grad(loss, policy)[0] * said).sum(1) / said.sum(1)
    kl = (mismatched - ref_mismatched).sum(1).mean()
    sums = policy.detach().sum(1), reference.sum(1), batch["label"].bool(), kl
    return TrlNumbers(loss.detach(), sums, (slopes,))


def odds_numbers(trainer) -> TrlNumbers:
    """chosen and rejected (means) and the NLL of a CPOTrainer's or an ORPOTrainer's batch; CPO's may be 0."""
    batch, found = trl_batch(trainer), []

    def forward(*arguments):
        found.extend(own(*arguments))
        return tuple(found)

    own = trainer.concatenated_forward
    with patch.object(trainer, "concatenated_forward", forward):
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    chosen, rejected, _, _, nll = found
    slopes = torch.autograd.grad(loss, (chosen, rejected))
    return TrlNumbers(loss.detach(), (chosen.detach(), rejected.detach(), nll.detach()), slopes)


def _log_probs(trainer, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The trainer's loss, and the log-probabilities that each of its passes returned, with their graph."""
    passes: list[Tensor] = []
    hook = trainer.model.register_forward_hook(lambda _, __, output: passes.append(output.log_probs))
    try:
        return trainer.compute_loss(trainer.model, dict(batch)), passes
    finally:
        hook.remove()


# ── bitsandbytes ────────────────────────────────────────────────────────────────────────────────────────────


def bitsandbytes_nf4(weight: Tensor, double_quant: bool) -> tuple[Tensor, Any, Callable[[], Tensor]]:
    """bitsandbytes' NF4 bytes of a weight, its QuantState, and a function that dequantizes them."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    return packed, state, lambda: dequantize_4bit(packed, state)


def bitsandbytes_model(folder: Path):
    """A folder's model, quantized to NF4 by bitsandbytes unless it is already, and its tokenizer; in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    told = {}
    if not hasattr(AutoConfig.from_pretrained(folder), "quantization_config"):
        told["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **told, dtype=torch.float32)
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            # else a forward pass in eval mode repacks the weights, and gradients are wrong from then on
            layer.support_avx512bf16_for_cpu = False
    return model, load_tokenizer(folder)


@lru_cache
def four_bit_folder() -> Path:
    """The embedded model as bitsandbytes quantizes it, saved: both sides start from the same bytes."""
    model, tokenizer = bitsandbytes_model(embedded_folder())
    folder = Path(tempfile.mkdtemp(prefix="spark-ft-bench-"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weakref.finalize(four_bit_folder, shutil.rmtree, folder)
    return folder


# ── datasets ────────────────────────────────────────────────────────────────────────────────────────────────


def streamed(path: Path) -> Callable[[], Iterator[dict]]:
    """A function that goes once through the rows of a JSONL file with datasets' streaming."""
    from datasets import load_dataset

    return load_dataset("json", data_files=str(path), split="train", streaming=True).__iter__
