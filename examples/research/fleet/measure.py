"""Measure how long the batch generator's steps take here, for `--measured` of the simulation.

    python -m examples.research.fleet.measure MODEL --prompts FILE --budget 96 \
        --rows 1,4,16 --out steps.csv

Each cache answers the prompts in batches of each size; rows leave as they end, so that the table
has steps of many sizes and lengths. Its lines are means over up to 16 neighbouring steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.research.fleet.caches import specs
from examples.research.fleet.command import run_command
from examples.research.fleet.measured import Measured, Sample, write_measured
from examples.research.fleet.server import Server
from hf_reasoncache.cli.loading import load_model
from hf_reasoncache.cli.options import Dtype, Dtypes, Model
from hf_reasoncache.evaluation.specs import Budget, CacheSpec
from hf_reasoncache.generation.lines import Defaults, Line, read_lines
from hf_reasoncache.generation.packing import Job
from hf_reasoncache.generation.sampling import Sampling
from hf_reasoncache.generation.worker import Made, Worker
from hf_reasoncache.planning import ModelSize

_TOGETHER = 16  # steps of one sample


@dataclass(frozen=True)
class Timed:
    """One batch, and when each of its forwards ended.

    Attributes
    ----------
    made : Made
    prompt : int
        Tokens of the longest prompt.
    rows : tuple of int
        Rows in the model at each forward; the first reads the prompts.
    seconds : tuple of float
        From the end of one forward to the end of the next: what is done in between, evictions too,
        belongs to the later one.
    """

    made: Made
    prompt: int
    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @staticmethod
    def run(worker: Worker, batch: Sequence[Job], wall: bool) -> Timed:
        """Answer a batch; count the process's CPU time, or wall time."""
        clock = time.perf_counter if wall else time.process_time
        times = [clock()]
        hook = worker.model.register_forward_hook(lambda *_: times.append(clock()))
        try:
            made = worker.run(batch, lambda rows: None)
        finally:
            hook.remove()
        seconds = tuple(after - before for before, after in pairwise(times))
        return Timed(made, max(len(job.line.ids) for job in batch), made.live, seconds)

    def samples(self, server: Server) -> list[Sample]:
        """What it says about prompts and steps."""
        found = [Sample(server.name, "prompt", self.rows[0], self.prompt, 0.0, self.seconds[0])]
        for rows, group in groupby(range(1, len(self.rows)), key=lambda step: self.rows[step]):
            steps = list(group)
            for first in range(0, len(steps), _TOGETHER):
                part = steps[first : first + _TOGETHER]
                moved = statistics.mean(
                    server.moved([self.prompt] * rows, [step] * rows)[0] for step in part
                )
                seconds = statistics.mean(self.seconds[step] for step in part)
                found.append(Sample(server.name, "step", rows, 1, moved, seconds))
        return found


def server_of(
    name: str,
    spec: CacheSpec,
    budget: Budget | None,
    model: PreTrainedModel,
    longest: tuple[int, int],
    timing: Any = None,
    room: int = 0,
) -> Server:
    """A simulated server with one kind of cache."""
    size = ModelSize.of(model.config, model.dtype)
    cache = spec.make(model.config, budget, None, 0)
    return Server(name, cache, model.config, size, room, timing, longest)


def load_lines(
    prompts: Path, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, limit: int | None = None
) -> list[Line]:
    """Read prompts, to be answered greedily."""
    return read_lines(prompts, tokenizer, Defaults(max_new_tokens, Sampling(0.0), 0, False), limit)


def sizes_of(text: str) -> list[int]:
    """Read sizes of batches with commas between them."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(f"--rows: expected whole numbers >= 1 with commas, got {text!r}.")
    return sizes


def first_jobs(lines: Sequence[Line], sizes: Sequence[int]) -> list[list[Job]]:
    """Batches of the first prompts, of each size."""
    if max(sizes) > len(lines):
        raise ValueError(f"expected at least {max(sizes)} prompts to measure, got {len(lines)}.")
    return [[Job(line, (0,)) for line in lines[:size]] for size in sizes]


def measure(
    model: Model,
    prompts: Annotated[Path, typer.Option(help="JSON lines, as for hf-reasoncache generate.")],
    budget: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens per KV head.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A CSV file.")],
    cache: Annotated[str, typer.Option(help="As for hf-reasoncache evaluate.")] = "reason-alloc",
    rows: Annotated[str, typer.Option(metavar="N,N,...", help="Sizes of batches.")] = "1,4,16",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 512,
    wall: Annotated[bool, typer.Option(help="Count wall time instead of CPU time.")] = False,
    dtype: Dtypes = Dtype.auto,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Write a table of measured step times, the full cache beside the given ones."""
    loaded = load_model(model, None, dtype, "cpu", threads)
    lines = load_lines(prompts, loaded[1], max_new_tokens)
    longest = max(len(line.ids) for line in lines), max_new_tokens
    batches = first_jobs(lines, sizes_of(rows))
    samples = []
    for name, (spec, number) in specs(cache, budget).items():
        worker = Worker(*loaded, spec, number, samples=1, chat=False, token_ids=False)
        server = server_of(name, spec, number, loaded[0], longest)
        # The first batch also pays for allocators and code that loads late.
        found = [Timed.run(worker, jobs, wall) for jobs in [batches[0], *batches]]
        mine = [sample for timed in found[1:] for sample in timed.samples(server)]
        fit = Measured.fit(mine)
        per_step, per_row, per_byte = fit.of_step
        typer.echo(
            f"{name}: a step takes {per_step * 1e3:.3f} ms + {per_row * 1e3:.3f} ms per row + "
            f"{per_byte * 1e12:.1f} ms per GB"
        )
        samples += mine
    write_measured(out, samples)
    typer.echo(out)


if __name__ == "__main__":
    run_command(measure)
