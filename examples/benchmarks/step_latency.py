"""How long single decode steps take: eviction at a threshold against windows compressed in turn.

    python -m examples.benchmarks.step_latency --output docs/results
    python -m examples.benchmarks.step_latency --quick

A random Llama decodes a batch of rows of different length. All caches hold about as many tokens;
they differ in when they compress: at a threshold, which all rows of a batch reach at one step after
a long prompt, or window by window, at another step for each row and layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from transformers import Cache

from examples.benchmarks.machine import Machine
from examples.benchmarks.options import CLOCKS, add_common, add_output, new_parser, read_options
from examples.benchmarks.results import write_csv
from examples.benchmarks.workload import DTYPES, Shape, Work
from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import SnapKV

Maker = Callable[[Any], ReasonAllocCache | SlidingWindowCompressCache]


@dataclass(frozen=True)
class Step:
    """One line of the CSV."""

    cache: str
    step: int
    ms: str


def caches(budget: int, period: int, ratio: float) -> dict[str, Maker]:
    """Makers of the caches that are compared, by name."""
    threshold = {"budget": budget, "buffer": period, "protect": False}
    windows = {"window": period, "ratio": ratio, "recent": period // 4, "protect": False}
    return {
        "threshold, R-KV + heads": lambda config: ReasonAllocCache(
            config, head_budgets=True, **threshold
        ),
        "threshold, SnapKV": lambda config: ReasonAllocCache(config, scorer=SnapKV(), **threshold),
        "windows, bounded": lambda config: SlidingWindowCompressCache(
            config, max_budget=budget, **windows
        ),
        "windows": lambda config: SlidingWindowCompressCache(config, **windows),
    }


def paddings(batch: int, period: int, seed: int) -> torch.Tensor:
    """Padding of each row: random lengths, as those of prompts are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(period, (batch,), generator=generator)


@torch.no_grad()
def measure(
    makers: Mapping[str, Maker],
    work: Work,
    clock: Callable[[], float],
    *,
    period: int,
    periods: int,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of every step, and tokens held per KV head at the end, by cache."""
    model = work.shape.build(work.seed)
    model.set_attn_implementation("reasoncache")
    made: dict[str, Cache] = {}
    valid = torch.arange(work.context) >= paddings(work.batch, period, work.seed)[:, None]
    for name, make in makers.items():
        made[name] = make(model.config)
        work.fill(made[name], work.context, valid)
    generator = torch.Generator().manual_seed(work.seed)
    steps: dict[str, list[float]] = {name: [] for name in made}
    # The caches take turns, so that whatever else the machine does falls on all of them. The first
    # period is not counted: it begins with what the prompt has left to do.
    for turn in range(periods + 1):
        size = (period, work.batch, 1)
        tokens = torch.randint(work.shape.vocabulary, size, generator=generator)
        for name, cache in made.items():
            for token in tokens:
                begin = clock()
                model(input_ids=token, **cache_kwarg(cache), use_cache=True)
                if turn:
                    steps[name].append(1e3 * (clock() - begin))
    held = {name: cache.report().mean_held for name, cache in made.items()}
    return steps, held


def quantile(steps: Sequence[float], share: float) -> float:
    """A quantile of the steps."""
    return float(torch.tensor(steps, dtype=torch.float64).quantile(share))


def table(steps: dict[str, list[float]], held: dict[str, float]) -> str:
    """The distributions in 80 columns."""
    lines = [f"{'ms per step':26}{'mean':>9}{'median':>9}{'p99':>9}{'worst':>9}{'held':>9}"]
    for name, times in steps.items():
        mean = sum(times) / len(times)
        lines.append(
            f"{name:26}{mean:9.1f}{quantile(times, 0.5):9.1f}{quantile(times, 0.99):9.1f}"
            f"{max(times):9.1f}{held[name]:9.0f}"
        )
    return "\n".join(lines)


def draw(path: Path, steps: dict[str, list[float]], title: str) -> None:
    """One histogram per cache, under each other, on one axis."""
    # Without pyplot: no window system is asked for, and nothing global is left behind.
    figure = Figure(figsize=(8, 1.5 * len(steps) + 0.8))
    panels = figure.subplots(len(steps), 1, sharex=True, sharey=True)
    low = min(map(min, steps.values()))
    high = max(map(max, steps.values()))
    edges = torch.logspace(float(torch.tensor(low).log10()), float(torch.tensor(high).log10()), 60)
    for panel, (name, times) in zip(panels, steps.items(), strict=True):
        panel.hist(times, bins=edges.tolist(), color="tab:blue")
        panel.axvline(quantile(times, 0.99), color="tab:orange", linewidth=1.5, label="p99")
        panel.axvline(max(times), color="tab:red", linewidth=1.5, linestyle="--", label="worst")
        panel.set_yscale("log")
        panel.set_xscale("log")
        panel.set_ylabel("steps")
        panel.set_title(name, fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, loc="upper right")
    panels[-1].xaxis.set_major_formatter(ScalarFormatter())
    panels[-1].xaxis.set_minor_formatter(ScalarFormatter())
    panels[-1].set_xlabel("ms per step")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser("How long single decode steps take.")
    add_common(parser, threads=1, clock="cpu")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the longest row")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--period", type=int, default=128, help="window, and buffer of a threshold")
    parser.add_argument("--periods", type=int, default=3, help="timed, besides a first one")
    add_output(parser, "folder for step_latency.csv and .png")
    return read_options(parser, arguments, context=64, batch=4, layers=2, period=16, periods=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files."""
    chosen = parse(arguments)
    machine = Machine.here(chosen.seed)
    work = Work(
        context=chosen.context,
        batch=chosen.batch,
        dtype=DTYPES["float32"],
        budget=round(chosen.ratio * chosen.context),
        buffer=chosen.period,
        steps=chosen.period,
        seed=chosen.seed,
        shape=Shape(layers=chosen.layers),
    )
    steps, held = measure(
        caches(work.budget, chosen.period, chosen.ratio),
        work,
        CLOCKS[chosen.clock],
        period=chosen.period,
        periods=chosen.periods,
    )
    title = (
        f"batch {work.batch}, {chosen.layers} layers, {work.context} tokens read, "
        f"{chosen.periods} x {chosen.period} steps, {chosen.clock} time"
    )
    print(machine)
    print(title)
    print(table(steps, held))
    if chosen.output is None:
        return
    lines = [
        Step(name, step, f"{each:.3f}")
        for name, times in steps.items()
        for step, each in enumerate(times)
    ]
    write_csv(chosen.output / "step_latency.csv", lines, machine, clock=chosen.clock)
    draw(chosen.output / "step_latency.png", steps, title)
    print(f"wrote step_latency.csv and step_latency.png to {chosen.output}")


if __name__ == "__main__":
    main()
