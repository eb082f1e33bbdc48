"""NF4 is bitsandbytes' NF4, byte for byte; its product keeps no weight in full precision; adapters stand on it."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spark_ft import (
    AdapterConfig,
    adapters_disabled,
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from spark_ft.methods import nf4
from spark_ft.methods.dora import DoRALinear
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import NF4_CODE, SCALE_CODE, NF4Linear, NF4Tensor, quantize_nf4

# the last blocks of 64 numbers and of 64·256 whole or short, one number, an odd number of them, other dimensions than two
SHAPES = [(64, 64), (128, 192), (5, 7), (1, 1), (300, 333), (257, 64), (130, 1000), (24, 96), (3,), (2, 3, 5)]


def weight(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(ours, theirs) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def theirs(w, double_quant, block_size=64):
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")


# ── against bitsandbytes ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [64, 128])
def test_bytes_scales_and_numbers_are_bitsandbytes_own(shape, dtype, block_size):
    from bitsandbytes.functional import dequantize_4bit

    w = weight(*shape, dtype=dtype)
    packed, state = theirs(w, False, block_size)
    ours = quantize_nf4(w, block_size, double_quant=False)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert (ours.shape, ours.dtype) == (w.shape, dtype)
    if shape[-1] % block_size and shape[-1] % 16 == 0:
        # bitsandbytes 0.50.2 on CPU takes a wrong scale where a block runs over the end of such a row: twice the error
        assert (ours.dequantize() - w).abs().mean() < 0.09
    else:
        assert torch.equal(ours.dequantize(), dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [*SHAPES, (1024, 2048)])
def test_doubly_quantized_scales_are_bitsandbytes_own_but_for_near_ties(shape):
    from bitsandbytes.functional import dequantize_4bit

    w = weight(*shape, seed=4)
    packed, state = theirs(w, True)
    ours = quantize_nf4(w)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(ours.scale_absmax, state.state2.absmax)
    apart = (ours.scale_codes.int() - state.absmax.int()).abs()
    assert apart.max() <= 4
    assert (apart == 0).float().mean() >= 0.995
    our_error, their_error = (
        (ours.dequantize() - w).abs().mean(),
        (dequantize_4bit(packed, state) - w).abs().mean(),
    )
    assert our_error <= 1.01 * their_error


def test_the_scale_code_is_bitsandbytes_dynamic_map():
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(SCALE_CODE, create_dynamic_map())


def test_numbers_at_and_beside_every_midpoint_and_blocks_of_zeros_get_bitsandbytes_codes():
    middle = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
    beside = [middle.nextafter(torch.tensor(far)) for far in (2.0, -2.0)]
    row = torch.cat([middle, *beside, NF4_CODE, torch.zeros(3)])
    w = torch.stack([row, 3.7 * row, torch.zeros(64), -row, torch.full((64,), 1e-30), row * 1e30])
    for double_quant in (False, True):
        assert torch.equal(quantize_nf4(w, 64, double_quant).packed, theirs(w, double_quant)[0].view(-1))
    assert torch.equal(quantize_nf4(w, 64, False).dequantize()[2], torch.zeros(64))


# ── alone ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_mean_error_on_a_normal_is_as_published_and_uniform_levels_are_worse():
    w = weight(2**22)
    assert (quantize_nf4(w, 64, double_quant=False).dequantize() - w).abs().mean().item() == pytest.approx(
        0.0728, abs=0.0005
    )
    blocks = w.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    levels = torch.linspace(-1, 1, 16)
    nearest = levels[((blocks / absmax + 1) * 7.5).round().long()]
    assert (nearest * absmax - blocks).abs().mean().item() == pytest.approx(0.0852, abs=0.0005)


def test_a_number_takes_4_127_bits_and_4_5_without_double_quantization():
    w = weight(1024, 1024)
    assert 8 * quantize_nf4(w).nbytes / w.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert 8 * quantize_nf4(w, double_quant=False).nbytes / w.numel() == pytest.approx(4.5)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 70), block_size=st.sampled_from([2, 16, 64, 128]),
    double_quant=st.booleans(), take=st.integers(1, 45), chunk=st.sampled_from([128, 1024, 2**20]), seed=st.integers(0, 9),
)  # fmt: skip
def test_rows_chunk_by_chunk_are_rows_of_the_whole(
    rows, columns, block_size, double_quant, take, chunk, seed
):
    w = weight(rows, columns, seed=seed)
    whole = quantize_nf4(w, block_size, double_quant)
    before, nf4.CHUNK = nf4.CHUNK, chunk
    try:
        parts = quantize_nf4(w, block_size, double_quant)
        assert torch.equal(parts.packed, whole.packed)
        assert torch.equal(parts.dequantize(), whole.dequantize())
    finally:
        nf4.CHUNK = before
    blocks = list(whole.split(take))
    assert all(len(block) <= take for block in blocks)
    assert torch.equal(torch.cat(blocks), whole.dequantize())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 1e3]), block_size=st.sampled_from([16, 64]))
def test_each_number_gets_its_nearest_code_and_is_never_further_off_than_half_a_gap(seed, scale, block_size):
    w = scale * weight(7, 50, seed=seed)
    t = quantize_nf4(w, block_size, double_quant=False)
    scales = t.absmax.repeat_interleave(block_size)[: w.numel()].view_as(w)
    error = (t.dequantize() - w).abs()
    best = (NF4_CODE * scales[..., None] - w[..., None]).abs().amin(-1)
    assert torch.allclose(error, best, rtol=1e-4, atol=1e-6 * scale)
    assert (error <= 0.1520 * scales).all()  # half of the widest gap, from −1 to −0.6962


@pytest.mark.parametrize(
    ("w", "options", "says"),
    [
        (torch.ones(4, 4), {"block_size": 63}, "block_size=63; two numbers share a byte"),
        (torch.ones(4, 4), {"block_size": 0}, "block_size=0"),
        (torch.ones(0, 4), {}, "nothing to quantize"),
        (torch.tensor([1.0, torch.nan]), {}, "holds nan or inf"),
        (torch.tensor([1.0, -torch.inf]), {}, "holds nan or inf"),
    ],
)
def test_what_cannot_be_quantized_is_refused(w, options, says):
    with pytest.raises(ValueError, match=says):
        quantize_nf4(w, **options)


def test_a_cast_of_the_model_leaves_scales_in_fp32_and_a_state_dict_holds_all():
    layer = NF4Linear.from_linear(nn.Linear(96, 64))
    before = layer.weight.dequantize(torch.float32)
    layer.to(torch.bfloat16)
    assert layer.weight.offset.dtype == layer.weight.scale_absmax.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight.dequantize(torch.float32), before)
    other = NF4Linear.from_linear(nn.Linear(96, 64)).to(torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight.dequantize(torch.float32), before)


# ── the layer ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,)])
def test_a_product_and_its_gradient_are_those_of_the_dequantized_weight(dtype, bias, lead, monkeypatch):
    monkeypatch.setattr(nf4, "DENSE", {"cpu": 7 * 16 + 3})  # 24 rows in four parts
    layer = NF4Linear.from_linear(nn.Linear(16, 24, bias=bias).to(dtype))
    plain = layer.to_linear(dtype)
    x = torch.randn(*lead, 16, dtype=dtype)
    ours, expected = (x.clone().requires_grad_() for _ in range(2))
    y, z = layer(ours), plain(expected)
    slope = torch.randn_like(z)
    y.backward(slope)
    z.backward(slope)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    if x.numel():
        assert relative(y, z) < tolerance
        assert relative(ours.grad, expected.grad) < tolerance
    assert (y.shape, y.dtype, ours.grad.shape) == (z.shape, dtype, x.shape)


def test_nothing_dequantized_is_kept_between_forward_and_backward(monkeypatch):
    made = []
    numbers = NF4Tensor._numbers

    def watched(self, start, stop):
        out = numbers(self, start, stop)
        made.append(weakref.ref(out.untyped_storage()))
        return out

    monkeypatch.setattr(NF4Tensor, "_numbers", watched)
    layers = nn.Sequential(*[NF4Linear.from_linear(nn.Linear(64, 64)) for _ in range(3)])
    x = torch.randn(5, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layers(x)
    gc.collect()
    assert len(made) == 3
    assert not [ref for ref in made if ref() is not None]
    assert not [t for t in kept if t.numel() >= 64 * 64]
    y.sum().backward()
    assert len(made) == 6
    gc.collect()
    assert not [ref for ref in made if ref() is not None]


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_an_adapter_on_a_4_bit_layer_is_one_on_its_dequantized_weight(kind):
    torch.manual_seed(0)
    quantized = NF4Linear.from_linear(nn.Linear(32, 48))
    twin = kind(quantized.to_linear(torch.float32), rank=4)
    layer = kind(quantized, rank=4)
    assert torch.equal(layer(x := torch.randn(5, 32)), quantized(x))
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
    twin.load_state_dict(
        {**twin.state_dict(), **{k: v for k, v in layer.state_dict().items() if not k.startswith("base")}}
    )
    found = []
    for module in (layer, twin):
        x = torch.ones(5, 32, requires_grad=True)
        y = module(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
    assert len(found[0]) == (5 if kind is DoRALinear else 4)
    for ours, expected in zip(*found, strict=True):
        assert relative(ours, expected) < 1e-5


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_a_merge_dequantizes_to_bf16_and_unmerging_gives_the_4_bit_layer_back(kind):
    torch.manual_seed(0)
    quantized = NF4Linear.from_linear(nn.Linear(32, 48))
    layer = kind(quantized, rank=4).eval()
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
    x = torch.randn(5, 32)
    adapted, base = layer(x), quantized(x)
    expected = quantized.weight.dequantize(torch.float32) + layer.delta_weight()
    layer.merge()
    assert type(layer.base) is nn.Linear
    assert layer.base.weight.dtype == torch.bfloat16
    assert torch.equal(layer.base.weight, expected.to(torch.bfloat16))
    assert layer(x).dtype == torch.float32
    assert relative(layer(x), adapted) < 2**-6
    layer.enabled = False
    assert relative(layer(x), base) < 1e-5
    layer.enabled = True
    layer.unmerge()
    assert layer.base is quantized
    assert torch.equal(layer(x), adapted)


# ── on a model ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_nf4(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, NF4Linear.from_linear(module))
    return model


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_go_on_a_4_bit_model_are_saved_loaded_switched_off_and_merged(tiny_llama, tmp_path, method):
    model, ids = in_nf4(tiny_llama()), torch.randint(3, 97, (2, 9))
    before = model(ids).logits
    add_adapters(model, AdapterConfig(method=method, rank=4))
    assert torch.equal(model(ids).logits, before)
    assert all(
        "lora" in name or "magnitude" in name for name, p in model.named_parameters() if p.requires_grad
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(std=0.1)
    adapted = model(ids).logits
    with adapters_disabled(model):
        assert torch.equal(model(ids).logits, before)
    save_adapters(model, tmp_path)
    loaded = load_adapters(in_nf4(tiny_llama()), tmp_path)
    assert torch.equal(loaded(ids).logits, adapted)
    merged = merge_adapters(model)
    assert not [m for m in merged.modules() if isinstance(m, (NF4Linear, LoRALinear))]
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert relative(merged(ids).logits.float(), adapted) < 0.05


def test_layers_that_no_adapter_was_on_are_dequantized_by_a_merge_too(tiny_llama):
    model = add_adapters(in_nf4(tiny_llama()), AdapterConfig(rank=2, targets=("q_proj",)))
    merged = merge_adapters(model)
    assert not [m for m in merged.modules() if isinstance(m, NF4Linear)]
    merged(torch.tensor([[5, 6, 7]]))
