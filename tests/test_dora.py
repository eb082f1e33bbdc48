"""DoRALinear is PEFT's DoRA, to rounding; its norm needs no product as large as the weight, and is never out of date."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spark_ft.adapters import AdapterConfig, add_adapters, load_adapters, merge_adapters, save_adapters
from spark_ft.methods import dora
from spark_ft.methods.dora import DoRALinear, row_norm

SHAPES = [(48, 16), (16, 48), (24, 24)]  # (out, in): tall, wide, square
INPUTS = [(1,), (7,), (2, 3), (2, 1, 5)]


def relative(ours, theirs) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def trained(out=24, inp=16, rank=4, dtype=torch.float32, bias=True, seed=0, **options) -> DoRALinear:
    """One whose B and magnitude are not those of the start any more."""
    torch.manual_seed(seed)
    layer = DoRALinear(nn.Linear(inp, out, bias=bias).to(dtype), rank, **options)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
        layer.magnitude.mul_(0.5 + torch.rand(out))
    return layer


def peft_twin(layer: DoRALinear):
    from peft import LoraConfig, get_peft_model

    base = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).to(
        layer.weight.dtype
    )
    base.load_state_dict(layer.base.state_dict())
    config = LoraConfig(
        r=layer.rank, lora_alpha=layer.alpha, lora_dropout=layer.dropout, use_rslora=layer.rslora, use_dora=True,
        target_modules=["it"],
    )  # fmt: skip
    twin = get_peft_model(nn.Sequential(OrderedDict(it=base)), config).base_model.model.it
    with torch.no_grad():
        for theirs, ours in zip(parameters(twin), parameters(layer), strict=True):
            theirs.copy_(ours)
    return twin.train(layer.training)


def parameters(layer):
    if isinstance(layer, DoRALinear):
        return layer.lora_A, layer.lora_B, layer.magnitude
    return (part["default"].weight for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))


def outcome(layer, x, seed=11):
    """Output and gradients of x, A, B and the magnitude under a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)  # the same dropout mask for both
    y = layer(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return (y.detach(), *torch.autograd.grad(loss, (x, *parameters(layer))))


def oracle(layer: DoRALinear, x, still=True):
    """The formula written out, in fp64, with all of W + sBA."""
    W, A, B, m = (t.double() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
    V = W + layer.scaling * B @ A
    n = V.norm(dim=1)
    y = x.double() @ (m / (n.detach() if still else n))[:, None].mul(V).T
    return y if layer.bias is None else y + layer.bias.double()


NAMES = ("output", "grad x", "grad A", "grad B", "grad magnitude")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 16])  # 16 is the full rank of all three
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_peft_in_outputs_gradients_and_merged_weights(shape, rank, bias, dropout):
    for alpha, rslora in ((0.5, False), (16, False), (32.0, True)):
        layer = trained(*shape, rank, bias=bias, alpha=alpha, rslora=rslora, dropout=dropout)
        twin = peft_twin(layer)
        for lead in INPUTS:
            x = torch.randn(*lead, shape[1])
            for what, a, b in zip(NAMES, outcome(layer, x), outcome(twin, x), strict=True):
                assert relative(a, b) <= 1e-5, (what, lead, alpha)
        layer.merge()
        twin.merge()
        assert relative(layer.weight, twin.base_layer.weight) <= 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_formula_written_out_in_double(bias):
    layer = trained(48, 32, rank=8, bias=bias, dtype=torch.float64)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(5, 48, dtype=torch.float64)
    inputs = (x, *parameters(layer))
    ours, expected = layer(x), oracle(layer, x)
    assert relative(ours, expected) < 1e-12
    right = torch.autograd.grad(expected, inputs, slope)
    for a, b in zip(torch.autograd.grad(ours, inputs, slope), right, strict=True):
        assert relative(a, b) < 1e-12
    moving = torch.autograd.grad(oracle(layer, x, still=False), layer.lora_B, slope)[0]
    assert relative(moving, right[2]) > 0.01  # that the norm is held still shows


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_layer_computes_exactly_what_its_base_does(dtype, dropout):
    base = nn.Linear(16, 24).to(dtype)
    x = torch.randn(3, 5, 16, dtype=dtype)
    before = base(x)
    layer = DoRALinear(base, rank=4, dropout=dropout)
    assert layer.training
    assert torch.equal(layer(x), before)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B", "magnitude"}
    assert torch.allclose(layer.magnitude, base.weight.float().norm(dim=1), rtol=1e-6)
    assert layer.magnitude.dtype == torch.float32


