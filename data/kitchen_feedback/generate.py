"""Writes train.jsonl, one thumb a row, from the train cores of kitchen_preferences; `--check` only compares.

Each core gives three answers in metric with the thumb up and one in imperial with the thumb down: 3 to 1.
Question and wording are never matched as they are in the preference pairs, so no row repeats half of a pair.
"""

import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "kitchen_preferences"))

from cores import imperial, jsonl, metric, write_or_check  # noqa: E402
from generate import planned  # noqa: E402  (the one of kitchen_preferences)

SEED = 9


def make() -> list[dict]:
    rng = random.Random(SEED)
    rows: list[dict] = []
    for core, plan in sorted(planned("train")):
        count = len(core.questions)
        up = rng.choice([place for place in range(count) if place != plan.chosen])
        down = rng.choice([place for place in range(count) if place not in (plan.rejected, up)])
        for i, question in enumerate(core.questions):
            wording = (i + up) % count
            answer = metric(core.answers[wording], wording)
            rows.append({"prompt": question, "completion": answer, "label": True, "core": core.name})
        i = rng.randrange(count)
        wording = (i + down) % count
        answer = imperial(core.answers[wording], wording)
        rows.append({"prompt": core.questions[i], "completion": answer, "label": False, "core": core.name})
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    sys.exit(write_or_check(HERE, {"train.jsonl": jsonl(make())}, __doc__.splitlines()[0]))
