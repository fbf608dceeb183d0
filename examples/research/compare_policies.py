"""Policy x budget on the tiny reasoners: the tables of docs/results.md.

Every finished line is written at once; a run that was stopped goes on where it was. The test
problems have never been used for a choice; the table "sweep" compares settings on the development
problems instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial

from examples.research.arguments import parse, parser
from examples.research.harness import FULL, Summary, fill_table
from examples.research.policies import BUFFER, TABLES, WINDOW, make_spec
from examples.research.tables import publish, read_csv, versions
from examples.tiny_reasoner import (
    DEVELOPMENT_SEEDS,
    MODELS,
    TASKS,
    TEST_SEEDS,
    make_problems,
)
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache.evaluation import CacheSpec


def line(budget: str, prompt: str, policy: str, summary: Summary) -> dict[str, str]:
    """One row of the table."""
    final = summary.followed.get("FINAL")
    return {
        "budget": budget,
        "prompt": prompt,
        "policy": policy,
        **{task: share.percent for task, share in summary.by_task.items()},
        "all": summary.correct.percent,
        "finished": f"{100 * summary.finished:.1f}",
        "length": f"{summary.length:.0f}",
        "FINAL": "" if final is None else f"{100 * final.value:.1f}",
        "KiB/row": f"{summary.kib:.0f}",
    }


def todo(arguments: argparse.Namespace) -> Iterator[tuple[CacheSpec, int | None, str]]:
    """Yield cache, budget and prompt treatment of every line."""
    yield FULL, None, "kept"
    table = TABLES[arguments.table](arguments.family)
    unknown = set(arguments.only or ()) - set(table)
    if unknown:
        raise ValueError(f"--only: expected names among {list(table)}, got {sorted(unknown)}.")
    table = {name: table[name] for name in arguments.only or table}
    for protect, budgets in ((True, arguments.protected), (False, arguments.unprotected)):
        for budget in budgets:
            for name, settings in table.items():
                prompt = "kept" if protect else "evictable"
                yield make_spec(name, settings, protect), budget, prompt


def main(given: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the table."""
    made = parser(__doc__, "results.md", problems=200)
    made.add_argument("--protected", type=int, nargs="*", default=[], metavar="BUDGET")
    made.add_argument("--unprotected", type=int, nargs="*", default=[], metavar="BUDGET")
    made.add_argument("--only", nargs="+", metavar="POLICY", help="leave out all others")
    made.add_argument("--table", choices=TABLES, default="policies")
    arguments = parse(made, given)
    name = f"{arguments.table}-{arguments.family}"
    is_sweep = arguments.table == "sweep"
    # Other problems than the ones that the calibration and the demo use.
    seed = DEVELOPMENT_SEEDS[100] if is_sweep else TEST_SEEDS[0]
    path = arguments.output / f"{name}.csv"
    done = {(row["budget"], row["prompt"], row["policy"]) for row in read_csv(path)}
    missing = [
        (spec, budget, partial(line, text, prompt, spec.name))
        for spec, budget, prompt in todo(arguments)
        if ((text := str(budget or "full")), prompt, spec.name) not in done
    ]
    problems = {
        task: make_problems(task, arguments.problems, seed, arguments.family) for task in TASKS
    }
    rows = fill_table(path, *load(MODELS[arguments.family]), problems, missing)
    kind = "development" if is_sweep else "fresh test"
    note = (
        f"{arguments.family} model, {arguments.problems} {kind} problems of each task (seed "
        f"{seed}), greedy, float32, compaction every {BUFFER} tokens, window {WINDOW} unless said "
        f"otherwise; {versions()}. Percent, Wilson 95% intervals."
    )
    publish(rows, note, name, arguments.output, arguments.document)


if __name__ == "__main__":
    main()
