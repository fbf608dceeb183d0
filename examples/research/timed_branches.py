"""Seconds that each way to vote takes, live and in turns: one problem after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.research.branch_recordings import GROUP, Sampling, generate_arguments
from examples.tiny_reasoner import read_answer
from examples.tiny_reasoner.evaluate import encode
from examples.tiny_reasoner.tasks import Problem
from hf_reasoncache.branching import Branch, ConfidentExit, ExitRules, VoteResult, vote_in_waves
from hf_reasoncache.branching.generate import branch_generate

WARM_UP = 1
"""Problems that are run but not counted."""


@dataclass(frozen=True)
class LiveArm:
    """One way to run and to stop branches.

    Attributes
    ----------
    name : str
    rules : ExitRules
    shared : bool
        Whether the prompt is read and stored once, and rows that have stopped leave the batch.
    wave : int or None
        Branches that start at a time.
    """

    name: str
    rules: ExitRules
    shared: bool = True
    wave: int | None = None


@dataclass(frozen=True)
class Timing:
    """One arm over some problems.

    Attributes
    ----------
    arm : str
    seconds : tuple of float
        CPU time per problem.
    votes : tuple of VoteResult
    """

    arm: str
    seconds: tuple[float, ...]
    votes: tuple[VoteResult, ...]


@torch.inference_mode()
def time_arms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    sampling: Sampling,
    arms: Sequence[LiveArm],
    seed: int,
) -> list[Timing]:
    """Run every problem with every arm; arms take turns, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    votes: dict[str, list[VoteResult]] = {arm.name: [] for arm in arms}
    with tqdm(total=len(problems) * len(arms), unit="run", desc="timed") as progress:
        for index, problem in enumerate(problems):
            for arm in arms[index % len(arms) :] + arms[: index % len(arms)]:
                torch.manual_seed(seed + index)
                begin = time.process_time()
                result = _run(model, tokenizer, problem, sampling, arm)
                if index >= WARM_UP:
                    seconds[arm.name].append(time.process_time() - begin)
                    votes[arm.name].append(result)
                progress.update()
    return [Timing(arm.name, tuple(seconds[arm.name]), tuple(votes[arm.name])) for arm in arms]


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    sampling: Sampling,
    arm: LiveArm,
) -> VoteResult:
    model.set_attn_implementation("reasoncache" if arm.shared else "sdpa")
    inputs = encode(tokenizer, [problem])
    arguments = generate_arguments(sampling, problem)

    def run(_: list[int], count: int) -> list[list[Branch]]:
        # A wave knows its own votes only: between waves the vote decides, inside them nobody.
        rules = arm.rules if arm.wave is None else replace(arm.rules, consensus=None)
        exit = ConfidentExit(read_answer, branches=count, tokenizer=tokenizer, rules=rules)
        criteria = {"stopping_criteria": [exit], "logits_processor": [exit.recorder]}
        if arm.shared:
            branch_generate(model, inputs, num_branches=count, **arguments, **criteria)
        else:
            model.generate(**inputs, num_return_sequences=count, **arguments, **criteria)
        return [list(result.branches) for result in exit.results()]

    (result,) = vote_in_waves(
        run,
        1,
        branches=sampling.branches,
        wave=arm.wave or sampling.branches,
        consensus=arm.rules.consensus,
    )
    return result


def live_arms(waves: ExitRules, wave: int) -> list[LiveArm]:
    """List the arms that docs/self_consistency.md compares; `waves` are calibrated rules."""
    nothing, certain = ExitRules(consensus=None, group=GROUP), ExitRules(group=GROUP)
    return [
        LiveArm("prompt per branch, no exit", nothing, shared=False),
        LiveArm("shared prompt, no exit", nothing),
        LiveArm("shared prompt, certain consensus", certain),
        LiveArm(f"shared prompt, certain consensus, waves of {wave}", certain, wave=wave),
        LiveArm(f"shared prompt, calibrated, waves of {wave}", waves, wave=wave),
    ]
