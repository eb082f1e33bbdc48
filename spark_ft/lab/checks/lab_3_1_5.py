"""Checks of lab 3.1.5: each compares with numbers found by brute force and names people's mistakes."""

import copy
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from spark_ft.lab import parity
from spark_ft.lab.checks import CheckFailed, call, check, require, require_close, require_pair, require_tensor
from spark_ft.lab.checks.told import as_tensor, not_a_tensor
from spark_ft.memory.shapes import known_config
from spark_ft.methods.nf4 import NF4_CODE

OUTERMOST = 1 - (1 / 32 + 1 / 30) / 2  # the p of NF4's largest level (Dettmers et al. 2023, appendix E)
# The first two are neither symmetric nor evenly spaced, so that levels computed by a formula differ.
CODES = (NF4_CODE, torch.tensor([-1.0, -0.3, 0.0, 0.1, 0.55, 1.0]), torch.tensor([-1.0, 0.0, 1.0]))


def _asked(answer: Callable, what: str, *given: Any, mends: Mapping[str, str] | None = None) -> Any:
    """Call an answer that needs no random numbers; it may change none of its inputs."""
    state = torch.get_rng_state()
    result = call(answer, what, *given, mends=mends)
    drawn = not torch.equal(state, torch.get_rng_state())
    require(not drawn, f"{what}: random numbers were drawn; the nearest level needs no luck")
    return result


# ── exercise 1 ──


def _quantiles(shares: Tensor) -> Tensor:
    """The numbers below which these shares of a normal distribution lie."""
    return torch.tensor([NormalDist().inv_cdf(p) for p in shares.tolist()], dtype=torch.float64)


def _levels(outermost: float, quantiles: Callable[[Tensor], Tensor] = _quantiles) -> Tensor:
    shares = (torch.linspace(outermost, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8))
    positive, negative = map(quantiles, shares)
    levels = torch.cat([-negative, positive.new_zeros(1), positive])
    return levels.sort().values / positive.max()


def _levels_mistakes(outermost: float) -> dict[str, Tensor]:
    right, largest = _levels(outermost), NormalDist().inv_cdf(outermost)
    even = torch.linspace(1 - outermost, outermost, 16, dtype=torch.float64)
    return {
        "eight levels are negative and seven positive; it is the other way round": -right.flip(0),
        "not divided by the largest: the code should run from −1 to 1": largest * right,
        "from the largest down: sort them": right.flip(0),
        "they are not sorted: `.sort().values`": torch.cat([right[:8], right[8:].flip(0)]),
        "they are not sorted: `.sort().values`, after all are together": torch.cat(
            [right[8:].flip(0), right[:8]]
        ),
        "the levels are evenly spaced; the shares p should be, and ndtri(p) gives the levels": torch.linspace(
            -1, 1, 16
        ),
        "no level is zero: take eight for the positive side, seven for the negative, and 0": _quantiles(even)
        / largest,
        "those are the shares p; `torch.special.ndtri(p)` turns them into levels": _levels(
            outermost, lambda p: p
        ),
        "ndtr is the share below a number; its inverse is ndtri, with an i": _levels(
            outermost, torch.special.ndtr
        ),
        "that is the bell curve's height; ndtri gives the place below which a share p lies": _levels(
            outermost, lambda p: torch.exp(-(p**2) / 2)
        ),
        "the outermost p is not pulled in as told: use the argument": _levels(0.999),
        "the outermost p is always the paper's: use the argument": _levels(OUTERMOST),
    }


