"""The bench on toy rows: what it refuses, computes and reports; two sides of real rows; no times."""

import dataclasses
import gc
import json
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from torch.utils.flop_counter import FlopCounterMode

from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.bench import cases, harness, peers
from spark_ft.bench.harness import Result, Row, Side, check_equal, compare, peak_extra_bytes, table
from spark_ft.cli import main as cli
from spark_ft.data.records import read_records
from spark_ft.files import ROOT
from spark_ft.lab.parity import qlora_against_peft
from spark_ft.methods.preference import dpo_loss, kto_loss, orpo_loss, simpo_loss
from spark_ft.scoring import sft_loss

calls: list[str] = []


def side(name="a", loss=2.0, gradient=(3.0, 4.0), key="w", step=None):
    return Side(step or (lambda: calls.append(name)), lambda: (loss, {key: torch.tensor(gradient)}))


def ours():
    return side("o")


def theirs():
    return side("t")


def wrong():
    return side("t", loss=3.0)


def allocate_200_mb():
    return side(step=lambda: torch.ones(50_000_000).sum())


ROW = Row("toy", "nothing at all", ours, theirs, lambda: (10**9, {(8, 4, 2): 3}))
SECONDS = ([2.0, 4.0, 1.0], [5.0, 6.0, 3.0])
RESULT = Result("toy", "a toy step", *SECONDS, "ototot", 1e-8, 2e-7, 50_000_000, 150_000_000, 10**10, 20.0)
WHERE = {"device": "CPU", "cores": 2, "threads": 1, "load_average": 0.1, "date": "2026-11-23"}
WHERE["versions"] = {"torch": "2.13"}


def test_equal_sides_give_their_differences():
    near = side(loss=2.0 * (1 + 1e-6), gradient=(3.0, 4.00001))
    loss, gradient = check_equal("row", side(loss=2.0), near)
    assert loss == pytest.approx(1e-6, rel=1e-3)
    assert gradient == pytest.approx(1e-5 / 5, rel=0.1)  # ‖(3, 4)‖ = 5; near 4, fp32 holds 1e-5 roughly


def test_unequal_sides_are_refused_and_nothing_is_timed():
    half = Side(None, lambda: (2.0, {"w": torch.tensor([3.0, 4.0]), "half": torch.tensor([1.5])}))
    right = Side(None, lambda: (2.0, {"w": torch.tensor([3.0, 4.0]), "half": torch.tensor([3.0])}))
    for bad, good, says in (
        (side(loss=2.002), side(), r"row: the losses differ by 1\.0e-03 \(ours 2\.002, theirs 2;"),
        (side(loss=float("nan")), side(), "the losses differ by nan"),
        (side(gradient=(3.0, 3.5)), side(), r"row: the gradients differ by 1\.0e-01 .* that of w"),
        (side(gradient=(3.0, float("nan"))), side(), "the gradients differ by nan"),
        (side(key="v"), side(), "only one side has a gradient of v, w"),
        (half, right, "most of all that of half"),
    ):
        with pytest.raises(ValueError, match=says):
            check_equal("row", bad, good)
    calls.clear()
    with pytest.raises(ValueError, match="losses differ"):
        compare(dataclasses.replace(ROW, theirs=wrong))
    assert calls == []


def test_the_sides_take_turns(monkeypatch):
    monkeypatch.setattr(harness, "peak_extra_bytes", lambda build: {"ours": 1, "theirs": 2}[build.__name__])
    calls.clear()
    result = compare(ROW, pairs=3)
    assert result.order == "ototot"
    assert "".join(calls) == "otot" + "ototot"  # warm-up, then what was timed
    assert len(result.ours_seconds) == len(result.theirs_seconds) == 3
    assert (result.ours_extra_bytes, result.theirs_extra_bytes) == (1, 2)
    assert result.gemm_gflops > 0
    reads = compare(dataclasses.replace(ROW, work=lambda: (0, {}), records=7), pairs=1)
    assert (reads.gemm_gflops, reads.records) == (0.0, 7), "a row without matrix products"


def test_ratios_are_pairwise_and_flops_those_of_the_median_step():
    moved = dataclasses.replace(RESULT, theirs_seconds=[3.0, 5.0, 6.0])
    assert (RESULT.ratios, sorted(moved.ratios)) == ([2.5, 1.5, 3.0], [1.25, 1.5, 6.0])
    assert RESULT.gflops == 10 / 2.0


