"""Memory, told truly: what a training step needs, what the machine has, what a block of code took."""

from spark_ft.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "plan": ("MemoryPlan", "plan_training"),
        "machine": ("MemoryBudget", "budget", "measure"),
        "shapes": ("known_config",),
    },
)
