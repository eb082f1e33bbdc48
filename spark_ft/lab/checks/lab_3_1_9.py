"""Checks of lab 3.1.9: the value of a gain, KTO's loss, mismatched pairs, reference point, weights."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from spark_ft.adapters import AdapterConfig, adapted_layers, add_adapters
from spark_ft.data.batches import with_prompt
from spark_ft.lab.checks import (
    call,
    check,
    require,
    require_close,
    require_gradient,
    require_pair,
    require_tensor,
)
from spark_ft.lab.checks.told import as_tensor
from spark_ft.scoring import evaluating

Rows = list[dict[str, Any]]


# ── Exercise 1: how a gain feels ────────────────────────────────────────────────────────────────────────────


@check
def check_felt_value(answer: Callable[..., Tensor]) -> str:
    """gain^α above zero, −λ (−gain)^α below it, for every shape."""
    for shape, alpha, aversion in (((9,), 0.88, 2.25), ((1,), 0.5, 3.0), ((2, 3, 4), 0.7, 1.5), ((), 0.9, 2)):
        size = torch.rand(shape) * 5 + 1.2
        gain = torch.where(torch.rand(shape) < 0.5, size, -size)
        if gain.ndim == 1 and len(gain) > 2:
            gain[:3] = torch.tensor([0.0, 2.0, -2.0])
        what = f"the value of gains {tuple(shape)}, alpha={alpha}, aversion={aversion}"
        out = call(answer, what, gain, alpha, aversion)
        numbers = as_tensor(out)
        require(
            numbers is None or not (numbers.isnan().any() and (gain < 0).any()),
            f"{what}: nan. A negative number has no such power: raise gain.abs(), then give the sign back",
        )
        x = gain.double()
        up, low = x.abs() ** alpha, x < 0

        def felt(above: Tensor | float, below: Tensor | float, low: Tensor = low) -> Tensor:
            return torch.where(low, below, above)

        require_close(out, felt(up, -aversion * up), what, {
            "below zero it should be negative": felt(up, aversion * up),
            "aversion is missing below zero": felt(up, -up),
            "aversion also multiplies the gains; only losses weigh more": felt(aversion * up, -aversion * up),
            "gains are multiplied by aversion, and losses should be": felt(aversion * up, -up),
            "alpha is missing": felt(x, aversion * x),
            "alpha is missing below zero": felt(up, aversion * x),
            "alpha is missing above zero": felt(x, -aversion * up),
            "alpha multiplies; it is the power": felt(alpha * x, aversion * alpha * x),
            "the power is 1/alpha": felt(x.abs() ** (1 / alpha), -aversion * x.abs() ** (1 / alpha)),
            "aversion is inside the power; multiply after it": felt(up, -((aversion * x.abs()) ** alpha)),
            "aversion divides the losses": felt(up, -up / aversion),
            "aversion is added to the losses; it multiplies them": felt(up, -up - aversion),
            "the sign is the wrong way round": felt(-up, aversion * up),
            "gains and losses are swapped": felt(-aversion * up, up),
            "losses count nothing": felt(up, 0.0),
            "only the losses are there": felt(0.0, -aversion * up),
        })  # fmt: skip
    return "gains to the power of alpha, losses times aversion, for four shapes; zero feels like zero"


# ── Exercise 2: the loss ────────────────────────────────────────────────────────────────────────────────────


def _kto(gain: Tensor, up: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """The oracle: λ (1 − σ(±β gain)), by tanh."""
    signed = torch.where(up, gain, -gain)
    return torch.where(up, weights[0], weights[1]) * 0.5 * (1 - torch.tanh(0.5 * beta * signed))


@check
def check_kto_loss(answer: Callable[..., Tensor]) -> str:
    """One loss for each thumb, its gradient, and no overflow."""
    for thumbs, kl, beta, weights in (
        ("-+-++-", 0.6, 0.37, (1.3, 2.9)),
        ("+-++-+-", 1.7, 0.1, (1.0, 1.0)),
        ("+", 2.1, 0.2, (1.7, 1.2)),
        ("--", 0.9, 0.25, (1.2, 3.1)),
        ("++", 0.0, 0.15, (0.7, 1.4)),
    ):
        up = torch.tensor([thumb == "+" for thumb in thumbs])
        reference = -20 - 10 * torch.rand(len(up))
        gain = torch.where(torch.rand(len(up)) < 0.5, 1, -1) * (2 + 4 * torch.rand(len(up)))
        policy = (reference + gain).requires_grad_()
        what = f"the loss of thumbs {thumbs}, beta={beta}, weights {weights}, kl={kl}"
        names = ("beta", "desirable_weight", "undesirable_weight")
        fields = dict(zip(names, (beta, *weights), strict=True))
        out = call(answer, what, policy, reference, up, torch.tensor(kl), **fields)
        mistakes = _loss_mistakes(policy, reference, up, kl, beta, weights)
        right = _kto(policy - reference - kl, up, beta, weights)
        require_close(out, right, what, mistakes)
        require_gradient(out, {"policy": policy}, right, what, {
            "thumbs up carry none": torch.where(up, 0.0, right),
            "thumbs down carry none": torch.where(up, right, 0.0),
        })  # fmt: skip
    policy = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    what, up = "the loss at gains of ±10,000", torch.tensor([True, True, False, False])
    out = call(answer, what, policy, torch.zeros(4), up, torch.tensor(0.0))
    finite = "that overflows: torch.sigmoid does not, exp and log do"
    require(as_tensor(out).isfinite().all(), f"{what} is inf or nan; {finite}")
    require_close(out, torch.tensor([0.0, 1.0, 1.0, 0.0]), what)
    (slope,) = torch.autograd.grad(out.sum(), policy)
    require(slope.isfinite().all(), f"the gradient at gains of ±10,000 is nan; {finite}")
    return "thumbs, weights, β and kl, with the right gradient, for five batches; ±10,000 is finite"


def _loss_mistakes(policy, reference, up, kl, beta, weights) -> dict[str, Tensor]:
    p, r = policy.detach().double(), reference.double()
    gain = p - r - kl
    right = _kto(gain, up, beta, weights)
    weight = torch.where(up, weights[0], weights[1]).double()
    signed = torch.where(up, gain, -gain)
    value = torch.sigmoid(beta * signed)
    return {
        "thumbs down are treated as thumbs up; there it is σ(β (z − r))": weight
        * torch.sigmoid(-beta * gain),
        "thumbs up are treated as thumbs down; there it is σ(β (r − z))": weight
        * torch.sigmoid(beta * gain),
        "up and down are swapped": _kto(gain, ~up, beta, weights),
        "up and down are swapped inside of σ, or that is the value λσ; the loss is λ (1 − σ)": weight * value,
        "the two weights are swapped": _kto(gain, up, beta, weights[::-1]),
        "the two weights are missing": _kto(gain, up, beta, (1.0, 1.0)),
        "desirable_weight is missing": _kto(gain, up, beta, (1.0, weights[1])),
        "undesirable_weight is missing": _kto(gain, up, beta, (weights[0], 1.0)),
        "kl is missing": _kto(p - r, up, beta, weights),
        "kl is added; subtract it from the gain": _kto(p - r + kl, up, beta, weights),
        "kl has one sign on both sides; a thumb down takes z − r": weight
        * torch.sigmoid(-beta * (torch.where(up, p - r, r - p) - kl)),
        "kl stands outside of beta: take β (r − z)": _kto(beta * (p - r) - kl, up, 1.0, weights),
        "kl is multiplied by beta twice": _kto(p - r - beta * kl, up, beta, weights),
        "beta is missing": _kto(gain, up, 1.0, weights),
        "it is divided by beta; multiply": _kto(gain, up, 1 / beta, weights),
        "beta is counted twice": _kto(gain, up, beta * beta, weights),
        "beta is fixed at 0.1; take the argument": _kto(gain, up, 0.1, weights),
        "beta stands outside of σ": beta * _kto(gain, up, 1.0, weights),
        "policy and reference are swapped": _kto(r - p - kl, up, beta, weights),
        "the reference is missing": _kto(p - kl, up, beta, weights),
        "reference is added; the gain is policy − reference": _kto(p + r - kl, up, beta, weights),
        "the gain is a difference of log-probabilities, not their ratio": _kto(p / r - kl, up, beta, weights),
        "the gain is the difference of logs; no exp": _kto((p - r).exp() - kl, up, beta, weights),
        "that is the value with a minus, −λσ; the loss is λ (1 − σ)": -weight * value,
        "that is 1 − λσ; the weight multiplies all of it, λ (1 − σ)": 1 - weight * value,
        "the weight is inside of σ; multiply outside": torch.sigmoid(-beta * weight * signed),
        "the weight is inside of σ too": weight * torch.sigmoid(-beta * weight * signed),
        "the weight divides; multiply": right / weight**2,
        "that is −log σ, as in DPO; KTO has 1 − σ": -weight * value.log(),
        "that is log(1 − σ); KTO has 1 − σ": weight * (1 - value).log(),
        "there is no σ": -weight * beta * signed,
        "that is a hinge; KTO has 1 − σ": weight * (1 - beta * signed).clamp(min=0),
        "tanh is not σ": weight * (1 - torch.tanh(beta * signed)),
        "it is divided by the number of thumbs; the training loop does that": right / len(up),
        "it is squared": right**2,
        "the two weights are normalised; use them as they come": right / weight.mean(),
        "the losses are right but in another order: keep the batch's": torch.cat([right[up], right[~up]]),
        "thumbs down count nothing": torch.where(up, right, 0.0),
        "thumbs up count nothing": torch.where(up, 0.0, right),
        "each is the mean of the batch; return one loss for each thumb": right.mean().expand(len(up)),
    }  # fmt: skip


# ── Exercise 3: mismatched pairs ────────────────────────────────────────────────────────────────────────────


def _orders(count: int) -> Rows:
    dishes = [f"dish {i}" for i in torch.randperm(40)[:count].tolist()]
    return [
        {"prompt": f"How long for {dish}?", "completion": f"{10 + i} minutes for {dish}.", "label": i % 3 > 0}
        for i, dish in enumerate(dishes)
    ]


@check
def check_mismatched(answer: Callable[[Rows], Sequence[str]]) -> str:
    """Each prompt gets an answer to another prompt, each answer comes once, and the same at every call."""
    for count in (7, 2, 12):
        rows = _orders(count)
        _require_mismatched(answer, rows, f"{count} rows")
    rows = _orders(9)
    rows[4]["prompt"] = rows[3]["prompt"]  # two neighbours ask the same
    _require_mismatched(answer, rows, "9 rows, of which rows 3 and 4 ask the same")
    rows = _orders(8)
    rows[-1]["prompt"] = rows[0]["prompt"]
    _require_mismatched(answer, rows, "8 rows, of which the first and the last ask the same")
    return "every prompt got an answer to another question, the same in each call, and all answers are used"


def _require_mismatched(answer: Callable[[Rows], Sequence[str]], rows: Rows, where: str) -> None:
    what = f"mismatched({where})"
    out = call(answer, what, rows)
    require(
        isinstance(out, list | tuple),
        f"{what} is {type(out).__name__}, not a list of answers; is a return missing, or brackets?",
    )
    require(len(out) == len(rows), f"{what}: {len(out)} answers for {len(rows)} rows; each row needs one")
    require(not any(isinstance(x, dict) for x in out), f"{what}: these are rows; return their completions")
    require(
        all(isinstance(x, str) for x in out),
        f"{what}: item 0 is {type(out[0]).__name__}, not a text; return completions",
    )
    out = list(out)
    answers, prompts = [row["completion"] for row in rows], [row["prompt"] for row in rows]
    require(
        not set(out) <= set(prompts), f"{what}: these are prompts; return completions, one for each prompt"
    )
    strangers = [text for text in out if text not in answers]
    require(not strangers, f"{what}: {strangers[:1]} is no completion of these rows; take them as they are")
    require(out != answers, f"{what}: every prompt keeps its own answer, so nothing is mismatched")
    for i, text in enumerate(out):
        own = prompts[answers.index(text)] == prompts[i]
        kept = "its own answer" if text == answers[i] else "an answer to the same question"
        require(not own, f"{what}: prompt {i} has {kept}; it should get one to another question")
    most = max(out.count(text) for text in out)
    require(
        most <= 2, f"{what}: one answer serves {most} prompts; use them all, so that the mean rests on many"
    )
    again = list(call(answer, f"{what}, called again", [dict(row) for row in rows]))
    require(
        again == out,
        f"{what}: a second call pairs them otherwise. Fixed pairs keep their reference log-probabilities: "
        "no random order",
    )


# ── Exercise 4: the reference point ─────────────────────────────────────────────────────────────────────────


def _tiny_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=60, num_key_value_heads=2, initializer_range=0.2, **shape)
    return add_adapters(LlamaForCausalLM(config).eval(), AdapterConfig(rank=2))


def _tiny_batch(rows: int) -> dict[str, Tensor]:
    """Thumbs as `feedback_batches` makes them: prompts padded on the left, answers on the right."""
    prompt, answer = torch.randint(60, (rows, 5)), torch.randint(60, (rows, 7))
    left, right = torch.ones_like(prompt), torch.ones_like(answer)
    for i in range(1, rows):
        left[i, : i % 3] = 0
        right[i, 7 - i % 4 :] = 0
    up = torch.arange(rows) % 3 > 0
    return {
        "prompt_ids": prompt, "prompt_mask": left, "completion_ids": answer, "completion_mask": right,
        "mismatched_ids": answer.roll(1, 0), "mismatched_mask": right.roll(1, 0),
        "desirable": up, "row": torch.arange(rows),
    }  # fmt: skip


@torch.no_grad()
def _plain_logps(model: nn.Module, batch: dict[str, Tensor], side: str) -> tuple[Tensor, Tensor]:
    """The oracle: each row's log-probability from whole logits, in float64, and the number of its tokens."""
    pairs = with_prompt(batch, side)
    with evaluating(model):
        logits = model(input_ids=pairs["input_ids"], attention_mask=pairs["attention_mask"]).logits.double()
    labels = pairs["labels"][:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    return logps.sum(1), (labels >= 0).sum(1)


@torch.no_grad()
def _gains(model: nn.Module, batch: dict[str, Tensor], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """log π and log π_ref of each row, the reference with B at zero; and the number of tokens."""
    policy, tokens = _plain_logps(model, batch, side)
    layers = adapted_layers(model).values()
    kept = [layer.lora_B.detach().clone() for layer in layers]
    for layer in layers:
        layer.lora_B.zero_()
    reference, _ = _plain_logps(model, batch, side)
    for layer, weight in zip(layers, kept, strict=True):
        layer.lora_B.copy_(weight)
    return policy, reference, tokens


@torch.no_grad()
def _sign(model: nn.Module, batch: dict[str, Tensor], above: bool) -> None:
    """Draw adapters whose mean gain on the mismatched pairs is above zero, or below; no row's is near it."""
    while True:
        for layer in adapted_layers(model).values():
            layer.lora_B.normal_(std=0.15)
        for _ in range(2):
            policy, reference, _ = _gains(model, batch, "mismatched")
            gain = policy - reference
            mixed = gain.min() < -0.1 and gain.max() > 0.1
            if mixed and gain.mean().abs() > 0.2 and (gain.mean() > 0) == above:
                return
            for layer in adapted_layers(model).values():  # the other sign, but for second order
                layer.lora_B.neg_()


@check
def check_reference_point(answer: Callable[[nn.Module, dict[str, Tensor]], Tensor]) -> str:
    """max(0, mean gain over the batch's mismatched pairs), without a gradient; the model is as before."""
    model = _tiny_model()
    for rows, above in ((6, False), (6, True), (2, True), (5, True)):
        batch = _tiny_batch(rows)
        _sign(model, batch, above)
        _check_reference_point(answer, model, batch, above)
    _require_error_safe(answer, model, batch)
    return "max(0, mean) over the whole batch, no gradient, for four batches; the adapters are on again"


def _check_reference_point(answer, model: nn.Module, batch: dict[str, Tensor], above: bool) -> None:
    policy, reference, tokens = _gains(model, batch, "mismatched")
    rows, gain = len(policy), policy - reference
    what = f"the reference point of {rows} rows, whose mean gain is {gain.mean():.2f}"
    out = call(answer, what, model.train(), batch)
    on = all(layer.enabled for layer in adapted_layers(model).values())
    require(on, f"{what}: the adapters stayed off; `with adapters_disabled(model):` turns them on again")
    if isinstance(out, Tensor):
        require(
            not out.requires_grad,
            f"{what} carries a gradient. It is a yardstick, not trained: compute it under torch.no_grad()",
        )
    own_policy, own_reference, _ = _gains(model, batch, "completion")
    own = own_policy - own_reference
    swapped = "policy and reference are swapped; the gain is policy − reference"
    same = {"it is zero, as if both passes were one model; the reference has its adapters off": 0.0}
    mistakes = (same if above else {}) | {
        "it is below zero; a KL never is: clamp the mean at zero": gain.mean(),
        swapped: -gain.mean(),
        "each row is clamped; take the mean first, then clamp it once": gain.clamp(min=0).mean(),
        "each row is clamped from above": gain.clamp(max=0).mean(),
        "rows are made positive with abs; take the mean, then clamp it": gain.abs().mean(),
        "that is the mean's size, |mean|; clamp a mean below zero to zero": gain.mean().abs(),
        "that is the sum; take the mean over the rows": gain.sum().clamp(min=0),
        "it is divided by one row less": (gain.sum() / (rows - 1)).clamp(min=0),
        "that is per token; a gain sums the answer's tokens": (gain / tokens).mean().clamp(min=0),
        "all tokens are averaged; sum each answer's tokens, then average the rows": gain.sum() / tokens.sum(),
        "these are the rows' own answers; take the mismatched ones": own.mean(),
        "these are the rows' own answers, each clamped": own.clamp(min=0).mean(),
        "that is the median; take the mean": gain.median().clamp(min=0),
        "that is the largest gain; take the mean": gain.max(),
        "that is the smallest gain; take the mean": gain.min(),
        "β is in it; it belongs into the loss": (0.1 * gain.mean()).clamp(min=0),
        "only the first row is in it; take all": gain[0].clamp(min=0),
        "the last row is missing": gain[:-1].mean().clamp(min=0),
        "the first row is missing": gain[1:].mean().clamp(min=0),
        "only half of the rows are in it": gain[: rows // 2].mean().clamp(min=0),
        "only thumbs up are in it; take all rows": gain[batch["desirable"]].mean().clamp(min=0),
        "only thumbs down are in it; take all rows": gain[~batch["desirable"]].mean().clamp(min=0),
        "it is clamped at one from above": gain.mean().clamp(0, 1),
        "it is never below one": gain.mean().clamp(min=1),
        "that is a ratio of probabilities; take the difference of their logs": gain.exp().mean(),
        "that is exp(gain) − 1": gain.exp().mean() - 1,
        "that is the policy's log-probability alone": policy.mean(),
        "that is the policy's −log p alone": -policy.mean(),
        "that is the reference's −log p alone": -reference.mean(),
        "that is the sum of policy and reference": (policy + reference).mean(),
        "the mean is squared": gain.mean() ** 2,
        "the squares are averaged": (gain**2).mean(),
        "it is doubled": 2 * gain.mean().clamp(min=0),
        "it is halved": gain.mean().clamp(min=0) / 2,
        "it mixes the policy's mismatched answers with the reference's own": (policy - own_reference).mean(),
        "it mixes the policy's own answers with the reference's others": (own_policy - reference).mean(),
    }  # fmt: skip
    require_close(out, gain.mean().clamp(min=0), what, mistakes, tolerance=1e-4)


def _require_error_safe(answer, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """An error in the second pass leaves the adapters on."""
    passes = []

    def stop(*_: Any) -> None:
        passes.append(1)
        if len(passes) > 1:
            raise KeyError("an error in the second pass")

    hook = model.get_input_embeddings().register_forward_pre_hook(stop)
    with suppress(KeyError):
        answer(model.train(), batch)
    hook.remove()
    on = all(layer.enabled for layer in adapted_layers(model).values())
    require(on, "after an error the adapters stayed off; use `with adapters_disabled(model):`")


# ── Exercise 5: the two weights ─────────────────────────────────────────────────────────────────────────────


@check
def check_thumb_weights(answer: Callable[[Tensor], Sequence[float]]) -> str:
    """Both kinds of thumb pull alike, λ_D n_D = λ_U n_U, and the commoner kind keeps the weight 1."""
    for up, down in ((10, 100), (300, 100), (7, 7), (1, 12), (9, 2), (5, 0), (0, 4)):
        desirable = torch.tensor([True] * up + [False] * down)[torch.randperm(up + down)]
        what = f"thumb_weights for {up} up and {down} down"
        out = call(answer, what, desirable, mends={"zero": "if one kind is missing, return 1.0, 1.0"})
        out = list(out) if isinstance(out, Tensor) and out.shape == (2,) else out
        pair = require_pair(out, f"{what} should return two numbers, desirable_weight and undesirable_weight")
        pair = torch.stack([require_tensor(x, f"a weight in {what}").double().reshape(-1) for x in pair])
        require(pair.shape == (2, 1), f"{what} has shape {tuple(pair.shape)}; return two numbers")
        _require_balance(pair[:, 0], up, down, what)
    return "thumbs up and down pull alike, and the commoner kind keeps its weight of 1, for seven mixes"


def _require_balance(pair: Tensor, up: int, down: int, what: str) -> None:
    ratio = down / up if up and down else 1.0
    right = (ratio, 1.0) if ratio >= 1 else (1.0, 1 / ratio)

    def both(first: float, second: float) -> Tensor:
        return torch.tensor([first, second], dtype=torch.float64)

    n = up + down
    mistakes = {
        "the two are swapped; the first is for thumbs up": both(*right[::-1]),
        "the rarer kind is made smaller; it needs the larger weight": both(1 / right[0], 1 / right[1]),
        "the commoner kind is made smaller; keep it at 1 and raise the rarer one": both(
            right[0] / max(right), right[1] / max(right)
        ),
        "these are the counts; return weights": both(up, down),
        "these are the counts, swapped; divide both by the smaller": both(down, up),
        "these are the shares; the rarer kind needs the larger weight": both(up / n, down / n),
        "these are the shares, swapped; divide both by the smaller, so that the commoner keeps 1": both(
            down / n, up / n
        ),
        "both are 1, and the commoner kind pulls harder; raise the rarer kind's weight": both(1.0, 1.0),
        "that is n/(2 · count), which makes the commoner smaller; keep it at 1": both(
            n / (2 * max(up, 1)), n / (2 * max(down, 1))
        ),
        "that is n/count; the commoner kind keeps 1": both(n / max(up, 1), n / max(down, 1)),
        "that is one over the count; times the larger count": both(1 / max(up, 1), 1 / max(down, 1)),
        "the root of the ratio is too little": both(right[0] ** 0.5, right[1] ** 0.5),
        "the ratio counts twice": both(right[0] ** 2, right[1] ** 2),
        "the ratio is rounded down; keep its fraction": both(float(int(right[0])), float(int(right[1]))),
        "the logarithm of the ratio is too little": both(1 + math.log(right[0]), 1 + math.log(right[1])),
        "the rarer kind pulls with one thumb less": both(*(w + 1 if w > 1 else w for w in right)),
        "both get the larger weight": both(max(right), max(right)),
        "it is ten to one whatever the counts": both(10.0, 1.0),
    }
    require_close(pair, both(*right), what, mistakes)
