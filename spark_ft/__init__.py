"""spark_ft: LLM fine-tuning methods from scratch, proved equal to PEFT, TRL and bitsandbytes, and the labs around them.

Every public name can be imported from here; its module is loaded only then, so that `import spark_ft` is instant.
"""

from importlib import import_module

from spark_ft.version import __version__

_HOME = {
    "methods.lora": ("LoRALinear",),
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
    "data": (
        "collate_sft",
        "completion_logps",
        "iter_records",
        "read_records",
        "render",
        "sequence_logps",
        "sft_batches",
    ),
    "training": ("History", "TrainConfig", "sft_loss", "train"),
    "evaluation": ("exact_match", "field_f1", "generate", "mean_interval", "perplexity", "wilson_interval"),
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
