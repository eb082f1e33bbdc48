"""Preference losses: by hand in value and gradient, by their symmetries, at extremes, and TRL's own."""

import math
from functools import partial

import pytest
import torch
from helpers import complains
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from spark_ft.bench import peers
from spark_ft.data.records import read_records
from spark_ft.files import ROOT
from spark_ft.lab import parity
from spark_ft.methods.preference import (
    apo_down_loss,
    apo_zero_loss,
    cdpo_loss,
    dpo_loss,
    implicit_reward,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)

WITH_REFERENCE = (dpo_loss, cdpo_loss, robust_dpo_loss, apo_zero_loss, apo_down_loss, ipo_loss)
LOG3 = math.log(3)  # σ(log 3) = 3/4, and σ′ there is 3/16
logps = st.floats(-200, 0, width=32)
betas = st.floats(0.01, 2)


def up_loss(policy, reference, **settings):
    return kto_loss(policy, reference, torch.ones(len(policy), dtype=torch.bool), 0.0, **settings)


def down_loss(policy, reference, **settings):
    return kto_loss(policy, reference, torch.zeros(len(policy), dtype=torch.bool), 0.0, **settings)


def one(*numbers, dtype=torch.float64):
    """Each number as the log-probability of a batch of one."""
    return [tensor([x], dtype=dtype, requires_grad=True) for x in numbers]


def value_and_slopes(loss, *numbers, **settings):
    inputs = one(*numbers)
    value = loss(*inputs, **settings)
    return value.item(), [g.item() for g in torch.autograd.grad(value.sum(), inputs)]


def test_values_and_gradients_are_those_worked_out_by_hand():
    won = (-20 + 10 * LOG3, -30.0, -20.0, -30.0)  # chosen gained log 3 / β with β = 0.1
    both = (-20 + 10 * LOG3, -30 - 10 * LOG3, -20.0, -30.0)  # … and rejected lost as much
    up, down = 0.1 / 4, 0.1 * 3 / 16  # β (1 − σ) and β σ′
    for loss, numbers, settings, value, slopes in (
        (dpo_loss, (-5.0, -7.0, -5.0, -7.0), {}, math.log(2), (-0.05, 0.05, 0.05, -0.05)),
        (dpo_loss, won, {}, math.log(4 / 3), (-up, up, up, -up)),
        (dpo_loss, (-1.0, -2.0, -1.0, -2 + LOG3), {"beta": 1.0}, math.log(4 / 3), (-0.25, 0.25, 0.25, -0.25)),
        # with ε = ¼ the best margin is log 3 / β: the slope is zero there
        (cdpo_loss, won, {"label_smoothing": 0.25}, 0.75 * math.log(4 / 3) + 0.25 * math.log(4), (0,) * 4),
        (robust_dpo_loss, won, {"label_smoothing": 0.25}, 1.5 * math.log(4 / 3) - 0.5 * math.log(4),
         (-0.075, 0.075, 0.075, -0.075)),  # −β (¾ · ¼ + ¼ · ¾) / ½
        (apo_zero_loss, both, {}, 0.25 + 0.25, (-down, down, down, -down)),
        (apo_down_loss, (-20 + 10 * LOG3, -30 + 10 * LOG3, -20.0, -30.0), {}, 0.75 + 0.5,
         (down - 0.025, 0.025, 0.025 - down, -0.025)),
        (ipo_loss, (-1.0, -3.0, -2.0, -2.0), {}, 9.0, (-6.0, 6.0, 6.0, -6.0)),  # (2 − 5)², twice −3
        (ipo_loss, (-1.0, -1.5, -1.0, -1.0), {"beta": 1.0}, 0.0, (0.0,) * 4),  # half a nat is what β = 1 asks
        (simpo_loss, (-1.0, -1.5), {}, math.log(2), (-1.0, 1.0)),  # β ½ − γ = 0
        (simpo_loss, (-1.0, -1.0), {"beta": 2.5, "gamma": LOG3}, math.log(4), (-1.875, 1.875)),
        # p = ¾ and ½: odds 3 and 1; the slope of log odds is 1/(1 − p), so 4 and 2
        (orpo_loss, (math.log(0.75), math.log(0.5), 0.3), {}, 0.3 + 0.1 * math.log(4 / 3), (-0.1, 0.05, 1.0)),
        (up_loss, (-20 + 10 * LOG3, -20.0), {}, 0.25, (-down, down)),
        (down_loss, (-20 + 10 * LOG3, -20.0), {}, 0.75, (down, -down)),
        (up_loss, (-5.0, -5.0), {"desirable_weight": 3.0, "undesirable_weight": 9.0}, 1.5, (-0.075, 0.075)),
        (down_loss, (-5.0, -5.0), {"desirable_weight": 9.0, "undesirable_weight": 3.0}, 1.5, (0.075, -0.075)),
        (implicit_reward, (-3.0, -5.0), {"beta": 0.5}, 1.0, (0.5, -0.5)),
    ):  # fmt: skip
        found = value_and_slopes(loss, *numbers, **settings)
        assert found == (pytest.approx(value), pytest.approx(list(slopes))), (loss.__name__, numbers)


