"""Every check of lab 3.1.5 passes the right answer and names each wrong one that people really give."""

import pytest
import torch

from spark_ft.lab.checks import CheckFailed
from spark_ft.lab.checks import lab_3_1_5 as checks
from spark_ft.methods.nf4 import quantize_nf4


def refuse(check, match, *answers):
    with pytest.raises(CheckFailed, match=match):
        check(*answers)


# ── exercise 1 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def absmax_of(blocks):
    return blocks.abs().amax(1)


def nearest(scaled, code):
    return (scaled[..., None] - code).abs().argmin(-1).to(torch.uint8)


def quantizer(
    scale=absmax_of,
    codes=nearest,
    blocks=lambda w, size: w.reshape(-1, size),
    divide=lambda b, s: b / s[:, None],
):
    """A quantizer with one of its parts changed."""

    def quantize(weight, code, block_size):
        parts = blocks(weight, block_size)
        scales = scale(parts)
        return codes(divide(parts, scales), code), scales

    return quantize


quantize = quantizer()


def with_midpoints(weight, code, block_size):
    blocks = weight.view(-1, block_size)
    scales = blocks.abs().max(dim=1).values
    return torch.bucketize(blocks * (1 / scales)[:, None], (code[1:] + code[:-1]) / 2).to(torch.uint8), scales


def test_quantize_right(capsys):
    checks.check_quantize(quantize)
    checks.check_quantize(with_midpoints)
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (quantizer(scale=lambda b: b.abs().max().expand(len(b))), "one scale for the whole weight"),
        (quantizer(scale=lambda b: b.amax(1)), "not the largest magnitude"),
        (quantizer(scale=lambda b: b.abs().mean(1)), "mean magnitude"),
        (quantizer(scale=lambda b: b.std(1)), "standard deviation"),
        (quantizer(scale=lambda b: b.amax(1) - b.amin(1)), "from smallest to largest"),
        (quantizer(blocks=lambda w, size: w.T.reshape(-1, size)), "blocks run down the columns"),
        (
            quantizer(scale=lambda b: b.abs().amax(1, keepdim=True), divide=lambda b, s: b / s),
            "one number a block is enough",
        ),
        (quantizer(divide=lambda b, s: b), "not scaled by their block's absmax"),
        (quantizer(divide=lambda b, s: b / s.max()), "whole weight's largest magnitude"),
        (quantizer(divide=lambda b, s: b * s[:, None]), "are not the nearest level's"),
        (
            quantizer(codes=lambda x, code: ((x[..., None] >= code).sum(-1) - 1).to(torch.uint8)),
            "the level below",
        ),
        (
            quantizer(
                codes=lambda x, code: (x[..., None] > code).sum(-1).clamp(max=len(code) - 1).to(torch.uint8)
            ),
            "the level above",
        ),
        (
            quantizer(codes=lambda x, code: ((x + 1) * (len(code) - 1) / 2).round().to(torch.uint8)),
            "equally spaced levels",
        ),
        (quantizer(codes=lambda x, code: len(code) - 1 - nearest(x, code)), "counted from the top"),
        (quantizer(codes=lambda x, code: nearest(x, code).long()), "make them bytes"),
        (quantizer(codes=lambda x, code: nearest(x, code).flatten()), "a row for each block"),
        (quantizer(codes=lambda x, code: nearest(x, code) + 1), "count from 0"),
        (quantizer(codes=lambda x, code: code[nearest(x, code).long()]), "make them bytes"),
        (lambda weight, code, size: quantize(weight, code, size)[0], "two tensors"),
        (lambda weight, code, size: None, "two tensors"),
        (lambda weight, code, size: quantize(weight.view(size, -1, 3), code, size), "PyTorch says"),
    ],
)
def test_quantize_mutants(mutant, message):
    refuse(checks.check_quantize, message, mutant)


# ── exercise 2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def pack(codes):
    return codes[::2] << 4 | codes[1::2]


def unpack(packed):
    return torch.stack([packed >> 4, packed & 15], 1).flatten()


