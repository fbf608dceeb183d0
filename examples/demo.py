"""The full cache against a budget, on the shipped model: right answers, speed and memory.

Run it with `make demo`, or `python -m examples.demo --help`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.tiny_reasoner import (
    DEVELOPMENT_SEEDS,
    MODELS,
    TASKS,
    Outcome,
    Problem,
    check,
    make_problems,
)
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation import Share
from hf_reasoncache.evaluation.generation import answer_batch
from hf_reasoncache.scorers import H2O, Random

SEED = DEVELOPMENT_SEEDS[500]
FULL = "full (DynamicCache)"


@dataclass(frozen=True)
class Run:
    """What one cache did on the problems of one task."""

    outcomes: list[Outcome]
    seconds: float
    bytes_per_row: float


def caches(family: str, budgets: Sequence[int]) -> dict[str, Callable[[PreTrainedConfig], Cache]]:
    """Return what is compared: the full cache, a budget split by a calibrated profile, chance."""
    # Chains of thought have 200 to 400 tokens here, so the defaults (128 and 8) are too far apart.
    common = {"buffer": 16, "window": 16, "protect": False}
    ours = {"scorer": H2O(recent_ratio=0.0), "profile": MODELS[family] / "tuned", **common}

    def make(budget: int, settings: dict) -> Callable[[PreTrainedConfig], Cache]:
        return lambda config: ReasonAllocCache(config, budget=budget, **settings)

    return {
        FULL: lambda config: DynamicCache(config=config),
        **{f"layer profile {each}": make(each, ours) for each in sorted(budgets, reverse=True)},
        f"random {min(budgets)}": make(min(budgets), {"scorer": Random(), **common}),
    }


def run(
    model: PreTrainedModel, tokenizer: Tokenizer, problems: Sequence[Problem], cache: Cache
) -> Run:
    """Answer the problems of one task in one batch, greedily."""
    found = answer_batch(
        model,
        [tokenizer(problem.prompt)["input_ids"] for problem in problems],
        cache,
        max_new_tokens=max(problem.max_new_tokens for problem in problems),
    )
    texts = tokenizer.batch_decode([list(answer.tokens) for answer in found.answers])
    outcomes = [check(*pair) for pair in zip(problems, texts, strict=True)]
    return Run(outcomes, found.seconds, found.final_bytes / len(problems))


def table(runs: Mapping[str, Mapping[str, Run]]) -> Table:
    """Compare the caches, 80 columns wide."""
    result = Table(pad_edge=False)
    result.add_column("cache")
    for heading in ("correct [95% CI]", "finished", "tok/s", "KiB/row", "of full"):
        result.add_column(heading, justify="right")
    full = kib(runs[FULL])
    for name, by_task in runs.items():
        outcomes = [outcome for each in by_task.values() for outcome in each.outcomes]
        correct = Share.of([outcome.correct for outcome in outcomes])
        low, high = correct.interval
        tokens = sum(outcome.length for outcome in outcomes)
        result.add_row(
            name,
            f"{correct.value:.2f} [{low:.2f}, {high:.2f}]",
            f"{sum(outcome.finished for outcome in outcomes) / len(outcomes):.2f}",
            f"{tokens / sum(each.seconds for each in by_task.values()):.0f}",
            f"{kib(by_task):.0f}",
            f"{kib(by_task) / full:.0%}",
        )
    return result


def kib(by_task: Mapping[str, Run]) -> float:
    """KiB held per sequence when generation ended, the most over the tasks."""
    return max(each.bytes_per_row for each in by_task.values()) / 1024


def plot(runs: Mapping[str, Mapping[str, Run]], path: Path) -> None:
    """Draw accuracy by task and memory of each cache, as a PNG."""
    figure = Figure(figsize=(11, 4), layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    places = range(len(runs))
    height = 0.8 / len(TASKS)
    for index, task in enumerate(TASKS):
        at = [place + (index - 1) * height for place in places]
        correct = [[o.correct for o in by_task[task].outcomes] for by_task in runs.values()]
        left.barh(at, [sum(each) / len(each) for each in correct], height, label=task)
    left.set_yticks(list(places), list(runs))
    left.invert_yaxis()
    left.set_xlabel("share of exact answers")
    left.set_xlim(0, 1)
    left.legend(loc="lower right")
    right.barh(list(places), [kib(by_task) for by_task in runs.values()], color="tab:gray")
    right.set_xlabel("KiB held per sequence")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run all caches, print the table, write the PNG."""
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
    runs: dict[str, dict[str, Run]] = {}
    chosen = caches(arguments.family, arguments.budgets)
    with tqdm(total=len(chosen) * len(TASKS) * arguments.problems, unit="problem") as progress:
        for name, make in chosen.items():
            progress.set_description(name)
            model.set_attn_implementation("sdpa" if name == FULL else "reasoncache")
            runs[name] = {}
            for task, some in problems.items():
                runs[name][task] = run(model, tokenizer, some, make(model.config))
                progress.update(len(some))
    plot(runs, arguments.output)
    console = Console(width=80)
    console.print(table(runs))
    console.print(
        f"{arguments.family} model, {arguments.problems} problems each of {', '.join(TASKS)} (seed "
        f"{SEED}).\nlayer profile: budget split over layers as calibrated, heads of a layer equal, "
        f"tokens kept by accumulated attention.\n{torch.get_num_threads()} threads, "
        f"{time.perf_counter() - begin:.0f} s; picture in {arguments.output}"
    )


if __name__ == "__main__":
    main()
