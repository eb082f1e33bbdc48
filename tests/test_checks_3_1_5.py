"""Every check of lab 3.1.5 passes the right answer and names each wrong one that people really give."""

from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
import torch
from helpers import accepts, mutant, printed_by, then
from helpers import refuses as names

from spark_ft.lab.checks import lab_3_1_5 as checks
from spark_ft.lab.checks import told
from spark_ft.lab.parity import double_quantization_against_bitsandbytes
from spark_ft.methods.nf4 import quantize_nf4


def refuses(check, *rows, **options):
    """As the helper, and every message fits on two lines."""
    short = rf"^(?=.{{1,{told.MESSAGE}}}$)[^\n]*?"
    names(check, *((short + f"(?:{pattern})", *wrong) for pattern, *wrong in rows), **options)


def also(right, act):
    """The right answer, before which `act` is called with the inputs."""
    return lambda *given: (act(*given), right(*given))[1]


LEFT_BEHIND = (
    ("switched gradients off", lambda *_: torch.set_grad_enabled(False)),
    ("seeds torch's generator", lambda *_: torch.manual_seed(0)),
    ("default dtype", lambda *_: torch.set_default_dtype(torch.float64)),
    ("random numbers were drawn", lambda *_: torch.rand(1)),
)

# ── exercise 1 ──────────────────────────────────────────────────────────────────────────────────────────────


def levels(outermost):
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9))[:-1]
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8))[:-1]
    all_levels = torch.cat([negative, torch.zeros(1), positive])
    return all_levels.sort().values / positive.max()


def levels_in_a_loop(outermost):
    inverse = NormalDist().inv_cdf
    positive = [inverse(0.5 + (outermost - 0.5) * i / 8) for i in range(1, 9)]
    negative = [-inverse(0.5 + (outermost - 0.5) * i / 7) for i in range(7, 0, -1)]
    return [x / positive[-1] for x in [*negative, 0.0, *positive]]


def levels_in_numpy(outermost):
    from scipy.stats import norm

    up, down = norm.ppf(np.linspace(0.5, outermost, 9)), norm.ppf(np.linspace(1 - outermost, 0.5, 8))
    return np.concatenate([down, up[1:]]) / up[-1]


def levels_of_a_distribution(outermost):
    normal = torch.distributions.Normal(0.0, 1.0)
    upper = normal.icdf(torch.linspace(0.5, outermost, 9))
    lower = normal.icdf(torch.linspace(1 - outermost, 0.5, 8))
    return torch.cat([lower[:-1], upper]) / upper[-1]


def test_levels():
    right = (levels, levels_in_a_loop, levels_in_numpy, levels_of_a_distribution)
    accepts(checks.check_levels, *right, times=100)
    cat, ndtri = "torch.cat([negative, torch.zeros(1), positive])", "torch.special.ndtri"
    refuses(
        checks.check_levels,
        ("the other way round", "0.5, 9", "0.5, 0", "0.5, 8", "0.5, 9", "0.5, 0", "0.5, 8"),
        ("not divided by the largest", " / positive.max()", ""),
        ("from the largest down", ".sort()", ".sort(descending=True)"),
        ("not sorted", ".sort().values", ""),
        ("not sorted", ".sort().values", "", cat, "torch.cat([positive, negative, torch.zeros(1)])"),
        ("evenly spaced", "all_levels.sort().values / positive.max()", "torch.linspace(-1, 1, 16)"),
        ("no level is zero", "all_levels.sort().values",
         ndtri + "(torch.linspace(1 - outermost, outermost, 16))"),
        ("those are the shares p", ndtri, ""),
        ("with an i", ndtri, "torch.special.ndtr"),
        ("bell curve's height", ndtri, "(lambda p: torch.exp(-(p**2) / 2))"),
        ("17 levels, 2 of them zero", "0.5, 8))[:-1]", "0.5, 8))"),
        ("18 levels, 3 of them zero", "[:-1]", ""),
        ("15 levels, 0 of them zero", "torch.zeros(1), ", ""),
        ("zero is there more than once", "[:-1]", "[1:]"),
        ("outermost p is not pulled in", "(outermost, 0.5", "(0.999, 0.5"),
        ("use the argument", "(outermost, 0.5", "(1 - (1 / 32 + 1 / 30) / 2, 0.5"),
        ("nan or inf", "(outermost, 0.5", "(1.0, 0.5"),
        ("shape", cat, f"{cat}[None]"),
        ("is None", "return ", ""),
        ("raised", cat, "negative + positive"),
        right=levels,
    )  # fmt: skip
    refuses(checks.check_levels, *((said, also(levels, act)) for said, act in LEFT_BEHIND))


