"""NF4: weights in 4 bits, for QLoRA (Dettmers et al. 2023, arXiv:2305.14314); its bytes are bitsandbytes'."""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spark_ft.methods.fused import NF4Product, as_in_autocast

# Sixteen values that normal numbers, scaled to ±1 in blocks, use about equally; zero is exact (appendix E).
NF4_CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0
])  # fmt: skip
SCALE_GROUP = 256  # block scales that share one scale of their own, in double quantization
CODED_AT_ONCE = defaultdict(lambda: 2**24, cpu=2**20)  # numbers to quantize or dequantize at a time; GPU, CPU
DENSE = defaultdict(lambda: 2**25, cpu=2**22)  # numbers of a weight in full precision at a time, in a product


def _scale_code() -> Tensor:
    """256 values for scales in 8 bits: ±1, 2, 4, … 64 equal steps in each of seven decades to 1; 0 and 1."""
    edges = [torch.linspace(0.1, 1, 2**e + 1) for e in range(7)]
    steps = torch.cat([10.0 ** (e - 6) * (edge[1:] + edge[:-1]) / 2 for e, edge in enumerate(edges)])
    return torch.cat([-steps, steps, torch.tensor([0.0, 1.0])]).sort().values


SCALE_CODE = _scale_code()
# Both values of each byte as one int64: one lookup fetches two fp32 numbers.
_CODE_PAIRS = torch.stack([NF4_CODE.repeat_interleave(16), NF4_CODE.repeat(16)], 1).view(torch.int64)[:, 0]
# The middles between neighbouring codes, and how many of them lie below each of 256 cells of [−1, 1]. No cell
# holds two of them; 1e-4 is more than a number that is rounded into a cell can be off.
_MIDDLES = F.pad((NF4_CODE[1:] + NF4_CODE[:-1]) / 2, (0, 1), value=torch.inf)
_BELOW = ((torch.arange(257) / 128 - 1)[:, None] - 1e-4 > _MIDDLES).sum(1, dtype=torch.int32)
_TABLES = {torch.device("cpu"): (_CODE_PAIRS, SCALE_CODE, _MIDDLES, _BELOW)}


def _on(device: torch.device) -> tuple[Tensor, ...]:
    """The tables on a device, copied there once; fake ones, which a memory plan makes, are not kept."""
    tables = _TABLES.get(device) or tuple(table.to(device) for table in _TABLES[torch.device("cpu")])
    return _TABLES.setdefault(device, tables) if type(tables[0]) is Tensor else tables


