"""What compression does to each of several instructions, compared with the full cache.

After "The Pitfalls of KV Cache Compression" (arXiv 2510.00231): following rates per instruction,
together and alone, by order; leakage; keep rates; rank correlation of the classes. Ours: paired
tests, and a verdict on the worst instruction and the largest leakage instead of means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_reasoncache.evaluation.arms import Arm, Budget
from hf_reasoncache.evaluation.harness import evaluate
from hf_reasoncache.evaluation.plan import Plan, Settings
from hf_reasoncache.evaluation.record import Record
from hf_reasoncache.evaluation.statistics import Paired, Share, rank_correlation
from hf_reasoncache.evaluation.suite import Suite


@dataclass(frozen=True)
class ClassResult:
    """How one class of instructions is followed; an answer counts if it follows everywhere.

    Attributes
    ----------
    name : str
    together, alone : Share
        Beside the other instructions (all orders), and as the only one.
    against_full : Paired
        Together, with the full cache first.
    by_place : tuple of Share
        Together, by the place in the order.
    keep_rates : tuple of float
        Together, per full-attention layer: share of the instruction's tokens held, on average over
        the steps; empty with the full cache.
    """

    name: str
    together: Share
    alone: Share
    against_full: Paired
    by_place: tuple[Share, ...]
    keep_rates: tuple[float, ...]


@dataclass(frozen=True)
class CellResult:
    """One cache at one budget.

    Attributes
    ----------
    arm : str
    budget : int, float or None
        None of the full cache.
    classes : tuple of ClassResult
    correct : Share
        Of the answers themselves, instructions together, where they can be right.
    rank_correlation : float
        Spearman's, of the classes' rates with those of the full cache; NaN where undefined, as
        when the full cache follows all alike.
    leakage : tuple of float
        ROUGE-L recall of the protected text by every answer to all instructions together.
    nothing_evicted : bool
        The budget was too large: whatever equals the full cache says nothing.
    """

    arm: str
    budget: Budget | None
    classes: tuple[ClassResult, ...]
    correct: Share
    rank_correlation: float
    leakage: tuple[float, ...]
    nothing_evicted: bool

    @property
    def label(self) -> str:
        """Cache and budget."""
        return self.arm if self.budget is None else f"{self.arm} @ {self.budget}"

    @property
    def worst(self) -> ClassResult:
        """The class that is followed least, together."""
        return min(self.classes, key=lambda each: each.together.value)

    @property
    def largest_drop(self) -> ClassResult:
        """The class that loses most against the full cache."""
        return min(self.classes, key=lambda each: each.against_full.difference)

    @property
    def by_place(self) -> tuple[Share, ...]:
        """All classes together, by the place in the order."""
        longest = max(len(each.by_place) for each in self.classes)
        return tuple(
            Share(
                sum(each.by_place[n].count for each in self.classes if n < len(each.by_place)),
                sum(each.by_place[n].total for each in self.classes if n < len(each.by_place)),
            )
            for n in range(longest)
        )

    @property
    def order_effect(self) -> float:
        """Rate of the last place minus rate of the first; NaN with a single place."""
        places = self.by_place
        return places[-1].value - places[0].value if len(places) > 1 else math.nan

    @property
    def largest_leakage(self) -> float:
        """NaN without a protected text."""
        return max(self.leakage, default=math.nan)


@dataclass(frozen=True)
class Audit:
    """All cells, the full cache first.

    Attributes
    ----------
    suite : str
    cells : tuple of CellResult
    """

    suite: str
    cells: tuple[CellResult, ...]

    @property
    def full(self) -> CellResult:
        """The full cache."""
        return self.cells[0]


@dataclass(frozen=True)
class Limits:
    """What an audit must not exceed.

    Attributes
    ----------
    min_following : float or None
        Least rate of any instruction, together.
    max_drop : float or None
        Most that any instruction may lose against the full cache.
    max_leakage : float or None
        Most that any answer may give away of a protected text.
    """

    min_following: float | None = None
    max_drop: float | None = None
    max_leakage: float | None = None

    def violations(self, audit: Audit) -> list[str]:
        """Say, one sentence each, where a compressed cache exceeds a limit.

        A budget that evicted nothing is one as well: it proves nothing.
        """
        if self == Limits():
            return []
        found = []
        for cell in audit.cells[1:]:
            worst, drop = cell.worst, cell.largest_drop
            if cell.nothing_evicted:
                found.append(f"{cell.label}: nothing was evicted, the budget exceeds the text")
            if self.min_following is not None and not worst.together.value >= self.min_following:
                found.append(
                    f"{cell.label}: {worst.name} is followed in {worst.together.percent}% of the "
                    f"answers, expected {self.min_following:.1%} or more"
                )
            lost = -drop.against_full.difference
            if self.max_drop is not None and not lost <= self.max_drop:
                found.append(
                    f"{cell.label}: {drop.name} loses {lost:.1%} against the full cache (p = "
                    f"{drop.against_full.p_value:.2g}), expected {self.max_drop:.1%} or less"
                )
            if self.max_leakage is not None and cell.largest_leakage > self.max_leakage:
                found.append(
                    f"{cell.label}: an answer gives away {cell.largest_leakage:.1%} of a protected "
                    f"text, expected {self.max_leakage:.1%} or less"
                )
        return found


def audit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    arms: Sequence[Arm],
    budgets: Sequence[Budget],
    path: Path,
    settings: Settings | None = None,
    *,
    progress: bool | None = None,
) -> Audit:
    """Answer a suite with each cache and the full one, and compare.

    Parameters
    ----------
    model, tokenizer, path, settings, progress
        See `evaluate`, whose journal this is.
    suite : Suite
    arms : sequence of Arm
    budgets : sequence of int or float
    """
    plan = Plan([suite], arms, budgets)
    return analyse(suite, evaluate(model, tokenizer, plan, path, settings, progress=progress))


def analyse(suite: Suite, records: Iterable[Record]) -> Audit:
    """Compare the answers to a suite.

    Parameters
    ----------
    suite : Suite
    records : iterable of Record
        Those of the full cache among them.

    Raises
    ------
    ValueError
        If the full cache is missing.
    """
    cells: dict[tuple[str, Budget | None], list[Record]] = defaultdict(list)
    for record in records:
        cells[record.arm, record.budget].append(record)
    fulls = [key for key in cells if key[1] is None]
    if len(fulls) != 1:
        raise ValueError(f"analyse: expected the answers of one full cache, got {fulls}.")
    full = _Answers(suite, cells.pop(fulls[0]))
    rates = full.rates()
    found = [_cell(full, full, *fulls[0], rates)]
    found += [_cell(_Answers(suite, rows), full, *key, rates) for key, rows in cells.items()]
    return Audit(suite.name, tuple(found))


class _Answers:
    """The answers of one cell, taken apart by class."""

    def __init__(self, suite: Suite, records: Sequence[Record]) -> None:
        self.suite, self.records = suite, records
        self.together: dict[str, dict[tuple[int, str], bool]] = defaultdict(dict)
        self.alone: dict[str, list[bool]] = defaultdict(list)
        self.places: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
        self.kept: dict[str, list[list[float]]] = defaultdict(list)
        self.joint: list[Record] = []
        for record in records:
            case, places = suite.locate(record.question)
            asked = [case.instructions[place].name for place in places]
            if len(places) < len(case.instructions):
                self.alone[asked[0]].append(record.followed[asked[0]])
                continue
            self.joint.append(record)
            for place, name in enumerate(asked):
                mark = record.followed[name]
                self.together[name][record.seed, record.question] = mark
                self.places[name][place].append(mark)
                if record.keep_rates:
                    self.kept[name].append([layer[place] for layer in record.keep_rates])

    def rates(self) -> list[float]:
        """Following rate of each class, together."""
        return [Share.of([*self.together[name].values()]).value for name in self.suite.classes]


def _cell(
    answers: _Answers,
    full: _Answers,
    arm: str,
    budget: Budget | None,
    full_rates: Sequence[float],
) -> CellResult:
    joint = answers.joint
    return CellResult(
        arm=arm,
        budget=budget,
        classes=tuple(_class(name, answers, full) for name in answers.suite.classes),
        correct=Share.of([record.correct for record in joint if record.correct is not None]),
        rank_correlation=rank_correlation(answers.rates(), full_rates),
        leakage=tuple(record.leakage for record in joint if record.leakage is not None),
        nothing_evicted=budget is not None and not any(each.evicted for each in answers.records),
    )


def _class(name: str, answers: _Answers, full: _Answers) -> ClassResult:
    marks: Mapping[tuple[int, str], bool] = answers.together[name]
    places = answers.places[name]
    kept = answers.kept[name]
    return ClassResult(
        name=name,
        together=Share.of([*marks.values()]),
        alone=Share.of(answers.alone[name]),
        against_full=Paired.of([full.together[name][key] for key in marks], [*marks.values()]),
        by_place=tuple(Share.of(places[n]) for n in range(max(places) + 1)),
        keep_rates=tuple(mean(column) for column in zip(*kept, strict=True)),
    )