def test_packing_right(capsys):
    checks.check_packing(pack, unpack)
    checks.check_packing(
        lambda codes: (codes.view(-1, 2) * torch.tensor([16, 1], dtype=torch.uint8)).sum(1).to(torch.uint8),
        lambda packed: torch.stack([packed // 16, packed % 16], -1).view(-1),
    )
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda codes: codes[1::2] << 4 | codes[::2], "the first of two codes goes into the high half"),
        (lambda codes: codes[: len(codes) // 2] << 4 | codes[len(codes) // 2 :], "neighbours share a byte"),
        (lambda codes: codes[::2] * 10 + codes[1::2], "not times 10"),
        (lambda codes: codes[::2] << 2 | codes[1::2], "differ"),
        (lambda codes: codes[::2] * 4 + codes[1::2], "by 4 bits, not by 2"),
        (lambda codes: codes[::2] << 4, "the second code is lost"),
        (lambda codes: codes[1::2], "the first code is lost"),
        (lambda codes: codes[::2].int() * 16 + codes[1::2], "a byte is torch.uint8"),
        (lambda codes: codes, "two share a byte"),
        (lambda codes: pack(codes).view(-1, 1), "two share a byte"),
        (lambda codes: None, "is a return missing"),
        (lambda codes: codes.view(-1, 3), "PyTorch says"),
    ],
)
def test_pack_mutants(mutant, message):
    refuse(checks.check_packing, message, mutant, unpack)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda packed: torch.stack([packed & 15, packed >> 4], 1).flatten(), "the low half comes first"),
        (lambda packed: torch.cat([packed >> 4, packed & 15]), "all high halves, then"),
        (lambda packed: torch.cat([packed & 15, packed >> 4]), "all low halves, then"),
        (lambda packed: torch.stack([packed >> 4, packed], 1).flatten(), "still carries the high one"),
        (lambda packed: torch.stack([packed & 240, packed & 15], 1).flatten(), "was masked and not shifted"),
        (lambda packed: torch.stack([packed >> 4, packed & 15], 1), "flatten it"),
        (lambda packed: packed >> 4, "each byte holds two codes"),
        (lambda packed: unpack(packed).int(), "codes are torch.uint8"),
        (lambda packed: None, "is a return missing"),
    ],
)
def test_unpack_mutants(mutant, message):
    refuse(checks.check_packing, message, pack, mutant)


# ── exercise 3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def dequantize(codes, absmax, code, shape):
    return (code[codes.long()] * absmax[:, None]).view(shape)


def test_dequantize_right(capsys):
    checks.check_dequantize(dequantize)
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda codes, absmax, code, shape: code[codes.long()].view(shape), "scales are forgotten"),
        (lambda codes, absmax, code, shape: (codes * absmax[:, None]).view(shape), "not looked up"),
        (
            lambda codes, absmax, code, shape: (code[codes.long()] / absmax[:, None]).view(shape),
            "divided by absmax",
        ),
        (
            lambda codes, absmax, code, shape: (code[codes.long()] * absmax).view(shape),
            "scales ran across the columns",
        ),
        (
            lambda codes, absmax, code, shape: (code[codes.long()] * absmax[0]).view(shape),
            "first one's scale",
        ),
        (
            lambda codes, absmax, code, shape: ((codes * 2 / (len(code) - 1) - 1) * absmax[:, None]).view(
                shape
            ),
            "equally spaced levels",
        ),
        (lambda codes, absmax, code, shape: dequantize(codes, absmax, code, shape).T, "transposed"),
        (lambda codes, absmax, code, shape: code[codes.long()] * absmax[:, None], "has shape"),
        (lambda codes, absmax, code, shape: code[codes] * absmax[:, None], "PyTorch says"),
        (lambda codes, absmax, code, shape: None, "is a return missing"),
    ],
)
def test_dequantize_mutants(mutant, message):
    refuse(checks.check_dequantize, message, mutant)


# ── exercise 4 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def bits(block, group):
    return 4 + 32 / block if group is None else 4 + 8 / block + 32 / (block * group)


