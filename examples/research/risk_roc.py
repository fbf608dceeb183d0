"""Does the risk of a run predict a wrong answer? ROC of risk against errors on a tiny reasoner.

python -m examples.research.risk_roc --family llama

Every problem is answered once under eviction with the risk measured. A run's risk is what its own
evictions did to the outputs of heads, until its answer ended; the area under the ROC curve is the
probability that a run with a wrong answer has the higher risk, 0.5 being chance. The length of the
chain of thought is there for comparison: runs that go astray are often longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import bootstrap, mannwhitneyu
from tqdm import tqdm

from examples.research.arguments import parse, parser
from examples.research.harness import Answered, answer_batches
from examples.research.policies import make_spec, policies
from examples.research.tables import publish, versions
from examples.tiny_reasoner import MODELS, TASKS, TEST_SEEDS, make_problems
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache.report import CacheReport

SPECS = {
    "llama": [
        ("R-KV", 160, True),
        ("R-KV + wave", 96, False),
        ("H2O (attention only)", 96, False),
        ("random", 96, False),
    ],
    "qwen3": [("R-KV", 192, False), ("H2O (attention only) + wave", 192, False)],
}
"""Policy, budget and whether the prompt is kept: settings at which some answers are wrong."""

SIGNALS = ("mean error", "90% error", "worst error", "mean mass lost", "length")


@dataclass(frozen=True)
class Signals:
    """One problem: whether the answer was wrong, and what could have told so."""

    task: str
    wrong: bool
    signals: tuple[float, ...]


def signals_of(report: CacheReport, row: int, end: int, length: int) -> tuple[float, ...]:
    """Signals of one row, from the evictions up to column `end`."""
    error, mass = [], []
    for layer in report.layers:
        if layer.risk is None:
            raise ValueError("expected a cache with risk=True, got one without.")
        own = layer.risk.of_row(row)
        before = own.columns <= end
        error.append(own.error[before].flatten())
        mass.append(own.mass[before].flatten())
    errors, masses = torch.cat(error), torch.cat(mass)
    if not errors.numel():
        return (0.0, 0.0, 0.0, 0.0, float(length))
    high = float(errors.quantile(0.9))
    return float(errors.mean()), high, float(errors.max()), float(masses.mean()), float(length)


def collect(batch: Answered) -> Iterator[Signals]:
    """Signals of the problems of a batch."""
    rows = zip(batch.problems, batch.outcomes, batch.ends, strict=True)
    for row, (problem, outcome, end) in enumerate(rows):
        signals = signals_of(batch.report, row, end, outcome.length)
        yield Signals(problem.task, not outcome.correct, signals)


def area(wrong: np.ndarray, right: np.ndarray, axis: int = -1) -> np.ndarray:
    """Probability that a wrong run has the higher value, ties counted half."""
    # The exact method is for a p-value that nobody asks for, and takes minutes.
    found = mannwhitneyu(wrong, right, axis=axis, method="asymptotic").statistic
    return found / (wrong.shape[axis] * right.shape[axis])


def describe(answered: Sequence[Signals], signal: int) -> str:
    """Area under the ROC curve of a signal; see `area_with_interval`."""
    values = np.array([each.signals[signal] for each in answered])
    return area_with_interval(values, np.array([each.wrong for each in answered], dtype=bool))


def area_with_interval(values: np.ndarray, is_wrong: np.ndarray) -> str:
    """Area under the ROC curve with a bootstrapped 95% interval; nothing where all are alike."""
    wrong, right = values[is_wrong], values[~is_wrong]
    if min(len(wrong), len(right)) < 10:
        return ""
    interval = bootstrap(
        (wrong, right),
        area,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return f"{area(wrong, right):.2f} ({interval.low:.2f}-{interval.high:.2f})"


def lines(name: str, budget: int, kept: bool, answered: Sequence[Signals]) -> list[dict[str, str]]:
    """Rows of the table: every task, then all of them together."""
    table = []
    for task in (*TASKS, "all"):
        own = [each for each in answered if task in (each.task, "all")]
        row = {
            "policy": name,
            "budget": str(budget),
            "prompt": "kept" if kept else "evictable",
            "task": task,
            "wrong": str(sum(each.wrong for each in own)),
            "of": str(len(own)),
        }
        table.append(row | {s: describe(own, place) for place, s in enumerate(SIGNALS)})
    return table


def draw(runs: dict[str, list[Signals]], path: Path) -> None:
    """Draw the ROC curves of the mean error, all tasks together."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    for name, answered in runs.items():
        order = sorted(answered, key=lambda each: -each.signals[0])
        wrong = np.cumsum([each.wrong for each in order])
        right = np.arange(1, len(order) + 1) - wrong
        axes.plot(right / max(right[-1], 1), wrong / max(wrong[-1], 1), label=name)
    axes.set_xlabel("share of right answers flagged")
    axes.set_ylabel("share of wrong answers flagged")
    axes.set_title("Mean error of a run's evictions against wrong answers")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the command line."""
    arguments = parse(parser(__doc__, "risk.md", problems=200))
    model, tokenizer = load(MODELS[arguments.family])
    problems = [
        problem
        for task in TASKS
        for problem in make_problems(task, arguments.problems, TEST_SEEDS[0], arguments.family)
    ]
    table: list[dict[str, str]] = []
    runs: dict[str, list[Signals]] = {}
    specs = SPECS[arguments.family]
    with tqdm(total=len(specs) * len(problems), unit="problem") as progress:
        for name, budget, kept in specs:
            settings = policies(arguments.family)[name] | {"risk": True}
            spec = make_spec(name, settings, kept)
            progress.set_description(f"{name} {budget}")
            batches = answer_batches(model, tokenizer, problems, spec, budget, 100, progress)
            found = [each for batch in batches for each in collect(batch)]
            table += lines(name, budget, kept, found)
            runs[f"{name}, {budget}"] = found
    stem = f"risk_roc-{arguments.family}"
    draw(runs, arguments.output / f"{stem}.png")
    note = (
        f"{arguments.family} model, {arguments.problems} fresh test problems of each task (seed "
        f"{TEST_SEEDS[0]}), greedy, float32; area under the ROC curve, bootstrapped 95% interval "
        f"(2000 resamples); {versions()}."
    )
    publish(table, note, stem, arguments.output, arguments.document)


if __name__ == "__main__":
    main()
