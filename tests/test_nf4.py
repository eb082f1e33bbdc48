"""NF4 is bitsandbytes' NF4, byte for byte; its product keeps no dense weight; adapters stand on it."""

import gc
import weakref

import pytest
import torch
from helpers import complains, outcome, relative, tiny_llama, trained_layer, trained_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spark_ft import adapters
from spark_ft.adapters import AdapterConfig, adapters_disabled, add_adapters
from spark_ft.methods import nf4
from spark_ft.methods.dora import DoRALinear
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import NF4_CODE, SCALE_CODE, NF4Linear, NF4Tensor, quantize_nf4

# last blocks of 64 numbers and of 64·256 whole or short; one number, an odd number; not two dimensions
SHAPES = [(64, 64), (128, 192), (5, 7), (1, 1), (300, 333), (257, 64), (130, 1000), (24, 96), (3,), (2, 3, 5)]


def weight(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def theirs(w, double_quant, block_size=64):
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [64, 128])
def test_bytes_scales_and_numbers_are_bitsandbytes_own(dtype, block_size):
    from bitsandbytes.functional import dequantize_4bit

    for shape in SHAPES:
        w = weight(*shape, dtype=dtype)
        packed, state = theirs(w, False, block_size)
        ours = quantize_nf4(w, block_size, double_quant=False)
        assert torch.equal(ours.packed, packed.view(-1)), shape
        assert torch.equal(ours.absmax, state.absmax), shape
        assert (ours.shape, ours.dtype) == (w.shape, dtype)
        if shape[-1] % block_size and shape[-1] % 16 == 0:
            # bitsandbytes 0.50.2 on CPU takes a wrong scale where a block crosses the end of such a row
            assert (ours.dequantize() - w).abs().mean() < 0.09, shape
        else:
            assert torch.equal(ours.dequantize(), dequantize_4bit(packed, state)), shape


def test_doubly_quantized_scales_are_bitsandbytes_own_but_for_near_ties():
    from bitsandbytes.functional import create_dynamic_map, dequantize_4bit

    assert torch.equal(SCALE_CODE, create_dynamic_map())
    for shape in (*SHAPES, (1024, 2048)):
        w = weight(*shape, seed=4)
        packed, state = theirs(w, True)
        ours = quantize_nf4(w)
        assert torch.equal(ours.packed, packed.view(-1)), shape
        assert torch.equal(ours.offset, state.offset), shape
        assert torch.equal(ours.scale_absmax, state.state2.absmax), shape
        apart = (ours.scale_codes.int() - state.absmax.int()).abs()
        assert apart.max() <= 4, shape
        assert (apart == 0).float().mean() >= 0.995, shape
        error, most = ((d - w).abs().mean() for d in (ours.dequantize(), dequantize_4bit(packed, state)))
        assert error <= 1.01 * most, shape


def test_numbers_at_and_beside_every_midpoint_and_blocks_of_zeros_get_bitsandbytes_codes():
    middle = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
    beside = [middle.nextafter(torch.tensor(far)) for far in (2.0, -2.0)]
    row = torch.cat([middle, *beside, NF4_CODE, torch.zeros(3)])
    edges = torch.arange(-128, 129) / 128  # of the cells in which a code is looked up
    edges = torch.cat([edges, *(edges.nextafter(torch.tensor(far)) for far in (2.0, -2.0))]).clamp(-1, 1)
    blocks = [torch.cat([part, torch.ones(64 - len(part))]) for part in edges.split(63)]
    flat = [torch.zeros(64), torch.full((64,), 1e-30)]
    w = torch.stack([row, 3.7 * row, -row, row * 1e30, *flat, *blocks, *(0.7 * block for block in blocks)])
    for double_quant in (False, True):
        assert torch.equal(quantize_nf4(w, 64, double_quant).packed, theirs(w, double_quant)[0].view(-1))
    assert torch.equal(quantize_nf4(w, 64, False).dequantize()[4], torch.zeros(64))
    faint = torch.linspace(-1, 1, 64) * 1e-40  # 1 / its largest is inf
    assert torch.equal(quantize_nf4(faint).dequantize().sign(), faint.sign())


def test_a_number_takes_4_127_bits_4_5_without_double_quantization_and_some_cannot_be_quantized():
    w = weight(1024, 1024)
    assert 8 * quantize_nf4(w).nbytes / w.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert 8 * quantize_nf4(w, double_quant=False).nbytes / w.numel() == pytest.approx(4.5)
    complains(
        (quantize_nf4, (torch.ones(4, 4), 63), "block_size=63; two numbers share a byte"),
        (quantize_nf4, (torch.ones(4, 4), 0), "block_size=0"),
        (quantize_nf4, (torch.ones(0, 4),), "nothing to quantize"),
        *((quantize_nf4, (torch.tensor([1.0, x]),), "holds nan or inf") for x in (torch.nan, -torch.inf)),
    )