# ── exercise 2 ──────────────────────────────────────────────────────────────────────────────────────────────


def quantize(weight, code, block_size):
    blocks = weight.float().reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax[:, None])[..., None]
    return (scaled - code).abs().argmin(-1).to(torch.uint8), absmax


def with_midpoints(weight, code, block_size):
    blocks = weight.to(torch.float32).view(-1, block_size)
    scales = blocks.abs().max(dim=1).values
    return torch.bucketize(blocks * (1 / scales)[:, None], (code[1:] + code[:-1]) / 2).to(torch.uint8), scales


def by_counting(weight, code, block_size):
    blocks = weight.float().flatten().unflatten(0, (-1, block_size))
    absmax = blocks.abs().max(1)[0]
    borders = (code[1:] + code[:-1]) / 2 * absmax[:, None]
    return (blocks[:, :, None] > borders[:, None]).sum(-1).byte(), absmax


def block_by_block(weight, code, block_size):
    codes, absmax = [], []
    for block in weight.float().flatten().split(block_size):
        absmax.append(torch.maximum(block.max(), -block.min()))
        codes.append(torch.cdist((block / absmax[-1])[:, None], code[:, None]).argmin(1))
    return torch.stack(codes).type(torch.uint8), torch.stack(absmax)


def test_quantize():
    absmax, divided = "blocks.abs().amax(1)", "blocks / absmax[:, None]"
    nearest = "(scaled - code).abs().argmin(-1)"
    right = (quantize, with_midpoints, by_counting, block_by_block)
    accepts(checks.check_quantize, *right, times=100)
    refuses(
        checks.check_quantize,
        ("one scale for the whole weight", absmax, "blocks.abs().max().expand(len(blocks))"),
        ("not the largest magnitude", absmax, "blocks.amax(1)"),
        ("mean magnitude", absmax, "blocks.abs().mean(1)"),
        ("standard deviation", absmax, "blocks.std(1)"),
        ("from smallest to largest", absmax, "blocks.amax(1) - blocks.amin(1)"),
        ("blocks run down the columns", ".float().reshape", ".float().T.reshape"),
        ("smallest magnitude", absmax, "blocks.abs().amin(1)"),
        ("the block's norm", absmax, "blocks.norm(dim=1)"),
        ("sum of the magnitudes", absmax, "blocks.abs().sum(1)"),
        ("the largest square", absmax, "blocks.square().amax(1)"),
        ("its reciprocal", "), absmax", "), 1 / absmax"),
        ("the farthest level", nearest, "(scaled - code).abs().argmax(-1)"),
        ("the sign is lost", "(scaled - code)", "(scaled.abs() - code)"),
        ("divided by the standard deviation", divided, "blocks / blocks.std(1, keepdim=True)"),
        ("begin with weight.float", ".float()", ""),
        (
            "absmax comes first",
            ".to(torch.uint8), absmax",
            ".to(torch.uint8), absmax)[::-1",
            "return ",
            "return (",
            "[::-1",
            "[::-1]",
        ),
        ("a scale per row of blocks|shape", divided, "blocks / absmax"),
        ("changed in place", "blocks = ", "weight.abs_()\n    blocks = "),
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
        ("raised", "reshape(-1, block_size)", "view(block_size, -1, 3)"),
        right=quantize,
    )
    refuses(checks.check_quantize, *((said, also(quantize, act)) for said, act in LEFT_BEHIND))