def test_a_bf16_base_agrees_with_peft_to_bf16_rounding_and_its_norm_is_fp32():
    layer = trained(48, 32, rank=8, dtype=torch.bfloat16)
    twin = peft_twin(layer)
    for lead in INPUTS:
        x = torch.randn(*lead, 32, dtype=torch.bfloat16)
        for what, a, b in zip(NAMES, outcome(layer, x), outcome(twin, x), strict=True):
            assert a.dtype == b.dtype, what
            assert relative(a, b) <= 2**-6, (
                what,
                lead,
            )  # PEFT's norm is rounded to bf16, and each of its terms too
    n = layer.norm()
    assert n.dtype == torch.float32
    exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert relative(n, exact.norm(dim=1)) < 1e-6


# ── the norm ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("residual", [1.0, 0.1, 0.01, 1e-3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_is_right_where_the_update_nearly_cancels_the_weight(shape, residual):
    torch.manual_seed(1)
    out, inp = shape
    rank, s = min(shape), 0.7
    U, S, Vh = torch.linalg.svd(torch.randn(out, inp), full_matrices=False)
    B, A = U * S, Vh
    W = -s * (B.double() @ A.double()) + residual * torch.randn(out, inp).double() / inp**0.5
    W[::3] = torch.randn(W[::3].shape).double()  # among rows where nothing cancels
    W = W.float()
    assert A.shape == (rank, inp)
    exact = (W.double() + s * B.double() @ A.double()).norm(dim=1)
    found = row_norm(W, A, B, s, W.norm(dim=1).square())
    assert ((found - exact).abs() / exact).max() < 1e-5


def test_the_plain_expansion_would_lose_those_digits(monkeypatch):
    monkeypatch.setattr(dora, "CANCELS", 0.0)
    with pytest.raises(AssertionError):
        test_the_norm_is_right_where_the_update_nearly_cancels_the_weight(SHAPES[0], 1e-3)


def test_the_norm_is_taken_block_by_block(monkeypatch):
    layer = trained(50, 16)
    whole = layer.norm().clone()
    monkeypatch.setattr(dora, "ROWS", 7)
    layer.forget_norm()
    assert relative(layer.norm(), whole) < 1e-6


def test_no_product_is_as_large_as_the_weight():
    layer = trained(64, 48, rank=4)
    layer.forget_norm()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and function.overloadpacket.__name__ not in (
                "detach",
                "split",
                "_to_copy",
            ):
                sizes.append((function.overloadpacket.__name__, out.numel()))
            return out

    with Watch():
        layer.norm()
    assert max(n for name, n in sizes if "view" not in name) < 64 * 48, sizes


@pytest.fixture
def counted(monkeypatch):
    """How often the norm was computed."""
    calls = []
    monkeypatch.setattr(dora, "row_norm", lambda *a: calls.append(1) or row_norm(*a))
    return calls


def step(layer, optimizer, micro_batches=1, replay=False):
    for _ in range(micro_batches):
        x = torch.randn(6, layer.in_features, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=False) if replay else layer(x)
        y.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("replay", [False, True])
def test_the_norm_is_computed_once_an_optimizer_step(counted, replay):
    layer = trained()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, fused=True)
    counted.clear()  # the constructor's
    for _ in range(3):
        step(layer, optimizer, micro_batches=4, replay=replay)
    assert len(counted) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.SGD(p, lr=1e-3),
    ],
)
def test_the_norm_follows_every_optimizer(make):
    layer = trained()
    optimizer = make([p for p in layer.parameters() if p.requires_grad])
    x = torch.randn(3, 16)
    for _ in range(3):
        step(layer, optimizer)
        assert relative(layer(x), oracle(layer, x)) < 1e-5


def test_an_optimizer_step_alone_makes_the_norm_anew_where_contents_are_not_compared(counted):
    """As on a GPU: fused AdamW leaves `_version` alone there and here."""
    layer = trained()
    layer.norm()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, fused=True)
    x = torch.randn(3, 16)
    layer(x).square().sum().backward()
    layer._factors = ()
    before = layer.lora_B._version
    optimizer.step()
    assert layer.lora_B._version == before, "torch counts fused steps now: the hook is needed no more"
    assert relative(layer(x), oracle(layer, x)) < 1e-5


def by_copy(layer):
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn_like(layer.lora_B))


def by_data(layer):
    layer.lora_A.data.mul_(-2)
    layer.lora_B.data.normal_()


def by_new_data(layer):
    layer.lora_B.data = torch.randn_like(layer.lora_B)


def by_new_parameter(layer):
    layer.lora_A = nn.Parameter(torch.randn_like(layer.lora_A))


def by_state_dict(layer):
    layer.load_state_dict({name: torch.randn_like(t) for name, t in layer.state_dict().items()})


def by_weight(layer):
    with torch.no_grad():
        layer.base.weight.normal_()


def by_new_weight(layer):
    layer.base.weight = nn.Parameter(torch.randn_like(layer.base.weight), requires_grad=False)


def by_scaling(layer):
    layer.scaling *= 3


def by_merging(layer):
    layer.merge()
    layer.unmerge()
    by_copy(layer)


def by_moving(layer):
    layer.double()


