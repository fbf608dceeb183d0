"""What protecting and measuring cost: decode steps with and without.

python -m examples.benchmarks.risk_cost

A random Llama decodes; the caches take turns in one run and differ in one argument only.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from examples.benchmarks.machine import Machine
from examples.benchmarks.options import CLOCKS, add_common, new_parser, read_options
from examples.benchmarks.step_latency import Maker, measure
from examples.benchmarks.workload import DTYPES, Shape, Work
from hf_reasoncache import Protect, ReasonAllocCache
from hf_reasoncache.risk import Probes, Risk


def caches(budget: int, buffer: int) -> dict[str, Maker]:
    """Makers of the caches that are compared, by name."""
    settings: dict[str, dict[str, Any]] = {
        "nothing": {},
        "protect": {"protect": [(0, budget // 8)]},
        "fair=0.5": {"protect": Protect(prompt=False, fair=0.5)},
        "risk=True": {"risk": True},
        # Every eviction is above this limit: what holding it costs at worst.
        "risk=0": {"risk": 0.0},
        "Probes()": {"risk": Risk(measure=False, probes=Probes())},
    }
    common = {"budget": budget, "buffer": buffer, "protect": False}
    return {
        name: partial(ReasonAllocCache, **common | changes) for name, changes in settings.items()
    }


def table(steps: dict[str, list[float]]) -> str:
    """Mean time and what is added, in 80 columns."""
    means = {name: statistics.mean(times) for name, times in steps.items()}
    plain = means["nothing"]
    lines = [f"{'':16}{'ms per step':>14}{'added':>10}"]
    for name, mean in means.items():
        lines.append(f"{name:16}{mean:14.2f}{100 * (mean / plain - 1):+9.1f}%")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = new_parser("What protecting and measuring cost.")
    add_common(parser, threads=1, clock="cpu")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--periods", type=int, default=4, help="buffers of steps that are timed")
    tiny = {"context": 64, "budget": 32, "buffer": 16, "layers": 2, "periods": 1}
    chosen = read_options(parser, arguments, **tiny)
    work = Work(
        context=chosen.context,
        batch=chosen.batch,
        dtype=DTYPES["float32"],
        budget=chosen.budget,
        buffer=chosen.buffer,
        steps=chosen.buffer,
        seed=chosen.seed,
        shape=Shape(layers=chosen.layers),
    )
    steps, _ = measure(
        caches(chosen.budget, chosen.buffer),
        work,
        CLOCKS[chosen.clock],
        period=chosen.buffer,
        periods=chosen.periods,
    )
    print(Machine.here(chosen.seed))
    print(table(steps))


if __name__ == "__main__":
    main()
