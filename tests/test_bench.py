"""The bench harness on toy rows: what it refuses, what it computes and how it reports. Nothing here asserts a time."""

import dataclasses
import gc
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spark_ft.bench import harness as bench
from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.bench.harness import (
    Result,
    Row,
    Side,
    check_equal,
    compare,
    peak_extra_bytes,
    step_flops,
    step_gemms,
    table,
)
from spark_ft.data.records import read_records
from spark_ft.scoring import sft_loss

calls: list[str] = []


def side(name="a", loss=2.0, gradient=(3.0, 4.0), key="w", step=None):
    def record():
        calls.append(name)

    return Side(step or record, lambda: (loss, {key: torch.tensor(gradient)}))


def ours():
    return side("o")


def theirs():
    return side("t")


def allocate_200_mb():
    return side(step=lambda: torch.ones(50_000_000).sum())


def work():
    return 10**9, {(8, 4, 2): 3}


ROW = Row("toy", "nothing at all", ours, theirs, work)
WHERE = {
    "device": "CPU",
    "cores": 2,
    "threads": 1,
    "load_average": 0.1,
    "versions": {"torch": "2.13"},
    "date": "2026-11-23",
}
RESULT = Result(
    "toy",
    "a toy step",
    [2.0, 4.0, 1.0],
    [5.0, 6.0, 3.0],
    "ototot",
    1e-8,
    2e-7,
    50_000_000,
    150_000_000,
    10**10,
    20.0,
)


class TestEquality:
    def test_equal_sides_give_their_differences(self):
        loss, gradient = check_equal(
            "row", side(loss=2.0), side(loss=2.0 * (1 + 1e-6), gradient=(3.0, 4.00001))
        )
        assert loss == pytest.approx(1e-6, rel=1e-3)
        assert gradient == pytest.approx(
            1e-5 / 5, rel=0.1
        )  # ‖(3, 4)‖ = 5; fp32 holds 1e-5 near 4 to a few percent

    def test_a_wrong_loss_stops(self):
        with pytest.raises(ValueError, match=r"row: the losses differ by 1\.0e-03 \(ours 2\.002, theirs 2;"):
            check_equal("row", side(loss=2.002), side())

    def test_a_wrong_gradient_stops_and_names_the_parameter(self):
        wrong = Side(None, lambda: (2.0, {"same": torch.tensor([4.0]), "half": torch.tensor([1.5])}))
        right = Side(None, lambda: (2.0, {"same": torch.tensor([4.0]), "half": torch.tensor([3.0])}))
        with pytest.raises(ValueError, match=r"gradients differ by 3\.0e-01 .* that of half"):
            check_equal("row", wrong, right)

    @pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"gradient": (3.0, float("nan"))}])
    def test_not_a_number_stops(self, bad):
        with pytest.raises(ValueError, match="differ by nan"):
            check_equal("row", side(**bad), side())

    def test_a_missing_gradient_stops(self):
        with pytest.raises(ValueError, match=r"only one side has a gradient of v, w"):
            check_equal("row", side(key="v"), side(key="w"))

    def test_nothing_is_timed_after_a_wrong_side(self):
        calls.clear()
        with pytest.raises(ValueError, match="nothing was timed"):
            compare(dataclasses.replace(ROW, theirs=lambda: side("t", loss=3.0)))
        assert calls == []


class TestTiming:
    def test_the_sides_take_turns(self, monkeypatch):
        monkeypatch.setattr(bench, "peak_extra_bytes", lambda build: {"ours": 1, "theirs": 2}[build.__name__])
        calls.clear()
        result = compare(ROW, pairs=3)
        assert result.order == "ototot"
        assert "".join(calls) == "otot" + "ototot"  # warm-up, then what was timed
        assert len(result.ours_seconds) == len(result.theirs_seconds) == 3
        assert (result.ours_extra_bytes, result.theirs_extra_bytes) == (1, 2)
        assert result.gemm_gflops > 0

    def test_ratios_are_pairwise(self):
        assert RESULT.ratios == [2.5, 1.5, 3.0]  # 5/2, 6/4, 3/1: median 2.5, which 5/2 of the medians also is
        moved = dataclasses.replace(RESULT, theirs_seconds=[3.0, 5.0, 6.0])
        assert sorted(moved.ratios) == [1.25, 1.5, 6.0]

    def test_gflops_are_of_the_median_step(self):
        assert RESULT.gflops == 10 / 2.0


class TestMemory:
    @pytest.mark.slow
    def test_sees_what_one_side_allocates(self):
        quiet, greedy = peak_extra_bytes(ours), peak_extra_bytes(allocate_200_mb)
        assert 190e6 < greedy < 260e6
        assert quiet < 20e6


@pytest.fixture
def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    model = LlamaForCausalLM(config)
    labels = torch.full((2, 9), -100)
    labels[0, 5:9], labels[1, 4:7] = 7, 8
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    return model, {"input_ids": torch.randint(0, 100, (2, 9)), "attention_mask": mask, "labels": labels}


