"""Preference losses: one number per pair or thumb, from the log-probabilities of whole completions.

`chosen` is log π(y_w | x), `rejected` log π(y_l | x), `ref_…` the same under the reference π_ref, all (B,):
sums over the completion's tokens, or per-token means where the docstring says so. Computed in fp32 or better,
whatever comes in; TRL's trainers return the mean over the batch. A β that is not explained is DPO's.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from spark_ft.methods.fused import at_least_fp32

Logp = Float[Tensor, " batch"]


def dpo_loss(chosen: Logp, rejected: Logp, ref_chosen: Logp, ref_rejected: Logp, *, beta=0.1) -> Logp:
    """DPO (Rafailov 2023): chosen should gain more on the reference than rejected does. From sums.

        −log σ(β ((chosen − ref_chosen) − (rejected − ref_rejected)))          (arXiv:2305.18290, eq. 7)

    More β keeps the policy closer to the reference; usually 0.05 to 0.5. As TRL's `sigmoid`. From per-token
    means it is length-normalised DPO, TRL's `sigmoid_norm`, and wants a larger β, 2 to 10.
    """
    chosen, rejected, ref_chosen, ref_rejected = _checked(beta, chosen, rejected, ref_chosen, ref_rejected)
    return -logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def cdpo_loss(
    chosen: Logp, rejected: Logp, ref_chosen: Logp, ref_rejected: Logp, *, beta=0.1, label_smoothing=0.1
) -> Logp:
    """Conservative DPO (Mitchell 2023): a share ε of the labels is wrong, so no margin should grow for ever.

        (1 − ε) · dpo(chosen, rejected) + ε · dpo(rejected, chosen)            (his note on noisy preferences)

    From sums. More `label_smoothing`, ε, stops sooner, at a margin of log((1 − ε)/ε)/β; usually 0.05 to 0.2.
    TRL's DPOTrainer has it only as `aot` of one pair, its CPOTrainer without a reference.
    """
    right, wrong = _both_ways(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def robust_dpo_loss(
    chosen: Logp, rejected: Logp, ref_chosen: Logp, ref_rejected: Logp, *, beta=0.1, label_smoothing=0.1
) -> Logp:
    """Robust DPO (Chowdhury 2024): with a share ε of flipped labels, on average DPO on the right ones.

        ((1 − ε) · dpo(chosen, rejected) − ε · dpo(rejected, chosen)) / (1 − 2ε)         (arXiv:2403.00409)

    From sums; it can be negative. More `label_smoothing`, ε, trusts labels less; usually 0.1. TRL's `robust`.
    """
    right, wrong = _both_ways(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def apo_zero_loss(chosen: Logp, rejected: Logp, ref_chosen: Logp, ref_rejected: Logp, *, beta=0.1) -> Logp:
    """APO-zero, where chosen is better than the model: chosen up, rejected down. From sums; TRL's `apo_zero`.

    1 − σ(β (chosen − ref_chosen)) + σ(β (rejected − ref_rejected))        (arXiv:2408.06266, eq. 7)
    """
    chosen, rejected, ref_chosen, ref_rejected = _checked(beta, chosen, rejected, ref_chosen, ref_rejected)
    return torch.sigmoid(-beta * (chosen - ref_chosen)) + torch.sigmoid(beta * (rejected - ref_rejected))


def apo_down_loss(chosen: Logp, rejected: Logp, ref_chosen: Logp, ref_rejected: Logp, *, beta=0.1) -> Logp:
    """APO-down, where chosen is worse than the model: both down, rejected more. From sums; TRL's `apo_down`.

    σ(β gain) + 1 − σ(β margin),   gain = chosen − ref_chosen              (arXiv:2408.06266, eq. 8)
    """
    chosen, rejected, ref_chosen, ref_rejected = _checked(beta, chosen, rejected, ref_chosen, ref_rejected)
    gain, margin = chosen - ref_chosen, (chosen - ref_chosen) - (rejected - ref_rejected)
    return torch.sigmoid(beta * gain) + torch.sigmoid(-beta * margin)


def ipo_loss(chosen: Logp, rejected: Logp, ref_chosen: Logp, ref_rejected: Logp, *, beta=0.1) -> Logp:
    """IPO (Azar 2023): a margin of 1/(2β), and no more, so no pair pushes for ever. From per-token means.

        ((chosen − ref_chosen) − (rejected − ref_rejected) − 1/(2β))²          (arXiv:2310.12036, eq. 17)

    More β, the paper's τ, asks for less: 0.1 for 5 nats per token, 1 for half a nat; usually 0.1 to 1. As
    TRL's `ipo`; the authors' first code took sums.
    """
    chosen, rejected, ref_chosen, ref_rejected = _checked(beta, chosen, rejected, ref_chosen, ref_rejected)
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def simpo_loss(chosen: Logp, rejected: Logp, *, beta: float = 2.0, gamma: float = 1.0) -> Logp:
    """SimPO (Meng 2024): no reference; chosen should win by γ/β nats per token. From per-token means.

        −log σ(β (chosen − rejected) − γ)                                      (arXiv:2405.14734, eq. 6)

    More β settles a pair sooner; usually 2 to 10. More γ asks for a larger margin; usually 0.1 β to 0.8 β.
    As TRL's CPOTrainer with `loss_type="simpo"`, `cpo_alpha=0` (its default adds an NLL) and `simpo_gamma`.
    """
    chosen, rejected = _checked(beta, chosen, rejected)
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen: Logp, rejected: Logp, nll: Logp | float, *, weight: float = 0.1) -> Logp:
    """ORPO (Hong 2024): SFT, and chosen's odds p/(1 − p) above rejected's. From per-token means.

        nll − λ log σ(log odds(chosen) − log odds(rejected))                   (arXiv:2403.07691, eq. 6 and 7)

    nll: −mean log p per example, or one number. More `weight`, λ, compares more and imitates less; usually
    0.1 to 1. As TRL's ORPOTrainer, whose `beta` is λ and whose nll is one mean over the batch's prompt and
    chosen tokens. Unlike there p = 1 is no NaN: it counts as 1 − ε of the given dtype, 1.2e-7 in fp32.
    """
    _checked(weight, chosen, rejected, *([nll] if getattr(nll, "ndim", 0) else []))
    return nll - weight * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    logp = (logp - (logp + torch.finfo(logp.dtype).eps).clamp(min=0).detach()).to(at_least_fp32(logp.dtype))
    log1mexp = torch.where(logp.exp() < 0.5, torch.log1p(-logp.exp()), torch.log(-logp.expm1()))
    return logp - log1mexp  # log p − log(1 − p)


def kto_loss(
    policy: Logp, reference: Logp, desirable: Bool[Tensor, " batch"], kl: Tensor | float, *,
    beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Logp:  # fmt: skip
    """KTO (Ethayarajh 2024): thumbs up should gain more than answers do on average, thumbs down less.

        up: λ_D (1 − σ(β (gain − z)))     down: λ_U (1 − σ(β (z − gain)))      (arXiv:2402.01306, eq. 7)
        gain = policy − reference         z = max(0, kl), without a gradient

    From sums. kl: the mean gain over prompts with an answer of another row. More β stays closer to the
    reference; usually 0.01 to 0.5. More λ makes its thumbs count more; eq. 8: λ_D · (number up) should be
    1 to 4/3 times λ_U · (number down). As TRL's `kto`.
    """
    policy, reference = _checked(beta, policy, reference)
    thumbs = getattr(desirable, "dtype", None) == torch.bool and desirable.shape == policy.shape
    if not thumbs or getattr(kl, "ndim", 0):
        raise ValueError(f"{desirable=}, {kl=}; give {len(policy)} booleans, true for thumbs up, and one kl")
    gain, z = policy - reference, torch.as_tensor(kl, device=policy.device).detach().clamp(min=0)
    up, down = torch.sigmoid(beta * (z - gain)), torch.sigmoid(beta * (gain - z))  # 1 − σ(x) = σ(−x)
    return torch.where(desirable, desirable_weight * up, undesirable_weight * down)


def implicit_reward(policy: Logp, reference: Logp, *, beta: float = 0.1) -> Logp:
    """β (policy − reference): up to a number per prompt, what training with β maximises (DPO's eq. 5)."""
    policy, reference = _checked(beta, policy, reference)
    return beta * (policy - reference)


def _both_ways(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing):
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}; give a share of at least 0 and under 0.5")
    right = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    return right, dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=beta)


def _checked(factor: float, *logps: Tensor) -> list[Tensor]:
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in logps]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise ValueError(f"found {shapes}; give one log-probability per example: tensors of one shape (B,)")
    if not factor > 0:
        raise ValueError(f"the factor (beta or weight) is {factor}; it must be above 0")
    return [x.to(at_least_fp32(x.dtype)) for x in logps]
