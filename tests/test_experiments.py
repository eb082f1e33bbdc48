"""Stored measurements: resumable, atomic, and stale as soon as their code, settings or data change."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from spark_ft.adapters import AdapterConfig
from spark_ft.lab import kitchen
from spark_ft.lab.experiments import common, lab_3_1_5, runner
from spark_ft.lab.experiments.runner import agrees, experiment, known, load, measure, stale
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import quantize_nf4

STORED = [p.stem for p in runner.MEASUREMENTS.glob("*.json") if '"experiment"' in p.read_text()[:200]]


@pytest.mark.parametrize("name", sorted({*STORED, *known()}))
def test_a_measurement_belongs_to_its_experiment_and_tells_its_origin(name):
    assert stale(name) is None, stale(name)
    stored = load(name)
    assert len(stored["runs"]) >= 3
    for run in stored["runs"]:
        assert all(run[key] for key in ("machine", "threads", "date"))
        assert {"python", "torch", "transformers"} <= set(run["versions"])
    assert not [path for path in ("/home", str(runner.ROOT)) if path in json.dumps(stored)]


def helper(seed):
    """What a comment or docstring says is no part of the hash."""
    return seed * 2


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MEASUREMENTS", tmp_path)
    monkeypatch.setattr(runner, "EXPERIMENTS", {})
    monkeypatch.setattr(runner, "known", lambda: runner.EXPERIMENTS)
    return tmp_path


def test_more_seeds_leave_the_hash_as_it_is_and_other_settings_do_not(registry):
    @experiment(seeds=range(3))
    def toy(seed):
        return {"value": seed}

    fewer = toy

    @experiment(seeds=range(5))
    def toy(seed):
        return {"value": seed}

    more = toy

    @experiment(seeds=range(5), settings={"rank": 8})
    def toy(seed):
        return {"value": seed}

    assert fewer.hash == more.hash != toy.hash


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
    assert (stored.values("value"), stored.values(4, "losses", 1)) == ([0, 2, 4], [0, 1, 2])
    assert (stored.figures(1)["value"], "3 seeds" in stored.origin()) == (2, True)
    assert [path.name for path in registry.iterdir()] == ["toy.json"]


def toy(seed):
    return {"value": seed}


def make(settings=None, code=(), data=(), run=toy):
    return experiment(settings=settings, code=code, data=data)(run)


def test_other_settings_helpers_or_data_make_it_stale(registry, monkeypatch):
    (registry / "rows.jsonl").write_text("1\n")
    monkeypatch.setattr(runner, "ROOT", registry)
    four = {"rank": 4}
    changed = [four], [four, [helper]], [{"rank": 8}], [four, [], ["rows.jsonl"]]
    hashes = {make(*arguments).hash for arguments in changed}
    (registry / "rows.jsonl").write_text("2\n")
    assert len(hashes | {make(four, data=["rows.jsonl"]).hash}) == 5
    measure(make(four))
    make({"rank": 8})
    assert "changed since" in stale("toy")
    assert load("toy")["settings"] == four
    measure(runner.EXPERIMENTS["toy"])  # drops the old figures, measures anew
    assert stale("toy") is None


def test_data_that_changes_during_a_run_is_refused(registry, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", registry)
    (registry / "rows.jsonl").write_text("1\n")

    def toy(seed):
        return {"written": (registry / "rows.jsonl").write_text("2\n")}

    with pytest.raises(RuntimeError, match="changed while seed 0 ran"):
        measure(make(data=["rows.jsonl"], run=toy))
    assert not (registry / "toy.json").exists()


def test_comments_and_docstrings_do_not_make_it_stale_but_code_does(registry):
    def toy(seed):
        return {"value": seed}

    plain = make(run=toy).hash

    def toy(seed):
        """Give the seed back."""
        # why it returns the seed
        return {
            "value": seed,
        }

    assert make(run=toy).hash == plain

    def toy(seed):
        return {"value": seed + 1}

    assert make(run=toy).hash != plain


def test_what_was_never_measured_and_what_is_unknown_are_named(registry, capsys):
    make()
    assert "never measured" in stale("toy")
    assert "no experiment" in stale("gone")
    with pytest.raises(FileNotFoundError, match="make experiments ARGS=toy"):
        load("toy")
    with pytest.raises(SystemExit):
        runner.main(["no_such"])
    assert "no experiment is called no_such" in capsys.readouterr().err


def test_agrees_says_how_near_and_refuses_another_run():
    assert "first 2 losses" in agrees([1.0, 0.5], [1.001, 0.5, 0.3])
    for live, says in (([1.0, 0.5], "another model"), ([], "nothing to compare")):
        with pytest.raises(AssertionError, match=says):
            agrees(live, [1.0, 0.6])


TOYS = """import os, pathlib, torch
from spark_ft.lab.experiments import runner
runner.MEASUREMENTS, runner.known = pathlib.Path(__file__).parent, lambda: runner.EXPERIMENTS
@runner.experiment(settings={'rank': 4})
def toy(seed):
    return {'value': 2 * seed, 'parent': os.getppid(), 'threads': torch.get_num_threads()}
if __name__ == '__main__':
    runner.measure(toy, jobs=2)
    assert 'OMP_NUM_THREADS' not in os.environ
    print(os.getpid())
"""


@pytest.mark.slow
def test_seeds_side_by_side_are_stored_as_if_in_turn(tmp_path):
    script = tmp_path / "toys.py"
    script.write_text(TOYS)
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
        told = {**run, "adapter": adapter, "batch_size": 2, "noise": noise, "first": first}
        model, history = common.tune(rows, seed, model=tiny_llama(**vocabulary), **told)
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
    losses, right = [], []
    for batch in (common.collate_sft([row], tokenizer) for row in rows):
        targets = batch["labels"][0, 1:]
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, targets, reduction="none")[targets != -100])
        right.append((logits.argmax(-1) == targets)[targets != -100].double())
    assert figures["held-out loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert figures["token accuracy"] == pytest.approx(torch.cat(right).mean().item())
    assert figures["exact match"] == sum(row.all().item() for row in right) / 3


def test_the_kitchen_adapter_has_one_folder_in_every_process_and_one_per_model(monkeypatch):
    """A function's repr, its address, was once in the name: no process found what another had trained."""
    code, before = (
        "from spark_ft.lab import kitchen; print(kitchen.adapter_folder())",
        kitchen.adapter_folder(),
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(before) != str(kitchen.adapter_folder(seed=1))
    monkeypatch.setenv("SPARK_FT_MODEL", "/models/another")
    assert kitchen.adapter_folder() != before


def test_a_merge_aware_layer_computes_what_the_merge_gives_and_learns_as_lora_does():
    torch.manual_seed(0)
    base = torch.nn.Linear(128, 64)
    aware, plain = (kind(base, 4, 8.0) for kind in (lab_3_1_5.MergeAwareLinear, LoRALinear))
    with torch.no_grad():
        plain.lora_A.copy_(aware.lora_A)
        for layer in (aware, plain):
            layer.lora_B.copy_(0.1 * torch.linspace(-1, 1, 64 * 4).view(64, 4))
        merged = quantize_nf4(base.weight + plain.delta_weight()).dequantize()
    x, slope = torch.randn(5, 128), torch.randn(5, 64)
    out = aware(x)
    torch.testing.assert_close(out, F.linear(x, merged, base.bias))
    assert not torch.allclose(out, plain(x), atol=1e-3)
    out.backward(slope)
    plain(x).backward(slope)
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(getattr(aware, name).grad, getattr(plain, name).grad)
