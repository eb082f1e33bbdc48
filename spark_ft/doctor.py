"""`spark-ft doctor`: this machine as the system, the driver and torch see it, and the known traps that apply to it."""

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from spark_ft.files import ROOT
from spark_ft.memory.machine import GIB, Memory, budget, container_memory, cuda_memory, gib, system_memory
from spark_ft.models import profile

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
OFFLINE = ("1", "true", "yes", "on")  # as huggingface_hub reads its variables


@dataclass(frozen=True)
class Machine:
    """What the traps look at. Sizes are in bytes; None, or empty, where a thing is not there or not known.

    Attributes:
        architecture, cpu_flags: as the system names them.
        memory, container: (total, available) of the system; (limit, room left) of a container.
        swap, disk_free: swap space; free disk space where this project lies.
        nvidia_card: the system lists an NVIDIA display or compute device.
        driver: what nvidia-smi says: name, driver, memory.
        cuda_build, architectures: torch's CUDA version, and the GPU architectures that this build has code for.
        gpu, capability, integrated, cuda: the CUDA device that torch finds: name, compute capability, (total, free).
        versions, environment: package → version; environment variable → value.
        absent_model: the hub model that `load_model()` would fetch, since it is not on this disk.
    """

    architecture: str = "x86_64"
    cpu_flags: frozenset[str] = frozenset()
    memory: Memory = (None, None)
    container: Memory = (None, None)
    swap: int | None = None
    disk_free: int | None = None
    nvidia_card: bool = False
    driver: str | None = None
    cuda_build: str | None = None
    architectures: tuple[str, ...] = ()
    gpu: str | None = None
    capability: tuple[int, int] = (0, 0)
    integrated: bool = False
    cuda: Memory = (None, None)
    versions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    absent_model: str | None = None


@dataclass(frozen=True)
class Trap:
    """Something that is known to go wrong, on the machines where `applies` says so, and what to do about it."""

    name: str
    applies: Callable[[Machine], bool]
    remedy: str


def _older(m: Machine, package: str, than: tuple[int, int]) -> bool:
    found = m.versions.get(package)
    return found is not None and tuple(int(part) for part in found.split(".")[:2]) < than


def _no_code_for_gpu(m: Machine) -> bool:
    """sm_ab runs on a.c with c ≥ b; compute_ab, which the driver compiles, on everything from a.b on."""
    built = [
        (kind, (int(x[:-1]), int(x[-1])))
        for kind, x in (name.rstrip("af").split("_") for name in m.architectures)
    ]
    runs = any(of <= m.capability and (kind == "compute" or of[0] == m.capability[0]) for kind, of in built)
    return bool(m.gpu and built) and not runs


def _page_cache_counts_as_used(m: Machine) -> bool:
    return m.integrated and None not in (m.cuda[1], m.memory[1]) and m.cuda[1] < m.memory[1] - 2 * GIB


TRAPS = (
    Trap(
        "torch has no CUDA, but there is an NVIDIA card",
        lambda m: m.nvidia_card and m.cuda_build is None,
        "Everything runs on the processor. Take a CUDA build of torch: see README.md, Platforms.",
    ),
    Trap(
        "torch was built for CUDA, and finds no CUDA device",
        lambda m: m.nvidia_card and m.cuda_build is not None and m.gpu is None,
        "The driver is missing, too old for this build, or not passed into the container (docker: --gpus all).",
    ),
    Trap(
        "this torch has no code for this GPU",
        _no_code_for_gpu,
        "Take a newer build: on a DGX Spark NGC's pytorch:25.11-py3 or newer, or torch's CUDA 13 wheels.",
    ),
    Trap(
        "an overrun of memory freezes this machine",
        lambda m: m.integrated,
        "Processor and GPU share one memory, and nothing raises out-of-memory in time. Plan first (`spark-ft plan`), close "
        "what you don't need, and keep 8 to 16 GiB of MemAvailable; `train` refuses to start over budget.",
    ),
    Trap(
        "torch's free memory counts the page cache as used",
        _page_cache_counts_as_used,
        "Believe MemAvailable, as `budget()` does. Tools that believe torch.cuda.mem_get_info need the cache dropped: "
        "`sync; echo 3 > /proc/sys/vm/drop_caches`, as root.",
    ),
    Trap(
        "swap is on",
        lambda m: m.integrated and bool(m.swap),
        "An overrun then crawls through swap for minutes before it ends: `swapoff -a`, as root, for the time of the run.",
    ),
    Trap(
        "nvidia-smi does not tell memory here",
        lambda m: m.integrated and m.driver is not None and "N/A" in m.driver,
        "It is the system's: `free -h`, column available. What your code takes: `measure()`.",
    ),
    Trap(
        "loading a model can take twice its size",
        lambda m: m.integrated,
        'Copies from a mapped file to an integrated GPU can keep both. Load in 4 bits (quantize="nf4" goes tensor by tensor), '
        "or take a checkpoint that is already in 4 bits.",
    ),
    Trap(
        "a container's memory limit does not hold CUDA memory",
        lambda m: m.integrated and m.container[0] is not None,
        "The limit stops the processor's side only; what the GPU takes comes from the same memory without any.",
    ),
    Trap(
        "the container has less memory than the machine",
        lambda m: not m.integrated and m.container[0] is not None,
        "What the system calls available is not yours; over the limit the process is killed. `budget()` goes by the limit.",
    ),
    Trap(
        "Triton's ptxas may not know this GPU",
        lambda m: m.capability >= (12, 1) and "TRITON_PTXAS_PATH" not in m.environment,
        "Triton brings its own, which may reject sm_121a: export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas (your CUDA's).",
    ),
    Trap(
        "bitsandbytes has no CUDA code for this machine",
        lambda m: m.architecture == "aarch64" and m.gpu is not None and _older(m, "bitsandbytes", (0, 49)),
        "Wheels for aarch64 with CUDA 13 and sm_121 come from 0.49 on: `pip install -U bitsandbytes`.",
    ),
    Trap(
        "bitsandbytes' 4-bit layers train wrongly on this processor",
        lambda m: "avx512_bf16" in m.cpu_flags and "bitsandbytes" in m.versions,
        "After one forward in eval mode its CPU kernel has repacked the weights, and gradients are silently wrong. Set "
        "`support_avx512bf16_for_cpu = False` on every Linear4bit; spark_ft's own NF4 is not concerned.",
    ),
    Trap(
        "the model is not here, and the hub is off",
        lambda m: m.absent_model is not None and m.environment.get("HF_HUB_OFFLINE", "").lower() in OFFLINE,
        "Fetch it once with HF_HUB_OFFLINE=0, or name a folder in SPARK_FT_MODEL, or unset both for the embedded model.",
    ),
    Trap(
        "disk space is short",
        lambda m: m.disk_free is not None and m.disk_free < 5 * GIB,
        "Set-up takes 3 GB (more with CUDA), the converted model 0.6 GB, checkpoints and exports more: free some.",
    ),
    Trap(
        "memory is short",
        lambda m: m.memory[1] is not None and m.memory[1] < 2 * GIB,
        "Close other programs, and plan before you train: `spark-ft plan SmolLM2-135M --dtype fp32`.",
    ),
)


