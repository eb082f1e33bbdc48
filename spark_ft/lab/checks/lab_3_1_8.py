"""Checks of lab 3.1.8: losses without a reference, against formulas in float64 and their gradients.

A formula, and each known mistake, is a function of one `x` that holds the inputs and the settings by name.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from spark_ft.lab.checks import call, check, require, require_close, require_gradient, require_parity
from spark_ft.lab.experiments.preferences import pairs
from spark_ft.lab.parity import orpo_against_trl, simpo_against_trl

Answer = Callable[..., Any]
Formula = Callable[[Any], Tensor]
Inputs = dict[str, Tensor]
Batches = Iterable[tuple[Inputs, dict[str, float]]]
SIZES = (5, 1, 3, 8, 2)  # pairs in a batch; one pair must come back as one pair


def _means(size: int) -> Tensor:
    """Log-probabilities per token, as models give them: from −0.05 to some −6."""
    return -0.05 - 6 * torch.rand(size) ** 2


def _batches(names: tuple[str, ...], settings: Iterable[dict[str, float]]) -> Batches:
    for size, options in zip(SIZES, settings, strict=True):
        yield {name: _means(size) for name in names}, options


def _run(answer: Answer, what: str, inputs: dict[str, Any], options: dict[str, float]) -> Any:
    given = [x.clone() if getattr(x, "requires_grad", False) else x for x in inputs.values()]  # no leaf
    state = torch.get_rng_state()
    out = call(answer, what, *given, **options)
    drawn = not torch.equal(state, torch.get_rng_state())
    require(not drawn, f"{what}: random numbers were drawn, or a seed was set; this needs neither")
    return out


def _require_loss(
    answer: Answer,
    formula: Formula,
    mistakes: dict[str, Formula],
    batches: Batches,
    defaults: dict[str, float],
    trained: tuple[str, ...] = ("chosen", "rejected"),
    what: str = "the loss",
    each: str = "pair",
) -> None:
    """Require the formula's value and gradient for every batch, whatever was asked before.

    Args:
        mistakes: message → what a known mistake would give.
        batches: inputs and settings; settings that are left out have their `defaults`.
        trained: inputs that need a gradient.
    """
    for inputs, options in batches:
        size = len(next(iter(inputs.values())))
        said = ", ".join(f"{name}={value:g}" for name, value in options.items())
        here = f"{what} of {size} {each}{'s' if size > 1 else ''}{f' with {said}' if said else ''}"
        leaves = {name: x.requires_grad_(name in trained) for name, x in inputs.items()}
        x = SimpleNamespace(**{n: v.double() for n, v in leaves.items()}, **{**defaults, **options})
        right = formula(x)
        with torch.no_grad():
            wrong = {text: _finite(mistake(x), right) for text, mistake in mistakes.items()}
        out = _run(answer, here, leaves, options)
        require_close(out, right, here, wrong)
        require_gradient(out, {name: leaves[name] for name in trained}, right, here)
        _require_precise(out, here)
        turned = {name: v.detach().flip(0) if v.ndim else v.detach() for name, v in inputs.items()}
        turned = {name: v.requires_grad_(name in trained) for name, v in turned.items()}
        message = "the same in another order gave the numbers of the call before; is something remembered?"
        again = _run(answer, here, turned, options)
        require_close(again, right.flip(0), f"{here}, asked again", {message: right})


def _finite(value: Tensor, right: Tensor) -> Tensor:
    """What a mistake gives, in the right result's shape; where that is no number, what no answer gives."""
    return value.expand_as(right) if torch.isfinite(value).all() else right + math.pi


def _require_precise(out: Tensor, what: str) -> None:
    precise = out.dtype in (torch.float32, torch.float64)
    require(precise, f"{what} came out as {out.dtype}; it should be fp32, as what came in")


