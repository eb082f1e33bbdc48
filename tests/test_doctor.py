"""Every known trap is found on a machine that has it, and on no healthy one; the report is always printed."""

from dataclasses import replace
from unittest.mock import Mock

import psutil
import pytest
import torch

from spark_ft import doctor
from spark_ft.cli import main as cli
from spark_ft.doctor import TRAPS, Machine, look, report
from spark_ft.memory.machine import GIB

# fmt: off
LAPTOP = Machine(
    memory=(16 * GIB, 9 * GIB), swap=2 * GIB, disk_free=100 * GIB, cpu_flags=frozenset({"avx2"}),
    versions={"torch": "2.13.0+cpu", "bitsandbytes": "0.50.2"}, environment={"HF_HUB_OFFLINE": "1"})
CARD = replace(
    LAPTOP, nvidia_card=True, driver="NVIDIA H100 80GB HBM3, 580.95, 1 MiB, 81559 MiB", cuda_build="13.0",
    gpu="NVIDIA H100 80GB HBM3", architectures=("sm_80", "sm_90", "compute_120"), capability=(9, 0),
    cuda=(80 * GIB, 79 * GIB))
SPARK = replace(
    CARD, architecture="aarch64", memory=(round(119.7 * GIB), 112 * GIB), swap=0, integrated=True,
    driver="NVIDIA GB10, 580.95, [N/A], [N/A]", gpu="NVIDIA GB10", architectures=("sm_110", "sm_120"),
    capability=(12, 1), cuda=(round(119.7 * GIB), 112 * GIB),
    environment={"TRITON_PTXAS_PATH": "/usr/local/cuda/bin/ptxas"})
ALWAYS_ON_SPARK = {"an overrun of memory freezes this machine", "nvidia-smi does not tell memory here",
                   "loading a model can take twice its size"}
# fmt: on
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
    "bitsandbytes' 4-bit layers train wrongly on this processor": replace(LAPTOP, cpu_flags={"avx512_bf16"}),
    "the model is not here, and the hub is off": replace(LAPTOP, absent_model="Qwen/Qwen3-8B"),
    "disk space is short": replace(LAPTOP, disk_free=GIB),
    "memory is short": replace(LAPTOP, memory=(8 * GIB, GIB)),
}


def traps(m: Machine) -> set[str]:
    return {trap.name for trap in TRAPS if trap.applies(m)}


@pytest.mark.parametrize("name", [trap.name for trap in TRAPS])
def test_a_trap_is_found_where_it_is_and_alone(name):
    m = CAUGHT[name]
    assert traps(m) == {name} | (ALWAYS_ON_SPARK if m.integrated else set())


def test_a_healthy_machine_has_none():
    rocm = replace(LAPTOP, gpu="AMD Radeon 8060S", rocm_build="7.1", architectures=("gfx1100", "gfx1151"))
    odd = replace(LAPTOP, versions={"bitsandbytes": "of unknown version", "torch": "2.14.0a0+git"})
    for m in (LAPTOP, CARD, Machine(), replace(rocm, capability=(12, 5)), odd):
        assert traps(m) == set(), m


def test_code_for_another_minor_version_of_a_gpu_runs_only_forwards():
    name, older = "this torch has no code for this GPU", ("sm_90", "sm_121a")
    assert name not in traps(SPARK)  # sm_120 runs on 12.1
    assert name in traps(replace(SPARK, architectures=older, capability=(12, 0)))
    assert name not in traps(replace(CARD, architectures=("compute_80",)))


def test_the_report_names_what_was_seen_and_each_remedy_in_a_line():
    said = report(replace(SPARK, swap=16 * GIB, faults=("profile: odd",)), "cuda:0: 104.0 GiB available")
    for line in (
        "NVIDIA GB10, compute capability 12.1, one memory with the processor",
        "112.0 GiB available of 119.7 GiB, swap 16.0 GiB",
        "[N/A]",
        "\n- profile: odd\n",
        f"4 of {len(TRAPS)} known traps apply here:",
        "\n- swap is on: An overrun crawls",
    ):
        assert line in said
    assert said.count("\n- ") == 5
    said = report(Machine(), "cpu")
    assert "an unknown amount available of an unknown amount" in said
    assert f"0 of {len(TRAPS)} known traps apply here." in said
    assert "(ROCm 7.1 build)" in report(Machine(rocm_build="7.1"), "cpu")


