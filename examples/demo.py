"""The main job on the shipped model: the full cache against ReasonAllocCache at a few budgets.

Run it with `make demo`, or `python -m examples.demo --help`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from examples.research.harness import FULL, Arm, Summary, run_arm, summarize
from examples.research.policies import make_arm, policies, wave
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TASKS, make_problems
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache.scorers import Random

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SEED = DEVELOPMENT_SEEDS[500]


def arms(family: str, budgets: Sequence[int]) -> list[Arm]:
    """The full cache, ours at each budget, and random eviction at the smallest budget."""
    best = {**policies(family)["H2O (attention only) + wave"], "profile": wave(family, "tuned")}
    ours = [
        make_arm(f"ReasonAlloc {budget}", best, budget, protect=False)
        for budget in sorted(budgets, reverse=True)
    ]
    control = {"scorer": Random()}
    smallest = min(budgets)
    return [
        FULL,
        *ours,
        make_arm(f"random {smallest}", control, smallest, protect=False),
    ]


def table(rows: Mapping[str, Summary]) -> Table:
    """The comparison, 80 columns wide."""
    result = Table(pad_edge=False)
    result.add_column("cache")
    for heading in ("correct [95% CI]", "finished", "tok/s", "KiB/row", "of full"):
        result.add_column(heading, justify="right")
    full = next(iter(rows.values()))
    for name, row in rows.items():
        low, high = row.correct.interval
        result.add_row(
            name,
            f"{row.correct.value:.2f} [{low:.2f}, {high:.2f}]",
            f"{row.finished:.2f}",
            f"{row.speed:.0f}",
            f"{row.kib:.0f}",
            f"{row.kib / full.kib:.0%}",
        )
    return result


def plot(rows: Mapping[str, Summary], path: Path) -> None:
    """Accuracy by task and memory of each arm, as a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1), sharey=True)
    places = range(len(rows))
    height = 0.8 / len(TASKS)
    for index, task in enumerate(TASKS):
        at = [place + (index - 1) * height for place in places]
        left.barh(at, [row.by_task[task].value for row in rows.values()], height, label=task)
    left.set_yticks(list(places), list(rows))
    left.invert_yaxis()
    left.set_xlabel("share of exact answers")
    left.set_xlim(0, 1)
    left.legend(loc="lower right")
    right.barh(list(places), [row.kib for row in rows.values()], color="tab:gray")
    right.set_xlabel("KiB held per sequence")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run all arms, print the table, write the PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(MODELS), default="llama")
    parser.add_argument("--problems", type=int, default=32, help="of each task")
    parser.add_argument("--budgets", type=int, nargs="+", default=[112, 76, 64])
    parser.add_argument("--output", type=Path, default=Path("demo.png"))
    parser.add_argument("--threads", type=int, default=1, help="more do not help so small a model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    begin = time.perf_counter()
    model, tokenizer = load(MODELS[arguments.family])
    problems = {
        task: make_problems(task, arguments.problems, SEED, arguments.family) for task in TASKS
    }
    rows: dict[str, Summary] = {}
    chosen = arms(arguments.family, arguments.budgets)
    total = len(chosen) * len(TASKS) * arguments.problems
    with tqdm(total=total, unit="problem") as progress:
        for arm in chosen:
            progress.set_description(arm.name)
            runs = {
                task: run_arm(model, tokenizer, some, arm, batch_size=len(some), progress=progress)
                for task, some in problems.items()
            }
            rows[arm.name] = summarize(runs)
    plot(rows, arguments.output)
    console = Console(width=80)
    console.print(table(rows))
    console.print(
        f"{arguments.family} model, {arguments.problems} problems each of {', '.join(TASKS)} "
        f"(seed {SEED}), {torch.get_num_threads()} threads, "
        f"{time.perf_counter() - begin:.0f} s; picture in {arguments.output}"
    )


if __name__ == "__main__":
    main()
