"""NF4: weights in 4 bits, for QLoRA (Dettmers et al. 2023, arXiv:2305.14314); the same bytes that bitsandbytes makes."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Sixteen values that a normal distribution, scaled to ±1 block by block, fills about equally; zero is exact (appendix E).
NF4_CODE = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
SCALES = 256  # scales of blocks that share one scale of their own, in double quantization
CHUNK = 2**20  # numbers quantized or dequantized at a time: what that needs beside its result stays small
DENSE = {"cpu": 2**22, "cuda": 2**25}  # numbers of a weight in full precision at a time, in a product


def _scale_code() -> Tensor:
    """256 values in ±1 for scales in 8 bits: decimal exponents −6 to 0, with 1, 2, 4, … 64 equal steps in each; 0 and 1."""
    edges = [torch.linspace(0.1, 1, 2**e + 1) for e in range(7)]
    steps = torch.cat([10.0 ** (e - 6) * (edge[1:] + edge[:-1]) / 2 for e, edge in enumerate(edges)])
    return torch.cat([-steps, steps, torch.tensor([0.0, 1.0])]).sort().values


SCALE_CODE = _scale_code()


class NF4Tensor(nn.Module):
    """A weight in 4 bits a number, two to the byte, with a scale for each block of consecutive numbers, row after row.

        w = NF4_CODE[code] · absmax of its block

    With double quantization the scales are stored in 8 bits, absmax ≈ SCALE_CODE[c] · absmax₂ + offset, and 256 of them
    share one absmax₂ in fp32: 4 + 8/64 + 32/(64 · 256) = 4.127 bits a number.

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
        return super()._apply(
            lambda t: fn(t.view(torch.int32)).view(t.dtype) if t.is_floating_point() else fn(t), recurse
        )

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
        """The weight again, coarser; `dtype` default that of the weight that was quantized."""
        flat = torch.empty(self.numel(), dtype=dtype or self.dtype, device=self.device)
        step = CHUNK // self.block_size * self.block_size
        for start in range(0, len(flat), step):
            part = flat[start : start + step]
            part.copy_(self._numbers(start, start + len(part)))
        return flat.view(self.shape)

    @torch.no_grad()
    def split(self, rows: int, dtype: torch.dtype = torch.float32) -> Iterator[Float[Tensor, "rows in"]]:
        """The weight (out, in) in blocks of rows, each dequantized only when it is asked for."""
        width = self.shape[1]
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            yield self._numbers(start * width, stop * width).view(-1, width).to(dtype)

    def _numbers(self, start: int, stop: int) -> Tensor:
        """Numbers start … stop − 1 in fp32."""
        size = self.block_size
        first, last = start // size, -(-stop // size)
        codes = self.packed[first * size // 2 : last * size // 2].to(torch.int32)
        numbers = _code_pairs(self.device).index_select(0, codes).view(torch.float32)
        scales, whole = self._scales(first, last), len(numbers) // size * size
        numbers[:whole].view(-1, size).mul_(scales[: whole // size, None])
        numbers[whole:] *= scales[-1:]  # the last block may be short
        return numbers[start - first * size : stop - first * size]

    def _scales(self, first: int, last: int) -> Tensor:
        if hasattr(self, "absmax"):
            return self.absmax[first:last]
        which = torch.arange(first, last, device=self.device) // SCALES
        codes = self.scale_codes[first:last].to(torch.int32)
        return SCALE_CODE.to(self.device)[codes].mul_(self.scale_absmax[which]).add_(self.offset)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {8 * self.nbytes / max(1, self.numel()):.3f} bits a number"


@lru_cache
def _code_pairs(device: torch.device) -> Tensor:
    """Of each byte both values, as one int64: one lookup fetches two fp32 numbers."""
    pairs = torch.stack([NF4_CODE.repeat_interleave(16), NF4_CODE.repeat(16)], 1)
    return pairs.view(torch.int64).squeeze(1).to(device)


@torch.no_grad()
def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """The nearest code for every number of a weight of any shape, after each block is scaled to ±1 by its largest.

    Args:
        weight: in any floating precision.
        block_size: numbers that share a scale; more is smaller and coarser. 64 in the paper.
        double_quant: quantize the scales too (section 3, "double quantization").

    Raises:
        ValueError: the block size is odd or not positive, or the weight is empty or holds nan or inf.
    """
    if block_size < 2 or block_size % 2:
        raise ValueError(
            f"block_size={block_size}; two numbers share a byte, so choose an even size, such as 64"
        )
    if not weight.numel():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has nothing to quantize")
    step = CHUNK // block_size * block_size
    packed, absmax = weight.new_empty(-(-weight.numel() // 2), dtype=torch.uint8), []
    for part, two_a_byte in zip(weight.reshape(-1).split(step), packed.split(step // 2), strict=True):
        blocks = F.pad(part.float(), (0, -len(part) % block_size)).view(-1, block_size)
        largest = blocks.abs().amax(1)
        if not largest.isfinite().all():
            raise ValueError(
                "the weight holds nan or inf, which no code stands for; look where it comes from"
            )
        codes = _nearest(blocks * (1 / largest)[:, None], NF4_CODE)
        two_a_byte.copy_((codes[:, ::2] << 4 | codes[:, 1::2]).view(-1)[: len(two_a_byte)])
        absmax.append(largest)
    absmax = torch.cat(absmax)
    if not double_quant:
        return NF4Tensor(weight.shape, weight.dtype, block_size, packed=packed, absmax=absmax)
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % SCALES)).view(-1, SCALES)
    scale_absmax = blocks.abs().amax(1)
    scale_codes = (
        _nearest(blocks * (1 / scale_absmax)[:, None], SCALE_CODE, of_zeros=-1.0)
        .view(-1)[: len(absmax)]
        .clone()
    )
    scales = {"scale_codes": scale_codes, "scale_absmax": scale_absmax, "offset": offset}
    return NF4Tensor(weight.shape, weight.dtype, block_size, packed=packed, **scales)


def _nearest(x: Tensor, code: Tensor, of_zeros: float = 0.0) -> Tensor:
    """Index of the nearest value of a sorted code, the lower of two equally near; uint8.

    A block of zeros comes as nan, 0 · (1/0), and counts as `of_zeros`: its scale is zero, any code will do, and this one is
    bitsandbytes'.
    """
    code = code.to(x.device)
    return torch.bucketize(x.nan_to_num_(of_zeros), (code[1:] + code[:-1]) / 2, out_int32=True).to(
        torch.uint8
    )


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is an `NF4Tensor`; it computes in the precision of its input.

    Forward and backward dequantize some rows at a time and keep none of them.
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
        """A plain frozen layer with the dequantized weight: 2 bytes a number in bf16, where there was half a one."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.dequantize(dtype), requires_grad=False)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        out = _NF4Product.apply(x, self.weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class _NF4Product(torch.autograd.Function):
    """x Wᵀ; backward dequantizes W again, since in 4 bits it is there anyway."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        x2 = x.flatten(0, -2) if x.dim() > 1 else x[None]
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        rows = _rows_at_once(weight)
        out2 = out.view(len(x2), weight.shape[0])
        for columns, W in zip(out2.split(rows, dim=1), weight.split(rows, x.dtype), strict=True):
            torch.mm(x2, W.T, out=columns)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad2 = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
        grad_x = grad.new_zeros(len(grad2), ctx.weight.shape[1])
        rows = _rows_at_once(ctx.weight)
        for columns, W in zip(grad2.split(rows, dim=1), ctx.weight.split(rows, grad.dtype), strict=True):
            grad_x.addmm_(columns, W)
        return grad_x.view(*grad.shape[:-1], grad_x.shape[1]), None


def _rows_at_once(weight: NF4Tensor) -> int:
    return max(1, DENSE["cpu" if weight.device.type == "cpu" else "cuda"] // weight.shape[1])
