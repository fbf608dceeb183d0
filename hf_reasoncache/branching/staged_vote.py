"""Branches started a few at a time, for as long as the vote is open."""

from __future__ import annotations

from collections.abc import Callable

from hf_reasoncache.arguments import require_int
from hf_reasoncache.branching.consensus import probability_kept, voters
from hf_reasoncache.branching.rules import ConsensusExit
from hf_reasoncache.branching.vote import Branch, Reason, VoteResult, Weight, majority, vote

CERTAIN = ConsensusExit()


def staged_vote(
    run: Callable[[list[int], int], list[list[Branch]]],
    problems: int,
    *,
    branches: int,
    stage: int,
    consensus: ConsensusExit | None = CERTAIN,
    weight: Weight = majority,
) -> list[VoteResult]:
    """Vote with up to `branches` branches of each problem, `stage` at a time.

    Branches of one problem tend to end together, so that consensus among branches that all run at
    once saves little. A branch that never starts costs nothing: problems whose vote is settled
    leave after each stage. Related to adaptive consistency (arXiv 2305.11860), with the rule of
    `probability_kept`.

    Parameters
    ----------
    run : Callable[[list[int], int], list[list[Branch]]]
        Runs new branches: gets the open problems (indices) and the number of branches of each, and
        returns the branches of each, as `VoteResult.branches` has them.
    problems : int
    branches, stage : int
        Most branches of a problem; those of a stage (of the last one, what is left).
    consensus : ConsensusExit or None
        None runs all branches.
    weight : Callable[[Branch], float]
        See `vote`.

    Raises
    ------
    ValueError
        If an argument is out of range, `run` returns other numbers of branches, or consensus
        stopped a branch inside a stage: it saw that stage's votes only.

    Examples
    --------
    >>> def run(problems, count):
    ...     exit = ConfidentExit(read_answer, branches=count, tokenizer=tokenizer,
    ...                          rules=ExitRules(consensus=None))
    ...     inputs = encode([prompts[i] for i in problems])
    ...     model.generate(**inputs, do_sample=True, num_return_sequences=count,
    ...                    stopping_criteria=[exit], logits_processor=[exit.recorder])
    ...     return [result.branches for result in exit.results()]
    >>> results = staged_vote(run, len(prompts), branches=16, stage=4)
    """
    require_int("problems", problems, low=0)
    require_int("branches", branches, low=1)
    require_int("stage", stage, low=1)
    found: list[list[Branch]] = [[] for _ in range(problems)]
    still_open = list(range(problems))
    started = 0
    while still_open and started < branches:
        count = min(stage, branches - started)
        new = run(still_open, count)
        if [len(each) for each in new] != [count] * len(still_open):
            raise ValueError(
                f"run: expected {count} branches of each of {len(still_open)} problems, got "
                f"{[len(each) for each in new]}."
            )
        if count < branches and any(b.reason is Reason.CONSENSUS for each in new for b in each):
            raise ValueError(
                "run: expected branches that no consensus stopped, since a stage knows its own "
                "votes only, got one; pass rules=ExitRules(consensus=None) to ConfidentExit."
            )
        started += count
        for problem, each in zip(still_open, new, strict=True):
            found[problem] += each
        if consensus is not None:
            still_open = [
                problem
                for problem in still_open
                if probability_kept(voters(found[problem]), branches - started)
                < consensus.confidence
            ]
    return [vote(each, weight) for each in found]
