"""`spark-ft doctor`: the machine as system, driver and torch see it, and the known traps that apply."""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from spark_ft.files import ROOT
from spark_ft.memory.machine import GIB, Memory, budget, container_memory, cuda_memory, gib, system_memory
from spark_ft.models import profile

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
OFFLINE = ("1", "true", "yes", "on")  # as huggingface_hub reads its variables


@dataclass(frozen=True)
class Machine:
    """What the traps look at. Sizes are in bytes; None, or empty, where a thing is absent or unknown.

    Attributes:
        architecture, cpu_flags: as the system names them.
        memory, container: (total, available) of the system; (limit, room left) of a container.
        swap, disk_free: swap space; free disk space where this project lies.
        nvidia_card: the system lists an NVIDIA display or compute device.
        driver: what nvidia-smi says: name, driver, memory.
        cuda_build, rocm_build: the CUDA or ROCm version that torch was built for.
        architectures: the GPU architectures that this build of torch has code for.
        gpu, capability, integrated, cuda: the device that torch finds; cuda is its (total, free) memory.
        versions, environment: package → version; environment variable → value.
        profile: the profile's name, where SPARK_FT_PROFILE names one or none.
        absent_model: the hub model that `load_model()` would fetch, since it is not on this disk.
        faults: what is wrong with a setting, and what could not be read; a sentence each.
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
    rocm_build: str | None = None
    architectures: tuple[str, ...] = ()
    gpu: str | None = None
    capability: tuple[int, int] = (0, 0)
    integrated: bool = False
    cuda: Memory = (None, None)
    versions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    profile: str | None = None
    absent_model: str | None = None
    faults: tuple[str, ...] = ()


class Trap(NamedTuple):
    """Something that is known to go wrong on some machines, and what to do about it."""

    name: str
    applies: Callable[[Machine], bool]
    remedy: str


def _older(m: Machine, package: str, than: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", m.versions.get(package, ""))
    return found is not None and (int(found[1]), int(found[2])) < than


def _no_code_for_gpu(m: Machine) -> bool:
    """sm_ab runs on a.c with c ≥ b; compute_ab, which the driver compiles, on all from a.b on."""
    names = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in m.architectures]
    built = [(name[1], (int(name[2]), int(name[3]))) for name in names if name]
    runs = any(of <= m.capability and (kind == "compute" or of[0] == m.capability[0]) for kind, of in built)
    return bool(m.gpu and built) and not runs


def _page_cache_counts_as_used(m: Machine) -> bool:
    return m.integrated and None not in (m.cuda[1], m.memory[1]) and m.cuda[1] < m.memory[1] - 2 * GIB


# fmt: off
TRAPS = (
    Trap("torch has no CUDA, but there is an NVIDIA card",
         lambda m: m.nvidia_card and m.cuda_build is None,
         "Everything runs on the processor. Install a CUDA build of torch: see README.md, Platforms."),
    Trap("torch was built for CUDA, and finds no CUDA device",
         lambda m: m.nvidia_card and m.cuda_build is not None and m.gpu is None,
         "The driver is missing, too old, or not passed into the container (docker: --gpus all)."),
    Trap("this torch has no code for this GPU", _no_code_for_gpu,
         "Install a newer build; for a DGX Spark NGC's pytorch:25.11-py3 or torch's CUDA 13 wheels."),
    Trap("an overrun of memory freezes this machine", lambda m: m.integrated,
         "Processor and GPU share one memory, and nothing raises out-of-memory in time. Plan first, close "
         "what you don't need, and keep 8 to 16 GiB of MemAvailable; `train` refuses to start over budget."),
    Trap("torch's free memory counts the page cache as used", _page_cache_counts_as_used,
         "Believe MemAvailable, as `budget()` does. Tools that believe torch.cuda.mem_get_info need the "
         "cache dropped: `sync; echo 3 > /proc/sys/vm/drop_caches`, as root."),
    Trap("swap is on", lambda m: m.integrated and bool(m.swap),
         "An overrun crawls through swap for minutes before it ends: `swapoff -a`, as root."),
    Trap("nvidia-smi does not tell memory here",
         lambda m: m.integrated and m.driver is not None and "N/A" in m.driver,
         "It is the system's: `free -h`, column available. What your code takes: `measure()`."),
    Trap("loading a model can take twice its size", lambda m: m.integrated,
         "Copies from a mapped file to an integrated GPU can keep both. Load in 4 bits (quantize='nf4' goes "
         "tensor by tensor), or a checkpoint that is already in 4 bits."),
    Trap("a container's memory limit does not hold CUDA memory",
         lambda m: m.integrated and m.container[0] is not None,
         "The limit stops the processor's side only; the GPU takes from the same memory without any limit."),
    Trap("the container has less memory than the machine",
         lambda m: not m.integrated and m.container[0] is not None,
         "What the system calls available is not yours: above the limit the process is killed."),
    Trap("Triton's ptxas may not know this GPU",
         lambda m: m.cuda_build and m.capability >= (12, 1) and "TRITON_PTXAS_PATH" not in m.environment,
         "Triton's own may reject sm_121a: export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas, your CUDA's."),
    Trap("bitsandbytes has no CUDA code for this machine",
         lambda m: m.architecture == "aarch64" and m.gpu is not None and _older(m, "bitsandbytes", (0, 49)),
         "Wheels for aarch64 with CUDA 13 and sm_121 exist from 0.49 on: `pip install -U bitsandbytes`."),
    Trap("bitsandbytes' 4-bit layers train wrongly on this processor",
         lambda m: "avx512_bf16" in m.cpu_flags and "bitsandbytes" in m.versions,
         "A forward pass in eval mode repacks their weights, and gradients are wrong in silence. Set "
         "`support_avx512bf16_for_cpu = False` on every Linear4bit; spark_ft's own NF4 is not affected."),
    Trap("the model is not here, and the hub is off",
         lambda m: m.absent_model is not None and m.environment.get("HF_HUB_OFFLINE", "").lower() in OFFLINE,
         "Fetch it once with HF_HUB_OFFLINE=0, or name a folder in SPARK_FT_MODEL, or unset both."),
    Trap("disk space is short", lambda m: m.disk_free is not None and m.disk_free < 5 * GIB,
         "Set-up takes 3 GB (more with CUDA), the model 0.6 GB, checkpoints and exports more: free some."),
    Trap("memory is short", lambda m: m.memory[1] is not None and m.memory[1] < 2 * GIB,
         "Close other programs, and plan before you train: `spark-ft plan SmolLM2-135M --dtype fp32`."),
)
# fmt: on


def look() -> Machine:
    """This machine, as the system, the driver and torch see it; nothing is changed and nothing fetched."""
    faults: list[str] = []

    def ask(what: str, question: Callable[[], Any], unknown: Any = None) -> Any:
        try:
            return question()
        except Exception as error:  # the report is always printed; what failed is one of its lines
            faults.append(f"{what}: {_one_line(error)}")
            return unknown

    gpu = ask("GPU", lambda: torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None)
    system = ask("memory", system_memory, (None, None))
    here = ask("profile", profile)
    named = os.environ.get("SPARK_FT_MODEL")
    faults += ask("SPARK_FT_MODEL", lambda: _folder_faults(named), []) if named else []
    return Machine(
        architecture=platform.machine(),
        cpu_flags=ask("/proc/cpuinfo", _cpu_flags, frozenset()),
        memory=system,
        container=_tighter(ask("container", container_memory, (None, None)), system),
        swap=ask("swap", lambda: psutil.swap_memory().total),
        disk_free=ask("disk", lambda: shutil.disk_usage(ROOT).free),
        nvidia_card=ask("PCI devices", nvidia_card, False),
        driver=ask("nvidia-smi", _nvidia_smi),
        cuda_build=torch.version.cuda,
        rocm_build=torch.version.hip,
        architectures=tuple(ask("torch's architectures", torch.cuda.get_arch_list, ())),
        gpu=gpu.name if gpu else None,
        capability=(gpu.major, gpu.minor) if gpu else (0, 0),
        integrated=bool(gpu and gpu.is_integrated),
        cuda=ask("GPU memory", lambda: cuda_memory(0), (None, None)) if gpu else (None, None),
        versions=_versions(),
        environment=dict(os.environ),
        profile=here and here.name,
        absent_model=ask("hub cache", lambda: _absent(named or (here and here.model))),
        faults=tuple(faults),
    )


def _tighter(container: Memory, system: Memory) -> Memory:
    """Version 1 of control groups writes "no limit" as a number larger than any memory."""
    real = container[0] is not None and (system[0] is None or container[0] < system[0])
    return container if real else (None, None)


def _cpu_flags() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    found = re.search(r"^(?:flags|features)\s*:(.*)$", text, re.M | re.I)
    return frozenset(found[1].split() if found else ())


def nvidia_card(devices: Path = Path("/sys/bus/pci/devices"), node: Path = Path("/dev/nvidia0")) -> bool:
    """Whether the system lists an NVIDIA display or 3D controller, with or without its driver."""
    ids = (((device / "vendor").read_text(), (device / "class").read_text()) for device in devices.glob("*"))
    found = (vendor.startswith("0x10de") and kind.startswith("0x03") for vendor, kind in ids)
    return node.exists() or any(found)


def _nvidia_smi() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["--query-gpu=name,driver_version,memory.used,memory.total", "--format=csv,noheader"]
    done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=20, check=True)
    return " ".join(done.stdout.split())


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name) or "of unknown version"  # damaged metadata names none
    return found


def _folder_faults(name: str) -> list[str]:
    """What is wrong with a model's folder; none if the name is a hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and "model_type" in config:
            return []
        return [f'SPARK_FT_MODEL: {name}/config.json has no "model_type"; save the model again']
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        return []
    return [f'SPARK_FT_MODEL="{name}" is no folder, and a hub id is "owner/name"; correct it, or unset it']


