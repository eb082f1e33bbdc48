"""Every object of PEFT, TRL, bitsandbytes and datasets that the bench and the parity cells compare with."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    import datasets
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=tempfile.gettempdir(),  # nothing is written: no step of `trainer.train()` is taken
        completion_only_loss=completion_only,
        assistant_only_loss=assistant_only,
        max_length=max_length,
        per_device_train_batch_size=len(rows),
        learning_rate=learning_rate,
        max_grad_norm=max_grad_norm,
        use_cpu=next(model.parameters()).device.type == "cpu",
        bf16=False,
        activation_checkpointing=False,  # the new name of gradient_checkpointing
        packing=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset = datasets.Dataset.from_list(rows)
        trainer = SFTTrainer(
            model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter
        )
    finally:
        if not silent:
            datasets.enable_progress_bars()
    trainer.current_gradient_accumulation_steps = 1  # as `trainer.train()` sets it
    return trainer


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
