"""Every check of lab 3.1.9 accepts right answers in five spellings, and names what is wrong in wrong ones.

The wrong answers stand by kind, those that people give: formula, shape, in place, lost gradient, type, sizes
and boundaries, state that is left behind.
"""

import random
import re

import numpy as np
import pytest
import torch
from helpers import accepts, mutant, printed_by

from spark_ft import adapters_disabled, kto_loss, sequence_logps, with_prompt
from spark_ft.adapters import adapted_layers  # noqa: F401  wrong answers use it
from spark_ft.lab.checks import CheckFailed
from spark_ft.lab.checks import lab_3_1_9 as checks
from spark_ft.lab.experiments import lab_3_1_9 as experiment
from spark_ft.lab.study import lab_3_1_9 as study
from spark_ft.scoring import completion_logps


def after(right, change):
    """The right answer, its result changed."""
    return lambda *a, **k: change(right(*a, **k))


def before(right, change):
    """The right answer, `change` called with its arguments first."""
    return lambda *a, **k: (change(*a), right(*a, **k))[1]


def wrong(right, *rows):
    """(pattern, answer) of rows (pattern, answer) or (pattern, old, new, …), pieces of `right`'s source."""
    return [(pattern, mutant(right, *rest) if len(rest) > 1 else rest[0]) for pattern, *rest in rows]


def diagnosed(check, kinds):
    """Require that each kind has ten wrong answers, that 97% are refused and 90% with the right diagnosis."""
    missed, accepted, count = [], 0, 0
    for kind, answers in kinds.items():
        assert len(answers) >= 10, f"{kind}: only {len(answers)} wrong answers"
        for pattern, answer in answers:
            count += 1
            try:
                said = f"it passes: {printed_by(check, answer)}"
                accepted += 1
            except CheckFailed as failure:
                said = str(failure)
                if re.search(pattern, said, re.S):
                    continue
            missed.append(f"{kind}: expected “{pattern}”, but: {said.strip()}")
    report = "\n".join(missed)
    print(f"{check.__name__}: {count} wrong, {accepted} accepted, {len(missed)} not diagnosed\n{report}")
    assert accepted <= 0.03 * count, report
    assert len(missed) <= 0.1 * count, report


# What people return in place of a tensor of numbers, and in place of its shape.
TYPES = [
    (r"is None|NoneType", lambda x: None),
    ("is a list", lambda x: [x, x]),
    ("is a tuple", lambda x: (x, x)),
    ("is a tuple.*comma", lambda x: (x,)),
    ("is dict", lambda x: {"loss": x}),
    ("is str", lambda x: str(x)),
    ("int32.*fractions", lambda x: x.int()),
    ("bool.*fractions", lambda x: x > 0),
    ("complex", lambda x: x.to(torch.complex64)),
    ("is a function", lambda x: lambda: x),
    ("is a generator", lambda x: (y for y in x.reshape(-1))),
    ("is set", lambda x: {x}),
    ("device meta|meta tensors", lambda x: x.to("meta")),
]
SHAPES = [
    ("shape|one number", lambda x: x.mean()),
    ("shape|one number", lambda x: x.sum()),
    ("shape", lambda x: x[None]),
    ("shape", lambda x: x[..., None]),
    ("shape", lambda x: torch.stack([x, x])),
    ("shape", lambda x: x.reshape(-1)[:-1]),
    ("shape", lambda x: torch.cat([x.reshape(-1), x.reshape(-1)[:1]])),
    ("shape", lambda x: x.reshape(-1).diag()),
    ("shape|one number", lambda x: x.reshape(-1)[0]),
    ("shape", lambda x: x.reshape(-1).repeat(2)),
    ("shape|one number", lambda x: x.max()),
]


def typed(right):
    return [(pattern, after(right, change)) for pattern, change in TYPES]


def shaped(right):
    return [(pattern, after(right, change)) for pattern, change in SHAPES]


# ── Exercise 1 ──────────────────────────────────────────────────────────────────────────────────────────────


def felt(gain, alpha=0.88, aversion=2.25):
    size = gain.abs() ** alpha
    return torch.where(gain < 0, -aversion * size, size)


def felt_by_clamps(gain, alpha=0.88, aversion=2.25):
    return gain.clamp(min=0) ** alpha - aversion * (-gain).clamp(min=0) ** alpha


def felt_by_sign(gain, alpha=0.88, aversion=2.25):
    return gain.sign() * gain.abs().pow(alpha) * (1 + (aversion - 1) * (gain < 0))


def felt_in_numpy(gain, alpha=0.88, aversion=2.25):
    x = gain.numpy()
    return np.where(x < 0, -aversion, 1) * np.abs(x) ** alpha


def felt_by_masks(gain, alpha=0.88, aversion=2.25):
    out = torch.zeros_like(gain)
    up = gain > 0
    out[up] = gain[up] ** alpha
    out[gain < 0] = -aversion * (-gain[gain < 0]) ** alpha
    return out


def felt_by_loop(gain, alpha=0.88, aversion=2.25):
    values = [x**alpha if x >= 0 else -aversion * (-x) ** alpha for x in gain.reshape(-1).tolist()]
    return torch.tensor(values).reshape(gain.shape)


FELT = [felt, felt_by_clamps, felt_by_sign, felt_in_numpy, felt_by_masks, felt_by_loop]


