"""Which prompts look like look-up? The least budget of each task's prompts, before any run.

python -m examples.research.lookup
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.research.policies import WINDOW
from examples.research.tables import insert
from examples.tiny_reasoner import MODELS, TASKS, TEST_SEEDS, make_problems
from examples.tiny_reasoner.evaluate import load
from examples.tiny_reasoner.vocabulary import SMALL_TALK
from hf_reasoncache.evaluation.table import markdown_table
from hf_reasoncache.experimental import least_budget


def small_talk(count: int, tokens: int) -> list[str]:
    """Idle sentences without a fact, as many words as `tokens`."""
    draw = random.Random(TEST_SEEDS[0])
    texts = []
    for _ in range(count):
        words = ["<bos>"]
        while len(words) < tokens:
            words += [*draw.choice(SMALL_TALK), "."]
        texts.append(" ".join(words[:tokens]))
    return texts


def line(
    name: str,
    text: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> dict[str, str]:
    """One row of the table."""
    inputs = tokenizer(
        list(texts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    )
    found = least_budget(model, inputs, window=WINDOW)
    budgets = [each.budget for each in found]
    return {
        "model": name,
        "text": text,
        "tokens": f"{statistics.mean(each.prompt for each in found):.0f}",
        "least budget": f"{statistics.mean(budgets):.0f} ({min(budgets)}-{max(budgets)})",
        "looks like look-up": f"{sum(each.looks_like_lookup for each in found)} of {len(found)}",
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=20, help="of each task")
    parser.add_argument("--document", type=Path, default=Path("docs/risk.md"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = []
    for family, path in MODELS.items():
        model, tokenizer = load(path)
        model.set_attn_implementation("reasoncache")
        for task in TASKS:
            problems = make_problems(task, arguments.problems, TEST_SEEDS[0], family)
            prompts = [problem.prompt for problem in problems]
            table.append(line(family, f"{task}, prompt", model, tokenizer, prompts))
            whole = [f"{problem.prompt} {problem.solution}" for problem in problems]
            table.append(line(family, f"{task}, with its solution", model, tokenizer, whole))
        idle = small_talk(arguments.problems, 100)
        table.append(line(family, "small talk", model, tokenizer, idle))
    text = markdown_table(list(table[0]), table)
    insert(arguments.document, "lookup", text)
    print(text, end="")


if __name__ == "__main__":
    main()
