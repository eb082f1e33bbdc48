"""Every check of lab 3.1.7 takes right answers of any spelling, and names what is wrong in wrong ones.

The wrong answers stand by kind, ten or more of each: formula, shape, in place, lost gradient, wrong type,
one row and many, boundaries, state left behind.
"""

import numpy as np
import torch
from helpers import accepts
from test_checks_3_1_8 import (
    STATE,
    TYPES,
    after,
    at_the_edges,
    diagnosed,
    formulas,
    many_pairs,
    of_every_kind,
)
from torch.nn import functional as F

from spark_ft import adapters_disabled, dpo_loss, sequence_logps, with_prompt
from spark_ft.adapters import adapted_layers
from spark_ft.lab.checks import lab_3_1_7 as checks
from spark_ft.scoring import completion_logps, evaluating

# ── summed_logps ────────────────────────────────────────────────────────────────────────────────────────────


def summed_logps(logits, labels):
    logps = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    counted = targets != -100
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * counted).sum(-1)


def summed_by_cross_entropy(logits, labels):
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return -losses.sum(1)


def summed_by_rows(logits, labels):
    rows = []
    for scores, marks in zip(logits, labels, strict=True):
        places = (marks[1:] != -100).nonzero()[:, 0]
        rows.append(torch.log_softmax(scores, -1)[places, marks[places + 1]].sum())
    return torch.stack(rows)


def summed_by_logsumexp(logits, labels):
    scores, targets = logits[:, :-1].float(), labels[:, 1:]
    safe = targets.where(targets != -100, 0)
    picked = torch.take_along_dim(scores, safe[..., None], -1)[..., 0] - scores.logsumexp(-1)
    return torch.where(targets != -100, picked, 0.0).sum(-1)


def summed_by_nll(logits, labels):
    width = logits.shape[-1]
    logps = F.log_softmax(logits[:, :-1].reshape(-1, width), dim=-1)
    losses = F.nll_loss(logps, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="none")
    return -losses.view(len(logits), -1).sum(1)


def summed_by_one_hot(logits, labels):
    targets = labels[:, 1:]
    hot = F.one_hot(targets.clamp_min(0), logits.shape[-1]) * (targets != -100)[..., None]
    return (logits[:, :-1].log_softmax(-1) * hot).sum((1, 2))


SUMMED = (
    summed_logps, summed_by_cross_entropy, summed_by_rows, summed_by_logsumexp, summed_by_nll,
    summed_by_one_hot,
)  # fmt: skip
SUMMED_FORMULAS = formulas(
    summed_logps,
    ("sign is wrong", "return ", "return -"),
    ("shift the labels", "logits[:, :-1]", "logits", "labels[:, 1:]", "labels"),
    ("shifted the wrong way", "logits[:, :-1]", "logits[:, 1:]", "labels[:, 1:]", "labels[:, :-1]"),
    ("mean over the completion", ".sum(-1)", ".sum(-1) / counted.sum(-1)"),
    ("row's length less one", ".sum(-1)", ".mean(-1)"),
    ("by the row's length", ".sum(-1)", ".sum(-1) / labels.shape[1]"),
    ("as if each were token 0", "(picked * counted)", "picked"),
    ("take log_softmax", ".log_softmax(-1)", ""),
    ("not their logarithms", ".log_softmax(-1)", ".softmax(-1)"),
    ("over the places|off by", ".log_softmax(-1)", ".log_softmax(1)"),
    ("over the rows", ".log_softmax(-1)", ".log_softmax(0)"),
    ("probability of the completion", ".sum(-1)", ".sum(-1).exp()"),
    ("in bits", ".sum(-1)", ".sum(-1) / 0.6931471805599453"),
    ("log 0 is −inf|nan or inf", ".log_softmax(-1)", ".softmax(-1).log()"),
    ("probability e⁻³⁰⁰|off by", ".log_softmax(-1)", ".softmax(-1).clamp(min=1e-9).log()"),
)
SUMMED_SIZES = [
    ("one and many", pattern, answer)
    for pattern, answer in (
        ("shape", lambda logits, labels: summed_logps(logits, labels)[:1]),
        ("shape|one number", lambda logits, labels: summed_logps(logits, labels).squeeze()),
        ("shape|one number", lambda logits, labels: summed_logps(logits, labels).sum()),
        ("raised|shape", lambda logits, labels: summed_logps(logits[0], labels[0])),
        (
            "raised|shape",
            lambda logits, labels: logits.log_softmax(-1)[0, :-1].gather(1, labels[:, 1:]).sum(1),
        ),
        ("off by", lambda logits, labels: summed_logps(logits, labels).cumsum(0)),
        ("off by", lambda logits, labels: summed_logps(logits, labels).sort().values),
        ("off by", lambda logits, labels: summed_logps(logits, labels).mean().expand(len(labels))),
        ("off by", lambda logits, labels: summed_logps(logits, labels).roll(1)),
        ("raised|shape", lambda logits, labels: summed_logps(logits[None], labels[None])),
        ("off by|times", lambda logits, labels: summed_logps(logits, labels) / len(labels)),
    )
]


