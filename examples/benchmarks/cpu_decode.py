"""Time per token and bytes held while decoding on a CPU, against what a user would run instead.

    python -m examples.benchmarks.cpu_decode --output results/
    python -m examples.benchmarks.cpu_decode --quick

A random 16-layer Llama (hidden 512, 32 query and 8 KV heads of size 64) decodes one token per step.
All arms of a configuration live at the same time and take turns, a few steps each, so that whatever
else the machine does falls on all of them. The caches are filled with random keys and values; only
the memory of a prompt is measured by letting the model read one. On a machine that others use too,
`--threads 1 --clock cpu` gives steadier numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from examples.benchmarks.arms import build_arms
from examples.benchmarks.machine import Machine
from examples.benchmarks.prefill_memory import PrefillMemory, measure_prefill
from examples.benchmarks.results import Block, Row, draw, memory_table, write_csv
from examples.benchmarks.turns import CLOCKS, time_rounds, timed
from examples.benchmarks.workload import DTYPES, Shape, Work

PARTS = ("speed", "memory")

UNCOMPRESSED_GOAL = 1.5
COMPRESSED_GOALS = {1: 4.0, 4: 10.0}
EVICTION_GOAL = 0.05
"""Speed over DynamicCache at 8k tokens, by batch where there is a budget of 512; and what evicting
may add to the time of a cache that holds as many tokens without it."""


@dataclass(frozen=True)
class Plan:
    """Everything that a run depends on."""

    shape: Shape
    context: int
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    budget: int
    buffer: int
    steps: int
    rounds: int
    compile_limit: float
    clock: str
    seed: int
    goals: bool
    parts: tuple[str, ...]

    def work(self, dtype: str, batch: int) -> Work:
        """One configuration."""
        return Work(
            context=self.context,
            batch=batch,
            dtype=DTYPES[dtype],
            budget=self.budget,
            buffer=self.buffer,
            steps=self.steps,
            seed=self.seed,
            shape=self.shape,
        )


def measure_speed(model: LlamaForCausalLM, plan: Plan, dtype: str, batch: int) -> Block:
    """Run all arms of one configuration in turns."""
    arms, missing = build_arms(model, plan.work(dtype, batch), plan.compile_limit)
    seconds = time_rounds(arms, plan.rounds, CLOCKS[plan.clock])
    rows = [
        timed(Row(dtype, batch, plan.context, arm.name, type(arm).__name__), arm, seconds[arm.name])
        for arm in arms
    ]
    for name, (kind, reason) in missing.items():
        rows.insert(1, Row(dtype, batch, plan.context, name, kind, note=reason))
    return Block(tuple(rows))


def judge(block: Block, batch: int) -> list[str]:
    """Hold the arms against the goals."""

    def line(what: str, found: float, goal: str, met: bool) -> str:
        return f"  {what:44}{found:8.2f}  {goal:9}{'met' if met else 'missed'}"

    none, some = block.ratio("Arm", "Uncompressed"), block.ratio("Arm", "Compressed")
    goal = COMPRESSED_GOALS.get(batch)
    lines = [line("budget=None over DynamicCache", none, ">= 1.5", none >= UNCOMPRESSED_GOAL)]
    if goal is not None:
        lines.append(line("a budget over DynamicCache", some, f">= {goal:g}", some >= goal))
    added = block.ratio("Compressed", "Holds") - 1
    lines.append(line("evicting adds to the step, %", 100 * added, "<= 5", added <= EVICTION_GOAL))
    return lines


@torch.no_grad()
def run(plan: Plan, say: Callable[[str], None], output: Path | None) -> None:
    """Measure, print, and write the files."""
    machine = Machine.here(plan.seed)
    say(str(machine))
    shape = plan.shape
    say(
        f"random Llama: {shape.layers} layers, hidden {shape.hidden}, {shape.query_heads} query "
        f"and {shape.kv_heads} KV heads of size\n{shape.head_size}; budget {plan.budget}, buffer "
        f"{plan.buffer}; {plan.rounds} rounds, {plan.clock} time"
    )
    blocks: list[Block] = []
    memory: list[PrefillMemory] = []

    def save() -> None:
        # After each part: a long run that is interrupted leaves what it has measured.
        if output is not None:
            write_all(output, blocks, memory, machine, plan)

    for dtype in plan.dtypes:
        model = shape.build(plan.seed).to(DTYPES[dtype])
        for batch in plan.batches if "speed" in plan.parts else ():
            block = measure_speed(model, plan, dtype, batch)
            goals = judge(block, batch) if plan.goals else []
            say("\n".join(["", block.table(), *goals]))
            blocks.append(block)
            save()
        if "memory" in plan.parts:
            found = measure_prefill(model, plan.work(dtype, 1))
            say("\n" + memory_table(found))
            memory += found
            save()
    if output is not None:
        say(f"\nwrote {', '.join(sorted(path.name for path in output.iterdir()))} to {output}")


def write_all(
    output: Path,
    blocks: Sequence[Block],
    memory: Sequence[PrefillMemory],
    machine: Machine,
    plan: Plan,
) -> None:
    """Write what there is to a folder, which is made if needed."""
    output.mkdir(parents=True, exist_ok=True)
    columns = {"clock": plan.clock, "budget": plan.budget, "buffer": plan.buffer}
    if blocks:
        rows = [row for block in blocks for row in block.rows]
        write_csv(output / "cpu_decode.csv", rows, machine, **columns)
        draw(output / "cpu_decode.png", blocks, machine, plan.clock)
    if memory:
        write_csv(output / "cpu_prefill.csv", memory, machine, **columns)


def parse(arguments: Sequence[str] | None) -> tuple[Plan, Path | None, int | None]:
    """Read the command line: the plan, where files go, and the number of threads."""
    parser = argparse.ArgumentParser(
        description="Time per token and bytes held while decoding on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that everything runs"
    )
    parser.add_argument("--context", type=int, default=8192, help="tokens in the cache")
    parser.add_argument("--batches", default="1,4", help="rows decoded together, comma-separated")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    parser.add_argument(
        "--parts", choices=PARTS, nargs="+", default=PARTS, help="decoding, or reading a prompt"
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16, help="steps per round at full context")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile-limit",
        type=float,
        default=600,
        help="seconds for torch.compile; 0 leaves it out",
    )
    parser.add_argument("--threads", type=int, help="of torch; by default torch decides")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for CSV and PNG")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        parser.set_defaults(
            context=192,
            batches="1,2",
            dtypes="float32",
            layers=2,
            budget=48,
            buffer=16,
            steps=4,
            rounds=2,
        )
        chosen = parser.parse_args(arguments)
    plan = Plan(
        shape=Shape(layers=chosen.layers),
        context=chosen.context,
        batches=tuple(int(batch) for batch in chosen.batches.split(",")),
        dtypes=tuple(chosen.dtypes.split(",")),
        budget=chosen.budget,
        buffer=chosen.buffer,
        steps=chosen.steps,
        rounds=chosen.rounds,
        compile_limit=chosen.compile_limit,
        clock=chosen.clock,
        seed=chosen.seed,
        goals=not chosen.quick,
        parts=tuple(chosen.parts),
    )
    if unknown := set(plan.dtypes) - set(DTYPES):
        parser.error(f"--dtypes: expected some of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    return plan, chosen.output, chosen.threads


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    plan, output, threads = parse(arguments)
    if threads is not None:
        torch.set_num_threads(threads)
    run(plan, print, output)


if __name__ == "__main__":
    main()
