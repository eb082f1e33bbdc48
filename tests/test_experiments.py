"""Stored measurements: resumable, atomic, and stale as soon as their code, settings or data change."""

import json
import os
import subprocess
import sys

import pytest

from spark_ft.lab.experiments import runner as experiments
from spark_ft.lab.experiments.runner import agrees, experiment, known, load, measure, stale

STORED = sorted(
    path.stem for path in experiments.MEASUREMENTS.glob("*.json") if '"experiment"' in path.read_text()[:200]
)


@pytest.mark.parametrize("name", sorted({*STORED, *known()}))
def test_measurement_belongs_to_its_experiment(name):
    assert stale(name) is None, stale(name)


@pytest.mark.parametrize("name", STORED)
def test_measurement_tells_its_origin_and_no_folder(name):
    stored = load(name)
    assert len(stored["runs"]) >= 3
    for run in stored["runs"]:
        assert run["machine"]
        assert run["threads"] >= 1
        assert run["date"]
        assert {"python", "torch", "transformers"} <= set(run["versions"])
    text = json.dumps(stored)
    assert "/home" not in text
    assert str(experiments.ROOT) not in text


def helper(seed):
    return seed * 2


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "MEASUREMENTS", tmp_path)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {})
    monkeypatch.setattr(experiments, "known", lambda: experiments.EXPERIMENTS)
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
        # a comment is no part of the hash
        return {"value": seed}

    return toy


def test_other_settings_helpers_or_data_make_it_stale(registry, monkeypatch):
    (registry / "rows.jsonl").write_text("1\n")
    monkeypatch.setattr(experiments, "ROOT", registry)
    hashes = {
        _toy({"rank": 4}).hash,
        _toy({"rank": 8}).hash,
        _toy({"rank": 4}, code=[helper]).hash,
        _toy({"rank": 4}, data=["rows.jsonl"]).hash,
    }
    (registry / "rows.jsonl").write_text("2\n")
    hashes.add(_toy({"rank": 4}, data=["rows.jsonl"]).hash)
    assert len(hashes) == 5
    measure(_toy({"rank": 4}))
    _toy({"rank": 8})
    assert "changed since" in stale("toy")
    assert load("toy")["settings"] == {"rank": 4}
    measure(experiments.EXPERIMENTS["toy"])  # drops the old figures, measures anew
    assert stale("toy") is None


def test_data_that_changes_during_a_run_is_refused(registry, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", registry)
    (registry / "rows.jsonl").write_text("1\n")

    @experiment(data=["rows.jsonl"])
    def toy(seed):
        (registry / "rows.jsonl").write_text("2\n")
        return {}

    with pytest.raises(RuntimeError, match="changed while seed 0 ran"):
        measure(toy)
    assert not (registry / "toy.json").exists()


def test_a_comment_does_not_make_it_stale_but_code_does(registry):
    first = _toy({"rank": 4}).hash

    @experiment(settings={"rank": 4})
    def toy(seed):
        return {"value": seed}

    # only the decorator's line differs otherwise; compare like with like
    plain = toy.hash

    @experiment(settings={"rank": 4})
    def toy(seed):
        # why it returns the seed
        return {
            "value": seed,
        }

    assert toy.hash == plain
    assert first != plain


def test_never_measured_and_unknown_are_named(registry):
    _toy({})
    assert "never measured" in stale("toy")
    assert "no experiment" in stale("gone")
    with pytest.raises(FileNotFoundError, match="make experiments ARGS=toy"):
        load("toy")


def test_unknown_name_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["no_such"])
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
        "from spark_ft.lab.experiments import runner as experiments\n"
        "experiments.MEASUREMENTS, experiments.known = pathlib.Path(__file__).parent, lambda: experiments.EXPERIMENTS\n"
        "@experiments.experiment(settings={'rank': 4})\n"
        "def toy(seed):\n"
        "    return {'value': 2 * seed, 'parent': os.getppid(), 'threads': torch.get_num_threads()}\n"
        "if __name__ == '__main__':\n"
        "    experiments.measure(toy, jobs=2)\n"
        "    assert 'OMP_NUM_THREADS' not in os.environ\n"
        "    print(os.getpid())\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    stored = json.loads((tmp_path / "toy.json").read_text())["runs"]
    assert [(run["seed"], run["figures"]["value"], run["threads"]) for run in stored] == [
        (0, 0, 1),
        (1, 2, 1),
        (2, 4, 1),
    ]
    assert {run["figures"]["parent"] for run in stored} == {int(ended.stdout.split()[-1])}