def test_bits_right(capsys):
    checks.check_bits(bits)
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda block, group: 4.0, "the codes alone"),
        (lambda block, group: 4 + 32 / block, "in 8 bits now"),
        (
            lambda block, group: bits(block, group) if group is None else 4 + 8 / block,
            "the second level is forgotten",
        ),
        (
            lambda block, group: bits(block, None) if group is None else 4 + 8 / block + 32 / group,
            "for a whole group of blocks",
        ),
        (
            lambda block, group: (
                bits(block, None) if group is None else 4 + 32 / block + 32 / (block * group)
            ),
            "counted in 32 bits",
        ),
        (
            lambda block, group: bits(block, None) if group is None else 4 + 8 / block + 8 / (block * group),
            "32 bits, not 8",
        ),
        (
            lambda block, group: bits(block, None) if group is None else 4 + 8 / block + 32 / block,
            "for every block",
        ),
        (lambda block, group: 4 + 8 / block, "a scale takes 32 bits"),
        (lambda block, group: 36, "shared by block_size"),
        (lambda block, group: 4 + 16 / block, "kept in fp32"),
        (lambda block, group: bits(block, group) / 8, "bytes, not bits"),
        (lambda block, group: bits(block, group) + 0.01, "but should be 4.500000"),
        (lambda block, group: None, "returned None"),
    ],
)
def test_bits_mutants(mutant, message):
    refuse(checks.check_bits, message, mutant)


# ── exercise 5 ──────────────────────────────────────────────────────────────────────────────────────────────────────────

NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def terms(shape, rank, length, **changed):
    """The right terms, or with one of their ingredients changed."""
    hidden, mlp, kv, layers, vocabulary = (
        shape[name] for name in ("hidden", "mlp", "kv", "layers", "vocabulary")
    )
    kv, layers = changed.get("kv", kv), changed.get("layers", layers)
    matrices = 2 * [(hidden, hidden)] + 2 * [(kv, hidden)] + changed.get("mlps", 3) * [(mlp, hidden)]
    numbers = sum(changed.get("note", lambda o, i: rank * (o + i))(o, i) for o, i in matrices)
    return {
        "linear layers": layers * sum(o * i for o, i in matrices) * changed.get("bytes_a_weight", NF4),
        "embeddings and head": changed.get("tables", 2) * vocabulary * hidden * 2,
        "notes": layers * numbers * changed.get("bytes_a_note", 8),
        "checkpoints": (layers + changed.get("last", 1))
        * length
        * hidden
        * changed.get("bytes_a_checkpoint", 2),
    }


def changed(**ingredients):
    return lambda shape, rank, length: terms(shape, rank, length, **ingredients)


def keeping(term, change):
    return lambda shape, rank, length: {**terms(shape, rank, length), term: change(shape, rank, length)}


def linear(shape):
    return terms(shape, 1, 1, bytes_a_weight=1)["linear layers"]


