"""LoRALinear is PEFT's LoRA, to rounding: outputs, gradients and merged weights; and it keeps its own promises."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spark_ft.methods.lora import LoRALinear

SHAPES = [(48, 16), (16, 48), (24, 24)]  # (out, in): tall, wide, square
INPUTS = [(1,), (7,), (2, 3), (2, 1, 5)]  # what stands before the feature dimension


def relative(ours, theirs) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def linear(out, inp, bias=True, dtype=torch.float32, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inp, out, bias=bias).to(dtype)


def lora(out=24, inp=16, rank=4, dtype=torch.float32, bias=True, **options) -> LoRALinear:
    """One whose B is not zero any more."""
    layer = LoRALinear(linear(out, inp, bias, dtype), rank, **options)
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def peft_twin(layer: LoRALinear):
    """PEFT's layer with the same weights, dropout and scaling."""
    from peft import LoraConfig, get_peft_model

    out, inp = layer.weight.shape
    base = linear(out, inp, layer.bias is not None, layer.weight.dtype)
    config = LoraConfig(
        r=layer.rank,
        lora_alpha=layer.alpha,
        lora_dropout=layer.dropout,
        use_rslora=layer.rslora,
        target_modules=["it"],
    )
    twin = get_peft_model(nn.Sequential(OrderedDict(it=base)), config).base_model.model.it
    with torch.no_grad():
        base.weight.copy_(layer.weight)
        twin.lora_A["default"].weight.copy_(layer.lora_A)
        twin.lora_B["default"].weight.copy_(layer.lora_B)
    return twin.train(layer.training)


def outcome(layer, A, B, x, seed=11):
    """Output and gradients of x, A and B under a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)  # the same dropout mask for both
    y = layer(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return (y.detach(), *torch.autograd.grad(loss, (x, A, B)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_peft_in_outputs_gradients_and_merged_weights(shape, rank, rslora, bias, dropout):
    for alpha in (0.5, 16, 32.0):
        layer = lora(*shape, rank, bias=bias, alpha=alpha, rslora=rslora, dropout=dropout)
        twin = peft_twin(layer)
        for lead in INPUTS:
            x = torch.randn(*lead, shape[1])
            ours = outcome(layer, layer.lora_A, layer.lora_B, x)
            theirs = outcome(twin, twin.lora_A["default"].weight, twin.lora_B["default"].weight, x)
            for what, a, b in zip(("output", "grad x", "grad A", "grad B"), ours, theirs, strict=True):
                assert relative(a, b) <= 1e-6, (what, lead, alpha)
        layer.merge()
        twin.merge()
        assert relative(layer.weight, twin.base_layer.weight) <= 1e-6
        x = torch.randn(5, shape[1])
        assert relative(layer(x), twin(x)) <= 1e-6


def test_dropout_takes_a_different_mask_each_time_and_none_in_eval():
    layer = lora(dropout=0.5)
    x = torch.randn(3, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert relative(layer(x), layer.base(x) + x @ layer.delta_weight().T) < 1e-6


def test_a_bf16_base_agrees_with_peft_to_bf16_rounding():
    layer = lora(48, 32, rank=8, dtype=torch.bfloat16)
    assert (layer.lora_A.dtype, layer.lora_B.dtype) == (torch.float32, torch.float32)
    twin = peft_twin(layer)
    for lead in INPUTS:
        x = torch.randn(*lead, 32, dtype=torch.bfloat16)
        ours = outcome(layer, layer.lora_A, layer.lora_B, x)
        theirs = outcome(twin, twin.lora_A["default"].weight, twin.lora_B["default"].weight, x)
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert relative(a, b) <= 2**-8  # bf16 keeps 8 bits
    layer.merge()
    twin.merge()
    assert layer.weight.dtype == torch.bfloat16
    assert relative(layer.weight, twin.base_layer.weight) <= 2**-8


def test_a_new_layer_computes_exactly_what_its_base_does():
    base = linear(24, 16)
    x = torch.randn(3, 5, 16)
    before = base(x)
    layer = LoRALinear(base, rank=4, dropout=0.5)
    assert torch.equal(layer(x), before)
    assert torch.count_nonzero(layer.lora_B) == 0
    # kaiming_uniform(a=√5) on (rank, in): uniform on ±1/√in, so its deviation is 1/√(3·in)
    wide = LoRALinear(linear(64, 4096), rank=64)
    assert wide.lora_A.abs().max() <= 1 / 64
    assert wide.lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 4096), rel=0.01)


def test_scaling_is_alpha_over_rank_or_over_its_root():
    assert LoRALinear(linear(16, 16), rank=8, alpha=32).scaling == 4
    assert LoRALinear(linear(16, 16), rank=16, alpha=32, rslora=True).scaling == 8
    layer = lora(rank=4, alpha=12)
    assert relative(layer.delta_weight(), 3 * layer.lora_B @ layer.lora_A) < 1e-7


def test_only_the_adapter_trains_and_the_base_never_moves():
    layer = lora(dropout=0.1)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    before = {name: p.clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in layer.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        layer(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lora_A", "lora_B"}


def test_merging_or_unmerging_twice_is_merging_or_unmerging_once():
    layer = lora().eval()
    x, original = torch.randn(3, 16), layer.weight.clone()
    adapted = layer(x)
    layer.merge()
    once = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, once)
    assert relative(once, original + layer.delta_weight()) < 1e-6
    assert relative(layer(x), adapted) < 1e-6
    layer.unmerge()
    layer.unmerge()
    assert relative(layer.weight, original) < 1e-6
    assert relative(layer(x), adapted) < 1e-6


def test_disabled_is_the_base_exactly_and_merged_and_disabled_is_the_base_to_rounding():
    layer = lora(alpha=64, dropout=0.5)
    x = torch.randn(3, 16)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))
    base = layer.base(x)
    layer.merge()
    assert relative(layer.base(x), base) > 0.1  # the weight does hold the update
    assert relative(layer(x), base) < 1e-5
    layer.unmerge()
    assert relative(layer(x), base) < 1e-5


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_a_rank_that_does_not_fit_is_refused(rank):
    with pytest.raises(
        ValueError, match=rf"rank={rank} does not fit a 24×16 layer; choose a rank from 1 to 16"
    ):
        LoRALinear(linear(24, 16), rank=rank)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2, math.nan])
def test_a_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(ValueError, match=r"dropout=.* is not a probability below 1"):
        LoRALinear(linear(24, 16), rank=2, dropout=dropout)


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3)])
def test_gradients_are_those_of_finite_differences(lead):
    layer = lora(5, 4, rank=2, dtype=torch.float64, alpha=3)
    assert layer.lora_A.dtype == torch.float64
    x = torch.randn(*lead, 4, dtype=torch.float64, requires_grad=True)

    def as_function(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(as_function, (x, layer.lora_A, layer.lora_B))


def reference(layer, x):
    """The formula, with no in-place work and no autograd.Function of ours."""
    update = layer.scaling * (x.to(layer.lora_A.dtype) @ layer.lora_A.T @ layer.lora_B.T)
    return (nn.functional.linear(x, layer.weight, layer.bias).to(update.dtype) + update).to(x.dtype)


def gradients(y, *inputs):
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), inputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_stacked_layers_and_a_reused_output_under_checkpointing(reentrant):
    """The update is written into the base's output in place; nothing that autograd kept may be overwritten by it."""
    first, second = lora(16, 16), lora(16, 16)
    x = torch.randn(6, 16, requires_grad=True)
    inputs = (x, first.lora_A, first.lora_B, second.lora_A, second.lora_B)

    def block(x, apply):
        h = apply(first, x)
        return torch.tanh(h) * apply(second, h) + h  # h is used three times

    expected_y = block(x, reference)
    expected = gradients(expected_y, *inputs)
    plain = block(x, lambda layer, h: layer(h))
    assert relative(plain, expected_y) < 1e-6
    for a, b in zip(gradients(plain, *inputs), expected, strict=True):
        assert relative(a, b) < 2e-6
    if reentrant:  # this kind cannot be used with autograd.grad, and backward is what training calls
        y = checkpoint(block, x, lambda layer, h: layer(h), use_reentrant=True)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        again = [p.grad for p in inputs]
    else:
        again = gradients(checkpoint(block, x, lambda layer, h: layer(h), use_reentrant=False), *inputs)
    for a, b in zip(again, expected, strict=True):
        assert relative(a, b) < 2e-6


