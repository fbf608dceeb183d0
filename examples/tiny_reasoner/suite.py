"""Print an audit suite: `instr` problems whose five standing instructions are checked one by one.

    python -m examples.tiny_reasoner.suite --family llama > examples/tiny_reasoner/llama/audit.jsonl

Each prompt is asked in two orders, one the reverse of the other; over five problems, each
instruction stands twice at each place.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import DEFAULT_FAMILY, MODELS, TEST_SEEDS, Problem, make_problems

#: No other measurement uses these problems.
SEED = TEST_SEEDS[400]

SLOT = "[[instruction]]"
STEP_END = r".*?(?=#|</think>|$)"
#: Where a directive is due: the start of a step reads `#label node addend accumulator`.
PLACES = {
    "EACH": r"#\d+ \S+ \S+ \d " + STEP_END,
    "ODD": r"#\d+ \S+ \S+ [13579] " + STEP_END,
    "EVEN": r"#\d+ \S+ \S+ [02468] " + STEP_END,
    "FIVE": r"#\d*[05] \S+ \S+ \d " + STEP_END,
    "FINAL": r"</think>.*",
}


def make_case(number: int, problem: Problem) -> dict[str, Any]:
    """Turn a problem into a line of a suite."""
    texts = {name: f"DO {name} {word} ." for name, word in problem.instructions.items()}
    names = list(texts)
    prompt = problem.prompt
    for text in texts.values():
        prompt = prompt.replace(text, SLOT)
    count = len(names)
    order = [(place + number) % count for place in range(count)]
    return {
        "id": f"{problem.family}-{number}",
        "prompt": prompt,
        "instructions": [
            {
                "name": name,
                "text": texts[name],
                "check": {
                    "name": "wherever",
                    "places": PLACES[name],
                    "pattern": rf"\b{name} {problem.instructions[name]}\b",
                },
            }
            for name in names
        ],
        "orders": [order, order[::-1]],
        "check": {"name": "matches", "pattern": rf"^(?:(?!ANS ).)*ANS {problem.answer}\b"},
        "max_new_tokens": problem.max_new_tokens,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Print an audit suite as JSON lines.")
    parser.add_argument("--family", choices=sorted(MODELS), default=DEFAULT_FAMILY)
    parser.add_argument("--count", type=int, default=20, help="problems")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    problems = make_problems("instr", arguments.count, arguments.seed, arguments.family)
    for number, problem in enumerate(problems):
        print(json.dumps(make_case(number, problem)))


if __name__ == "__main__":
    main()
