"""DoRALinear is its formula; its norm needs no product as large as W and is never stale."""

import copy
import gc
import pickle

import pytest
import torch
from helpers import outcome, relative, trained_layer, trained_parameters
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spark_ft.methods import dora
from spark_ft.methods.dora import DoRALinear, row_norm


def trained(*shape, **options) -> DoRALinear:
    return trained_layer(DoRALinear, *shape, **options)


def oracle(layer: DoRALinear, x, still=True):
    """The formula written out, in fp64, with all of W + sBA."""
    W, A, B, m = (t.double() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
    V = W + layer.scaling * B @ A
    n = V.norm(dim=1)
    y = x.double() @ (m / (n.detach() if still else n))[:, None].mul(V).T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_formula_written_out_in_double(bias):
    layer = trained(48, 32, rank=8, bias=bias, dtype=torch.float64)
    for lead in ((5,), ()):
        x = torch.randn(*lead, 32, dtype=torch.float64, requires_grad=True)
        slope = torch.randn(*lead, 48, dtype=torch.float64)
        inputs = (x, *trained_parameters(layer))
        ours, expected = layer(x), oracle(layer, x)
        assert relative(ours, expected) < 1e-12
        right = torch.autograd.grad(expected, inputs, slope)
        for a, b in zip(torch.autograd.grad(ours, inputs, slope), right, strict=True):
            assert relative(a, b) < 1e-12
        moving = torch.autograd.grad(oracle(layer, x, still=False), layer.lora_B, slope)[0]
        assert relative(moving, right[2]) > 0.01  # that the norm is held still shows


@pytest.mark.parametrize("bias", [False, True])
def test_with_dropout_a_bf16_base_is_as_exact_as_its_rounding(bias):
    layer = trained(48, 32, rank=8, dtype=torch.bfloat16, bias=bias, dropout=0.5)
    exact = copy.deepcopy(layer).float()
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    found = [outcome(it, x.to(it.weight.dtype), trained_parameters(it)) for it in (layer, exact)]  # one mask
    assert all(relative(a, b) <= 2**-8 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("residual", [1.0, 0.1, 0.01, 1e-3])
def test_the_norm_is_right_where_the_update_nearly_cancels_the_weight(residual):
    torch.manual_seed(1)
    for out, inp in ((48, 16), (16, 48), (24, 24)):
        U, S, Vh = torch.linalg.svd(torch.randn(out, inp), full_matrices=False)
        A, B, s = Vh, U * S, 0.7
        W = -s * (B.double() @ A.double()) + residual * torch.randn(out, inp).double() / inp**0.5
        W[::3] = torch.randn(W[::3].shape).double()  # among rows where nothing cancels
        W = W.float()
        exact = (W.double() + s * B.double() @ A.double()).norm(dim=1)
        found = row_norm(W, A, B, s, W.norm(dim=1).square())
        assert ((found - exact).abs() / exact).max() < 1e-5


def test_the_plain_expansion_would_lose_those_digits(monkeypatch):
    monkeypatch.setattr(dora, "CANCELS", 0.0)
    with pytest.raises(AssertionError):
        test_the_norm_is_right_where_the_update_nearly_cancels_the_weight(1e-3)


def test_the_norm_is_taken_in_blocks_smaller_than_the_weight_and_keeps_no_copy_of_the_factors(monkeypatch):
    layer, sizes = trained(64, 48, rank=4), []
    whole = layer.norm().clone()
    monkeypatch.setattr(dora, "ROW_BLOCK", 7)
    layer.forget_norm()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) and out._base is None else 0)
            return out

    with Watch():
        assert relative(layer.norm(), whole) < 1e-6
    assert 0 < max(sizes) < 64 * 48
    layer = trained(61, 48, rank=3)
    layer(torch.randn(2, 48))
    shapes = [t.shape for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    assert shapes.count(layer.lora_B.shape) == 1


def step(layer, optimizer, micro_batches=1, replay=False):
    for _ in range(micro_batches):
        x = torch.randn(6, layer.in_features, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=False) if replay else layer(x)
        y.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("replay", [False, True])
def test_the_norm_is_computed_once_per_optimizer_step(monkeypatch, replay):
    layer, calls = trained(), []
    optimizer = torch.optim.AdamW(trained_parameters(layer), lr=0.1, fused=True)
    monkeypatch.setattr(dora, "row_norm", lambda *a: calls.append(1) or row_norm(*a))
    for _ in range(3):
        step(layer, optimizer, micro_batches=4, replay=replay)
    assert len(calls) == 3


@pytest.mark.parametrize("kind", ["AdamW", "AdamW, fused", "SGD"])
def test_the_norm_follows_every_optimizer(kind):
    layer, x, name, *fused = trained(), torch.randn(3, 16), *kind.split(", ")
    optimizer = getattr(torch.optim, name)(trained_parameters(layer), lr=1e-2, fused=bool(fused))
    for _ in range(3):
        version = layer.lora_B._version
        step(layer, optimizer)
        assert relative(layer(x), oracle(layer, x)) < 1e-5
    assert not fused or layer.lora_B._version == version, "fused steps count now: the hook is needed no more"


def new(tensor):
    return torch.randn_like(tensor)


CHANGES = {
    "in place": lambda layer: layer.lora_B.copy_(new(layer.lora_B)),
    "through .data, told": lambda layer: (layer.lora_A.data.mul_(-2), layer.forget_norm()),
    "new .data, told": lambda layer: (setattr(layer.lora_B, "data", new(layer.lora_B)), layer.forget_norm()),
    "new A": lambda layer: setattr(layer, "lora_A", nn.Parameter(new(layer.lora_A))),
    "state dict": lambda layer: layer.load_state_dict({k: new(t) for k, t in layer.state_dict().items()}),
    "weight in place": lambda layer: layer.base.weight.normal_(),
    "new weight": lambda layer: setattr(layer.base, "weight", nn.Parameter(new(layer.weight), False)),
    "new base": lambda layer: setattr(layer, "base", nn.Linear(16, 24).requires_grad_(False)),
    "scaling": lambda layer: setattr(layer, "scaling", 3 * layer.scaling),
    "merged and unmerged": lambda layer: (layer.merge(), layer.unmerge(), layer.lora_B.normal_()),
    "another dtype": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_norm_follows_a_change_by_hand(change):
    layer = trained()
    x = torch.randn(3, 16)
    layer(x)
    with torch.no_grad():
        for _ in range(2):  # what the second one makes may lie where the first one's lay
            CHANGES[change](layer)
    x = x.to(layer.weight.dtype)
    assert relative(layer(x), oracle(layer, x)) < 1e-5


def test_a_copy_of_a_layer_has_a_norm_of_its_own_and_one_of_inference_mode_can_train():
    layer = trained()
    layer.norm()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        nn.init.normal_(twin.lora_B)
        x = torch.randn(3, 16)
        assert relative(layer(x), oracle(layer, x)) < 1e-5
        assert relative(twin(x), oracle(twin, x)) < 1e-5
    layer.forget_norm()
    with torch.inference_mode():
        layer(torch.randn(3, 16))  # a layer that is first used here can train
    layer(torch.randn(3, 16)).sum().backward()
    assert layer.magnitude.grad.norm() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_a_magnitude_of_zero_still_learns_and_can_be_unmerged_and_a_row_of_zeros_stays_finite(bias):
    layer, x = trained(bias=bias), torch.randn(7, 16)
    original = layer.weight.clone()
    nn.init.zeros_(layer.magnitude[3])
    y = layer(x)
    assert torch.allclose(y[:, 3], torch.zeros(7) if not bias else layer.bias[3].expand(7), atol=1e-20)
    gradient = torch.autograd.grad(y.sum(), layer.magnitude)[0]
    expected = torch.autograd.grad(oracle(layer, x).sum(), layer.magnitude)[0]
    assert relative(gradient, expected) < 1e-5
    layer.merge()
    layer.unmerge()
    assert relative(layer.weight, original) < 1e-5
    base = nn.Linear(16, 24)  # and a row of zeros stays finite
    nn.init.zeros_(base.weight[5])
    fresh = DoRALinear(base, rank=4)
    found = outcome(fresh, x, trained_parameters(fresh))
    assert torch.allclose(found[0], base(x))
    assert all(tensor.isfinite().all() for tensor in found)
