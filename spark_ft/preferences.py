"""From a loss on log-probabilities (methods/preference.py, or your own) to a loss for `train`.

The reference is the model with its adapters off, or a frozen copy (reference.py).
"""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from spark_ft.methods.preference import ipo_loss, orpo_loss, simpo_loss
from spark_ft.reference import ReferenceLogps
from spark_ft.scoring import Batch, answer_logps, dropout_layers, evaluating

Parts = list[Batch]
Everywhere = Callable[[Tensor], Tensor]  # the sum of a tensor over all processes
PER_TOKEN = (ipo_loss, simpo_loss, orpo_loss)
METRICS = (
    "chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_logp", "rejected_logp", "kl", "length",
)  # fmt: skip


def preference_loss(
    loss: Callable[..., Tensor],
    *,
    per_token: bool | None = None,
    reference: ReferenceLogps | None = None,
    dropout: bool = False,
) -> "PreferenceLoss":
    """A loss for `train` on `preference_batches`: Σ over pairs of `loss`, and the number of pairs.

        train(model, preference_batches(rows, tokenizer, 4), preference_loss(dpo_loss), TrainConfig(steps=24))

    `loss` gets what its parameters' names ask for, each (B,): `chosen`, `rejected`: log π of the two answers;
    `ref_chosen`, `ref_rejected`: log π_ref; `nll`: each pair's part of the step's mean −log p over prompt and
    chosen tokens. Its other parameters need defaults, or values by `functools.partial(simpo_loss, beta=2.5)`.

    `History.metrics` gets, as means over the step: chosen_reward and rejected_reward, β (log π − log π_ref),
    or β log π for a loss without a reference, in the unit that the loss takes; margin, their difference;
    accuracy, how often it is above 0; chosen_logp and rejected_logp, per token; length, tokens per answer;
    kl, log π − log π_ref of an answer: KL(π ‖ π_ref) estimated on the data's own answers in place of samples,
    so it can be below 0, and not a number without a reference.

    Args:
        loss: one of `methods.preference`, or your own: (B,) losses from (B,) log-probabilities.
        per_token: give the loss means over an answer's tokens instead of sums. Default: for `ipo_loss`,
            `simpo_loss` and `orpo_loss` yes, for all others no.
        reference: what keeps log π_ref, to share between runs; default one of its own.
        dropout: let the model's dropout act on the policy, whose rows then share nothing. Without, its
            dropout layers are put into eval mode, and stay there until `model.train()`. The reference never
            has any.

    Raises:
        ValueError: a parameter of `loss` is unknown here and has no default, or neither answer is one.
    """
    return PreferenceLoss(loss, per_token, reference, dropout)


def feedback_loss(
    loss: Callable[..., Tensor], *, reference: ReferenceLogps | None = None, dropout: bool = False
) -> "FeedbackLoss":
    """A loss for `train` on `feedback_batches`: Σ over thumbs of `loss`, and the number of thumbs.

        train(model, feedback_batches(rows, tokenizer, 16), feedback_loss(kto_loss), TrainConfig(steps=24))

    `loss` gets what its parameters' names ask for: `policy`, `reference`: log π and log π_ref of the answers,
    (B,); `desirable`: thumbs up, (B,) bool; `kl`: the mean of log π − log π_ref over the mismatched pairs of
    the whole step, one number without a gradient, clamped at 0.

    `History.metrics` has the names of `preference_loss`: chosen is thumbs up, rejected thumbs down (not a
    number in a step without one), margin the difference of the two mean rewards; accuracy, how often a reward
    is on its thumb's side of β kl; kl, before it is clamped.

    Args:
        loss, reference, dropout: as in `preference_loss`; the KL's pass never drops anything.
    """
    return FeedbackLoss(loss, False, reference, dropout)


