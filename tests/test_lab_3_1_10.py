"""Lab 3.1.10: the solved exercises make the package's own file, and the experiment averages what it says."""

import json

import pytest
import torch

from spark_ft import export_gguf, load_model, save_adapters
from spark_ft.adapters import AdapterConfig, adapted_layers, add_adapters
from spark_ft.export.gguf import in_llama_order
from spark_ft.files import ROOT
from spark_ft.lab import study as shared
from spark_ft.lab.build import BEGIN, read_source
from spark_ft.lab.experiments import lab_3_1_10 as experiment
from spark_ft.lab.study import lab_3_1_10 as study


@pytest.fixture(scope="module")
def solved():
    """The names that the solved exercises define."""
    names = {"json": json, "torch": torch}
    for cell in read_source(ROOT / "labs" / "src" / "lab-3.1.10-ollama-integration.py").cells:
        if cell.cell_type == "code" and BEGIN in cell.source:
            exec(cell.source, names)
    return names


def random_adapter(model, config, seed=0):
    torch.manual_seed(seed)
    add_adapters(model, config)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    return model


@pytest.mark.slow
def test_the_solved_exercises_fill_a_file_that_is_the_packages_byte_for_byte(solved, tmp_path):
    config = AdapterConfig(rank=4, alpha=6, targets=("q_proj", "k_proj", "down_proj"))
    model = random_adapter(load_model(dtype=torch.float32)[0], config)
    folder = save_adapters(model, tmp_path / "adapter")
    base = export_gguf(None, None, tmp_path / "base.gguf")
    ours = export_gguf(None, folder, tmp_path / "ours.gguf").read_bytes()
    assert study.fill(base, folder, solved["merged"], solved["in_pairs"]).read_bytes() == ours


def test_the_solved_pairing_is_the_packages(solved):
    config = load_model(dtype=torch.float32)[0].config
    for layer, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        W = torch.randn(heads * 64, 5)
        assert torch.equal(solved["in_pairs"](W, heads), in_llama_order(W, layer, config))


def test_the_experiments_mean_is_the_mean_of_the_updates_and_its_wrong_way_is_not(solved):
    several = [
        experiment.notes(random_adapter(load_model(dtype=torch.float32)[0], experiment.ADAPTER, seed))
        for seed in range(3)
    ]
    name = "model.layers.3.mlp.up_proj"
    scaling = experiment.ADAPTER.alpha / experiment.ADAPTER.rank
    right = sum(scaling * each[name][1] @ each[name][0] for each in several) / 3
    update = adapted_layers(experiment.averaged(several, experiment.mean_of_products))[name].delta_weight()
    torch.testing.assert_close(update, right, atol=1e-6, rtol=1e-4)
    A, B = solved["average"]([each[name] for each in several])
    torch.testing.assert_close(scaling * B @ A, right, atol=1e-6, rtol=1e-4)
    apart = adapted_layers(experiment.averaged(several, experiment.mean_of_parts))[name].delta_weight()
    assert (apart - right).norm() > 0.5 * right.norm()


def test_a_workplace_is_removed_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = study.workplace()
    (place / "a.gguf").write_bytes(b"x" * 10)
    shared._WORKPLACES[-1].cleanup()
    assert not list(tmp_path.iterdir())