def test_kto_takes_each_rows_thumb_and_measures_the_gain_from_the_kl_clamped_at_zero_without_a_gradient():
    policy, reference = one(-20 + 10 * LOG3 + 2, -20.0)
    kl = tensor(2.0, dtype=torch.float64, requires_grad=True)
    mixed = kto_loss(policy.expand(2), reference.expand(2), tensor([True, False]), kl, undesirable_weight=2.0)
    assert mixed.tolist() == pytest.approx([0.25, 1.5])
    mixed.sum().backward()
    assert kl.grad is None
    for below in (-7.0, tensor(-7.0), tensor(0.0)):
        assert torch.equal(kto_loss(policy, reference, tensor([True]), below), up_loss(policy, reference))


def test_orpos_nll_may_be_one_number_for_the_batch_or_one_per_example():
    chosen, rejected = tensor([-0.5, -1.0]), tensor([-0.7, -0.2])
    whole = orpo_loss(chosen, rejected, 0.0)
    for nll, added in ((0.25, [0.25, 0.25]), (tensor(0.25), [0.25, 0.25]), (tensor([0.5, 2.0]), [0.5, 2.0])):
        assert torch.equal(orpo_loss(chosen, rejected, nll), tensor(added) + whole)


@given(logps, logps, logps, logps, betas)
def test_only_the_margin_counts_and_swapping_the_answers_turns_it_round(chosen, rejected, first, other, beta):
    margin = (chosen - first) - (rejected - other)
    pair, swapped = one(chosen, rejected, first, other), one(rejected, chosen, other, first)
    ahead, behind = dpo_loss(*pair, beta=beta), dpo_loss(*swapped, beta=beta)
    assert (behind - ahead).item() == pytest.approx(beta * margin, abs=1e-9)
    assert dpo_loss(*one(margin, 0, 0, 0), beta=beta).item() == pytest.approx(ahead.item(), abs=1e-9)
    rewards = implicit_reward(pair[0], pair[2], beta=beta) - implicit_reward(pair[1], pair[3], beta=beta)
    assert -torch.nn.functional.logsigmoid(rewards).item() == pytest.approx(ahead.item(), abs=1e-9)
    assert simpo_loss(*pair[:2], beta=beta, gamma=0.0).item() == pytest.approx(
        dpo_loss(*pair[:2], *one(0, 0), beta=beta).item()
    )
    error = ipo_loss(*pair, beta=beta).item()
    assert error == pytest.approx(ipo_loss(*one(1 / beta - margin, 0, 0, 0), beta=beta).item(), abs=1e-6)


