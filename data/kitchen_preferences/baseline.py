"""Prints how often an untaught model answers the test prompts in metric units: `python baseline.py`."""

import json
import sys
from pathlib import Path

from spark_ft.data.judge import is_metric
from spark_ft.evaluation import generate
from spark_ft.models import load_model
from spark_ft.stats import wilson_interval


def baseline(model, tokenizer, prompts: list[str], max_new_tokens: int = 80) -> tuple[list[str], list[bool]]:
    """Greedy answers to the prompts and the judge's verdict on each."""
    answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=25)
    return answers, [is_metric(answer) for answer in answers]


if __name__ == "__main__":
    rows = (Path(__file__).parent / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers, passed = baseline(*load_model(), [json.loads(row)["prompt"] for row in rows])
    for answer, metric in zip(answers, passed, strict=True):
        print(json.dumps({"metric": metric, "answer": answer}, ensure_ascii=False), file=sys.stderr)
    print(f"{sum(passed)} of {len(passed)} in metric units: {wilson_interval(sum(passed), len(passed))}")
