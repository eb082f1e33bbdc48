"""Each gradient written by hand equals the plain line in its docstring, in value and in gradient."""

import pytest
import torch
from helpers import relative
from torch import nn
from torch.nn import functional as F

from spark_ft.methods import nf4
from spark_ft.methods.fused import FrozenHead, ScaleRows
from spark_ft.methods.nf4 import NF4Linear


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(fused, plain, inputs, tolerance):
    """In value and in the gradient of each input, under a loss that weighs each output differently."""
    found = []
    for function in (fused, plain):
        copies = [t.clone().requires_grad_() for t in inputs]
        y = function(*(t * 1 for t in copies))  # not the leaves themselves, which one function writes into
        slope = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
        found.append((y.detach(), *torch.autograd.grad(y, copies, slope)))
    for ours, expected in zip(*found, strict=True):
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
        assert relative(ours, expected) <= tolerance


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
def test_scale_rows(bias, to):
    z, gain, b = random(7, 5), 1 + random(5, seed=1) / 2, random(5, seed=2) if bias else None
    gain[3] = 1e-30  # DoRA's gain is never zero: from what is kept, z is found again

    def plain(z, gain):
        return (gain * (z - (b if bias else 0)) + (b if bias else 0)).to(to)

    near = 1e-6 if to == torch.float32 else 2**-8
    assert_same(lambda z, gain: ScaleRows.apply(z, gain, b, to), plain, (z, gain), near)
    assert torch.equal(ScaleRows.apply(z.clone(), torch.ones(5), b, to), z.to(to))  # to the last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_nf4_product(dtype, bias, monkeypatch):
    monkeypatch.setitem(nf4.DENSE, "cpu", 7 * 16 + 3)  # 24 rows in four parts
    layer = NF4Linear.from_linear(nn.Linear(16, 24, bias=bias).to(dtype))
    assert layer.weight.rows_at_once() == 7
    for lead in ((), (3,), (2, 5)):
        x = random(*lead, 16, dtype=dtype)
        assert_same(layer, layer.to_linear(dtype), (x,), 1e-6 if dtype == torch.float32 else 2**-7)
    nothing = x[:0].requires_grad_()
    assert torch.autograd.grad(layer(nothing).sum(), nothing)[0].shape == (0, 5, 16)


def test_frozen_head():
    head, targets = random(30, 6), torch.arange(12) % 30

    def plain(hidden):
        return F.log_softmax(hidden @ head.T, 1).gather(1, targets[:, None])[:, 0]

    assert_same(lambda hidden: FrozenHead.apply(hidden, head, targets, 5), plain, (random(12, 6),), 1e-6)
