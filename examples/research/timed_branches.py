"""Seconds that each way to vote takes, live and in turns: one problem after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.benchmarks.turns import rotated
from examples.research.branch_recordings import GROUP, Sampling, generate_arguments
from examples.tiny_reasoner import read_answer
from examples.tiny_reasoner.evaluate import encode
from examples.tiny_reasoner.tasks import Problem
from hf_reasoncache.branching import Branch, ConfidentExit, ExitRules, VoteResult, staged_vote
from hf_reasoncache.branching.generate import branch_generate

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
    """

    method: str
    seconds: tuple[float, ...]
    votes: tuple[VoteResult, ...]


@torch.inference_mode()
def time_methods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    sampling: Sampling,
    methods: Sequence[LiveMethod],
    seed: int,
) -> list[Timing]:
    """Run every problem with every method, in turns, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    votes: dict[str, list[VoteResult]] = {method.name: [] for method in methods}
    with tqdm(total=len(problems) * len(methods), unit="run", desc="timed") as progress:
        for index, problem in enumerate(problems):
            for method in rotated(methods, index):
                torch.manual_seed(seed + index)
                begin = time.process_time()
                result = _run(model, tokenizer, problem, sampling, method)
                if index >= WARM_UP:
                    seconds[method.name].append(time.process_time() - begin)
                    votes[method.name].append(result)
                progress.update()
    return [Timing(name, tuple(seconds[name]), tuple(votes[name])) for name in seconds]


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    sampling: Sampling,
    method: LiveMethod,
) -> VoteResult:
    model.set_attn_implementation("reasoncache" if method.shared else "sdpa")
    inputs = encode(tokenizer, [problem])
    arguments = generate_arguments(sampling, problem)

    def run(_: list[int], count: int) -> list[list[Branch]]:
        # A stage knows its own votes only: between stages the vote decides, inside them nobody.
        rules = method.rules if method.stage is None else replace(method.rules, consensus=None)
        exit = ConfidentExit(read_answer, branches=count, tokenizer=tokenizer, rules=rules)
        criteria = {"stopping_criteria": [exit], "logits_processor": [exit.recorder]}
        if method.shared:
            branch_generate(model, inputs, num_branches=count, **arguments, **criteria)
        else:
            model.generate(**inputs, num_return_sequences=count, **arguments, **criteria)
        return [list(result.branches) for result in exit.results()]

    (result,) = staged_vote(
        run,
        1,
        branches=sampling.branches,
        stage=method.stage or sampling.branches,
        consensus=method.rules.consensus,
    )
    return result


def live_methods(stages: ExitRules, stage: int) -> list[LiveMethod]:
    """List the methods that docs/self_consistency.md compares; `stages` are calibrated rules."""
    nothing, certain = ExitRules(consensus=None, group=GROUP), ExitRules(group=GROUP)
    return [
        LiveMethod("prompt per branch, no exit", nothing, shared=False),
        LiveMethod("shared prompt, no exit", nothing),
        LiveMethod("shared prompt, certain consensus", certain),
        LiveMethod(f"shared prompt, certain consensus, stages of {stage}", certain, stage=stage),
        LiveMethod(f"shared prompt, calibrated, stages of {stage}", stages, stage=stage),
    ]
