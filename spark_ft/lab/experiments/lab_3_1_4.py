"""The stored runs of lab 3.1.4: the whole fine-tune, and the control that must fail."""

from statistics import mean

import torch

from spark_ft.adapters import add_adapters
from spark_ft.evaluation import greedy_match
from spark_ft.lab import kitchen
from spark_ft.lab.experiments.runner import experiment
from spark_ft.models import PROFILES, load_model


def fine_tuned(records: list[dict], seed: int, steps: int):
    """A fresh adapter trained on `records`: (model, tokenizer, history)."""
    model, tokenizer = load_model()
    torch.manual_seed(seed)
    add_adapters(model, kitchen.ADAPTER)
    history = kitchen.fine_tune(model, tokenizer, records, seed, steps=steps)
    return model, tokenizer, history


@experiment(
    settings={
        "profile": "laptop",
        "steps": 80,
        "steps of the control": 40,
        "learning_rate": PROFILES["laptop"].learning_rate,
        "adapter": str(kitchen.ADAPTER),
    },
    code=[
        fine_tuned,
        kitchen.fine_tune,
        kitchen.run_config,
        greedy_match,
        kitchen.with_shuffled_answers,
    ],
    data=[f"data/kitchen_tickets/{split}.jsonl" for split in ("train", "test")],
)
def kitchen_finetune(seed: int, steps: int = 80) -> dict:
    """Held-out exact match after training on true answers, and on shuffled ones for half as many steps."""
    rows, test = kitchen.tickets("train"), kitchen.tickets("test")
    groups = {
        "seen": [row for row in test if row["phrasing"] == "seen"],
        "unseen phrasings": [row for row in test if row["phrasing"] == "unseen" and row["dishes"] == "seen"],
        "unseen phrasings and dishes": [row for row in test if row["dishes"] == "unseen"],
    }
    model, tokenizer, history = fine_tuned(rows, seed, steps)
    figures = {"first_losses": history.losses[:5], "last_loss": mean(history.losses[-5:])}
    figures |= {name: mean(greedy_match(model, tokenizer, group)) for name, group in groups.items()}
    print(f"seed {seed}: {figures}", flush=True)
    model, tokenizer, history = fine_tuned(kitchen.with_shuffled_answers(rows, seed), seed, steps // 2)
    figures["shuffled_last_loss"] = mean(history.losses[-5:])
    figures["shuffled"] = mean(greedy_match(model, tokenizer, groups["seen"]))
    return figures