@pytest.mark.parametrize(
    "change",
    [by_copy, by_data, by_new_data, by_new_parameter, by_state_dict, by_weight, by_new_weight, by_scaling, by_merging,
     by_moving],
)  # fmt: skip
def test_the_norm_follows_a_change_by_hand(change):
    layer = trained()
    x = torch.randn(3, 16)
    layer(x)
    change(layer)
    x = x.to(layer.weight.dtype)
    assert relative(layer(x), oracle(layer, x)) < 1e-5


def test_a_copy_of_a_layer_has_a_norm_of_its_own():
    layer = trained()
    layer.norm()
    twin = copy.deepcopy(layer)
    by_copy(twin)
    x = torch.randn(3, 16)
    assert relative(layer(x), oracle(layer, x)) < 1e-5
    assert relative(twin(x), oracle(twin, x)) < 1e-5


def test_a_layer_first_used_in_inference_mode_can_train():
    layer = trained()
    layer.forget_norm()
    with torch.inference_mode():
        layer(torch.randn(3, 16))
    layer(torch.randn(3, 16)).sum().backward()
    assert layer.magnitude.grad.norm() > 0


# ── edges ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bias", [False, True])
def test_a_magnitude_of_zero_still_learns_and_can_be_unmerged(bias):
    layer = trained(bias=bias)
    x, original = torch.randn(7, 16), layer.weight.clone()
    with torch.no_grad():
        layer.magnitude[3] = 0
    y = layer(x)
    assert torch.allclose(y[:, 3], torch.zeros(7) if not bias else layer.bias[3].expand(7), atol=1e-20)
    gradient = torch.autograd.grad(y.sum(), layer.magnitude)[0]
    expected = torch.autograd.grad(oracle(layer, x).sum(), layer.magnitude)[0]
    assert relative(gradient, expected) < 1e-5
    layer.merge()
    layer.unmerge()
    assert relative(layer.weight, original) < 1e-5


def test_a_row_of_zeros_stays_finite_and_can_grow():
    base = nn.Linear(16, 24)
    with torch.no_grad():
        base.weight[5] = 0
    layer = DoRALinear(base, rank=4)
    x = torch.randn(3, 16, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert torch.allclose(y, base(x))
    assert all(torch.isfinite(p.grad).all() for p in (x, layer.lora_A, layer.lora_B, layer.magnitude))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_twice_is_once_and_disabling_gives_the_base_back(dtype):
    layer = trained(dtype=dtype).eval()
    x, original = torch.randn(3, 16, dtype=dtype), layer.weight.clone()
    base, adapted, delta = layer.base(x), layer(x), layer.delta_weight().detach()
    near = 1e-5 if dtype == torch.float32 else 2**-6
    layer.enabled = False
    assert torch.equal(layer(x), base)
    layer.enabled = True
    layer.merge()
    once = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, once)
    assert relative(once, original.float() + delta) < near
    assert relative(layer.delta_weight(), delta) < 10 * near
    assert relative(layer(x), adapted) < near
    layer.enabled = False
    assert relative(layer(x), base) < 4 * near
    layer.enabled = True
    layer.unmerge()
    layer.unmerge()
    assert relative(layer.weight, original) < 4 * near
    assert relative(layer(x), adapted) < 4 * near


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_replay_under_checkpointing_gives_the_same_gradients(dropout):
    layer = trained(16, 16, dropout=dropout)
    x = torch.randn(6, 16, requires_grad=True)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        found.append(torch.autograd.grad(run(x).square().sum(), (x, *parameters(layer))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_keeps_its_input_and_its_output_and_no_other_activation():
    layer = trained(48, 32, bias=False)
    x = torch.randn(64, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    large = {t.data_ptr() for t in kept if t.shape[0] == 64}
    assert large == {x.data_ptr(), y.data_ptr()}


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_an_empty_batch_gives_an_empty_answer_and_zero_gradients(lead):
    layer = trained()
    y = layer(torch.randn(*lead, 16))
    assert y.shape == (*lead, 24)
    y.sum().backward()
    assert not any(torch.count_nonzero(p.grad) for p in parameters(layer))


# ── on a model ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def randomize(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.mul_(0.5 + torch.rand_like(p)) if name.endswith("magnitude") else p.normal_(std=0.1)
    return model


def test_peft_loads_what_we_save_to_the_same_logits_and_we_load_what_peft_saves(tiny_llama, tmp_path):
    from peft import PeftModel

    model = randomize(add_adapters(tiny_llama(), AdapterConfig(method="dora", rank=4, alpha=6)))
    ids = torch.randint(3, 97, (2, 9))
    save_adapters(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(tiny_llama(packed=False), tmp_path / "ours")
    assert relative(theirs(ids).logits, model(ids).logits) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapters(tiny_llama(), tmp_path / "theirs")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    before = model(ids).logits
    merge_adapters(model)
    assert not any(isinstance(m, DoRALinear) for m in model.modules())
    assert relative(model(ids).logits, before) < 1e-5
