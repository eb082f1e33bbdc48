"""The true-size run, made small: two layers on the CPU, from the command line to the stored JSON."""

import json
import math
import sys

import pytest
import torch
from transformers import LlamaConfig

from spark_ft.lab import true_size as giant
from spark_ft.memory.machine import measure
from spark_ft.memory.trace import ADAPTERS, MOMENTS
from spark_ft.methods.nf4 import NF4Linear

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 97}


def test_two_layers_run_on_the_cpu_and_are_stored_with_their_origin(tmp_path, capsys):
    path = tmp_path / "measured" / "two.json"
    shape = ["--model", "SmolLM2-135M", "--layers", "2", "--lengths", "16", "48"]
    assert giant.main([*shape, "--steps", "3", "--device", "cpu", "--out", str(path)]) == 0
    assert "48 tokens:" in capsys.readouterr().out
    stored = json.loads(path.read_text())
    assert {"what", "device", "date", "versions", "settings", "runs"} <= stored.keys()
    assert stored["versions"]["torch"] == torch.__version__
    layer = 2 * 576**2 + 2 * 192 * 576 + 3 * 1536 * 576 + 2 * 576
    assert stored["parameters"] == 2 * layer + 576 + 49152 * 576
    for run, length in zip(stored["runs"], (16, 48), strict=True):
        assert run["length"] == length
        assert run["peak bytes"] > run["planned terms"]["embeddings and head"] == 49152 * 576 * 4
        assert run["tokens a second"] == pytest.approx(length / run["seconds a step"])
        assert run["losses"][-1] < run["losses"][0]  # it does learn its one row


def test_without_a_path_nothing_is_stored_and_what_was_comes_back_newest_last(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(giant, "MEASURED", tmp_path / "gpu")
    monkeypatch.setattr(giant, "measure_run", lambda *_: {"runs": []})
    giant.main(["--layers", "1", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["runs"] == []
    assert giant.stored() == []
    giant.MEASURED.mkdir()
    for name, date in (("b", "2026-01-02"), ("a", "2026-03-04")):
        (giant.MEASURED / f"{name}.json").write_text(json.dumps({"date": date}))
    assert [one["date"] for one in giant.stored()] == ["2026-01-02", "2026-03-04"]


@pytest.mark.parametrize(
    ("method", "task", "first"),
    [("lora", "preference", 2), ("full", "preference", 2), ("dora", "feedback", None)],
)
def test_other_methods_and_tasks_are_measured_beside_their_plan(method, task, first):
    config = LlamaConfig(**{**SMALL, "hidden_size": 128, "vocab_size": 997}, num_hidden_layers=3)
    found = giant.measure_run(config, "cpu", [64], 2, torch.float32, method, task)
    (run,) = found["runs"]
    # beside the plan's tensors: 512 bytes for each of the reference's, its checksum
    assert run["planned peak bytes"] == pytest.approx(run["peak bytes"], rel=0.05)
    assert found["trained"] <= found["parameters"]
    if first:
        assert run["losses"][0] == pytest.approx(math.log(first), rel=1e-6)
    assert run["losses"][1] < run["losses"][0]


def test_the_shape_of_70b_is_llamas_own():
    config = giant.giant_config(80)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) == 70_553_706_496
    assert giant.giant_config(2).num_hidden_layers == 2


def test_a_random_model_is_in_nf4_but_for_its_ends_and_a_layer_takes_a_step_of_its_adapters():
    model = giant.random_model(LlamaConfig(**SMALL, num_hidden_layers=2), "cpu", torch.float32)
    linear = [(name, m) for name, m in model.named_modules() if hasattr(m, "in_features")]
    kinds = {name.rpartition(".")[2]: isinstance(m, NF4Linear) for name, m in linear}
    assert {name for name, quantized in kinds.items() if not quantized} == {"lm_head"}
    assert not [p for p in model.parameters() if p.is_meta or p.requires_grad]
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    config = LlamaConfig(**SMALL)
    layer = giant.random_layer(config, rank=4)
    assert giant.layer_step(layer, config, 12) > 0
    with_gradient = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in layer.named_parameters() if p.requires_grad}
    assert len(with_gradient) == 14


@pytest.mark.parametrize(("length", "mlp"), [(96, 2816), (384, 1408)])
def test_the_plan_of_a_layer_is_within_two_hundredths_of_what_its_tensors_take(length, mlp):
    config = LlamaConfig(hidden_size=512, intermediate_size=mlp, num_attention_heads=8, num_key_value_heads=2)
    layer = giant.random_layer(config, rank=8)
    own = sum({id(t): t.nbytes for t in (*layer.parameters(), *layer.buffers())}.values())
    with measure("cpu") as made:
        giant.layer_step(layer, config, length)
    plan = giant.plan_layer(config, length, rank=8)
    assert plan.peak == pytest.approx(own + made.extra, rel=0.02)
    assert plan.terms[ADAPTERS] == sum(p.nbytes for p in layer.parameters() if p.requires_grad)
    assert MOMENTS not in plan.terms


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it is known to the byte on Linux alone")
def test_a_70b_layer_of_true_size_takes_what_is_planned():
    """In a process of its own: 1% of what its tensors take, 15% of what the process does."""
    config = giant.giant_config(1)
    found, planned = giant.measure_layer(config, 512), giant.plan_layer(config, 512).peak
    print({name: f"{value / 1e9:.3f} GB" for name, value in {"planned": planned, **found}.items()})
    assert found["weights"] == 855_638_016
    assert planned == pytest.approx(found["counted"], rel=0.01)
    assert planned == pytest.approx(found["process"], rel=0.15)
    piece = 8192 * 28672 * 4 + 100e6  # what quantizing it takes
    assert found["making"] <= found["layer"] + piece
