"""The shapes of well-known dense models, so that their memory is planned without the hub: `spark-ft plan`."""

import argparse
import os
import sys
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
        return AutoConfig.from_pretrained(name)
    wanted = str(name).rpartition("/")[2].lower().removesuffix("-instruct").removesuffix("-base")
    for known, shape in SHAPES.items():
        if known.lower() == wanted:
            return AutoConfig.for_model(**dict(zip(_FIELDS, shape, strict=True)))
    raise ValueError(
        f'"{name}" is neither a folder with a config.json nor a model whose shape is known: {", ".join(SHAPES)}'
    )


def main(arguments: list[str] | None = None) -> int:
    """Print a run's memory term by term, and whether it fits this machine and a DGX Spark."""
    import torch

    from spark_ft.adapters import METHODS
    from spark_ft.memory import TASKS
    from spark_ft.memory.machine import DGX_SPARK, budget
    from spark_ft.memory.plan import LOGIT_ROWS, fits, plan_training

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    parser = argparse.ArgumentParser(
        prog="spark-ft plan",
        description="The memory of a training step, term by term, counted from the model's shape; nothing is loaded.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="models:\n  " + "\n  ".join(SHAPES),
    )
    parser.add_argument("model", help="a name below, its hub id, or a folder with a config.json")
    parser.add_argument("--method", choices=METHODS, default="lora", help="default lora")
    parser.add_argument(
        "--task", choices=TASKS, default="sft", help="default sft; a preference pair is two rows"
    )
    parser.add_argument("--batch", type=int, default=1, help="rows or pairs at once (default 1)")
    parser.add_argument("--seq", type=int, default=2048, help="tokens a row (default 2048)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    parser.add_argument(
        "--dtype", choices=dtypes, default="bf16", help="of weights that are not 4-bit (default bf16)"
    )
    parser.add_argument(
        "--adapter-dtype",
        choices=dtypes,
        default="fp32",
        help="of adapters, gradients, moments (default fp32)",
    )
    parser.add_argument(
        "--accumulation", type=int, default=1, help="parts that a step is computed in (default 1)"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations for backward")
    parser.add_argument(
        "--whole-logits", action="store_true", help="all logits at once, as transformers' own loss"
    )
    options = parser.parse_args(arguments)
    try:
        config = known_config(options.model)
        here = budget()
        plans = {
            device: plan_training(
                config,
                options.method,
                task=options.task,
                batch_size=options.batch,
                length=options.seq,
                rank=options.rank,
                dtype=dtypes[options.dtype],
                adapter_dtype=dtypes[options.adapter_dtype],
                gradient_accumulation_steps=options.accumulation,
                checkpointing=not options.no_checkpointing,
                logit_rows=None if options.whole_logits else LOGIT_ROWS,
                device=device,
            )
            for device in ("cuda", "cpu")
        }
    except ValueError as error:
        print(f"spark-ft plan: {error}", file=sys.stderr)
        return 1
    print(plans["cuda"], end="\n\n")
    print(f"this machine   {fits(plans['cpu' if here.device == 'cpu' else 'cuda'], here)}")
    print(f"a DGX Spark    {fits(plans['cuda'], DGX_SPARK)}")
    return 0