def _require_at_the_edge(
    answer: Answer, formula: Formula, numbers: dict, mend: str, **options: float
) -> None:
    """Require value and gradient where naive formulas overflow, or lose all digits."""
    shown = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
    what = f"at the edge ({shown}) the result"
    leaves = {name: torch.tensor([value], requires_grad=True) for name, value in numbers.items()}
    exact = {name: torch.tensor([value], requires_grad=True).double() for name, value in numbers.items()}
    right = formula(SimpleNamespace(**exact, **options))
    out = _run(answer, what, leaves, options)
    near = math.isclose(out.item(), right.item(), rel_tol=1e-4, abs_tol=1e-8)
    require(near, f"{what} is {out.item():.5g}, but should be {right.item():.5g}; {mend}")
    expected = torch.autograd.grad(right.sum(), list(exact.values()))
    found = torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)
    for name, slope, wanted in zip(numbers, found, expected, strict=True):
        near = slope is not None and math.isclose(slope.item(), wanted.item(), rel_tol=1e-3, abs_tol=1e-6)
        said = "missing" if slope is None else f"{slope.item():.5g}"
        require(
            near, f"at the edge ({shown}) the slope of `{name}` is {said}, not {wanted.item():.5g}; {mend}"
        )


# ── length normalisation ────────────────────────────────────────────────────────────────────────────────────


def _mean_of_row(x: Any) -> Tensor:
    return (x.logps * x.mask).sum(1) / x.mask.sum(1)


MEAN_MISTAKES: dict[str, Formula] = {
    "it is the sum; divide by the answer's number of tokens": lambda x: (x.logps * x.mask).sum(1),
    "prompt and padding are in it: use the mask": lambda x: x.logps.mean(1),
    "it is divided by the row's length, not by the answer's tokens": lambda x: (x.logps * x.mask).mean(1),
    "the mask is the other way round": lambda x: (x.logps * (1 - x.mask)).sum(1) / (1 - x.mask).sum(1),
    "it is divided by the whole batch's tokens": lambda x: (x.logps * x.mask).sum(1) / x.mask.sum(),
    "it is divided by the mean answer's length": lambda x: (x.logps * x.mask).sum(1) / x.mask.sum(1).mean(),
    "it is divided by the longest answer's length": lambda x: (x.logps * x.mask).sum(1) / x.mask.sum(1).max(),
    "it is divided by one token too many": lambda x: (x.logps * x.mask).sum(1) / (x.mask.sum(1) + 1),
    "it is divided by one token too few": lambda x: (
        (x.logps * x.mask).sum(1) / (x.mask.sum(1) - 1).clamp_min(1)
    ),
    "it is the whole batch's mean": lambda x: (x.logps * x.mask).sum() / x.mask.sum(),
    "it is the mean over the answers": lambda x: _mean_of_row(x).mean(),
    "the sum is over the whole row, prompt and padding too": lambda x: x.logps.sum(1) / x.mask.sum(1),
    "the sign is turned round; log-probabilities are negative": lambda x: -_mean_of_row(x),
    "probabilities are averaged; average their logarithms": (
        lambda x: (x.logps.exp() * x.mask).sum(1) / x.mask.sum(1)
    ),
    "it is the log of the mean probability": lambda x: (
        (x.logps.exp() * x.mask).sum(1) / x.mask.sum(1)
    ).log(),
    "it is divided by the square root of the length": lambda x: (
        (x.logps * x.mask).sum(1) / x.mask.sum(1).sqrt()
    ),
    "it is multiplied by the length": lambda x: (x.logps * x.mask).sum(1) * x.mask.sum(1),
    "the smallest or largest token stands for all": lambda x: x.logps.masked_fill(x.mask == 0, -99).amax(1),
}