class TestFlops:
    def test_counted_by_hand(self, tiny):
        model, batch = tiny
        add_adapters(model, AdapterConfig(rank=2))
        layers = [
            (32, 32),
            (32, 16),
            (32, 16),
            (32, 32),
            (32, 48),
            (32, 48),
            (48, 32),
        ]  # q k v o gate up down
        by_hand = 2 * 16 * sum(4 * a * b + 6 * 2 * (a + b) for a, b in layers) + 4 * 7 * 100 * 32
        assert step_flops(model, batch) == by_hand  # 16 real tokens, 7 of them completion
        assert step_gemms(model, batch) == Counter([(16, a, b) for a, b in layers] * 2 + [(7, 32, 100)])

    def test_within_what_torch_counts(self, tiny):
        model, batch = tiny
        batch["attention_mask"][:] = 1  # a padded model computes the padding, which is not needed work
        add_adapters(model, AdapterConfig(rank=2))
        with FlopCounterMode(display=False) as counter:
            sft_loss(model, batch)[0].backward()
        done = sum(
            n
            for op, n in counter.get_flop_counts()["Global"].items()
            if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
        )
        twice = sum(2 * 18 * 2 * a for a in (32, 32, 32, 32, 32, 32, 48)) * 2  # xAᵀ again in backward
        # the first layer's input is the frozen embedding: q, k and v of that layer pass no gradient on
        unneeded = 2 * 18 * (32 * (32 + 16 + 16) + 3 * 2 * 32)
        uncounted = (
            sum(2 * 18 * 2 * b for b in (32, 16, 16, 32, 48, 48, 32)) * 2
        )  # torch's counter does not know addmm_
        assert done == step_flops(model, batch) + twice - unneeded - uncounted


class TestReport:
    def test_table(self):
        lines = table([RESULT], WHERE).splitlines()
        assert lines[2] == (
            "| toy | 2.00 s | 5.00 s | **2.50** (1.50–3.00) | 50 MB | 150 MB | **3.00** | 5 | 25% of 20 |"
        )
        assert {line.count("|") for line in lines[:3]} == {10}
        assert "- toy: a toy step. Equal first: loss to 1e-08, gradient to 2e-07; 3 pairs." in lines
        assert lines[-1].startswith(
            "CPU, 2 cores, 1 threads, load 0.1 at the start, fp32, torch 2.13, 2026-11-23"
        )

    def test_a_row_that_reads_is_reported_by_its_rows_a_second(self):
        reads = dataclasses.replace(
            RESULT, step_flops=0, gemm_gflops=0.0, records=1_000_000, ours_extra_bytes=24_576
        )
        lines = table([reads], WHERE).splitlines()
        assert lines[2].endswith("| 0 MB | 150 MB | – | – | – |"), "a ratio to next to nothing says nothing"
        assert {line.count("|") for line in lines[:3]} == {10}
        assert (
            "- toy: a toy step. Equal first: every row; ours 500,000 rows a second, theirs 200,000; 3 pairs."
            in lines
        )

    def test_json_holds_every_measurement(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(bench, "ROWS", {"toy": ROW})
        monkeypatch.setattr(bench, "compare", lambda row, pairs: RESULT)
        assert bench.main(["toy", "--json", str(tmp_path / "b.json")]) == 0
        written = json.loads((tmp_path / "b.json").read_text())
        assert written["rows"][0]["theirs_seconds"] == RESULT.theirs_seconds
        assert written["versions"]["torch"] == torch.__version__
        assert capsys.readouterr().out.startswith("| row |")

    def test_an_unequal_row_is_an_error_in_one_line(self, monkeypatch, capsys):
        monkeypatch.setattr(
            bench, "ROWS", {"toy": dataclasses.replace(ROW, theirs=lambda: side("t", loss=3.0))}
        )
        assert bench.main(["toy"]) == 1
        assert "spark-ft bench: toy: the losses differ" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["nope"], 'no row is called "nope"'),
            (["--pairs", "0"], "at least one"),
            (["--json", "/no/b.json"], "no folder"),
        ],
    )
    def test_bad_arguments(self, arguments, says, capsys):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert says in capsys.readouterr().err


def test_lora_layer_sides_are_equal():
    check_equal("lora-layer", bench._layer_ours(64, 96), bench._layer_theirs(64, 96))


def test_a_lora_layer_scaled_wrongly_is_caught():
    from spark_ft.methods.lora import LoRALinear

    base, x = bench._layer_input(64, 96)
    layer = LoRALinear(base, bench.LAYER_RANK)
    layer.scaling = layer.alpha  # alpha without / rank
    wrong = bench._layer_side(layer, {"lora_A": layer.lora_A, "lora_B": layer.lora_B}, x)
    with pytest.raises(ValueError, match="differ"):
        check_equal("lora-layer", wrong, bench._layer_theirs(64, 96))


def test_reading_sides_give_the_same_rows_and_take_their_file_away():
    ours, theirs = bench._read_ours(300), bench._read_theirs(300)
    assert check_equal("read-records", ours, theirs) == (0.0, 0.0)
    assert ours.step() == theirs.step() == 300
    folders = set(Path(tempfile.gettempdir()).glob("spark-ft-bench-*"))
    del ours, theirs
    gc.collect()
    assert len(folders - set(Path(tempfile.gettempdir()).glob("spark-ft-bench-*"))) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows[:-1],
        lambda rows: [rows[1], rows[0], *rows[2:]],
        lambda rows: [*rows[:-1], {**rows[-1], "x": 1}],
    ],
)
def test_a_reader_that_loses_moves_or_changes_a_row_is_caught(spoil):
    wrong = bench._reading(lambda path: lambda: iter(spoil(read_records(path, "sft"))), 300)
    with pytest.raises(ValueError, match="differ by"):
        check_equal("read-records", wrong, bench._read_ours(300))


def test_a_row_without_matrix_products_can_be_compared(monkeypatch):
    monkeypatch.setattr(bench, "peak_extra_bytes", lambda build: 0)
    result = compare(dataclasses.replace(ROW, work=lambda: (0, {}), records=7), pairs=1)
    assert (result.gemm_gflops, result.records) == (0.0, 7)
