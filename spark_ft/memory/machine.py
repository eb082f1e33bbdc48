"""The machine's memory: what there is, unified memory too, and what a block of code took. GiB is 2³⁰
bytes."""

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from spark_ft.memory.tracker import Tracker

GIB = 2**30
Memory = tuple[int | None, int | None]  # (total, what of it could be taken), bytes
# What is left alone. On unified memory an overrun freezes the machine instead of raising, so 8 GiB; elsewhere
# it is for what allocators round up.
RESERVE = {"unified": 8 * GIB, "cpu": GIB // 2, "cuda": GIB // 2}


# ── what there is ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class MemoryBudget:
    """What a device has, in bytes; None where it is unknown.

    Attributes:
        device: "cpu", "cuda:0", or a name.
        unified: processor and GPU share one memory.
        total: all of it, as the system sees it.
        free: what could be taken now.
        reserve: what should stay untouched.
        available: free − reserve, what a run may plan with.
    """

    device: str
    unified: bool
    total: int | None
    free: int | None
    reserve: int

    @property
    def available(self) -> int | None:
        return None if self.free is None else max(0, self.free - self.reserve)

    def __str__(self) -> str:
        kind = " (one memory for processor and GPU)" if self.unified else ""
        return (
            f"{self.device}{kind}: {gib(self.available)} available = {gib(self.free)} free of "
            f"{gib(self.total)}, less {gib(self.reserve)} in reserve"
        )


@dataclass(frozen=True)
class Machine:
    """What bounds the speed of a device: floating-point operations per second of a matrix product, bytes per
    second."""

    name: str
    flops: float
    bandwidth: float


# 119.7 GiB is what the system of a GB10 reported (github.com/leptonai/gpud/pull/1170); others report up to
# 121.7.
DGX_SPARK = MemoryBudget("DGX Spark", True, 128_501_256_192, 128_501_256_192, RESERVE["unified"])
# Dense bf16 as attention kernels reached it on a GB10 (93 to 95 TFLOP/s measured; 125 by the datasheet), and
# its bandwidth.
DGX_SPARK_SPEED = Machine("DGX Spark", 93e12, 273e9)


def budget(device: str | torch.device | None = None, reserve: int | None = None) -> MemoryBudget:
    """Read how much memory a run may take on a device; unknown is None, never 0.

        CPU             free = min(MemAvailable, room under the container's limit)
        discrete GPU    free = what the driver calls free + what torch has cached
        unified GPU     free = max(that, MemAvailable + what torch has cached)

    A unified GPU is known by `is_integrated`, not by its name. There the driver's "free" is the kernel's
    MemFree, which counts the page cache as used although it is given back on demand; and a container's limit
    does not hold CUDA memory.

    Args:
        device: default CUDA where there is one, else the CPU.
        reserve: bytes to leave alone; default `RESERVE`'s for this kind of device.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    system = system_memory()
    if device.type == "cpu":
        total, free = (_least(a, b) for a, b in zip(system, container_memory(), strict=True))
        return MemoryBudget("cpu", False, total, free, RESERVE["cpu"] if reserve is None else reserve)
    if device.type != "cuda":
        return MemoryBudget(str(device), False, None, None, 0)
    index = torch.cuda.current_device() if device.index is None else device.index
    total, free = cuda_memory(index)
    unified = bool(torch.cuda.get_device_properties(index).is_integrated)
    if unified:
        total = system[0]
        cached = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        free = max((x for x in (free, system[1] and system[1] + cached) if x is not None), default=None)
    kept = RESERVE["unified" if unified else "cuda"] if reserve is None else reserve
    return MemoryBudget(f"cuda:{index}", unified, total, free, kept)


def gib(size: int | None) -> str:
    """In words; an unknown size too."""
    return "an unknown amount" if size is None else f"{size / GIB:.1f} GiB"


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def system_memory() -> Memory:
    """(total, available); on Linux MemTotal and MemAvailable."""
    try:
        memory = psutil.virtual_memory()
    except (OSError, psutil.Error, NotImplementedError):
        return None, None
    return memory.total, memory.available


def cuda_memory(index: int) -> Memory:
    """(total, free), where torch's cache of freed blocks counts as free."""
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError:  # not every virtual GPU tells
        return None, None
    return total, free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)