@check
def check_mean_logps(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Σ over an answer's tokens / their number, row by row."""

    def batches() -> Batches:
        for rows, length in ((4, 9), (1, 6), (3, 12), (6, 20), (2, 2)):
            first = torch.randint(0, length - 1, (rows, 1))
            last = first + torch.randint(0, length, (rows, 1)) % (length - first)
            places = torch.arange(length)
            yield (
                {"logps": -0.1 - 4 * torch.rand(rows, length), "mask": (places >= first) & (places <= last)},
                {},
            )

    what, each = "the mean log-probability", "answer"
    _require_loss(answer, _mean_of_row, MEAN_MISTAKES, batches(), {}, ("logps",), what, each)
    return "each answer's mean over its own tokens, value and gradient, on 5 shapes"


# ── IPO and SimPO ───────────────────────────────────────────────────────────────────────────────────────────


def _margin(x: Any) -> Tensor:
    return (x.chosen - x.ref_chosen) - (x.rejected - x.ref_rejected)


def _ipo(x: Any) -> Tensor:
    return (_margin(x) - 0.5 / x.beta) ** 2


IPO_MISTAKES: dict[str, Formula] = {
    "the target is β; it should be 1/(2β)": lambda x: (_margin(x) - x.beta) ** 2,
    "the target is β/2; it should be 1/(2β): mind the brackets": lambda x: (_margin(x) - x.beta / 2) ** 2,
    "the target is 2β; it should be 1/(2β)": lambda x: (_margin(x) - 2 * x.beta) ** 2,
    "the target is 1/β; it should be half of that": lambda x: (_margin(x) - 1 / x.beta) ** 2,
    "the target is added, or chosen and rejected changed places": lambda x: (_margin(x) + 0.5 / x.beta) ** 2,
    "β multiplies the margin; in IPO it is in the target alone": lambda x: (
        (x.beta * _margin(x) - 0.5 / x.beta) ** 2
    ),
    "β multiplies the margin, and the target is ½": lambda x: (x.beta * _margin(x) - 0.5) ** 2,
    "β is not used": lambda x: (_margin(x) - 0.5) ** 2,
    "β is fixed at 0.1, its default": lambda x: (_margin(x) - 5) ** 2,
    "β is fixed at 1": lambda x: (_margin(x) - 1) ** 2,
    "the square is missing": lambda x: _margin(x) - 0.5 / x.beta,
    "the square is on the margin alone": lambda x: _margin(x) ** 2 - 0.5 / x.beta,
    "the absolute value stands where the square belongs": lambda x: (_margin(x) - 0.5 / x.beta).abs(),
    "there is no target, so every margin is punished": lambda x: _margin(x) ** 2,
    "beyond its target a margin costs nothing; in IPO it does": lambda x: (
        (0.5 / x.beta - _margin(x)).clamp_min(0) ** 2
    ),
    "the reference is forgotten": lambda x: (x.chosen - x.rejected - 0.5 / x.beta) ** 2,
    "only the chosen answer's reference is in it": lambda x: (
        (x.chosen - x.ref_chosen - x.rejected - 0.5 / x.beta) ** 2
    ),
    "only the rejected answer's reference is in it": (
        lambda x: (x.chosen - x.rejected + x.ref_rejected - 0.5 / x.beta) ** 2
    ),
    "the rejected answer is forgotten": lambda x: (x.chosen - x.ref_chosen - 0.5 / x.beta) ** 2,
    "the reference is added; subtract it": (
        lambda x: (x.chosen + x.ref_chosen - x.rejected - x.ref_rejected - 0.5 / x.beta) ** 2
    ),
    "the rejected answer's reference has the wrong sign": (
        lambda x: (x.chosen - x.ref_chosen - x.rejected - x.ref_rejected - 0.5 / x.beta) ** 2
    ),
    "it is half as large": lambda x: _ipo(x) / 2,
    "it is multiplied by β": lambda x: _ipo(x) * x.beta,
    "that is DPO's loss": lambda x: softplus(-x.beta * _margin(x)),
    "it is the mean over the batch": lambda x: _ipo(x).mean(),
    "it is the sum over the batch": lambda x: _ipo(x).sum(),
}


@check
def check_ipo_loss(answer: Callable[..., Tensor]) -> str:
    """(margin − 1/(2β))², the margin over the reference's."""
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    settings = ({"beta": 0.8}, {"beta": 0.25}, {}, {"beta": 3.0}, {"beta": 1.0})
    _require_loss(answer, _ipo, IPO_MISTAKES, _batches(names, settings), {"beta": 0.1})
    for far in (-1e4, -80.0):
        edge = dict(zip(names, (-1.0, far, -2.0, -1.5), strict=True))
        _require_at_the_edge(answer, _ipo, edge, "clamp nothing, and take no exp()", beta=1.0)
    return "(margin − 1/(2β))² pair by pair, value and gradient, for 5 settings and at 2 edges"


def _simpo(x: Any) -> Tensor:
    return softplus(x.gamma - x.beta * (x.chosen - x.rejected))


def _apart(x: Any) -> Tensor:
    return x.chosen - x.rejected


SIMPO_MISTAKES: dict[str, Formula] = {
    "γ is multiplied by β; subtract it outside": lambda x: softplus(-x.beta * (_apart(x) - x.gamma)),
    "γ is added; subtract it": lambda x: softplus(-x.beta * _apart(x) - x.gamma),
    "γ is missing": lambda x: softplus(-x.beta * _apart(x)),
    "β is missing": lambda x: softplus(x.gamma - _apart(x)),
    "β divides; it multiplies": lambda x: softplus(x.gamma - _apart(x) / x.beta),
    "γ is divided by β, which is right only inside the brackets": lambda x: softplus(
        x.gamma / x.beta - x.beta * _apart(x)
    ),
    "γ multiplies; subtract it": lambda x: softplus(-x.beta * _apart(x) * x.gamma),
    "β and γ changed places": lambda x: softplus(x.beta - x.gamma * _apart(x)),
    "β is fixed at 2, its default": lambda x: softplus(x.gamma - 2 * _apart(x)),
    "γ is fixed at 1, its default": lambda x: softplus(1 - x.beta * _apart(x)),
    "β and γ are fixed at their defaults": lambda x: softplus(1 - 2 * _apart(x)),
    "chosen and rejected changed places": lambda x: softplus(x.gamma + x.beta * _apart(x)),
    "the minus sign is missing, so training would make it worse": lambda x: -_simpo(x),
    "the sign inside σ is turned round": lambda x: softplus(x.beta * _apart(x) - x.gamma),
    "the logarithm is missing": lambda x: -torch.sigmoid(x.beta * _apart(x) - x.gamma),
    "that is σ itself": lambda x: torch.sigmoid(x.beta * _apart(x) - x.gamma),
    "that is 1 − σ(…), not −log σ(…)": lambda x: torch.sigmoid(x.gamma - x.beta * _apart(x)),
    "that is a hinge, not −log σ(…)": lambda x: (x.gamma - x.beta * _apart(x)).clamp_min(0),
    "that is IPO's square": lambda x: (x.beta * _apart(x) - x.gamma) ** 2,
    "σ is missing: the bare margin": lambda x: x.gamma - x.beta * _apart(x),
    "probabilities are compared, not their logarithms": (
        lambda x: softplus(x.gamma - x.beta * (x.chosen.exp() - x.rejected.exp()))
    ),
    "the logarithm has base 2": lambda x: _simpo(x) / math.log(2),
    "the rejected answer is added; subtract it": lambda x: softplus(
        x.gamma - x.beta * (x.chosen + x.rejected)
    ),
    "only the chosen answer is in it": lambda x: softplus(x.gamma - x.beta * x.chosen),
    "only the rejected answer is in it": lambda x: softplus(x.gamma + x.beta * x.rejected),
    "the size of the difference, without its sign": lambda x: softplus(x.gamma - x.beta * _apart(x).abs()),
    "it is multiplied or divided by β": lambda x: _simpo(x) / x.beta,
    "it is the mean over the batch": lambda x: _simpo(x).mean(),
    "it is the sum over the batch": lambda x: _simpo(x).sum(),
}


@check
def check_simpo_loss(answer: Callable[..., Tensor]) -> str:
    """−log σ(β (chosen − rejected) − γ)."""
    settings = (
        {"beta": 2.5, "gamma": 0.6}, {"beta": 1.4, "gamma": 1.5}, {}, {"beta": 10.0, "gamma": 0.3},
        {"beta": 4.0, "gamma": 0.0},
    )  # fmt: skip
    batches = _batches(("chosen", "rejected"), settings)
    _require_loss(answer, _simpo, SIMPO_MISTAKES, batches, {"beta": 2.0, "gamma": 1.0})
    mend = "σ itself rounds to 0 or 1 there: take F.logsigmoid of the margin, and clamp nothing"
    for chosen, rejected in ((-1e4, -0.5), (-60.0, -0.5)):
        edge = {"chosen": chosen, "rejected": rejected}
        _require_at_the_edge(answer, _simpo, edge, mend, beta=2.0, gamma=1.0)
    return "−log σ(β·(chosen − rejected) − γ) pair by pair, value and gradient, for 5 settings and at 2 edges"


# ── ORPO ────────────────────────────────────────────────────────────────────────────────────────────────────


def _log_odds(logp: Tensor) -> Tensor:
    return logp - torch.log(-torch.expm1(logp))


ODDS_MISTAKES: dict[str, Formula] = {
    "log(1 − p) is added; subtract it": lambda x: 2 * x.logp - _log_odds(x.logp),
    "that is p/(1 − p); take its logarithm": lambda x: _log_odds(x.logp).exp(),
    "that is log(1 − p) alone": lambda x: x.logp - _log_odds(x.logp),
    "that is −log(1 − p) alone": lambda x: _log_odds(x.logp) - x.logp,
    "that is log p alone: 1 − p is missing": lambda x: x.logp * 1,
    "1 + p stands where 1 − p belongs": lambda x: x.logp - torch.log1p(x.logp.exp()),
    "those are the odds against it, (1 − p)/p": lambda x: -_log_odds(x.logp),
    "log p was taken for p": lambda x: torch.log(-x.logp) - torch.log1p(-x.logp),
    "1 − log p stands where 1 − p belongs": lambda x: x.logp - torch.log1p(-x.logp),
    "that is p": lambda x: x.logp.exp(),
    "that is 1 − p": lambda x: -torch.expm1(x.logp),
    "that is log p / log(1 − p); the logarithm of a quotient is a difference": (
        lambda x: x.logp / (x.logp - _log_odds(x.logp))
    ),
    "the logarithm has base 2": lambda x: _log_odds(x.logp) / math.log(2),
    "the logarithm has base 10": lambda x: _log_odds(x.logp) / math.log(10),
    "that is p − log(1 − p)": lambda x: x.logp.exp() - (x.logp - _log_odds(x.logp)),
    "that is log p − (1 − p): one logarithm is missing": lambda x: x.logp + torch.expm1(x.logp),
    "that is log p divided by 1 − p": lambda x: x.logp / -torch.expm1(x.logp),
    "it is the mean over the batch": lambda x: _log_odds(x.logp).mean(),
    "it is the sum over the batch": lambda x: _log_odds(x.logp).sum(),
}


@check
def check_log_odds(answer: Callable[[Tensor], Tensor]) -> str:
    """log p − log(1 − p), exact where p is near 0 or 1."""
    batches, what = _batches(("logp",), ({},) * 5), "the log-odds"
    _require_loss(answer, lambda x: _log_odds(x.logp), ODDS_MISTAKES, batches, {}, ("logp",), what, "answer")
    for logp, mend in (
        (-1e-6, "1 − eˣ loses its digits where p is near 1; −torch.expm1(x) keeps them"),
        (-200.0, "eˣ is 0 where p is tiny: subtract logarithms, and clamp nothing"),
        (-0.01, "nothing needs a clamp or an epsilon"),
    ):
        _require_at_the_edge(answer, lambda x: _log_odds(x.logp), {"logp": logp}, mend)
    return "log p − log(1 − p), value and gradient, exact where p is near 0 or 1"


def _better(x: Any) -> Tensor:
    """−log σ(log odds(chosen) − log odds(rejected))."""
    return softplus(_log_odds(x.rejected) - _log_odds(x.chosen))


def _orpo(x: Any) -> Tensor:
    return x.nll + x.weight * _better(x)


ORPO_MISTAKES: dict[str, Formula] = {
    "log-probabilities are compared, not log-odds": lambda x: x.nll + x.weight * softplus(-_apart(x)),
    "odds are compared, not their logarithms": (
        lambda x: x.nll + x.weight * softplus(_log_odds(x.rejected).exp() - _log_odds(x.chosen).exp())
    ),
    "chosen and rejected changed places": (
        lambda x: x.nll + x.weight * softplus(_log_odds(x.chosen) - _log_odds(x.rejected))
    ),
    "log σ is negative, so subtract it": lambda x: x.nll - x.weight * _better(x),
    "the comparison is missing": lambda x: x.nll + 0 * x.chosen,
    "the NLL is missing": lambda x: x.weight * _better(x),
    "the NLL is subtracted; it is a loss already": lambda x: x.weight * _better(x) - x.nll,
    "λ multiplies the NLL; it belongs to the comparison": lambda x: x.weight * x.nll + _better(x),
    "λ multiplies both terms": lambda x: x.weight * (x.nll + _better(x)),
    "λ is missing": lambda x: x.nll + _better(x),
    "λ is fixed at 0.1, its default": lambda x: x.nll + 0.1 * _better(x),
    "λ divides; it multiplies": lambda x: x.nll + _better(x) / x.weight,
    "λ is inside σ; it multiplies the logarithm": (
        lambda x: x.nll + softplus(x.weight * (_log_odds(x.rejected) - _log_odds(x.chosen)))
    ),
    "the weights are 1 − λ and λ": lambda x: (1 - x.weight) * x.nll + x.weight * _better(x),
    "chosen stands in for the NLL that was given": lambda x: x.weight * _better(x) - x.chosen,
    "the NLL is multiplied, not added": lambda x: x.nll * x.weight * _better(x),
    "σ is missing: the bare difference of log-odds": (
        lambda x: x.nll - x.weight * (_log_odds(x.chosen) - _log_odds(x.rejected))
    ),
    "the logarithm is missing: that is −σ(…)": lambda x: x.nll - x.weight * torch.exp(-_better(x)),
    "only the chosen answer's odds are in it": lambda x: x.nll + x.weight * softplus(-_log_odds(x.chosen)),
    "the quotient of log-odds, not their difference": (
        lambda x: x.nll + x.weight * softplus(-_log_odds(x.chosen) / _log_odds(x.rejected))
    ),
    "the logarithm has base 2": lambda x: x.nll + x.weight * _better(x) / math.log(2),
    "it is the mean over the batch": lambda x: _orpo(x).mean(),
    "the comparison is averaged over the batch": lambda x: x.nll + x.weight * _better(x).mean(),
    "it is the sum over the batch": lambda x: _orpo(x).sum(),
}


@check
def check_orpo_loss(answer: Callable[..., Tensor]) -> str:
    """nll − λ log σ(log odds(chosen) − log odds(rejected))."""
    names = ("chosen", "rejected", "nll")

    def batches() -> Batches:
        for i, weight in enumerate((0.4, 1.0, None, 2.0, 0.25, 1.5)):
            size = SIZES[i % len(SIZES)]
            nll = 0.5 + torch.rand(() if i % 2 else size)  # one for each pair, or one for the batch
            inputs = {"chosen": _means(size), "rejected": _means(size), "nll": nll}
            yield inputs, {"weight": weight} if weight else {}

    _require_loss(answer, _orpo, ORPO_MISTAKES, batches(), {"weight": 0.1}, names)
    mend = "take the log-odds as in the exercise before, and F.logsigmoid of their difference"
    for chosen, rejected in ((-1e-5, -90.0), (-90.0, -1e-5), (-300.0, -2.0)):
        edge = {"chosen": chosen, "rejected": rejected, "nll": 1.0}
        _require_at_the_edge(answer, _orpo, edge, mend, weight=1.0)
    return "nll − λ·log σ(log-odds apart), value and gradient, for 6 settings and at 3 edges"


def _mended(
    x: Any, chosen: Tensor | None = None, rejected: Tensor | None = None, nll: Tensor | None = None
) -> Tensor:
    """ORPO from sums and counts; each part can be another one."""
    chosen = x.chosen / x.chosen_tokens if chosen is None else chosen
    rejected = x.rejected / x.rejected_tokens if rejected is None else rejected
    nll = -x.chosen.sum() / x.chosen_tokens.sum() if nll is None else nll
    return nll + x.weight * softplus(_log_odds(rejected) - _log_odds(chosen))


MENDED_MISTAKES: dict[str, Formula] = {
    "the odds are still those of sums": lambda x: _mended(x, x.chosen, x.rejected),
    "the rejected answer's odds are still those of its sum": lambda x: _mended(x, rejected=x.rejected),
    "the chosen answer's odds are still those of its sum": lambda x: _mended(x, chosen=x.chosen),
    "both are divided by the chosen answer's tokens": lambda x: _mended(
        x, rejected=x.rejected / x.chosen_tokens
    ),
    "both are divided by the rejected answer's tokens": lambda x: _mended(
        x, chosen=x.chosen / x.rejected_tokens
    ),
    "the token counts changed places": (
        lambda x: _mended(x, x.chosen / x.rejected_tokens, x.rejected / x.chosen_tokens)
    ),
    "divide each answer by its own tokens, not by the batch's": (
        lambda x: _mended(x, x.chosen / x.chosen_tokens.sum(), x.rejected / x.rejected_tokens.sum())
    ),
    "the sums are multiplied by the tokens; divide": (
        lambda x: _mended(x, x.chosen * x.chosen_tokens, x.rejected * x.rejected_tokens)
    ),
    "divide the log-probabilities, not their log-odds": (
        lambda x: (
            -x.chosen.sum() / x.chosen_tokens.sum()
            + x.weight
            * softplus(_log_odds(x.rejected) / x.rejected_tokens - _log_odds(x.chosen) / x.chosen_tokens)
        )
    ),
    "the NLL was right: one number over the batch's chosen tokens": (
        lambda x: _mended(x, nll=-x.chosen / x.chosen_tokens)
    ),
    "the NLL was right; a mean of means lets a short answer's token count more": (
        lambda x: _mended(x, nll=(-x.chosen / x.chosen_tokens).mean())
    ),
    "the NLL was right; now it is a sum": lambda x: _mended(x, nll=-x.chosen.sum()),
    "the NLL was right; now it is each answer's sum": lambda x: _mended(x, nll=-x.chosen),
    "the NLL was right; now it is divided twice": (
        lambda x: _mended(x, nll=-(x.chosen / x.chosen_tokens).sum() / x.chosen_tokens.sum())
    ),
    "the NLL was right; now it is divided by the number of pairs": lambda x: _mended(x, nll=-x.chosen.mean()),
    "the NLL is gone": lambda x: _mended(x, nll=0 * x.chosen),
    "the NLL has its sign turned round": lambda x: _mended(x, nll=x.chosen.sum() / x.chosen_tokens.sum()),
    "the NLL covers the rejected answers too": (
        lambda x: _mended(x, nll=-(x.chosen + x.rejected).sum() / (x.chosen_tokens + x.rejected_tokens).sum())
    ),
    "log-probabilities are compared, not log-odds": (
        lambda x: (
            -x.chosen.sum() / x.chosen_tokens.sum()
            + x.weight * softplus(x.rejected / x.rejected_tokens - x.chosen / x.chosen_tokens)
        )
    ),
    "chosen and rejected changed places": (
        lambda x: _mended(x, x.rejected / x.rejected_tokens, x.chosen / x.chosen_tokens)
    ),
    "λ is missing": lambda x: (
        (_mended(x) + x.chosen.sum() / x.chosen_tokens.sum()) / x.weight
        - x.chosen.sum() / x.chosen_tokens.sum()
    ),
    "log σ is negative, so subtract it": (lambda x: -2 * x.chosen.sum() / x.chosen_tokens.sum() - _mended(x)),
    "it is the mean over the batch": lambda x: _mended(x).mean(),
    "it is the sum over the batch": lambda x: _mended(x).sum(),
}


@check
def check_mended_orpo(answer: Callable[..., Tensor]) -> str:
    """ORPO's loss from sums and token counts: per-token odds, and one NLL over the batch's tokens."""

    def batches() -> Batches:
        for size, weight in zip((4, 1, 2, 7, 3), (0.5, 1.5, None, 2.0, 0.3), strict=True):
            counts = {name: torch.randint(5, 60, (size,)) for name in ("chosen_tokens", "rejected_tokens")}
            chosen, rejected = (_means(size) * count for count in counts.values())
            yield {"chosen": chosen, "rejected": rejected, **counts}, {"weight": weight} if weight else {}

    _require_loss(answer, _mended, MENDED_MISTAKES, batches(), {"weight": 0.1})
    return "per-token odds, and one NLL over the batch's chosen tokens, value and gradient, for 5 settings"


@check
def check_parity(simpo: Answer, orpo: Answer, tokenizer: Any) -> str:
    """Loss and gradient against TRL's trainers on their own batch."""
    rows = pairs("train")[:4]
    with torch.random.fork_rng():
        found = {f"SimPO's {name}": x for name, x in simpo_against_trl(simpo, rows, tokenizer).items()}
        found |= {f"ORPO's {name}": x for name, x in orpo_against_trl(orpo, rows, tokenizer).items()}
    require_parity(found, "TRL's")
    return f"loss and gradient are TRL's, to {max(found.values()):.0e} of the largest entry"


# ── a loss's push, and verdicts ─────────────────────────────────────────────────────────────────────────────

CURVES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # a loss, its slope
    "(margin − 1)²": (lambda m: (m - 1) ** 2, lambda m: 2 * (m - 1)),
    "−log σ(margin)": (lambda m: softplus(-m), lambda m: -torch.sigmoid(-m)),
    "−log σ(3·margin − 1)": (lambda m: softplus(1 - 3 * m), lambda m: -3 * torch.sigmoid(1 - 3 * m)),
    "−2·margin": (lambda m: -2 * m, lambda m: torch.full_like(m, -2.0)),
}


