"""Every check of lab 3.1.8 takes right answers of any spelling, and names what is wrong in wrong ones.

The wrong answers stand by kind, ten or more of each: formula, shape, in place, lost gradient, wrong type,
one pair and many, boundaries, state left behind.
"""

import math
import re
import statistics

import numpy as np
import pytest
import torch
from helpers import accepts, mutant, printed_by
from torch.nn import functional as F

from spark_ft.lab.checks import CheckFailed
from spark_ft.lab.checks import lab_3_1_8 as checks
from spark_ft.lab.checks.told import MESSAGE
from spark_ft.methods import preference

# ── wrong answers that can be made of every right one ───────────────────────────────────────────────────────


def after(right, change):
    """The right answer, its result changed."""
    return lambda *given, **options: change(right(*given, **options))


def on_inputs(right, change, only=None):
    """The right answer on changed inputs, all that need a gradient or the one at a place."""

    def answer(*given, **options):
        picked = [i for i, x in enumerate(given) if torch.is_tensor(x) and x.requires_grad]
        picked = picked if only is None else [picked[min(only, len(picked) - 1)]]
        return right(*(change(x) if i in picked else x for i, x in enumerate(given)), **options)

    return answer


def also(right, act):
    """The right answer, after which `act` is called with the inputs."""

    def answer(*given, **options):
        out = right(*given, **options)
        act(*given)
        return out

    return answer


SHAPES = [
    lambda x: x.mean(),
    lambda x: x.sum(),
    lambda x: x[None],
    lambda x: x[:, None],
    lambda x: x[None, None],
    lambda x: torch.stack([x, x]),
    lambda x: torch.cat([x, x]),
    lambda x: x[:, None] + 0 * x,
    lambda x: x[0],
    lambda x: x[:-1],
    lambda x: x.squeeze(),
]
TYPES = [
    lambda x: None,
    lambda x: (x,),
    lambda x: (x, x.mean()),
    lambda x: [x],
    lambda x: {"loss": x},
    lambda x: str(x),
    lambda x: lambda: x,
    lambda x: (y for y in x),
    lambda x: x.detach().numpy(),
    lambda x: x.tolist(),
    lambda x: x.to(torch.complex64),
    lambda x: x.int(),
]
LOST = [
    lambda right: on_inputs(right, lambda x: x.detach()),
    lambda right: on_inputs(right, lambda x: x.data),
    lambda right: on_inputs(right, lambda x: torch.tensor(x.tolist())),
    lambda right: on_inputs(right, lambda x: torch.tensor([y.item() for y in x.reshape(-1)]).view(x.shape)),
    lambda right: on_inputs(right, lambda x: torch.from_numpy(x.detach().numpy())),
    lambda right: on_inputs(right, lambda x: x.clone().detach().requires_grad_()),
    lambda right: on_inputs(right, lambda x: x.detach(), only=0),
    lambda right: after(right, lambda x: x.detach()),
    lambda right: after(right, lambda x: torch.tensor(x.tolist(), requires_grad=True)),
    lambda right: torch.no_grad()(right),
    lambda right: after(right, lambda x: x.detach() + 0 * x),
]
IN_PLACE = [
    lambda x, *_: x.data.add_(1),
    lambda x, *_: x.data.mul_(2),
    lambda x, *_: x.data.neg_(),
    lambda x, *_: x.data.exp_(),
    lambda x, *_: x.data.zero_(),
    lambda x, *_: x.data.clamp_(min=-1.0),
    lambda x, *_: x.data.copy_(x.data - 0.5),
    lambda x, *_: x.data.__setitem__(0, -3.0),
    lambda x, *_: x.data.sub_(x.data.mean() + 1),
    lambda x, *_: x.data.fill_(-1.0),
]
STATE = [
    lambda *_: torch.set_grad_enabled(False),
    lambda *_: torch.set_default_dtype(torch.float64),
    lambda *_: torch.manual_seed(0),
    lambda *_: torch.randn(3),
    lambda *_: torch.set_num_threads(torch.get_num_threads() + 1),
    lambda *_: torch.use_deterministic_algorithms(True, warn_only=True),
    lambda *_: torch.autograd.set_detect_anomaly(True),
    lambda *_: np.seterr(over="raise"),
    lambda *_: torch.set_float32_matmul_precision("medium"),
    lambda *_: torch.set_autocast_enabled("cpu", True),
]


def remembers(right):
    """Computes once for each number of pairs, and gives that from then on."""
    kept = {}

    def answer(*given, **options):
        key = (len(given[0]), *options.items())
        return kept.setdefault(key, right(*given, **options))

    return answer


def of_every_kind(right, gradient=True):
    """(kind, pattern of the diagnosis, wrong answer) that every exercise on tensors shares."""
    rows = [("shape", "shape|one number", after(right, change)) for change in SHAPES]
    types = (
        "not a tensor|is None|no gradient|carry no gradient|complex|fractions|is a tuple|is a list|is a gen"
    )
    rows += [("type", types, after(right, change)) for change in TYPES]
    rows += [("in place", "changed in place|in-place", also(right, act)) for act in IN_PLACE]
    left = "your code|random numbers|seed"
    rows += [("state", left, also(right, act)) for act in STATE]
    rows += [("state", "remembered", remembers(right))] if gradient else []
    rows += [("gradient", "gradient", make(right)) for make in LOST] if gradient else []
    return rows