def test_felt_value():
    size, where = "gain.abs() ** alpha", "torch.where(gain < 0, -aversion * size, size)"
    diagnosed(checks.check_felt_value, {
        "formula": wrong(
            felt,
            ("negative number has no such power", size, "gain ** alpha"),
            ("should be negative", "-aversion", "aversion"),
            ("aversion is missing", "-aversion * size", "-size"),
            ("also multiplies the gains", where, "aversion * gain.sign() * size"),
            ("gains are multiplied by aversion", where, "torch.where(gain < 0, -size, aversion * size)"),
            ("alpha is missing", size, "gain.abs()"),
            ("alpha multiplies", size, "alpha * gain.abs()"),
            ("power is 1/alpha", size, "gain.abs() ** (1 / alpha)"),
            ("inside the power", "-aversion * size", "-(aversion * gain.abs()) ** alpha"),
            ("divides the losses", "-aversion * size", "-size / aversion"),
            ("added", "-aversion * size", "-size - aversion"),
            ("wrong way round", where, f"-{where}"),
            ("swapped", "gain < 0", "gain > 0"),
            ("losses count nothing", "-aversion * size", "0 * size"),
            ("only the losses", "size, size)", "size, 0 * size)"),
            ("alpha is missing below", "-aversion * size", "aversion * gain"),
            ("alpha is missing above", "size, size)", "size, gain)"),
        ),
        "shape": shaped(felt),
        "type": typed(felt),
        "in place": wrong(
            felt,
            ("in place", size, "gain.abs_() ** alpha; gain = -gain"),
            ("in place", "return", "gain.abs_(); return"),
            ("in place", "return", "gain.zero_(); return"),
            ("in place", "return", "gain.mul_(2); return"),
            ("in place", "return", "gain.neg_(); return"),
            ("in place", "return", "gain.data.add_(1); return"),
            ("in place", "return", "gain.clamp_(min=0); return"),
            ("in place", "return", "gain[...] = 0; return"),
            ("in place", "return", "gain.reshape(-1)[:1] = 7; return"),
            ("in place", "return", "gain.numpy()[...] = 1; return"),
            ("in place", "return", "gain.copy_(size); return"),
            ("in place", "return", "gain -= 1; return"),
            ("in place", where, "gain.copy_(torch.where(gain < 0, -aversion * size, size))"),
        ),
        "sizes and boundaries": wrong(
            felt,
            ("shape|PyTorch says|one number", where, f"{where}.squeeze()"),
            ("raised", size, "torch.stack([x.abs() ** alpha for x in gain])"),
            ("raised", where, "size if gain >= 0 else -aversion * size"),
            ("off by", "gain < 0", "gain <= 0", "-aversion * size", "-aversion * (size + (gain == 0))"),
            ("nan|inf", where, f"{where} * gain / gain"),
            ("nan|inf", size, "(gain.abs().log() * alpha).exp() / (gain != 0)"),
            ("alpha is|off by", "aversion=2.25):", "aversion=2.25):\n    alpha = 0.88"),
            ("aversion|off by", "aversion=2.25):", "aversion=2.25):\n    aversion = 2.25"),
            ("off by|losses count", where, f"{where}.clamp(min=-1)"),
            ("off by|gains", where, f"{where}.clamp(max=1)"),
            ("off by|whole", where, f"{where}.round()"),
            ("off by", size, "gain.abs() ** alpha / gain.abs().max() ** alpha"),
            ("off by", size, "(gain - gain.mean()).abs() ** alpha"),
            ("index|dimension|PyTorch says|shape", where, f"{where}[:, None][:, 0]"),
        ),
    })  # fmt: skip
    accepts(checks.check_felt_value, *FELT, times=3)


# ── Exercise 2 ──────────────────────────────────────────────────────────────────────────────────────────────


def loss(policy, reference, desirable, kl, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    gain = policy - reference - kl
    value = torch.sigmoid(beta * torch.where(desirable, gain, -gain))
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - value)