SIZES, AT_ONCE = st.sampled_from([2, 16, 64, 128]), st.sampled_from([128, 1024, 2**20])


@given(st.integers(1, 40), st.integers(1, 70), SIZES, st.booleans(), st.integers(1, 45), AT_ONCE)
def test_rows_chunk_by_chunk_are_rows_of_the_whole(rows, columns, block_size, double_quant, take, at_once):
    w = weight(rows, columns)
    whole = quantize_nf4(w, block_size, double_quant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nf4.CODED_AT_ONCE, "cpu", at_once)
        parts = quantize_nf4(w, block_size, double_quant)
        assert torch.equal(parts.packed, whole.packed)
        assert torch.equal(parts.dequantize(), whole.dequantize())
    blocks = list(whole.split(take))
    assert all(len(block) <= take for block in blocks)
    assert torch.equal(torch.cat(blocks), whole.dequantize())


@settings(max_examples=30)
@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 1e3]), block_size=st.sampled_from([16, 64]))
def test_each_number_gets_its_nearest_code_and_is_never_further_off_than_half_a_gap(seed, scale, block_size):
    w = scale * weight(7, 50, seed=seed)
    t = quantize_nf4(w, block_size, double_quant=False)
    scales = t.absmax.repeat_interleave(block_size)[: w.numel()].view_as(w)
    error = (t.dequantize() - w).abs()
    best = (NF4_CODE * scales[..., None] - w[..., None]).abs().amin(-1)
    assert torch.allclose(error, best, rtol=1e-4, atol=1e-6 * scale)
    assert (error <= 0.1520 * scales).all()  # half of the widest gap, from −1 to −0.6962


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


def test_nothing_dequantized_is_kept_between_forward_and_backward(monkeypatch):
    made, kept, split = [], [], NF4Tensor.split

    def watched(self, rows, dtype):
        for W in split(self, rows, dtype):
            made.append(weakref.ref(W.untyped_storage()))
            yield W

    def alive():
        gc.collect()
        return [ref for ref in made if ref() is not None]

    monkeypatch.setattr(NF4Tensor, "split", watched)
    layers = nn.Sequential(*[NF4Linear.from_linear(nn.Linear(64, 64)) for _ in range(3)])
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layers(x)
    assert len(made) == 3
    assert not alive()
    assert not [t for t in kept if t.numel() >= 64 * 64]
    y.sum().backward()
    assert len(made) == 6
    assert not alive()


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_an_adapter_on_a_4_bit_layer_is_one_on_its_dequantized_weight_and_is_not_merged_there(kind):
    quantized, x = NF4Linear.from_linear(nn.Linear(16, 24)), torch.randn(5, 16)
    assert torch.equal(kind(quantized, rank=4)(x), quantized(x))
    layer, twin = trained_layer(kind), trained_layer(kind)
    layer.base, twin.base = quantized, quantized.to_linear(torch.float32)
    found = [outcome(it, x, trained_parameters(it)) for it in (layer, twin)]
    assert all(relative(ours, expected) < 1e-5 for ours, expected in zip(*found, strict=True))
    assert relative(layer.delta_weight(), twin.delta_weight()) < 1e-5
    with pytest.raises(ValueError, match=r"4 bits cannot hold W \+ ΔW; call merge_adapters\(model\)"):
        layer.merge()
    assert relative(layer(x), found[0][0]) < 1e-6


def in_nf4(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, NF4Linear.from_linear(module))
    return model


@pytest.mark.parametrize(("method", "targets"), [("lora", ("q_proj", "up_proj")), ("dora", "all-linear")])
def test_adapters_go_on_a_4_bit_model_are_saved_loaded_switched_off_and_merged(tmp_path, method, targets):
    model, ids = in_nf4(tiny_llama()), torch.randint(3, 97, (2, 9))
    before = model(ids).logits
    add_adapters(model, AdapterConfig(method=method, rank=4, targets=targets))
    assert torch.equal(model(ids).logits, before)
    assert all("lora" in n or "magnitude" in n for n, p in model.named_parameters() if p.requires_grad)
    for layer in adapters.adapted_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    adapted = model(ids).logits
    with adapters_disabled(model):
        assert torch.equal(model(ids).logits, before)
    adapters.save_adapters(model, tmp_path)
    loaded = adapters.load_adapters(in_nf4(tiny_llama()), tmp_path)
    assert torch.equal(loaded(ids).logits, adapted)
    merged = adapters.merge_adapters(model)  # layers without an adapter are dequantized too
    assert not [m for m in merged.modules() if isinstance(m, (NF4Linear, LoRALinear))]
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert relative(merged(ids).logits.float(), adapted) < 0.05