@pytest.mark.slow
def test_memory_sees_what_one_side_allocates():
    quiet, greedy = peak_extra_bytes(ours), peak_extra_bytes(allocate_200_mb)
    assert 190e6 < greedy < 260e6
    assert quiet < 20e6


def test_flops_and_products_are_those_counted_by_hand_and_by_torch():
    model = add_adapters(tiny_llama(packed=False, vocab_size=100), AdapterConfig(rank=2))
    labels, mask = torch.full((2, 9), -100), torch.ones(2, 9, dtype=torch.long)
    labels[0, 5:9], labels[1, 4:7], mask[1, 7:] = 7, 8, 0
    batch = {"input_ids": torch.randint(0, 100, (2, 9)), "attention_mask": mask, "labels": labels}
    layers = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]  # q k v o gate up down
    by_hand = 2 * 16 * sum(4 * a * b + 6 * 2 * (a + b) for a, b in layers) + 4 * 7 * 100 * 32
    assert harness.step_flops(model, batch) == by_hand  # 16 real tokens, 7 of them completion
    assert harness.step_gemms(model, batch) == Counter([(16, a, b) for a, b in layers] * 2 + [(7, 32, 100)])
    batch["attention_mask"][:] = 1  # a padded model computes the padding, which is not needed work
    sft_loss(model, batch)  # the first time also compares heads, which is no part of a step
    with FlopCounterMode(display=False) as counter:
        sft_loss(model, batch)[0].backward()
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    done = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in products)
    # the first layer's input is the frozen embedding: q, k and v of that layer pass no gradient on
    unneeded = 2 * 18 * (32 * (32 + 16 + 16) + 3 * 2 * 32)
    assert done == harness.step_flops(model, batch) - unneeded


def test_the_table_and_what_stands_below_it():
    lines = table([RESULT], WHERE).splitlines()
    cells = "| toy | 2.00 s | 5.00 s | **2.50** (1.50–3.00) | 50 MB | 150 MB | **3.00** | 5 | 25% of 20 |"
    assert lines[2] == cells
    assert {line.count("|") for line in lines[:3]} == {10}
    assert "- toy: a toy step. Equal first: loss to 1e-08, gradient to 2e-07; 3 pairs." in lines
    assert lines[-1].startswith("CPU, 2 cores, 1 threads, load 0.1 at the start, fp32, torch 2.13, 2026")
    read = {"step_flops": 0, "gemm_gflops": 0.0, "records": 1_000_000, "ours_extra_bytes": 24_576}
    lines = table([dataclasses.replace(RESULT, **read)], WHERE).splitlines()
    assert lines[2].endswith("| 0 MB | 150 MB | – | – | – |"), "a ratio to next to nothing says nothing"
    assert any("every row; ours 500,000 rows per second, theirs 200,000; 3 pairs." in line for line in lines)