_ROOT = Path("/")
# version 2, version 1: where it is mounted, its limit, its use, and the page cache in that use which goes
# when room is needed
_CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def container_memory() -> Memory:
    """(limit, room left) under the tightest memory limit of this process's control groups; None where there
    is none."""
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None, None
    limits, rooms = [], []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit_file, use_file, cache = _CGROUPS[bool(controllers)]
        # a parent's limit holds too; and inside a container the path may be the host's, and only the mount
        # itself be there
        for group in (Path(path.lstrip("/")), *Path(path.lstrip("/")).parents):
            folder = _ROOT / mount / group
            try:
                limit, used = int((folder / limit_file).read_text()), int((folder / use_file).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not there, or "max": no limit
                continue
            limits.append(limit)
            rooms.append(max(0, limit - used + int(stat.get(cache, 0))))
    return min(limits, default=None), min(rooms, default=None)


# ── what a block took ───────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Peak:
    """What `measure` found, in bytes; complete once its block has ended.

    Attributes:
        start: what was held when the block began; 0 where only the block's own tensors are counted.
        peak: the most that was held at once in it.
        extra: peak − start.
    """

    start: int
    peak: int

    @property
    def extra(self) -> int:
        return self.peak - self.start


@contextmanager
def measure(device: str | torch.device | None = None, process: bool = False) -> Iterator[Peak]:
    """Measure the most memory that a block of code takes at once: `with measure() as memory: …`, then
    `memory.extra`.

    On CUDA it is what torch allocates on the device. On CPU every tensor that the block makes is followed
    from its birth to its death (`Tracker`), so that neither libraries nor the allocator's habits are in the
    count.

    Args:
        device: default CUDA where there is one, else the CPU.
        process: on CPU, count what the system has given to the process instead: memory that is no file's,
            sampled every millisecond.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gc.collect()
    if device.type == "cuda":
        memory = Peak(*[held(device)] * 2)
        torch.cuda.reset_peak_memory_stats(device)
        yield memory
        memory.peak = torch.cuda.max_memory_allocated(device)
    elif process:
        give_back_caches(device)  # memory freed earlier and kept would be used again without being counted
        memory = Peak(*[held(device, anonymous=True)] * 2)
        with _sampled(memory, device):
            yield memory
    else:
        memory = Peak(0, 0)
        with Tracker() as tracker:
            yield memory
        memory.peak = tracker.peak


@contextmanager
def _sampled(memory: Peak, device: torch.device) -> Iterator[None]:
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            memory.peak = max(memory.peak, held(device, anonymous=True))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield
        memory.peak = max(memory.peak, held(device, anonymous=True))
    finally:
        done.set()
        sampler.join()


def held(device: torch.device, anonymous: bool = False) -> int:
    """Bytes that this process holds now: allocated by torch on CUDA, resident on CPU (`anonymous`: what is no
    file's)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    memory = psutil.Process().memory_info()
    return memory.rss - (getattr(memory, "shared", 0) if anonymous else 0)


def high_water_mark(device: torch.device) -> int | None:
    """The most bytes that `held` has been so far, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


# ── the allocators ──────────────────────────────────────────────────────────────────────────────────────────


def give_back_caches(device: torch.device) -> None:
    """Have the allocators return to the system what they keep of freed memory: torch's on CUDA, C's on Linux
    (glibc)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


MMAP_THRESHOLD = -3  # of mallopt(3)


def free_at_once() -> None:
    """From now on have the C allocator (glibc) return what is freed to the system at once, where it can.

    Left alone it keeps a heap with holes, and a process is a third to a half larger than its tensors. A step
    takes longer, since the pages of each new tensor come from the system again. Lasts as long as the process.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, 65536)
