"""No step that would not fit ever starts: each step's plan is held against what the machine has left."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spark_ft.memory import machine, trace
from spark_ft.memory.machine import GIB, MemoryBudget
from spark_ft.memory.plan import MemoryPlan, device_of, parts_of, plan_step, size_of
from spark_ft.memory.trace import Loss
from spark_ft.scoring import sft_loss

MARGIN = 1.01  # plans and real steps were at most 0.5% apart
LARGER = 8  # a new plan is made for an eighth more tokens, so that a handful of plans covers a run


class Guard:
    """Refuses a step before it starts where its plan needs more than the model's device has left.

    A step that is no larger than a planned one (in tokens computed, tokens scored, and the longest row) needs
    no plan of its own. Everything that the process holds already counts as there, and on a CPU, whose process
    is larger than its tensors, what is to come is multiplied by the largest ratio seen so far.

    Args:
        model, loss: what `train` trains, and by what.
        parts: parts that each step's batch is computed in.
    """

    def __init__(self, model: nn.Module, loss: Loss = sft_loss, parts: int = 1):
        self.model, self.loss, self.parts = model, loss, parts
        self.device = device_of(model)
        self.plans: list[tuple[tuple[int, ...], MemoryPlan]] = []
        self.ratio, self.steps, self.blind = 1.0, 0, False
        self._at_start = 0  # what the process held before the first step
        self._before = 0, 0  # what the process held before the step, and the most that it ever had
        self._expected = 0  # bytes of tensors that the coming step will make, where it was planned itself

    def check(self, batch: dict[str, Tensor]) -> None:
        """Plan the step where no plan covers it, and raise if it would not fit.

        Raises:
            MemoryError: says how much is missing, and which term of the plan can be cut, and how.
        """
        size = tuple(max(sizes) for sizes in zip(*map(size_of, parts_of(batch, self.parts)), strict=True))
        self._expected = 0
        if not self.steps:
            self._at_start = machine.held(self.device, anonymous=True)
        self._before = machine.held(self.device), machine.high_water_mark(self.device) or 0
        if (
            self.blind
            or self._room() is None
            or any(_covers(planned, size) and self._fits(it) for planned, it in self.plans)
        ):
            return
        for larger in (True, False):  # a larger plan that does not fit says nothing about this step
            try:
                with _garbage_collected():  # the plan's copy of the model is full of cycles
                    it = plan_step(self.model, _stretched(batch) if larger else batch, self.loss, self.parts)
            except Exception as error:  # whatever a loss does with numbers that a plan does not have
                if larger:  # it may be the larger batch alone that makes no sense
                    continue
                told = f"this step can't be planned, so its memory is not watched: {error}"
                warnings.warn(told, stacklevel=3)
                self.blind = True
                return
            self.plans.append((tuple(n + n // LARGER if larger else n for n in size), it))
            self._expected = self._to_come(it)
            if self._fits(it):
                return
        machine.give_back_caches(self.device)
        if not self._fits(it):
            room = self._room()
            raise MemoryError(
                f"this step would take {self._needed(it) / 1e9:.1f} GB more than the process holds, "
                f"and there are {room.available / 1e9:.1f} GB ({room}). {cut_advice(it)}; or set "
                "ignore_budget=True"
            )

    def stepped(self) -> None:
        """Tell the guard that the step is over: what the process took is compared with what was planned."""
        self.steps += 1
        before, mark = self._before
        peak = machine.high_water_mark(self.device)
        if self._expected and peak is not None and peak > mark:
            self.ratio = max(self.ratio, (peak - before) / self._expected)

    def _room(self) -> MemoryBudget | None:
        room = machine.budget(self.device)
        return None if room.available is None else room

    def _fits(self, it: MemoryPlan) -> bool:
        return self._needed(it) <= self._room().available

    def _needed(self, it: MemoryPlan) -> float:
        held = machine.held(self.device, anonymous=True)
        there = self._there(it)
        unread = max(
            0, there - held
        )  # weights that are only mapped from a file come into memory with the first step
        # what the process has grown by since the first step, moments aside, it keeps for what comes next
        freed = max(0, held - self._at_start - (there - self._weights(it))) if self.steps else 0
        return MARGIN * self.ratio * self._to_come(it) + unread - freed

    def _to_come(self, it: MemoryPlan) -> int:
        return it.peak - it.terms.get(trace.CONTEXT, 0) - self._there(it)

    def _there(self, it: MemoryPlan) -> int:
        """Bytes of tensors that are there before the step: weights, and after a first step the optimizer's
        moments."""
        terms = it.moments[trace.START]
        return self._weights(it) + (terms.get(trace.MOMENTS, 0) if self.steps else 0)

    def _weights(self, it: MemoryPlan) -> int:
        return sum(size for kind, size in it.moments[trace.START].items() if kind in trace.WEIGHTS)


@contextmanager
def _garbage_collected() -> Iterator[None]:
    """Collect what became garbage inside. Older objects are not looked at: that would take half a second."""
    mine = gc.get_freeze_count() == 0
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if mine:
            gc.unfreeze()


def _covers(planned: tuple[int, ...], size: tuple[int, ...]) -> bool:
    *sizes, alike = zip(planned, size, strict=True)
    return alike[0] == alike[1] and all(a >= b for a, b in sizes)


def _stretched(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with every eighth column twice: an eighth more tokens, prompts and answers in the same
    proportion."""
    if not any(name.endswith("_mask") for name in batch):  # not made of tokens, as far as can be seen
        return batch
    stretched = {}
    for name, x in batch.items():
        if x.dim() > 1:
            length = x.shape[1]
            columns = torch.arange(length + length // LARGER + 1) * length // (length + length // LARGER + 1)
            x = x[:, columns]
        stretched[name] = x
    return stretched


def fit_report(it: MemoryPlan, room: MemoryBudget) -> str:
    """In words, whether the plan's peak fits what is available, and if not, what to cut."""
    if room.available is None:
        return f"unknown: {room}"
    spare = room.available - it.peak
    if spare >= 0:
        return f"fits, {spare / GIB:.1f} GiB to spare: {room}"
    return f"does not fit, {-spare / GIB:.1f} GiB missing: {room}. {cut_advice(it)}"


def cut_advice(it: MemoryPlan) -> str:
    """In words, the largest term of a plan that can be made smaller, and how."""
    adapted = it.settings["method"] != "full"
    fewer = "compute fewer rows at once" if it.settings["rows"] > 1 else "shorten the rows"
    smaller = "use a smaller rank" if adapted else "train adapters instead (add_adapters)"
    quantize = 'load the model in 4 bits (quantize="nf4")'
    in_4_bits = adapted and it.settings["linear layers"] != "nf4"
    how = {
        **({trace.LINEAR: quantize, trace.EXPERTS: quantize} if in_4_bits else {}),
        trace.GRADIENTS: smaller,
        trace.MOMENTS: smaller,
        trace.SAVED: "turn checkpointing on (model.activation_checkpointing_enable())",
        **dict.fromkeys(
            (trace.CHECKPOINTS, trace.RECOMPUTED, trace.PASSING, trace.LOGITS, trace.INDICES), fewer
        ),
    }
    name = max((name for name in it.terms if name in how), key=it.terms.get)
    return f"The largest term that can be cut: {name}, {it.terms[name] / 1e9:.1f} GB; {how[name]}"