class NF4Tensor(nn.Module):
    """A weight in 4 bits per number, two to the byte, with a scale for each block of consecutive numbers.

        w = NF4_CODE[code] · absmax of its block

    With double quantization the scales are stored in 8 bits, absmax ≈ SCALE_CODE[c] · absmax₂ + offset, and
    256 of them share one absmax₂ in fp32: 4 + 8/64 + 32/(64 · 256) = 4.127 bits per number.

    Attributes:
        packed: uint8, the first of two codes in the high half.
        absmax: fp32 scales; or, doubly quantized, scale_codes (uint8), scale_absmax and offset (fp32).
        shape, dtype: of the weight that it stands for. nbytes: of all that is stored.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, block_size: int, **stored: Tensor):
        super().__init__()
        self.shape, self.dtype, self.block_size = torch.Size(shape), dtype, block_size
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # seen as integers, fp32 scales move to another device and stay fp32 when a model is cast to bf16
        def keeping_fp32(t: Tensor) -> Tensor:
            return fn(t.view(torch.int32)).view(t.dtype) if t.is_floating_point() else fn(t)

        return super()._apply(keeping_fp32, recurse)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers())

    def numel(self) -> int:
        return self.shape.numel()

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight again, coarser; in the dtype of the weight that was quantized unless told otherwise."""
        flat = torch.empty(self.numel(), dtype=dtype or self.dtype, device=self.device)
        step = CODED_AT_ONCE[self.device.type] // self.block_size * self.block_size
        for start, part in zip(range(0, len(flat), step), flat.split(step), strict=True):
            part.copy_(self._numbers(start, start + len(part)))
        return flat.view(self.shape)

    @torch.no_grad()
    def split(self, rows: int, dtype: torch.dtype = torch.float32) -> Iterator[Float[Tensor, "rows in"]]:
        """The weight (out, in) in blocks of rows, each dequantized only when it is asked for."""
        width = self.shape[1]
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            yield self._numbers(start * width, stop * width).view(-1, width).to(dtype)

    def rows_at_once(self) -> int:
        """How many rows a product dequantizes at a time: what `DENSE` allows on this device, at least one."""
        return max(1, DENSE[self.device.type] // self.shape[1])

    def _numbers(self, start: int, stop: int) -> Tensor:
        """Numbers start … stop − 1 in fp32."""
        size = self.block_size
        first, last = start // size, -(-stop // size)
        codes = self.packed[first * size // 2 : last * size // 2].to(torch.int32)
        numbers = _on(self.device)[0].index_select(0, codes).view(torch.float32)
        scales, whole = self._scales(first, last), len(numbers) // size * size
        numbers[:whole].view(-1, size).mul_(scales[: whole // size, None])
        numbers[whole:] *= scales[-1:]  # the last block may be short
        return numbers[start - first * size : stop - first * size]

    def _scales(self, first: int, last: int) -> Tensor:
        if hasattr(self, "absmax"):
            return self.absmax[first:last]
        group = torch.arange(first, last, device=self.device) // SCALE_GROUP
        codes = self.scale_codes[first:last].to(torch.int32)
        return _on(self.device)[1][codes].mul_(self.scale_absmax[group]).add_(self.offset)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {8 * self.nbytes / max(1, self.numel()):.3f} bits per number"


@torch.no_grad()
def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """The nearest code for every number of a weight of any shape, after its block is scaled to ±1.

    Args:
        weight: in any floating precision.
        block_size: numbers that share a scale; more is smaller and coarser. 64 in the paper.
        double_quant: quantize the scales too (section 3, "double quantization").

    Raises:
        ValueError: the block size is odd or not positive, or the weight is empty or holds nan or inf.
    """
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size={block_size}; two numbers share a byte: choose an even size like 64")
    if not weight.numel():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has nothing to quantize")
    step = CODED_AT_ONCE[weight.device.type] // block_size * block_size
    packed, absmax = weight.new_empty(-(-weight.numel() // 2), dtype=torch.uint8), []
    for part, two_a_byte in zip(weight.reshape(-1).split(step), packed.split(step // 2), strict=True):
        blocks = F.pad(part.float(), (0, -len(part) % block_size)).view(-1, block_size)
        largest = blocks.abs().amax(1)
        if not largest.is_meta and (~largest.isfinite()).any():
            raise ValueError("the weight holds nan or inf, for which there is no code; load it again")
        codes = _nearest(blocks * (1 / largest)[:, None])
        two_a_byte.copy_((codes[:, ::2] << 4 | codes[:, 1::2]).view(-1)[: len(two_a_byte)])
        absmax.append(largest)
    absmax = torch.cat(absmax)
    if not double_quant:
        return NF4Tensor(weight.shape, weight.dtype, block_size, packed=packed, absmax=absmax)
    offset = absmax.mean()
    groups = F.pad(absmax - offset, (0, -len(absmax) % SCALE_GROUP)).view(-1, SCALE_GROUP)
    scale_absmax = groups.abs().amax(1)
    x = (groups * (1 / scale_absmax)[:, None]).nan_to_num_(-1.0)  # −1 where the scale is 0, as bitsandbytes
    middles = ((SCALE_CODE[1:] + SCALE_CODE[:-1]) / 2).to(x.device)
    codes = torch.bucketize(x, middles, out_int32=True).to(torch.uint8).view(-1)
    scales = {"scale_codes": codes[: len(absmax)].clone(), "scale_absmax": scale_absmax, "offset": offset}
    return NF4Tensor(weight.shape, weight.dtype, block_size, packed=packed, **scales)


def _nearest(x: Tensor) -> Tensor:
    """Index of the nearest NF4 code: `torch.bucketize(x, _MIDDLES)` in a fifth of its time; changes x."""
    _, _, middles, below = _on(x.device)
    flat = x.nan_to_num_(0.0, posinf=1.0, neginf=-1.0).view(-1)  # nan: 0 · (1/0), from a block of zeros
    codes = below.index_select(0, (flat * 128).add_(128).to(torch.int32))
    return codes.add_(flat > middles.index_select(0, codes)).to(torch.uint8).view(x.shape)


class NF4Linear(nn.Module):
    """y = x Wᵀ + b with a frozen W in 4 bits, in the precision of x or the one that torch.autocast asks for.

    W is dequantized some rows at a time and never kept.
    """

    def __init__(self, weight: NF4Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int = 64, double_quant: bool = True) -> "NF4Linear":
        """Quantize a linear layer's weight; its bias stays as it is. Arguments as in `quantize_nf4`."""
        return cls(quantize_nf4(linear.weight, block_size, double_quant), linear.bias)

    def to_linear(self, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
        """A plain frozen layer with the dequantized weight, in bf16 four times as large."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.dequantize(dtype), requires_grad=False)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = NF4Product.apply(as_in_autocast(x), self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)
