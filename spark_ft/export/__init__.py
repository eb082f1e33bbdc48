"""Out of the notebook: merged weights as safetensors or GGUF, a check, a real server, and Ollama."""

from spark_ft.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "gguf": ("export_adapter", "export_gguf"),
        "folder": ("export_safetensors",),
        "verify": ("Verification", "verify_gguf"),
        "server": ("serve",),
        "ollama": ("Ollama", "write_modelfile"),
    },
)