def _absent(name: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        here = name is None or Path(name).is_dir() or try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a folder that is not there: one of the faults
        return None
    return None if here is True or isinstance(here, str) else name


def _one_line(error: Exception) -> str:
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "  # ours are sentences
    return kind + " ".join(str(error).split())


def report(m: Machine, plan_with: str) -> str:
    """What was found, a line each; then the faults and the traps that apply, a line each too."""
    device = f"CPU {m.architecture}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if m.gpu:
        shared = "one memory with the processor" if m.integrated else "memory of its own"
        device = f"{m.gpu}, compute capability {m.capability[0]}.{m.capability[1]}, {shared}; {device}"
    rocm = f"ROCm {m.rocm_build} build" if m.rocm_build else "CPU build"
    build = f"CUDA {m.cuda_build} build" if m.cuda_build else rocm
    seen = f"{gib(m.cuda[1])} free of {gib(m.cuda[0])} on the GPU" if m.gpu else "no CUDA device"
    limit = f"limit {gib(m.container[0])}, {gib(m.container[1])} left"
    lines = {
        "device": device,
        "system": f"{gib(m.memory[1])} available of {gib(m.memory[0])}, swap {gib(m.swap)}",
        "container": "no limit" if m.container[0] is None else limit,
        "driver": m.driver or "no nvidia-smi",
        "torch": f"{seen} ({build})",
        "plan with": plan_with,
        "disk": f"{gib(m.disk_free)} free",
        "versions": ", ".join(f"{name} {number}" for name, number in m.versions.items()),
    }
    traps = [trap for trap in TRAPS if trap.applies(m)]
    said = [f"{name:<11}{value}" for name, value in lines.items()]
    said += ["", *(f"- {fault}" for fault in m.faults)]
    said.append(f"{len(traps)} of {len(TRAPS)} known traps apply here" + (":" if traps else "."))
    return "\n".join(said + [f"- {trap.name}: {trap.remedy}" for trap in traps])


def describe(machine: Machine) -> str:
    """The report on a machine, with what a run here may plan with, whatever is wrong."""
    try:
        room = str(budget())
    except Exception as error:  # as in `look`
        room = f"an unknown amount ({_one_line(error)})"
    return report(machine, f"{room} (profile {machine.profile or 'unknown'})")