def look() -> Machine:
    """This machine, as the system, the driver and torch see it; nothing is changed and nothing fetched."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return Machine(
        architecture=platform.machine(),
        cpu_flags=_cpu_flags(),
        memory=system_memory(),
        container=_tighter(container_memory(), system_memory()),
        swap=psutil.swap_memory().total,
        disk_free=shutil.disk_usage(ROOT).free,
        nvidia_card=_nvidia_card(),
        driver=_nvidia_smi(),
        cuda_build=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()),
        gpu=gpu.name if gpu else None,
        capability=(gpu.major, gpu.minor) if gpu else (0, 0),
        integrated=bool(gpu and gpu.is_integrated),
        cuda=cuda_memory(0) if gpu else (None, None),
        versions=_versions(),
        environment=dict(os.environ),
        absent_model=_absent_model(),
    )


def _tighter(container: Memory, system: Memory) -> Memory:
    """Version 1 of control groups writes "no limit" as a number larger than any memory."""
    real = container[0] is not None and (system[0] is None or container[0] < system[0])
    return container if real else (None, None)


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        next(
            (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))), ""
        ).split()
    )


def _nvidia_card(devices: Path = Path("/sys/bus/pci/devices"), node: Path = Path("/dev/nvidia0")) -> bool:
    def is_one(device: Path) -> bool:
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            return False
        return vendor.startswith("0x10de") and kind.startswith(
            "0x03"
        )  # NVIDIA; display controller, 3D ones too

    return any(map(is_one, devices.glob("*"))) or node.exists()


def _nvidia_smi() -> str | None:
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.used,memory.total",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _absent_model() -> str | None:
    from huggingface_hub import try_to_load_from_cache

    name = os.environ.get("SPARK_FT_MODEL") or profile().model
    if name is None or Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    return name


def report(m: Machine, plan_with: str) -> str:
    """What was found, a line each, and the traps that apply, each with its remedy."""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    device = f"CPU {m.architecture}, {cores}"
    if m.gpu:
        shared = "one memory with the processor" if m.integrated else "memory of its own"
        device = f"{m.gpu}, compute capability {m.capability[0]}.{m.capability[1]}, {shared}; {device}"
    build = f"CUDA {m.cuda_build} build" if m.cuda_build else "CPU build"
    seen = f"{gib(m.cuda[1])} free of {gib(m.cuda[0])} on the GPU" if m.gpu else "no CUDA device"
    lines = {
        "device": device,
        "system": f"{gib(m.memory[1])} available of {gib(m.memory[0])}, swap {gib(m.swap)}",
        "container": f"limit {gib(m.container[0])}, {gib(m.container[1])} left"
        if m.container[0] is not None
        else "no limit",
        "driver": m.driver or "no nvidia-smi",
        "torch": f"{seen} ({build})",
        "plan with": plan_with,
        "disk": f"{gib(m.disk_free)} free",
        "versions": ", ".join(f"{name} {number}" for name, number in m.versions.items()),
    }
    traps = [trap for trap in TRAPS if trap.applies(m)]
    said = [f"{name:<11}{value}" for name, value in lines.items()]
    said += ["", f"{len(traps)} of {len(TRAPS)} known traps apply here" + (":" if traps else ".")]
    return "\n".join(said + [f"- {trap.name}\n  {trap.remedy}" for trap in traps])


def main(arguments: list[str] | None = None) -> int:
    """Print the report."""
    argparse.ArgumentParser(prog="spark-ft doctor", description=__doc__).parse_args(arguments)
    print(report(look(), f"{budget()} (profile {profile().name})"))
    return 0
