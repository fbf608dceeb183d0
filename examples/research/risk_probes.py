"""Do conformal bounds on the true error of evictions hold on other problems?

python -m examples.research.risk_probes --family llama

Shadow probes measure, at some heads and steps, how far a head's output is from attention to all
tokens so far. From the probes of some problems a bound is made for the probes of others, and the
share of those that it covers is measured: once from development problems to fresh test problems,
and over random halves of all of them. What the probes cost in time and memory is measured too.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.research.policies import make_arm, policies
from examples.research.tables import insert, markdown, write_csv
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TASKS, TEST_SEEDS, make_problems
from examples.tiny_reasoner.evaluate import encode, load
from examples.tiny_reasoner.tasks import Problem, check
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.risk import Probes, conformal_bound, coverage

ARMS = {
    "llama": [("R-KV", 160, True), ("R-KV + wave", 96, False)],
    "qwen3": [("R-KV + wave", 192, False)],
}
"""Policy, budget and whether the prompt is kept."""

ALPHAS = (0.2, 0.1, 0.05)
SPLITS = 100


@torch.inference_mode()
def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    arm: tuple[str, int, bool],
    family: str,
    probes: Probes | None,
    progress: tqdm | None = None,
    batch_size: int = 50,
) -> tuple[list[list[float]], float, int, int]:
    """Answer problems greedily.

    Returns
    -------
    list of list of float
        Errors at the probes of each problem until its answer ended, all layers and heads.
    float
        Seconds in generate.
    int, int
        Bytes of the shadows of the last batch, and of the cache itself.
    """
    name, budget, kept = arm
    settings: dict[str, Any] = policies(family)[name] | {"probes": probes}
    made = make_arm(name, settings, budget, kept)
    model.set_attn_implementation(made.attention)
    errors: list[list[float]] = []
    seconds, shadow, held = 0.0, 0, 0
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        inputs, cache = encode(tokenizer, batch), made.make_cache(model.config)
        begin = time.process_time()
        output = model.generate(
            **inputs,
            **cache_kwarg(cache),
            do_sample=False,
            max_new_tokens=max(problem.max_new_tokens for problem in batch),
        )
        seconds += time.process_time() - begin
        columns, report = inputs["input_ids"].shape[1], cache.report()
        shadow, held = sum(layer.shadow_bytes for layer in report.layers), report.total_bytes
        texts = tokenizer.batch_decode(output[:, columns:])
        for row, (problem, text) in enumerate(zip(batch, texts, strict=True)):
            end = columns + check(problem, text).length
            logs = [layer.probes.of_row(row) for layer in report.layers if layer.probes]
            errors.append([e for log in logs for e in log.until(end).error.flatten().tolist()])
        if progress is not None:
            progress.update(len(batch))
    return errors, seconds, shadow, held


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
    arm: tuple[str, int, bool], calibration: list[list[float]], fresh: list[list[float]]
) -> list[dict[str, str]]:
    """Rows of the table, one for each nominal coverage."""
    name, budget, kept = arm
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", choices=sorted(MODELS), default="llama")
    parser.add_argument("--problems", type=int, default=50, help="of each task, for each side")
    parser.add_argument("--heads", type=float, default=0.25, help="share with a shadow")
    parser.add_argument("--interval", type=int, default=8, help="steps between probes")
    parser.add_argument("--document", type=Path, default=Path("docs/risk.md"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(MODELS[arguments.family])
    probes = Probes(arguments.heads, arguments.interval)
    seeds = (DEVELOPMENT_SEEDS[300], TEST_SEEDS[0])
    sides = [
        [p for t in TASKS for p in make_problems(t, arguments.problems, seed, arguments.family)]
        for seed in seeds
    ]
    table, costs = [], []
    arms = ARMS[arguments.family]
    with tqdm(total=3 * len(arms) * len(sides[0]), unit="problem") as progress:
        for arm in arms:
            progress.set_description(f"{arm[0]} {arm[1]}")
            found = [
                run(model, tokenizer, side, arm, arguments.family, probes, progress)
                for side in sides
            ]
            plain = run(model, tokenizer, sides[1], arm, arguments.family, None, progress)
            table += lines(arm, found[0][0], found[1][0])
            _, seconds, shadow, held = found[1]
            costs.append(
                f"{arm[0]}, {arm[1]}: {100 * (seconds / plain[1] - 1):+.0f}% CPU time, shadows of "
                f"{shadow / 1024:.0f} KiB beside {held / 1024:.0f} KiB, "
                f"{statistics.mean(map(len, found[1][0])):.0f} probes per problem"
            )
    stem = f"risk_probes-{arguments.family}"
    write_csv(arguments.output / f"{stem}.csv", table)
    note = (
        f"{arguments.family} model, {arguments.problems} problems of each task on either side "
        f"(seeds {seeds[0]} and {seeds[1]}), greedy, float32; shadows of {arguments.heads:.0%} of "
        f"the KV heads, a probe every {arguments.interval} steps; coverage in percent, 95% "
        f"interval over problems; {SPLITS} random halves. Cost: {'; '.join(costs)}. "
        f"{platform.machine()} CPU, torch {torch.__version__}, transformers "
        f"{transformers.__version__}."
    )
    insert(arguments.document, stem, markdown(table, note))
    print(f"{len(table)} lines in {arguments.output / stem}.csv and in {arguments.document}")


if __name__ == "__main__":
    main()