# ── exercise 3 ──────────────────────────────────────────────────────────────────────────────────────────────


def pack(codes, first=0, second=1):
    return codes[first::2] << 4 | codes[second::2]


def unpack(packed):
    return torch.stack([packed >> 4, packed & 15], 1).flatten()


def pack_by_sums(codes):
    return (codes.view(-1, 2) * torch.tensor([16, 1], dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack_by_division(packed):
    return torch.stack([packed // 16, packed % 16], -1).view(-1)


def pack_in_pairs(codes):
    high, low = codes.view(-1, 2).unbind(1)
    return high * 16 + low


def unpack_in_place(packed):
    codes = packed.repeat_interleave(2)
    codes[::2] >>= 4
    codes[1::2] &= 15
    return codes


pack_backwards = partial(pack, first=1, second=0)


def test_packing():
    others = (pack_by_sums, unpack_by_division), (pack_in_pairs, unpack_in_place)
    accepts(checks.check_packing, (pack, unpack), *others, times=100)
    refuses(
        checks.check_packing,
        ("the first of two codes goes into the high half", pack_backwards),
        ("neighbours share a byte", lambda codes: codes[: len(codes) // 2] << 4 | codes[len(codes) // 2 :]),
        ("not times 10", lambda codes: codes[::2] * 10 + codes[1::2]),
        ("differ", lambda codes: codes[::2] << 2 | codes[1::2]),
        ("by 4 bits, not by 2", lambda codes: codes[::2] * 4 + codes[1::2]),
        ("the second code is lost", lambda codes: codes[::2] << 4),
        ("the first code is lost", lambda codes: codes[1::2]),
        ("`<< 8` out of it", lambda codes: codes[::2] << 8 | codes[1::2]),
        ("binds tighter", lambda codes: codes[::2] << 4 + codes[1::2]),
        ("keeps only bits that both have", lambda codes: codes[::2] << 4 & codes[1::2]),
        ("`>> 4` or", lambda codes: codes[::2] >> 4 | codes[1::2]),
        ("times 15", lambda codes: codes[::2] * 15 + codes[1::2]),
        ("both halves are shifted", lambda codes: (codes[::2] | codes[1::2]) << 4),
        ("changed in place", lambda codes: codes[::2].mul_(16).add_(codes[1::2])),
        ("is None", lambda codes: None),
        ("is a list", lambda codes: pack(codes).tolist()),
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
        ("% 15 does not", lambda packed: torch.stack([packed // 16, packed % 15], 1).flatten()),
        ("& 16 keeps one", lambda packed: torch.stack([packed >> 4, packed & 16], 1).flatten()),
        ("high half comes twice", lambda packed: (packed >> 4).repeat_interleave(2)),
        ("low half comes twice", lambda packed: (packed & 15).repeat_interleave(2)),
        ("each byte comes twice", lambda packed: packed.repeat_interleave(2)),
        ("shifted by 2 bits", lambda packed: torch.stack([packed >> 2, packed & 15], 1).flatten()),
        ("/ makes fractions", lambda packed: torch.stack([packed / 16, packed % 16], 1).flatten()),
        ("is a tuple", lambda packed: (packed >> 4, packed & 15)),
        answers=lambda unpack: (pack, unpack),
    )
    left = ((said, (also(pack, act), unpack)) for said, act in LEFT_BEHIND)
    refuses(checks.check_packing, *left)


# ── exercise 4 ──────────────────────────────────────────────────────────────────────────────────────────────


def dequantize(codes, absmax, code, shape):
    return (code[codes.long()] * absmax[:, None]).view(shape)


def with_take(codes, absmax, code, shape):
    return torch.take(code, codes.long()).mul(absmax.unsqueeze(1)).reshape(*shape)


def one_hot(codes, absmax, code, shape):
    return (torch.eye(len(code))[codes.int()] @ code * absmax.view(-1, 1)).unflatten(0, (-1,)).reshape(shape)


def with_einsum(codes, absmax, code, shape):
    return torch.einsum("bi,b->bi", code.index_select(0, codes.flatten().int()).view_as(codes), absmax).view(
        shape
    )


no_scales = " * absmax[:, None]", ""


def test_dequantize():
    looked_up = "code[codes.long()]"
    accepts(checks.check_dequantize, dequantize, with_take, one_hot, with_einsum, times=100)
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
        ("mask|bytes", ".long()", ""),
        ("largest scale", "absmax[:, None]", "absmax.max()"),
        ("scales are squared", "absmax[:, None]", "absmax[:, None] ** 2"),
        ("scales are added", " * ", " + "),
        ("one level too low", "codes.long()", "codes.long() - 1"),
        ("read from the top", "code[codes", "code.flip(0)[codes"),
        ("sign is lost", looked_up, f"{looked_up}.abs()"),
        ("sign is wrong", looked_up, f"-{looked_up}"),
        ("is None", "return ", ""),
        ("changed in place", "return ", "absmax.mul_(2)\n    return "),
        ("shape", ".view(shape)", ".view(shape).flatten()[None]"),
        right=dequantize,
    )
    refuses(checks.check_dequantize, *((said, also(dequantize, act)) for said, act in LEFT_BEHIND))


# ── exercise 5 ──────────────────────────────────────────────────────────────────────────────────────────────


def bits(block, group):
    return 4 + 32 / block if group is None else 4 + 8 / block + 32 / (block * group)


def bits_of_a_tensor(block, group):
    scale = torch.tensor(32.0) if group is None else 8 + torch.tensor(32.0, dtype=torch.float64) / group
    return 4 + scale.double() / block


def bits_from_totals(block, group):
    numbers = block * (group or 1)
    return (4 * numbers + (8 * group + 32 if group else 32)) / numbers


def doubly(function):
    """Right without double quantization, and `function(block, group)` with it."""
    return lambda block, group: bits(block, None) if group is None else function(block, group)


def test_bits():
    accepts(checks.check_bits, bits, bits_of_a_tensor, bits_from_totals, times=100)
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
        ("is str, not a number", then(bits, str)),
        ("is None", lambda block, group: None),
        ("in brackets", doubly(lambda block, group: 4 + 8 / block + 32 / block * group)),
        ("not their sum", doubly(lambda block, group: 4 + 8 / block + 32 / (block + group))),
        ("divide by all of", doubly(lambda block, group: 4 + 8 / block + 32 / (block / group))),
        ("4 bits are missing", then(bits, lambda number: number - 4)),
        ("4 bits, not 8", then(bits, lambda number: number + 4)),
        ("4 bytes per scale", lambda block, group: 4 + 4 / block),
        ("upside down", lambda block, group: 4 + block / 32),
        ("raised TypeError", lambda block, group: 4 + 8 / block + 32 / (block * group)),
    )


# ── exercise 6 ──────────────────────────────────────────────────────────────────────────────────────────────


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


def linear(part):
    """The right terms but for the linear layers, whose bytes are part(hidden, mlp, kv) per layer."""
    return keeping("linear layers", lambda s, r, n: s["layers"] * part(s["hidden"], s["mlp"], s["kv"]))


def notes(part):
    """The right terms but for the notes, of which each layer has part(hidden, mlp, kv) numbers per rank."""
    return keeping("notes", lambda s, r, n: 8 * r * s["layers"] * part(s["hidden"], s["mlp"], s["kv"]))


def tables(one):
    """The right terms but for embeddings and head, of which each has one(shape) numbers."""
    return keeping("embeddings and head", lambda s, r, n: 2 * 2 * one(s))


def checkpoints(part):
    """The right terms but for the checkpoints: part(layers, hidden, length) numbers in bf16."""
    return keeping("checkpoints", lambda s, r, n: 2 * part(s["layers"], s["hidden"], n))


def terms_in_tensors(shape, rank, length):
    hidden, mlp, kv, layers, vocabulary = map(float, shape.values())
    sizes = torch.tensor([[hidden, hidden]] * 2 + [[kv, hidden]] * 2 + [[mlp, hidden]] * 3).double()
    found = (sizes.prod(1).sum() * layers * NF4, 4 * vocabulary * hidden, 8 * rank * layers * sizes.sum())
    names = ("linear layers", "embeddings and head", "notes", "checkpoints")
    return dict(zip(names, (*found, 2 * hidden * length * (1 + layers)), strict=True))


def terms_by_formula(shape, rank, length):
    h, m, k, n = (shape[key] for key in ("hidden", "mlp", "kv", "layers"))
    return {
        "checkpoints": 2 * n * length * h + 2 * length * h,
        "notes": 8 * rank * n * (9 * h + 2 * k + 3 * m),
        "linear layers": n * (2 * h * h + 2 * k * h + 3 * m * h) * 4.126953125 // 8,
        "embeddings and head": 4 * h * shape["vocabulary"],
    }


def test_terms():
    accepts(checks.check_terms, terms, terms_in_tensors, terms_by_formula, times=5)
    refuses(
        checks.check_terms,
        ("that many GB; return bytes", then(terms, lambda all: {n: x / 1e9 for n, x in all.items()})),
        ("that many GiB", then(terms, lambda all: {n: x / 2**30 for n, x in all.items()})),
        ("that many MB", then(terms, lambda all: {n: x / 1e6 for n, x in all.items()})),
        ("scales' own scales are missing", changed(bytes_a_weight=(4 + 8 / 64) / 8)),
        ("one byte each", changed(bytes_a_weight=1)),
        ("count once each", linear(lambda h, m, k: (h * h + k * h + 3 * m * h) * NF4)),
        ("not in each layer", tables(lambda s: s["layers"] * s["vocabulary"] * s["hidden"])),
        ("not hidden × hidden", tables(lambda s: s["hidden"] ** 2)),
        ("in NF4; the notes", changed(bytes_a_note=4 * NF4)),
        ("the MLP's three are missing", notes(lambda h, m, k: 6 * h + 2 * k)),
        ("A alone", notes(lambda h, m, k: 6 * h + m)),
        ("B alone", notes(lambda h, m, k: 3 * h + 2 * k + 2 * m)),
        ("in NF4; activations", changed(bytes_a_checkpoint=NF4)),
        ("times hidden", checkpoints(lambda layers, h, n: (layers + 1) * n)),
        ("one input for each layer", checkpoints(lambda layers, h, n: (7 * layers + 1) * n * h)),
        ("one too many", changed(last=2)),
        ("nothing grows with length²", checkpoints(lambda layers, h, n: (layers + 1) * n * n)),
        ("shape's keys are|raised KeyError", lambda s, r, n: s["heads"]),
        ("has other keys|changed", also(terms, lambda s, r, n: s.update(rank=r))),
        ("is None; is a return", keeping("notes", lambda s, r, n: None)),
        *((said, also(terms, act)) for said, act in LEFT_BEHIND),
    )  # fmt: skip
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
        ("is list, not a number", keeping("notes", lambda s, r, n: [1, 2])),
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
        (r"should return \(codes, absmax\)", (lambda *_: None, pack, dequantize)),
    )


def test_the_packages_own_doubly_quantized_bytes_pass_the_parity_function():
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    found = double_quantization_against_bitsandbytes(weight, quantize_nf4(weight))
    assert found["bytes equal"] == 1
    assert found["8-bit scales equal"] >= 0.995
    assert found["8-bit scales apart, at most"] <= 4
    assert found["error, ours / theirs"] == pytest.approx(1, abs=0.01)
