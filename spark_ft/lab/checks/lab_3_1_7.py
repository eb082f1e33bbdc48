"""Checks of lab 3.1.7: log-probabilities of a completion, the DPO loss, implicit rewards, reference, step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spark_ft.adapters import AdapterConfig, adapted_layers, add_adapters
from spark_ft.data.batches import padded, with_prompt
from spark_ft.data.chat import IGNORE
from spark_ft.lab.checks import call, check, require, require_close, require_gradient, require_tensor

Logps = Tensor
Loss = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, int]]


def _asked(answer: Callable, what: str, *given: Tensor, mends: dict[str, str] | None = None, **options):
    """Call an answer that needs no random numbers; what carries a gradient comes as the result of a model."""
    state = torch.get_rng_state()
    out = call(answer, what, *(x.clone() if x.requires_grad else x for x in given), mends=mends, **options)
    drawn = not torch.equal(state, torch.get_rng_state())
    require(not drawn, f"{what}: random numbers were drawn, or a seed was set; this needs neither")
    return out


REMEMBERED = "the numbers of the call before came again; is something remembered from call to call?"


# ── exercise 1 ──


def _labelled(spans: list[tuple[int, int]], length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Logits and labels of rows whose completion is the tokens start … end; one target is token 0."""
    logits = (2 * torch.randn(len(spans), length, vocabulary)).requires_grad_()
    labels = torch.full((len(spans), length), IGNORE)
    for row, (start, end) in zip(labels, spans, strict=True):
        row[start:end] = torch.randint(vocabulary, (end - start,))
    labels[-1, spans[-1][0]] = 0
    return logits, labels


def _summed(scores: Tensor, labels: Tensor, shift: int = 1) -> Tensor:
    """Σ over labelled places t of scores[t − shift, label t], in loops."""
    totals = []
    for row, marks in zip(scores, labels, strict=True):
        total = 0 * row.sum()  # also where nothing is counted it has a gradient
        for t in range(max(shift, 0), len(marks) + min(shift, 0)):
            if marks[t] != IGNORE:
                total = total + row[t - shift, marks[t]]
        totals.append(total)
    return torch.stack(totals)