def formulas(right, *rows):
    """(kind, pattern, wrong answer): pieces of the right one's source replaced, or another function."""
    return [
        ("formula", pattern, mutant(right, *rest) if len(rest) > 1 else rest[0]) for pattern, *rest in rows
    ]


def diagnosed(check, rows):
    """Require ten wrong answers of each kind, 97% of all refused, and 90% with the right diagnosis."""
    kinds, accepted, missed = {}, [], []
    for kind, pattern, answer in rows:
        number = kinds[kind] = kinds.get(kind, 0) + 1
        try:
            said = f"it passes: {printed_by(check, answer)}"
            accepted.append(f"{kind} {number} (“{pattern}”)")
        except CheckFailed as failure:
            said = str(failure)
            assert len(said) <= MESSAGE, f"{len(said)} characters: {said}"
            if re.search(pattern, said, re.S):
                continue
        missed.append(f"{kind} {number}: expected “{pattern}”, but: {said}")
    few = {kind: count for kind, count in kinds.items() if count < 10}
    assert not few, f"fewer than ten wrong answers: {few}"
    report = "\n".join(missed)
    print(f"{check.__name__}: {len(rows)} wrong answers, {len(accepted)} accepted\n{report}")
    assert len(accepted) <= 0.03 * len(rows), f"accepted: {accepted}"
    assert len(missed) <= 0.1 * len(rows), f"{len(missed)} of {len(rows)} without the diagnosis:\n{report}"


# ── mean_logps ──────────────────────────────────────────────────────────────────────────────────────────────


def mean_logps(logps, mask):
    return (logps * mask).sum(1) / mask.sum(1)


def mean_by_where(logps, mask):
    return torch.where(mask, logps, 0.0).sum(dim=-1) / mask.float().sum(dim=-1)


def mean_by_rows(logps, mask):
    return torch.stack([row[real].mean() for row, real in zip(logps, mask, strict=True)])


def mean_by_einsum(logps, mask):
    return torch.einsum("bl,bl->b", logps, mask.to(logps.dtype)) / mask.count_nonzero(dim=1)


def mean_by_fill(logps, mask):
    return logps.masked_fill(~mask, float("nan")).nanmean(dim=1)


MEANS = (mean_logps, mean_by_where, mean_by_rows, mean_by_einsum, mean_by_fill)
MEAN_FORMULAS = formulas(
    mean_logps,
    ("it is the sum", "/ mask.sum(1)", ""),
    ("prompt and padding are in it", lambda logps, mask: logps.mean(1)),
    ("row's length", "/ mask.sum(1)", "/ mask.shape[1]"),
    ("other way round", lambda logps, mask: mean_logps(logps, ~mask)),
    ("whole batch's tokens", "/ mask.sum(1)", "/ mask.sum()"),
    ("mean answer's length", "/ mask.sum(1)", "/ mask.sum(1).float().mean()"),
    ("longest answer", "/ mask.sum(1)", "/ mask.sum(1).max()"),
    ("one token too many", "/ mask.sum(1)", "/ (mask.sum(1) + 1)"),
    ("one token too few", "/ mask.sum(1)", "/ (mask.sum(1) - 1).clamp(min=1)"),
    ("over the whole row", "(logps * mask)", "logps"),
    ("sign", "return ", "return -"),
    ("probabilities are averaged", "(logps *", "(logps.exp() *"),
    ("log of the mean probability", "return (logps * mask).sum(1) / mask.sum(1)",
     "return ((logps.exp() * mask).sum(1) / mask.sum(1)).log()"),
    ("square root", "/ mask.sum(1)", "/ mask.sum(1).sqrt()"),
    ("multiplied by the length", "/ mask", "* mask"),
)  # fmt: skip
MEAN_SIZES = [
    ("one and many", pattern, answer)
    for pattern, answer in (
        ("shape|raised", lambda logps, mask: mean_logps(logps, mask)[:2]),
        ("shape|one number", lambda logps, mask: logps[mask].mean()),
        ("shape|raised", lambda logps, mask: (logps * mask).sum(0) / mask.sum(0)),
        ("raised", lambda logps, mask: (logps * mask).sum(2) / mask.sum(2)),
        ("whole batch's mean", lambda logps, mask: logps[mask].mean().expand(len(logps))),
        ("mean over the answers", lambda logps, mask: mean_logps(logps, mask).mean().expand(len(logps))),
        ("raised|shape|off by", lambda logps, mask: logps[mask].view(len(logps), -1).mean(1)),
        ("off by|every|answer", lambda logps, mask: mean_logps(logps, mask).sort().values),
        ("off by|answer", lambda logps, mask: mean_logps(logps, mask).cumsum(0)),
        ("shape|one number", lambda logps, mask: mean_logps(logps, mask).squeeze()),
    )
]
MEAN_EDGES = [
    ("boundaries", ".", answer)
    for answer in (
        lambda logps, mask: mean_logps(logps[:, 1:], mask[:, 1:]),
        lambda logps, mask: mean_logps(logps[:, :-1], mask[:, 1:]),
        lambda logps, mask: mean_logps(logps[:, :-1], mask[:, :-1]),
        lambda logps, mask: (logps * mask).sum(1) / mask.sum(1).clamp(min=2),
        lambda logps, mask: mean_logps(logps.clamp(min=-2), mask),
        lambda logps, mask: (logps * mask).sum(1) / (mask.sum(1) + 1e-2),
        lambda logps, mask: mean_logps(logps.roll(1, 1), mask),
        lambda logps, mask: mean_logps(logps, mask.cumsum(1) > 1),
        lambda logps, mask: (logps * mask).sum(1) / (mask.cumsum(1).argmax(1) + 1),
        lambda logps, mask: mean_logps(logps, mask.roll(-1, 1)),
    )
]


