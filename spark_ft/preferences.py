"""From a loss on log-probabilities (methods/preference.py, or your own) to a loss for `train`.

The reference is the model with its adapters off, or a frozen copy; what it says is computed once and kept.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from spark_ft.adapters import adapted_layers, adapters_disabled
from spark_ft.memory.tracker import real_tensors
from spark_ft.methods.fused import at_least_fp32
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.preference import ipo_loss, orpo_loss, simpo_loss
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
    reference: "ReferenceLogps | None" = None,
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
    loss: Callable[..., Tensor], *, reference: "ReferenceLogps | None" = None, dropout: bool = False
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
        name = getattr(function, "__name__", type(function).__name__)
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
        return self.loss(**{name: numbers[name] for name in self.wants})


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
        device = next(model.parameters()).device
        counts = torch.zeros(5, dtype=torch.float64, device=device)
        gain = torch.zeros((), dtype=torch.float64, device=device)
        for part in parts:
            up, tokens = part["desirable"], part["completion_mask"].sum(1)
            both = [up.sum(), (~up).sum(), tokens[up].sum(), tokens[~up].sum()]
            counts += torch.stack([tokens.new_tensor(len(up)), *both])
        if "kl" in self.wants:
            for part, ref in zip(parts, refs, strict=True):
                with torch.no_grad(), evaluating(model):
                    (policy,), *_ = answer_logps(model, part, ("mismatched",))
                gain = gain + (policy - ref[1]).double().sum()
        counts, gain = everywhere(counts), everywhere(gain)
        # 1/thumbs, 1/up, 1/down, 1/tokens of either, and the KL estimate
        of_step = torch.stack([*_per(counts), gain / counts[0] if "kl" in self.wants else gain * math.nan])
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


class ReferenceLogps:
    """Σ log π_ref of answers, computed once per sequence and kept, under a hash of its ids and the weights.

    The reference is the model in eval mode with its adapters off, so an adapter that was trained before, in
    SFT, is to be merged first (`merge_adapters`). For a model without adapters give a frozen copy of it.

    Args:
        model: the reference, where it is not the trained model with its adapters off.
    """

    def __init__(self, model: nn.Module | None = None):
        self.model = model
        self.kept: dict[bytes, float] = {}

    def __call__(self, model: nn.Module, parts: Parts, sides: Sequence[str]) -> list[Tensor]:
        """(sides, B) for each of the batches.

        Raises:
            ValueError: no adapters and no model of its own; or something else than adapters trains.
        """
        scorer = getattr(model, "reference_model", None) or self.model or model  # the first in a memory plan
        if scorer is model and (why := _moves(model)):
            raise ValueError(why)
        if isinstance(next(scorer.parameters()), FakeTensor):  # numbers that do not exist are not kept
            return [self._score(scorer, model, part, sides) for part in parts]
        weights, dtype = fingerprint(scorer), at_least_fp32(next(scorer.parameters()).dtype)
        found = []
        for part in parts:
            keys = [_hashes(part, side, weights) for side in sides]
            missing = [i for i, row in enumerate(zip(*keys, strict=True)) if not self.kept.keys() >= {*row}]
            if missing:
                rows = {name: x[missing] for name, x in part.items()}
                for side, logps in zip(keys, self._score(scorer, model, rows, sides).tolist(), strict=True):
                    self.kept |= zip([side[i] for i in missing], logps, strict=True)
            numbers = [[self.kept[key] for key in side] for side in keys]
            found.append(torch.tensor(numbers, dtype=dtype, device=part["prompt_ids"].device))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, as tensors of bytes and numbers."""
        keys = torch.tensor([list(key) for key in self.kept], dtype=torch.uint8)
        return {"keys": keys, "logps": torch.tensor([*self.kept.values()], dtype=torch.float64)}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Keep what `tensors` gave too."""
        keys = (bytes(key) for key in tensors["keys"].tolist())
        self.kept |= dict(zip(keys, tensors["logps"].tolist(), strict=True))

    def _score(self, scorer, model, batch: Batch, sides: Sequence[str]) -> Tensor:
        off = adapters_disabled(model) if scorer is model else nullcontext()
        with torch.no_grad(), evaluating(scorer), off:
            return answer_logps(scorer, batch, sides)[0]


def _moves(model: nn.Module) -> str:
    layers = adapted_layers(model)
    if not layers:
        mend = "add adapters (add_adapters), or give reference=ReferenceLogps(a frozen copy of the model)"
        return f"without adapters the model has no reference; {mend}"
    own = {id(p) for layer in layers.values() for p in layer.parameters()}
    moving = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    mend = "freeze it, or give reference=ReferenceLogps(a frozen copy of the model)"
    return f"{moving[0]} trains beside the adapters and would move the reference; {mend}" if moving else ""


def _hashes(batch: Batch, side: str, weights: bytes) -> list[bytes]:
    """A key for each row: of the reference's weights, the prompt's ids and the answer's."""
    names = [f"{part}_{what}" for part in ("prompt", side) for what in ("ids", "mask")]
    hashes = []
    for prompt, real, answer, said in zip(*(batch[name].cpu() for name in names), strict=True):
        prompt, answer = prompt[real.bool()], answer[said.bool()]
        ids = torch.cat([torch.tensor([len(prompt)]), prompt, answer])
        hashes.append(blake2b(weights + ids.numpy().tobytes(), digest_size=16).digest())
    return hashes


def fingerprint(model: nn.Module) -> bytes:
    """A hash of every number that the model computes with, adapters aside."""
    digest = blake2b(f"{type(model).__name__}{getattr(model, 'config', '')}".encode(), digest_size=16)
    seen: dict[int, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, LoRALinear):
            seen |= {id(x): x for x in real_tensors(module)}
    for x in seen.values():
        digest.update(f"{tuple(x.shape)}{x.dtype}".encode())
        digest.update(_sums(x.detach()).cpu().numpy().tobytes())
    return digest.digest()


def _sums(x: Tensor) -> Tensor:
    """64 sums, modulo 2⁶⁴, of every 64th eight bytes of the tensor, and of what is left over."""
    data = x.contiguous().view(-1).view(torch.uint8)
    whole = len(data) // 512 * 512
    words = data[:whole].view(torch.int64) if whole else data.new_zeros(0, dtype=torch.int64)
    return torch.cat([words.view(-1, 64).sum(0), data[whole:].long()])