@check
def check_levels(answer: Callable[[float], Tensor]) -> str:
    """Quantiles of the normal distribution by Python's own `NormalDist`, for three outermost shares."""
    for outermost in (0.9, 0.99, OUTERMOST):
        what = f"nf4_levels for outermost={outermost:.4g}"
        value = _asked(answer, what, outermost)
        got = as_tensor(value)
        if got is not None and got.dim() == 1 and len(got) in (15, 17, 18):
            zeros = int((got.abs() < 1e-6).sum())
            mend = "zero should be there once: drop p = 0.5 from both sides, then add 0"
            raise CheckFailed(f"{what} gives {len(got)} levels, {zeros} of them zero; {mend}")
        got = require_tensor(value, what, (16,))
        require(
            int((got.abs() < 1e-6).sum()) < 2,
            f"{what}: zero is there more than once, so a level is lost: drop p = 0.5, then add 0",
        )
        mistakes = _levels_mistakes(outermost)
        if outermost == OUTERMOST:
            mistakes.popitem()
        require_close(got, _levels(outermost), what, mistakes, tolerance=2e-5)
    require_close(got, NF4_CODE, "the levels, held to bitsandbytes' constants,", tolerance=2e-5)
    return "eight, seven and zero; for the paper's outermost p they are bitsandbytes' constants"


# ── exercise 2 ──

QUANTIZE_MENDS = {"size of tensor": "a scale per row of blocks: absmax[:, None]"}


