"""spark_ft: LLM fine-tuning methods from scratch, proved equal to PEFT, TRL and bitsandbytes, and the labs around them.

Every public name can be imported from here; its module is loaded only then, so that `import spark_ft` is instant.
"""

from importlib import import_module

from spark_ft.version import __version__

_HOME = {
    "methods.lora": ("LoRALinear",),
    "methods.dora": ("DoRALinear",),
    "methods.neftune": ("neftune", "neftune_noise"),
    "methods.nf4": ("NF4_CODE", "NF4Linear", "NF4Tensor", "quantize_nf4"),
    "methods.logprobs": ("token_logps", "chunked_logps"),
    "adapters": (
        "AdapterConfig",
        "adapters_disabled",
        "add_adapters",
        "load_adapters",
        "merge_adapters",
        "save_adapters",
    ),
    "models": ("load_model", "load_tokenizer", "profile"),
    "memory": ("MemoryBudget", "MemoryPlan", "budget", "measure", "plan_training"),
    "shapes": ("known_config",),
    "records": ("check_records", "iter_records", "read_records", "write_records"),
    "data": (
        "all_answers",
        "collate_feedback",
        "collate_preferences",
        "collate_sft",
        "completion_logps",
        "feedback_batches",
        "last_answer",
        "preference_batches",
        "render",
        "sequence_logps",
        "sft_batches",
        "whole_conversation",
        "with_prompt",
    ),
    "formats": (
        "alpaca_to_messages",
        "chatml_to_messages",
        "from_dataset",
        "messages_to_alpaca",
        "messages_to_chatml",
        "messages_to_sft",
        "messages_to_sharegpt",
        "pairs_to_thumbs",
        "ratings_to_thumbs",
        "sft_to_messages",
        "sharegpt_to_messages",
        "thumbs_to_pairs",
        "to_dataset",
    ),
    "cleaning": (
        "clean",
        "drop_broken_encoding",
        "drop_cut_off",
        "drop_exact_duplicates",
        "drop_leaked",
        "drop_near_duplicates",
        "drop_refusals",
        "drop_repetition",
        "mend_encoding",
    ),
    "pairs": ("balance_lengths", "judged_pairs", "length_baseline", "length_ratio", "sample"),
    "training": ("History", "TrainConfig", "sft_loss", "train"),
    "evaluation": (
        "exact_match",
        "field_f1",
        "generate",
        "mean_interval",
        "paired_difference",
        "perplexity",
        "wilson_interval",
    ),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE)]


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module 'spark_ft' has no attribute {name!r}")
    value = getattr(import_module(f"spark_ft.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
