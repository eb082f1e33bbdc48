"""Lab 3.1.4: the whole fine-tune, and the control that must fail."""

from dataclasses import asdict
from statistics import mean

from spark_ft.embedded import EMBEDDED
from spark_ft.evaluation import greedy_match
from spark_ft.lab import kitchen
from spark_ft.lab.experiments.common import TEST, TRAIN, tune
from spark_ft.lab.experiments.runner import experiment
from spark_ft.models import load_tokenizer

SETTINGS = {"steps": 80, "learning_rate": 2e-3, "batch_size": 8, "warmup_steps": 8, "betas": (0.9, 0.99)}


@experiment(
    settings={**SETTINGS, "adapter": asdict(kitchen.ADAPTER)},
    code=[kitchen.tickets, tune, greedy_match, kitchen.with_shuffled_answers],
    data=[TRAIN, TEST],
)
def kitchen_finetune(seed: int, first: int | None = None) -> dict:
    """Held-out exact match after training on true answers, and after as many steps on shuffled ones."""
    rows, test = kitchen.tickets("train"), kitchen.tickets("test")
    tokenizer = load_tokenizer(EMBEDDED)
    groups = {
        "seen": [row for row in test if row["phrasing"] == "seen"],
        "unseen phrasings": [row for row in test if row["phrasing"] == "unseen" and row["dishes"] == "seen"],
        "unseen phrasings and dishes": [row for row in test if row["dishes"] == "unseen"],
    }
    model, history = tune(rows, seed, adapter=kitchen.ADAPTER, first=first, **SETTINGS)
    figures = {"first_losses": history.losses[:5], "last_loss": mean(history.losses[-5:])}
    figures |= {name: mean(greedy_match(model, tokenizer, group)) for name, group in groups.items()}
    print(f"seed {seed}: {figures}", flush=True)
    shuffled = kitchen.with_shuffled_answers(rows, seed)
    model, history = tune(shuffled, seed, adapter=kitchen.ADAPTER, first=first, **SETTINGS)
    figures["shuffled_last_loss"] = mean(history.losses[-5:])
    figures["shuffled"] = mean(greedy_match(model, tokenizer, groups["seen"]))
    return figures
