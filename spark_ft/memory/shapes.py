"""The shapes of well-known models, so that their memory is planned without the hub: `spark-ft plan`."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DENSE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
DENSE += ("head_dim", "vocab_size", "tie_word_embeddings")
_QWEN_MOE = {"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}
_GPT_OSS = {"num_experts_per_tok": 4, "sliding_window": 128}

# model_type, the fields of DENSE, and what else has a part in memory; from each model's published
# config.json. A test holds the parameter count of each to the published one.
SHAPES: dict[str, tuple[str, tuple, dict[str, object]]] = {
    "SmolLM2-135M": ("llama", (576, 1536, 30, 9, 3, 64, 49152, True), {}),
    "SmolLM2-360M": ("llama", (960, 2560, 32, 15, 5, 64, 49152, True), {}),
    "SmolLM2-1.7B": ("llama", (2048, 8192, 24, 32, 32, 64, 49152, True), {}),
    "SmolLM3-3B": ("smollm3", (2048, 11008, 36, 16, 4, 128, 128256, True), {}),
    "Llama-3.2-1B": ("llama", (2048, 8192, 16, 32, 8, 64, 128256, True), {}),
    "Llama-3.2-3B": ("llama", (3072, 8192, 28, 24, 8, 128, 128256, True), {}),
    "Llama-3.1-8B": ("llama", (4096, 14336, 32, 32, 8, 128, 128256, False), {}),
    "Llama-3.1-70B": ("llama", (8192, 28672, 80, 64, 8, 128, 128256, False), {}),
    "Llama-3.3-70B": ("llama", (8192, 28672, 80, 64, 8, 128, 128256, False), {}),
    "Mistral-7B-v0.3": ("mistral", (4096, 14336, 32, 32, 8, 128, 32768, False), {"sliding_window": None}),
    "Mistral-Nemo-12B": ("mistral", (5120, 14336, 40, 32, 8, 128, 131072, False), {"sliding_window": None}),
    "Mistral-Small-24B": ("mistral", (5120, 32768, 40, 32, 8, 128, 131072, False), {"sliding_window": None}),
    "Phi-4": ("phi3", (5120, 17920, 40, 40, 10, 128, 100352, False),
        {"sliding_window": None, "pad_token_id": 0}),
    "Phi-4-mini": ("phi3", (3072, 8192, 32, 24, 8, 128, 200064, True),
        {"sliding_window": None, "pad_token_id": 0}),
    "Gemma-3-270M": ("gemma3_text", (640, 2048, 18, 4, 1, 256, 262144, True), {"sliding_window": 512}),
    "Gemma-3-1B": ("gemma3_text", (1152, 6912, 26, 4, 1, 256, 262144, True), {"sliding_window": 512}),
    "Gemma-3-4B": ("gemma3_text", (2560, 10240, 34, 8, 4, 256, 262208, True), {"sliding_window": 1024}),
    "Gemma-3-12B": ("gemma3_text", (3840, 15360, 48, 16, 8, 256, 262208, True), {"sliding_window": 1024}),
    "Gemma-3-27B": ("gemma3_text", (5376, 21504, 62, 32, 16, 128, 262208, True), {"sliding_window": 1024}),
    "Qwen2.5-0.5B": ("qwen2", (896, 4864, 24, 14, 2, 64, 151936, True), {}),
    "Qwen2.5-1.5B": ("qwen2", (1536, 8960, 28, 12, 2, 128, 151936, True), {}),
    "Qwen2.5-3B": ("qwen2", (2048, 11008, 36, 16, 2, 128, 151936, True), {}),
    "Qwen2.5-7B": ("qwen2", (3584, 18944, 28, 28, 4, 128, 152064, False), {}),
    "Qwen2.5-14B": ("qwen2", (5120, 13824, 48, 40, 8, 128, 152064, False), {}),
    "Qwen2.5-32B": ("qwen2", (5120, 27648, 64, 40, 8, 128, 152064, False), {}),
    "Qwen2.5-72B": ("qwen2", (8192, 29568, 80, 64, 8, 128, 152064, False), {}),
    "DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2", (1536, 8960, 28, 12, 2, 128, 151936, False), {}),
    "Qwen3-0.6B": ("qwen3", (1024, 3072, 28, 16, 8, 128, 151936, True), {}),
    "Qwen3-1.7B": ("qwen3", (2048, 6144, 28, 16, 8, 128, 151936, True), {}),
    "Qwen3-4B": ("qwen3", (2560, 9728, 36, 32, 8, 128, 151936, True), {}),
    "Qwen3-8B": ("qwen3", (4096, 12288, 36, 32, 8, 128, 151936, False), {}),
    "Qwen3-14B": ("qwen3", (5120, 17408, 40, 40, 8, 128, 151936, False), {}),
    "Qwen3-32B": ("qwen3", (5120, 25600, 64, 64, 8, 128, 151936, False), {}),
    "Qwen3-30B-A3B": ("qwen3_moe", (2048, 6144, 48, 32, 4, 128, 151936, False),
        {"moe_intermediate_size": 768, **_QWEN_MOE}),
    "Qwen3-235B-A22B": ("qwen3_moe", (4096, 12288, 94, 64, 4, 128, 151936, False),
        {"moe_intermediate_size": 1536, **_QWEN_MOE}),
    "gpt-oss-20b": ("gpt_oss", (2880, 2880, 24, 64, 8, 64, 201088, False),
        {"num_local_experts": 32, **_GPT_OSS}),
    "gpt-oss-120b": ("gpt_oss", (2880, 2880, 36, 64, 8, 64, 201088, False),
        {"num_local_experts": 128, **_GPT_OSS}),
    "Mixtral-8x7B": ("mixtral", (4096, 14336, 32, 32, 8, 128, 32000, False),
        {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
}  # fmt: skip
# What is trained further has the shape of what it came from.
SAME_SHAPE = {
    "deepseek-r1-distill-qwen-7b": "qwen2.5-7b",
    "deepseek-r1-distill-qwen-14b": "qwen2.5-14b",
    "deepseek-r1-distill-qwen-32b": "qwen2.5-32b",
    "deepseek-r1-distill-llama-8b": "llama-3.1-8b",
    "deepseek-r1-distill-llama-70b": "llama-3.3-70b",
    "deepseek-r1-0528-qwen3-8b": "qwen3-8b",
    "llama-3-8b": "llama-3.1-8b",
    "llama-3-70b": "llama-3.1-70b",
    "mistral-7b": "mistral-7b-v0.3",
    "mixtral-8x7b-v0.1": "mixtral-8x7b",
    "qwq-32b": "qwen2.5-32b",
}
# Parts of a hub name that tell how a model was trained on, stored or named, and nothing about its shape:
# families' owners in front (Meta-Llama), purposes, dates (2507), versions of one shape (Mistral-Small-3.2),
# formats.
_TOLD_BY_NAME = re.compile(
    r"-(?:instruct|it|pt|base|chat|thinking|coder|math|reasoning|plus|hf|unsloth|bnb|4bit|8bit|bf16|fp8|nvfp4|mxfp4|int4"
    r"|int8|gguf|awq|gptq|mlx|dynamic|qat|q4|preview|2[2-9](?:0[1-9]|1[0-2]))(?=-|$)"
)


def known_config(name: str | os.PathLike) -> "PretrainedConfig":
    """The transformers config of a model in `SHAPES`, or of a folder with a config.json; nothing is fetched.

    Names are taken as they are on the hub: the owner, "-Instruct" and its like, a date, and what a re-upload
        adds ("unsloth/Qwen3-4B-Instruct-2507-bnb-4bit") may be there or not.

    Raises:
        ValueError: neither, or the config.json can't be read; lists the names that there are.
    """
    from transformers import AutoConfig

    folder = Path(name)
    if (folder / "config.json").is_file():
        try:
            return AutoConfig.from_pretrained(folder)
        except Exception as error:  # whatever an odd file makes transformers raise
            raise ValueError(
                f"{folder / 'config.json'}: not a config that transformers reads ({error})"
            ) from error
    wanted = _plain_name(str(name))
    wanted = SAME_SHAPE.get(wanted, wanted)
    for known, (model_type, numbers, more) in SHAPES.items():
        if _plain_name(known) == wanted:
            fields = dict(zip(DENSE, numbers, strict=True))
            return AutoConfig.for_model(model_type, **fields, **more)
    known = ", ".join(SHAPES)
    raise ValueError(
        f'"{name}" is neither a folder with a config.json nor a model whose shape is known: {known}'
    )


def _plain_name(name: str) -> str:
    plain = name.rstrip("/").rpartition("/")[2].lower().replace("_", "-").removeprefix("meta-")
    plain = re.sub(r"(mistral-small|mistral-nemo)-3(?:\.\d)?(?=-|$)", r"\1", plain)
    plain = _TOLD_BY_NAME.sub("", plain)
    return re.sub(r"(mistral-(?:small|nemo))-(?:24b|12b)", r"\1", plain)


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


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
) -> str:
    """A step's memory term by term, whether it fits here and on a DGX Spark, and the least time it takes
    there.

    The arguments are those of `spark-ft plan`.

    Raises:
        ValueError: the model is unknown, its config cannot be planned, or an argument is out of range.
    """
    import torch

    from spark_ft.memory.guard import fit_report
    from spark_ft.memory.machine import DGX_SPARK, DGX_SPARK_SPEED, budget
    from spark_ft.memory.plan import plan_training

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
                device=device,
            )
            for device in {"cuda", "cpu" if here.device == "cpu" else "cuda"}
        }
    except ValueError:
        raise
    except Exception as error:  # whatever an odd config makes of a model
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{model}: a model of this config cannot be built ({said}); correct it") from error
    plan = plans["cuda"]
    seconds, speed = plan.floor(DGX_SPARK_SPEED), DGX_SPARK_SPEED
    return (
        f"{plan}\n\n"
        f"this machine   {fit_report(plans['cpu' if here.device == 'cpu' else 'cuda'], here)}\n"
        f"a DGX Spark    {fit_report(plan, DGX_SPARK)}\n"
        f"               {seconds:.2f} s a step at least: {plan.flops / 1e12:.0f} TFLOP at "
        f"{speed.flops / 1e12:.0f} TFLOP/s, {plan.moved / 1e9:.0f} GB moved at "
        f"{speed.bandwidth / 1e9:.0f} GB/s"
    )
