"""Seconds that each way to vote takes, live and in turns: one problem after another."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from examples.benchmarks.turns import rotated
from examples.research.branch_recordings import GROUP, Sampling, generate_arguments
from examples.research.reasoners import encode
from hf_reasoncache import SharedBranchCache
from hf_reasoncache.branching import Branch, ConfidentExit, ExitRules, VoteResult, staged_vote
from hf_reasoncache.branching.generate import branch_generate
from hf_reasoncache.evaluation.generation import cache_bytes
from hf_reasoncache.releases import cache_kwarg

LOOK = 16
"""Tokens between two looks at the bytes of a cache."""

WARM_UP = 1
"""Problems that are run but not counted."""


@dataclass(frozen=True)
class LiveMethod:
    """One way to run and to stop branches.

    Attributes
    ----------
    name : str
    rules : ExitRules
    shared : bool
        Whether the prompt is read and stored once, and rows that have stopped leave the batch.
    stage : int or None
        Branches that start at a time.
    """

    name: str
    rules: ExitRules
    shared: bool = True
    stage: int | None = None


@dataclass(frozen=True)
class Timing:
    """One method over some problems.

    Attributes
    ----------
    method : str
    seconds : tuple of float
        CPU time per problem.
    votes : tuple of VoteResult
    bytes : tuple of int
        The most that the storages of the caches took, per problem.
    """

    method: str
    seconds: tuple[float, ...]
    votes: tuple[VoteResult, ...]
    bytes: tuple[int, ...]


@torch.inference_mode()
def time_methods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Any],
    sampling: Sampling,
    methods: Sequence[LiveMethod],
    seed: int,
) -> list[Timing]:
    """Run every problem with every method, in turns, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    votes: dict[str, list[VoteResult]] = {method.name: [] for method in methods}
    held: dict[str, list[int]] = {method.name: [] for method in methods}
    with tqdm(total=len(problems) * len(methods), unit="run", desc="timed") as progress:
        for index, problem in enumerate(problems):
            for method in rotated(methods, index):
                torch.manual_seed(seed + index)
                begin = time.process_time()
                result, most = _run(model, tokenizer, problem, sampling, method)
                if index >= WARM_UP:
                    seconds[method.name].append(time.process_time() - begin)
                    votes[method.name].append(result)
                    held[method.name].append(most)
                progress.update()
    return [
        Timing(name, tuple(seconds[name]), tuple(votes[name]), tuple(held[name]))
        for name in seconds
    ]


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: Any,
    sampling: Sampling,
    method: LiveMethod,
) -> tuple[VoteResult, int]:
    model.set_attn_implementation("reasoncache" if method.shared else "sdpa")
    read_answer = sampling.reasoner.read_answer
    inputs = encode(sampling.reasoner, tokenizer, [problem])
    arguments = generate_arguments(sampling)
    most = 0

    def run(_: list[int], count: int) -> list[list[Branch]]:
        nonlocal most
        # A stage knows its own votes only: between stages the vote decides, inside them nobody.
        rules = method.rules if method.stage is None else replace(method.rules, consensus=None)
        exit = ConfidentExit(read_answer, branches=count, tokenizer=tokenizer, rules=rules)
        criteria = {"stopping_criteria": [exit], "logits_processor": [exit.recorder]}
        cache: Cache
        if method.shared:
            cache = SharedBranchCache(model.config)
            criteria |= cache_kwarg(cache)
        else:
            cache = DynamicCache(config=model.config)
            criteria |= {**cache_kwarg(cache), "num_return_sequences": count}
        with watch_bytes(model, cache) as held:
            if method.shared:
                branch_generate(model, inputs, num_branches=count, **arguments, **criteria)
            else:
                model.generate(**inputs, **arguments, **criteria)
        most = max(most, *held)
        return [list(result.branches) for result in exit.results()]

    (result,) = staged_vote(
        run,
        1,
        branches=sampling.branches,
        stage=method.stage or sampling.branches,
        consensus=method.rules.consensus,
    )
    return result, most


@contextmanager
def watch_bytes(model: PreTrainedModel, cache: Cache) -> Iterator[list[int]]:
    """Give a list of the bytes that a cache holds, which gets longer every `LOOK` tokens."""
    held = [0]

    def look(*_: object) -> None:
        if not cache.get_seq_length() % LOOK:
            held.append(cache_bytes(cache))

    hook = model.register_forward_hook(look)
    try:
        yield held
    finally:
        hook.remove()


def live_methods(stages: ExitRules, stage: int) -> list[LiveMethod]:
    """List the methods that docs/votes.md compares; `stages` are calibrated rules."""
    nothing, certain = ExitRules(consensus=None, group=GROUP), ExitRules(group=GROUP)
    return [
        LiveMethod("prompt per branch, no exit", nothing, shared=False),
        LiveMethod("shared prompt, no exit", nothing),
        LiveMethod("shared prompt, certain consensus", certain),
        LiveMethod(f"shared prompt, certain consensus, stages of {stage}", certain, stage=stage),
        LiveMethod(f"shared prompt, calibrated, stages of {stage}", stages, stage=stage),
    ]