def test_mean_logps():
    accepts(checks.check_mean_logps, *MEANS, times=2)
    rows = of_every_kind(mean_logps) + MEAN_FORMULAS + MEAN_SIZES + MEAN_EDGES
    diagnosed(checks.check_mean_logps, rows)


# ── ipo_loss and simpo_loss ─────────────────────────────────────────────────────────────────────────────────


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (margin - 1 / (2 * beta)) ** 2


def ipo_by_pow(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    return torch.pow(chosen - rejected - ref_chosen + ref_rejected - 0.5 / beta, 2)


def ipo_by_product(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    gap = 0.5 / beta - (chosen - ref_chosen) + (rejected - ref_rejected)
    return gap * gap


def ipo_by_mse(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return F.mse_loss(margin, torch.full_like(margin, 1 / (2 * beta)), reduction="none")


def ipo_by_pair(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    pairs = zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)
    return torch.stack([((c - rc) - (r - rr) - 1 / (2 * beta)) ** 2 for c, r, rc, rr in pairs])


IPOS = (ipo_loss, ipo_by_pow, ipo_by_product, ipo_by_mse, ipo_by_pair, preference.ipo_loss)
TARGET, MARGIN = "- 1 / (2 * beta)", "(chosen - ref_chosen) - (rejected - ref_rejected)"
IPO_FORMULAS = formulas(
    ipo_loss,
    ("the target is β;", TARGET, "- beta"),
    ("β/2", TARGET, "- 1 / 2 * beta"),
    ("2β; it should", TARGET, "- 2 * beta"),
    ("half of that", TARGET, "- 1 / beta"),
    ("is added, or", TARGET, "+ 1 / (2 * beta)"),
    ("β multiplies the margin", MARGIN, f"beta * ({MARGIN})"),
    ("β is not used", TARGET, "- 0.5"),
    ("fixed at 0.1", TARGET, "- 5"),
    ("square is missing", " ** 2", ""),
    ("absolute value", "return (margin - 1 / (2 * beta)) ** 2", "return (margin - 1 / (2 * beta)).abs()"),
    ("no target", TARGET, ""),
    ("costs nothing", "return (margin - 1 / (2 * beta))", "return (1 / (2 * beta) - margin).clamp(min=0)"),
    ("changed places", MARGIN, "(rejected - ref_rejected) - (chosen - ref_chosen)"),
    ("reference is forgotten", MARGIN, "chosen - rejected"),
    ("reference is added", MARGIN, "(chosen + ref_chosen) - (rejected + ref_rejected)"),
    ("wrong sign", MARGIN, "(chosen - ref_chosen) - (rejected + ref_rejected)"),
    ("half as large", "** 2", "** 2 / 2"),
    ("DPO's", "return (margin - 1 / (2 * beta)) ** 2", "return -F.logsigmoid(beta * margin)"),
    ("rejected answer is forgotten", MARGIN, "chosen - ref_chosen"),
)  # fmt: skip


def many_pairs(right):
    """Answers that confuse one pair with many."""
    changes = [
        ("mean over the batch", lambda x: x.mean().expand_as(x)),
        ("sum over the batch", lambda x: x.sum().expand_as(x)),
        ("off by|order", lambda x: x.sort().values),
        ("off by|order", lambda x: x.cumsum(0)),
        ("off by|order|gradient", lambda x: x / len(x)),
        ("off by|times too large", lambda x: x * len(x)),
        ("off by|gradient", lambda x: x - x.mean()),
        ("off by|order", lambda x: x.roll(1)),
        ("off by", lambda x: x[0].expand_as(x)),
        ("off by|gradient|mean", lambda x: x.softmax(0)),
        ("one number|shape", lambda x: x.squeeze()),
        ("off by", lambda x: x.max().expand_as(x)),
    ]
    return [("one and many", pattern, after(right, change)) for pattern, change in changes]


def at_the_edges(right, *rows):
    """(pattern, old, new, …) or (pattern, answer), and what clamps and epsilons do."""
    general = [
        ("edge|off by", lambda x: x.clamp(max=1.2)),
        ("edge|off by", lambda x: x.clamp(max=5)),
        ("edge|off by", lambda x: x.clamp(min=1.1)),
        ("off by|edge", lambda x: x + 1e-3),
        ("edge|off by", lambda x: x * (x < 2)),
        ("edge|off by", lambda x: x.half().float()),
        ("edge|off by", lambda x: (x * 100).round() / 100 + 0 * x),
        ("edge|off by", lambda x: 20 * torch.tanh(x / 20)),
        ("edge|off by", lambda x: torch.log(x.exp() + 1e-2)),
        ("edge|off by", lambda x: x.to(torch.bfloat16).float()),
    ]
    found = [("boundaries", pattern, after(right, change)) for pattern, change in general]
    return found + [("boundaries", p, mutant(right, *r) if len(r) > 1 else r[0]) for p, *r in rows]


def test_ipo_loss():
    accepts(checks.check_ipo_loss, *IPOS, times=2)
    rows = of_every_kind(ipo_loss) + IPO_FORMULAS + many_pairs(ipo_loss) + at_the_edges(ipo_loss)
    diagnosed(checks.check_ipo_loss, rows)


def simpo_loss(chosen, rejected, *, beta=2.0, gamma=1.0):
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def simpo_by_softplus(chosen, rejected, *, beta=2.0, gamma=1.0):
    return F.softplus(gamma - beta * (chosen - rejected))


def simpo_by_ratio(chosen, rejected, beta=2.0, gamma=1.0):
    return -F.logsigmoid(beta * (chosen - rejected - gamma / beta))


def simpo_by_logaddexp(chosen, rejected, *, beta=2.0, gamma=1.0):
    gap = gamma + beta * rejected - beta * chosen
    return torch.logaddexp(torch.zeros_like(gap), gap)


def simpo_by_bce(chosen, rejected, *, beta=2.0, gamma=1.0):
    margin = beta * chosen - beta * rejected - gamma
    return F.binary_cross_entropy_with_logits(margin, torch.ones_like(margin), reduction="none")


SIMPOS = (
    simpo_loss,
    simpo_by_softplus,
    simpo_by_ratio,
    simpo_by_logaddexp,
    simpo_by_bce,
    preference.simpo_loss,
)
INSIDE = "beta * (chosen - rejected) - gamma"
SIMPO_FORMULAS = formulas(
    simpo_loss,
    ("multiplied by β", INSIDE, "beta * (chosen - rejected - gamma)"),
    ("γ is added", "- gamma", "+ gamma"),
    ("γ is missing", "- gamma", ""),
    ("β is missing", "beta * (chosen", "(chosen"),
    ("β divides", INSIDE, "(chosen - rejected) / beta - gamma"),
    ("divided by β", "- gamma", "- gamma / beta"),
    ("γ and|changed places", INSIDE, "gamma * (chosen - rejected) - beta"),
    ("fixed at 2", "beta * (", "2.0 * ("),
    ("γ is fixed at 1", "- gamma", "- 1.0"),
    ("chosen and rejected changed places", "(chosen - rejected)", "(rejected - chosen)"),
    ("minus sign is missing", "return -", "return "),
    ("sign inside", INSIDE, f"-({INSIDE})"),
    ("logarithm is missing", "-F.logsigmoid", "-torch.sigmoid"),
    (r"1 − σ", "-F.logsigmoid", "1 - torch.sigmoid"),
    ("hinge", f"-F.logsigmoid({INSIDE})", f"F.relu(-({INSIDE}))"),
    ("bare margin", f"-F.logsigmoid({INSIDE})", f"-({INSIDE})"),
    ("probabilities are compared", "(chosen - rejected)", "(chosen.exp() - rejected.exp())"),
    ("base 2", f"-F.logsigmoid({INSIDE})", f"-F.logsigmoid({INSIDE}) / 0.6931471805599453"),
    ("added; subtract", "chosen - rejected)", "chosen + rejected)"),
)  # fmt: skip
SIMPO_EDGES = at_the_edges(
    simpo_loss,
    ("edge", f"-F.logsigmoid({INSIDE})", f"-torch.log(torch.sigmoid({INSIDE}))"),
    ("edge", f"-F.logsigmoid({INSIDE})", f"torch.log(1 + torch.exp(-({INSIDE})))"),
    ("edge", f"-F.logsigmoid({INSIDE})", f"torch.log1p(torch.exp(-({INSIDE})))"),
    ("edge|off by", f"-F.logsigmoid({INSIDE})", f"-torch.log(torch.sigmoid({INSIDE}) + 1e-6)"),
    ("edge", f"-F.logsigmoid({INSIDE})", f"-torch.log(torch.sigmoid({INSIDE}).clamp(min=1e-6))"),
    ("edge|off by", INSIDE, f"({INSIDE}).clamp(-20, 20)"),
)


def test_simpo_loss():
    accepts(checks.check_simpo_loss, *SIMPOS, times=2)
    rows = of_every_kind(simpo_loss) + SIMPO_FORMULAS + many_pairs(simpo_loss) + SIMPO_EDGES
    diagnosed(checks.check_simpo_loss, rows)


# ── log_odds and orpo_loss ──────────────────────────────────────────────────────────────────────────────────


def log_odds(logp):
    return logp - torch.log(-torch.expm1(logp))


def odds_by_branches(logp):
    small = torch.log1p(-logp.exp().clamp(max=1 - 1e-7))
    return logp - torch.where(logp < -math.log(2), small, torch.log(-torch.expm1(logp)))


def odds_by_ratio(logp):
    return -torch.log(torch.expm1(-logp.clamp(min=-80))) * (logp >= -80) + logp * (logp < -80)


def odds_in_double(logp):
    exact = logp.double()
    return (exact - torch.log(-torch.expm1(exact))).to(logp.dtype)


def odds_by_name(logp):
    return logp.sub((-logp.expm1()).log())


ODDS = (log_odds, odds_by_branches, odds_by_ratio, odds_in_double, odds_by_name)
ONE_MINUS = "-torch.expm1(logp)"
ODDS_FORMULAS = formulas(
    log_odds,
    ("added; subtract", "logp - torch.log", "logp + torch.log"),
    ("take its logarithm", lambda logp: logp.exp() / (1 - logp.exp())),
    (r"that is log\(1 − p\) alone", "return logp - ", "return "),
    ("1 − p is missing", lambda logp: logp * 1),
    (r"1 \+ p", ONE_MINUS, "1 + logp.exp()"),
    ("odds against", lambda logp: -log_odds(logp)),
    ("taken for p", lambda logp: torch.log(-logp / (1 - logp))),
    ("1 − log p", ONE_MINUS, "1 - logp"),
    ("that is p$|that is p;|that is p", lambda logp: logp.exp()),
    ("that is 1 − p", lambda logp: 1 - logp.exp()),
    ("logarithm of a quotient", "logp - torch.log", "logp / torch.log"),
    ("base 2", lambda logp: log_odds(logp) / math.log(2)),
    ("one logarithm is missing", "torch.log(-torch.expm1(logp))", "(-torch.expm1(logp))"),
)  # fmt: skip
ODDS_EDGES = at_the_edges(
    log_odds,
    ("edge", ONE_MINUS, "1 - logp.exp()"),
    ("edge", "torch.log(-torch.expm1(logp))", "torch.log1p(-logp.exp())"),
    ("edge", lambda logp: torch.logit(logp.exp())),
    ("edge", lambda logp: torch.log(logp.exp() / (1 - logp.exp()))),
    ("edge", lambda logp: torch.log(logp.exp()) - torch.log(1 - logp.exp())),
    ("edge", lambda logp: torch.logit(logp.exp(), eps=1e-6)),
    ("edge|off by", ONE_MINUS, "-torch.expm1(logp) + 1e-6"),
    ("edge|off by", ONE_MINUS, "(-torch.expm1(logp)).clamp(min=1e-4)"),
    ("edge|off by", "return logp", "logp = logp.clamp(max=-1e-3)\n    return logp"),
    ("edge|off by", "return logp", "logp = logp.clamp(min=-50)\n    return logp"),
)


def test_log_odds():
    accepts(checks.check_log_odds, *ODDS, times=2)
    rows = of_every_kind(log_odds) + ODDS_FORMULAS + many_pairs(log_odds) + ODDS_EDGES
    diagnosed(checks.check_log_odds, rows)


def orpo_loss(chosen, rejected, nll, *, weight=0.1):
    gap = log_odds(chosen) - log_odds(rejected)
    return nll - weight * F.logsigmoid(gap)


def orpo_by_softplus(chosen, rejected, nll, *, weight=0.1):
    return nll + weight * F.softplus(log_odds(rejected) - log_odds(chosen))


def orpo_by_parts(chosen, rejected, nll, weight=0.1):
    ratio = (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    return nll + weight * -F.logsigmoid(ratio)


def orpo_in_double(chosen, rejected, nll, *, weight=0.1):
    gap = log_odds(chosen.double()) - log_odds(rejected.double())
    return (nll - weight * F.logsigmoid(gap)).float()


def orpo_by_logaddexp(chosen, rejected, nll, *, weight=0.1):
    gap = log_odds(rejected) - log_odds(chosen)
    return weight * torch.logaddexp(torch.zeros_like(gap), gap) + nll


ORPOS = (orpo_loss, orpo_by_softplus, orpo_by_parts, orpo_in_double, orpo_by_logaddexp, preference.orpo_loss)
GAP, LOSS = "log_odds(chosen) - log_odds(rejected)", "nll - weight * F.logsigmoid(gap)"
ORPO_FORMULAS = formulas(
    orpo_loss,
    ("log-probabilities are compared", GAP, "chosen - rejected"),
    ("odds are compared", GAP, "log_odds(chosen).exp() - log_odds(rejected).exp()"),
    ("changed places", GAP, "log_odds(rejected) - log_odds(chosen)"),
    ("so subtract it", "nll -", "nll +"),
    ("comparison is missing", LOSS, "nll + 0 * gap"),
    ("NLL is missing", "nll -", "-"),
    ("NLL is subtracted", LOSS, "-nll - weight * F.logsigmoid(gap)"),
    ("belongs to the comparison", LOSS, "weight * nll - F.logsigmoid(gap)"),
    ("multiplies both", LOSS, "weight * (nll - F.logsigmoid(gap))"),
    ("λ is missing", "weight * F", "F"),
    ("fixed at 0.1", "- weight *", "- 0.1 *"),
    ("inside σ", LOSS, "nll - F.logsigmoid(weight * gap)"),
    ("1 − λ", "return nll", "return (1 - weight) * nll"),
    ("stands in for the NLL", "return nll", "return -chosen + 0 * nll"),
    ("bare difference", "F.logsigmoid(gap)", "gap"),
    ("that is −σ", "F.logsigmoid", "torch.sigmoid"),
    ("only the chosen", GAP, "log_odds(chosen) + 0 * rejected"),
    ("base 2", LOSS, "nll - weight * F.logsigmoid(gap) / 0.6931471805599453"),
    ("averaged over the batch", "F.logsigmoid(gap)", "F.logsigmoid(gap).mean() + 0 * gap"),
)  # fmt: skip
ORPO_EDGES = at_the_edges(
    orpo_loss,
    ("edge|off by", "F.logsigmoid(gap)", "torch.log(torch.sigmoid(gap))"),
    ("edge|off by", "F.logsigmoid(gap)", "torch.log(torch.sigmoid(gap) + 1e-6)"),
    ("edge|off by", GAP, "torch.logit(chosen.exp()) - torch.logit(rejected.exp())"),
    ("edge|off by", GAP, "torch.logit(chosen.exp(), 1e-6) - torch.logit(rejected.exp(), 1e-6)"),
    ("edge|off by", GAP, f"({GAP}).clamp(-20, 20)"),
    ("edge|off by", GAP, "log_odds(chosen.clamp(max=-0.06)) - log_odds(rejected.clamp(min=-40))"),
)


def test_orpo_loss():
    accepts(checks.check_orpo_loss, *ORPOS, times=2)
    rows = of_every_kind(orpo_loss) + ORPO_FORMULAS + many_pairs(orpo_loss) + ORPO_EDGES
    diagnosed(checks.check_orpo_loss, rows)


def mended_orpo(chosen, rejected, chosen_tokens, rejected_tokens, weight=0.1):
    gap = log_odds(chosen / chosen_tokens) - log_odds(rejected / rejected_tokens)
    nll = -chosen.sum() / chosen_tokens.sum()
    return nll - weight * F.logsigmoid(gap)


def mended_by_package(chosen, rejected, chosen_tokens, rejected_tokens, weight=0.1):
    nll = -chosen.sum() / chosen_tokens.sum()
    return preference.orpo_loss(chosen / chosen_tokens, rejected / rejected_tokens, nll, weight=weight)


def mended_by_names(chosen, rejected, chosen_tokens, rejected_tokens, weight=0.1):
    chosen_mean, rejected_mean = chosen.div(chosen_tokens), rejected.div(rejected_tokens)
    nll = -(chosen_mean * chosen_tokens).sum() / chosen_tokens.sum()
    return nll + weight * F.softplus(log_odds(rejected_mean) - log_odds(chosen_mean))


def mended_in_double(chosen, rejected, chosen_tokens, rejected_tokens, weight=0.1):
    return mended_orpo(chosen.double(), rejected.double(), chosen_tokens, rejected_tokens, weight)


def mended_by_list(chosen, rejected, chosen_tokens, rejected_tokens, weight=0.1):
    nll = -chosen.sum() / chosen_tokens.sum()
    rows = zip(chosen / chosen_tokens, rejected / rejected_tokens, strict=True)
    return torch.stack([nll - weight * F.logsigmoid(log_odds(c) - log_odds(r)) for c, r in rows])


MENDED = (mended_orpo, mended_by_package, mended_by_names, mended_in_double, mended_by_list)
ROWS = "log_odds(chosen / chosen_tokens) - log_odds(rejected / rejected_tokens)"
MENDED_FORMULAS = formulas(
    mended_orpo,
    ("still those of sums", ROWS, "log_odds(chosen) - log_odds(rejected)"),
    ("rejected answer's odds", "log_odds(rejected / rejected_tokens)", "log_odds(rejected)"),
    ("chosen answer's odds", "log_odds(chosen / chosen_tokens)", "log_odds(chosen)"),
    ("both are divided by the chosen", "rejected / rejected_tokens", "rejected / chosen_tokens"),
    ("both are divided by the rejected", "(chosen / chosen_tokens)", "(chosen / rejected_tokens)"),
    ("counts changed places", ROWS,
     "log_odds(chosen / rejected_tokens) - log_odds(rejected / chosen_tokens)"),
    ("own tokens", ROWS,
     "log_odds(chosen / chosen_tokens.sum()) - log_odds(rejected / rejected_tokens.sum())"),
    ("not their log-odds", ROWS, "log_odds(chosen) / chosen_tokens - log_odds(rejected) / rejected_tokens"),
    ("NLL was right: one", "-chosen.sum() / chosen_tokens.sum()", "-chosen / chosen_tokens"),
    ("mean of means", "-chosen.sum() / chosen_tokens.sum()", "-(chosen / chosen_tokens).mean()"),
    ("now it is a sum", "/ chosen_tokens.sum()", ""),
    ("each answer's sum", "-chosen.sum() / chosen_tokens.sum()", "-chosen"),
    ("number of pairs", "-chosen.sum() / chosen_tokens.sum()", "-chosen.mean()"),
    ("NLL is gone", "return nll", "return 0"),
    ("rejected answers too", "-chosen.sum() / chosen_tokens.sum()",
     "-(chosen.sum() + rejected.sum()) / (chosen_tokens.sum() + rejected_tokens.sum())"),
    ("log-probabilities are compared", ROWS, "chosen / chosen_tokens - rejected / rejected_tokens"),
    ("λ is missing", "weight * F", "F"),
    ("so subtract it", "nll -", "nll +"),
)  # fmt: skip
MENDED_EDGES = at_the_edges(
    mended_orpo,
    ("off by|tokens", "chosen.sum() / chosen_tokens.sum()", "chosen.sum() / (chosen_tokens.sum() - 1)"),
    ("off by|tokens", "chosen / chosen_tokens)", "chosen / (chosen_tokens + 1))"),
    ("off by", "rejected / rejected_tokens)", "(rejected / rejected_tokens).clamp(min=-2))"),
    ("off by|shape", "-chosen.sum() / chosen_tokens.sum()", "-chosen[0] / chosen_tokens[0]"),
)


def test_mended_orpo():
    accepts(checks.check_mended_orpo, *MENDED, times=2)
    rows = of_every_kind(mended_orpo) + MENDED_FORMULAS + many_pairs(mended_orpo) + MENDED_EDGES
    diagnosed(checks.check_mended_orpo, rows)


# ── push and verdict ────────────────────────────────────────────────────────────────────────────────────────


def push(loss, margin):
    margin = margin.clone().requires_grad_()
    loss(margin).sum().backward()
    return -margin.grad


def push_by_grad(loss, margin):
    leaf = (
        margin.detach().requires_grad_(True) if margin.requires_grad else margin.clone().requires_grad_(True)
    )
    (slope,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return -slope


def push_by_func(loss, margin):
    return -torch.func.grad(lambda m: loss(m).sum())(margin)


def push_by_difference(loss, margin):
    m, step = margin.double(), 1e-5
    return ((loss(m - step) - loss(m + step)) / (2 * step)).float()


def push_one_by_one(loss, margin):
    slopes = []
    for m in margin:
        leaf = m.clone().requires_grad_()
        loss(leaf).backward()
        slopes.append(-leaf.grad)
    return torch.stack(slopes)


PUSHES = (push, push_by_grad, push_by_func, push_by_difference, push_one_by_one)
CURVE = "loss(margin).sum()"
PUSH_FORMULAS = formulas(
    push,
    ("sign", "return -margin.grad", "return margin.grad"),
    ("loss itself", lambda loss, margin: loss(margin)),
    ("minus the loss", lambda loss, margin: -loss(margin)),
    ("don't average", CURVE, "loss(margin).mean()"),
    ("average's slope", CURVE, "(-loss(margin)).mean()"),
    ("sum over all", "return -margin.grad", "return -margin.grad.sum().expand(len(margin))"),
    ("mean over all", "return -margin.grad", "return -margin.grad.mean().expand(len(margin))"),
    ("pushes back", "return -margin.grad", "return margin.grad.abs()"),
    ("squared", CURVE, "loss(margin).square().sum()"),
    ("twice", "return -margin.grad", "return -2 * margin.grad"),
    ("zero", "return -margin.grad", "return torch.zeros_like(margin).detach()"),
    ("margin itself", "return -margin.grad", "return margin.detach()"),
)


def test_push():
    accepts(checks.check_push, *PUSHES, times=2)
    rows = of_every_kind(push, gradient=False) + PUSH_FORMULAS
    rows = [row for row in rows if row[0] not in ("in place", "type", "shape")]
    rows += [("shape", "shape|one number|raised", after(push, change)) for change in SHAPES]
    kept = [change for i, change in enumerate(TYPES) if i not in (8, 9)]  # numbers are numbers here
    rows += [
        ("type", "not a tensor|is None|complex|tuple|list|generator|whole|fractions", after(push, c))
        for c in kept
    ]
    acts = [lambda loss, m, act=act: act(m) for act in IN_PLACE]
    rows += [("in place", "changed in place", also(push, act)) for act in acts]
    graph = [
        lambda loss, m: torch.autograd.grad(loss(m.requires_grad_()).sum(), m)[0].neg(),
        lambda loss, m: (m.requires_grad_(), loss(m).sum().backward(), -m.grad)[2],
        lambda loss, m: -torch.autograd.grad(loss(x := m.clone().requires_grad_()).sum(), x)[0] + 0 * x,
        lambda loss, m: push(loss, m).requires_grad_(),
        lambda loss, m: torch.nn.Parameter(push(loss, m)),
        torch.no_grad()(push),
        lambda loss, m: push(lambda x: loss(x.detach()), m),
        lambda loss, m: push(lambda x: torch.tensor(loss(x).tolist()), m),
        lambda loss, m: push(lambda x: loss(x).data, m),
        lambda loss, m: (lambda x: (loss(x).sum().backward(), -x.grad)[1])(m.clone()),
    ]
    rows += [("gradient", "requires_grad|gradient|graph|raised", answer) for answer in graph]
    diagnosed(checks.check_push, rows)


T95 = {3: 4.303, 4: 3.182, 5: 2.776}


def verdict(ours, theirs):
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, n = statistics.mean(differences), len(differences)
    half = T95[n] * statistics.stdev(differences) / n**0.5
    return "better" if mean - half > 0 else "worse" if mean + half < 0 else "cannot tell"


def verdict_in_torch(ours, theirs):
    d = torch.tensor(ours) - torch.tensor(theirs)
    half = T95[len(d)] * d.std() / math.sqrt(len(d))
    if d.mean() > half:
        return "better"
    return "worse" if d.mean() < -half else "cannot tell"


def verdict_in_numpy(ours, theirs):
    d = np.array(ours) - np.array(theirs)
    half = T95[len(d)] * d.std(ddof=1) / np.sqrt(len(d))
    low, high = d.mean() - half, d.mean() + half
    return "cannot tell" if low <= 0 <= high else "better" if low > 0 else "worse"


def verdict_by_package(ours, theirs):
    from spark_ft import paired_difference

    return (
        paired_difference(ours, theirs)
        .verdict("better", "worse")
        .replace("no measurable difference", "cannot tell")
    )


def verdict_by_scipy(ours, theirs):
    from scipy.stats import ttest_rel

    found = ttest_rel(ours, theirs)
    return "cannot tell" if not found.pvalue < 0.05 else "better" if found.statistic > 0 else "worse"


VERDICTS = (verdict, verdict_in_torch, verdict_in_numpy, verdict_by_package, verdict_by_scipy)
HALF = "T95[n] * statistics.stdev(differences) / n**0.5"


def unpaired(ours, theirs):
    apart = statistics.mean(ours) - statistics.mean(theirs)
    half = T95[len(ours)] * math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / len(ours))
    return "better" if apart - half > 0 else "worse" if apart + half < 0 else "cannot tell"


def always(word):
    return lambda ours, theirs: word


VERDICT_ROWS = [
    *formulas(
        verdict,
        ("subtract seed by seed", unpaired),
        ("subtract seed by seed|lower one", "a - b for", "b - a for"),
        ("root of n", " / n**0.5", ""),
        ("n − 1", "stdev(", "pstdev("),
        ("not 1.96", "T95[n] *", "1.96 *"),
        ("not 1.96", "T95[n] *", "2 *"),
        ("2.776|root of n", "T95[n]", "T95[3]"),
        ("4.303", "T95[n]", "T95[5]"),
        ("contains zero|paired|few", HALF, "0"),
        ("not 1.96|three seeds", HALF, "statistics.stdev(differences) / n**0.5"),
        ("contains zero", "mean - half > 0", "mean + half > 0"),
        ("'better'|root|2.776|4.303", "n**0.5", "(n - 1) ** 0.5"),
        ("few|zero|4.303|n − 1", "T95[n]", "{3: 3.182, 4: 2.776, 5: 2.571}[n]"),
    ),
    *(
        ("type", "not a string|is None|one of|raised", answer)
        for answer in (
            always(None), always(True), always(1.0), always(("better",)), always(["better"]),
            always("Better"),
            always("better."), always("no difference"), always(""), always({"verdict": "better"}),
        )
    ),
    *(
        ("in place", "changed|new list", answer)
        for answer in (
            lambda a, b: (verdict(a, b), a.sort(reverse=True))[0],
            lambda a, b: (verdict(a, b), a.clear())[0],
            lambda a, b: (verdict(a, b), b.clear())[0],
            lambda a, b: (verdict(a, b), a.append(0.0))[0],
            lambda a, b: (verdict(a, b), a.pop())[0],
            lambda a, b: (verdict(a, b), b.extend(a))[0],
            lambda a, b: (verdict(a, b), a.__setitem__(0, 0.0))[0],
            lambda a, b: (verdict(a, b), a.insert(0, 1.0))[0],
            lambda a, b: (verdict(a, b), b.__delitem__(0))[0],
            lambda a, b: (verdict(a, b), a.__imul__(2))[0],
        )
    ),
    *(
        ("boundaries", ".", answer)
        for answer in (
            always("better"), always("worse"), always("cannot tell"),
            lambda a, b: verdict(a[:3], b[:3]),
            lambda a, b: "better" if all(x > y for x, y in zip(a, b, strict=True)) else "cannot tell",
            lambda a, b: "better" if min(a) > max(b) else "worse" if max(a) < min(b) else "cannot tell",
            lambda a, b: "better" if statistics.median(a) > statistics.median(b) else "worse",
            lambda a, b: verdict(a, b) if a != b else "worse",
            lambda a, b: verdict(sorted(a), sorted(b)),
            lambda a, b: verdict(a, b).replace("worse", "better"),
        )
    ),
    *(("state", "your code|seed", also(verdict, act)) for act in STATE if act is not STATE[3]),
    ("state", ".", (lambda kept: lambda a, b: kept.setdefault(len(a), verdict(a, b)))({})),
]  # fmt: skip


def test_verdict():
    accepts(checks.check_verdict, *VERDICTS, times=2)
    diagnosed(checks.check_verdict, VERDICT_ROWS)


RIGHT = {
    checks.check_mean_logps: MEANS,
    checks.check_ipo_loss: IPOS,
    checks.check_simpo_loss: SIMPOS,
    checks.check_log_odds: ODDS,
    checks.check_orpo_loss: ORPOS,
    checks.check_mended_orpo: MENDED,
    checks.check_push: PUSHES,
    checks.check_verdict: VERDICTS,
}


@pytest.mark.slow
@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_right_answers_pass_a_hundred_times(check):
    accepts(check, *RIGHT[check], times=100)