@check
def check_quantize(answer: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> str:
    """The nearest of all levels, tried one by one, after each block is scaled by its largest magnitude."""
    for code in CODES:
        for shape, size, dtype in (
            ((8, 64), 64, torch.float32),
            ((6, 32), 16, torch.float32),
            ((4, 4), 8, torch.float32),
            ((24,), 4, torch.float32),
            ((2, 3, 8), 8, torch.float32),
            ((6, 32), 16, torch.bfloat16),
        ):
            weight = torch.randn(shape) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
            weight = weight.to(dtype)
            blocks = weight.float().reshape(-1, size)
            half = "a bf16" if dtype == torch.bfloat16 else "a"
            what = f"for {half} weight {tuple(shape)} in blocks of {size}, {len(code)} levels"
            pair = _asked(answer, what, weight.clone(), code.clone(), size, mends=QUANTIZE_MENDS)
            said = f"quantize {what} should return two tensors, (codes, absmax)"
            codes, absmax = require_pair(pair, said)
            if codes.is_floating_point() and absmax.dtype == torch.uint8:
                raise CheckFailed(f"{said}, in this order; here absmax comes first")
            _check_absmax(absmax, weight.float(), blocks, what)
            require(
                absmax.dtype == torch.float32,
                f"absmax {what} is {absmax.dtype}: scales are kept in fp32, so begin with weight.float()",
            )
            require(
                codes.dtype == torch.uint8,
                f"the codes {what} are {codes.dtype}: make them bytes with `.to(torch.uint8)` to save memory",
            )
            require(
                codes.shape == blocks.shape,
                f"the codes {what} have shape {tuple(codes.shape)}, but should have a row per block, "
                f"{tuple(blocks.shape)}",
            )
            require(
                int(codes.max()) < len(code),
                f"a code {what} is {int(codes.max())}: codes count from 0 to {len(code) - 1}",
            )
            _check_nearest(codes, weight.float(), blocks, code, what)
    return "each number gets its nearest level, each block its own scale: 3 codes, 1 to 3 dimensions, bf16"


def _check_absmax(absmax: Tensor, weight: Tensor, blocks: Tensor, what: str) -> None:
    largest = blocks.abs().amax(1)
    mistakes = {
        "one scale for the whole weight: each block has its own": weight.abs().max().expand(len(blocks)),
        "the largest number, not the largest magnitude: negative numbers count too": blocks.amax(1),
        "the mean magnitude, which cuts off the numbers beyond it": blocks.abs().mean(1),
        "the standard deviation, which cuts off the numbers beyond it": blocks.std(1),
        "the smallest magnitude, not the largest": blocks.abs().amin(1),
        "its reciprocal; return the largest magnitude itself": 1 / blocks.abs().amax(1),
        "the largest square: take the magnitude, abs()": blocks.square().amax(1),
        "the block's norm; the largest magnitude brings it to ±1": blocks.norm(dim=1),
        "the sum of the magnitudes, not the largest": blocks.abs().sum(1),
        "from smallest to largest: the code runs from −1 to 1, so divide by the largest magnitude": (
            blocks.amax(1) - blocks.amin(1)
        ),
    }
    if weight.dim() == 2:
        columns = weight.T.reshape(-1, blocks.shape[1]).abs().amax(1)
        mistakes["the blocks run down the columns; they are consecutive numbers of a row"] = columns
    if absmax.dim() == 2 and absmax.shape[1] == 1:
        raise CheckFailed(
            f"absmax {what} has shape {tuple(absmax.shape)}: one number per block is enough, ({len(blocks)},)"
        )
    require_close(absmax, largest, f"absmax {what}", mistakes)


def _check_nearest(codes: Tensor, weight: Tensor, blocks: Tensor, code: Tensor, what: str) -> None:
    scaled = (blocks.double() / blocks.abs().amax(1, keepdim=True)).unsqueeze(-1)
    gaps = (scaled - code.double()).abs()
    off = gaps.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    if bool((off <= gaps.amin(-1) + 1e-6).all()):
        return
    steps = (len(code) - 1) / 2
    mistakes = {
        "the level below, not the nearest: on average it makes numbers smaller": (code <= scaled).sum(-1) - 1,
        "the level above, not the nearest": (code < scaled).sum(-1),
        "equally spaced levels: look them up in `code`": ((scaled.squeeze(-1) + 1) * steps).round().long(),
        "the numbers are not divided by their block's absmax first": (
            (blocks.unsqueeze(-1) - code).abs().argmin(-1)
        ),
        "the codes are counted from the top": len(code) - 1 - gaps.argmin(-1),
        "the farthest level, not the nearest: argmin": gaps.argmax(-1),
        "the sign is lost: only absmax is a magnitude, the numbers keep their signs": (
            scaled.abs() - code.double()
        ).abs().argmin(-1),
        "divided by the standard deviation, not by absmax": (
            (blocks / blocks.std(1, keepdim=True)).unsqueeze(-1) - code
        ).abs().argmin(-1),
        "the numbers are scaled by the whole weight's largest magnitude": (
            (blocks / weight.abs().max()).unsqueeze(-1) - code
        ).abs().argmin(-1),
    }  # fmt: skip
    for message, wrong in mistakes.items():
        # ties may fall the other way
        require(
            (codes.long() != wrong.clamp(0, len(code) - 1)).float().mean() > 0.02,
            f"the codes {what}: {message}",
        )
    share = (off > gaps.amin(-1) + 1e-6).float().mean().item()
    raise CheckFailed(f"{share:.0%} of the codes {what} are not the nearest level's")


# ── exercise 3 ──


@check
def check_packing(pack: Callable[[Tensor], Tensor], unpack: Callable[[Tensor], Tensor]) -> str:
    """Two codes a byte, the first in the high half; and back."""
    for count in (4096, 64, 2):  # the longest first: in it no two mistakes look alike
        codes = torch.randint(16, (count,), dtype=torch.uint8)
        high, low = codes[::2].int(), codes[1::2].int()
        what = f"packing {count} codes"
        packed = _asked(pack, what, codes.clone())
        require(isinstance(packed, Tensor), f"{what} {not_a_tensor(packed)}")
        require(packed.dtype == torch.uint8, f"{what} gives {packed.dtype}: a byte is torch.uint8")
        require(
            packed.shape == (count // 2,),
            f"{what} gives shape {tuple(packed.shape)}, but two codes share a byte: ({count // 2},)",
        )
        half = count // 2
        _same(
            packed,
            high * 16 + low,
            what,
            {
                "the first of two codes goes into the high half; here it is in the low one": low * 16 + high,
                "neighbours share a byte, codes 0 and 1, 2 and 3, …; not the first half with the second": (
                    codes[:half].int() * 16 + codes[half:]
                ),
                "the high half is the first code times 16 (or << 4), not times 10": high * 10 + low,
                "the second code is lost": high * 16,
                "the first code is lost; `<< 4` puts it into the high half, `>> 4` or `<< 8` out of it": low,
                "the halves overlap: shift the first code by 4 bits, not by 2": high * 4 + low,
                "+ binds tighter than <<: put brackets round `codes[::2] << 4`": high * 2 ** (4 + low),
                "& keeps only bits that both have; bring the halves together with | or +": (high * 16) & low,
                "times 15, not times 16": high * 15 + low,
                "both halves are shifted; only the first one is": (high * 16) | (low * 16),
            },
        )
        what = f"unpacking {count // 2} bytes"
        back = _asked(unpack, what, (high * 16 + low).to(torch.uint8))
        require(isinstance(back, Tensor), f"{what} {not_a_tensor(back)}")
        require(
            back.numel() == count,
            f"{what} gives {back.numel()} numbers, but each byte holds two codes: {count}",
        )
        require(back.shape == (count,), f"{what} gives shape {tuple(back.shape)}; flatten it to ({count},)")
        slash = "; / makes fractions, >> and // do not" if back.is_floating_point() else ""
        require(back.dtype == torch.uint8, f"{what} gives {back.dtype}; codes are torch.uint8{slash}")
        _same(
            back,
            codes.int(),
            what,
            {
                "the low half comes first; the high one was packed first": torch.stack(
                    [low, high], 1
                ).flatten(),
                "all high halves, then all low ones; a byte's two codes belong side by side": (
                    torch.cat([high, low])
                ),
                "all low halves, then all high ones; a byte's two codes belong side by side": (
                    torch.cat([low, high])
                ),
                "the low half still carries the high one: keep its 4 bits with `& 15` (or `% 16`)": (
                    torch.stack([high, high * 16 + low], 1).flatten()
                ),
                "the high half was masked but not shifted: `>> 4` (or `// 16`)": torch.stack(
                    [high * 16, low], 1
                ).flatten(),
                "& 15 keeps four bits; & 16 keeps one": torch.stack(
                    [high, (high * 16 + low) & 16], 1
                ).flatten(),
                "% 16 keeps four bits; % 15 does not": torch.stack(
                    [high, (high * 16 + low) % 15], 1
                ).flatten(),
                "each byte's high half comes twice; its low half is `& 15`": high.repeat_interleave(2),
                "each byte's low half comes twice; its high half is `>> 4`": low.repeat_interleave(2),
                "each byte comes twice; take its halves apart": (high * 16 + low).repeat_interleave(2),
                "shifted by 2 bits; half a byte has 4": torch.stack(
                    [(high * 16 + low) >> 2, low], 1
                ).flatten(),
            },
        )
    return "two codes a byte, the first in the high half, and back again, for 3 lengths"


def _same(actual: Tensor, expected: Tensor, what: str, mistakes: dict[str, Tensor]) -> None:
    if torch.equal(actual.int(), expected.int()):
        return
    for message, wrong in mistakes.items():
        if torch.equal(actual.int(), wrong.int() % 256):
            raise CheckFailed(f"{what}: {message}")
    raise CheckFailed(f"{what}: {(actual.int() != expected.int()).float().mean():.0%} of it differ")


# ── exercise 4 ──

DEQUANTIZE_MENDS = {
    "mask": "PyTorch takes bytes for a mask: code[codes.long()]",
    "indices": "bytes are no indices: code[codes.long()]",
    "size of tensor": "a scale per row of codes: absmax[:, None]",
}


@check
def check_dequantize(answer: Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]) -> str:
    """The level of each code times its block's scale, in the weight's shape."""
    for code in CODES:
        for shape, size in (((8, 8), 8), ((6, 32), 16), ((24,), 4), ((2, 3, 8), 8)):
            blocks = torch.Size(shape).numel() // size
            codes = torch.randint(len(code), (blocks, size), dtype=torch.uint8)
            absmax = torch.rand(blocks) + 0.1
            levels = code[codes.long()]
            right = levels * absmax[:, None]
            what = f"the weight of {tuple(shape)} from blocks of {size} and a code of {len(code)} levels"
            mistakes = {
                "the scales are missing": levels,
                "the codes were not looked up in `code`": codes * absmax[:, None],
                "divided by absmax; quantizing divides, so dequantizing multiplies": levels / absmax[:, None],
                "equally spaced levels: look them up in `code`": (
                    (codes / ((len(code) - 1) / 2) - 1) * absmax[:, None]
                ),
                "all blocks have the first one's scale": levels * absmax[0],
                "all blocks have the largest scale": levels * absmax.max(),
                "the scales are squared": levels * absmax[:, None] ** 2,
                "the scales are added; a level is a share of absmax, so multiply": levels + absmax[:, None],
                "one level too low: codes count from 0": code[codes.long() - 1] * absmax[:, None],
                "the levels are read from the top": code.flip(0)[codes.long()] * absmax[:, None],
                "the sign is lost": right.abs(),
                "the sign is wrong": -right,
            }  # fmt: skip
            if blocks == size:
                mistakes["the scales run across the columns: absmax[:, None], one per row of codes"] = (
                    levels * absmax
                )
                mistakes["transposed"] = right.T
            given = (codes.clone(), absmax.clone(), code.clone(), tuple(shape))
            got = _asked(answer, what, *given, mends=DEQUANTIZE_MENDS)
            require_close(
                got, right.reshape(shape), what, {m: wrong.reshape(shape) for m, wrong in mistakes.items()}
            )
    return "each code's level times its block's scale, for 3 codes, 1 to 3 dimensions"


# ── exercise 5 ──


@check
def check_bits(answer: Callable[[int, int | None], float]) -> str:
    """4 bits, and a number's share of its block's scale and of that scale's scale."""
    for block, group in ((64, None), (64, 256), (32, None), (128, 256), (64, 16)):
        what = f"bits_per_number for block_size={block}, scales_per_group={group}"
        got = _number(_asked(answer, what, block, group), what)
        one, two = 32 / block, 8 / block + (32 / (block * group) if group else 0)
        right = 4 + (two if group else one)
        wrong = {"4 bits are the codes alone: each block stores a scale too": 4.0}
        if group:
            wrong |= {
                "the scales are in 8 bits now, not 32": 4 + one,
                "the second level is missing: each group of scales has its own fp32 scale": 4 + 8 / block,
                "an fp32 scale serves a whole group of blocks, block_size · group numbers": (
                    4 + 8 / block + 32 / group
                ),
                "both levels are counted in 32 bits; the first one has 8": 4 + one + 32 / (block * group),
                "the second-level scales are fp32, 32 bits, not 8": 4 + 8 / block + 8 / (block * group),
                "scales of 8 bits and of 32 bits for every block": 4 + 8 / block + one,
                "32 / a * b is (32 / a) · b; divide by all of block_size * scales_per_group, in brackets": (
                    4 + 8 / block + one * group
                ),
                "a group's scale serves block_size · scales_per_group numbers, not their sum": (
                    4 + 8 / block + 32 / (block + group)
                ),
                "the codes' 4 bits are missing": two,
                "a code has 4 bits, not 8": 8 + two,
            }
        else:
            wrong |= {
                "without double quantization a scale takes 32 bits, not 8": 4 + 8 / block,
                "32 bits for every number: block_size of them share a scale": 4 + 32.0,
                "16 bits per scale; scales are in fp32": 4 + 16 / block,
                "4 bytes per scale are 32 bits": 4 + 4 / block,
                "the codes' 4 bits are missing": one,
                "a code has 4 bits, not 8": 8 + one,
                "upside down: block_size numbers share 32 bits": 4 + block / 32,
            }
        wrong["bytes, not bits"] = right / 8
        given = f"{got:.6g} for block_size={block}, scales_per_group={group}"
        if abs(got - right) > 1e-9:
            for message, value in wrong.items():
                require(abs(got - value) > 1e-6, f"{given}: {message}")
        require(abs(got - right) <= 1e-6, f"{given}, but should be {right:.6f}")
    return "codes, scales, and the scales' scales, for 5 settings"


def _number(value: Any, what: str) -> float:
    """A single number, in whatever type it comes."""
    number = None if isinstance(value, str | bool) else as_tensor(value)
    if value is None:
        raise CheckFailed(f"{what} is None; is a return missing?")
    if number is None or number.numel() != 1:
        raise CheckFailed(f"{what} is {type(value).__name__}, not a number")
    return float(number)


# ── exercise 6 ──


SHAPE_KEYS = "shape's keys are hidden, mlp, kv, layers, vocabulary"
BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a doubly quantized NF4 weight, its share of the scales included


def _counted_terms(config: PretrainedConfig, rank: int, length: int) -> dict[str, float]:
    """Bytes per term, from one decoder layer on the meta device, which takes no memory."""
    layers = config.num_hidden_layers
    one_layer = copy.deepcopy(config)
    one_layer.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(one_layer)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in tables]
    note = sum(rank * (m.in_features + m.out_features) for m in linear)
    return {
        "linear layers": layers * sum(m.weight.numel() for m in linear) * BITS / 8,
        "embeddings and head": sum(table.weight.numel() for table in tables) * 2,
        "notes": layers * note * 2 * 4,  # weights, gradients and AdamW's two moments, in bf16
        "checkpoints": (layers + 1)
        * length
        * config.hidden_size
        * 2,  # each layer's input, and the last output
    }


