"""Time per token and bytes held while decoding on a CPU, against what a user would run instead.

    python -m examples.benchmarks.cpu_decode --output results/
    python -m examples.benchmarks.cpu_decode --parts speed --contexts 256,1024,4096 --budget 128
    python -m examples.benchmarks.cpu_decode --quick

A random 16-layer Llama (hidden 512, 32 query and 8 KV heads of size 64) decodes one token per step.
All decoders of a configuration live at the same time and take turns, a few steps each, so that
whatever else the machine does falls on all of them. The caches are filled with random keys and
values; only the memory of a prompt is measured by letting the model read one. On a machine that
others use too, `--threads 1 --clock cpu` gives steadier numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from examples.benchmarks.decoders import build_decoders
from examples.benchmarks.machine import Machine
from examples.benchmarks.options import (
    CLOCKS,
    add_common,
    add_output,
    dtypes_of,
    new_parser,
    read_options,
)
from examples.benchmarks.prefill_memory import PrefillMemory, measure_prefill
from examples.benchmarks.results import Block, Row, by_length, draw, memory_table, write_csv
from examples.benchmarks.turns import time_rounds, timed
from examples.benchmarks.workload import DTYPES, Shape, Work

PARTS = ("speed", "memory")

GOAL_CONTEXT = 8192
UNCOMPRESSED_GOAL = 1.5
COMPRESSED_GOALS = {1: 4.0, 4: 10.0}
EVICTION_GOAL = 0.05
"""Speed over DynamicCache at that many tokens, by batch where there is a budget of 512; and what
evicting may add to the time of a cache that holds as many tokens without it."""


@dataclass(frozen=True)
class Options:
    """Everything that a run depends on."""

    shape: Shape
    contexts: tuple[int, ...]
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

    def work(self, dtype: str, batch: int, context: int) -> Work:
        """One configuration."""
        return Work(
            context=context,
            batch=batch,
            dtype=DTYPES[dtype],
            budget=self.budget,
            buffer=self.buffer,
            steps=self.steps,
            seed=self.seed,
            shape=self.shape,
        )


def measure_speed(
    model: LlamaForCausalLM, options: Options, dtype: str, batch: int, context: int
) -> Block:
    """Run all decoders of one configuration in turns."""
    work = options.work(dtype, batch, context)
    decoders, missing = build_decoders(model, work, options.compile_limit)
    seconds = time_rounds(decoders, options.rounds, CLOCKS[options.clock])
    blank = Row(dtype, batch, context, "", "")
    rows = []
    for decoder in decoders:
        row = replace(blank, decoder=decoder.name, kind=type(decoder).__name__)
        rows.append(timed(row, decoder, seconds[decoder.name]))
    for name, (kind, reason) in missing.items():
        rows.insert(1, replace(blank, decoder=name, kind=kind, note=reason))
    return Block(tuple(rows))


def judge(block: Block, batch: int) -> list[str]:
    """Hold the decoders against the goals."""

    def line(what: str, found: float, goal: str, met: bool) -> str:
        return f"  {what:44}{found:8.2f}  {goal:9}{'met' if met else 'missed'}"

    none, some = block.ratio("Decoder", "Uncompressed"), block.ratio("Decoder", "Compressed")
    goal = COMPRESSED_GOALS.get(batch)
    lines = [line("budget=None over DynamicCache", none, ">= 1.5", none >= UNCOMPRESSED_GOAL)]
    if goal is not None:
        lines.append(line("a budget over DynamicCache", some, f">= {goal:g}", some >= goal))
    added = block.ratio("Compressed", "Holds") - 1
    lines.append(line("evicting adds to the step, %", 100 * added, "<= 5", added <= EVICTION_GOAL))
    return lines


@torch.no_grad()
def run(options: Options, say: Callable[[str], None], output: Path | None) -> None:
    """Measure, print, and write the files."""
    machine = Machine.here(options.seed)
    say(str(machine))
    say(
        f"{options.shape}; budget {options.budget}, buffer {options.buffer}; "
        f"{options.rounds} rounds, {options.clock} time"
    )
    blocks: list[Block] = []
    memory: list[PrefillMemory] = []

    def save() -> None:
        # After each part: a long run that is interrupted leaves what it has measured.
        if output is not None:
            write_all(output, blocks, memory, machine, options)

    for dtype in options.dtypes:
        model = options.shape.build(options.seed).to(DTYPES[dtype])
        cells = [(batch, context) for batch in options.batches for context in options.contexts]
        for batch, context in cells if "speed" in options.parts else ():
            block = measure_speed(model, options, dtype, batch, context)
            goals = judge(block, batch) if options.goals and context == GOAL_CONTEXT else []
            say("\n".join(["", block.table(), *goals]))
            blocks.append(block)
            save()
        if "memory" in options.parts:
            found = measure_prefill(model, options.work(dtype, 1, max(options.contexts)))
            say("\n" + memory_table(found))
            memory += found
            save()
    if len(options.contexts) > 1 and blocks:
        say("\n" + by_length(blocks))
    if output is not None:
        say(f"\nwrote {', '.join(sorted(path.name for path in output.iterdir()))} to {output}")


def write_all(
    output: Path,
    blocks: Sequence[Block],
    memory: Sequence[PrefillMemory],
    machine: Machine,
    options: Options,
) -> None:
    """Write what there is to a folder."""
    columns = {"clock": options.clock, "budget": options.budget, "buffer": options.buffer}
    if blocks:
        rows = [row for block in blocks for row in block.rows]
        write_csv(output / "cpu_decode.csv", rows, machine, **columns)
        draw(output / "cpu_decode.png", blocks, machine, options.clock)
    if memory:
        write_csv(output / "cpu_prefill.csv", memory, machine, **columns)


def parse(arguments: Sequence[str] | None) -> tuple[Options, Path | None]:
    """Read the command line: the options, and where files go."""
    parser = new_parser("Time per token and bytes held while decoding on a CPU.")
    add_common(parser)
    parser.add_argument(
        "--contexts", default=f"{GOAL_CONTEXT}", help="tokens in the cache, comma-separated"
    )
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
    add_output(parser, "folder for CSV and PNG")
    chosen = read_options(
        parser,
        arguments,
        contexts="96,192",
        batches="1,2",
        dtypes="float32",
        layers=2,
        budget=48,
        buffer=16,
        steps=4,
        rounds=2,
    )
    options = Options(
        shape=Shape(layers=chosen.layers),
        contexts=tuple(int(tokens) for tokens in chosen.contexts.split(",")),
        batches=tuple(int(batch) for batch in chosen.batches.split(",")),
        dtypes=dtypes_of(parser, chosen.dtypes),
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
    return options, chosen.output


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options, output = parse(arguments)
    run(options, print, output)


if __name__ == "__main__":
    main()
