"""The two ideas of Kara taken apart, beside eviction at a threshold: the table of docs/windows.md.

Scores with a causal mask or without, single tokens or chunks, three ratios; random tokens as the
control; the layer profile on top; and R-KV and ReasonAlloc with budgets that hold as many tokens on
average over the steps. The prompt is always kept. Every finished line is written at once; a run
that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from examples.research.arguments import parse, parser
from examples.research.harness import FULL, Summary, fill_table
from examples.research.policies import BUFFER, make_spec, policies, wave
from examples.research.tables import read_csv, show, versions
from examples.tiny_reasoner import (
    DEVELOPMENT_SEEDS,
    MODELS,
    TASKS,
    TEST_SEEDS,
    make_problems,
)
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import SlidingWindowCompressCache
from hf_reasoncache.evaluation import CacheSpec
from hf_reasoncache.scorers import Random, SnapKV

WINDOW, RECENT = 32, 16
"""Smaller than the defaults (128 and 32): chains of thought here are 200 to 400 tokens long."""

RATIOS = (0.2, 0.3, 0.4)
THRESHOLDS = {
    "random": (142, 147, 154),
    "R-KV": (142, 147, 154),
    "R-KV + wave + heads (ReasonAlloc)": (146, 186, 206),
}
"""Budgets at which a policy holds, on development problems of the Llama's `chain`, as many tokens
on average over the steps as windows do at each ratio; 142 is the least that holds the longest
prompt."""


def windows(family: str) -> dict[str, dict[str, Any]]:
    """Arguments of SlidingWindowCompressCache for each line."""
    causal = {"scorer": SnapKV(queries=WINDOW, kernel=1)}
    tokens = {"chunk_share": 0.0}
    layers = {"profile": wave(family, "sensitivity")}
    return {
        "bidirectional, chunks (Kara)": {},
        "bidirectional, tokens": tokens,
        "causal, chunks": causal,
        "causal, tokens": causal | tokens,
        "random, tokens": {"scorer": Random()} | tokens,
        "bidirectional, chunks + wave": layers,
        "bidirectional, chunks + wave + heads": layers | {"head_budgets": True},
        "bidirectional, tokens + wave": tokens | layers,
        "random, tokens + wave": {"scorer": Random()} | tokens | layers,
    }


def todo(family: str) -> Iterator[tuple[CacheSpec, int | float | None, str, str]]:
    """Yield cache, budget, ratio and name of every line."""
    yield FULL, None, "1", FULL.name
    common = {"window": WINDOW, "recent": RECENT}
    threshold = policies(family)
    for index, ratio in enumerate(RATIOS):
        for name, settings in windows(family).items():
            spec = CacheSpec(name, SlidingWindowCompressCache, common | settings)
            yield spec, ratio, f"{ratio:g}", name
        for name, budgets in THRESHOLDS.items():
            spec = make_spec(name, threshold[name], protect=True)
            yield spec, budgets[index], f"{ratio:g}", f"{name}, budget {budgets[index]}"


def line(ratio: str, name: str, summary: Summary) -> dict[str, str]:
    """One row of the table."""
    return {
        "ratio": ratio,
        "cache": name,
        **{task: share.percent for task, share in summary.by_task.items()},
        "finished": f"{100 * summary.finished:.1f}",
        "held": f"{summary.held:.1f}",
        "KiB": f"{summary.mean_kib:.0f}",
        "KiB at the end": f"{summary.kib:.0f}",
    }


def main(given: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the table."""
    made = parser(__doc__, "windows.md", problems=200)
    # With the prompt kept, any choice solves nearly all problems of the other tasks, and their
    # prompts are longer than the thresholds of `chain`.
    made.add_argument("--tasks", choices=TASKS, nargs="+", default=["chain"])
    made.add_argument("--development", action="store_true", help="other problems, no document")
    arguments = parse(made, given)
    seed = DEVELOPMENT_SEEDS[100] if arguments.development else TEST_SEEDS[0]
    table = f"windows-{arguments.family}"
    path = arguments.output / f"{table}.csv"
    done = {(row["ratio"], row["cache"]) for row in read_csv(path)}
    missing = [
        (spec, budget, partial(line, ratio, name))
        for spec, budget, ratio, name in todo(arguments.family)
        if (ratio, name) not in done
    ]
    problems = {
        task: make_problems(task, arguments.problems, seed, arguments.family)
        for task in arguments.tasks
    }
    rows = fill_table(path, *load(MODELS[arguments.family]), problems, missing)
    rows.sort(key=lambda row: float(row["ratio"]))
    note = (
        f"{arguments.family} model, {arguments.problems} "
        f"{'development' if arguments.development else 'fresh test'} problems of each task (seed "
        f"{seed}), greedy, float32, prompt kept; windows of {WINDOW} tokens, {RECENT} recent ones; "
        f"thresholds: compaction every {BUFFER} tokens; {versions()}. Percent, Wilson 95% "
        "intervals. `held`: tokens per KV head; `KiB`: all storages of the cache, per row; both "
        "mean over the steps that a solution takes. `at the end`: when the longest row of a batch "
        "ends."
    )
    show(rows, note, table, arguments)


if __name__ == "__main__":
    main()
