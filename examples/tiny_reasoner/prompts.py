"""Print development problems as JSON lines, to calibrate a tiny reasoner on, or to answer.

python -m examples.tiny_reasoner.prompts --family llama > prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from . import DEFAULT_FAMILY, DEVELOPMENT_SEEDS, MODELS, TASKS, Problem, make_problems

#: No other choice uses these problems.
SEED = DEVELOPMENT_SEEDS[200]


def in_turn(tasks: Sequence[str], count: int, seed: int, family: str) -> list[Problem]:
    """Problems of each task, so that every share of them has every task."""
    batches = [make_problems(task, count, seed, family) for task in tasks]
    return [problem for problems in zip(*batches, strict=True) for problem in problems]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Print prompts as JSON lines.")
    parser.add_argument("--family", choices=sorted(MODELS), default=DEFAULT_FAMILY)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--count", type=int, default=8, help="problems of each task")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    chosen = (arguments.tasks, arguments.count, arguments.seed, arguments.family)
    for problem in in_turn(*chosen):
        print(json.dumps({"prompt": problem.prompt, "answer": problem.answer}))


if __name__ == "__main__":
    main()
