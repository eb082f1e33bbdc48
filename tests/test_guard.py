"""No step that would not fit begins: on a pretended machine that holds exactly what the tracker counts."""

import random
import warnings

import pytest
import torch
from helpers import pair_batch, thumb_batch, tiny_llama, token_batch
from torch import nn

from spark_ft import dpo_loss, feedback_loss, kto_loss, preference_loss
from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.memory import guard as guard_module
from spark_ft.memory import machine
from spark_ft.memory.guard import Guard, cut_advice, fit_report
from spark_ft.memory.machine import DGX_SPARK, GIB, MemoryBudget
from spark_ft.memory.plan import MemoryPlan, plan_step, size_of
from spark_ft.memory.trace import ADAPTERS, CHECKPOINTS, LINEAR, LOGITS, MOMENTS, START
from spark_ft.memory.tracker import Tracker, real_tensors
from spark_ft.scoring import sft_loss
from spark_ft.training import TrainConfig, train


def left(monkeypatch, size):
    """From now on the machine has so many bytes left, and the process has never held anything."""
    monkeypatch.setattr(machine, "budget", lambda device=None: MemoryBudget("cpu", False, 64 * GIB, size, 0))


def model(layers=4, **changes):
    return add_adapters(tiny_llama(num_hidden_layers=layers, **changes), AdapterConfig(rank=4)).train()


class Pretended:
    """A unified machine with `total` bytes and nothing on it but what the tracker counts."""

    def __init__(self, monkeypatch, model, total):
        self.tracker, self.total, self.peaks = Tracker(), total, []
        for tensor in {id(x): x for module in model.modules() for x in real_tensors(module)}.values():
            self.tracker.count(tensor, "held")
        monkeypatch.setattr(machine, "budget", lambda device=None: self.budget())
        monkeypatch.setattr(machine, "held", lambda device, anonymous=False: self.tracker.now)
        monkeypatch.setattr(machine, "high_water_mark", lambda device: None)

    def budget(self):
        return MemoryBudget("pretended", True, self.total, self.total - self.tracker.now, 0)


def lengths_that_run(monkeypatch, schedule, total):
    """(lengths of the steps that began, the real peak of each, the length that was refused or None)."""
    trained = model(2, hidden_size=32)
    pretended = Pretended(monkeypatch, trained, total)
    begun, peaks = [], []

    def loss(model, batch):
        real = (isinstance(p, nn.Parameter) and type(p.data) is torch.Tensor for p in model.parameters())
        if not all(real):
            return sft_loss(model, batch)  # the plan's own run
        begun.append(batch["input_ids"].shape[1])
        pretended.tracker.peak = pretended.tracker.now
        return sft_loss(model, batch)

    def batches(step):
        if begun:
            peaks.append(pretended.tracker.peak)
        return token_batch(rows=2, length=schedule[step])

    try:
        with pretended.tracker:
            train(trained, batches, loss, TrainConfig(len(schedule), progress=False))
    except MemoryError:
        return begun, peaks, schedule[len(begun)]
    return begun, [*peaks, pretended.tracker.peak], None


@pytest.mark.slow
def test_random_schedules_start_all_steps_that_fit_and_no_others(monkeypatch):
    trained = model(2, hidden_size=32)
    need = {n: plan_step(trained, token_batch(rows=2, length=n)).peak for n in range(12, 204, 12)}
    known = {}

    def planned_once(model, batch, *how):
        """The plan of a step, made once for a batch: the model is the same in every schedule."""
        key = *how[1:], *(tuple(x.flatten().tolist()) for x in batch.values())
        if key not in known:
            known[key] = plan_step(model, batch, *how)
        return known[key]

    monkeypatch.setattr(guard_module, "plan_step", planned_once)
    rng = random.Random(0)
    refusals = 0
    for _ in range(100):
        schedule = [rng.randrange(12, 204, 12) for _ in range(3)]
        total = need[rng.randrange(48, 204, 12)] + rng.randrange(-1000, 1000)
        with monkeypatch.context() as patched:
            begun, peaks, refused = lengths_that_run(patched, schedule, total)
        assert max(peaks, default=0) <= total, (schedule, total, begun)
        if refused is not None:
            refusals += 1
            assert need[refused] > total / 1.1, (schedule, total, refused)
    assert 20 < refusals < 80


def test_the_step_that_is_too_long_is_refused_by_its_largest_term_and_the_model_is_as_it_was(monkeypatch):
    trained = model()
    short, long = (token_batch(rows=4, length=n) for n in (20, 200))
    peaks = [plan_step(trained, batch).peak for batch in (short, long)]
    here = sum(plan_step(trained, short).moments[START].values())
    left(monkeypatch, sum(peaks) // 2 - here)
    monkeypatch.setattr(machine, "held", lambda device, anonymous=False: here)
    monkeypatch.setattr(machine, "high_water_mark", lambda device: None)
    seen = []
    with pytest.raises(MemoryError, match="saved activations"):
        train(trained, lambda i: seen.append(i) or (short, long)[i], sft_loss, TrainConfig(2, progress=False))
    assert seen == [0, 1]
    trained, rows = model(), token_batch(rows=8, length=64)
    before = [p.clone() for p in trained.parameters()]
    left(monkeypatch, 100_000)
    with pytest.raises(MemoryError) as refused:
        train(trained, lambda _: rows, sft_loss, TrainConfig(1, progress=False))
    for part in ("saved activations", "activation_checkpointing_enable", "ignore_budget=True"):
        assert part in str(refused.value)
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), before, strict=True))
    assert not trained.training
    settings = TrainConfig(1, progress=False, ignore_budget=True)
    assert len(train(trained, lambda _: rows, sft_loss, settings).losses) == 1


