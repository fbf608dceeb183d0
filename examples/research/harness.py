"""Runs a model over problems with one cache after another, and counts what each one cost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.research.tables import read_csv, write_csv
from examples.tiny_reasoner.evaluate import encode
from examples.tiny_reasoner.tasks import Outcome, Problem, check
from hf_reasoncache.evaluation import CacheSpec, Share
from hf_reasoncache.evaluation.generation import Answer, answer_batch
from hf_reasoncache.evaluation.specs import Budget
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.report import CacheReport

SAMPLING = 4
"""Steps between two looks at how many tokens a cache holds."""


FULL = CacheSpec("full (DynamicCache)")


@dataclass(frozen=True)
class Run:
    """What one cache did on some problems.

    Attributes
    ----------
    outcomes : list of Outcome
    tokens : int
        Words generated until each completion ended.
    seconds : float
        Time in generate.
    bytes_per_row : float
        Bytes of all the cache's storages when generation ended, per sequence; largest over batches.
    held : float
        Tokens held per KV head, on average over the steps that a completion took, the completions,
        layers and heads.
    mean_bytes : float
        Bytes of all the cache's storages per sequence, on average over the same steps.
    """

    outcomes: list[Outcome]
    tokens: int
    seconds: float
    bytes_per_row: float
    held: float
    mean_bytes: float


@dataclass(frozen=True)
class Summary:
    """One cache over several tasks.

    Attributes
    ----------
    correct : Share
        Exact answers of all tasks together.
    finished : float
        Share of completions that gave an answer.
    length : float
        Mean words of a completion.
    speed : float
        Words per second of generate.
    kib : float
        KiB held per sequence when generation ended, the most over the tasks.
    held : float
        Tokens held per KV head on average over the steps of all tasks.
    mean_kib : float
        KiB held per sequence on average over the same steps.
    by_task : dict[str, Share]
        Exact answers of each task.
    followed : dict[str, Share]
        Of each standing instruction, how often its word was said where it was called for.
    """

    correct: Share
    finished: float
    length: float
    speed: float
    kib: float
    held: float
    mean_kib: float
    by_task: dict[str, Share]
    followed: dict[str, Share]


def summarize(runs: Mapping[str, Run]) -> Summary:
    """Join one cache's runs over the tasks."""
    outcomes = [outcome for run in runs.values() for outcome in run.outcomes]
    directives = dict.fromkeys(name for outcome in outcomes for name in outcome.followed)
    return Summary(
        correct=Share.of([outcome.correct for outcome in outcomes]),
        finished=sum(outcome.finished for outcome in outcomes) / len(outcomes),
        length=sum(outcome.length for outcome in outcomes) / len(outcomes),
        speed=sum(run.tokens for run in runs.values()) / sum(r.seconds for r in runs.values()),
        kib=max(run.bytes_per_row for run in runs.values()) / 1024,
        held=statistics.mean(run.held for run in runs.values()),
        mean_kib=statistics.mean(run.mean_bytes for run in runs.values()) / 1024,
        by_task={task: Share.of([o.correct for o in run.outcomes]) for task, run in runs.items()},
        followed={
            name: Share.of([mark for o in outcomes for mark in o.followed.get(name, [])])
            for name in directives
        },
    )


def run_spec(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    spec: CacheSpec,
    budget: Budget | None,
    *,
    batch_size: int = 50,
    progress: tqdm | None = None,
) -> Run:
    """Answer all problems greedily with one kind of cache.

    Parameters
    ----------
    model, tokenizer
        As `load` of the tiny reasoner gives them; the model's attention is set to the cache's.
    problems : sequence of Problem
    spec : CacheSpec
    budget : int, float or None
        Tokens, or a ratio of windows; None for the full cache.
    batch_size : int
        Sequences generated together, padded on the left.
    progress : tqdm, optional
        Advanced by the number of problems answered.
    """
    model.set_attn_implementation(spec.attention)
    outcomes: list[Outcome] = []
    answers: list[Answer] = []
    seconds = bytes_per_row = 0.0
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        found = answer_batch(
            model,
            [tokenizer(problem.prompt)["input_ids"] for problem in batch],
            spec.make(model.config, budget, None, 0),
            max_new_tokens=max(problem.max_new_tokens for problem in batch),
            sampling=SAMPLING,
        )
        seconds += found.seconds
        bytes_per_row = max(bytes_per_row, found.final_bytes / len(batch))
        texts = tokenizer.batch_decode([list(answer.tokens) for answer in found.answers])
        outcomes += [check(*pair) for pair in zip(batch, texts, strict=True)]
        answers += found.answers
        if progress is not None:
            progress.update(len(batch))
    # Of an answer that no look met there is none.
    seen = [answer for answer in answers if not math.isnan(answer.held)]
    return Run(
        outcomes=outcomes,
        tokens=sum(outcome.length for outcome in outcomes),
        seconds=seconds,
        bytes_per_row=bytes_per_row,
        held=statistics.mean(answer.held for answer in seen),
        mean_bytes=statistics.mean(answer.mean_bytes for answer in seen),
    )


def fill_table(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Mapping[str, Sequence[Problem]],
    missing: Sequence[tuple[CacheSpec, Budget | None, Callable[[Summary], dict[str, str]]]],
) -> list[dict[str, str]]:
    """Run caches on the problems of each task and write every finished line at once.

    Parameters
    ----------
    path : Path
        A CSV file, whose lines stay.
    model, tokenizer
    problems : mapping of str to sequence of Problem
        By task.
    missing : sequence of CacheSpec, budget and Callable
        What has no line yet; the last makes its line.
    """
    rows = read_csv(path)
    total = len(missing) * sum(map(len, problems.values()))
    with tqdm(total=total, unit="problem") as progress:
        for spec, budget, line in missing:
            progress.set_description(f"{spec.name} {budget}")
            runs = {
                task: run_spec(
                    model, tokenizer, some, spec, budget, batch_size=100, progress=progress
                )
                for task, some in problems.items()
            }
            rows.append(line(summarize(runs)))
            write_csv(path, rows)
    return rows


@dataclass(frozen=True)
class Answered:
    """Problems that were answered in one batch.

    Attributes
    ----------
    problems : sequence of Problem
    outcomes : list of Outcome
    ends : list of int
        Column at which each answer ended.
    seconds : float
        CPU time in generate.
    report : CacheReport
        Of their cache.
    """

    problems: Sequence[Problem]
    outcomes: list[Outcome]
    ends: list[int]
    seconds: float
    report: CacheReport


@torch.inference_mode()
def answer_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    spec: CacheSpec,
    budget: Budget,
    batch_size: int,
    progress: tqdm | None = None,
) -> Iterator[Answered]:
    """Answer problems greedily, batch by batch, each with a new cache that reports."""
    model.set_attn_implementation(spec.attention)
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        inputs, cache = encode(tokenizer, batch), spec.make(model.config, budget, None, 0)
        begin = time.process_time()
        output = model.generate(
            **inputs,
            **cache_kwarg(cache),
            do_sample=False,
            max_new_tokens=max(problem.max_new_tokens for problem in batch),
        )
        seconds = time.process_time() - begin
        columns = inputs["input_ids"].shape[1]
        texts = tokenizer.batch_decode(output[:, columns:])
        outcomes = [check(*pair) for pair in zip(batch, texts, strict=True)]
        ends = [columns + outcome.length for outcome in outcomes]
        yield Answered(batch, outcomes, ends, seconds, cache.report())
        if progress is not None:
            progress.update(len(batch))
