"""All batches of a run, shared by its processes, and what they took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from hf_reasoncache.evaluation.journal import Journal
from hf_reasoncache.generation.lines import Completion, Line
from hf_reasoncache.generation.packing import Limits, pack
from hf_reasoncache.generation.worker import Made, Worker
from hf_reasoncache.planning.units import amount
from hf_reasoncache.processes import Processes


@dataclass(frozen=True)
class Work:
    """What the processes of a run did, or one of them.

    Attributes
    ----------
    answers, tokens, batches : int
    seconds : float
        In generate; of several processes, the longest.
    cpu_seconds : float
        Of the processors meanwhile, all processes together.
    peak_bytes : int
        Most that the cache of a batch held.
    rows : int
        In the model, over all steps.
    steps : int
    """

    answers: int = 0
    tokens: int = 0
    batches: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    rows: int = 0
    steps: int = 0

    def after(self, made: Made) -> Work:
        """Add one batch."""
        return Work(
            self.answers + len(made.completions),
            self.tokens + made.tokens,
            self.batches + 1,
            self.seconds + made.seconds,
            self.cpu_seconds + made.cpu_seconds,
            max(self.peak_bytes, made.peak_bytes),
            self.rows + sum(made.live),
            self.steps + len(made.live),
        )

    @staticmethod
    def join(parts: Sequence[Work]) -> Work:
        """Add up the work of processes that ran at the same time."""
        sums = {
            name: sum(getattr(part, name) for part in parts)
            for name in ("answers", "tokens", "batches", "cpu_seconds", "rows", "steps")
        }
        return Work(
            **sums,
            seconds=max(part.seconds for part in parts),
            peak_bytes=max(part.peak_bytes for part in parts),
        )

    def lines(self, memory: int, processes: int) -> list[str]:
        """Return lines of at most 80 columns."""
        if not self.answers:
            return ["nothing was missing"]
        speed = self.tokens / self.seconds
        each = "" if processes == 1 else f" in each of {processes} processes"
        return [
            f"{self.answers:,} answers, {self.tokens:,} tokens in {self.seconds:.1f} s: "
            f"{speed:,.0f} tokens/s",
            f"batches: {self.batches}, with {self.rows / self.steps:.1f} rows in a step on average",
            f"cache: {amount(self.peak_bytes)} at most, bound {amount(memory)}{each} "
            f"({self.peak_bytes / memory:.0%})",
        ]


def generate(
    prompts: Sequence[Line],
    worker: Worker,
    journal: Journal[Completion],
    limits: Limits,
    samples: int,
    processes: Processes,
) -> Work:
    """Make the answers that the journal lacks, in all processes together."""
    missing = [
        (line, [n for n in range(samples) if (line.id, n) not in journal.records])
        for line in prompts
    ]
    batches = processes.share(pack(missing, worker.row_bytes, limits))
    work = Work()
    total = sum(len(job.samples) for batch in batches for job in batch)
    begin, tokens = time.perf_counter(), 0
    with processes.bar(total, "answer", progress=True) as bar:

        def step(rows: int) -> None:
            nonlocal tokens
            tokens += rows
            _show(bar, tokens / (time.perf_counter() - begin))

        for batch in batches:
            made = worker.run(batch, step)
            journal.add(made.completions)
            work = work.after(made)
            bar.update(len(made.completions))
    return Work.join(processes.gather(work))


def _show(bar: tqdm, speed: float) -> None:
    bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
    # Shown as often as the bar would be.
    bar.update(0)
