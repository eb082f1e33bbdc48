"""Data: records, formats, cleaning, chat templates, batches and pairs. Nothing here knows a model."""

from spark_ft.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "records": ("check_records", "iter_records", "read_records", "write_records"),
        "chat": ("IGNORE", "all_answers", "last_answer", "render", "whole_conversation", "whole_text"),
        "batches": (
            "collate_feedback",
            "collate_preferences",
            "collate_sft",
            "feedback_batches",
            "preference_batches",
            "sft_batches",
            "with_prompt",
        ),
    },
)
