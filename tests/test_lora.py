"""LoRALinear and DoRALinear equal PEFT's layers to rounding, and keep what both of them promise."""

import copy
import math
from importlib import import_module

import pytest
import torch
from helpers import outcome, peft_layer, relative, trained_layer, trained_parameters
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spark_ft.methods.dora import DoRALinear
from spark_ft.methods.lora import SAME_AS_LINEAR, LoRALinear
from spark_ft.methods.nf4 import NF4Linear

LEADS = [(1,), (7,), (2, 3), (2, 1, 5)]  # what stands before the feature dimension
NAMES = ("output", "grad x", "grad A", "grad B", "grad magnitude")
both_kinds = pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])


@both_kinds
@pytest.mark.parametrize(
    ("shape", "rank", "rslora", "bias", "dropout"),
    [
        ((48, 16), 1, False, False, 0.0),
        ((48, 16), 16, True, True, 0.3),
        ((16, 48), 4, False, True, 0.3),
        ((16, 48), 16, True, False, 0.0),
        ((24, 24), 4, True, False, 0.3),
        ((24, 24), 16, False, True, 0.0),
    ],
)
def test_equals_peft_in_outputs_gradients_and_merged_weights(kind, shape, rank, rslora, bias, dropout):
    near = 1e-6 if kind is LoRALinear else 1e-5
    for alpha in (0.5, 16, 32.0):
        layer = trained_layer(kind, *shape, rank, bias=bias, alpha=alpha, rslora=rslora, dropout=dropout)
        twin, theirs = peft_layer(layer)
        for lead in LEADS:
            x = torch.randn(*lead, shape[1])
            found = outcome(layer, x, trained_parameters(layer)), outcome(twin, x, theirs)
            for what, ours, expected in zip(NAMES, *found, strict=False):
                assert relative(ours, expected) <= near, (what, lead, alpha)
        layer.merge()
        twin.merge()
        assert relative(layer.weight, twin.base_layer.weight) <= near
        x = torch.randn(5, shape[1])
        assert relative(layer(x), twin(x)) <= near


@both_kinds
def test_a_bf16_base_agrees_with_peft_to_bf16_rounding(kind):
    layer = trained_layer(kind, 48, 32, rank=8, dtype=torch.bfloat16)
    assert {p.dtype for p in trained_parameters(layer)} == {torch.float32}
    twin, theirs = peft_layer(layer)
    near = 2**-8 if kind is LoRALinear else 2**-6  # PEFT rounds DoRA's norm and each of its terms to bf16 too
    for lead in LEADS:
        x = torch.randn(*lead, 32, dtype=torch.bfloat16)
        found = outcome(layer, x, trained_parameters(layer)), outcome(twin, x, theirs)
        for what, ours, expected in zip(NAMES, *found, strict=False):
            assert ours.dtype == expected.dtype, what
            assert relative(ours, expected) <= near, (what, lead)
    layer.merge()
    twin.merge()
    assert layer.weight.dtype == torch.bfloat16
    assert relative(layer.weight, twin.base_layer.weight) <= near


@both_kinds
@pytest.mark.parametrize(("nf4", "dropout"), [(False, 0.0), (False, 0.3), (True, 0.3)])
def test_under_autocast_it_is_pefts_layer_to_bf16_rounding(kind, nf4, dropout):
    layer = trained_layer(kind, 48, 32, rank=8, dropout=dropout)
    quantized = NF4Linear.from_linear(layer.base) if nf4 else layer.base
    layer.base = quantized.to_linear(torch.float32) if nf4 else layer.base
    twin, theirs = peft_layer(layer)
    layer.base = quantized
    norm = layer.norm().clone() if kind is DoRALinear else None
    if norm is not None:
        layer.forget_norm()  # so that it is computed under autocast
    x, ours = torch.randn(2, 5, 32), trained_parameters(layer)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(twin, x, theirs)
        plain = outcome(layer, x, ours)
        replayed = outcome(lambda x: checkpoint(layer, x, use_reentrant=False), x, ours)
        narrow = outcome(layer, x.bfloat16(), ours)  # what a layer inside a model is given
    for what, right, a, b, c in zip(NAMES, expected, plain, replayed, narrow, strict=False):
        assert a.dtype == right.dtype, what
        assert relative(a, right) <= 2**-6, what
        assert torch.equal(a, b), what
        assert relative(c, right) <= 2**-5, what
    assert norm is None or relative(layer.norm(), norm) < 1e-6


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_layer_computes_exactly_what_its_base_does(kind, dtype):
    base = nn.Linear(16, 24).to(dtype)
    x = torch.randn(3, 5, 16, dtype=dtype)
    before = base(x)
    for dropout in (0.0, 0.5):
        layer = kind(base, rank=4, dropout=dropout)
        assert layer.training
        assert torch.equal(layer(x), before)
    assert kind(base, rank=8, alpha=32).scaling == 4
    assert kind(base, rank=16, alpha=32, rslora=True).scaling == 8
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B"} | ({"magnitude"} if kind is DoRALinear else set())
    assert torch.count_nonzero(layer.lora_B) == 0
    # kaiming_uniform(a=√5) on (rank, in): uniform on ±1/√in, so its deviation is 1/√(3·in)
    wide = kind(nn.Linear(4096, 64), rank=64)
    assert wide.lora_A.abs().max() <= 1 / 64
    assert wide.lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 4096), rel=0.01)