def test_dropout_under_checkpointing_replays_its_mask():
    layer = lora(16, 16, dropout=0.5)
    x = torch.randn(6, 16, requires_grad=True)
    torch.manual_seed(5)
    plain = gradients(layer(x), x, layer.lora_A, layer.lora_B)
    torch.manual_seed(5)
    replayed = gradients(checkpoint(layer, x, use_reentrant=False), x, layer.lora_A, layer.lora_B)
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


def test_backward_keeps_the_input_and_no_activation_of_its_own():
    layer = lora(48, 32, rank=4)
    x = torch.randn(64, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    assert {t.data_ptr() for t in kept} - parameters == {x.data_ptr()}


class Transposed(nn.Linear):
    """A base that looks like a linear layer and whose output is not contiguous in memory."""

    def forward(self, x):
        return super().forward(x).transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.randn(16, 6).T, "transposed"),
        (lambda: torch.randn(5, 2, 16).transpose(0, 1), "batch and sequence swapped"),
        (lambda: torch.randn(6, 32)[:, ::2], "every second feature"),
        (lambda: torch.randn(1, 16).expand(4, 16), "one row four times"),
    ],
)
@pytest.mark.parametrize("kind", [nn.Linear, Transposed])
def test_inputs_and_outputs_may_lie_in_memory_as_they_like(make, why, kind):
    base = kind(16, 24)
    layer = LoRALinear(base, rank=4)
    nn.init.normal_(layer.lora_B)
    x = make().requires_grad_()
    y, expected = layer(x), reference(layer, x)
    assert relative(y, expected) < 1e-6, why
    inputs = (x, layer.lora_A, layer.lora_B)
    for a, b in zip(gradients(y, *inputs), gradients(expected, *inputs), strict=True):
        assert relative(a, b) < 2e-6, why


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_gives_an_empty_answer_and_zero_gradients(lead, dtype):
    layer = lora(dtype=dtype)
    y = layer(torch.randn(*lead, 16, dtype=dtype))
    assert y.shape == (*lead, 24)
    y.sum().backward()
    assert torch.count_nonzero(layer.lora_A.grad) == torch.count_nonzero(layer.lora_B.grad) == 0


def test_no_gradient_is_computed_for_what_asks_for_none():
    layer = lora()
    x = torch.randn(3, 16)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is None
    layer.lora_A.requires_grad_(False)
    layer.zero_grad()
    layer(x).sum().backward()
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad.norm() > 0
