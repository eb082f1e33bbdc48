"""Every check of lab 3.1.4 passes the right answer and names each wrong one that people really give."""

import math

import torch
from helpers import accepts, refuses
from torch.nn import functional as F

from spark_ft.lab.checks import lab_3_1_4 as checks


def label_mask(prompt, completion):
    return [-100] * len(prompt) + completion


def completion_loss(logits, labels):
    return F.cross_entropy(logits[:-1], labels[1:])


def accumulated_loss(parts):
    return sum(s for s, _ in parts) / sum(n for _, n in parts)


def half_cosine(share):
    return 0.5 * (1 + math.cos(math.pi * share))


def rate(first=1, fall=half_cosine):
    def learning_rate(step, steps, peak, warmup):
        if step < warmup:
            return peak * (step + first) / warmup
        return peak * fall((step - warmup) / (steps - warmup))

    return learning_rate


def test_label_mask():
    accepts(checks.check_label_mask, label_mask, times=20)
    refuses(
        checks.check_label_mask,
        ("prompt is trained on", lambda p, c: p + c),
        ("stop token is masked", lambda p, c: [-100] * len(p) + [-100 if t == 2 else t for t in c]),
        ("shifted by one", lambda p, c: [-100] * (len(p) - 1) + c + [-100]),
        ("one for each", lambda p, c: list(c)),
        ("expected", lambda p, c: [-100] * (len(p) + len(c) - 1) + c[-1:]),
        times=5,
    )


def test_completion_loss():
    accepts(checks.check_completion_loss, completion_loss, times=20)
    refuses(
        checks.check_completion_loss,
        ("not shifted", lambda x, y: F.cross_entropy(x, y)),
        ("summed", lambda x, y: F.cross_entropy(x[:-1], y[1:], reduction="sum")),
        ("every position", lambda x, y: F.cross_entropy(x[:-1], y[1:], reduction="none").mean()),
        ("sign is wrong", lambda x, y: -completion_loss(x, y)),
        ("off by up to", lambda x, y: completion_loss(x, y) * 1.1),
        times=5,
    )


def test_accumulated_loss():
    accepts(checks.check_accumulated_loss, accumulated_loss, times=20)
    refuses(
        checks.check_accumulated_loss,
        ("mean of means", lambda parts: sum(s / n for s, n in parts) / len(parts)),
        ("sum of means", lambda parts: sum(s / n for s, n in parts)),
        ("number of micro-batches", lambda parts: sum(s for s, _ in parts) / len(parts)),
        times=5,
    )


def test_learning_rate():
    accepts(checks.check_learning_rate, rate(), times=20)
    refuses(
        checks.check_learning_rate,
        ("learns nothing", rate(first=0)),
        ("no warm-up", lambda step, steps, peak, warmup: peak * (1 - step / steps)),
        ("above its peak", lambda step, *a: 2 * rate()(step, *a)),
        ("stays at its peak", rate(fall=lambda share: 1)),
        ("straight line", rate(fall=lambda share: 1 - share)),
        times=5,
    )


def test_loss_parity_on_a_real_model(tiny_llama):
    ids = torch.randint(3, 90, (2, 7))
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    model = tiny_llama()
    accepts(checks.check_loss_parity, (completion_loss, model, batch))
    unshifted = (lambda x, y: F.cross_entropy(x, y), model, batch)
    refuses(checks.check_loss_parity, ("your loss of row 0", unshifted))