@check
def check_push(answer: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> str:
    """−d loss / d margin at each margin, for any loss."""
    for (name, (loss, slope)), size in zip(CURVES.items(), (7, 4, 1, 5), strict=True):
        margin = torch.linspace(-2, 3, size) if size > 1 else torch.tensor([0.3])
        what = f"the push of {name} at {size} margin{'s' if size > 1 else ''}"
        before = margin.clone()
        out = _run(answer, what, {"loss": loss, "margin": margin}, {})
        if isinstance(out, Tensor):
            require(not out.requires_grad, f"{what} still carries a graph; return the numbers alone")
        right = -slope(before.double())
        mistakes = {
            "the sign is turned round: the push is *minus* the slope": -right,
            "the loss itself, not its slope": loss(before.double()),
            "minus the loss, not its slope": -loss(before.double()),
            "divided by the number of margins: sum the losses before the slope, don't average": right / size,
            "the average's slope, with its sign turned round": -right / size,
            "the sum over all margins": right.sum().expand(size),
            "the mean over all margins": right.mean().expand(size),
            "the slope's size; past its target a loss pushes back, and the sign says so": right.abs(),
            "the loss is squared before the slope": 2 * loss(before.double()) * right,
            "the slope was added up twice; has an older .grad stayed?": 2 * right,
            "zero": 0 * right,
            "the margin itself": before.double(),
        }
        wrong = {text: value for text, value in mistakes.items() if not torch.allclose(value, right)}
        require_close(out, right, what, wrong, tolerance=2e-3)
    return "minus the slope at every margin, for 4 losses"


def _cases() -> Iterator[tuple[list[float], list[float], str, str]]:
    """Scores, the others' scores, the right word, and what is wrong with another."""
    pairs = "subtract seed by seed first: what both runs of a seed share cancels"
    yield [0.70, 0.80, 0.90], [0.60, 0.71, 0.79], "better", pairs
    yield [0.60, 0.71, 0.79], [0.70, 0.80, 0.90], "worse", f"the first is the lower one; {pairs}"
    yield (
        [0.90, 0.80, 0.70],
        [0.60, 0.70, 0.80],
        "cannot tell",
        "the interval contains zero; is it paired by seed?",
    )
    yield (
        [0.62, 0.65, 0.67],
        [0.60, 0.60, 0.60],
        "cannot tell",
        "three seeds are few: t is 4.303, not 1.96 or 2",
    )
    yield [0.60, 0.60, 0.60], [0.62, 0.65, 0.67], "cannot tell", "the interval contains zero on this side too"
    yield (
        [0.61, 0.66, 0.64, 0.63],
        [0.60] * 4,
        "better",
        "the interval is ± t·s/√n; is the root of n missing?",
    )
    yield [0.65, 0.61, 0.63, 0.60, 0.64], [0.60] * 5, "better", "with five seeds t is 2.776"
    yield [0.69, 0.63, 0.65, 0.60, 0.63], [0.60] * 5, "cannot tell", "s is the sample's: it divides by n − 1"
    yield [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "cannot tell", "no difference is neither better nor worse"


@check
def check_verdict(answer: Callable[[list[float], list[float]], str]) -> str:
    """better, worse or cannot tell, from a 95% interval of paired differences."""
    words = ("better", "worse", "cannot tell")
    for ours, theirs, right, mistake in _cases():
        said = call(answer, f"the verdict on {ours} against {theirs}", [*ours], [*theirs])
        require(
            isinstance(said, str), f"the verdict is {type(said).__name__}, not a string; is a return missing?"
        )
        require(said in words, f"the verdict is {said!r}; it should be one of {', '.join(map(repr, words))}")
        require(said == right, f"{ours} against {theirs} is {right!r}, not {said!r}: {mistake}")
    return "better, worse or cannot tell, by the interval of paired differences, for 3, 4 and 5 seeds"