def loss_by_sign(policy, reference, desirable, kl, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    sign = desirable.float() * 2 - 1
    weight = desirable * desirable_weight + ~desirable * undesirable_weight
    return weight * (-sign * beta * (policy - reference - kl)).sigmoid()


def loss_by_masks(policy, reference, desirable, kl, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    out, gain = torch.zeros_like(policy), beta * (policy - reference - kl)
    out[desirable] = desirable_weight * (1 - torch.sigmoid(gain[desirable]))
    out[~desirable] = undesirable_weight * (1 - torch.sigmoid(-gain[~desirable]))
    return out


def loss_by_loop(policy, reference, desirable, kl, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    losses = []
    for p, r, up in zip(policy, reference, desirable, strict=True):
        value = torch.sigmoid(beta * (p - r - kl) if up else beta * (kl - (p - r)))
        losses.append((desirable_weight if up else undesirable_weight) * (1 - value))
    return torch.stack(losses)


def loss_in_float64(policy, reference, desirable, kl, **options):
    return loss(policy.double(), reference.double(), desirable, kl, **options)


LOSSES = [loss, loss_by_sign, loss_by_masks, loss_by_loop, loss_in_float64, kto_loss]


def test_kto_loss():
    gain, value = "gain = policy - reference - kl", "torch.where(desirable, gain, -gain)"
    weight, out = "torch.where(desirable, desirable_weight, undesirable_weight)", "weight * (1 - value)"
    spoils = lambda code: (gain, f"{gain}; {code}")  # noqa: E731
    cut = "carries no gradient|no gradient reaches"
    diagnosed(checks.check_kto_loss, {
        "formula": wrong(
            loss,
            ("down are treated as thumbs up", value, "gain"),
            ("up are treated as thumbs down", value, "-gain"),
            ("swapped inside", value, "torch.where(desirable, -gain, gain)"),
            ("weights are swapped", weight, "torch.where(desirable, undesirable_weight, desirable_weight)"),
            ("two weights are missing", weight, "1"),
            ("desirable_weight is missing", weight, "torch.where(desirable, 1.0, undesirable_weight)"),
            ("undesirable_weight is missing", weight, "torch.where(desirable, desirable_weight, 1.0)"),
            ("up and down are swapped", gain, f"desirable = ~desirable; {gain}"),
            ("kl is missing", gain, "gain = policy - reference"),
            ("kl is added", gain, "gain = policy - reference + kl"),
            ("one sign on both", value, "(torch.where(desirable, gain + kl, -gain - kl) - kl)"),
            ("outside of beta", f"beta * {value}",
             "(beta * torch.where(desirable, gain + kl, -gain - kl) + torch.where(desirable, -kl, kl))"),
            ("beta twice", gain, "gain = policy - reference - beta * kl"),
            ("beta is missing", "beta * ", ""),
            ("divided by beta", "beta * torch", "1 / beta * torch"),
            ("counted twice", "beta * torch", "beta * beta * torch"),
            ("fixed at 0.1", "beta * torch", "0.1 * torch"),
            ("beta stands outside", f"beta * {value}", value, out, f"beta * {out}"),
            ("policy and reference are swapped", gain, "gain = reference - policy - kl"),
            ("reference is missing", gain, "gain = policy - kl"),
            ("reference is added", gain, "gain = policy + reference - kl"),
            ("not their ratio", gain, "gain = policy / reference - kl"),
            ("no exp", gain, "gain = (policy - reference).exp() - kl"),
            ("that is the value λσ", out, "weight * value"),
            ("value with a minus", out, "-weight * value"),
            ("1 − λσ", out, "1 - weight * value"),
            ("weight is inside of σ; ", "sigmoid(beta", f"sigmoid({weight} * beta", out, "1 - value"),
            ("weight is inside of σ too", "sigmoid(beta", f"sigmoid({weight} * beta"),
            ("weight divides", out, "(1 - value) / weight"),
            ("as in DPO", out, "-weight * value.log()"),
            ("log.1 − σ", out, "weight * (1 - value).log()"),
            ("no σ", "torch.sigmoid(", "(", out, "-weight * value"),
            ("hinge", "torch.sigmoid(", "(", out, "weight * (1 - value).clamp(min=0)"),
            ("tanh", "torch.sigmoid", "torch.tanh"),
            ("divided by the number", out, f"{out} / len(policy)"),
            ("squared", out, f"({out}) ** 2"),
            ("normalised", out, f"{out} / weight.mean()"),
            ("another order", out, f"torch.cat([({out})[desirable], ({out})[~desirable]])"),
            ("down count nothing", out, f"{out} * desirable"),
            ("up count nothing", out, f"{out} * ~desirable"),
            ("its sign is wrong", out, f"-({out})"),
            ("2 times", out, f"2 * {out}"),
        ),
        "shape": shaped(loss),
        "type": typed(loss),
        "in place": wrong(
            loss,
            ("`policy` was changed", *spoils("policy.data.sub_(reference)")),
            ("`policy` was changed", *spoils("policy.data.mul_(beta)")),
            ("`policy` was changed", *spoils("policy.data.zero_()")),
            ("`policy` got a gradient", *spoils("gain.sum().backward(retain_graph=True)")),
            ("in-place", *spoils("policy.sub_(reference)")),
            ("in-place", *spoils("policy -= reference")),
            ("`reference` was changed", *spoils("reference += kl")),
            ("`reference` was changed", *spoils("reference.add_(kl)")),
            ("`reference` was changed", *spoils("reference[0] = 0")),
            ("`reference` was changed", gain, "reference.sub_(policy.detach())\n    gain = -reference - kl"),
            ("`desirable` was changed", *spoils("desirable.logical_not_()")),
            ("`desirable` was changed", out, f"{out}; desirable.fill_(True)", "return", "out ="),
            ("`kl` was changed", *spoils("kl.mul_(beta)")),
            ("`kl` was changed", *spoils("kl -= 1")),
            ("`kl` has another", *spoils("kl.requires_grad_()")),
            ("`policy` has another", *spoils("policy.requires_grad_(False)")),
        ),
        "lost gradient": [
            *wrong(
                loss,
                (cut, gain, "gain = policy.detach() - reference - kl"),
                (cut, gain, "gain = policy.data - reference - kl"),
                (cut, gain, "gain = torch.tensor(policy.tolist()) - reference - kl"),
                (cut, gain, "gain = (policy - reference - kl).detach().requires_grad_()"),
                (cut, gain, "gain = policy.clone().detach() - reference - kl"),
                (cut, gain, "with torch.no_grad(): gain = policy - reference - kl"),
                (cut, value, "torch.where(desirable, gain.data, -gain.data)"),
                (cut, out, "weight * (1 - value.detach())"),
                ("carry none", value, "torch.where(desirable, gain, -gain.detach())"),
                ("carry none", value, "torch.where(desirable, gain.detach(), -gain)"),
                (cut, out, f"torch.tensor([x.item() for x in {out}])"),
                (cut, out, f"torch.tensor(({out}).tolist(), requires_grad=True)"),
            ),
            (cut, torch.no_grad()(loss)),
            ("ndarray.*no gradient", after(loss, lambda x: x.detach().numpy())),
            ("carry no gradient|is list", after(loss, lambda x: x.tolist())),
        ],
        "sizes and boundaries": wrong(
            loss,
            ("shape", out, f"({out}).squeeze()"),
            ("shape|index|raised", out, f"({out})[:2]"),
            ("raised|index", gain, f"{gain}; policy[1]"),
            ("raised", gain, f"{gain}; assert desirable.any()"),
            ("nan|inf", out, f"{out} / desirable.any()"),
            ("nan|inf", "torch.sigmoid(beta * torch.where(desirable, gain, -gain))",
             "(beta * torch.where(desirable, gain, -gain)).exp(); value = value / (1 + value)"),
            ("nan|inf", out, f"{out} + 0 * gain.exp()"),
            ("raised", value, "(gain if desirable else -gain)"),
            ("another order|down count|off by|shape|raised", out, f"({out}).sort().values"),
            ("off by|another order|shape", out, f"({out}).flip(0)"),
            ("shape", out, f"({out})[desirable]"),
            ("down count nothing|off by", out, f"({out}) * (desirable | (desirable.sum() == 0))"),
            ("off by|nan|inf", out, f"{out} / desirable.float().mean()"),
        ),
        "left behind": wrong(
            loss,
            ("switched gradients", *spoils("torch.set_grad_enabled(False)")),
            ("default dtype", *spoils("torch.set_default_dtype(torch.float64)")),
            ("seeds", *spoils("torch.manual_seed(0)")),
            ("threads", *spoils("torch.set_num_threads(torch.get_num_threads() + 1)")),
            ("autocast", *spoils("torch.set_autocast_enabled('cpu', True)")),
            ("NumPy's error", *spoils("np.seterr(all='ignore')")),
            ("anomaly", *spoils("torch.autograd.set_detect_anomaly(True)")),
            ("deterministic", *spoils("torch.use_deterministic_algorithms(True)")),
            ("hook on all", *spoils("torch.nn.modules.module.register_module_forward_hook(print)")),
            ("default device", *spoils("torch.set_default_device('meta')")),
            ("matrix products", *spoils("torch.set_float32_matmul_precision('medium')")),
        ),
    })  # fmt: skip
    accepts(checks.check_kto_loss, *LOSSES, times=3)


# ── Exercise 3 ──────────────────────────────────────────────────────────────────────────────────────────────


def pairs(rows):
    out = []
    for i, row in enumerate(rows):
        earlier = rows[:i][::-1] + rows[i + 1 :][::-1]
        out.append(next(other["completion"] for other in earlier if other["prompt"] != row["prompt"]))
    return out


def pairs_by_steps(rows):
    n, out = len(rows), []
    for i in range(n):
        j = (i - 1) % n
        while rows[j]["prompt"] == rows[i]["prompt"]:
            j = (j - 1) % n
        out.append(rows[j]["completion"])
    return out


def pairs_forward(rows):
    n = len(rows)
    return [
        next(r["completion"] for r in (rows + rows)[i + 1 : i + n] if r["prompt"] != rows[i]["prompt"])
        for i in range(n)
    ]


def pairs_by_shift(rows):
    """The first turn of all answers under which no prompt meets an answer to itself."""
    n, ask = len(rows), [row["prompt"] for row in rows]
    turns = range(1, n)
    turn = next(t for t in turns if all(ask[i] != ask[(i + t) % n] for i in range(n)))
    return [rows[(i + turn) % n]["completion"] for i in range(n)]


def pairs_by_seed(rows):
    """Drawn at random, but from a generator of its own with a fixed seed: the same at every call."""
    order, rng = list(range(len(rows))), random.Random(0)
    while any(rows[i]["prompt"] == rows[j]["prompt"] for i, j in enumerate(order)):
        rng.shuffle(order)
    return [rows[j]["completion"] for j in order]


PAIRS = [pairs, pairs_by_steps, pairs_forward, pairs_by_shift, pairs_by_seed]


def test_mismatched():
    asks, appended = 'if other["prompt"] != row["prompt"]', 'out.append(next(other["completion"]'
    spoil = lambda code: ("out = []", f"out = []; {code}")  # noqa: E731
    changed = lambda change: after(pairs, change)  # noqa: E731
    diagnosed(checks.check_mismatched, {
        "formula": wrong(
            pairs,
            ("keeps its own answer", lambda rows: [row["completion"] for row in rows]),
            ("an answer to the same question", asks, "if True"),
            ("an answer to the same question", each(lambda rows, i: rows[i - 1])),
            ("serves|its own", each(lambda rows, i: rows[max(i - 1, 0)])),
            ("serves|its own", lambda rows: [rows[0]["completion"]] * len(rows)),
            ("serves", lambda rows: [rows[1]["completion"]] + [rows[0]["completion"]] * (len(rows) - 1)),
            ("its own|same question", lambda rows: [row["completion"] for row in rows[::-1]]),
            ("its own|same question", lambda rows: sorted(row["completion"] for row in rows)[::-1]),
            ("serves", "earlier = rows[:i][::-1] + rows[i + 1 :][::-1]", "earlier = rows"),
            ("these are prompts", lambda rows: [rows[i - 1]["prompt"] for i in range(len(rows))]),
            ("its own|same question", each(lambda rows, i: rows[i ^ 1 if (i ^ 1) < len(rows) else i])),
            ("serves|its own|same question", asks, 'if other["label"] != row["label"]'),
        ),
        "type": [
            ("NoneType.*return", changed(lambda x: None)),
            ("is str", changed(lambda x: x[0])),
            ("is generator", changed(lambda x: (y for y in x))),
            ("is set", changed(set)),
            ("is dict", changed(lambda x: dict(enumerate(x)))),
            ("is map", changed(lambda x: map(str, x))),
            ("is int", changed(len)),
            ("is function", changed(lambda x: lambda: x)),
            ("is tuple|3 answers|1 answers", changed(lambda x: (x,))),
            ("is Tensor", changed(lambda x: torch.zeros(len(x)))),
            ("is bytes", changed(lambda x: x[0].encode())),
        ],
        "shape": [
            ("these are rows", lambda rows: [rows[i - 1] for i in range(len(rows))]),
            ("these are rows", lambda rows: [{**rows[i - 1]} for i in range(len(rows))]),
            ("answers for", changed(lambda x: x[:-1])),
            ("answers for", changed(lambda x: x + x[:1])),
            ("answers for", changed(lambda x: x * 2)),
            ("answers for", changed(lambda x: [x])),
            ("answers for", changed(lambda x: [])),
            ("item 0 is list", changed(lambda x: [[y] for y in x])),
            ("item 0 is tuple", changed(lambda x: [(y, y) for y in x])),
            ("item 0 is int", changed(lambda x: list(range(len(x))))),
            ("item 0 is int|answers for", changed(lambda x: [len(y) for y in x])),
            ("no completion of these", changed(lambda x: [f"answer: {y}" for y in x])),
            ("no completion of these", changed(lambda x: [y.upper() for y in x])),
            ("no completion of these", changed(lambda x: ["" for _ in x])),
            ("no completion of these", changed(lambda x: [y.split()[0] for y in x])),
        ],
        "in place": wrong(
            pairs,
            ("`rows`", *spoil("rows.reverse()")),
            ("`rows`", *spoil("rows.append(rows[0])")),
            ("`rows`", *spoil("rows.pop()")),
            ("`rows`", *spoil("rows.sort(key=lambda row: row['prompt'])")),
            ("`rows`", *spoil("rows[0]['prompt'] = ''")),
            ("`rows`", *spoil("rows.insert(0, rows.pop())")),
            ("`rows`", *spoil("del rows[0]['label']")),
            ("`rows`", *spoil("rows[0].update(mismatched='')")),
            ("`rows`", appended, 'row["mismatched"] = 1; out.append(next(other["completion"]'),
            ("`rows`", *spoil("rows.clear()")),
            ("`rows`", *spoil("random.shuffle(rows)")),
        ),
        "left behind": [
            ("a second call", lambda rows: shuffled(rows, random)),
            ("a second call", lambda rows: shuffled(rows, random.Random())),
            ("a second call", lambda rows: shuffled(rows, random.SystemRandom())),
            ("a second call", lambda rows: shuffled(rows, torch_random)),
            ("a second call", lambda rows: shuffled(rows, numpy_random)),
            ("a second call", counting()),
            ("seeds", before(pairs, lambda rows: torch.manual_seed(1))),
            ("threads", before(pairs, lambda rows: torch.set_num_threads(torch.get_num_threads() + 1))),
            ("switched gradients", before(pairs, lambda rows: torch.set_grad_enabled(False))),
            ("default dtype", before(pairs, lambda rows: torch.set_default_dtype(torch.float64))),
            ("a second call", growing()),
        ],
        "sizes and boundaries": wrong(
            pairs,
            ("raised", "out = []", "assert len(rows) > 2; out = []"),
            ("raised", "rows[:i][::-1] + rows[i + 1 :][::-1]", "rows[:i][::-1]"),
            ("raised", "rows[:i][::-1] + rows[i + 1 :][::-1]", "rows[i + 1 :]"),
            ("raised|serves", "rows[:i][::-1] + rows[i + 1 :][::-1]", "rows[:2]"),
            ("its own|same question", each(lambda rows, i: rows[(i + 2) % len(rows)])),
            ("its own|same question", each(lambda rows, i: rows[i - 3])),
            ("raised", each(lambda rows, i: rows[i + 1])),
            ("answers for", lambda rows: [rows[i]["completion"] for i in range(len(rows) - 1)]),
            ("raised|its own|same", each(lambda rows, i: rows[7 * i % 7])),
            ("same question|its own", each(lambda rows, i: rows[i // 2])),
            ("its own|same", each(lambda rows, i: rows[-i])),
        ),
    })  # fmt: skip
    accepts(checks.check_mismatched, *PAIRS, times=3)


def each(row):
    """The completion of row(rows, i) for each i."""
    return lambda rows: [row(rows, i)["completion"] for i in range(len(rows))]


def shuffled(rows, rng):
    """Right but for chance: a new pairing at every call."""
    order = list(range(len(rows)))
    while any(rows[i]["prompt"] == rows[j]["prompt"] for i, j in enumerate(order)):
        rng.shuffle(order)
    return [rows[j]["completion"] for j in order]


class torch_random:
    @staticmethod
    def shuffle(order):
        order[:] = torch.randperm(len(order)).tolist()


class numpy_random:
    @staticmethod
    def shuffle(order):
        np.random.shuffle(order)


def counting():
    """Right, but each call turns the answers by one more."""
    calls = []

    def answer(rows):
        calls.append(1)
        turns = [t for t in range(1, len(rows)) if all(
            rows[i]["prompt"] != rows[(i + t) % len(rows)]["prompt"] for i in range(len(rows)))]  # fmt: skip
        turn = turns[len(calls) % len(turns)]
        return [rows[(i + turn) % len(rows)]["completion"] for i in range(len(rows))]

    return answer


def growing():
    """Right once; a list outside of the function grows with every call."""
    out = []

    def answer(rows):
        out.extend(pairs(rows))
        return out

    return answer


# ── Exercise 4 ──────────────────────────────────────────────────────────────────────────────────────────────


def point(model, batch):
    answers = with_prompt(batch, "mismatched")
    with torch.no_grad():
        policy, _ = sequence_logps(model, answers)
        with adapters_disabled(model):
            reference, _ = sequence_logps(model, answers)
        return (policy - reference).mean().clamp(min=0)


def point_as_number(model, batch):
    answers = with_prompt(batch, "mismatched")
    with torch.no_grad(), adapters_disabled(model):
        reference = sequence_logps(model, answers)[0]
    gain = (sequence_logps(model, answers)[0] - reference).mean().item()
    return max(0.0, gain)


@torch.no_grad()
def point_decorated(model, batch):
    answers = with_prompt(batch, "mismatched")
    policy = sequence_logps(model, answers)[0]
    with adapters_disabled(model):
        reference = sequence_logps(model, answers)[0]
    return torch.relu((policy - reference).sum() / len(policy))


def point_detached(model, batch):
    policy, _ = sequence_logps(model, with_prompt(batch, "mismatched"))
    with adapters_disabled(model):
        reference, _ = sequence_logps(model, with_prompt(batch, "mismatched"))
    return torch.clamp((policy - reference).detach().mean(), min=0.0)


def point_by_tokens(model, batch):
    answers, totals = with_prompt(batch, "mismatched"), []
    with torch.inference_mode():
        for off in (False, True):
            with adapters_disabled(model) if off else torch.no_grad():
                logps, rows = completion_logps(model, answers)
            totals.append(logps.sum() / (int(rows.max()) + 1))
    return max(totals[0] - totals[1], torch.tensor(0.0)).clone()


POINTS = [point, point_as_number, point_decorated, point_detached, point_by_tokens]


def test_reference_point():
    both, gives, side = "(policy - reference)", "(policy - reference).mean().clamp(min=0)", '"mismatched"'
    off, quiet, tokens = "with adapters_disabled(model):", "with torch.no_grad():", "policy, _ = sequence"
    spoil = lambda code: (f"answers = with_prompt(batch, {side})",  # noqa: E731
                          f"answers = with_prompt(batch, {side}); {code}")
    own = 'policy, _ = sequence_logps(model, with_prompt(batch, "completion"))'
    diagnosed(checks.check_reference_point, {
        "formula": wrong(
            point,
            ("clamp the mean at zero", gives, f"{both}.mean()"),
            ("swapped", both, "(reference - policy)"),
            ("each row is clamped; ", gives, f"{both}.clamp(min=0).mean()"),
            ("made positive", gives, f"{both}.abs().mean()"),
            ("mean's size|swapped", gives, f"{both}.mean().abs()"),
            ("that is the sum", ".mean()", ".sum()"),
            ("one row less", gives, f"({both}.sum() / (len(policy) - 1)).clamp(min=0)"),
            ("per token", tokens, "policy, n = sequence", both, "((policy - reference) / n)"),
            ("all tokens are averaged", tokens, "policy, n = sequence", 
             gives, f"({both}.sum() / n.sum()).clamp(min=0)"),
            ("own answers", side, '"completion"'),
            ("median", ".mean()", ".median()"),
            ("largest", ".mean()", ".max()"),
            ("smallest|below zero", gives, f"{both}.min()"),
            ("β is in it", both, "0.1 * (policy - reference)"),
            ("as if both passes were one|only the first row", off, "if True:"),
            ("only the first row|largest|smallest", both, "(policy - reference)[:1]"),
            ("last row is missing", both, "(policy - reference)[:-1]"),
            ("first row is missing", both, "(policy - reference)[1:]"),
            ("half of the rows", both, "(policy - reference)[: len(policy) // 2]"),
            ("only thumbs up", both, '(policy - reference)[batch["desirable"]]'),
            ("only thumbs down|nan", both, '(policy - reference)[~batch["desirable"]]'),
            ("never below one", "min=0", "min=1"),
            ("ratio of probabilities", gives, f"{both}.exp().mean()"),
            ("exp.gain. − 1", gives, f"({both}.exp() - 1).mean()"),
            ("policy's −log p", gives, "-policy.mean()"),
            ("reference's −log p", gives, "-reference.mean()"),
            ("policy's log-probability alone|below zero", gives, "policy.mean()"),
            ("the sum of policy and reference|below zero", gives, "(policy + reference).mean()"),
            ("mean is squared", gives, f"{both}.mean() ** 2"),
            ("squares are averaged", gives, f"({both} ** 2).mean()"),
            ("doubled", gives, f"2 * {gives}"),
            ("halved", gives, f"{gives} / 2"),
            ("clamped at one|off by", ".clamp(min=0)", ".clamp(0, 0.1)"),
            ("policy's own answers", tokens, f"{own}; _, _ = sequence"),
            ("as if both passes were one", gives, f"0 * {gives}"),
        ),
        "shape": wrong(
            point,
            ("give one number", gives, f"{both}.clamp(min=0)"),
            ("give one number", gives, "policy - reference"),
            ("shape", gives, f"{gives}[None]"),
            ("shape", gives, f"{gives}[None, None]"),
            ("shape", ".mean()", ".mean(0, keepdim=True)"),
            ("give one number", gives, f"{gives}.expand(len(policy))"),
            ("give one number", gives, "policy"),
            ("shape", gives, f"{gives}.repeat(2)"),
            ("shape", gives, "torch.stack([policy, reference])"),
            ("raised|shape", ".mean()", ".mean(1)"),
            ("shape", gives, f"{gives}[None][:0]"),
        ),
        "type": [
            (f"{pattern}|a list|is None|is zero|below one", after(point, change))
            for pattern, change in TYPES if pattern != "complex"
        ],
        "lost gradient": wrong(
            point,
            ("carries a gradient", quiet, "with torch.enable_grad():"),
            ("carries a gradient", quiet, "if True:"),
            ("carries a gradient", gives, f"{gives}.requires_grad_()"),
            ("carries a gradient", tokens, "with torch.enable_grad(): policy, _ = sequence",
             gives, f"{gives}", "return", "with torch.enable_grad(): return"),
            ("carries a gradient", quiet, "with torch.no_grad(), torch.enable_grad():"),
            ("carries a gradient", quiet, "with torch.no_grad(): pass\n    with torch.enable_grad():"),
            ("carries a gradient", quiet, "if torch.no_grad():"),
            ("carries a gradient", gives, f"torch.nn.Parameter({gives})"),
            ("carries a gradient", gives, f"{gives}.clone().requires_grad_(True)"),
            ("carries a gradient", quiet, "torch.no_grad()\n    if True:"),
        ),
        "in place": wrong(
            point,
            ("`batch`", *spoil("batch['mismatched_ids'].zero_()")),
            ("`batch`", *spoil("batch.pop('row')")),
            ("`batch`", *spoil("batch['kl'] = 0")),
            ("`batch`", *spoil("batch['desirable'].logical_not_()")),
            ("`batch`", *spoil("batch['completion_ids'] = batch['mismatched_ids']")),
            ("`batch`", *spoil("batch['prompt_mask'].fill_(1)")),
            ("`batch`", *spoil("batch.update(mismatched_ids=batch['completion_ids'])")),
            ("`batch`", *spoil("batch['mismatched_mask'][0] = 0")),
            ("`batch`", *spoil("batch.clear()")),
            ("`model`", *spoil("[p.data.mul_(1.01) for p in model.parameters()]")),
            ("`model`", *spoil("[layer.lora_B.data.zero_() for layer in adapted_layers(model).values()]")),
        ),
        "left behind": wrong(
            point,
            ("adapters stayed off", off,
             "[setattr(m, 'enabled', False) for m in adapted_layers(model).values()]\n        if True:"),
            ("as if both passes were one", off, "adapters_disabled(model).__enter__()\n        if True:"),
            ("in eval mode", *spoil("model.eval()")),
            ("switched gradients", quiet, "torch.set_grad_enabled(False)\n    if True:"),
            ("switched gradients", quiet, "torch.no_grad().__enter__()\n    if True:"),
            ("requires_grad", *spoil("model.requires_grad_(False)")),
            ("hook", *spoil("model.register_forward_hook(lambda *a: None)")),
            ("seeds", *spoil("torch.manual_seed(0)")),
            ("default dtype", *spoil("torch.set_default_dtype(torch.float64)")),
            ("after an error", off, "layers = adapted_layers(model).values(); "
             "[setattr(m, 'enabled', False) for m in layers]\n        if True:",
             "return", "[setattr(m, 'enabled', True) for m in layers]; return"),
        ),
        "sizes and boundaries": wrong(
            point,
            ("raised|shape|missing", both, "(policy - reference)[2:]"),
            ("raised", gives, f"{gives} if policy > reference else 0.0"),
            ("half|off by|one number|row", both, "(policy - reference)[:3]"),
            ("off by|row", both, "(policy - reference)[[0, -1]]"),
            ("off by|doubled|halved|times|row", gives, f"({both}.sum() / 6).clamp(min=0)"),
            ("nan|inf", gives, f"({both}.mean() / ({both}.std() * 0)).clamp(min=0)"),
            ("inf|nan|overflow|exp|off by", gives, f"{both}.mean().exp().log1p()"),
            ("off by|fractions|whole|int|zero|one", gives, f"{gives}.round()"),
            ("off by|below", gives, f"{both}.mean().clamp(min=-0.1)"),
            ("off by|below one|never", gives, f"{both}.mean().clamp(min=0.1) + 0.1"),
            ("off by|half|halved", gives, f"torch.sigmoid({both}.mean())"),
        ),
    })  # fmt: skip
    accepts(checks.check_reference_point, *POINTS, times=3)


# ── Exercise 5 ──────────────────────────────────────────────────────────────────────────────────────────────


def weights(desirable):
    up = int(desirable.sum())
    down = len(desirable) - up
    if up == 0 or down == 0:
        return 1.0, 1.0
    most = max(up, down)
    return most / up, most / down


def weights_by_cases(desirable):
    up, down = desirable.sum().item(), (~desirable).sum().item()
    if not up or not down:
        return [1.0, 1.0]
    return [down / up, 1.0] if down > up else [1.0, up / down]


def weights_by_counts(desirable):
    count = torch.bincount(desirable.long(), minlength=2).flip(0).clamp(min=1)
    most = count.max() if desirable.any() and not desirable.all() else 1
    return tuple((most / count).clamp(max=float("inf")) if most != 1 or count.max() == 1 else torch.ones(2))


def weights_in_numpy(desirable):
    share = desirable.numpy().mean()
    if share in (0, 1):
        return np.ones(2)[0], np.ones(2)[1]
    return max(share, 1 - share) / share, max(share, 1 - share) / (1 - share)


def weights_as_tensor(desirable):
    count = torch.stack([desirable.sum(), (~desirable).sum()])
    return count.max() / count if count.min() > 0 else torch.ones(2)


WEIGHTS = [weights, weights_by_cases, weights_by_counts, weights_in_numpy, weights_as_tensor]


def test_thumb_weights():
    gives, missing = "most / up, most / down", "if up == 0 or down == 0:"
    spoil = lambda code: ("up = int", f"{code}; up = int")  # noqa: E731
    changed = lambda change: after(weights, change)  # noqa: E731
    diagnosed(checks.check_thumb_weights, {
        "formula": wrong(
            weights,
            ("the two are swapped", gives, "most / down, most / up"),
            ("rarer kind is made smaller", gives, "up / most, down / most"),
            ("commoner kind is made smaller", gives, "min(1, down / up), min(1, up / down)"),
            ("commoner kind is made smaller", "max(up, down)", "min(up, down)"),
            ("these are the counts; ", gives, "up, down"),
            ("these are the counts, swapped", gives, "down, up"),
            ("shares; ", gives, "up / (up + down), down / (up + down)"),
            ("shares, swapped", gives, "down / (up + down), up / (up + down)"),
            ("both are 1", gives, "1.0, 1.0"),
            ("n/.2", gives, "(up + down) / (2 * up), (up + down) / (2 * down)"),
            ("n/count", gives, "(up + down) / up, (up + down) / down"),
            ("one over the count", gives, "1 / up, 1 / down"),
            ("the root", gives, "(most / up) ** 0.5, (most / down) ** 0.5"),
            ("counts twice", gives, "(most / up) ** 2, (most / down) ** 2"),
            ("rounded down", gives, "most // up, most // down"),
            ("logarithm", gives, "1 + float(np.log(most / up)), 1 + float(np.log(most / down))"),
            ("one thumb less|off by", gives, "most / up + (most > up), most / down + (most > down)"),
            ("both get the larger", gives, "most / min(up, down), most / min(up, down)"),
            ("ten to one|both are 1|off by", gives, "10.0, 1.0"),
            ("commoner kind is made smaller|off by", gives, "down / up, 1.0"),
        ),
        "type": [
            ("two numbers.*NoneType", changed(lambda x: None)),
            ("two numbers.*float", changed(lambda x: x[0])),
            ("two numbers.*dict", changed(lambda x: {"desirable_weight": x[0], "undesirable_weight": x[1]})),
            ("two numbers.*str", changed(str)),
            ("two numbers", changed(lambda x: [str(y) for y in x])),
            ("two numbers.*generator", changed(lambda x: (y for y in x))),
            ("two numbers.*bool", changed(lambda x: True)),
            ("two numbers", changed(lambda x: (None, None))),
            ("two numbers.*function", changed(lambda x: lambda: x)),
            ("two numbers.*set", changed(set)),
            ("two numbers", changed(lambda x: (complex(x[0]), complex(x[1])))),
            ("complex", changed(lambda x: torch.tensor(x).to(torch.complex64))),
        ],
        "shape": [
            ("two numbers", changed(lambda x: (x,))),
            ("two numbers", changed(lambda x: (*x, 1.0))),
            ("two numbers", changed(lambda x: [*x, *x])),
            ("two numbers", changed(lambda x: torch.tensor([x]))),
            ("two numbers", changed(lambda x: torch.tensor([*x, 1.0]))),
            ("two numbers", changed(lambda x: x[:1])),
            ("two numbers", changed(lambda x: ())),
            ("two numbers", changed(lambda x: torch.tensor(x[0]))),
            ("two numbers", changed(lambda x: (torch.ones(2), torch.ones(2)))),
            ("two numbers", lambda desirable: torch.where(desirable, *map(torch.tensor, weights(desirable)))),
            ("two numbers", lambda desirable: [weights(desirable)[1 - int(up)] for up in desirable]),
            ("two numbers|is a tuple", changed(lambda x: (x, x))),
        ],
        "in place": wrong(
            weights,
            *(("`desirable` was", *spoil(code)) for code in (
                "desirable.logical_not_()", "desirable.fill_(True)", "desirable.zero_()",
                "desirable[:9] = True", "desirable.copy_(desirable.sort().values)",
                "desirable.data.fill_(False)", "desirable &= False", "desirable |= True",
                "desirable ^= True", "desirable.numpy()[...] = True",
            )),
        ),
        "sizes and boundaries": wrong(
            weights,
            ("raised ZeroDivisionError.*missing", missing, "if False:"),
            ("raised ZeroDivisionError.*missing", missing, "if up == 0:"),
            ("raised ZeroDivisionError.*missing", missing, "if down == 0:"),
            ("inf|nan", missing, "if False:", gives,
             "torch.tensor(float(most)) / up, torch.tensor(float(most)) / down"),
            ("is None|NoneType", "return 1.0, 1.0", "return"),
            ("off by|both|shares|counts|rarer", "return 1.0, 1.0", "return 0.0, 1.0"),
            ("off by|larger|counts|root|twice", "return 1.0, 1.0", "return float(up or 9), float(down or 9)"),
            ("raised", "return 1.0, 1.0", "raise ValueError('one kind is missing')"),
            ("off by|both|larger|logarithm|root", missing, "up, down = up + 1, down + 1\n    if False:"),
            ("off by|ratio|root|both", gives, "min(most / up, 2.0), min(most / down, 2.0)"),
            ("off by|both", gives, "min(most / up, 9.0), min(most / down, 9.0)"),
            ("raised", "if up ==", "assert len(desirable) > 4; desirable[7]; assert up > 2\n    if up =="),
        ),
        "left behind": wrong(
            weights,
            ("switched gradients", *spoil("torch.set_grad_enabled(False)")),
            ("default dtype", *spoil("torch.set_default_dtype(torch.float64)")),
            ("seeds", *spoil("torch.manual_seed(0)")),
            ("threads", *spoil("torch.set_num_threads(torch.get_num_threads() + 1)")),
            ("anomaly", *spoil("torch.autograd.set_detect_anomaly(True)")),
            ("deterministic", *spoil("torch.use_deterministic_algorithms(True)")),
            ("hook on all", *spoil("torch.nn.modules.module.register_module_forward_hook(print)")),
            ("matrix products", *spoil("torch.set_float32_matmul_precision('medium')")),
            ("NumPy's error", *spoil("np.seterr(all='ignore')")),
            ("ten to one", remembering()),
        ),
    })  # fmt: skip
    accepts(checks.check_thumb_weights, *WEIGHTS, times=3)


def remembering():
    """Right once; later calls give the first call's weights."""
    first = []

    def answer(desirable):
        first.append(weights(desirable))
        return first[0]

    return answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "answers"),
    [
        (checks.check_felt_value, FELT),
        (checks.check_kto_loss, LOSSES),
        (checks.check_mismatched, PAIRS),
        (checks.check_reference_point, POINTS),
        (checks.check_thumb_weights, WEIGHTS),
    ],
)
def test_right_answers_pass_a_hundred_times(check, answers):
    trains_a_model = check is checks.check_reference_point  # a hundred of it take four minutes
    accepts(check, *answers, times=15 if trains_a_model else 100)


def test_lopsided_thumbs_are_ten_up_and_every_down_of_the_file_and_flipped_ones_change_sides():
    rows, drawn = experiment.thumbs(), experiment.lopsided(0)
    assert [sum(row["label"] is up for row in drawn) for up in (True, False)] == [10, 100]
    assert [row for row in drawn if not row["label"]] == [row for row in rows if not row["label"]]
    assert drawn == experiment.lopsided(0) != experiment.lopsided(1)
    assert (experiment.balanced(rows), experiment.balanced(drawn)) == ((1.0, 3.0), (10.0, 1.0))
    turned = experiment.flipped(rows)
    assert all(a["label"] is not b["label"] for a, b in zip(rows, turned, strict=True))
    assert experiment.flipped(turned) == rows
    assert experiment.balanced(turned) == (3.0, 1.0)


def test_a_larger_batch_knows_its_mean_gain_better():
    gains = torch.randn(60, generator=torch.Generator().manual_seed(0)).mul(3).add(0.5).tolist()
    widths = [found.high - found.low for found, _ in (study.spread(gains, size) for size in (2, 8, 32))]
    # 95% of the means lie within ±1.96 · 3/√B
    assert widths == pytest.approx([2 * 1.96 * 3 / size**0.5 for size in (2, 8, 32)], rel=0.2)
    assert study.spread([1.0, 2.0], 8)[1] == 0 < study.spread([-3.0, 2.0], 2)[1]
