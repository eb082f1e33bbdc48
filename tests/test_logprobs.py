"""token_logps is log_softmax at the target, in value and gradient, at any chunk size and any logits; and keeps nothing big."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from spark_ft.methods.logprobs import chunked_logps, token_logps


def exact(hidden, head, targets):
    """The same by log_softmax of the whole (N, V) matrix."""
    return F.log_softmax(hidden @ head.T, dim=-1).gather(1, targets[:, None]).squeeze(1)


def case(n, h, v, dtype=torch.float64, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(n, h, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    head = torch.randn(v, h, generator=g, dtype=torch.float64).to(dtype)
    return hidden, head, torch.randint(v, (n,), generator=g)


def weighted(logps):
    """A loss that weighs each token differently, some with a negative weight."""
    return (logps.double() * torch.linspace(-1, 2, len(logps), dtype=torch.float64)).sum()


def close(ours, theirs, tolerance):
    return (ours.double() - theirs.double()).norm() <= tolerance * max(theirs.double().norm(), 1e-30)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 20),
    h=st.integers(1, 9),
    v=st.integers(1, 40),
    chunk=st.integers(1, 30),
    train_head=st.booleans(),
)
def test_equals_log_softmax_in_value_and_gradient(n, h, v, chunk, train_head):
    hidden, head, targets = case(n, h, v)
    head.requires_grad_(train_head)
    inputs = (hidden, head) if train_head else (hidden,)
    ours, theirs = token_logps(hidden, head, targets, chunk), exact(hidden, head, targets)
    assert ours.shape == (n,)
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(weighted(ours), inputs),
        torch.autograd.grad(weighted(theirs), inputs),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 128, 1000])
def test_in_fp32_agrees_with_fp64_to_fp32_rounding(train_head, chunk):
    hidden, head, targets = case(130, 64, 500, torch.float32)
    head.requires_grad_(train_head)
    inputs = (hidden, head) if train_head else (hidden,)
    wide = [t.detach().double().requires_grad_() for t in (hidden, head)]
    expected = exact(*wide, targets)
    ours = token_logps(hidden, head, targets, chunk)
    assert ours.dtype == torch.float32
    assert close(ours, expected, 1e-6)
    slopes = torch.autograd.grad(weighted(expected), wide[: len(inputs)])
    for a, b in zip(torch.autograd.grad(weighted(ours), inputs), slopes, strict=True):
        assert close(a, b, 1e-6)


def test_gradients_are_those_of_finite_differences():
    hidden, head, targets = case(5, 3, 6)
    assert torch.autograd.gradcheck(lambda h: token_logps(h, head, targets, 2), (hidden,))
    head.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: token_logps(h, w, targets, 2), (hidden, head))


def test_extreme_logits_stay_finite_and_exact():
    # one hidden unit at 1e4 and a head of −1, 0 and 1: logits of −1e4, 0 and 1e4
    hidden = torch.tensor([[1e4]] * 3, requires_grad=True)
    head, targets = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([0, 1, 2])
    ours = token_logps(hidden, head, targets)
    assert ours.tolist() == [-2e4, -1e4, 0.0]
    # d log p(y)/dh = W[y] − Σ p W, and p is one at W = 1
    assert torch.autograd.grad(ours.sum(), hidden)[0].flatten().tolist() == [-2.0, -1.0, 0.0]


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_random_logits_agree_with_fp64(scale):
    hidden, head, targets = case(40, 16, 300, torch.float32, scale)
    ours = token_logps(hidden, head, targets, 16)
    wide = hidden.detach().double().requires_grad_()
    expected = exact(wide, head.double(), targets)
    assert torch.isfinite(ours).all()
    assert close(ours, expected, 1e-5)
    slope, truth = torch.autograd.grad(ours.sum(), hidden)[0], torch.autograd.grad(expected.sum(), wide)[0]
    assert torch.isfinite(slope).all()
    assert close(slope, truth, 1e-3)  # at 1e4 two nearly equal logits are told apart to 1e-3 in fp32


@pytest.mark.parametrize("train_head", [False, True])
def test_bf16_agrees_to_bf16_rounding_and_sums_in_fp32(train_head):
    hidden, head, targets = case(50, 64, 200, torch.bfloat16, scale=0.2)
    head.requires_grad_(train_head)
    ours = token_logps(hidden, head, targets, 16)
    wide = hidden.detach().double().requires_grad_()
    expected = exact(wide, head.detach().double(), targets)
    assert ours.dtype == torch.float32
    assert close(ours, expected, 2**-8)
    grad = torch.autograd.grad(weighted(ours), hidden)[0]
    assert grad.dtype == torch.bfloat16
    assert close(grad, torch.autograd.grad(weighted(expected), wide)[0], 2**-6)


@pytest.mark.parametrize("train_head", [False, True])
def test_no_tokens_give_no_log_probabilities_and_a_zero_gradient(train_head):
    hidden, head, targets = case(0, 4, 9, torch.float32)
    head.requires_grad_(train_head)
    ours = token_logps(hidden, head, targets)
    assert ours.shape == (0,)
    ours.sum().backward()
    assert hidden.grad.shape == (0, 4)
    assert not train_head or torch.count_nonzero(head.grad) == 0


def test_a_frozen_head_keeps_one_row_a_token_and_never_a_row_of_the_vocabulary():
    hidden, head, targets = case(64, 8, 5000, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        logps = token_logps(hidden, head, targets, 16)
        assert logps.requires_grad
    assert kept == [64 * 8]


def test_a_head_that_trains_keeps_no_logits_either():
    hidden, head, targets = case(64, 8, 5000, torch.float32)
    head.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        token_logps(hidden, head, targets, 16)
    assert max(kept, default=0) < 16 * 5000  # less than one chunk of logits


@pytest.mark.parametrize("train_head", [False, True])
def test_without_gradients_nothing_is_kept_and_the_slope_is_not_computed(monkeypatch, train_head):
    hidden, head, targets = case(20, 4, 50, torch.float32)
    head.requires_grad_(train_head)
    products = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or real(*a, **k))
    with torch.no_grad():
        quiet = token_logps(hidden, head, targets, 8)
        assert quiet.grad_fn is None
        assert not quiet.requires_grad
    # nor where nothing asks for a gradient
    plain = token_logps(hidden.detach(), head.detach(), targets, 8)
    assert plain.grad_fn is None
    assert products == []
    loud = token_logps(hidden, head.detach(), targets, 8)
    assert len(products) == 3  # the slope's product, once a chunk: the counting above does count
    assert torch.equal(plain, loud.detach())
    assert torch.allclose(quiet, plain, atol=1e-6)


def test_hidden_states_may_lie_in_memory_as_they_like():
    hidden, head, targets = case(12, 6, 30)
    expected = exact(hidden, head, targets)
    for odd in (
        hidden.T.contiguous().T,
        hidden.repeat_interleave(2, 0)[::2],
        hidden.repeat_interleave(2, 1)[:, ::2],
    ):
        ours = token_logps(odd, head, targets, 5)
        assert torch.allclose(ours, expected, rtol=1e-12)
        slope, truth = (
            torch.autograd.grad(weighted(y), hidden, retain_graph=True)[0] for y in (ours, expected)
        )
        assert torch.allclose(slope, truth, rtol=1e-11, atol=1e-12)


def test_inputs_are_left_as_they_were():
    hidden, head, targets = case(12, 6, 30, torch.float32)
    before = [t.detach().clone() for t in (hidden, head, targets)]
    token_logps(hidden, head, targets, 5).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((hidden, head, targets), before, strict=True))


def test_chunked_logps_follows_whatever_makes_the_logits():
    hidden, head, targets = case(12, 6, 30)
    head.requires_grad_()
    bias = torch.randn(30, dtype=torch.float64, requires_grad=True)

    def capped(rows):  # a soft cap, as in Gemma 2
        return 5.0 * torch.tanh((rows @ head.T + bias) / 5.0)

    ours = chunked_logps(hidden, capped, targets, 5)
    theirs = F.log_softmax(capped(hidden), dim=-1).gather(1, targets[:, None]).squeeze(1)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    inputs = (hidden, head, bias)
    for a, b in zip(
        torch.autograd.grad(weighted(ours), inputs),
        torch.autograd.grad(weighted(theirs), inputs),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("hidden", "head", "targets"), [((3, 4), (9, 4), (2,)), ((3, 4), (9, 5), (3,)), ((0, 4), (9, 4), (1,))]
)
def test_shapes_that_do_not_fit_are_named(hidden, head, targets):
    with pytest.raises(ValueError, match=r"do not fit: expected \(N, H\), \(V, H\) and \(N,\)") as error:
        token_logps(torch.zeros(hidden), torch.zeros(head), torch.zeros(targets, dtype=torch.long))
    assert all(str(shape) in str(error.value) for shape in (hidden, head, targets))