class StepLoss:
    """What both losses share: which numbers the function wants, the reference, dropout."""

    known: tuple[str, ...] = ()
    referred: tuple[str, ...] = ()  # those of them that need the reference
    metrics = METRICS

    def __init__(self, loss, per_token, reference, dropout):
        self.loss, self.dropout = loss, dropout
        self.reference = reference or ReferenceLogps()
        bound, function = getattr(loss, "keywords", {}), loss
        while isinstance(function, partial):
            function = function.func
        self.per_token = function in PER_TOKEN if per_token is None else per_token
        parameters = inspect.signature(loss).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.wants = [p.name for p in named if p.name in self.known and p.name not in bound]
        self.name = name = getattr(function, "__name__", type(function).__name__)
        for p in named:
            if p.name not in self.known and p.default is p.empty:
                has = f"{', '.join(self.known)}; give it a default, or a value by functools.partial"
                raise ValueError(f'{name} wants "{p.name}", which is none of {has}')
        if not {"chosen", "rejected", "policy"} & set(self.wants):
            raise ValueError(f"{name} takes none of the policy's log-probabilities, so it teaches nothing")
        beta = {p.name: p.default for p in named}.get("beta", 1.0)
        self.beta = 1.0 if beta is inspect.Parameter.empty else beta
        self.refers = bool(set(self.wants) & set(self.referred))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """(Σ loss, how many, what the batch adds to each of the step's metrics)."""
        if "of_step" not in batch:  # not called by `train`: this batch is the whole step
            (batch,) = self.whole_step(model, [batch], lambda x: x)
        if not self.dropout:
            for layer in dropout_layers(model):
                layer.training = False
        return self.of_part(model, batch)

    def kept(self) -> dict[str, Tensor]:
        """The reference's numbers, for the checkpoint: computed again in other batches, their last bit may
        differ."""
        return self.reference.tensors()

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `kept` gave."""
        self.reference.take(tensors)

    def given(self, **numbers) -> Tensor:
        """The loss on those of the numbers that it asks for."""
        losses, rows = self.loss(**{name: numbers[name] for name in self.wants}), len(numbers[self.known[0]])
        if (shape := getattr(losses, "shape", None)) != (rows,):
            found = type(losses).__name__ if shape is None else tuple(shape)
            mend = f"return a loss for each, ({rows},), not their mean"
            raise ValueError(f"{self.name} returned {found} for {rows} examples; {mend}")
        return losses


def _per(count: Tensor) -> Tensor:
    """1/count, and not a number for a mean over nothing."""
    return torch.where(count > 0, 1 / count, math.nan)


class PreferenceLoss(StepLoss):
    """See `preference_loss`."""

    known = ("chosen", "rejected", "ref_chosen", "ref_rejected", "nll")
    referred = ("ref_chosen", "ref_rejected")

    def whole_step(self, model: nn.Module, parts: Parts, everywhere: Everywhere) -> Parts:
        """Add to each part what depends on the whole step, and the reference's log-probabilities."""
        sides = ("chosen", "rejected")
        counts = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
        for part in parts:
            tokens = [part[f"{name}_mask"].sum() for name in (*sides, "prompt")]
            pairs = len(part["prompt_mask"])
            counts += torch.stack([tokens[0].new_tensor(pairs), *tokens[:2], tokens[0] + tokens[2] - pairs])
        counts = everywhere(counts)
        # 1/pairs, 1/chosen tokens, 1/rejected tokens, and the weight of a token in `nll`
        of_step = torch.stack([*_per(counts[:3]), counts[0] * _per(counts[3])])
        refs = self.reference(model, parts, sides) if self.refers else [None] * len(parts)
        return [
            {**part, "of_step": of_step.expand(len(part["prompt_mask"]), 4)}
            | ({} if ref is None else {"ref_chosen": ref[0], "ref_rejected": ref[1]})
            for part, ref in zip(parts, refs, strict=True)
        ]

    def of_part(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """See `StepLoss.__call__`."""
        per_pair, per_chosen, per_rejected, per_token = batch["of_step"][0]
        sums, counts, prompts = answer_logps(model, batch, ("chosen", "rejected"), "nll" in self.wants)
        chosen, rejected = sums
        refs = [batch[name] if self.refers else torch.zeros_like(chosen) for name in self.referred]
        logps = [*sums, *refs]
        if self.per_token:
            logps = [x / count for x, count in zip(logps, [*counts, *counts], strict=True)]
        nll = (-(chosen + prompts) * per_token).to(chosen.dtype)
        losses = self.given(**dict(zip(self.known, [*logps, nll], strict=True)))
        with torch.no_grad():
            rewards = [self.beta * (logps[i] - logps[i + 2]) for i in (0, 1)]
            kl = (sums - torch.stack(refs)).sum() * per_pair / 2 if self.refers else per_pair * math.nan
            found = {
                "chosen_reward": rewards[0].sum() * per_pair,
                "rejected_reward": rewards[1].sum() * per_pair,
                "margin": (rewards[0] - rewards[1]).sum() * per_pair,
                "accuracy": (rewards[0] > rewards[1]).sum() * per_pair,
                "chosen_logp": chosen.sum() * per_chosen,
                "rejected_logp": rejected.sum() * per_rejected,
                "kl": kl,
                "length": counts.sum() * per_pair / 2,
            }
        return losses.sum(), len(losses), found


class FeedbackLoss(StepLoss):
    """See `feedback_loss`."""

    known = ("policy", "reference", "desirable", "kl")
    referred = ("reference", "kl")

    def whole_step(self, model: nn.Module, parts: Parts, everywhere: Everywhere) -> Parts:
        """Add to each part what depends on the whole step, and the reference's log-probabilities."""
        refs = self.reference(model, parts, ("completion", "mismatched")) if self.refers else []
        sums = torch.zeros(6, dtype=torch.float64, device=next(model.parameters()).device)
        for i, part in enumerate(parts):
            up, tokens, gain = part["desirable"], part["completion_mask"].sum(1), sums.new_tensor(math.nan)
            if "kl" in self.wants:
                with torch.no_grad(), evaluating(model):
                    (policy,), *_ = answer_logps(model, part, ("mismatched",))
                gain = (policy - refs[i][1]).double().sum()
            counts = [up.sum(), (~up).sum(), tokens[up].sum(), tokens[~up].sum()]
            sums += torch.stack([gain, *(x.double() for x in (up.new_ones(len(up)).sum(), *counts))])
        sums = everywhere(sums)
        # 1/thumbs, 1/up, 1/down, 1/tokens of either, and the KL estimate
        of_step = torch.stack([*_per(sums[1:]), sums[0] / sums[1]])
        return [
            {**part, "of_step": of_step.expand(len(part["desirable"]), 6)}
            | ({"reference": refs[i][0]} if self.refers else {})
            for i, part in enumerate(parts)
        ]

    def of_part(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """See `StepLoss.__call__`."""
        per_thumb, per_up, per_down, per_up_token, per_down_token, kl = batch["of_step"][0]
        (policy,), (tokens,), _ = answer_logps(model, batch, ("completion",))
        reference = batch["reference"] if self.refers else torch.zeros_like(policy)
        up, z = batch["desirable"], kl.clamp(min=0).to(policy.dtype)
        losses = self.given(policy=policy, reference=reference, desirable=up, kl=z)
        with torch.no_grad():
            rewards = self.beta * (policy - reference)
            right = (rewards > self.beta * z.nan_to_num()) == up
            sides = [(rewards * side).sum() * per for side, per in ((up, per_up), (~up, per_down))]
            found = {
                "chosen_reward": sides[0],
                "rejected_reward": sides[1],
                "margin": sides[0] - sides[1],
                "accuracy": right.sum() * per_thumb,
                "chosen_logp": (policy * up).sum() * per_up_token,
                "rejected_logp": (policy * ~up).sum() * per_down_token,
                "kl": kl * len(up) * per_thumb,
                "length": tokens.sum() * per_thumb,
            }
        return losses.sum(), len(losses), found
