"""Batches of prompts of similar length, as large as a bound on memory lets them be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from hf_reasoncache.generation.lines import Line

RowBytes = Callable[[int, int, int], int]
"""From tokens of a prompt, tokens to write and rows that continue it to bytes of a cache."""


@dataclass(frozen=True)
class Job:
    """Some answers to one line.

    Attributes
    ----------
    line : Line
    samples : tuple of int
    """

    line: Line
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """How large a batch may be.

    Attributes
    ----------
    memory : int
        Bytes that the cache of a batch may hold between two steps.
    rows : int
        Answers in a batch.
    look_ahead : int
        Lines that are sorted by length before batches are cut.
    """

    memory: int
    rows: int
    look_ahead: int


def pack(
    wanted: Iterable[tuple[Line, Sequence[int]]], row_bytes: RowBytes, limits: Limits
) -> list[list[Job]]:
    """Cut answers into batches.

    The lines of a look-ahead window are sorted, longest prompts first; a batch takes neighbours, of
    the same sampling, until one more answer would exceed a limit. Every row counts as the longest
    of its batch, because that is what a padded cache holds.

    Parameters
    ----------
    wanted : iterable of line and samples
        In the order of the file.
    row_bytes : RowBytes
    limits : Limits

    Raises
    ------
    ValueError
        If one answer alone exceeds the memory; names the line.
    """
    jobs = [
        Job(line, part)
        for line, samples in wanted
        if samples
        for part in _parts(line, samples, row_bytes, limits)
    ]
    batches: list[list[Job]] = []
    for start in range(0, len(jobs), limits.look_ahead):
        window = sorted(jobs[start : start + limits.look_ahead], key=_order)
        for _, alike in groupby(window, key=lambda job: repr(job.line.sampling)):
            batches += _cut(alike, row_bytes, limits)
    return batches


def batch_bytes(batch: Sequence[Job], row_bytes: RowBytes) -> int:
    """Bytes of a batch's cache at its longest."""
    prompt = max(len(job.line.ids) for job in batch)
    new = max(job.line.max_new_tokens for job in batch)
    return sum(_job_bytes(job, prompt, new, row_bytes) for job in batch)


def _job_bytes(job: Job, prompt: int, new: int, row_bytes: RowBytes) -> int:
    """Bytes of a job in a batch of this longest prompt and answer."""
    rows = len(job.samples)
    # Where branches share a prompt, a budget leaves more to those of a shorter one.
    return max(row_bytes(prompt, new, rows), row_bytes(len(job.line.ids), new, rows))


def _order(job: Job) -> tuple[str, int, int]:
    return repr(job.line.sampling), -len(job.line.ids), -job.line.max_new_tokens


def _cut(jobs: Iterable[Job], row_bytes: RowBytes, limits: Limits) -> Iterable[list[Job]]:
    """Cut jobs, longest prompts first, wherever one more answer would exceed a limit."""
    batch: list[Job] = []
    rows = size = new = 0
    waiting = list(jobs)[::-1]
    while waiting:
        job = waiting.pop()
        for taken in range(len(job.samples), 0, -1):
            part = Job(job.line, job.samples[:taken])
            more = _grown(batch, size, new, part, row_bytes)
            if not batch or (rows + taken <= limits.rows and more <= limits.memory):
                batch.append(part)
                rows, size, new = rows + taken, more, max(new, job.line.max_new_tokens)
                break
        else:
            taken = 0
        if taken < len(job.samples):
            # The others read the prompt again, in the next batch.
            waiting.append(Job(job.line, job.samples[taken:]))
            yield batch
            batch, rows, size, new = [], 0, 0, 0
    if batch:
        yield batch


def _grown(batch: Sequence[Job], size: int, new: int, job: Job, row_bytes: RowBytes) -> int:
    """Bytes of a batch of `size` bytes and answers up to `new` tokens with one more job."""
    if job.line.max_new_tokens > new:
        return batch_bytes([*batch, job], row_bytes)
    # The first has the longest prompt. Summing up the whole batch for each job would be quadratic.
    return size + _job_bytes(job, len(batch[0].line.ids), new, row_bytes)


def _parts(
    line: Line, samples: Sequence[int], row_bytes: RowBytes, limits: Limits
) -> Iterable[tuple[int, ...]]:
    """Cut the samples of a line where they do not fit into one batch."""
    size = min(len(samples), limits.rows)
    prompt, new = len(line.ids), line.max_new_tokens
    try:
        row_bytes(prompt, new, 1)
    except ValueError as error:
        raise ValueError(f"{line.place}: {error}") from error
    while (needed := row_bytes(prompt, new, size)) > limits.memory:
        if size == 1:
            raise ValueError(
                f"{line.place}: expected an answer of {new} tokens to a prompt of {prompt} to fit "
                f"into --memory, {limits.memory:,} bytes, got {needed:,}; give more memory, a "
                "smaller --budget, or fewer --max-new-tokens."
            )
        size -= 1
    return [tuple(samples[start : start + size]) for start in range(0, len(samples), size)]