def _wrong_terms(
    hidden: int, mlp: int, kv: int, layers: int, vocabulary: int, rank: int, length: int
) -> dict[str, dict[str, float]]:
    """Term → message → the bytes that a known mistake gives."""
    attention, feed_forward = 2 * hidden * (hidden + kv), 3 * hidden * mlp
    linear, table, stream = layers * (attention + feed_forward), vocabulary * hidden, length * hidden
    no_sharing = layers * (4 * hidden * hidden + feed_forward)
    two_matrices = layers * (attention + 2 * hidden * mlp)
    sizes = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + mlp)
    notes = layers * rank * sizes
    return {
        "linear layers": {
            "bits, not bytes: divide by 8": linear * BITS,
            "4 bits are the codes alone; with their scales it is 4.127": linear / 2,
            "not doubly quantized: 4.127 bits, not 4.5": linear * 4.5 / 8,
            "2 bytes each: that is bf16, not NF4": linear * 2,
            "the scales' own scales are missing: 32 bits for 64 · 256 numbers": linear * (4 + 8 / 64) / 8,
            "one byte each; two codes share a byte": linear,
            "query and output count once each, and so do key and value": (
                layers * (hidden * (hidden + kv) + feed_forward) * BITS / 8
            ),
            "key and value are smaller: (kv, hidden), since several heads share them": no_sharing * BITS / 8,
            "an MLP has three matrices: gate, up and down": two_matrices * BITS / 8,
            "attention has four matrices, and here only its query and output are counted": (
                layers * (2 * hidden * hidden + feed_forward) * BITS / 8
            ),
            "the MLP is missing": layers * attention * BITS / 8,
            "the attention is missing": layers * feed_forward * BITS / 8,
            "that is one layer": (attention + feed_forward) * BITS / 8,
        },
        "embeddings and head": {
            "one table: the head has its own": table * 2,
            "they are missing": 0,
            "they are in bf16, not in 4 bits": 2 * table * BITS / 8,
            "fp32; they are in bf16, 2 bytes": 2 * table * 4,
            "a table is vocabulary × hidden, not hidden × hidden": 2 * hidden * hidden * 2,
            "they are there once, and not in each layer": layers * 2 * table * 2,
        },
        "notes": {
            "the notes alone; add their gradients and two moments": notes * 2,
            "notes and gradients; add the two moments": notes * 4,
            "one moment is missing: AdamW has two": notes * 6,
            "fp32; here all four are in bf16, 2 bytes each": notes * 16,
            "a note is A (rank, in) and B (out, rank), not rank × rank": layers * 7 * rank * rank * 8,
            "that is one layer": rank * sizes * 8,
            "key and value are smaller: (kv, hidden)": layers * rank * (8 * hidden + 3 * (hidden + mlp)) * 8,
            "an MLP has three matrices": layers * rank * (sizes - hidden - mlp) * 8,
            "in NF4; the notes are in bf16, 2 bytes each": notes * 4 * BITS / 8,
            "notes on all seven matrices; the MLP's three are missing": (
                layers * rank * (sizes - 3 * (hidden + mlp)) * 8
            ),
            "A alone; B (out, rank) has numbers too": layers * rank * (6 * hidden + mlp) * 8,
            "B alone; A (rank, in) has numbers too": layers * rank * (3 * hidden + 2 * kv + 2 * mlp) * 8,
        },
        "checkpoints": {
            "add the last layer's output: layers + 1 in all": layers * stream * 2,
            "bf16 has 2 bytes": (layers + 1) * stream,
            "fp32; activations are in bf16, 2 bytes": (layers + 1) * stream * 4,
            "that is one layer": stream * 2,
            "a layer's input is hidden numbers wide, not mlp": (layers + 1) * length * mlp * 2,
            "each token has an input: times the length": (layers + 1) * hidden * 2,
            "in NF4; activations are in bf16, 2 bytes": (layers + 1) * stream * BITS / 8,
            "each token keeps hidden numbers: times hidden": (layers + 1) * length * 2,
            "seven matrices, but one input for each layer": (7 * layers + 1) * stream * 2,
            "one too many: layers + 1 in all": (layers + 2) * stream * 2,
            "attention is not kept: with checkpointing nothing grows with length²": (
                (layers + 1) * length * length * 2
            ),
        },
    }


