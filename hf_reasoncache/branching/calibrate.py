"""Thresholds of early exit, set from held-out problems to an error rate that is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_reasoncache.branching.binomial import upper_bound
from hf_reasoncache.branching.recording import Recording, replay
from hf_reasoncache.branching.rules import ConsensusExit, DecodeExit, ExitRules, WeakExit
from hf_reasoncache.branching.vote import VoteResult, Weight, majority

FORMAT = 1
"""Version of the JSON file."""

LEVELS = (1.0, 0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
"""Consensus from certain to bold."""


@dataclass(frozen=True)
class ExitMeasurement:
    """What some rules did to the votes of some problems.

    Attributes
    ----------
    rules : ExitRules
    problems : int
    errors : int
        Problems whose vote with exit is not the vote of all branches run to their ends.
    bound : float
        Upper bound of the error rate at the calibration's confidence.
    saved : float
        Share of the tokens of all branches that exit saved.
    """

    rules: ExitRules
    problems: int
    errors: int
    bound: float
    saved: float

    @property
    def error(self) -> float:
        """Error rate."""
        return self.errors / self.problems

    def __str__(self) -> str:
        return (
            f"{self.errors} of {self.problems} votes changed ({self.error:.2%}, at most "
            f"{self.bound:.2%}), {self.saved:.1%} of the tokens saved"
        )


@dataclass(frozen=True)
class ExitCalibration:
    """Calibrated rules, and what they were calibrated on.

    Attributes
    ----------
    rules : ExitRules
        For `ConfidentExit`.
    target : float
        Error rate that was wanted.
    confidence : float
        Probability, over draws of the held-out problems, that the true rate is at most `target`.
    branches : int
        Branches of each problem; the rules hold for as many.
    stage : int or None
        Branches that start at a time; the rules hold for as many. None: all.
    tried : tuple of ExitMeasurement
        All candidates that were measured, up to the first that failed.
    """

    rules: ExitRules
    target: float
    confidence: float
    branches: int
    stage: int | None
    tried: tuple[ExitMeasurement, ...]

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        values = {"format_version": FORMAT} | asdict(self)
        Path(path).write_text(json.dumps(values, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ExitCalibration:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            If the file is anything else.
        OSError
            If it cannot be read.
        """
        try:
            values = json.loads(Path(path).read_text("utf-8"))
            if values.pop("format_version") != FORMAT:
                raise ValueError(f"expected format_version {FORMAT}.")
            values["rules"] = ExitRules.from_json(values["rules"])
            values["tried"] = tuple(
                ExitMeasurement(**each | {"rules": ExitRules.from_json(each["rules"])})
                for each in values["tried"]
            )
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected a file of ExitCalibration.save, got another: {error}"
            ) from error


