"""spark_ft beside other libraries: `peers` makes their objects, `cases` the rows, `harness` measures."""

import logging
import warnings


def quiet_known_messages() -> None:
    """Filter three messages of other libraries that say nothing about your run, and no others.

    bitsandbytes logs that an optional CPU kernel is not installed; PEFT 0.21 reads a flag that transformers
    5 renamed; TRL keeps SimPO, ORPO and KTO in a part that may still change.
    """
    warnings.filterwarnings("ignore", message=r"You are importing from 'trl\.experimental'")
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit")
    )