@check
def check_terms(answer: Callable[[dict[str, int], int, int], dict[str, float]]) -> str:
    """The bytes of each term, counted on transformers' own modules."""
    for name, rank, length in (
        ("Llama-3.3-70B", 16, 2048),
        ("Llama-3.1-8B", 64, 512),
        ("Mistral-7B-v0.3", 8, 1000),
    ):
        config = known_config(name)
        right = _counted_terms(config, rank, length)
        hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        kv, vocabulary = config.num_key_value_heads * config.head_dim, config.vocab_size
        shape = {"hidden": hidden, "mlp": mlp, "kv": kv, "layers": layers, "vocabulary": vocabulary}
        what = f"for {name}, rank {rank}, {length} tokens"
        got = _asked(answer, f"qlora_terms {what}", shape, rank, length, mends={"KeyError": SHAPE_KEYS})
        keys = f"qlora_terms should return a dict with the keys {', '.join(right)}"
        require(isinstance(got, dict), f"{keys}, not {type(got).__name__}")
        require(got.keys() == right.keys(), f"{keys}; it has {', '.join(map(str, got))[:80]}")
        wrong = _wrong_terms(hidden, mlp, kv, layers, vocabulary, rank, length)
        for term, value in right.items():
            given = _number(got[term], f'"{term}" {what}')
            if abs(given - value) <= 1e-4 * value:
                continue
            unit = {
                "that many GB; return bytes, and divide when you print": value / 1e9,
                "that many GiB; return bytes, and divide when you print": value / 2**30,
                "that many MB; return bytes, and divide when you print": value / 1e6,
            }
            for message, mistake in unit.items():
                fits = abs(given - mistake) <= 1e-4 * mistake
                require(not fits, f'"{term}" {what} is {given:.4g}: {message}')
            for message, mistake in wrong[term].items():
                require(
                    abs(given - mistake) > 1e-4 * mistake,
                    f'"{term}" {what} is {given / 1e9:.3f} GB: {message}',
                )
            raise CheckFailed(f'"{term}" {what} is {given / 1e9:.3f} GB, but should be {value / 1e9:.3f}')
    return "linear layers, embeddings and head, notes, checkpoints: as counted on 3 real models' modules"


@check
def check_parity(quantize: Callable, pack: Callable, dequantize: Callable) -> str:
    """Yours against bitsandbytes' own bytes, scales and numbers on the same weight."""
    weight = torch.randn(192, 256)
    codes, absmax = require_pair(quantize(weight, NF4_CODE, 64), "quantize should return (codes, absmax)")
    packed, again = pack(codes.flatten()), dequantize(codes, absmax, NF4_CODE, tuple(weight.shape))
    found = parity.nf4_against_bitsandbytes(weight, packed, absmax, again)
    same, scales, difference = found.values()
    require(same > 0.999, f"{same:.1%} of your bytes are bitsandbytes'")
    require(scales == 1, f"{scales:.1%} of your scales are bitsandbytes'")
    require(difference < 1e-5 or same < 1, f"dequantized, a number is {difference:.2g} off bitsandbytes'")
    return f"{same:.2%} of your bytes and {scales:.0%} of your scales are bitsandbytes' own"
