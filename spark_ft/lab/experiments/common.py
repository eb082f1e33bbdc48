"""What all experiments share: how the embedded model is trained, and how it is scored on held-out rows."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.data.batches import collate_sft, sft_batches
from spark_ft.embedded import EMBEDDED
from spark_ft.lab.kitchen import ADAPTER
from spark_ft.methods.neftune import neftune
from spark_ft.models import load_model, load_tokenizer
from spark_ft.scoring import completion_hidden, head_logits, sft_loss
from spark_ft.training import History, TrainConfig, cosine, train

TRAIN, VALIDATION, TEST = (f"data/kitchen_tickets/{split}.jsonl" for split in ("train", "validation", "test"))
SHORT_RUN = {"steps": 20, "learning_rate": 2e-3, "batch_size": 4, "warmup_steps": 3}


def tune(
    rows: Sequence[dict],
    seed: int,
    *,
    steps: int,
    learning_rate: float,
    adapter: AdapterConfig | Callable[[nn.Module], object] = ADAPTER,
    model: nn.Module | None = None,
    batch_size: int = 4,
    warmup_steps: int = 3,
    betas: tuple[float, float] = (0.9, 0.999),
    noise: float = 0.0,
    first: int | None = None,
) -> tuple[nn.Module, History]:
    """Train the embedded model on rows; the seed draws the adapters' start, the rows' order and the noise.

    Args:
        steps, learning_rate, warmup_steps, betas: as in `TrainConfig`; the rate falls along half a cosine.
        adapter: what to attach, or a function that decides what trains in the model.
        model: a fresh model to train instead, in place.
        noise: NEFTune's α.
        first: stop after this many steps of the run.
    """
    model = model or load_model(EMBEDDED, dtype=torch.float32)[0]
    torch.manual_seed(seed)
    if isinstance(adapter, AdapterConfig):
        add_adapters(model, adapter)
    else:
        adapter(model)
    taken = first or steps
    part = 1.0 if taken == steps else (taken - warmup_steps) / (steps - warmup_steps)
    config = TrainConfig(
        taken,
        learning_rate,
        warmup_steps=warmup_steps,
        schedule=lambda progress: cosine(part * progress),  # the whole run's, however short
        betas=betas,
        seed=seed,
        progress=False,
    )
    batches = sft_batches(rows, load_tokenizer(EMBEDDED), batch_size, seed)
    with neftune(model, noise):
        return model, train(model, batches, sft_loss, config)


@torch.no_grad()
def held_out(model: nn.Module, tokenizer, records: Sequence[dict], batch_size: int = 16) -> dict[str, float]:
    """Score unseen answers: loss per token, share of tokens right, share of answers right.

    A token is right when it is the most probable one after the true tokens before it. An answer whose tokens
    are all right is what greedy generation would write, so their share is exact match, with nothing
    generated.
    """
    loss, right, whole = 0.0, [], []
    for start in range(0, len(records), batch_size):
        batch = collate_sft(records[start : start + batch_size], tokenizer)
        batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
        hidden, target, rows = completion_hidden(model, batch)
        logits = head_logits(model)(hidden).float()
        loss += F.cross_entropy(logits, target, reduction="sum").item()
        hit = logits.argmax(-1) == target
        right += hit.tolist()
        whole += [
            part.all().item() for part in hit.split(rows.bincount(minlength=len(batch["labels"])).tolist())
        ]
    return {
        "held-out loss": loss / len(right),
        "token accuracy": sum(right) / len(right),
        "exact match": sum(whole) / len(whole),
    }
