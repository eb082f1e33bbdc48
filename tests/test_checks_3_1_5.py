"""Every check of lab 3.1.5 passes the right answer and names each wrong one that people really give."""

from functools import partial

import pytest
import torch
from helpers import accepts, mutant, printed_by, refuses, then

from spark_ft.lab.checks import lab_3_1_5 as checks
from spark_ft.lab.parity import double_quantization_against_bitsandbytes
from spark_ft.methods.nf4 import quantize_nf4


def quantize(weight, code, block_size):
    blocks = weight.reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax[:, None])[..., None]
    return (scaled - code).abs().argmin(-1).to(torch.uint8), absmax


def with_midpoints(weight, code, block_size):
    blocks = weight.view(-1, block_size)
    scales = blocks.abs().max(dim=1).values
    return torch.bucketize(blocks * (1 / scales)[:, None], (code[1:] + code[:-1]) / 2).to(torch.uint8), scales


def test_quantize():
    absmax, divided = "blocks.abs().amax(1)", "blocks / absmax[:, None]"
    nearest = "(scaled - code).abs().argmin(-1)"
    accepts(checks.check_quantize, quantize, with_midpoints)
    refuses(
        checks.check_quantize,
        ("one scale for the whole weight", absmax, "blocks.abs().max().expand(len(blocks))"),
        ("not the largest magnitude", absmax, "blocks.amax(1)"),
        ("mean magnitude", absmax, "blocks.abs().mean(1)"),
        ("standard deviation", absmax, "blocks.std(1)"),
        ("from smallest to largest", absmax, "blocks.amax(1) - blocks.amin(1)"),
        ("blocks run down the columns", "weight.reshape", "weight.T.reshape"),
        ("one number per block is enough", "), absmax", "), absmax[:, None]"),
        ("not divided by their block's absmax", divided, "blocks"),
        ("whole weight's largest magnitude", divided, "blocks / absmax.max()"),
        ("are not the nearest level's", divided, "blocks * absmax[:, None]"),
        ("the level below", nearest, "((scaled >= code).sum(-1) - 1)"),
        ("the level above", nearest, "((scaled > code).sum(-1) % len(code))"),
        ("equally spaced levels", nearest, "((scaled[..., 0] + 1) * (len(code) - 1) / 2).round()"),
        ("counted from the top", nearest, f"(len(code) - 1 - {nearest})"),
        ("make them bytes", ".to(torch.uint8)", ".float()"),
        ("a row per block", nearest, f"{nearest}.flatten()"),
        ("count from 0", nearest, f"({nearest} + 1)"),
        ("two tensors", "), absmax", ")"),
        ("raised", "weight.reshape(-1, block_size)", "weight.view(block_size, -1, 3)"),
        right=quantize,
    )


def pack(codes, first=0, second=1):
    return codes[first::2] << 4 | codes[second::2]


def unpack(packed):
    return torch.stack([packed >> 4, packed & 15], 1).flatten()