@given(logps, logps, logps, logps, st.floats(0, 0.45))
def test_robust_dpo_is_right_on_average_and_conservative_dpo_is_dpo_on_averaged_labels(a, b, c, d, share):
    pair, swapped = one(a, b, c, d), one(b, a, d, c)
    for loss, averaged in ((dpo_loss, cdpo_loss), (robust_dpo_loss, dpo_loss)):
        noisy = {"label_smoothing": share} if loss is robust_dpo_loss else {}
        expected = (1 - share) * loss(*pair, **noisy) + share * loss(*swapped, **noisy)
        told = {"label_smoothing": share} if averaged is cdpo_loss else {}
        assert averaged(*pair, **told).item() == pytest.approx(expected.item(), abs=1e-9)


@given(st.lists(st.tuples(logps, logps, logps, logps), min_size=1, max_size=5))
def test_every_example_has_its_own_loss_and_a_better_chosen_answer_never_costs_more(rows):
    columns = [tensor(column, dtype=torch.float64, requires_grad=True) for column in zip(*rows, strict=True)]
    thumbs = torch.arange(len(rows)) % 2 == 0
    losses = {
        dpo_loss: columns, robust_dpo_loss: columns, apo_zero_loss: columns,
        simpo_loss: columns[:2], orpo_loss: [*columns[:2], 0.5], kto_loss: [*columns[:2], thumbs, 1.0],
    }  # fmt: skip
    for loss, inputs in losses.items():
        together = loss(*inputs)
        for i, of_row in enumerate(together):
            alone = loss(*(x[i : i + 1] if isinstance(x, torch.Tensor) else x for x in inputs))
            assert torch.allclose(of_row, alone, rtol=1e-12, atol=1e-15)
        slope = torch.autograd.grad(together.sum(), columns[0])[0]
        up = thumbs if loss is kto_loss else torch.ones_like(thumbs)
        assert (slope[up] <= 0).all()
        assert (slope[~up] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_margins_and_probabilities_of_one_give_no_nan_in_value_or_gradient(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    for size in (0.0, 1e-7, 1.0, 89.0, 1e4):
        for sign in (1, -1):
            x = tensor([sign * size], dtype=dtype, requires_grad=True)
            zero = torch.zeros(1, dtype=dtype, requires_grad=True)
            sure, other = (-(x * sign).abs(), zero) if sign > 0 else (zero, -(x * sign).abs())
            found = [loss(x, zero, zero, zero) for loss in WITH_REFERENCE]
            found += [loss(zero, x, zero, zero) for loss in WITH_REFERENCE]
            found += [simpo_loss(x, zero), up_loss(x, zero), down_loss(x, zero), implicit_reward(x, zero)]
            found += [orpo_loss(sure, other, 0.0), orpo_loss(zero - 1, other, 0.0, weight=1.0)]
            assert {value.dtype for value in found} == {wide}
            for value in found:
                slopes = torch.autograd.grad(value.sum(), (x, zero), allow_unused=True, retain_graph=True)
                numbers = [value, *(slope for slope in slopes if slope is not None)]
                assert all(torch.isfinite(number).all() for number in numbers), (value, slopes, size, sign)


def test_where_a_probability_is_one_orpo_still_pushes_the_right_way():
    for dtype in (torch.float16, torch.float32, torch.float64):
        for above in (0.0, 1e-3):  # rounding can leave a log-probability above 0
            chosen, rejected = one(-1.0, above, dtype=dtype)
            slopes = torch.autograd.grad(orpo_loss(chosen, rejected, 0.0).sum(), (chosen, rejected))
            assert slopes[0] < 0 < slopes[1]
            chosen, rejected = one(above, -1.0, dtype=dtype)
            slope = torch.autograd.grad(orpo_loss(chosen, rejected, 0.0).sum(), chosen)[0]
            # −λ odds(rejected) as p → 1, the product of a vanishing weight and a diverging slope
            assert slope.item() == pytest.approx(-0.1 / (math.e - 1), rel=2e-2)


def test_orpos_log_odds_are_exact_near_zero_and_one():
    for p in (1e-30, 1e-6, 0.3, 0.5, 0.7, 1 - 1e-5):
        logp = tensor([math.log(p)], dtype=torch.float32)
        exact = logp.item() - math.log(-math.expm1(logp.item()))  # against odds of 1
        found = orpo_loss(tensor([math.log(0.5)]), logp, 0.0, weight=1.0).item()
        assert found == pytest.approx(max(exact, 0) + math.log1p(math.exp(-abs(exact))), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_in_16_bits_are_computed_with_in_fp32(dtype):
    g = torch.Generator().manual_seed(0)
    narrow = [(-20 * torch.rand(64, generator=g) - 0.1).to(dtype).requires_grad_() for _ in range(4)]
    exact = [x.detach().float().requires_grad_() for x in narrow]
    thumbs = torch.arange(64) % 3 == 0
    cases = [(loss, 4, ()) for loss in WITH_REFERENCE] + [(simpo_loss, 2, ()), (implicit_reward, 2, ())]
    for loss, count, rest in (*cases, (orpo_loss, 3, ()), (kto_loss, 2, (thumbs, 0.5))):
        ours, theirs = loss(*narrow[:count], *rest), loss(*exact[:count], *rest)
        assert torch.equal(ours, theirs), loss
        slopes = [torch.autograd.grad(value.sum(), x[0])[0] for value, x in ((ours, narrow), (theirs, exact))]
        assert slopes[0].dtype == dtype
        assert torch.allclose(slopes[0].float(), slopes[1], rtol=2**-7, atol=1e-3)


def test_wrong_inputs_are_refused_with_a_sentence():
    two, thumbs = torch.zeros(2), tensor([True, False])
    of_tokens, column, single = torch.zeros(2, 7), torch.zeros(2, 1), tensor(0.0)
    per_example = "give one log-probability per example"
    complains(
        (dpo_loss, (of_tokens,) * 4, "(2, 7)", per_example),
        (dpo_loss, (two, two, column, column), "(2, 1)", per_example),
        (ipo_loss, (two, torch.zeros(3), two, two), "(3,)", per_example),
        (simpo_loss, (single, single), "[(), ()]", per_example),
        (simpo_loss, (0.5, 0.5), "float", per_example),
        (orpo_loss, (two, two, torch.zeros(3)), "(3,)", per_example),
        (implicit_reward, (two, single), per_example),
        (kto_loss, (two, two, tensor([1, -1]), 0.0), "give 2 booleans, true for thumbs up"),
        (kto_loss, (two, two, [True, False], 0.0), "give 2 booleans"),
        (kto_loss, (two, two, thumbs[:1], 0.0), "give 2 booleans"),
        (kto_loss, (two, two, thumbs, two), "kl=tensor([0., 0.])", "and one kl"),
        (lambda: dpo_loss(two, two, two, two, beta=0.0), (), "is 0.0; it must be above 0"),
        (lambda: simpo_loss(two, two, beta=float("nan")), (), "is nan; it must be above 0"),
        (lambda: orpo_loss(two, two, 0.0, weight=-1.0), (), "is -1.0; it must be above 0"),
        (lambda: cdpo_loss(two, two, two, two, label_smoothing=0.5), (), "label_smoothing=0.5", "under 0.5"),
        (lambda: robust_dpo_loss(two, two, two, two, label_smoothing=-0.1), (), "at least 0"),
    )


# ── TRL 1.16, each trainer on its own batch ─────────────────────────────────────────────────────────────────


def kitchen(kind, count):
    rows = read_records(
        ROOT / f"data/kitchen_{'feedback' if kind == 'feedback' else 'preferences'}/train.jsonl", kind
    )
    return (
        rows[:count]
        if kind == "preference"
        else [*rows[:count], *(r for r in rows if not r["label"])][: 2 * count]
    )


def agrees(found):
    loss, *slopes = found.values()
    return loss < 1e-6 and max(slopes) < 1e-5


@pytest.mark.slow
def test_the_losses_with_a_reference_are_those_of_trls_dpo_trainer(tokenizer, monkeypatch):
    trainer = parity.small_trainer(peers.dpo_trainer, kitchen("preference", 2), tokenizer, {})
    for loss_type, loss, beta, smoothing, per_token in (
        ("sigmoid", dpo_loss, 0.1, 0.0, False),
        ("sigmoid_norm", dpo_loss, 2.0, 0.0, True),  # β times a mean of −10.8 rounds to 1e-6 at 5
        ("ipo", ipo_loss, 0.3, 0.0, True),
        ("robust", robust_dpo_loss, 0.05, 0.2, False),
        ("apo_zero", apo_zero_loss, 0.05, 0.0, False),
        ("apo_down", apo_down_loss, 0.05, 0.0, False),
    ):
        trainer.loss_types, trainer.beta, trainer.label_smoothing = [loss_type], beta, smoothing
        theirs = peers.dpo_numbers(trainer)
        assert (theirs.logps[0] - theirs.logps[2]).abs().min() > 0.1, "the policy has moved"
        ours = partial(loss, **({"label_smoothing": smoothing} if smoothing else {}), beta=beta)
        assert agrees(parity.against_trl(ours, theirs, per_token)), loss_type
        for wrong in (partial(ours, beta=1.05 * beta), lambda c, r, rc, rr, ours=ours: ours(c, r, rr, rc)):
            assert not agrees(parity.against_trl(wrong, theirs, per_token)), loss_type
        assert not agrees(parity.against_trl(ours, theirs, not per_token)), loss_type
    trainer.loss_types, trainer.beta, trainer.label_smoothing = ["aot"], 0.1, 0.2
    whole = peers.trl_batch(trainer)
    monkeypatch.setattr(
        peers, "trl_batch", lambda _: {name: x[[1, 3]] for name, x in whole.items()}
    )  # one pair
    ours = partial(cdpo_loss, label_smoothing=0.2)
    assert agrees(parity.against_trl(ours, peers.dpo_numbers(trainer)))


@pytest.mark.slow
def test_simpo_orpo_and_kto_are_those_of_trls_trainers(tokenizer):
    rows = kitchen("preference", 2)
    trainer = parity.small_trainer(peers.simpo_trainer, rows, tokenizer, {"beta": 2.5, "gamma": 1.4})
    theirs = peers.odds_numbers(trainer)._replace()
    assert theirs.logps[2] == 0, "without an NLL"
    theirs = theirs._replace(logps=theirs.logps[:2])
    assert agrees(parity.against_trl(partial(simpo_loss, beta=2.5, gamma=1.4), theirs))
    assert not agrees(parity.against_trl(partial(simpo_loss, beta=2.5, gamma=1.4 / 2.5), theirs)), (
        "γ is not γ/β"
    )
    trainer.label_smoothing = 0.2  # SimPO with it is conservative DPO whose reference gives chosen γ/β more
    theirs = peers.odds_numbers(trainer)
    smooth = lambda c, r, _: cdpo_loss(  # noqa: E731
        c, r, torch.full_like(c, 1.4 / 2.5), torch.zeros_like(c), beta=2.5, label_smoothing=0.2
    )
    assert agrees(parity.against_trl(smooth, theirs))
    assert agrees(parity.orpo_against_trl(orpo_loss, rows, tokenizer, weight=0.5))
    summed = lambda c, r, nll, weight: orpo_loss(30 * c, 30 * r, nll, weight=weight)  # noqa: E731
    assert not agrees(parity.orpo_against_trl(summed, rows, tokenizer, weight=0.5))


@pytest.mark.slow
def test_kto_is_trls_whatever_the_sign_of_the_kl_and_with_the_mismatched_pairs_that_we_make(tokenizer):
    rows = kitchen("feedback", 3)
    weights = {"desirable_weight": 0.5, "undesirable_weight": 2.0}
    trainer = parity.small_trainer(peers.kto_trainer, rows, tokenizer, weights)
    seen = []
    for _ in range(2):
        theirs = peers.kto_numbers(trainer)
        seen.append(theirs.logps[-1].item())
        assert theirs.logps[2].sum() == 3
        assert agrees(parity.against_trl(partial(kto_loss, **weights), theirs))
        assert not agrees(parity.against_trl(kto_loss, theirs))
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.data.neg_()
    assert min(seen) < 0 < max(seen)
