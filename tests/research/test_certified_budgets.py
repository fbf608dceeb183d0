"""The table of certified budgets, from answers that are made up."""

from __future__ import annotations

import random

from examples.research.certified_budgets import excess, line
from tests.support.records import record

BUDGETS = range(20, 320, 10)


def test_later_questions_lose_what_was_promised_but_a_hard_task_may_lose_more() -> None:
    draw = random.Random(1)
    answers = []
    for task, scale in (("easy", 20), ("hard", 60)):
        for name in map(str, range(100)):
            needed = draw.expovariate(1 / scale)
            answers.append(record(task=task, question=name, correct=name != "0"))
            answers += [
                record(task=task, question=name, cache="rkv", budget=b, correct=needed < b)
                for b in BUDGETS
            ]
    losses = excess(answers, "rkv")
    assert list(losses) == list(BUDGETS) and len(losses[20]) == 200
    assert losses[20]["hard", "0"] == 0.0, "the full cache does not answer it either"
    row = line(losses, 0.1, splits=200)
    assert float(row["lost later"]) <= 10 < float(row["90% of splits"])
    assert float(row["worst task"]) > float(row["lost later"])
    assert "none" not in row["certified"]
    assert line(losses, 0.001, splits=5)["certified"] == "none (100%)"