def test_a_limit_above_all_memory_is_none(monkeypatch):
    """Version 1 of control groups writes "no limit" as a number larger than any memory."""
    for limit, system, seen in (
        ((2**63, 2**63), (16 * GIB, GIB), (None, None)),
        ((8 * GIB, GIB), (16 * GIB, GIB), (8 * GIB, GIB)),
        ((8 * GIB, GIB), (None, None), (8 * GIB, GIB)),
    ):
        monkeypatch.setattr(doctor, "container_memory", lambda limit=limit: limit)
        monkeypatch.setattr(doctor, "system_memory", lambda system=system: system)
        assert look().container == seen


def test_an_nvidia_card_is_found_on_the_bus_without_its_driver(tmp_path):
    devices = [("0x8086", "0x030000"), ("0x10de", "0x020000"), ("0x10de", "0x030200")]
    for i, ids in enumerate(devices):  # another's display, NVIDIA's network, NVIDIA's 3D controller
        assert not doctor.nvidia_card(tmp_path, tmp_path / "nvidia0")
        (tmp_path / str(i)).mkdir()
        for name, value in zip(("vendor", "class"), ids, strict=True):
            (tmp_path / str(i) / name).write_text(value + "\n")
    assert doctor.nvidia_card(tmp_path, tmp_path / "nvidia0")


def test_settings_that_are_wrong_are_lines_of_the_report(monkeypatch, tmp_path, capsys):
    (tmp_path / "odd").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    (tmp_path / "odd/config.json").write_text("[1]")
    for name, value, line in (
        ("HF_HUB_OFFLINE", "1", f"torch {look().versions['torch']}"),
        (
            "SPARK_FT_MODEL",
            "./models/llama/8b",
            '- SPARK_FT_MODEL="./models/llama/8b" is no folder, and a hub id',
        ),
        ("SPARK_FT_MODEL", str(tmp_path), "- SPARK_FT_MODEL: JSONDecodeError: Expecting property name"),
        ("SPARK_FT_MODEL", str(tmp_path / "odd"), 'config.json has no "model_type"; save the model again'),
        (
            "SPARK_FT_PROFILE",
            "dgx",
            '- profile: SPARK_FT_PROFILE="dgx" is no profile; set it to one of laptop',
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert cli(["doctor"]) == 0
        said = capsys.readouterr().out
        assert line in said
        assert f"of {len(TRAPS)} known traps apply here" in said


def test_a_machine_that_answers_no_question_still_gets_its_report(monkeypatch, capsys):
    """As without /proc, with a driver that does not fit, and with a damaged package."""
    no_file = FileNotFoundError(2, "No such file", "/proc/meminfo")
    for owner, name, error in (
        (psutil, "virtual_memory", no_file),
        (psutil, "swap_memory", no_file),
        (doctor.shutil, "disk_usage", no_file),
        (torch.cuda, "get_device_properties", RuntimeError("driver too\nold")),
        (doctor.subprocess, "run", doctor.subprocess.TimeoutExpired("nvidia-smi", 20)),
        (doctor, "container_memory", ValueError("not enough values to unpack")),
    ):
        monkeypatch.setattr(owner, name, Mock(side_effect=error))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    monkeypatch.setattr(doctor, "version", lambda name: None)
    assert cli(["doctor"]) == 0
    said = capsys.readouterr().out
    for line in (
        "- GPU: RuntimeError: driver too old",
        "- nvidia-smi: TimeoutExpired",
        "- container: not enough values to unpack",
        "an unknown amount available of an unknown amount",
        "torch of unknown version",
    ):
        assert line in said


def test_plan_answers_an_odd_config_with_a_sentence(tmp_path, capsys):
    for config in (
        "[1]",
        "{}",
        '{"model_type": "nope"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
    ):
        (tmp_path / "config.json").write_text(config)
        assert cli(["plan", str(tmp_path)]) == 1
        assert capsys.readouterr().err.startswith(f"spark-ft plan: {tmp_path}")
