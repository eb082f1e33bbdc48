"""What the reference model says of an answer: computed once, and kept for as long as it is the same model."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from spark_ft.adapters import adapted_layers, adapters_disabled
from spark_ft.memory.tracker import real_tensors
from spark_ft.methods.fused import at_least_fp32
from spark_ft.methods.lora import LoRALinear
from spark_ft.scoring import Batch, answer_logps, evaluating

LANES = 64  # every 64th eight bytes of a tensor have a checksum of their own
SMALL = 2**20  # bytes of a tensor whose every lane is looked at in every step


class ReferenceLogps:
    """Σ log π_ref of answers, computed once per sequence and kept, under a hash of its ids and the weights.

    The reference is the model in eval mode with its adapters off, so an adapter that was trained before, in
    SFT, is to be merged first (`merge_adapters`). For a model without adapters give a frozen copy of it.

    Every number of the weights is in the hash. All are read again when a tensor, its place or its version
    differs. And in every step one of 64 checksums of each large tensor is compared, so that a write through
    `.data`, which counts no version, is seen: at once where it changes 512 bytes in a row, else within 64
    steps.

    Args:
        model: the reference, where it is not the trained model with its adapters off.
    """

    def __init__(self, model: nn.Module | None = None):
        self.model = model
        self.kept: dict[bytes, float] = {}
        self._weights = Fingerprint()

    def __call__(self, model: nn.Module, parts: list[Batch], sides: Sequence[str]) -> list[Tensor]:
        """(sides, B) for each of the batches.

        Raises:
            ValueError: no adapters and no model of its own; or something else than adapters trains.
        """
        scorer = getattr(model, "reference_model", None) or self.model or model  # the first in a memory plan
        if scorer is model and (why := _moves(model)):
            raise ValueError(why)
        if isinstance(next(model.parameters()), FakeTensor):  # numbers that do not exist are not kept
            return [_score(scorer, model, part, sides) for part in parts]
        weights, dtype = self._weights(scorer), at_least_fp32(next(scorer.parameters()).dtype)
        found = []
        for part in parts:
            keys = [_hashes(part, side, weights) for side in sides]
            missing = [i for i, row in enumerate(zip(*keys, strict=True)) if not self.kept.keys() >= {*row}]
            if missing:
                rows = {name: x[missing] for name, x in part.items()}
                for side, logps in zip(keys, _score(scorer, model, rows, sides).tolist(), strict=True):
                    self.kept |= zip([side[i] for i in missing], logps, strict=True)
            numbers = [[self.kept[key] for key in side] for side in keys]
            found.append(torch.tensor(numbers, dtype=dtype, device=part["prompt_ids"].device))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, as tensors of bytes and numbers."""
        keys = torch.tensor([list(key) for key in self.kept], dtype=torch.uint8)
        return {"keys": keys, "logps": torch.tensor([*self.kept.values()], dtype=torch.float64)}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Keep what `tensors` gave too."""
        keys = (bytes(key) for key in tensors["keys"].tolist())
        self.kept |= dict(zip(keys, tensors["logps"].tolist(), strict=True))


def _score(scorer: nn.Module, model: nn.Module, batch: Batch, sides: Sequence[str]) -> Tensor:
    off = adapters_disabled(model) if scorer is model else nullcontext()
    with torch.no_grad(), evaluating(scorer), off:
        return answer_logps(scorer, batch, sides)[0]


def _moves(model: nn.Module) -> str:
    """Why the model with its adapters off would be no reference; empty if it is one."""
    layers = adapted_layers(model)
    if not layers:
        mend = "add adapters (add_adapters), or give reference=ReferenceLogps(a frozen copy of the model)"
        return f"without adapters the model has no reference; {mend}"
    own = {id(p) for layer in layers.values() for p in layer.parameters()}
    moving = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    mend = "freeze it, or give reference=ReferenceLogps(a frozen copy of the model)"
    return f"{moving[0]} trains beside the adapters and would move the reference; {mend}" if moving else ""


def _hashes(batch: Batch, side: str, weights: bytes) -> list[bytes]:
    """A key for each row: of the reference's weights, the prompt's ids and the answer's."""
    names = [f"{part}_{what}" for part in ("prompt", side) for what in ("ids", "mask")]
    hashes = []
    for prompt, real, answer, said in zip(*(batch[name].cpu() for name in names), strict=True):
        prompt, answer = prompt[real.bool()], answer[said.bool()]
        ids = torch.cat([torch.tensor([len(prompt)]), prompt, answer])
        hashes.append(blake2b(weights + ids.numpy().tobytes(), digest_size=16).digest())
    return hashes


class Fingerprint:
    """A hash of every number that a model computes with, adapters aside; quick while it stays the same."""

    def __init__(self):
        self._seen: list = []  # which tensors, their places and versions, when all numbers were read
        self._sums: list[Tensor] = []
        self._looks, self._digest = 0, b""

    def __call__(self, model: nn.Module) -> bytes:
        """The hash, of 16 bytes."""
        tensors = list(_numbers(model))
        about = f"{type(model)}{getattr(model, 'config', '')}"
        seen = [about, *((id(x), x.data_ptr(), x.is_inference() or x._version) for x in tensors)]
        self._looks += 1
        if seen != self._seen or not self._looks_equal(tensors):
            self._seen, self._sums = seen, [_checksums(x) for x in tensors]
            digest = blake2b(about.encode(), digest_size=16)
            for x, sums in zip(tensors, self._sums, strict=True):
                digest.update(f"{tuple(x.shape)}{x.dtype}".encode() + sums.cpu().numpy().tobytes())
            self._digest = digest.digest()
        return self._digest

    def _looks_equal(self, tensors: list[Tensor]) -> bool:
        lane = self._looks % LANES
        return all(
            torch.equal(_checksums(x), then) if x.nbytes <= SMALL else _words(x)[:, lane].sum() == then[lane]
            for x, then in zip(tensors, self._sums, strict=True)
        )


def _numbers(model: nn.Module) -> Iterator[Tensor]:
    seen = set()
    for module in model.modules():
        for x in () if isinstance(module, LoRALinear) else real_tensors(module):
            if id(x) not in seen:
                seen.add(id(x))
                yield x


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _words(x: Tensor) -> Tensor:
    """The tensor's bytes, eight by eight, in rows of 64; those left over are not among them."""
    return _bytes(x)[: x.nbytes // (8 * LANES) * (8 * LANES)].view(torch.int64).view(-1, LANES)


def _checksums(x: Tensor) -> Tensor:
    """The sum of each lane, modulo 2⁶⁴, and the bytes left over."""
    words = _words(x)
    return torch.cat([words.sum(0), _bytes(x)[words.nbytes :].long()])
