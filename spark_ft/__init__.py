"""LLM fine-tuning methods from scratch, proved equal to PEFT, TRL and bitsandbytes, and the labs around them.

Every public name can be imported from here. Its module is loaded only then, so `import spark_ft` is instant.
"""

from spark_ft.lazy import lazy_names
from spark_ft.version import __version__

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "methods.lora": ("LoRALinear",),
        "methods.dora": ("DoRALinear", "row_norm"),
        "methods.neftune": ("neftune", "neftune_noise"),
        "methods.nf4": ("NF4_CODE", "NF4Linear", "NF4Tensor", "quantize_nf4"),
        "methods.logprobs": ("chunked_logps", "token_logps"),
        "methods.preference": (
            "apo_down_loss",
            "apo_zero_loss",
            "cdpo_loss",
            "dpo_loss",
            "implicit_reward",
            "ipo_loss",
            "kto_loss",
            "orpo_loss",
            "robust_dpo_loss",
            "simpo_loss",
        ),
        "adapters": (
            "AdapterConfig",
            "adapters_disabled",
            "add_adapters",
            "load_adapters",
            "merge_adapters",
            "save_adapters",
            "use_adapter",
        ),
        "models": ("load_model", "load_tokenizer", "profile"),
        "memory.plan": ("MemoryPlan", "plan_training"),
        "memory.machine": ("MemoryBudget", "budget", "measure"),
        "memory.shapes": ("known_config",),
        "data.records": ("check_records", "iter_records", "read_records", "write_records"),
        "data.chat": ("all_answers", "last_answer", "render", "whole_conversation", "whole_text"),
        "data.batches": (
            "collate_feedback",
            "collate_preferences",
            "collate_sft",
            "feedback_batches",
            "preference_batches",
            "sft_batches",
            "with_prompt",
        ),
        "scoring": ("completion_logps", "pair_logps", "sequence_logps", "sft_loss"),
        "preferences": ("ReferenceLogps", "feedback_loss", "preference_loss"),
        "data.formats": (
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
        "data.cleaning": (
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
        "data.pairs": ("balance_lengths", "judged_pairs", "length_baseline", "length_ratio"),
        "training": ("History", "TrainConfig", "train"),
        "evaluation": ("exact_match", "field_f1", "generate", "perplexity", "sample"),
        "stats": ("mean_interval", "paired_difference", "wilson_interval"),
    },
)
__all__ += ["__version__"]
