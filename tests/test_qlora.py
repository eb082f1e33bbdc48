"""QLoRA with spark_ft alone trains as with bitsandbytes and PEFT: from the same weights, adapters and rows, the same losses."""

import pytest
import torch

from spark_ft.data.records import read_records
from spark_ft.files import ROOT
from spark_ft.lab.parity import qlora_against_peft


@pytest.mark.slow
def test_ten_steps_lose_as_much_as_with_bitsandbytes_and_peft():
    rows = read_records(ROOT / "data/kitchen_tickets/train.jsonl", "sft")
    torch.manual_seed(0)
    found = qlora_against_peft(rows, steps=10)
    print("at most", max(abs(a - b) for a, b in zip(found["ours"], found["theirs"], strict=True)))
    assert found["bytes equal"] == 1
    assert found["ours"] == pytest.approx(found["theirs"], abs=1e-4)
    assert len(found["ours"]) == 10
    assert found["ours"][-1] < 0.7 * found["ours"][0]  # and it learns
