"""token_logps is log_softmax at the target, in value and gradient, at any chunk size, and keeps little."""

import pytest
import torch
from helpers import relative
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from spark_ft.methods.logprobs import chunked_logps, token_logps

both_heads = pytest.mark.parametrize("train_head", [False, True])


def exact(hidden, head, targets):
    """The same by log_softmax of the whole (N, V) matrix."""
    return F.log_softmax(hidden @ head.T, dim=-1).gather(1, targets[:, None]).squeeze(1)


def case(n, h, v, dtype=torch.float64, scale=1.0, train_head=False):
    g = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(n, h, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    head = torch.randn(v, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_(train_head)
    return hidden, head, torch.randint(v, (n,), generator=g)


def gradients(logps, *inputs):
    """Under a loss that weighs each token differently, some with a negative weight."""
    loss = (logps.double() * torch.linspace(-1, 2, len(logps), dtype=torch.float64)).sum()
    return torch.autograd.grad(loss, [t for t in inputs if t.requires_grad], retain_graph=True)


def widths(hidden, head, targets, chunk_size):
    """Numbers in each tensor that backward keeps."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        assert token_logps(hidden, head, targets, chunk_size).requires_grad
    return kept


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 40), st.integers(1, 30), st.booleans())
def test_equals_log_softmax_in_value_and_gradient(n, h, v, chunk, train_head):
    hidden, head, targets = case(n, h, v, train_head=train_head)
    ours, theirs = token_logps(hidden, head, targets, chunk), exact(hidden, head, targets)
    assert (ours.shape, ours.dtype) == ((n,), torch.float64)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, hidden, head), gradients(theirs, hidden, head), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@both_heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_agrees_with_fp64_to_its_rounding_and_sums_in_fp32(dtype, train_head):
    scale, near, near_grad = (1.0, 1e-6, 1e-6) if dtype == torch.float32 else (0.2, 2**-8, 2**-6)
    hidden, head, targets = case(130, 64, 500, dtype, scale, train_head)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, head)]
    expected = exact(*wide, targets)
    slopes = gradients(expected, *wide)
    for chunk in (1, 7, 128, 1000):
        ours = token_logps(hidden, head, targets, chunk)
        assert ours.dtype == torch.float32
        assert relative(ours, expected) < near
        for a, b in zip(gradients(ours, hidden, head), slopes, strict=True):
            assert a.dtype == dtype
            assert relative(a, b) < near_grad


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
    assert relative(ours, expected) < 1e-5
    # at 1e4 two nearly equal logits are told apart to 1e-3 in fp32
    assert relative(gradients(ours, hidden)[0], gradients(expected, wide)[0]) < 1e-3


def test_backward_keeps_one_row_per_token_or_less_than_one_chunk_of_logits():
    assert widths(*case(64, 8, 5000, torch.float32), 16) == [64 * 8]
    assert max(widths(*case(64, 8, 5000, torch.float32, train_head=True), 16), default=0) < 16 * 5000


@both_heads
def test_without_gradients_nothing_is_kept_and_the_slope_is_not_computed(train_head):
    hidden, head, targets = case(20, 4, 50, torch.float32, train_head=train_head)

    def products(hidden, head):
        with torch.profiler.profile() as profile:
            logps = token_logps(hidden, head, targets, 8)
        return logps, sum(event.count for event in profile.key_averages() if event.key == "aten::mm")

    with torch.no_grad():
        quiet, count = products(hidden, head)
    plain, plain_count = products(hidden.detach(), head.detach())  # nothing asks for a gradient
    loud, loud_count = products(hidden, head.detach())
    assert quiet.grad_fn is plain.grad_fn is None
    assert count == plain_count == 3  # one per chunk
    assert loud_count == 6  # and one for each chunk's slope
    assert torch.equal(plain, loud.detach())
    assert torch.allclose(quiet, plain, atol=1e-6)


def test_under_autocast_logits_are_those_of_a_plain_head():
    for narrow in (False, True):  # a model's last norm may return either
        hidden, head, targets = case(12, 16, 30, torch.float32)
        given = hidden.bfloat16() if narrow else hidden
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = token_logps(given, head, targets, 5), exact(given, head, targets)
        assert relative(ours, theirs) < 2**-8
        assert relative(gradients(ours, hidden)[0], gradients(theirs, hidden)[0]) < 2**-6


def test_inputs_may_lie_in_memory_as_they_like_and_are_left_as_they_were():
    hidden, head, targets = case(12, 6, 30)
    before = [t.detach().clone() for t in (hidden, head, targets)]
    expected = exact(hidden, head, targets)
    twice, wide = hidden.repeat_interleave(2, 0)[::2], hidden.repeat_interleave(2, 1)[:, ::2]
    for odd in (hidden.T.contiguous().T, twice, wide):
        ours = token_logps(odd, head, targets, 5)
        assert torch.allclose(ours, expected, rtol=1e-12)
        slope, truth = gradients(ours, hidden)[0], gradients(expected, hidden)[0]
        assert torch.allclose(slope, truth, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip((hidden, head, targets), before, strict=True))


def test_chunked_logps_follows_whatever_makes_the_logits():
    hidden, head, targets = case(12, 6, 30, train_head=True)
    bias = torch.randn(30, dtype=torch.float64, requires_grad=True)

    def capped(rows):  # a soft cap, as in Gemma 2
        return 5.0 * torch.tanh((rows @ head.T + bias) / 5.0)

    ours = chunked_logps(hidden, capped, targets, 5)
    theirs = F.log_softmax(capped(hidden), dim=-1).gather(1, targets[:, None]).squeeze(1)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for a, b in zip(gradients(ours, hidden, head, bias), gradients(theirs, hidden, head, bias), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_shapes_that_do_not_fit_are_named():
    for shapes in (((3, 4), (9, 4), (2,)), ((3, 4), (9, 5), (3,)), ((0, 4), (9, 4), (1,))):
        wrong = [torch.zeros(shape, dtype=torch.long if len(shape) == 1 else None) for shape in shapes]
        with pytest.raises(ValueError, match=r"do not fit: expected \(N, H\), \(V, H\) and \(N,\)") as error:
            token_logps(*wrong)
        assert all(str(shape) in str(error.value) for shape in shapes)
