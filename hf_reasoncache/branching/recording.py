"""Branches that ran to their ends, kept so that any rules can be tried on them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_reasoncache.branching.exit_monitor import ExitMonitor
from hf_reasoncache.branching.rules import ExitRules
from hf_reasoncache.branching.staged_vote import staged_vote
from hf_reasoncache.branching.vote import Branch, VoteResult, Weight, majority, vote


@dataclass(frozen=True, eq=False)
class Recording:
    """All branches of one problem, without any exit.

    Attributes
    ----------
    ids : tuple of LongTensor[T]
        What each branch generated, its end-of-sequence token included.
    confidence : tuple of Tensor[T, 3]
        Confidence of each token; see `Confidence`.
    answers : tuple of str or None
    ended : tuple of bool
        Whether the branch ended by itself; if not, it ran into the limit of length.
    """

    ids: tuple[torch.Tensor, ...]
    confidence: tuple[torch.Tensor, ...]
    answers: tuple[str | None, ...]
    ended: tuple[bool, ...]

    def part(self, branches: slice) -> Recording:
        """Return some of the branches."""
        return Recording(*(each[branches] for each in vars(self).values()))


def read_answer(
    answer: Callable[[Any], str | None],
    ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
) -> str | None:
    """Read the answer of a branch with a user's function.

    Parameters
    ----------
    answer : Callable
        Gets text, or ids if there is no tokenizer.
    ids : LongTensor[T]
    tokenizer : PreTrainedTokenizerBase or None

    Raises
    ------
    ValueError
        If it returns anything but a string or None.
    """
    found = answer(ids if tokenizer is None else tokenizer.decode(ids))
    if found is not None and not isinstance(found, str):
        raise ValueError(f"answer: expected a function to str or None, got {found!r} from it.")
    return found


def replay(
    recordings: Sequence[Recording],
    rules: ExitRules,
    *,
    answer: Callable[[Any], str | None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weight: Weight = majority,
    stage: int | None = None,
) -> list[VoteResult]:
    """Return what the votes would have been under some rules.

    generate draws its random numbers for all rows of a batch, whether they have stopped or not, so
    a recording has the same tokens as a run with exit up to where that stops: replay is exact.

    Parameters
    ----------
    recordings : sequence of Recording
        With equal numbers of branches.
    rules : ExitRules
    answer, tokenizer
        As for `ConfidentExit`; needed for `DecodeExit` only, which reads unfinished branches.
    weight : Callable[[Branch], float]
    stage : int, optional
        Start this many branches at a time, and consensus decides between the stages; see
        `staged_vote`. By default all at once.

    Raises
    ------
    ValueError
        If there is no recording, their branches differ in number, or `answer` is missing.
    """
    branches = {len(recording.ids) for recording in recordings}
    if len(branches) != 1:
        raise ValueError(
            "recordings: expected at least one, all with the same number of branches, got "
            f"{len(recordings)} with {sorted(branches)}."
        )
    if rules.decode is not None and answer is None:
        raise ValueError("answer: expected a function, as DecodeExit reads branches, got None.")
    if stage is None:
        return [vote(each, weight) for each in _play(recordings, rules, answer, tokenizer)]
    within = replace(rules, consensus=None)
    started = [0] * len(recordings)

    def run(problems: list[int], count: int) -> list[list[Branch]]:
        parts = []
        for problem in problems:
            first = started[problem]
            parts.append(recordings[problem].part(slice(first, first + count)))
            started[problem] += count
        return _play(parts, within, answer, tokenizer)

    return staged_vote(
        run,
        len(recordings),
        branches=branches.pop(),
        stage=stage,
        consensus=rules.consensus,
        weight=weight,
    )


def _play(
    recordings: Sequence[Recording],
    rules: ExitRules,
    answer: Callable[[Any], str | None] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[list[Branch]]:
    ids = [each for recording in recordings for each in recording.ids]
    answers = [each for recording in recordings for each in recording.answers]
    ended = torch.tensor([each for recording in recordings for each in recording.ended])
    lengths = torch.tensor([len(each) for each in ids])
    confidence = torch.nn.utils.rnn.pad_sequence(
        [each for recording in recordings for each in recording.confidence]
    )

    def read(row: int) -> str | None:
        if monitor.steps >= len(ids[row]) or answer is None:
            return answers[row]
        return read_answer(answer, ids[row][: monitor.steps], tokenizer)

    monitor = ExitMonitor(rules, len(ids), len(recordings[0].ids), read)
    for step in range(int(lengths.max())):
        monitor.step(ended & (lengths == step + 1), confidence[step])
    return monitor.results()
