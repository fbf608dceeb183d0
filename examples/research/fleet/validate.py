"""Predict how long a real run of the batch generator takes, and compare.

    python -m examples.research.fleet.validate MODEL --measured FILE --prompts OTHER --budget 96 \
        --memory 4MB --out fleet_validation.csv

The prediction knows the step times of other prompts in other batches, and the lengths of prompts
and answers, as a trace has them. Measured and predicted batches take turns, because a machine that
others use too is not equally fast all the time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from examples.benchmarks.machine import Machine
from examples.research.fleet.caches import specs
from examples.research.fleet.command import run_command
from examples.research.fleet.measure import Timed, first_jobs, load_lines, server_of, sizes_of
from examples.research.fleet.measured import Measured
from examples.research.fleet.server import Server
from examples.research.fleet.simulator import decode_seconds
from examples.research.tables import write_csv
from hf_reasoncache.cli.loading import load_model
from hf_reasoncache.cli.options import Dtype, Dtypes, Model
from hf_reasoncache.evaluation.table import text_table
from hf_reasoncache.generation.packing import Job, Limits, pack
from hf_reasoncache.generation.worker import Made, Worker
from hf_reasoncache.planning.units import parse_bytes


@dataclass(frozen=True)
class Compared:
    """One batch: measured and predicted seconds, its rows and its peak of bytes."""

    measured: float
    predicted: float
    rows: int
    held: int
    bound: int

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1


def compare(server: Server, batch: Sequence[Job], made: Made, wall: bool, bound: int) -> Compared:
    """Predict one batch from the lengths of its prompts and answers."""
    prompt = max(len(job.line.ids) for job in batch)
    answers = [(each.completion_tokens,) for each in made.completions]
    predicted = server.prompt_seconds(prompt, len(answers))
    predicted += max(decode_seconds(server, prompt, answers))
    measured = made.seconds if wall else made.cpu_seconds
    return Compared(measured, predicted, len(answers), made.peak_bytes, bound)


def line_of(name: str, batches: list[Compared]) -> dict[str, str]:
    """Sum up the batches of one cache."""
    measured = sum(each.measured for each in batches)
    predicted = sum(each.predicted for each in batches)
    return {
        "cache": name,
        "answers": str(sum(each.rows for each in batches)),
        "batches": str(len(batches)),
        "rows": f"{statistics.mean(each.rows for each in batches):.1f}",
        "measured s": f"{measured:.1f}",
        "predicted s": f"{predicted:.1f}",
        "error": f"{predicted / measured - 1:+.1%}",
        "per batch": f"{statistics.mean(abs(each.error) for each in batches):.1%}",
        "memory": f"{max(each.held / each.bound for each in batches):.0%}",
    }


def validate(
    model: Model,
    measured: Annotated[Path, typer.Option(help="JSON lines: prompts whose steps are measured.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines: prompts whose batches are predicted.")],
    budget: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens per KV head.")],
    memory: Annotated[str, typer.Option(help="Bound on the bytes of a batch's cache.")],
    cache: Annotated[str, typer.Option(help="As for hf-reasoncache evaluate.")] = "reason-alloc",
    rows: Annotated[str, typer.Option(metavar="N,N,...", help="Measured sizes.")] = "1,4,16",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 512,
    wall: Annotated[bool, typer.Option(help="Count wall time instead of CPU time.")] = False,
    dtype: Dtypes = Dtype.auto,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A CSV file.")] = None,
) -> None:
    """Run the batch generator on prompts and compare its times with predicted ones."""
    bound, sizes = parse_bytes(memory), sizes_of(rows)
    loaded = load_model(model, None, dtype, "cpu", threads)
    machine = Machine.here(0)
    known = first_jobs(load_lines(measured, loaded[1], max_new_tokens), sizes)
    lines = load_lines(prompts, loaded[1], max_new_tokens)
    longest = max(len(line.ids) for line in lines), max_new_tokens
    table = []
    for name, (spec, number) in specs(cache, budget).items():
        worker = Worker(*loaded, spec, number, samples=1, chat=False, token_ids=False)
        server = server_of(name, spec, number, loaded[0], longest)
        batches = pack([(line, [0]) for line in lines], worker.row_bytes, Limits(bound, 256, 1024))
        # The first batch also pays for allocators and code that loads late.
        Timed.run(worker, known[0], wall)
        samples, made = [], []
        turns = max(len(batches), len(known))
        for turn in tqdm(range(turns), desc=name, unit="batch", leave=False):
            samples += Timed.run(worker, known[turn % len(known)], wall).samples(server)
            if turn < len(batches):
                made.append(worker.run(batches[turn], lambda rows: None))
        server.timing = Measured.fit(samples)
        found = [compare(server, *pair, wall, bound) for pair in zip(batches, made, strict=True)]
        table.append(line_of(name, found))
    typer.echo(f"{machine}\n{'wall' if wall else 'CPU'} time of one process, {threads} threads")
    typer.echo(text_table(list(table[0]), table))
    if out is not None:
        write_csv(out, [line | {k: str(v) for k, v in machine.row().items()} for line in table])


if __name__ == "__main__":
    run_command(validate)
