"""Tables and the plot of docs/votes.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from examples.research.branch_recordings import GROUP
from examples.research.reasoners import Reasoner
from examples.research.timed_branches import Timing
from hf_reasoncache.branching import ExitRules, VoteResult
from hf_reasoncache.branching.recording import Recording, replay
from hf_reasoncache.branching.vote import group_confidence, majority, sqrt_confidence
from hf_reasoncache.evaluation import Share

WEIGHTS = {
    "majority": majority,
    "sqrt(confidence)": sqrt_confidence,
    "group confidence": group_confidence,
}


@dataclass(frozen=True)
class Judge:
    """Says which answers to some problems are right.

    Attributes
    ----------
    reasoner : Reasoner
    problems : sequence
    """

    reasoner: Reasoner
    problems: Sequence[Any]

    def __call__(self, answers: Sequence[str | None]) -> list[bool]:
        """Judge the answer to each of the problems."""
        pairs = zip(self.problems, answers, strict=True)
        return [self.reasoner.is_right(*pair) for pair in pairs]


def saved_interval(
    early: Sequence[VoteResult], full: Sequence[VoteResult], seed: int = 0
) -> tuple[float, float, float]:
    """Share of the tokens saved, with its bootstrap 95% interval over problems."""
    tokens = torch.tensor(
        [[a.tokens, b.tokens] for a, b in zip(early, full, strict=True)], dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(seed)
    draws = tokens[torch.randint(len(tokens), (2000, len(tokens)), generator=generator)].sum(1)
    low, high = (1 - draws[:, 0] / draws[:, 1]).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    total = tokens.sum(0)
    return float(1 - total[0] / total[1]), float(low), float(high)


def percent(value: float, low: float, high: float) -> str:
    """Render with an interval."""
    dash = ", " if low < 0 else "-"
    return f"{100 * value:.1f} ({100 * low:.1f}{dash}{100 * high:.1f})"


def line(
    name: str,
    votes: Sequence[VoteResult],
    full: Sequence[VoteResult],
    judge: Judge,
    target: float | None,
) -> dict[str, str]:
    """One row of the table."""
    right = Share.of(judge([each.answer for each in votes]))
    changed = Share(sum(a.answer != b.answer for a, b in zip(votes, full, strict=True)), len(votes))
    branches = sum(len(each.branches) for each in votes) / len(votes)
    return {
        "vote": name,
        "right": right.percent,
        "branches": f"{branches:.1f}",
        "tokens per problem": f"{sum(each.tokens for each in votes) / len(votes):.0f}",
        "tokens saved": percent(*saved_interval(votes, full)),
        "votes changed": changed.percent,
        "target": "" if target is None else f"{100 * target:g}",
    }


def single(recordings: Sequence[Recording], judge: Judge) -> str:
    """Share of right branches, with a bootstrap interval over problems."""
    right = [judge([each.answers[i] for each in recordings]) for i in _branches(recordings)]
    return _mean(torch.tensor(right, dtype=torch.float64))


def votes_by_branches(recordings: Sequence[Recording], judge: Judge) -> list[dict[str, str]]:
    """One row for each number of branches, doubled from 1 on; every branch votes once in each.

    Weights are also paired with the majority of the same branches.
    """
    rows, branches = [], len(_branches(recordings))
    count = 1
    while count <= branches:
        row = {"branches": str(count)}
        found: dict[str, torch.Tensor] = {}
        for name, weight in WEIGHTS.items():
            right = []
            for first in range(0, branches - count + 1, count):
                parts = [each.part(slice(first, first + count)) for each in recordings]
                votes = replay(parts, ExitRules(consensus=None, group=GROUP), weight=weight)
                right.append(judge([each.answer for each in votes]))
            found[name] = torch.tensor(right, dtype=torch.float64)
            row[name] = _mean(found[name])
        for name in list(WEIGHTS)[1:]:
            row[f"{name} minus majority"] = _mean(found[name] - found["majority"])
        rows.append(row)
        count *= 2
    return rows


def _branches(recordings: Sequence[Recording]) -> range:
    return range(len(recordings[0].answers))


def _mean(marks: torch.Tensor) -> str:
    """Mean of Tensor[marks of a problem, problems], with a bootstrap interval over problems."""
    rates = marks.mean(0)
    generator = torch.Generator().manual_seed(0)
    means = rates[torch.randint(len(rates), (2000, len(rates)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return percent(float(rates.mean()), low, high)


@dataclass(frozen=True)
class Point:
    """One level of consensus on fresh problems.

    Attributes
    ----------
    level : float
    saved : float
        Share of the tokens.
    right, changed : Share
        Votes that are right, and votes that exit changed.
    """

    level: float
    saved: float
    right: Share
    changed: Share


def draw(path: Path, curves: dict[str, list[Point]], full: Share, target: float) -> None:
    """Plot what tokens saved cost: right votes, and votes that exit changed."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (name, points) in enumerate(curves.items()):
        for panel, shares in (
            (left, [point.right for point in points]),
            (right, [point.changed for point in points]),
        ):
            values = [100 * each.value for each in shares]
            low, high = zip(*(each.interval for each in shares), strict=True)
            bars = [
                [v - 100 * x for v, x in zip(values, low, strict=True)],
                [100 * x - v for v, x in zip(values, high, strict=True)],
            ]
            saved = [100 * point.saved for point in points]
            panel.errorbar(
                saved,
                values,
                bars,
                marker="os^D"[place],
                ms=4,
                capsize=2,
                lw=1,
                label=name,
                clip_on=False,
            )
        right.annotate(
            f"{points[-1].level:g}",
            (100 * points[-1].saved, 100 * points[-1].changed.value),
            xytext=(4, 4 + 9 * place),
            textcoords="offset points",
            fontsize=8,
        )
    left.axhline(100 * full.value, color="black", ls=":", lw=1, label="all branches to their ends")
    right.axhline(100 * target, color="black", ls="--", lw=1)
    place_of_target = (99, 100 * target)
    right.annotate(
        f"target {100 * target:g}%", place_of_target, ha="right", va="bottom", fontsize=8
    )
    left.set_ylabel("right votes, %")
    right.set_ylabel("votes changed by exit, %")
    right.set_ylim(bottom=0)
    for panel in (left, right):
        panel.set_xlabel("tokens saved, %")
        panel.set_xlim(0, 100)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=130)


def timing(timings: Sequence[Timing], judge: Judge) -> list[dict[str, str]]:
    """One row per method; speed is over the first method and over the second."""
    rows = []
    for each in timings:
        counted = Judge(judge.reasoner, judge.problems[-len(each.votes) :])
        right = sum(counted([vote.answer for vote in each.votes]))
        speeds = [
            [base / own for base, own in zip(other.seconds, each.seconds, strict=True)]
            for other in timings[:2]
        ]
        rows.append(
            {
                "method": each.method,
                "right": f"{right}/{len(each.votes)}",
                "tokens": f"{statistics.mean(vote.tokens for vote in each.votes):.0f}",
                "seconds": f"{statistics.mean(each.seconds):.2f}",
                "MB": f"{statistics.mean(each.bytes) / 1e6:.1f}",
                "over prompt per branch: mean, peak": _mean_and_peak(speeds[0]),
                "over shared prompt: mean, peak": _mean_and_peak(speeds[1]),
            }
        )
    return rows


def _mean_and_peak(speeds: Sequence[float]) -> str:
    return f"{statistics.mean(speeds):.2f}x, {max(speeds):.2f}x"
