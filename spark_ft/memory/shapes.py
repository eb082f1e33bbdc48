"""The shapes of well-known dense models, so that their memory is planned without the hub: `spark-ft plan`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# From each model's published config.json; a test holds the parameter count of each to the published one. What is not here
# (positions, RoPE, ε) has no part in memory.
SHAPES = {
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "SmolLM2-360M": ("llama", 960, 2560, 32, 15, 5, 64, 49152, True),
    "SmolLM2-1.7B": ("llama", 2048, 8192, 24, 32, 32, 64, 49152, True),
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "Llama-3.1-70B": ("llama", 8192, 28672, 80, 64, 8, 128, 128256, False),
    "Llama-3.3-70B": ("llama", 8192, 28672, 80, 64, 8, 128, 128256, False),
    "Mistral-7B-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, False),
    "Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "Qwen2.5-14B": ("qwen2", 5120, 13824, 48, 40, 8, 128, 152064, False),
    "Qwen2.5-32B": ("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False),
    "Qwen2.5-72B": ("qwen2", 8192, 29568, 80, 64, 8, 128, 152064, False),
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "Qwen3-14B": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
    "Qwen3-32B": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False),
}


def known_config(name: str | os.PathLike) -> "PretrainedConfig":
    """The transformers config of a model in `SHAPES` ("Llama-3.3-70B", "Qwen/Qwen3-8B"), or of a folder with a config.json.

    A hub id's owner and the endings -Instruct and -Base may be there or not. Nothing is fetched.

    Raises:
        ValueError: neither; lists the names that there are.
    """
    from transformers import AutoConfig

    if (Path(name) / "config.json").is_file():
        try:
            return AutoConfig.from_pretrained(name)
        except Exception as error:  # transformers raises of every kind, by what is wrong with the file
            said = " ".join(str(error).split())
            raise ValueError(
                f"{name}/config.json: transformers cannot read it ({said}); correct it"
            ) from error
    wanted = str(name).rpartition("/")[2].lower().removesuffix("-instruct").removesuffix("-base")
    for known, shape in SHAPES.items():
        if known.lower() == wanted:
            return AutoConfig.for_model(**dict(zip(_FIELDS, shape, strict=True)))
    raise ValueError(
        f'"{name}" is neither a folder with a config.json nor a model whose shape is known: {", ".join(SHAPES)}'
    )


def plan_report(
    model: str,
    method: str = "lora",
    task: str = "sft",
    batch: int = 1,
    seq: int = 2048,
    rank: int = 16,
    dtype: str = "bf16",
    adapter_dtype: str = "fp32",
    accumulation: int = 1,
    no_checkpointing: bool = False,
    whole_logits: bool = False,
) -> str:
    """A run's memory term by term, and whether it fits this machine and a DGX Spark; arguments as of `spark-ft plan`.

    Raises:
        ValueError: the model is unknown, its config cannot be planned, or an argument is out of range.
    """
    import torch

    from spark_ft.memory.machine import DGX_SPARK, budget
    from spark_ft.memory.plan import LOGIT_ROWS, fits, plan_training

    config, here = known_config(model), budget()
    try:
        plans = {
            device: plan_training(
                config,
                method,
                task=task,
                batch_size=batch,
                length=seq,
                rank=rank,
                dtype=getattr(torch, DTYPES[dtype]),
                adapter_dtype=getattr(torch, DTYPES[adapter_dtype]),
                gradient_accumulation_steps=accumulation,
                checkpointing=not no_checkpointing,
                logit_rows=None if whole_logits else LOGIT_ROWS,
                device=device,
            )
            for device in ("cuda", "cpu")
        }
    except ValueError:
        raise
    except Exception as error:  # whatever an odd config makes of a model
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{model}: a model of this config cannot be built ({said}); correct it") from error
    return (
        f"{plans['cuda']}\n\n"
        f"this machine   {fits(plans['cpu' if here.device == 'cpu' else 'cuda'], here)}\n"
        f"a DGX Spark    {fits(plans['cuda'], DGX_SPARK)}"
    )
