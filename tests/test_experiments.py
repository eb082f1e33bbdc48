"""Stored measurements: resumable, atomic, and stale as soon as their code, settings or data change."""

import json
import os
import subprocess
import sys

import pytest
import torch

from spark_ft.adapters import AdapterConfig
from spark_ft.lab import kitchen
from spark_ft.lab.experiments import common, runner
from spark_ft.lab.experiments.runner import agrees, experiment, known, load, measure, stale
from spark_ft.methods.lora import LoRALinear

STORED = [p.stem for p in runner.MEASUREMENTS.glob("*.json") if '"experiment"' in p.read_text()[:200]]


@pytest.mark.parametrize("name", sorted({*STORED, *known()}))
def test_a_measurement_belongs_to_its_experiment_and_tells_its_origin(name):
    assert stale(name) is None, stale(name)
    stored = load(name)
    assert len(stored["runs"]) >= 3
    for run in stored["runs"]:
        assert run["machine"]
        assert run["threads"] >= 1
        assert run["date"]
        assert {"python", "torch", "transformers"} <= set(run["versions"])
    text = json.dumps(stored)
    assert "/home" not in text
    assert str(runner.ROOT) not in text


def helper(seed):
    """What a comment or docstring says is no part of the hash."""
    return seed * 2


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MEASUREMENTS", tmp_path)
    monkeypatch.setattr(runner, "EXPERIMENTS", {})
    monkeypatch.setattr(runner, "known", lambda: runner.EXPERIMENTS)
    return tmp_path


def test_only_missing_seeds_run_and_each_is_stored_as_it_ends(registry):
    ran = []

    @experiment(settings={"rank": 4}, code=[helper])
    def toy(seed):
        ran.append(seed)
        if seed == 2 and len(ran) == 3:
            raise KeyboardInterrupt
        return {"value": helper(seed), "4": {"losses": [1.0, seed]}}

    with pytest.raises(KeyboardInterrupt):
        measure(toy)
    assert [run["seed"] for run in load("toy")["runs"]] == [0, 1]
    assert "seeds [2]" in stale("toy")
    measure(toy)
    assert ran == [0, 1, 2, 2]
    stored = load("toy")
    assert stale("toy") is None
    assert stored.values("value") == [0, 2, 4]
    assert stored.values(4, "losses", 1) == [0, 1, 2]
    assert stored.figures(1)["value"] == 2
    assert "3 seeds" in stored.origin()
    assert [path.name for path in registry.iterdir()] == ["toy.json"]


def _toy(settings, code=(), data=()):
    @experiment(settings=settings, code=code, data=data)
    def toy(seed):
        return {"value": seed}

    return toy


def test_other_settings_helpers_or_data_make_it_stale(registry, monkeypatch):
    (registry / "rows.jsonl").write_text("1\n")
    monkeypatch.setattr(runner, "ROOT", registry)
    changed = [{"rank": 4}, [helper]], [{"rank": 8}, []], [{"rank": 4}, [], ["rows.jsonl"]]
    hashes = {_toy({"rank": 4}).hash, *(_toy(*arguments).hash for arguments in changed)}
    (registry / "rows.jsonl").write_text("2\n")
    hashes.add(_toy({"rank": 4}, data=["rows.jsonl"]).hash)
    assert len(hashes) == 5
    measure(_toy({"rank": 4}))
    _toy({"rank": 8})
    assert "changed since" in stale("toy")
    assert load("toy")["settings"] == {"rank": 4}
    measure(runner.EXPERIMENTS["toy"])  # drops the old figures, measures anew
    assert stale("toy") is None


