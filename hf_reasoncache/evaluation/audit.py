"""What compression does to each of several instructions, compared with the full cache.

After "The Pitfalls of KV Cache Compression" (arXiv 2510.00231): following rates per instruction,
together and alone, by order; leakage; keep rates; rank correlation of the classes. Ours: paired
tests, and a verdict on the worst instruction and the largest leakage instead of means.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_reasoncache.evaluation.audit_result import Audit, CellResult, ClassResult
from hf_reasoncache.evaluation.grid import Grid, Settings
from hf_reasoncache.evaluation.harness import evaluate
from hf_reasoncache.evaluation.record import Record
from hf_reasoncache.evaluation.specs import Budget, CacheSpec
from hf_reasoncache.evaluation.statistics import Paired, Share, rank_correlation
from hf_reasoncache.evaluation.suite import Suite


def audit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    specs: Sequence[CacheSpec],
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
    specs : sequence of CacheSpec
    budgets : sequence of int or float
    """
    grid = Grid([suite], specs, budgets)
    return analyse(suite, evaluate(model, tokenizer, grid, path, settings, progress=progress))


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
        cells[record.cache, record.budget].append(record)
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
                if len(asked) > 1:
                    self.places[name][place].append(mark)
                if record.keep_rates:
                    self.kept[name].append([layer[place] for layer in record.keep_rates])

    def rates(self) -> list[float]:
        """Following rate of each class, together."""
        return [Share.of([*self.together[name].values()]).value for name in self.suite.classes]


def _cell(
    answers: _Answers,
    full: _Answers,
    cache: str,
    budget: Budget | None,
    full_rates: Sequence[float],
) -> CellResult:
    joint = answers.joint
    return CellResult(
        cache=cache,
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
        by_place=tuple(Share.of(places[n]) for n in range(max(places, default=-1) + 1)),
        keep_rates=tuple(mean(column) for column in zip(*kept, strict=True)),
    )