def test_dropout_takes_a_different_mask_each_time_none_in_eval_and_must_fit_as_the_rank_must():
    layer, x = trained_layer(LoRALinear, dropout=0.5, alpha=12), torch.randn(3, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert relative(layer(x), layer.base(x) + x @ (3 * layer.lora_B @ layer.lora_A).T) < 1e-6
    for rank in (0, -1, 17):
        with pytest.raises(ValueError, match=f"rank={rank} does not fit a 24×16 layer; choose .* 1 to 16"):
            LoRALinear(nn.Linear(16, 24), rank)
    for dropout in (-0.1, 1.0, 2, math.nan):
        with pytest.raises(ValueError, match=f"dropout={dropout} is not a probability below 1"):
            LoRALinear(nn.Linear(16, 24), rank=2, dropout=dropout)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_twice_is_once_and_disabling_gives_the_base_back(kind, dtype):
    layer = trained_layer(kind, dtype=dtype).eval()
    x, original = torch.randn(3, 16, dtype=dtype), layer.weight.clone()
    base, adapted, delta = layer.base(x), layer(x), layer.delta_weight().detach()
    near = 1e-5 if dtype == torch.float32 else 2**-6
    layer.enabled = False
    assert torch.equal(layer(x), base)
    layer.enabled = True
    with torch.autocast("cpu", torch.bfloat16):  # which must not round the sum
        layer.merge()
    once = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, once)
    assert relative(once, original.float() + delta) < (1e-6 if dtype == torch.float32 else 2**-8)
    assert relative(layer.delta_weight(), delta) < 10 * near
    assert relative(layer(x), adapted) < near
    layer.enabled = False
    assert relative(layer(x), base) < 4 * near
    layer.enabled = True
    for _ in range(2):
        layer.unmerge()
        assert relative(layer.weight, original) < 4 * near
    assert relative(layer(x), adapted) < 4 * near


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(2)


def made(module, name, **options):
    return getattr(import_module(module), name)(64, 64, **options)


FP8 = "transformers.integrations.finegrained_fp8"
WEIGHT = r"its weight \(.*\) is not a plain one of 16 bits or more; load a copy"
FORWARD = r"its forward is not nn.Linear's x Wᵀ \+ b; choose targets without it"


@pytest.mark.parametrize(
    ("name", "why", "make"),
    [
        ("FP8Linear", r"its weight \(torch.float8_e4m3fn\)", lambda: made(FP8, "FP8Linear", block_size=None)),
        ("Linear8bitLt", WEIGHT, lambda: made("bitsandbytes.nn", "Linear8bitLt", has_fp16_weights=False)),
        ("Linear4bit", WEIGHT, lambda: made("bitsandbytes.nn", "Linear4bit")),
        ("Linear4bit", r".*\(torch.uint8\)", lambda: made("bitsandbytes.nn", "Linear4bit").to("cpu")),
        ("ParametrizedLinear", WEIGHT, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
        ("LazyLinear", WEIGHT, lambda: nn.LazyLinear(8)),
        ("Conv1D", FORWARD, lambda: made("transformers.pytorch_utils", "Conv1D")),
        ("Router", FORWARD, lambda: Router(8, 8)),
        ("Embedding", FORWARD, lambda: nn.Embedding(8, 8)),
        ("LoRALinear", "it has an adapter already", lambda: trained_layer(LoRALinear)),
    ],
)
def test_a_layer_that_does_not_hold_a_plain_weight_is_refused_by_name(name, why, make):
    with pytest.raises(ValueError, match=f"^{name} cannot be adapted: {why}"):
        LoRALinear(make(), rank=2)


def test_the_subclasses_taken_for_linear_layers_compute_the_same():
    assert SAME_AS_LINEAR == ("FalconLinear",)
    base, x = made("transformers.models.falcon.modeling_falcon", "FalconLinear"), torch.randn(2, 5, 64)
    assert relative(base(x), F.linear(x, base.weight, base.bias)) < 1e-6
    assert torch.equal(LoRALinear(base, rank=2)(x), base(x))


def reference(layer, x):
    """The formula, all of it out of place."""
    return F.linear(x, layer.weight, layer.bias) + layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)


