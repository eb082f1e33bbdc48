"""Every known trap is found on a machine that has it, and on no healthy one."""

from dataclasses import replace

import pytest

from spark_ft import doctor
from spark_ft.cli import main as cli
from spark_ft.doctor import TRAPS, Machine, look, report
from spark_ft.memory.machine import GIB

LAPTOP = Machine(
    memory=(16 * GIB, 9 * GIB),
    swap=2 * GIB,
    disk_free=100 * GIB,
    cpu_flags=frozenset({"avx2"}),
    versions={"torch": "2.13.0+cpu", "bitsandbytes": "0.50.2"},
    environment={"HF_HUB_OFFLINE": "1"},
)
CARD = replace(
    LAPTOP,
    nvidia_card=True,
    driver="NVIDIA H100 80GB HBM3, 580.95, 1 MiB, 81559 MiB",
    cuda_build="13.0",
    architectures=("sm_80", "sm_90", "compute_120"),
    gpu="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cuda=(80 * GIB, 79 * GIB),
)
SPARK = replace(
    CARD,
    architecture="aarch64",
    memory=(round(119.7 * GIB), 112 * GIB),
    swap=0,
    driver="NVIDIA GB10, 580.95, [N/A], [N/A]",
    architectures=("sm_110", "sm_120"),
    gpu="NVIDIA GB10",
    capability=(12, 1),
    integrated=True,
    cuda=(round(119.7 * GIB), 112 * GIB),
    environment={"TRITON_PTXAS_PATH": "/usr/local/cuda/bin/ptxas"},
)
ALWAYS_ON_SPARK = {
    "an overrun of memory freezes this machine",
    "nvidia-smi does not tell memory here",
    "loading a model can take twice its size",
}
CAUGHT = {
    "torch has no CUDA, but there is an NVIDIA card": replace(LAPTOP, nvidia_card=True),
    "torch was built for CUDA, and finds no CUDA device": replace(CARD, gpu=None),
    "this torch has no code for this GPU": replace(CARD, capability=(10, 0)),
    "an overrun of memory freezes this machine": SPARK,
    "torch's free memory counts the page cache as used": replace(SPARK, cuda=(SPARK.cuda[0], 41 * GIB)),
    "swap is on": replace(SPARK, swap=16 * GIB),
    "nvidia-smi does not tell memory here": SPARK,
    "loading a model can take twice its size": SPARK,
    "a container's memory limit does not hold CUDA memory": replace(SPARK, container=(32 * GIB, 30 * GIB)),
    "the container has less memory than the machine": replace(LAPTOP, container=(4 * GIB, 3 * GIB)),
    "Triton's ptxas may not know this GPU": replace(SPARK, environment={}),
    "bitsandbytes has no CUDA code for this machine": replace(SPARK, versions={"bitsandbytes": "0.48.2"}),
    "bitsandbytes' 4-bit layers train wrongly on this processor": replace(
        LAPTOP, cpu_flags=frozenset({"avx512_bf16"})
    ),
    "the model is not here, and the hub is off": replace(LAPTOP, absent_model="Qwen/Qwen3-8B"),
    "disk space is short": replace(LAPTOP, disk_free=GIB),
    "memory is short": replace(LAPTOP, memory=(8 * GIB, GIB)),
}


def traps(m: Machine) -> set[str]:
    return {trap.name for trap in TRAPS if trap.applies(m)}


def test_every_trap_is_tried():
    assert CAUGHT.keys() == {trap.name for trap in TRAPS}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_trap_is_found_where_it_is_and_alone(name):
    m = CAUGHT[name]
    assert traps(m) == {name} | (ALWAYS_ON_SPARK if m.integrated else set())


@pytest.mark.parametrize("m", [LAPTOP, CARD, Machine()], ids=["laptop", "card", "nothing known"])
def test_a_healthy_machine_has_none(m):
    assert traps(m) == set()


def test_code_for_another_minor_version_of_a_gpu_runs_only_forwards():
    assert "this torch has no code for this GPU" not in traps(SPARK)  # sm_120 runs on 12.1
    assert "this torch has no code for this GPU" in traps(
        replace(SPARK, architectures=("sm_90", "sm_121a"), capability=(12, 0))
    )
    assert "this torch has no code for this GPU" not in traps(replace(CARD, architectures=("compute_80",)))


def test_the_report_names_what_was_seen_and_each_remedy():
    said = report(replace(SPARK, swap=16 * GIB), "cuda:0: 104.0 GiB available")
    assert "NVIDIA GB10, compute capability 12.1, one memory with the processor" in said
    assert "112.0 GiB available of 119.7 GiB, swap 16.0 GiB" in said
    assert "[N/A]" in said
    assert "swapoff -a" in said
    assert f"4 of {len(TRAPS)} known traps apply here:" in said


def test_the_report_of_a_machine_that_tells_nothing():
    said = report(Machine(), "cpu")
    assert "an unknown amount available of an unknown amount" in said
    assert f"0 of {len(TRAPS)} known traps apply here." in said


def test_a_limit_above_all_memory_is_none():
    assert doctor._tighter((2**63, 2**63), (16 * GIB, GIB)) == (None, None)
    assert doctor._tighter((8 * GIB, GIB), (16 * GIB, GIB)) == (8 * GIB, GIB)
    assert doctor._tighter((8 * GIB, GIB), (None, None)) == (8 * GIB, GIB)


def test_an_nvidia_card_is_found_on_the_bus_without_its_driver(tmp_path):
    for name, vendor, kind in (
        ("0", "0x8086", "0x030000"),
        ("1", "0x10de", "0x020000"),
    ):  # another's display, NVIDIA's network
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor)
        (tmp_path / name / "class").write_text(kind)
    assert not doctor._nvidia_card(tmp_path, tmp_path / "nvidia0")
    (tmp_path / "2").mkdir()
    (tmp_path / "2/vendor").write_text("0x10de\n")
    (tmp_path / "2/class").write_text("0x030200\n")
    assert doctor._nvidia_card(tmp_path, tmp_path / "nvidia0")


def test_the_command_looks_at_this_machine(capsys):
    assert cli(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch {look().versions['torch']}" in said
    assert "known traps apply here" in said