def test_terms_right(capsys):
    checks.check_terms(terms)
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (changed(bytes_a_weight=8 * NF4), "bits, not bytes"),
        (changed(bytes_a_weight=0.5), "with their scales it is 4.127"),
        (changed(bytes_a_weight=4.5 / 8), "not 4.5"),
        (changed(bytes_a_weight=2), "that is bf16"),
        (
            keeping("linear layers", lambda s, r, n: terms({**s, "kv": s["hidden"]}, r, n)["linear layers"]),
            "key and value are",
        ),
        (changed(mlps=2), "an MLP has three matrices"),
        (changed(mlps=0), "the MLP is forgotten"),
        (
            keeping("linear layers", lambda s, r, n: s["layers"] * 3 * s["hidden"] * s["mlp"] * NF4),
            "attention is forgotten",
        ),
        (
            keeping(
                "linear layers", lambda s, r, n: NF4 * (linear(s) - 2 * s["layers"] * s["kv"] * s["hidden"])
            ),
            "only its query and output",
        ),
        (changed(layers=1), "that is one layer"),
        (changed(tables=1), "one table"),
        (changed(tables=0), "forgotten"),
        (changed(tables=NF4), "not in 4 bits"),
        (changed(tables=4), "2 bytes"),
        (changed(bytes_a_note=2), "the notes alone"),
        (changed(bytes_a_note=4), "notes and gradients"),
        (changed(bytes_a_note=6), "AdamW has two"),
        (changed(bytes_a_note=16), "all four are in bf16"),
        (
            keeping("notes", lambda s, r, n: terms(s, r, n, note=lambda o, i: r * r)["notes"]),
            "not rank × rank",
        ),
        (keeping("notes", lambda s, r, n: terms({**s, "kv": s["hidden"]}, r, n)["notes"]), r"\(kv, hidden\)"),
        (keeping("notes", lambda s, r, n: terms(s, r, n, mlps=2)["notes"]), "an MLP has three"),
        (keeping("notes", lambda s, r, n: terms(s, r, n, layers=1)["notes"]), "that is one layer"),
        (changed(last=0), r"layers \+ 1"),
        (changed(bytes_a_checkpoint=1), "bf16 has 2 bytes"),
        (changed(bytes_a_checkpoint=4), "activations are in bf16"),
        (keeping("checkpoints", lambda s, r, n: n * s["hidden"] * 2), "that is one layer"),
        (keeping("checkpoints", lambda s, r, n: (s["layers"] + 1) * n * s["mlp"] * 2), "not mlp"),
        (keeping("checkpoints", lambda s, r, n: (s["layers"] + 1) * s["hidden"] * 2), "times the length"),
        (keeping("checkpoints", lambda s, r, n: 1.01 * terms(s, r, n)["checkpoints"]), "but should be"),
        (keeping("notes", lambda s, r, n: None), "should be a number of bytes"),
        (
            lambda shape, rank, length: None,
            "should return a dict with the keys linear layers, .*, not NoneType",
        ),
        (lambda shape, rank, length: sum(terms(shape, rank, length).values()), "not float"),
        (lambda shape, rank, length: {"notes": 1}, "it has notes"),
    ],
)
def test_terms_mutants(mutant, message):
    refuse(checks.check_terms, message, mutant)


# ── parity ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parity_right(capsys):
    checks.check_parity(quantize, pack, dequantize)
    assert "100.00% of your bytes and 100% of your scales" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ((quantize, lambda codes: codes[1::2] << 4 | codes[::2], dequantize), "of your bytes are"),
        ((quantizer(scale=lambda b: b.abs().max().expand(len(b))), pack, dequantize), "of your bytes are"),
        ((lambda *a: (quantize(*a)[0], quantize(*a)[1] + 1), pack, dequantize), "of your scales are"),
        (
            (quantize, pack, lambda codes, absmax, code, shape: code[codes.long()].view(shape)),
            "off bitsandbytes'",
        ),
    ],
)
def test_parity_mutants(answers, message):
    refuse(checks.check_parity, message, *answers)


def test_the_packages_own_bytes_pass_the_parity_function():
    from spark_ft.lab.parity import double_quantization_against_bitsandbytes, nf4_against_bitsandbytes

    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    plain, double = quantize_nf4(weight, double_quant=False), quantize_nf4(weight)
    found = nf4_against_bitsandbytes(weight, plain.packed, plain.absmax, plain.dequantize())
    assert list(found.values()) == [1, 1, 0]
    found = double_quantization_against_bitsandbytes(weight, double)
    assert found["bytes equal"] == 1
    assert found["8-bit scales equal"] >= 0.995
    assert found["8-bit scales apart, at most"] <= 4
    assert found["error, ours / theirs"] == pytest.approx(1, abs=0.01)


def test_every_check_lets_a_stub_pass(capsys):
    def stub(*_):
        raise NotImplementedError("your turn (exercise 1)")

    for check in (checks.check_quantize, checks.check_dequantize, checks.check_bits, checks.check_terms):
        check(stub)
    checks.check_packing(stub, stub)
    checks.check_parity(stub, stub, stub)
    assert capsys.readouterr().out.count("not attempted yet") == 6
