"""The machine's memory against fakes of other machines, and what a block of code took."""

from types import SimpleNamespace

import pytest
import torch

from spark_ft.memory import machine
from spark_ft.memory.machine import GIB, MemoryBudget, budget, measure
from spark_ft.memory.tracker import Tracker


def system(monkeypatch, total, available):
    memory = SimpleNamespace(total=total, available=available)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)


def unknown(error):
    def raises(*_):
        raise error

    return raises


def gpu(monkeypatch, integrated, total, free, cached=0):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(name="says nothing", is_integrated=integrated, total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: cached + 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)


@pytest.fixture
def container(monkeypatch, tmp_path):
    """A root folder of its own; returns a function that writes files into it."""
    monkeypatch.setattr(machine, "_ROOT", tmp_path)

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text))

    return write


def limited(folder, limit, used, cache):
    """The files of a control group, version 2, with inactive pages of the file cache."""
    stat = f"anon 5\ninactive_file {cache}\nactive_file 7\n"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def test_a_unified_gpu_goes_by_what_the_kernel_calls_available_not_by_what_it_tells(monkeypatch, container):
    gpu(monkeypatch, True, round(119.7 * GIB), round(41.5 * GIB))
    system(monkeypatch, round(119.7 * GIB), round(115.7 * GIB))
    group = {"proc/self/cgroup": "0::/\n", **limited("sys/fs/cgroup", 10 * GIB, GIB, 0)}
    container(group)  # which holds no CUDA memory
    room = budget()
    assert (room.device, room.unified) == ("cuda:0", True)
    assert room.free == round(115.7 * GIB)
    assert room.available == round(115.7 * GIB) - 8 * GIB
    assert room.total == round(119.7 * GIB)
    gpu(monkeypatch, True, round(119.7 * GIB), round(41.5 * GIB), cached=2 * GIB)
    assert budget().free == round(115.7 * GIB) + 2 * GIB  # torch's own cache is no part of MemAvailable
    gpu(monkeypatch, True, 0, 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", unknown(RuntimeError("not supported")))
    system(monkeypatch, 120 * GIB, 100 * GIB)
    assert budget().available == 92 * GIB


def test_a_discrete_card_goes_by_the_driver_and_by_what_torch_has_cached(monkeypatch):
    gpu(monkeypatch, False, 80 * GIB, 70 * GIB, cached=3 * GIB)
    system(monkeypatch, 500 * GIB, 400 * GIB)
    room = budget("cuda")
    assert room == MemoryBudget("cuda:0", False, 80 * GIB, 73 * GIB, GIB // 2)
    assert room.available == 73 * GIB - GIB // 2
    assert budget("cuda:0", reserve=0).available == 73 * GIB


def test_a_processor_goes_by_what_is_available_and_more_in_reserve_leaves_nothing(monkeypatch, container):
    system(monkeypatch, 16 * GIB, 10 * GIB)
    container({})
    assert budget("cpu") == MemoryBudget("cpu", False, 16 * GIB, 10 * GIB, GIB // 2)
    assert budget("cpu", reserve=11 * GIB).available == 0


LIMITED = (8 * GIB, 5 * GIB, 2 * GIB)  # 5 used, 2 of them page cache that goes when room is needed
VERSION_1 = {
    "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": LIMITED[0],
    "sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes": LIMITED[1],
    "sys/fs/cgroup/memory/docker/1/memory.stat": f"inactive_file 1\ntotal_inactive_file {LIMITED[2]}\n",
}
UNLIMITED = limited("sys/fs/cgroup/a/b", "max", 4 * GIB, 0)


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/\n", limited("sys/fs/cgroup", *LIMITED)),
        ("0::/user/me\n", limited("sys/fs/cgroup/user", *LIMITED)),  # a parent's limit holds
        ("0::/host/path\n", limited("sys/fs/cgroup", *LIMITED)),  # the path outside is not here
        ("12:cpu:/x\n4:memory:/docker/1\n0::/\n", VERSION_1),
        ("0::/a/b\n", limited("sys/fs/cgroup/a", *LIMITED) | UNLIMITED),
    ],
)
def test_a_container_has_the_room_under_its_limit(monkeypatch, container, cgroup, files):
    container({"proc/self/cgroup": cgroup, **files})
    for (total, available), expected in (((64, 60), (8, 5)), ((4, 3), (4, 3))):  # the machine may have less
        system(monkeypatch, total * GIB, available * GIB)
        assert (budget("cpu").total, budget("cpu").free) == tuple(n * GIB for n in expected)


def test_what_is_unknown_is_unknown(monkeypatch, container):
    container({})
    monkeypatch.setattr(machine.psutil, "virtual_memory", unknown(OSError("no /proc")))
    room = budget("cpu")
    assert (room.total, room.free, room.available) == (None, None, None)
    assert "an unknown amount available" in str(room)
    gpu(monkeypatch, False, 0, 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", unknown(RuntimeError("not supported")))
    assert budget("cuda").available is None
    assert budget("mps").available is None


@pytest.mark.parametrize("process", [False, True])
def test_measure_sees_memory_that_is_gone_again(process):
    with measure("cpu", process) as quiet:
        sum(range(1000))
    with measure("cpu", process) as greedy:
        held = torch.ones(50_000_000)
        del held
    assert greedy.extra == pytest.approx(200e6, rel=0.1)
    assert quiet.extra < 10e6


def test_measure_on_cuda_is_the_allocators_peak_and_a_mapped_file_is_no_memory(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: said.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 350)
    with measure("cuda") as memory_of_block:
        said.append("block")
    assert (memory_of_block.extra, said) == (250, ["reset", "block"])
    torch.from_file(str(tmp_path / "numbers"), True, 25_000_000).fill_(1.0)
    with measure("cpu", process=True) as process:
        mapped = torch.from_file(str(tmp_path / "numbers"), False, 25_000_000)
        mapped.sum()
    assert process.extra < 20e6


def test_the_tracker_counts_new_memory_once_what_replays_make_and_their_products():
    given = torch.ones(1000)
    with Tracker() as tracker:
        given.mul_(2)
        view = given[10:].view(-1)
        assert tracker.now == 0
        made = view + 1
        assert tracker.now == made.untyped_storage().nbytes() == 4 * 990
        again = made[5:]
        del made
        assert tracker.now == 4 * 990  # a view keeps all of it
        del again
        assert tracker.now == 0
        tracker.count(given, "weights")
        assert tracker.live["weights"] == 4000
        tracker.enter("later")
        tracker.count(given, "other")
    assert tracker.peak == 4000
    assert tracker.moments["later"] == (4000, {"tensors": 0, "weights": 4000})
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(50, 40, requires_grad=True)
    w = torch.ones(30, 40)
    with Tracker() as tracker:
        checkpoint(lambda x: (x @ w.T).relu(), x, use_reentrant=False).sum().backward()
    assert tracker.flops == 3 * 2 * 50 * 40 * 30
    assert tracker.peak >= 2 * 4 * 50 * 30
