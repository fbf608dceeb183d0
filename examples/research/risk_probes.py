"""Do conformal bounds on the true error of evictions hold on other problems?

python -m examples.research.risk_probes --family llama

Shadow probes measure, at some heads and steps, how far a head's output is from attention to all
tokens so far. From the probes of some problems a bound is made for the probes of others, and the
share of those that it covers is measured: once from development problems to fresh test problems,
and over random halves of all of them. What the probes cost in time and memory is measured too.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from examples.research.arguments import parse, parser
from examples.research.harness import Answered, answer_batches
from examples.research.policies import make_spec, policies
from examples.research.tables import publish, versions
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TASKS, TEST_SEEDS, make_problems
from examples.tiny_reasoner.evaluate import load
from examples.tiny_reasoner.tasks import Problem
from hf_reasoncache.risk import Probes, Risk, conformal_bound, coverage

SPECS = {
    "llama": [("R-KV", 160, True), ("R-KV + wave", 96, False)],
    "qwen3": [("R-KV + wave", 192, False)],
}
"""Policy, budget and whether the prompt is kept."""

ALPHAS = (0.2, 0.1, 0.05)
SPLITS = 100


@dataclass
class Probed:
    """What probes saw, and what they cost.

    Attributes
    ----------
    errors : list of list of float
        Errors at the probes of each problem until its answer ended, all layers and heads.
    seconds : float
        CPU time in generate.
    shadow, held : int
        Bytes of the shadows of the last batch, and of the cache itself.
    """

    errors: list[list[float]]
    seconds: float = 0.0
    shadow: int = 0
    held: int = 0

    @staticmethod
    def of(batches: Iterable[Answered]) -> Probed:
        """Sum up batches."""
        found = Probed([])
        for batch in batches:
            report = batch.report
            found.seconds += batch.seconds
            found.shadow = sum(layer.shadow_bytes for layer in report.layers)
            found.held = report.total_bytes
            for row, end in enumerate(batch.ends):
                logs = [layer.probes.of_row(row) for layer in report.layers if layer.probes]
                errors = [e for log in logs for e in log.until(end).error.flatten().tolist()]
                found.errors.append(errors)
        return found


def interval(shares: Sequence[float]) -> str:
    """Mean coverage in percent, with the 95% interval of a mean over problems."""
    mean = statistics.mean(shares)
    error = 1.96 * statistics.stdev(shares) / len(shares) ** 0.5
    return f"{100 * mean:.1f} ({100 * (mean - error):.1f}-{100 * min(1.0, mean + error):.1f})"


def split_coverage(groups: list[list[float]], alpha: float) -> float:
    """Mean coverage, in percent, of one half by the bound from the other, over random halves."""
    draw, found = random.Random(0), []
    for _ in range(SPLITS):
        order = draw.sample(groups, len(groups))
        half = len(order) // 2
        found.append(statistics.mean(coverage(order[half:], conformal_bound(order[:half], alpha))))
    return 100 * statistics.mean(found)


def lines(
    spec: tuple[str, int, bool], calibration: list[list[float]], fresh: list[list[float]]
) -> list[dict[str, str]]:
    """Rows of the table, one for each nominal coverage."""
    name, budget, kept = spec
    table = []
    for alpha in ALPHAS:
        bound = conformal_bound(calibration, alpha)
        table.append(
            {
                "policy": name,
                "budget": str(budget),
                "prompt": "kept" if kept else "evictable",
                "nominal": f"{100 * (1 - alpha):.0f}",
                "bound": f"{bound:.3f}",
                "covered, fresh": interval(coverage(fresh, bound)),
                "covered, splits": f"{split_coverage(calibration + fresh, alpha):.1f}",
            }
        )
    return table


def main() -> None:
    """Run the command line."""
    made = parser(__doc__, "risk.md", problems=50, of="of each task, for each side")
    made.add_argument("--heads", type=float, default=0.25, help="share with a shadow")
    made.add_argument("--interval", type=int, default=8, help="steps between probes")
    arguments = parse(made)
    model, tokenizer = load(MODELS[arguments.family])
    probes = Probes(arguments.heads, arguments.interval)
    seeds = (DEVELOPMENT_SEEDS[300], TEST_SEEDS[0])
    sides = [
        [p for t in TASKS for p in make_problems(t, arguments.problems, seed, arguments.family)]
        for seed in seeds
    ]
    table, costs = [], []
    specs = SPECS[arguments.family]
    with tqdm(total=3 * len(specs) * len(sides[0]), unit="problem") as progress:

        def answer(side: list[Problem], probes: Probes | None) -> Probed:
            risk = {"risk": Risk(measure=False, probes=probes)}
            spec = make_spec(name, policies(arguments.family)[name] | risk, kept)
            return Probed.of(answer_batches(model, tokenizer, side, spec, budget, 50, progress))

        for name, budget, kept in specs:
            progress.set_description(f"{name} {budget}")
            calibration, fresh = (answer(side, probes) for side in sides)
            plain = answer(sides[1], None)
            table += lines((name, budget, kept), calibration.errors, fresh.errors)
            costs.append(
                f"{name}, {budget}: {100 * (fresh.seconds / plain.seconds - 1):+.0f}% CPU time, "
                f"shadows of {fresh.shadow / 1024:.0f} KiB beside {fresh.held / 1024:.0f} KiB, "
                f"{statistics.mean(map(len, fresh.errors)):.0f} probes per problem"
            )
    stem = f"risk_probes-{arguments.family}"
    note = (
        f"{arguments.family} model, {arguments.problems} problems of each task on either side "
        f"(seeds {seeds[0]} and {seeds[1]}), greedy, float32; shadows of {arguments.heads:.0%} of "
        f"the KV heads, a probe every {arguments.interval} steps; coverage in percent, 95% "
        f"interval over problems; {SPLITS} random halves. Cost: {'; '.join(costs)}. "
        f"{versions()}."
    )
    publish(table, note, stem, arguments.output, arguments.document)


if __name__ == "__main__":
    main()
