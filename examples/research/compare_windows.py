"""The two ideas of Kara taken apart, beside eviction at a threshold: the table of docs/windows.md.

Scores with a causal mask or without, single tokens or chunks, three ratios; random tokens as the
control; the layer profile on top; and R-KV and ReasonAlloc with budgets that hold as many tokens on
average over the steps. The prompt is always kept. Every finished line is written at once; a run
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from examples.research.harness import FULL, Arm, Summary, run_arm, summarize
from examples.research.policies import BUFFER, make_arm, policies, wave
from examples.research.tables import insert, markdown, read_csv, write_csv
from examples.tiny_reasoner import (
    DEVELOPMENT_SEEDS,
    MODELS,
    TASKS,
    TEST_SEEDS,
    make_problems,
)
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import SlidingWindowCompressCache
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
    """Arguments of SlidingWindowCompressCache for each arm."""
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


def todo(arguments: argparse.Namespace) -> Iterator[tuple[str, Arm]]:
    """Yield ratio and arm of every line."""
    yield "1", FULL
    table = windows(arguments.family)
    threshold = policies(arguments.family)
    for index, ratio in enumerate(RATIOS):
        for name in table:
            settings = {"window": WINDOW, "recent": RECENT, "ratio": ratio} | table[name]
            yield (
                f"{ratio:g}",
                Arm(name, lambda config, s=settings: SlidingWindowCompressCache(config, **s)),
            )
        for name, budgets in THRESHOLDS.items():
            arm = make_arm(name, threshold[name], budgets[index], protect=True)
            yield f"{ratio:g}", Arm(f"{name}, budget {budgets[index]}", arm.make_cache)


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


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(MODELS), default="llama")
    # With the prompt kept, any choice solves nearly all problems of the other tasks, and their
    # prompts are longer than the thresholds of `chain`.
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=["chain"])
    parser.add_argument("--problems", type=int, default=200, help="of each task")
    parser.add_argument("--development", action="store_true", help="other problems, no document")
    parser.add_argument("--document", type=Path, default=Path("docs/windows.md"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then write the table."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    seed = DEVELOPMENT_SEEDS[100] if arguments.development else TEST_SEEDS[0]
    path = arguments.output / f"windows-{arguments.family}.csv"
    rows = read_csv(path)
    done = {(row["ratio"], row["cache"]) for row in rows}
    missing = [item for item in todo(arguments) if (item[0], item[1].name) not in done]
    model, tokenizer = load(MODELS[arguments.family])
    problems = {
        task: make_problems(task, arguments.problems, seed, arguments.family)
        for task in arguments.tasks
    }
    with tqdm(total=len(missing) * len(problems) * arguments.problems, unit="problem") as progress:
        for ratio, arm in missing:
            progress.set_description(f"{arm.name} {ratio}")
            runs = {
                task: run_arm(model, tokenizer, some, arm, batch_size=100, progress=progress)
                for task, some in problems.items()
            }
            rows.append(line(ratio, arm.name, summarize(runs)))
            write_csv(path, rows)
    note = (
        f"{arguments.family} model, {arguments.problems} "
        f"{'development' if arguments.development else 'fresh test'} problems of each task (seed "
        f"{seed}), greedy, float32, prompt kept; windows of {WINDOW} tokens, {RECENT} recent ones; "
        f"thresholds: compaction every {BUFFER} tokens; {platform.machine()} CPU, torch "
        f"{torch.__version__}, transformers {transformers.__version__}. Percent, Wilson 95% "
        "intervals. `held`: tokens per KV head; `KiB`: all storages of the cache, per row; both "
        "mean over the steps that a solution takes. `at the end`: when the longest row of a batch "
        "ends."
    )
    text = markdown(sorted(rows, key=lambda row: float(row["ratio"])), note)
    if arguments.development:
        print(text)
    else:
        insert(arguments.document, path.stem, text)
        print(f"{len(rows)} lines in {path} and in {arguments.document}")


if __name__ == "__main__":
    main()
