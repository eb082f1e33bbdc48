"""Every check of lab 3.1.4 passes the right answer and says of each usual mistake what it is."""

import math

import pytest
import torch
from torch.nn import functional as F

from spark_ft.lab import checks
from spark_ft.lab.checks import lab_3_1_4 as lab

RIGHT = {
    lab.check_label_mask: lambda prompt, completion: [-100] * len(prompt) + completion,
    lab.check_completion_loss: lambda logits, labels: F.cross_entropy(logits[:-1], labels[1:]),
    lab.check_accumulated_loss: lambda parts: sum(s for s, _ in parts) / sum(n for _, n in parts),
    lab.check_learning_rate: lambda step, steps, peak, warmup: (
        peak * (step + 1) / warmup
        if step < warmup
        else peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    ),
}


def _rate(step, steps, peak, warmup, first=1):
    if step < warmup:
        return peak * (step + first) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


MUTANTS = [
    (lab.check_label_mask, "prompt is trained on", lambda p, c: p + c),
    (
        lab.check_label_mask,
        "stop token is masked",
        lambda p, c: [-100] * len(p) + [-100 if t == 2 else t for t in c],
    ),
    (lab.check_label_mask, "shifted by one", lambda p, c: [-100] * (len(p) - 1) + c + [-100]),
    (lab.check_label_mask, "one for each", lambda p, c: list(c)),
    (lab.check_label_mask, "return missing", lambda p, c: None),
    (lab.check_label_mask, "expected", lambda p, c: [-100] * (len(p) + len(c) - 1) + c[-1:]),
    (lab.check_completion_loss, "not shifted", lambda x, y: F.cross_entropy(x, y)),
    (lab.check_completion_loss, "summed", lambda x, y: F.cross_entropy(x[:-1], y[1:], reduction="sum")),
    (
        lab.check_completion_loss,
        "every place",
        lambda x, y: F.cross_entropy(x[:-1], y[1:], reduction="none").mean(),
    ),
    (lab.check_completion_loss, "sign is wrong", lambda x, y: -F.cross_entropy(x[:-1], y[1:])),
    (lab.check_completion_loss, "off by up to", lambda x, y: F.cross_entropy(x[:-1], y[1:]) * 1.1),
    (lab.check_accumulated_loss, "mean of means", lambda parts: sum(s / n for s, n in parts) / len(parts)),
    (lab.check_accumulated_loss, "sum of means", lambda parts: sum(s / n for s, n in parts)),
    (
        lab.check_accumulated_loss,
        "number of micro-batches",
        lambda parts: sum(s for s, _ in parts) / len(parts),
    ),
    (lab.check_learning_rate, "computed for nothing", lambda *a: _rate(*a, first=0)),
    (lab.check_learning_rate, "no warm-up", lambda step, steps, peak, warmup: peak * (1 - step / steps)),
    (lab.check_learning_rate, "above its peak", lambda *a: 2 * _rate(*a)),
    (
        lab.check_learning_rate,
        "stays at its peak",
        lambda step, steps, peak, warmup: peak * min(1, (step + 1) / warmup),
    ),
    (
        lab.check_learning_rate,
        "straight line",
        lambda step, steps, peak, warmup: (
            peak * (step + 1) / warmup if step < warmup else peak * (1 - (step - warmup) / (steps - warmup))
        ),
    ),
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_a_right_answer_passes_every_time(check, capsys):
    for _ in range(20):
        check(RIGHT[check])
    assert capsys.readouterr().out.count("✓") == 20


@pytest.mark.parametrize(
    ("check", "says", "mutant"), MUTANTS, ids=[f"{c.__name__}-{s}" for c, s, _ in MUTANTS]
)
def test_a_mutant_is_diagnosed(check, says, mutant):
    for _ in range(5):
        with pytest.raises(checks.CheckFailed, match=says):
            check(mutant)


def test_loss_parity_on_a_real_model(tiny_llama):
    model = tiny_llama()
    ids = torch.randint(3, 90, (2, 7))
    labels = ids.clone()
    labels[:, :3] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    lab.check_loss_parity(RIGHT[lab.check_completion_loss], model, batch)
    with pytest.raises(checks.CheckFailed, match="your loss of row 0"):
        lab.check_loss_parity(lambda x, y: F.cross_entropy(x, y), model, batch)


def test_checks_are_independent_of_torch_seed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    lab.check_completion_loss(RIGHT[lab.check_completion_loss])
    assert torch.equal(before, torch.get_rng_state())