def _summed_mistakes(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logps = logits.log_softmax(-1)
    right, counts = _summed(logps, labels), (labels != IGNORE).sum(1)
    all_counted = labels.where(labels != IGNORE, 0)
    without_last, without_first = labels.clone(), labels.clone()
    for i, row in enumerate(labels):
        places = (row != IGNORE).nonzero()[:, 0]
        without_last[i, places[-1]] = without_first[i, places[0]] = IGNORE
    mistakes = {
        "the sign is wrong: this is −log p, a loss; return log p": -right,
        "row t of the logits predicts token t + 1: shift the labels by one place": _summed(logps, labels, 0),
        "shifted the wrong way: row t of the logits predicts token t + 1, not t − 1": _summed(
            logps, labels, -1
        ),
        "that is the mean over the completion's tokens; DPO compares sums": right / counts,
        "that is the sum over all places divided by the row's length; DPO compares sums": right
        / labels.shape[1],
        "divided by the row's length less one; DPO compares sums": right / (labels.shape[1] - 1),
        "prompt and padding (−100) are counted, as if each were token 0: mask them out": _summed(
            logps, all_counted
        ),
        "logits are no log-probabilities: take log_softmax over the vocabulary first": _summed(
            logits, labels
        ),
        "these are probabilities, not their logarithms: take log_softmax": _summed(
            logits.softmax(-1), labels
        ),
        "the softmax runs over the places; it should run over the vocabulary, dim=-1": _summed(
            logits.log_softmax(1), labels
        ),
        "the softmax runs over the rows; it should run over the vocabulary, dim=-1": _summed(
            logits.log_softmax(0), labels
        ),
        "the completion's last token is left out": _summed(logps, without_last),
        "the completion's first token is left out": _summed(logps, without_first),
        "this is the probability of the completion; return its logarithm, a sum": right.exp(),
        "in bits: take the natural logarithm": right / torch.tensor(2.0).log(),
    }
    if logits.shape[-1] > 100:  # there −100 is an index from the end
        wrapped = labels.where(labels != IGNORE, logits.shape[-1] - 100)
        said = "−100 was used as an index, which counts from the end of the vocabulary: mask these places out"
        mistakes[said] = _summed(logps, wrapped)
    return mistakes


@check
def check_summed_logps(answer: Callable[[Tensor, Tensor], Logps]) -> str:
    """Σ log p of each row's labelled tokens, from logits, shifted by one; prompt and padding left out."""
    for spans, length, vocabulary in (
        ([(3, 6), (2, 8)], 9, 12),
        ([(1, 2)], 2, 5),
        ([(4, 5), (1, 7), (3, 7)], 7, 120),
    ):
        logits, labels = _labelled(spans, length, vocabulary)
        rows = "row" if len(spans) == 1 else "rows"
        what = f"the result for {len(spans)} {rows} of {length} tokens"
        out = _asked(answer, what, logits, labels, mends={"out of": "mask −100 out first"})
        right, mistakes = _summed(logits.log_softmax(-1), labels), _summed_mistakes(logits, labels)
        require_close(out, right, what, mistakes)
        require_gradient(out, {"logits": logits}, right, what, mistakes)
        again = (logits.detach() + 2 * torch.randn_like(logits)).requires_grad_()
        new, told = _summed(again.log_softmax(-1), labels), {REMEMBERED: right}
        require_close(_asked(answer, what, again, labels), new, f"{what}, asked again", told)
    logits, labels = _labelled([(2, 5)], 6, 8)
    with torch.no_grad():
        logits[0, 2, labels[0, 3]] -= 300
    what = "the result where a token has probability e⁻³⁰⁰"
    out = _tensor_or_nan(_asked(answer, what, logits, labels), what, (1,))
    finite = torch.isfinite(out).all()
    require(
        finite, f"{what} is {out.tolist()[0]}: softmax rounds it to 0, and log 0 is −inf; use log_softmax"
    )
    require_close(out, _summed(logits.log_softmax(-1), labels), what)
    return "sums of log p over completion tokens only, shifted by one, safe where a token is very unlikely"


def _tensor_or_nan(value, what: str, shape: tuple[int, ...]) -> Tensor:
    """As `require_tensor`, for a result whose nan or inf the caller explains."""
    if isinstance(value, Tensor) and value.shape == shape and not torch.isfinite(value).all():
        return value.detach()
    return require_tensor(value, what, shape).detach()


# ── exercise 2 ──


def _pair_logps(pairs: int) -> list[Tensor]:
    """chosen, rejected, ref_chosen, ref_rejected: (pairs,); the first two carry a gradient."""
    reference = [-20 - 10 * torch.rand(pairs) for _ in range(2)]
    policy = [(logps + 3 * torch.randn(pairs)).requires_grad_() for logps in reference]
    return [*policy, *reference]


def _dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """−log σ(z) as log(1 + e^−z), another way than the solution's."""
    z = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    return torch.nn.functional.softplus(-z)


def _dpo_mistakes(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> dict[str, Tensor]:
    def dpo(*logps):
        return _dpo(*logps, beta)

    logps = (chosen, rejected, ref_chosen, ref_rejected)
    none = torch.zeros_like(ref_chosen)
    right = dpo(*logps)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return {
        "that is log σ(z), which is negative: the loss is −log σ(z)": -right,
        "chosen and rejected are swapped, so that it teaches the rejected answer": dpo(
            rejected, chosen, ref_rejected, ref_chosen
        ),
        "the reference is forgotten: subtract ref_chosen and ref_rejected": dpo(chosen, rejected, none, none),
        "the two references are swapped, or added: subtract each from its own answer's": dpo(
            chosen, rejected, ref_rejected, ref_chosen
        ),
        "ref_rejected is left out": dpo(chosen, rejected, ref_chosen, none),
        "ref_chosen is left out": dpo(chosen, rejected, none, ref_rejected),
        "the gains are added: subtract the rejected one's": dpo(chosen, -rejected, ref_chosen, -ref_rejected),
        "β is inverted: multiply by beta, don't divide": _dpo(*logps, 1 / beta),
        "β is forgotten": _dpo(*logps, 1.0),
        "β was squared, or used twice": _dpo(*logps, beta * beta),
        "β is fixed at 0.1: use the argument": _dpo(*logps, 0.1),
        "β stands outside: it belongs inside, β · margin": beta * _dpo(*logps, 1.0),
        "β multiplies the loss once more": beta * right,
        "that is −σ(z): the logarithm is missing": -torch.sigmoid(beta * margin),
        "that is σ(z): the loss is −log σ(z)": torch.sigmoid(beta * margin),
        "that is 1 − σ(z): the loss is −log σ(z)": 1 - torch.sigmoid(beta * margin),
        "that is the margin β · …; −log σ of it is the loss": beta * margin,
        "that is −β · margin; −log σ of the margin is the loss": -beta * margin,
        "that is IPO's square, not −log σ": (margin - 1 / (2 * beta)) ** 2,
        "that is a hinge, not −log σ": (1 - beta * margin).clamp(min=0),
        "only half of it: the loss is −log σ(z), not divided by 2": right / 2,
        "in bits: take the natural logarithm": right / torch.tensor(2.0).log(),
        "divided by the number of pairs: give each pair's own loss": right / len(chosen),
        "that is the mean over the batch: give each pair's own loss": right.mean().expand_as(right),
        "that is the sum over the batch: give each pair's own loss": right.sum().expand_as(right),
    }


@check
def check_dpo_loss(answer: Callable[..., Logps]) -> str:
    """One loss per pair, β where it belongs, gradients, the start at log 2, and margins of ±10,000."""
    for pairs, beta in ((5, 0.3), (1, 0.5), (8, 0.1), (3, 2.0)):
        logps = _pair_logps(pairs)
        what = f"the loss of {pairs} {'pair' if pairs == 1 else 'pairs'} at beta={beta:g}"
        out = _asked(answer, what, *logps, beta=beta)
        right, mistakes = _dpo(*logps, beta), _dpo_mistakes(*logps, beta)
        require_close(out, right, what, mistakes)
        require_gradient(out, {"chosen": logps[0], "rejected": logps[1]}, right, what, mistakes)
        again, told = _pair_logps(pairs), {REMEMBERED: right}
        new = _asked(answer, what, *again, beta=beta)
        require_close(new, _dpo(*again, beta), f"{what}, asked again", told)
    logps = _pair_logps(4)
    out = _asked(answer, "the loss without a beta", *logps)
    require_close(out, _dpo(*logps, 0.1), "the loss without a beta (the default should be 0.1)")
    *_, ref_chosen, ref_rejected = logps
    out = _asked(answer, "the loss before training", ref_chosen, ref_rejected, ref_chosen, ref_rejected)
    require_close(out, torch.full((4,), 2.0).log(), "the loss before training, policy = reference (log 2)")
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    rejected, zero = torch.zeros(2, requires_grad=True), torch.zeros(2)
    what = "the loss at margins of ±10,000"
    out = _tensor_or_nan(given := _asked(answer, what, chosen, rejected, zero, zero), what, (2,))
    require(
        torch.isfinite(out).all(),
        f"{what} is {out.tolist()}: the sigmoid rounds to 0, and log 0 is −inf; use F.logsigmoid",
    )
    right = _dpo(chosen, rejected, zero, zero, 0.1)
    require_close(out, right, what)
    (slope,) = torch.autograd.grad(given.sum(), chosen)
    require(torch.isfinite(slope).all(), f"the gradient at margins of ±10,000 is {slope.tolist()}")
    require_close(slope, torch.tensor([0.0, -0.1]), "the gradient at margins of ±10,000")
    return "one loss per pair, log 2 = 0.6931 before training, finite at margins of ±10,000"


# ── exercise 3 ──


@check
def check_implicit_rewards(answer: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> str:
    """β · (log π − log π_ref) of both answers, without a gradient, and how often chosen's is higher."""
    for pairs, beta in ((6, 0.3), (1, 0.5), (4, 2.0)):
        logps = _pair_logps(pairs)
        chosen, rejected, ref_chosen, ref_rejected = logps
        if pairs > 1:  # a tie, which is no success
            with torch.no_grad():
                rejected[0] = ref_rejected[0] = chosen[0]
                ref_chosen[0] = chosen[0]
        _check_rewards(answer, logps, beta)
    for shift, chosen_gain, rejected_gain in ((0, -10, -50), (-60, 1, -1), (60, -1, 1)):
        logps = _pair_logps(3)  # all right though chosen fell too; though it is less likely; all wrong
        with torch.no_grad():
            logps[2].add_(shift)
            logps[0].copy_(logps[2] + chosen_gain)
            logps[1].copy_(logps[3] + rejected_gain)
        _check_rewards(answer, logps, 0.1)
    return (
        "β · (log π − log π_ref) of both, no gradient; accuracy counts chosen above rejected, ties as misses"
    )


def _check_rewards(answer: Callable, logps: list[Tensor], beta: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = (x.detach() for x in logps)
    what = f"implicit_rewards at beta={beta:g}"
    out = _asked(answer, what, *logps, beta=beta)
    three = isinstance(out, tuple | list) and len(out) == 3
    wanted = "three things: chosen_reward, rejected_reward, accuracy"
    count = f" of {len(out)}" if isinstance(out, tuple | list) else ""
    require(three, f"{what} should return {wanted}; it gave {type(out).__name__}{count}")
    names = ("chosen_reward", "rejected_reward")
    for name, got, policy, reference in zip(
        names, out, (chosen, rejected), (ref_chosen, ref_rejected), strict=False
    ):
        gain = policy - reference
        other = rejected - ref_rejected if name == names[0] else chosen - ref_chosen
        require_close(
            got,
            beta * gain,
            f"{name} at beta={beta:g}",
            {
                "β is forgotten": gain,
                "β is inverted: multiply by beta": gain / beta,
                "the sign is wrong: policy minus reference": -beta * gain,
                "the reference is forgotten": beta * policy,
                "the reference is added: subtract it": beta * (policy + reference),
                "that is the ratio of the probabilities; the reward is β times its logarithm": gain.exp(),
                "that is log π / log π_ref; the logarithm of a ratio is a difference": beta
                * policy
                / reference,
                "β multiplies log π alone: it belongs to the difference": beta * policy - reference,
                "that is the other answer's reward": beta * other,
                "β was squared, or used twice": beta * beta * gain,
                "squashed by a sigmoid: the reward is β · (log π − log π_ref)": torch.sigmoid(beta * gain),
                "the mean of the pairs is taken off": beta * (gain - gain.mean()),
            },
        )
        carries = isinstance(got, Tensor) and got.requires_grad
        require(not carries, f"{name} carries a gradient; rewards are for looking at: detach them")
    right = (beta * (chosen - ref_chosen)) > (beta * (rejected - ref_rejected))
    share = right.double().mean()
    accuracy = out[2]
    if isinstance(accuracy, Tensor) and accuracy.shape == (1,) and len(right) > 1:
        accuracy = accuracy[0]
    require_close(
        accuracy,
        share,
        f"accuracy at beta={beta:g}",
        {
            "a tie was counted as right; chosen must be higher": (right | _tie(logps)).double().mean(),
            "how often chosen's reward is above 0; compare it with rejected's": (chosen > ref_chosen)
            .double()
            .mean(),
            "that is the share of pairs where *rejected* is higher": 1
            - (right | _tie(logps)).double().mean(),
            "the share of misses, not of successes": 1 - share,
            "a count: divide by the number of pairs": right.double().sum(),
            "in percent: give a share between 0 and 1": 100 * share,
            "compares log-probabilities, not rewards": (chosen > rejected).double().mean(),
            "that is the mean margin": beta
            * ((chosen - ref_chosen) - (rejected - ref_rejected)).double().mean(),
            "only whether all pairs are right": right.all().double(),
            "only whether any pair is right": right.any().double(),
        },
        tolerance=1e-6,
    )


def _tie(logps: list[Tensor]) -> Tensor:
    chosen, rejected, ref_chosen, ref_rejected = (x.detach() for x in logps)
    return (chosen - ref_chosen) == (rejected - ref_rejected)


# ── exercises 4 and 5 ──


def _policy(dropout: float = 0.0) -> nn.Module:
    """A Llama of two layers whose LoRA has moved; a base with dropout in its attention, if asked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=60, num_key_value_heads=2, initializer_range=0.2, **shape)
    config.attention_dropout = dropout
    model = LlamaForCausalLM(config).eval()
    add_adapters(model, AdapterConfig(rank=2))
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model


def _pair_batch(pairs: int) -> dict[str, Tensor]:
    """What `collate_preferences` makes: prompts padded on the left, answers on the right, with token 0."""

    def some(least: int) -> list[int]:
        return torch.randint(60, (least + int(torch.randint(5, ())),)).tolist()

    batch = {"row": torch.arange(pairs)}
    for field, least in (("prompt", 3), ("chosen", 1), ("rejected", 2)):
        both = padded([some(least) for _ in range(pairs)], 0, left=field == "prompt")
        batch[f"{field}_ids"], batch[f"{field}_mask"] = both
    return batch


def _logps_alone(model: nn.Module, batch: dict[str, Tensor], adapted: bool = True) -> Tensor:
    """Σ log p of each row's labelled tokens, row by row, without padding, from the model's own logits."""
    layers = list(adapted_layers(model).values())
    training = model.training
    model.eval()
    for layer in layers:
        layer.enabled = adapted
    totals = []
    for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        real = mask.bool()
        logits = model(input_ids=ids[real][None]).logits
        totals.append(_summed(logits.log_softmax(-1), labels[real][None])[0])
    for layer in layers:
        layer.enabled = True
    model.train(training)
    return torch.stack(totals)


@check
def check_reference_logps(answer: Callable[[nn.Module, dict[str, Tensor]], Logps]) -> str:
    """The base's log-probabilities of a model that trains with dropout and noise; all is put back."""
    from transformers.integrations.neftune import activate_neftune

    model = _policy(dropout=0.4)
    batch = with_prompt(_pair_batch(3), "chosen")
    with torch.no_grad():
        policy, clean = _logps_alone(model, batch), _logps_alone(model, batch, adapted=False)
    activate_neftune(model, 5.0)
    layers = list(adapted_layers(model).values())
    for training in (True, False):
        model.train(training)
        mode = "training" if training else "eval"
        what = f"the reference of a model in {mode} mode"
        out = call(answer, what, model, batch)
        got = require_tensor(out, what, clean.shape)
        if training and not torch.allclose(got.double(), clean.double(), atol=1e-4):
            again = require_tensor(call(answer, what, model, batch), what, clean.shape)
            require(
                torch.equal(again, got),
                f"{what} differs from call to call: dropout and noise reach it; switch to model.eval()",
            )
        counts = (batch["labels"] != IGNORE).sum(1)
        mistakes = {
            "that is the policy: the adapters are on": policy,
            "that is the mean per token; DPO wants the sum": clean / counts,
            "the sign is wrong: log-probabilities are negative": -clean,
            "that is the policy's mean per token: adapters off, and sums": policy / counts,
        }
        require_close(out, clean, what, mistakes, tolerance=1e-4)
        carries = isinstance(out, Tensor) and out.requires_grad
        require(not carries, "the reference carries a gradient: compute it under torch.no_grad()")
        on = all(layer.enabled for layer in layers)
        require(on, "the adapters stayed off; `with adapters_disabled(model):` turns them on again")
    model.train()
    try:
        answer(model, {**batch, "input_ids": batch["input_ids"] + 1000})  # no such token: the pass raises
    except IndexError:
        require(model.training, "after an error the model stayed in eval mode: put it back in a `finally`")
        require(all(layer.enabled for layer in layers), "after an error the adapters stayed off")
        require(torch.is_grad_enabled(), "after an error gradients stayed off: use `with torch.no_grad():`")
    return "the base's log-probabilities, free of dropout and noise; mode, adapters, gradients as before"


@check
def check_pair_loss(answer: Loss) -> str:
    """(Σ loss, pairs) of a batch of pairs, value and gradient, before training and in the middle of it."""
    for pairs in (3, 1):
        model, batch = _policy(), _pair_batch(pairs)
        _check_pairs(answer, model, batch, f"the loss of {pairs} pair{'s' * (pairs > 1)}")
    model, batch = _policy(), _pair_batch(4)
    for layer in adapted_layers(model).values():
        nn.init.zeros_(layer.lora_B)
    _check_pairs(answer, model, batch, "the loss before training (4 · log 2)")
    return "Σ of the pairs' losses and their number; the gradient reaches the adapters and nothing else"


def _check_pairs(answer: Loss, model: nn.Module, batch: dict[str, Tensor], what: str) -> None:
    sides = [with_prompt(batch, side) for side in ("chosen", "rejected")]
    policy = [_logps_alone(model, side) for side in sides]
    with torch.no_grad():
        reference = [_logps_alone(model, side, adapted=False) for side in sides]
    out = call(answer, what, model, batch)
    two = isinstance(out, tuple | list) and len(out) == 2
    require(two, f"pair_loss should return two things, the sum and how many; it gave {type(out).__name__}")
    loss, count = out
    pairs, tokens = len(sides[0]["labels"]), int(batch["chosen_mask"].sum() + batch["rejected_mask"].sum())
    count = require_tensor(count, "the number of pairs").double()
    require(
        count.numel() == 1, f"the number of pairs has shape {tuple(count.shape)}, and should be one number"
    )
    require(count.item() != tokens or tokens == pairs, "the second number counts tokens; count pairs")
    require(count.item() == pairs, f"the second number is {count.item():g}, and should be the pairs, {pairs}")
    lengths = [(side["labels"] != IGNORE).sum(1) for side in sides]
    means = [x / n for x, n in zip([*policy, *reference], [*lengths, *lengths], strict=True)]
    right = _dpo(*policy, *reference, 0.1)
    mistakes = {
        "the mean over the pairs: `train` divides by their number, so return the sum": right.mean(),
        "the adapters are on in the reference, so every loss is log 2": _dpo(
            *policy, *(x.detach() for x in policy), 0.1
        ).sum(),
        "the policy's adapters are off too, so every loss is log 2": torch.tensor(2.0).log() * pairs,
        "per-token means went in; DPO takes sums": _dpo(*means, 0.1).sum(),
    }
    named = _dpo_mistakes(*policy, *reference, 0.1)
    moved = (policy[0] - reference[0]).abs().max() > 1e-4
    mistakes |= {message: value.sum() for message, value in named.items()} if moved else {}
    require_close(loss, right.sum(), what, mistakes, tolerance=1e-4)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    first_last = dict([next(iter(adapters.items())), *list(adapters.items())[-1:]])
    require_gradient(loss, first_last, right.sum(), what, tolerance=1e-3)
    on = all(layer.enabled for layer in adapted_layers(model).values())
    require(on, "the adapters stayed off; `with adapters_disabled(model):` turns them on again")