def test_data_that_changes_during_a_run_is_refused(registry, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", registry)
    (registry / "rows.jsonl").write_text("1\n")

    @experiment(data=["rows.jsonl"])
    def toy(seed):
        (registry / "rows.jsonl").write_text("2\n")
        return {}

    with pytest.raises(RuntimeError, match="changed while seed 0 ran"):
        measure(toy)
    assert not (registry / "toy.json").exists()


def test_comments_and_docstrings_do_not_make_it_stale_but_code_does(registry):
    @experiment(settings={"rank": 4})
    def toy(seed):
        return {"value": seed}

    plain = toy.hash

    @experiment(settings={"rank": 4})
    def toy(seed):
        """Give the seed back."""
        # why it returns the seed
        return {
            "value": seed,
        }

    assert toy.hash == plain

    @experiment(settings={"rank": 4})
    def toy(seed):
        return {"value": seed + 1}

    assert toy.hash != plain


def test_what_was_never_measured_and_what_is_unknown_are_named(registry, capsys):
    _toy({})
    assert "never measured" in stale("toy")
    assert "no experiment" in stale("gone")
    with pytest.raises(FileNotFoundError, match="make experiments ARGS=toy"):
        load("toy")
    with pytest.raises(SystemExit):
        runner.main(["no_such"])
    assert "no experiment is called no_such" in capsys.readouterr().err


def test_agrees_says_how_near_and_refuses_another_run():
    assert "first 2 losses" in agrees([1.0, 0.5], [1.001, 0.5, 0.3])
    with pytest.raises(AssertionError, match="another model"):
        agrees([1.0, 0.5], [1.0, 0.6])
    with pytest.raises(AssertionError, match="nothing to compare"):
        agrees([], [1.0])


@pytest.mark.slow
def test_seeds_side_by_side_are_stored_as_if_in_turn(tmp_path):
    script = tmp_path / "toys.py"
    script.write_text(
        "import os, pathlib, torch\n"
        "from spark_ft.lab.experiments import runner\n"
        "runner.MEASUREMENTS, runner.known = pathlib.Path(__file__).parent, lambda: runner.EXPERIMENTS\n"
        "@runner.experiment(settings={'rank': 4})\n"
        "def toy(seed):\n"
        "    return {'value': 2 * seed, 'parent': os.getppid(), 'threads': torch.get_num_threads()}\n"
        "if __name__ == '__main__':\n"
        "    runner.measure(toy, jobs=2)\n"
        "    assert 'OMP_NUM_THREADS' not in os.environ\n"
        "    print(os.getpid())\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    stored = json.loads((tmp_path / "toy.json").read_text())["runs"]
    ran = [(run["seed"], run["figures"]["value"], run["threads"]) for run in stored]
    assert ran == [(0, 0, 1), (1, 2, 1), (2, 4, 1)]
    assert {run["figures"]["parent"] for run in stored} == {int(ended.stdout.split()[-1])}


def test_tune_is_one_run_however_far_it_goes(tiny_llama, embedded):
    """The same seed gives the same losses; a run that stops early is the start of the whole one."""
    rows, run = kitchen.tickets("train")[:4], {"steps": 5, "learning_rate": 1e-2, "warmup_steps": 1}
    vocabulary = {"vocab_size": len(embedded[1]), "max_position_embeddings": 512}

    def losses(seed=0, noise=0.0, first=None, adapter=common.ADAPTER):
        model = tiny_llama(**vocabulary)
        model, history = common.tune(
            rows, seed, adapter=adapter, model=model, batch_size=2, noise=noise, first=first, **run
        )
        return model, torch.tensor(history.losses)

    model, whole = losses()
    assert sum(isinstance(layer, LoRALinear) for layer in model.modules()) == 14
    assert torch.equal(losses(first=3)[1], whole[:3])
    for other in ({"seed": 1}, {"noise": 45.0}, {"adapter": AdapterConfig(rank=1)}):
        assert not torch.equal(losses(**other)[1], whole), other
    model, trained = losses(adapter=lambda model: model.requires_grad_(True))
    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())
    assert trained[-1] < trained[0]


def test_held_out_is_the_loss_and_the_tokens_of_greedy_decoding(embedded):
    model, tokenizer = embedded
    rows = kitchen.tickets("validation")[:3]
    figures = common.held_out(model, tokenizer, rows, batch_size=2)
    loss, right = 0.0, []
    for row in rows:
        batch = common.collate_sft([row], tokenizer)
        learned = batch["labels"][0, 1:] != -100
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0, :-1][learned]
        targets = batch["labels"][0, 1:][learned]
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        right.append((logits.argmax(-1) == targets).tolist())
    tokens = [token for row in right for token in row]
    assert figures["held-out loss"] == pytest.approx(loss / len(tokens), rel=1e-5)
    assert figures["token accuracy"] == sum(tokens) / len(tokens)
    assert figures["exact match"] == sum(all(row) for row in right) / 3


def test_the_kitchen_adapter_has_one_folder_in_every_process_and_one_per_model(monkeypatch):
    """A function's repr, its address, was once part of the name: no process found what another had trained."""
    code, before = (
        "from spark_ft.lab import kitchen; print(kitchen.adapter_folder())",
        kitchen.adapter_folder(),
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(before) != str(kitchen.adapter_folder(seed=1))
    monkeypatch.setenv("SPARK_FT_MODEL", "/models/another")
    assert kitchen.adapter_folder() != before