def measure_exit(
    recordings: Sequence[Recording],
    rules: ExitRules,
    *,
    confidence: float = 0.95,
    answer: Callable[[Any], str | None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weight: Weight = majority,
    stage: int | None = None,
) -> ExitMeasurement:
    """Compare the votes under some rules with those of all branches.

    Parameters
    ----------
    recordings : sequence of Recording
        Problems that the rules were not chosen on, for an honest rate.
    rules : ExitRules
    confidence : float
        Of `ExitMeasurement.bound`.
    answer, tokenizer, weight, stage
        See `replay`.
    """
    play = partial(replay, recordings, weight=weight, answer=answer, tokenizer=tokenizer)
    full = play(ExitRules(consensus=None, group=rules.group))
    return _compare(full, play(rules, stage=stage), rules, confidence)


def _compare(
    full: Sequence[VoteResult], early: Sequence[VoteResult], rules: ExitRules, confidence: float
) -> ExitMeasurement:
    errors = sum(a.answer != b.answer for a, b in zip(full, early, strict=True))
    spent, everything = (sum(vote.tokens for vote in votes) for votes in (early, full))
    return ExitMeasurement(
        rules=rules,
        problems=len(full),
        errors=errors,
        bound=upper_bound(errors, len(full), confidence),
        saved=1 - spent / everything,
    )


def consensus_candidates(rules: ExitRules | None = None) -> list[ExitRules]:
    """Return rules with ever bolder consensus, and otherwise as given."""
    return [replace(rules or ExitRules(), consensus=ConsensusExit(level)) for level in LEVELS]


def weak_candidates(
    recordings: Sequence[Recording], rules: ExitRules, shares: Iterable[float] = (0, 0.1, 0.2, 0.4)
) -> list[ExitRules]:
    """Return rules that drop ever more branches: thresholds at quantiles of the lowest groups.

    Parameters
    ----------
    recordings : sequence of Recording
        Branches whose group confidence the quantiles are taken of.
    rules : ExitRules
        All else.
    shares : iterable of float
        Shares of the branches that fall below the threshold (DeepConf: 0.1 and 0.9).
    """
    without = ExitRules(consensus=None, group=rules.group)
    lowest = sorted(
        branch.group_confidence or 0.0
        for result in replay(recordings, without)
        for branch in result.branches
    )
    return [
        replace(rules, weak=WeakExit(lowest[min(round(share * len(lowest)), len(lowest) - 1)]))
        for share in shares
    ]


def decode_candidates(
    rules: ExitRules, confidences: Iterable[float] = (0.99, 0.95, 0.9, 0.8, 0.72)
) -> list[ExitRules]:
    """Return rules whose branches stop at ever less confidence, RKSC's 0.72 last."""
    base = rules.decode or DecodeExit()
    return [replace(rules, decode=replace(base, confidence=each)) for each in confidences]


def calibrate_exit(
    recordings: Sequence[Recording],
    *,
    target: float = 0.05,
    confidence: float = 0.95,
    candidates: Sequence[ExitRules] | None = None,
    answer: Callable[[Any], str | None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weight: Weight = majority,
    stage: int | None = None,
) -> ExitCalibration:
    """Choose the boldest rules whose error rate is at most `target`, with a stated confidence.

    An error is a vote that differs from the vote of all branches run to their ends; truth is not
    needed. Candidates are tested from the safest to the boldest, and the first whose exact bound
    (Clopper-Pearson) exceeds the target ends the search, so that the confidence holds for the
    choice without a correction for the number of candidates (fixed-sequence testing). It holds for
    problems of the same kind and for the same number of branches.

    Parameters
    ----------
    recordings : sequence of Recording
        Of held-out problems; see `ConfidentExit.recordings`. Without any error, a target of 5%
        takes 59 of them and one of 1% takes 299, at 95% confidence.
    target : float
        Largest error rate, in (0, 1).
    confidence : float
        In (0, 1).
    candidates : sequence of ExitRules, optional
        From the safest to the boldest, chosen without looking at the errors;
        `consensus_candidates()` by default.
    answer, tokenizer, weight, stage
        See `replay`.

    Raises
    ------
    ValueError
        If no candidate passes: there are too few recordings, or the safest is too bold.
    """
    for name, value in (("target", target), ("confidence", confidence)):
        if not isinstance(value, float) or not 0 < value < 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}.")
    tried: list[ExitMeasurement] = []
    passed: ExitRules | None = None
    candidates = consensus_candidates() if candidates is None else candidates
    play = partial(replay, recordings, weight=weight, answer=answer, tokenizer=tokenizer)
    # What runs to its end is the same under all rules, but for the groups of the weights.
    full = {
        group: play(ExitRules(None, None, None, group))
        for group in {rules.group for rules in candidates}
    }
    for rules in candidates:
        early = play(rules, stage=stage)
        tried.append(_compare(full[rules.group], early, rules, confidence))
        if tried[-1].bound > target:
            break
        passed = rules
    if passed is None:
        why = str(tried[0]) if tried else "no candidate"
        raise ValueError(
            f"calibrate_exit: expected rules with an error rate of at most {target:.2%}, got {why} "
            "from the safest candidate; record more problems, raise the target, or put a safer "
            "candidate first."
        )
    return ExitCalibration(
        rules=passed,
        target=target,
        confidence=confidence,
        branches=len(recordings[0].ids),
        stage=stage,
        tried=tuple(tried),
    )