@pytest.mark.parametrize("reentrant", [False, True])
def test_stacked_layers_and_a_reused_output_under_checkpointing(reentrant):
    first, second = trained_layer(LoRALinear, 16, 16), trained_layer(LoRALinear, 16, 16)

    def block(x, apply=lambda layer, h: layer(h)):
        h = apply(first, x)
        return torch.tanh(h) * apply(second, h) + h  # h is used three times

    x, slope, found = torch.randn(6, 16), torch.randn(6, 16), []
    replayed = lambda x: checkpoint(block, x, use_reentrant=reentrant)  # noqa: E731
    for function in (lambda x: block(x, reference), block, replayed):
        inputs = [x.clone().requires_grad_(), *trained_parameters(first), *trained_parameters(second)]
        y = function(inputs[0])
        y.backward(slope)  # autograd.grad does not know the reentrant kind
        found.append([y.detach(), *(p.grad for p in inputs)])
        first.zero_grad(), second.zero_grad()
    for expected, *ours in zip(*found, strict=True):
        assert all(relative(a, expected) < 2e-6 for a in ours)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_its_input_and_a_thin_product_and_for_dora_the_output(kind, dtype):
    layer = trained_layer(kind, 48, 32, rank=4, bias=False, dtype=dtype)
    x, kept = torch.randn(64, 32, dtype=dtype, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    activations = {t.data_ptr(): t.nbytes for t in kept if len(t) == 64}
    assert activations.pop(y.data_ptr(), 0) == (y.nbytes if kind is DoRALinear else 0)
    assert sorted(activations.values()) == [64 * 4 * 4, 64 * 32 * 4]  # x Aᵀ and x, both in A's precision
    assert dtype == torch.bfloat16 or x.data_ptr() in activations


def test_gradients_are_those_of_finite_differences_and_inputs_may_lie_as_they_like():
    layer = trained_layer(LoRALinear)
    swapped, wide = torch.randn(5, 2, 16).transpose(0, 1), torch.randn(6, 32)[:, ::2]
    for x in (torch.randn(16, 6).T, swapped, wide, torch.randn(1, 16).expand(4, 16)):
        found = [outcome(it, x, trained_parameters(layer)) for it in (layer, lambda x: reference(layer, x))]
        assert all(relative(a, b) < 2e-6 for a, b in zip(*found, strict=True)), x.stride()
    layer = trained_layer(LoRALinear, 5, 4, rank=2, dtype=torch.float64, alpha=3)
    assert layer.lora_A.dtype == torch.float64

    def as_function(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    for lead in ((), (2, 3)):
        x = torch.randn(*lead, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(as_function, (x, layer.lora_A, layer.lora_B))


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_gives_zero_gradients_and_none_is_computed_that_is_not_asked_for(kind, dtype):
    layer = trained_layer(kind, dtype=dtype)
    for lead in ((0,), (2, 0)):
        layer.zero_grad()
        y = layer(torch.randn(*lead, 16, dtype=dtype))
        assert y.shape == (*lead, 24)
        y.sum().backward()
        assert not any(torch.count_nonzero(p.grad) for p in trained_parameters(layer))
    layer.zero_grad()
    layer.lora_A.requires_grad_(False)
    x = torch.randn(3, 16, dtype=dtype)
    layer(x).sum().backward()
    assert x.grad is layer.weight.grad is layer.lora_A.grad is None
    assert layer.lora_B.grad.norm() > 0


class NoNumbers(TorchDispatchMode):
    """A memory plan's answer to what only numbers could tell: False, or 0."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        return function(*args, **(kwargs or {}))


@both_kinds
@pytest.mark.parametrize("nf4", [False, True])
def test_a_step_on_fake_tensors_runs_and_leaves_the_real_layer_as_it_was(kind, nf4):
    layer, x = trained_layer(kind, dropout=0.5), torch.randn(3, 16)
    layer.base = NF4Linear.from_linear(layer.base) if nf4 else layer.base
    before = outcome(layer, x, trained_parameters(layer))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, NoNumbers():
        memo = {id(t): mode.from_tensor(t) for t in (*layer.parameters(), *layer.buffers())}
        y = copy.deepcopy(layer, memo)(mode.from_tensor(x))
        y.sum().backward()
        assert isinstance(y, FakeTensor)
        base = nn.Linear(16, 24)
        fresh = kind(NF4Linear.from_linear(base) if nf4 else base, rank=4)
        fresh(torch.empty(3, 16)).sum().backward()
    after = outcome(layer, x, trained_parameters(layer))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_adapter_goes_on_a_layer_on_the_meta_device():
    with torch.device("meta"):
        bases = nn.Linear(16, 24), NF4Linear.from_linear(nn.Linear(16, 24))
        for layer in (kind(base, rank=4) for kind in (LoRALinear, DoRALinear) for base in bases):
            assert {p.device.type for p in layer.parameters()} == {"meta"}
            assert layer(torch.empty(2, 16)).shape == (2, 24)
