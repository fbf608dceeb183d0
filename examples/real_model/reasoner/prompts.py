"""Development problems as prompts for `hf-reasoncache calibrate`, as JSON lines.

python -m examples.real_model.reasoner.prompts > prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from .problems import DEVELOPMENT_SEEDS, TASKS, make_problems

SEED = DEVELOPMENT_SEEDS[900]
"""Problems that nothing else uses."""


def prompts(count: int, seed: int = SEED) -> Iterator[str]:
    """Yield a line for each of the first problems of every task."""
    for task in TASKS:
        for problem in make_problems(task, count, seed):
            yield json.dumps({"messages": [{"role": "user", "content": problem.prompt}]})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write prompts to calibrate on.")
    parser.add_argument("--count", type=int, default=3, help="of each task")
    print(*prompts(parser.parse_args().count), sep="\n")


if __name__ == "__main__":
    main()