def test_parts_that_fit_are_not_refused(monkeypatch):
    trained, rows = model(), token_batch(rows=8, length=64)
    plans = [plan_step(trained, rows, sft_loss, n) for n in (1, 8)]
    here = sum(plans[0].moments[START].values())
    monkeypatch.setattr(machine, "held", lambda device, anonymous=False: here)
    left(monkeypatch, (plans[0].peak + plans[1].peak) // 2 - here)
    with pytest.raises(MemoryError):
        Guard(trained, sft_loss, 1).check(rows)
    Guard(trained, sft_loss, 8).check(rows)


def test_a_step_is_covered_only_by_a_plan_that_is_larger_in_every_way(monkeypatch):
    left(monkeypatch, 64 * GIB)
    guard, first = Guard(model()), token_batch(rows=4, length=40)
    fewer_learned = token_batch(rows=2, length=150)
    fewer_learned["labels"][:, :-1] = -100
    for batch in (first, first, fewer_learned):
        guard.check(batch)
    assert len(guard.plans) == 2


def test_pairs_and_thumbs_are_watched_as_rows_are(monkeypatch):
    for loss, make in ((preference_loss(dpo_loss), pair_batch), (feedback_loss(kto_loss), thumb_batch)):
        left(monkeypatch, 64 * GIB)
        guard = Guard(model(), loss)
        with warnings.catch_warnings(action="error"):
            for batch in (make(), make(seed=1), {name: x[:2] for name, x in make().items()}):
                guard.check(batch)
        assert len(guard.plans) == 1
        assert not loss.reference.kept
        left(monkeypatch, 1000)
        with pytest.raises(MemoryError, match="ignore_budget=True"):
            guard.check({name: x.repeat(9, *[1] * (x.dim() - 1)) for name, x in make().items()})


def test_fewer_real_tokens_of_a_larger_shape_cover_nothing():
    ragged, even = token_batch(rows=4, length=40), token_batch(rows=4, length=36)
    even["attention_mask"] = torch.ones_like(even["attention_mask"])  # packed rows leave the padding out
    larger, smaller = size_of(ragged), size_of(even)
    assert larger[0] > smaller[0]
    assert larger[1] < smaller[1]


def test_a_handful_of_plans_covers_a_run(monkeypatch):
    left(monkeypatch, 64 * GIB)
    guard = Guard(model())
    rng = random.Random(0)
    for step in range(60):
        guard.check(token_batch(seed=step, rows=4, length=rng.randrange(60, 90)))
    assert len(guard.plans) <= 8


def test_caches_are_given_back_before_a_step_is_refused(monkeypatch):
    given = []
    left(monkeypatch, 1)

    def give_back(device):
        given.append(device)
        left(monkeypatch, 64 * GIB)

    monkeypatch.setattr(machine, "give_back_caches", give_back)
    Guard(model()).check(token_batch())
    assert len(given) == 1


def test_a_process_that_is_larger_than_its_tensors_is_known_after_a_step(monkeypatch):
    left(monkeypatch, 64 * GIB)
    trained, marks = model(), iter([100, 100 + 3 * 10**9])
    monkeypatch.setattr(machine, "held", lambda device, anonymous=False: 100)
    monkeypatch.setattr(machine, "high_water_mark", lambda device: next(marks))
    guard = Guard(trained)
    guard.check(token_batch())
    guard.stepped()
    assert guard.ratio > 100
    left(monkeypatch, 10**9)
    monkeypatch.setattr(machine, "high_water_mark", lambda device: None)
    with pytest.raises(MemoryError):
        guard.check(token_batch(rows=3, length=40))


def test_unknown_memory_refuses_nothing_and_a_loss_that_cannot_be_planned_is_told(monkeypatch):
    left(monkeypatch, None)
    Guard(model()).check(token_batch())
    left(monkeypatch, 64 * GIB)
    trained = nn.Linear(2, 2)

    def reads_numbers(model, batch):
        return model(batch["x"][: len(model.weight.nonzero())]).sum(), 1

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(trained, lambda _: {"x": torch.ones(4, 2)}, reads_numbers, TrainConfig(2, progress=False))
    assert [str(w.message)[:26] for w in told] == ["this step can't be planned"]


def plan(method, rows=2, **terms):
    layers = "nf4" if method == "qlora" else "bf16"
    return MemoryPlan(terms, "", {"method": method, "linear layers": layers, "rows": rows}, {}, 0, 0)


def test_a_report_says_what_fits_what_to_cut_and_what_is_unknown():
    for planned, says in (
        (plan("lora", **{LINEAR: 9, LOGITS: 1}), 'load the model in 4 bits (quantize="nf4")'),
        (plan("full", **{LINEAR: 9, MOMENTS: 8}), "train adapters instead (add_adapters)"),
        (plan("qlora", 1, **{CHECKPOINTS: 3, ADAPTERS: 9}), "shorten the rows"),
        (plan("qlora", 2, **{CHECKPOINTS: 3}), "compute fewer rows at once"),
    ):
        assert cut_advice(planned).endswith(says)
    assert "logits" in cut_advice(plan("qlora", **{LINEAR: 9, LOGITS: 1}))
    much = plan("lora", **{LINEAR: 200 * GIB})
    assert fit_report(plan("lora", **{LINEAR: GIB}), DGX_SPARK).startswith("fits, 110.7 GiB to spare")
    assert fit_report(much, DGX_SPARK).startswith("does not fit, 88.3 GiB missing")
    assert fit_report(much, MemoryBudget("mps", False, None, None, 0)).startswith("unknown")