def with_labels(change):
    """The right answer on labels that were changed."""
    return lambda logits, labels: summed_logps(logits, change(labels.clone()))


def blanked(labels, which):
    for row in labels:
        places = (row != -100).nonzero()[:, 0]
        row[places[which]] = -100
    return labels


SUMMED_EDGES = [
    ("boundaries", pattern, answer)
    for pattern, answer in (
        ("last token|wrong way", with_labels(lambda labels: blanked(labels, -1))),
        ("first token", with_labels(lambda labels: blanked(labels, 0))),
        ("−100 was used as an index|raised", lambda logits, labels: (
            logits.log_softmax(-1)[torch.arange(len(labels))[:, None], torch.arange(labels.shape[1] - 1),
            labels[:, 1:]]
        ).sum(1)),
        (".", with_labels(lambda labels: labels.masked_fill(labels == 0, -100))),  # token 0 taken for padding
        ("last token", lambda logits, labels: summed_logps(logits[:, :-1], labels[:, :-1])),
        (".", lambda logits, labels: summed_logps(logits[:, 1:], labels[:, 1:])),
        (".", lambda logits, labels: summed_logps(logits.clamp(-3, 3), labels)),
        (".", lambda logits, labels: summed_logps(logits, labels).clamp(min=-20)),
        (".", lambda logits, labels: summed_logps(logits.half().float(), labels)),
        (".", lambda logits, labels: summed_logps(logits, labels) + 1e-2),
        (".", lambda logits, labels: (summed_logps(logits, labels).exp() + 1e-6).log()),
        (".", with_labels(lambda labels: torch.where(labels > 0, labels, -100))),
    )
]  # fmt: skip


def test_summed_logps():
    accepts(checks.check_summed_logps, *SUMMED, times=2)
    rows = of_every_kind(summed_logps) + SUMMED_FORMULAS + SUMMED_SIZES + SUMMED_EDGES
    diagnosed(checks.check_summed_logps, rows)


# ── my_dpo_loss ─────────────────────────────────────────────────────────────────────────────────────────────


def my_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * margin)


