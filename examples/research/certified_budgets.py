"""Does a certified budget keep its promise on other questions, on pretrained weights?

    python -m examples.research.certified_budgets

The questions are those of `make demo-real`, whose answers are taken as they are; more budgets add
to the same journal. Random halves of them certify, the other halves are later questions.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from examples.real_model.demo import COMMON, SEED, specs
from examples.real_model.model import load
from examples.real_model.tasks import tasks
from examples.research.arguments import parse, real_parser
from examples.research.tables import publish, versions
from hf_reasoncache.evaluation import Grid, Record, Settings, certify, evaluate
from hf_reasoncache.evaluation.specs import Budget

BUDGETS = (48, 56, 64, 80, 96)
ALPHAS = (0.05, 0.1, 0.2)
SPLITS = 1000

Losses = dict[Budget, dict[tuple[str, str], float]]
"""Excess loss by budget, then by task and question."""


def excess(records: Sequence[Record], cache: str) -> Losses:
    """Which questions a cache loses that the full cache answers right."""
    full = {(each.task, each.question): each.correct for each in records if each.budget is None}
    found: Losses = {}
    for each in records:
        if each.cache == cache and each.budget is not None:
            key = each.task, each.question
            found.setdefault(each.budget, {})[key] = float(bool(full[key]) and not each.correct)
    return found


def line(losses: Losses, alpha: float, splits: int = SPLITS) -> dict[str, str]:
    """Certify on random halves of the questions; the row of a table says what the others lose."""
    questions = sorted(next(iter(losses.values())))
    half, draw = len(questions) // 2, random.Random(0)
    chosen, lost = Counter[str](), list[float]()
    by_task: dict[str, list[float]] = {}
    for _ in range(splits):
        order = draw.sample(questions, len(questions))
        seen = {budget: [rows[key] for key in order[:half]] for budget, rows in losses.items()}
        budget = certify(seen, alpha).budget
        chosen["none" if budget is None else f"{budget}"] += 1
        # Without a certificate the full cache answers.
        later = {key: 0.0 if budget is None else losses[budget][key] for key in order[half:]}
        lost.append(statistics.mean(later.values()))
        for task in {task for task, _ in later}:
            values = [loss for (name, _), loss in later.items() if name == task]
            by_task.setdefault(task, []).append(statistics.mean(values))
    return {
        "alpha": f"{100 * alpha:g}",
        "certified": ", ".join(f"{name} ({100 * n / splits:.0f}%)" for name, n in _sorted(chosen)),
        "lost later": f"{100 * statistics.mean(lost):.1f}",
        "90% of splits": f"{100 * statistics.quantiles(lost, n=10)[-1]:.1f}",
        "worst task": f"{100 * max(map(statistics.mean, by_task.values())):.1f}",
    }


def _sorted(chosen: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(chosen.items(), key=lambda each: float("inf" if each[0] == "none" else each[0]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer what is not answered yet, certify on many splits, write the table."""
    parser: argparse.ArgumentParser = real_parser(__doc__, "results.md")
    parser.add_argument("--questions", type=int, default=100, help="of each task")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--splits", type=int, default=SPLITS)
    parser.add_argument("--journal", type=Path, default=Path("build/demo-real/answers.jsonl"))
    given = parse(parser, arguments)
    model, tokenizer = load(torch.bfloat16, given.model)
    grid = Grid(tasks(given.questions), specs(), given.budgets, [SEED])
    settings = Settings(batch_size=100, chat=True)
    records = evaluate(model, tokenizer, grid, given.journal, settings)
    rows = [
        {"cache": spec.name, **line(excess(records, spec.name), alpha, given.splits)}
        for spec in specs()
        for alpha in ALPHAS
    ]
    note = (
        f"SmolLM2-135M-Instruct in bfloat16, {given.questions} questions of each of three tasks "
        f"(seed {SEED}), budgets {', '.join(map(str, given.budgets))}, buffer {COMMON['buffer']}, "
        f"prompt evictable. A random half of all questions certifies a budget, {given.splits} "
        "times; all figures but budgets in percent of the questions. `certified`: which budget, in "
        "how many of the splits; `lost later`: excess loss of the other half, mean, which `alpha` "
        "promises to bound, and its 90th percentile over the splits; `worst task`: mean of the "
        f"task that loses most. `python -m examples.research.certified_budgets`, {versions()}."
    )
    publish(rows, note, "certified-budgets", given.output, given.document)


if __name__ == "__main__":
    main()