def test_the_commands_store_every_measurement_and_tell_an_unequal_row(monkeypatch, tmp_path, capsys):
    rows = {"bad": dataclasses.replace(ROW, name="bad", theirs=wrong), "toy": ROW}
    monkeypatch.setattr(cases, "ROWS", rows)
    with monkeypatch.context() as patch:
        patch.setattr(harness, "compare", lambda row, pairs: RESULT)
        assert cli(["bench", "toy", "--json", str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().out.startswith("| row |")
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["rows"][0]["theirs_seconds"] == RESULT.theirs_seconds
    assert written["versions"]["torch"] == torch.__version__
    calls.clear()
    assert cli(["bench", "bad"]) == 1
    assert "spark-ft bench: bad: the losses differ" in capsys.readouterr().err
    assert cli(["parity", "bad", "toy"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("bad: the losses differ by 3.3e-01 (ours 2, theirs 3;")
    assert second.startswith("toy                  equal: loss to 0e+00, gradient to 0e+00")
    assert calls == [], "parity times nothing"


def test_bad_arguments_are_named(capsys):
    for arguments, says in (
        (["bench", "nope"], 'no row is called "nope"'),
        (["parity", "nope"], 'no row is called "nope"'),
        (["bench", "--pairs", "0"], "at least one"),
        (["bench", "--json", "/no/b.json"], "no folder"),
    ):
        with pytest.raises(SystemExit):
            cli(arguments)
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_spark_ft_equals_peft_trl_and_bitsandbytes(capsys):
    """Loss and gradient of whole steps with LoRA, DoRA and QLoRA, of a layer and of NF4; preference steps
    are compared on a tiny model below, and on the embedded one by `spark-ft parity`."""
    rows = ["sft-step", "dora-step", "qlora-step", "lora-layer", "nf4-dequantize"]
    assert set(rows) < set(cases.PARITY)
    assert cli(["parity", *rows]) == 0
    assert capsys.readouterr().out.count(" equal: ") == len(rows)


def tiny_start(tokenizer):
    """The tiny llama with the embedded model's tokens."""
    return tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512), tokenizer


@pytest.mark.slow
def test_a_preference_step_is_trls_and_a_wrong_one_is_refused(tokenizer, monkeypatch):
    load = partial(tiny_start, tokenizer)
    pairs, thumbs = partial(cases.kitchen_rows, "preference", 2), partial(cases.kitchen_rows, "feedback", 4)
    for rows, loss, trainer, settings, wrong in (
        (pairs, dpo_loss, peers.dpo_trainer, {"keep_reference": True}, {"beta": 0.11}),
        (pairs, simpo_loss, peers.simpo_trainer, {}, {"gamma": 0.5}),
        (pairs, orpo_loss, peers.orpo_trainer, {}, {"weight": 0.2}),
        (thumbs, kto_loss, peers.kto_trainer, {"keep_reference": True}, {"undesirable_weight": 1.01}),
    ):
        theirs = cases.preference_theirs(load, rows, trainer, settings)
        check_equal(loss.__name__, cases.preference_ours(load, rows, loss), theirs)
        with pytest.raises(ValueError, match="differ by"):
            check_equal("wrong", cases.preference_ours(load, rows, partial(loss, **wrong)), theirs)
    monkeypatch.setattr(peers, "text_rows", lambda records, _: records)
    with pytest.raises(ValueError, match="scores other tokens"):
        cases.preference_theirs(load, pairs, peers.simpo_trainer, {})


@pytest.mark.parametrize("name", ["dpo-step", "kto-kept", "orpo-step-kitchen"])
def test_the_work_of_a_preference_step_is_what_torch_counts(tokenizer, name):
    given = partial(tiny_start, tokenizer), *cases.ROWS[name].ours.args[1:]
    flops, gemms = cases.preference_work(*given)
    side = cases.preference_ours(*given)
    side.step()  # the first one compares heads, and makes the reference where it is kept
    with FlopCounterMode(display=False) as counter:
        side.step()
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    done = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in products)
    (tokens,) = {rows for rows, *shape in gemms if shape == [32, 48]}
    # the first layer's input is the frozen embedding: q, k and v of that layer pass no gradient on
    assert done == flops - 2 * tokens * (32 * (32 + 16 + 16) + 3 * cases.SFT_RANK * 32)
    passes = {"dpo-step": 3, "kto-kept": 3, "orpo-step-kitchen": 2}[name]  # forward and backward are two
    assert gemms[tokens, 32, 48] == 2 * 2 * passes  # gate and up of two layers


@pytest.mark.slow
def test_ten_qlora_steps_lose_as_much_as_with_bitsandbytes_and_peft():
    torch.manual_seed(0)
    found = qlora_against_peft(read_records(ROOT / "data/kitchen_tickets/train.jsonl", "sft"), steps=10)
    assert (found["bytes equal"], len(found["ours"])) == (1, 10)
    assert found["ours"] == pytest.approx(found["theirs"], abs=1e-4)
    assert found["ours"][-1] < 0.7 * found["ours"][0], "and it learns"


def test_layers_and_readers_are_equal_and_files_of_rows_are_removed():
    check_equal("lora-layer", cases.layer_ours(64, 96), cases.layer_theirs(64, 96))
    ours, theirs = cases.read_ours(300), cases.read_theirs(300)
    assert check_equal("read-records", ours, theirs) == (0.0, 0.0)
    assert ours.step() == theirs.step() == 300
    folders = set(Path(tempfile.gettempdir()).glob("spark-ft-bench-*"))
    del ours, theirs
    gc.collect()
    assert len(folders - set(Path(tempfile.gettempdir()).glob("spark-ft-bench-*"))) == 2


def test_a_reader_that_loses_moves_or_changes_a_row_is_caught():
    changed = lambda rows: [*rows[:-1], {**rows[-1], "x": 1}]  # noqa: E731
    for spoil in (lambda rows: rows[:-1], lambda rows: [rows[1], rows[0], *rows[2:]], changed):
        badly = cases.reading(lambda path, spoil=spoil: lambda: iter(spoil(read_records(path, "sft"))), 300)
        with pytest.raises(ValueError, match="differ by"):
            check_equal("read-records", badly, cases.read_ours(300))