def dpo_by_softplus(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    return F.softplus(-beta * ((chosen - rejected) - (ref_chosen - ref_rejected)))


def dpo_by_logaddexp(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    gap = beta * (rejected - ref_rejected) - beta * (chosen - ref_chosen)
    return torch.logaddexp(torch.zeros_like(gap), gap)


def dpo_by_bce(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    logits = beta * (chosen - ref_chosen - rejected + ref_rejected)
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")


def dpo_by_softmax(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    rewards = beta * torch.stack([chosen - ref_chosen, rejected - ref_rejected], -1)
    return -rewards.log_softmax(-1)[:, 0]


def dpo_by_pair(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    pairs = zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)
    return torch.stack([-F.logsigmoid(beta * ((c - rc) - (r - rr))) for c, r, rc, rr in pairs])


DPOS = (my_dpo_loss, dpo_by_softplus, dpo_by_logaddexp, dpo_by_bce, dpo_by_softmax, dpo_by_pair, dpo_loss)
MARGIN, LOSS = "(chosen - ref_chosen) - (rejected - ref_rejected)", "-F.logsigmoid(beta * margin)"
DPO_FORMULAS = formulas(
    my_dpo_loss,
    ("which is negative", "return -", "return "),
    ("swapped, so that it teaches", "beta * margin", "-beta * margin"),
    ("reference is forgotten", MARGIN, "chosen - rejected"),
    ("swapped, or added", MARGIN, "(chosen + ref_chosen) - (rejected + ref_rejected)"),
    ("swapped, or added", MARGIN, "(chosen - ref_rejected) - (rejected - ref_chosen)"),
    ("ref_rejected is left out", "(rejected - ref_rejected)", "rejected"),
    ("ref_chosen is left out", "(chosen - ref_chosen)", "chosen"),
    ("gains are added", MARGIN, "(chosen - ref_chosen) + (rejected - ref_rejected)"),
    ("β is inverted", "beta * margin", "margin / beta"),
    ("β is forgotten", "beta * margin", "margin"),
    ("fixed at 0.1", "beta * margin", "0.1 * margin"),
    ("β was squared", "beta * margin", "beta * beta * margin"),
    ("β stands outside", LOSS, "-beta * F.logsigmoid(margin)"),
    ("once more", LOSS, "-beta * F.logsigmoid(beta * margin)"),
    ("logarithm is missing", LOSS, "-torch.sigmoid(beta * margin)"),
    (r"that is 1 − σ", LOSS, "1 - torch.sigmoid(beta * margin)"),
    ("that is σ", LOSS, "torch.sigmoid(beta * margin)"),
    ("margin", LOSS, "-beta * margin"),
    ("IPO's square", LOSS, "(margin - 1 / (2 * beta)) ** 2"),
    ("hinge", LOSS, "F.relu(1 - beta * margin)"),
    ("default should be 0.1", "beta=0.1", "beta=0.5"),
    ("cannot be called|missing", "beta=0.1", "beta"),
    ("in bits", LOSS, "-F.logsigmoid(beta * margin) / 0.6931471805599453"),
    ("divided by 2", LOSS, "-F.logsigmoid(beta * margin) / 2"),
)
DPO_EDGES = at_the_edges(
    my_dpo_loss,
    ("±10,000", LOSS, "-torch.log(torch.sigmoid(beta * margin))"),
    ("±10,000", LOSS, "torch.log(1 + torch.exp(-beta * margin))"),
    ("±10,000|off by", LOSS, "-torch.log(torch.sigmoid(beta * margin) + 1e-6)"),
    ("±10,000|off by", LOSS, "-F.logsigmoid((beta * margin).clamp(-20, 20))"),
)


def test_my_dpo_loss():
    accepts(checks.check_dpo_loss, *DPOS, times=2)
    rows = of_every_kind(my_dpo_loss) + DPO_FORMULAS + many_pairs(my_dpo_loss) + DPO_EDGES
    diagnosed(checks.check_dpo_loss, rows)


# ── implicit_rewards ────────────────────────────────────────────────────────────────────────────────────────


def implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    chosen_reward = beta * (chosen - ref_chosen).detach()
    rejected_reward = beta * (rejected - ref_rejected).detach()
    accuracy = (chosen_reward > rejected_reward).float().mean()
    return chosen_reward, rejected_reward, accuracy


@torch.no_grad()
def rewards_without_gradients(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    rewards = beta * (torch.stack([chosen, rejected]) - torch.stack([ref_chosen, ref_rejected]))
    return rewards[0], rewards[1], rewards[0].gt(rewards[1]).double().mean()


def rewards_in_numpy(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    c, r, rc, rr = (x.detach().numpy() for x in (chosen, rejected, ref_chosen, ref_rejected))
    first, second = beta * (c - rc), beta * (r - rr)
    return first, second, np.mean(first > second)


def rewards_as_a_list(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    first, second = (chosen.data - ref_chosen) * beta, (rejected.data - ref_rejected) * beta
    return [first, second, (first > second).sum().item() / len(first)]


def rewards_by_margin(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    with torch.no_grad():
        first, second = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
        right = [float(a > b) for a, b in zip(first, second, strict=True)]
    return first, second, sum(right) / len(right)


REWARDS = (
    implicit_rewards, rewards_without_gradients, rewards_in_numpy, rewards_as_a_list, rewards_by_margin,
)  # fmt: skip
FIRST, SECOND = "beta * (chosen - ref_chosen)", "beta * (rejected - ref_rejected)"
ACCURACY = "(chosen_reward > rejected_reward).float().mean()"
REWARD_FORMULAS = formulas(
    implicit_rewards,
    ("β is forgotten", FIRST, "(chosen - ref_chosen)"),
    ("β is inverted", FIRST, "(1 / beta) * (chosen - ref_chosen)"),
    ("sign is wrong", FIRST, "beta * (ref_chosen - chosen)"),
    ("sign is wrong", SECOND, "-beta * (rejected - ref_rejected)"),
    ("reference is forgotten", FIRST, "beta * (chosen)"),
    ("reference is added", SECOND, "beta * (rejected + ref_rejected)"),
    ("ratio of the probabilities", FIRST, "(chosen - ref_chosen).exp()"),
    ("is a difference", FIRST, "beta * (chosen / ref_chosen)"),
    ("belongs to the difference", FIRST, "(beta * chosen - ref_chosen)"),
    (
        "other answer's reward",
        "return chosen_reward, rejected_reward",
        "return rejected_reward, chosen_reward",
    ),
    ("used twice", FIRST, "beta * beta * (chosen - ref_chosen)"),
    ("sigmoid", FIRST, "torch.sigmoid(beta * (chosen - ref_chosen))"),
    ("tie", ACCURACY, ACCURACY.replace(">", ">=")),
    ("misses|rejected\\*? is higher", ACCURACY, ACCURACY.replace(">", "<=")),
    ("count", ACCURACY, "(chosen_reward > rejected_reward).sum()"),
    ("percent", ACCURACY, f"100 * {ACCURACY}"),
    ("not rewards", ACCURACY, "(chosen > rejected).float().mean()"),
    ("above 0", ACCURACY, "(chosen_reward > 0).float().mean()"),
    ("mean margin", ACCURACY, "(chosen_reward - rejected_reward).mean()"),
)
REWARD_GRADIENTS = [
    ("gradient", "carries a gradient", answer)
    for answer in formulas(
        implicit_rewards,
        ("", ".detach()", ""),
        ("", "(chosen - ref_chosen).detach()", "(chosen - ref_chosen)"),
        ("", "(rejected - ref_rejected).detach()", "(rejected - ref_rejected)"),
        ("", "(chosen - ref_chosen).detach()", "(chosen.clone() - ref_chosen)"),
        ("", ".detach()", ".clone()"),
        ("", ".detach()", ".float()"),
        ("", ".detach()", ".contiguous()"),
        ("", ".detach()", ".requires_grad_(True)"),
        ("", ".detach()", " * 1.0"),
        ("", "(rejected - ref_rejected).detach()", "(rejected.view(-1) - ref_rejected)"),
    )
    for _, _, answer in [answer]
]


def first_reward(change):
    """The right answer with another first reward."""
    return after(implicit_rewards, lambda out: (change(out[0]), *out[1:]))


def all_three(change):
    """The right answer, its tuple changed."""
    return after(implicit_rewards, change)


REWARD_SHAPES = [
    ("shape", "shape|one number", first_reward(change))
    for change in (
        lambda x: x.mean(), lambda x: x.sum(), lambda x: x[None], lambda x: x[:, None],
        lambda x: torch.cat([x, x]),
        lambda x: x[:-1], lambda x: x[0], lambda x: x[:, None] + 0 * x, lambda x: torch.stack([x, x]),
        lambda x: x.max(),
    )
] + [("shape", "accuracy.*shape", all_three(lambda out: (*out[:2], (out[0] > out[1]).float())))]  # fmt: skip
REWARD_TYPES = [
    ("type", pattern, all_three(change))
    for pattern, change in (
        ("three things", lambda out: out[:2]),
        ("three things", lambda out: out[0]),
        ("three things", lambda out: None),
        ("three things", lambda out: {"chosen": out[0], "rejected": out[1], "accuracy": out[2]}),
        ("three things", lambda out: (*out, out[0] - out[1])),
        ("three things", lambda out: (x for x in out)),
        ("three things", lambda out: (out,)),
        ("is None", lambda out: (None, *out[1:])),
        ("is str", lambda out: (*out[:2], f"{out[2]:.0%}")),
        ("fractions", lambda out: (out[0].int(), *out[1:])),
        ("complex", lambda out: (out[0].to(torch.complex64), *out[1:])),
        ("is dict", lambda out: (*out[:2], {"accuracy": out[2]})),
    )
]
REWARD_SIZES = [
    ("one and many", ".", first_reward(change))
    for change in (
        lambda x: x.mean().expand_as(x), lambda x: x.sum().expand_as(x), lambda x: x.cumsum(0),
        lambda x: x.sort().values,
        lambda x: x / len(x), lambda x: x * len(x), lambda x: x - x.mean(), lambda x: x.roll(1),
        lambda x: x.squeeze(),
        lambda x: x[0].expand_as(x), lambda x: x / x.norm(),
    )
]  # fmt: skip
REWARD_EDGES = [
    ("boundaries", ".", answer)
    for answer in [
        *map(first_reward, (
            lambda x: x.clamp(min=0), lambda x: x.clamp(max=0), lambda x: x.abs(), lambda x: x + 1e-3,
            lambda x: x.tanh(),
            lambda x: (x * 100).round() / 100, lambda x: x.half().float(), lambda x: x.clamp(-1, 1),
        )),
        all_three(lambda out: (*out[:2], (out[0] >= out[1]).float().mean())),
        all_three(lambda out: (*out[:2], (out[0] > out[1]).all().float())),
        all_three(lambda out: (*out[:2], (out[0] > out[1]).float()[0])),
    ]
]  # fmt: skip


def test_implicit_rewards():
    accepts(checks.check_implicit_rewards, *REWARDS, times=2)
    shared = [
        row for row in of_every_kind(implicit_rewards, gradient=False) if row[0] in ("in place", "state")
    ]
    rows = shared + REWARD_FORMULAS + REWARD_GRADIENTS + REWARD_SHAPES + REWARD_TYPES
    diagnosed(checks.check_implicit_rewards, rows + REWARD_SIZES + REWARD_EDGES)


# ── reference_logps ─────────────────────────────────────────────────────────────────────────────────────────


def reference_logps(model, batch):
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), adapters_disabled(model):
            logps, _ = sequence_logps(model, batch)
    finally:
        model.train(training)
    return logps


def reference_by_evaluating(model, batch):
    with evaluating(model), adapters_disabled(model), torch.no_grad():
        return sequence_logps(model, batch)[0]


def reference_by_tokens(model, batch):
    with evaluating(model), adapters_disabled(model), torch.inference_mode():
        logps, rows = completion_logps(model, batch)
        total = torch.zeros(len(batch["labels"]))
        return total.index_add(0, rows, logps).clone()


def reference_by_logits(model, batch):
    was = model.training
    try:
        model.train(False)
        with torch.no_grad(), adapters_disabled(model):
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return summed_logps(logits, batch["labels"])
    finally:
        model.train(was)


def reference_by_hand(model, batch):
    layers = [layer for layer in adapted_layers(model).values() if layer.enabled]
    with evaluating(model):
        for layer in layers:
            layer.enabled = False
        try:
            return sequence_logps(model, batch)[0].detach()
        finally:
            for layer in layers:
                layer.enabled = True


REFERENCES = (
    reference_logps, reference_by_evaluating, reference_by_tokens, reference_by_logits, reference_by_hand,
)  # fmt: skip
OFF, EVAL, BACK = "torch.no_grad(), adapters_disabled(model)", "model.eval()", "model.train(training)"
REFERENCE_FORMULAS = formulas(
    reference_logps,
    ("adapters are on", OFF, "torch.no_grad()"),
    ("dropout and noise", EVAL, "pass"),
    ("dropout and noise", EVAL, "model.train()"),
    ("carries a gradient|adapters are on", OFF, "torch.enable_grad()"),
    ("mean per token", "logps, _ = sequence_logps(model, batch)",
    "logps, n = sequence_logps(model, batch); logps = logps / n"),
    ("negative", "return logps", "return -logps"),
    ("adapters are on", "torch.no_grad(), adapters_disabled(model)", "torch.no_grad(), evaluating(model)"),
    ("off by", "return logps", "return logps.exp()"),
    ("off by|times", "return logps", "return 2 * logps"),
    ("off by", "return logps", "return logps + 1"),
    ("policy's mean per token", OFF, "torch.no_grad()", "logps, _ = sequence_logps(model, batch)",
     "logps, n = sequence_logps(model, batch); logps = logps / n"),
    ("off by|dropout", "sequence_logps(model, batch)",
     'sequence_logps(model, {**batch, "labels": batch["input_ids"]})'),
)  # fmt: skip


def leaves(change):
    """The right answer, after which the model is changed."""

    def answer(model, batch):
        logps = reference_logps(model, batch)
        change(model)
        return logps

    return answer


def batch_left(right, act):
    """The right answer, after which the batch is changed."""

    def answer(model, batch):
        out = right(model, batch)
        act(batch)
        return out

    return answer


def model_left(right, act):
    """The right answer, after which the model or a setting is changed."""
    return lambda model, batch: batch_left(right, lambda _: act(model, batch))(model, batch)


def switched_off(model):
    for layer in adapted_layers(model).values():
        layer.enabled = False


REFERENCE_STATE = [
    ("state", pattern, answer)
    for pattern, answer in (
        ("eval mode", formulas(reference_logps, ("", BACK, "pass"))[0][2]),
        ("training mode", formulas(reference_logps, ("", BACK, "model.train()"))[0][2]),
        ("stayed in eval mode", formulas(
            reference_logps, ("", "try:", "if True:", "    finally:\n        model.train(training)\n",
            "    model.train(training)\n"),
        )[0][2]),
        ("adapters stayed off", leaves(switched_off)),
        ("gradients off", leaves(lambda model: torch.set_grad_enabled(False))),
        ("eval mode", leaves(lambda model: model.eval())),
        ("training mode|mode", leaves(lambda model: model.model.layers[0].train(not model.training))),
        ("hook", leaves(lambda model: model.register_forward_hook(lambda *_: None))),
        ("hook", leaves(lambda model: model.get_input_embeddings()._forward_hooks.clear())),
        ("requires_grad", leaves(lambda model: model.requires_grad_(False))),
        ("seed", leaves(lambda model: torch.manual_seed(0))),
        ("default dtype", leaves(lambda model: torch.set_default_dtype(torch.float64))),
        ("has another `", leaves(lambda model: model.get_input_embeddings().weight.data.zero_())),
    )
]  # fmt: skip
REFERENCE_GIVEN = [
    ("in place", "changed|has other keys|input", batch_left(reference_logps, act))
    for act in (
        lambda batch: batch["labels"].fill_(-100), lambda batch: batch["input_ids"].add_(1),
        lambda batch: batch.pop("labels"),
        lambda batch: batch["attention_mask"].zero_(), lambda batch: batch.update(logps=1),
        lambda batch: batch.__setitem__("labels", batch["labels"] + 1), lambda batch: batch["labels"].mul_(2),
        lambda batch: batch["input_ids"].clamp_(max=3), lambda batch: batch.clear(),
        lambda batch: batch["labels"].__setitem__(0, 7), lambda batch: batch["input_ids"].zero_(),
    )
]  # fmt: skip
REFERENCE_GRADIENTS = [
    ("gradient", "carries a gradient", answer)
    for answer in (
        after(reference_logps, lambda x: x.clone().requires_grad_()),
        after(reference_logps, lambda x: x + torch.zeros(len(x), requires_grad=True)),
        after(reference_logps, lambda x: x * torch.ones(1, requires_grad=True)),
        after(reference_logps, lambda x: torch.nn.Parameter(x)),
        lambda model, batch: reference_logps(model, batch) + 0 * sequence_logps(model, batch)[0],
        lambda model, batch: reference_logps(model,
        batch) + 0 * next(p for p in model.parameters() if p.requires_grad).sum(),
        after(reference_logps, lambda x: x.requires_grad_().view(-1)),
        after(reference_logps, lambda x: (x.clone().requires_grad_() * 1.0)),
        after(reference_logps, lambda x: torch.tensor(x.tolist(), requires_grad=True)),
        after(reference_logps, lambda x: x.requires_grad_(True)),
    )
]  # fmt: skip
SHAPED = (
    lambda x: x.mean(), lambda x: x.sum(), lambda x: x[None], lambda x: x[:, None],
    lambda x: torch.cat([x, x]),
    lambda x: x[:-1], lambda x: x[0], lambda x: x[:, None] + 0 * x, lambda x: torch.stack([x, x]),
    lambda x: x.max(),
)  # fmt: skip
REFERENCE_SHAPES = [
    *(("shape", "shape|one number", after(reference_logps, change)) for change in SHAPED),
    *(("type", "reference of a model", after(reference_logps, change)) for change in TYPES[:8] + TYPES[10:]),
    ("one and many", "off by", after(reference_logps, lambda x: x.mean().expand_as(x))),
    ("one and many", "off by", after(reference_logps, lambda x: x.sum().expand_as(x))),
    ("one and many", "off by", after(reference_logps, lambda x: x.cumsum(0))),
    ("one and many", "off by", after(reference_logps, lambda x: x.flip(0))),
    ("one and many", "off by", after(reference_logps, lambda x: x.roll(1))),
    ("one and many", "off by|times", after(reference_logps, lambda x: x / len(x))),
    ("one and many", "off by", after(reference_logps, lambda x: x - x.mean())),
    ("one and many", "off by", after(reference_logps, lambda x: x[0].expand_as(x))),
    ("one and many", "off by", after(reference_logps, lambda x: x / x.norm())),
    ("one and many", "off by|order", after(reference_logps, lambda x: x.softmax(0))),
    ("boundaries", "off by", after(reference_logps, lambda x: x.clamp(min=-5))),
    ("boundaries", "off by", after(reference_logps, lambda x: x.half().float() + 1e-2)),
    ("boundaries", "off by", after(reference_logps, lambda x: x.round())),
    *(
        ("boundaries", "off by|raised|cannot use|shape",
        lambda model, batch, cut=cut: reference_logps(model, cut(batch)))
        for cut in (
            lambda b: {name: x[:, :-1] for name, x in b.items()},
            lambda b: {name: x[:, 1:] for name, x in b.items()},
            lambda b: {**b, "labels": b["labels"].roll(1, 1)}, lambda b: {**b,
            "labels": b["labels"].roll(-1, 1)},
            lambda b: {**b, "attention_mask": b["attention_mask"].roll(1, 1)}, lambda b: {**b,
            "input_ids": b["input_ids"] * 0},
            lambda b: {**b, "labels": b["labels"].masked_fill(b["attention_mask"].cumsum(1) > 5, -100)},
        )
    ),
]  # fmt: skip


def test_reference_logps():
    accepts(checks.check_reference_logps, *REFERENCES)
    rows = REFERENCE_FORMULAS + REFERENCE_STATE + REFERENCE_GIVEN + REFERENCE_GRADIENTS + REFERENCE_SHAPES
    diagnosed(checks.check_reference_logps, rows)


# ── pair_loss ───────────────────────────────────────────────────────────────────────────────────────────────


def pair_loss(model, batch):
    sides = [with_prompt(batch, side) for side in ("chosen", "rejected")]
    policy = [sequence_logps(model, side)[0] for side in sides]
    with torch.no_grad(), adapters_disabled(model):
        reference = [sequence_logps(model, side)[0] for side in sides]
    losses = dpo_loss(*policy, *reference)
    return losses.sum(), len(losses)


def pair_loss_with_the_reference_first(model, batch):
    chosen, rejected = with_prompt(batch, "chosen"), with_prompt(batch, "rejected")
    refs = [reference_logps(model, side) for side in (chosen, rejected)]
    losses = my_dpo_loss(
        sequence_logps(model, chosen)[0], sequence_logps(model, rejected)[0], *refs, beta=0.1
    )
    return losses.sum(), losses.numel()


def pair_loss_by_logits(model, batch):
    def logps(side):
        given = with_prompt(batch, side)
        logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits
        return summed_logps(logits, given["labels"])

    policy = torch.stack([logps("chosen"), logps("rejected")])
    with adapters_disabled(model):
        reference = torch.stack([logps("chosen"), logps("rejected")]).detach()
    gains = policy - reference
    return F.softplus(-0.1 * (gains[0] - gains[1])).sum(), gains.shape[1]


def pair_loss_by_pair(model, batch):
    total, pairs = 0.0, len(batch["row"])
    for i in range(pairs):
        one = {name: x[i : i + 1] for name, x in batch.items()}
        total = total + pair_loss(model, one)[0]
    return total, torch.tensor(pairs)


def pair_loss_from_tokens(model, batch):
    gains = []
    for side in ("chosen", "rejected"):
        given = with_prompt(batch, side)
        logps, rows = completion_logps(model, given)
        with torch.no_grad(), adapters_disabled(model):
            reference, _ = completion_logps(model, given)
        gains.append(torch.zeros(len(batch["row"])).index_add(0, rows, logps - reference))
    return [-F.logsigmoid((gains[0] - gains[1]) / 10).sum(), len(gains[0])]


PAIR_LOSSES = (
    pair_loss, pair_loss_with_the_reference_first, pair_loss_by_logits, pair_loss_by_pair,
    pair_loss_from_tokens,
)  # fmt: skip
DPO = "dpo_loss(*policy, *reference)"
PAIR_FORMULAS = formulas(
    pair_loss,
    ("mean over the pairs|return the sum", "losses.sum()", "losses.mean()"),
    ("counts tokens", "len(losses)", 'int(batch["chosen_mask"].sum() + batch["rejected_mask"].sum())'),
    ("swapped", '("chosen", "rejected")', '("rejected", "chosen")'),
    ("adapters are on in the reference", "torch.no_grad(), adapters_disabled(model)", "torch.no_grad()"),
    ("adapters are off too", "policy = [sequence_logps(model, side)[0] for side in sides]",
     "policy = [reference_logps(model, side) for side in sides]"),
    ("reference is forgotten", DPO, "dpo_loss(*policy, *(0 * x for x in reference))"),
    ("per-token means", "sequence_logps(model, side)[0]",
    "(lambda a, n: a / n)(*sequence_logps(model, side))"),
    ("β is inverted", DPO, "dpo_loss(*policy, *reference, beta=10.0)"),
    ("β is forgotten", DPO, "dpo_loss(*policy, *reference, beta=1.0)"),
    ("which is negative", DPO, "-dpo_loss(*policy, *reference)"),
    ("swapped, or added", DPO, "dpo_loss(*policy, *reference[::-1])"),
    ("second number is", "len(losses)", "2 * len(losses)"),
    ("second number is", "len(losses)", "1 + len(losses)"),
)  # fmt: skip


def other_sum(change):
    return after(pair_loss, lambda out: (change(out[0]), out[1]))


PAIR_OTHERS = [
    *(
        ("type", pattern, after(pair_loss, change))
        for pattern, change in (
            ("two things", lambda out: out[0]), ("two things", lambda out: None), ("two things",
            lambda out: (*out, {})),
            ("two things", lambda out: {"loss": out[0]}), ("is None", lambda out: (None, out[1])),
            ("number of pairs is None", lambda out: (out[0], None)), ("is str",
            lambda out: (str(out[0]), out[1])),
            ("number of pairs is str", lambda out: (out[0], "3")), ("complex",
            lambda out: (out[0].to(torch.complex64), out[1])),
            ("gradient", lambda out: (out[0].item(), out[1])), ("gradient",
            lambda out: (out[0].detach().numpy(), out[1])),
            ("is a tuple", lambda out: ((out[0],), out[1])),
        )
    ),
    *(
        ("shape", "shape", other_sum(change))
        for change in (
            lambda x: x[None], lambda x: x[None, None], lambda x: torch.stack([x, x]), lambda x: x.expand(3),
            lambda x: x.expand(3, 3), lambda x: x.repeat(4), lambda x: x.view(1, 1, 1),
            lambda x: x.expand(2, 1),
        )
    ),
    *(("shape", "shape|gradient|number of pairs", answer) for answer in (
        formulas(pair_loss, ("", "losses.sum()", "losses"))[0][2], formulas(pair_loss, ("", "len(losses)",
        "losses"))[0][2],
    )),
    *(
        ("gradient", "gradient", answer)
        for answer in (
            other_sum(lambda x: x.detach()), other_sum(lambda x: x.data),
            other_sum(lambda x: torch.tensor(x.item())),
            other_sum(lambda x: torch.tensor(x.item(), requires_grad=True)), torch.no_grad()(pair_loss),
            other_sum(lambda x: x.detach().requires_grad_()), other_sum(lambda x: x.detach() + 0 * x),
            *(formulas(pair_loss, ("", DPO, f"dpo_loss({given}, *reference)"))[0][2] for given in (
                "policy[0].detach(), policy[1]", "policy[0], policy[1].detach()",
                "*(x.detach() for x in policy)",
            )),
        )
    ),
    *(("state", "your code|seed|random|adapters stayed off|mode|hook|requires_grad", model_left(pair_loss,
    act)) for act in (
        *STATE[:3], lambda model, batch: model.train(), lambda model, batch: switched_off(model),
        lambda model, batch: model.requires_grad_(False),
        lambda model, batch: model.register_forward_hook(lambda *_: None),
        *STATE[4:9],
    )),
    *(("in place", "changed|other keys|input", batch_left(pair_loss, act)) for act in (
        lambda b: b["chosen_ids"].add_(1), lambda b: b["rejected_mask"].zero_(), lambda b: b.pop("row"),
        lambda b: b.update(sides=1), lambda b: b["prompt_ids"].fill_(2), lambda b: b["prompt_mask"].zero_(),
        lambda b: b.clear(),
        lambda b: b["chosen_mask"].mul_(2), lambda b: b["row"].add_(1),
        lambda b: b["rejected_ids"].clamp_(max=1),
    )),
    *(
        ("one and many", "raised|off by|sum|cannot use|mean|divided|number", pair_answer)
        for pair_answer in (
            lambda model, batch: pair_loss(model, {name: x[:1] for name, x in batch.items()}),
            lambda model, batch: (pair_loss(model, {name: x[:1] for name, x in batch.items()})[0],
            len(batch["row"])),
            lambda model, batch: (pair_loss(model, batch)[0] / len(batch["row"]), len(batch["row"])),
            lambda model, batch: (pair_loss(model, batch)[0] * len(batch["row"]), len(batch["row"])),
            lambda model, batch: (pair_loss(model, {n: x.roll(1, 0) if n[0] == "p" else x for n,
            x in batch.items()})[0], len(batch["row"])),
            lambda model, batch: (pair_loss(model, batch)[0] / 2, len(batch["row"])),
            lambda model, batch: (pair_loss(model, batch)[0], 1),
            lambda model, batch: (pair_loss(model, batch)[0], 3),
            lambda model, batch: pair_loss(model, {n: torch.cat([x, x]) for n, x in batch.items()}),
            lambda model, batch: pair_loss(model, {n: x[0] for n, x in batch.items()}),
        )
    ),
    *(
        ("boundaries", "raised|off by|cannot use|log 2|loss",
        lambda model, batch, cut=cut: pair_loss(model, cut(batch)))
        for cut in (
            lambda b: {**b, "chosen_mask": b["chosen_mask"].roll(1, 1)}, lambda b: {**b,
            "prompt_ids": b["prompt_ids"] * 0},
            lambda b: {**b, "chosen_ids": b["chosen_ids"].roll(1, 1)}, lambda b: {**b,
            "prompt_ids": b["prompt_ids"].flip(1)},
            lambda b: {**b, "chosen_ids": b["chosen_ids"].flip(1), "rejected_ids": b["rejected_ids"].flip(1)},
            lambda b: {**b, "prompt_ids": b["prompt_ids"][:, 1:], "prompt_mask": b["prompt_mask"][:, 1:]},
            lambda b: {**b, "rejected_ids": b["rejected_ids"][:, 1:],
            "rejected_mask": b["rejected_mask"][:, 1:]},
            lambda b: {**b, "prompt_mask": torch.ones_like(b["prompt_mask"])}, lambda b: {**b,
            "chosen_ids": b["chosen_ids"] * 0},
            lambda b: {**b, "chosen_mask": torch.ones_like(b["chosen_mask"])},
        )
    ),
]  # fmt: skip


def test_pair_loss():
    accepts(checks.check_pair_loss, *PAIR_LOSSES)
    diagnosed(checks.check_pair_loss, PAIR_FORMULAS + PAIR_OTHERS)