def pack_by_sums(codes):
    return (codes.view(-1, 2) * torch.tensor([16, 1], dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack_by_division(packed):
    return torch.stack([packed // 16, packed % 16], -1).view(-1)


pack_backwards = partial(pack, first=1, second=0)


def test_packing():
    accepts(checks.check_packing, (pack, unpack), (pack_by_sums, unpack_by_division))
    refuses(
        checks.check_packing,
        ("the first of two codes goes into the high half", pack_backwards),
        ("neighbours share a byte", lambda codes: codes[: len(codes) // 2] << 4 | codes[len(codes) // 2 :]),
        ("not times 10", lambda codes: codes[::2] * 10 + codes[1::2]),
        ("differ", lambda codes: codes[::2] << 2 | codes[1::2]),
        ("by 4 bits, not by 2", lambda codes: codes[::2] * 4 + codes[1::2]),
        ("the second code is lost", lambda codes: codes[::2] << 4),
        ("the first code is lost", lambda codes: codes[1::2]),
        ("a byte is torch.uint8", lambda codes: codes[::2].int() * 16 + codes[1::2]),
        ("two codes share a byte", lambda codes: codes),
        ("two codes share a byte", then(pack, lambda packed: packed.view(-1, 1))),
        ("raised", lambda codes: codes.view(-1, 3)),
        answers=lambda pack: (pack, unpack),
    )
    refuses(
        checks.check_packing,
        ("the low half comes first", lambda packed: torch.stack([packed & 15, packed >> 4], 1).flatten()),
        ("all high halves, then", lambda packed: torch.cat([packed >> 4, packed & 15])),
        ("all low halves, then", lambda packed: torch.cat([packed & 15, packed >> 4])),
        ("still carries the high one", lambda packed: torch.stack([packed >> 4, packed], 1).flatten()),
        ("masked but not shifted", lambda packed: torch.stack([packed & 240, packed & 15], 1).flatten()),
        ("flatten it", lambda packed: torch.stack([packed >> 4, packed & 15], 1)),
        ("each byte holds two codes", lambda packed: packed >> 4),
        ("codes are torch.uint8", then(unpack, torch.Tensor.int)),
        ("is a return missing", lambda packed: None),
        answers=lambda unpack: (pack, unpack),
    )


def dequantize(codes, absmax, code, shape):
    return (code[codes.long()] * absmax[:, None]).view(shape)


no_scales = " * absmax[:, None]", ""


def test_dequantize():
    looked_up = "code[codes.long()]"
    accepts(checks.check_dequantize, dequantize)
    refuses(
        checks.check_dequantize,
        ("scales are missing", *no_scales),
        ("not looked up", looked_up, "codes"),
        ("divided by absmax", " * ", " / "),
        ("scales run across the columns", "absmax[:, None]", "absmax"),
        ("first one's scale", "absmax[:, None]", "absmax[0]"),
        ("equally spaced levels", looked_up, "(codes * 2 / (len(code) - 1) - 1)"),
        ("transposed", ".view(shape)", ".view(shape).T"),
        ("has shape", ".view(shape)", ""),
        ("raised", ".long()", ""),
        right=dequantize,
    )


def bits(block, group):
    return 4 + 32 / block if group is None else 4 + 8 / block + 32 / (block * group)


def doubly(function):
    """Right without double quantization, and `function(block, group)` with it."""
    return lambda block, group: bits(block, None) if group is None else function(block, group)


def test_bits():
    accepts(checks.check_bits, bits)
    refuses(
        checks.check_bits,
        ("the codes alone", lambda block, group: 4.0),
        ("in 8 bits now", lambda block, group: 4 + 32 / block),
        ("the second level is missing", doubly(lambda block, group: 4 + 8 / block)),
        ("serves a whole group of blocks", doubly(lambda block, group: 4 + 8 / block + 32 / group)),
        ("counted in 32 bits", doubly(lambda block, group: 4 + 32 / block + 32 / (block * group))),
        ("32 bits, not 8", doubly(lambda block, group: 4 + 8 / block + 8 / (block * group))),
        ("for every block", doubly(lambda block, group: 4 + 8 / block + 32 / block)),
        ("a scale takes 32 bits", lambda block, group: 4 + 8 / block),
        ("block_size of them share", lambda block, group: 36),
        ("scales are in fp32", lambda block, group: 4 + 16 / block),
        ("bytes, not bits", then(bits, lambda number: number / 8)),
        ("but should be 4.500000", then(bits, lambda number: number + 0.01)),
        ("returned str", then(bits, str)),
    )


NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def terms(shape, rank, length, **changed):
    """The right terms, or with one of their ingredients changed."""
    hidden, mlp, kv, layers = (changed.get(name, shape[name]) for name in ("hidden", "mlp", "kv", "layers"))
    matrices = 2 * [(hidden, hidden)] + 2 * [(kv, hidden)] + changed.get("mlps", 3) * [(mlp, hidden)]
    numbers = sum(changed.get("note", lambda o, i: rank * (o + i))(o, i) for o, i in matrices)
    stream = length * hidden * changed.get("bytes_a_checkpoint", 2)
    return {
        "linear layers": layers * sum(o * i for o, i in matrices) * changed.get("bytes_a_weight", NF4),
        "embeddings and head": changed.get("tables", 2) * shape["vocabulary"] * hidden * 2,
        "notes": layers * numbers * changed.get("bytes_a_note", 8),
        "checkpoints": (layers + changed.get("last", 1)) * stream,
    }


changed = partial(partial, terms)


def keeping(term, value):
    """The right terms but for one: value(shape, rank, length), or that of changed terms."""

    def answer(s, r, n):
        given = value(s, r, n)
        return {**terms(s, r, n), term: given[term] if isinstance(given, dict) else given}

    return answer


def as_if_kv_were_hidden(s, r, n):
    return terms(s, r, n, kv=s["hidden"])


def without_key_and_value(s, r, n):
    return NF4 * (terms(s, r, n)["linear layers"] / NF4 - 2 * s["layers"] * s["kv"] * s["hidden"])


def mlp_alone(s, r, n):
    return s["layers"] * 3 * s["hidden"] * s["mlp"] * NF4


def test_terms():
    accepts(checks.check_terms, terms)
    refuses(
        checks.check_terms,
        ("bits, not bytes", changed(bytes_a_weight=8 * NF4)),
        ("with their scales it is 4.127", changed(bytes_a_weight=0.5)),
        ("not 4.5", changed(bytes_a_weight=4.5 / 8)),
        ("that is bf16", changed(bytes_a_weight=2)),
        ("key and value are", keeping("linear layers", as_if_kv_were_hidden)),
        ("an MLP has three matrices", changed(mlps=2)),
        ("the MLP is missing", changed(mlps=0)),
        ("attention is missing", keeping("linear layers", mlp_alone)),
        ("only its query and output", keeping("linear layers", without_key_and_value)),
        ("that is one layer", changed(layers=1)),
        ("one table", changed(tables=1)),
        ("they are missing", changed(tables=0)),
        ("not in 4 bits", changed(tables=NF4)),
        ("2 bytes", changed(tables=4)),
        ("the notes alone", changed(bytes_a_note=2)),
        ("notes and gradients", changed(bytes_a_note=4)),
        ("AdamW has two", changed(bytes_a_note=6)),
        ("all four are in bf16", changed(bytes_a_note=16)),
        ("not rank × rank", keeping("notes", lambda s, r, n: terms(s, r, n, note=lambda o, i: r * r))),
        (r"\(kv, hidden\)", keeping("notes", as_if_kv_were_hidden)),
        ("an MLP has three", keeping("notes", changed(mlps=2))),
        ("that is one layer", keeping("notes", changed(layers=1))),
        (r"layers \+ 1", changed(last=0)),
        ("bf16 has 2 bytes", changed(bytes_a_checkpoint=1)),
        ("activations are in bf16", changed(bytes_a_checkpoint=4)),
        ("that is one layer", keeping("checkpoints", lambda s, r, n: n * s["hidden"] * 2)),
        ("not mlp", keeping("checkpoints", lambda s, r, n: (s["layers"] + 1) * n * s["mlp"] * 2)),
        ("times the length", keeping("checkpoints", lambda s, r, n: (s["layers"] + 1) * s["hidden"] * 2)),
        ("but should be", keeping("checkpoints", lambda s, r, n: 1.01 * terms(s, r, n)["checkpoints"])),
        ("should be a number of bytes", keeping("notes", lambda s, r, n: None)),
        ("not float", then(terms, lambda given: sum(given.values()))),
        ("it has notes", lambda *_: {"notes": 1}),
    )


def test_parity():
    right = (quantize, pack, dequantize)
    assert "100.00% of your bytes and 100% of your scales" in printed_by(checks.check_parity, right)
    one_scale = mutant(quantize, "blocks.abs().amax(1)", "blocks.abs().max().expand(len(blocks))")
    refuses(
        checks.check_parity,
        ("of your bytes are", (quantize, pack_backwards, dequantize)),
        ("of your bytes are", (one_scale, pack, dequantize)),
        ("of your scales are", (mutant(quantize, "), absmax", "), absmax + 1"), pack, dequantize)),
        ("off bitsandbytes'", (quantize, pack, mutant(dequantize, *no_scales))),
    )


def test_the_packages_own_doubly_quantized_bytes_pass_the_parity_function():
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    found = double_quantization_against_bitsandbytes(weight, quantize_nf4(weight))
    assert found["bytes equal"] == 1
    assert found["8-bit scales equal"] >= 0.995
    assert found["8-bit scales apart, at most"] <= 4
    assert found["error, ours / theirs"] == pytest.approx(1, abs=0.01)
