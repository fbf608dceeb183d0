"""The results of a run as a table: rates, costs, and paired tests."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from hf_reasoncache.evaluation.record import Record
from hf_reasoncache.evaluation.specs import Budget
from hf_reasoncache.evaluation.statistics import Paired, Share

WIDTH = 80
"""Of a terminal."""


@dataclass(frozen=True)
class Row:
    """One cache at one budget on one task, all seeds together.

    Attributes
    ----------
    task, cache, budget
    correct : Share
        Questions answered right. Of several seeds, the answers to one question are alike: the
        interval is then too narrow, unless the task draws new questions.
    finished : float
        Share of answers that ended by themselves.
    tokens : float
        Mean length of an answer.
    held, kib : float or None
        Tokens held per KV head, and KiB per row, on average over the steps.
    against_full, against_random : Paired or None
        The full cache or random eviction first; None where that has no answers.
    nothing_evicted : bool
        The budget was too large to say anything.
    """

    task: str
    cache: str
    budget: Budget | None
    correct: Share
    finished: float
    tokens: float
    held: float | None
    kib: float | None
    against_full: Paired | None
    against_random: Paired | None
    nothing_evicted: bool


def tabulate(records: Iterable[Record], controls: Mapping[str, str] | None = None) -> list[Row]:
    """Sum up a run.

    Parameters
    ----------
    records : iterable of Record
        Those without right and wrong are left out.
    controls : mapping from str to str, optional
        Name of the cache that each is compared with at the same budget; see `specs.controls`.
    """
    cells: dict[tuple[str, str, Budget | None], dict[tuple[int, str], Record]] = defaultdict(dict)
    for record in records:
        if record.correct is not None:
            cell = cells[record.task, record.cache, record.budget]
            cell[record.seed, record.question] = record
    fulls = {task: rows for (task, _, budget), rows in cells.items() if budget is None}
    found = []
    for (task, cache, budget), rows in cells.items():
        other = cells.get((task, (controls or {}).get(cache, ""), budget))
        answers = list(rows.values())
        found.append(
            Row(
                task=task,
                cache=cache,
                budget=budget,
                correct=Share.of([bool(each.correct) for each in answers]),
                finished=mean(each.finished for each in answers),
                tokens=mean(each.tokens for each in answers),
                held=_mean([each.held for each in answers]),
                kib=_mean(
                    [None if (b := each.mean_bytes) is None else b / 1024 for each in answers]
                ),
                against_full=None if budget is None else _paired(fulls.get(task), rows),
                against_random=_paired(other, rows),
                nothing_evicted=budget is not None and not any(each.evicted for each in answers),
            )
        )
    return found


def cells(rows: Sequence[Row]) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows as text."""
    table = [
        {
            "task": row.task,
            "cache": row.cache,
            "budget": "" if row.budget is None else str(row.budget),
            "correct": row.correct.percent,
            "vs full": _difference(row.against_full),
            "vs random": _difference(row.against_random),
            "finished": f"{100 * row.finished:.1f}",
            "tokens": f"{row.tokens:.0f}",
            "held": "-" if row.held is None else f"{row.held:.0f}",
            "KiB": "-" if row.kib is None else f"{row.kib:.0f}",
        }
        for row in rows
    ]
    columns = ["task", "cache", "budget", "correct", "vs full", "vs random"]
    return [*columns, "finished", "tokens", "held", "KiB"], table


def markdown_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a table of Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def text_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with aligned columns, for a terminal of 80 columns.

    Where long settings of caches make it wider, a number stands for them, with a key below.
    """
    text = _aligned(columns, rows)
    if max(map(len, text.split("\n"))) <= WIDTH or "cache" not in columns:
        return text
    names = [each for each in dict.fromkeys(row["cache"] for row in rows) if ":" in each]
    short = {name: f"{name.partition(':')[0]} [{n}]" for n, name in enumerate(names, 1)}
    lines = [{**row, "cache": short.get(row["cache"], row["cache"])} for row in rows]
    key = [
        # At the commas, as far as there are any.
        textwrap.fill(
            f"[{n}] {name}".replace(",", ", "),
            WIDTH,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        ).replace(", ", ",")
        for n, name in enumerate(names, 1)
    ]
    return "\n".join([_aligned(columns, lines), *key])


def _aligned(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    lines = [dict(zip(columns, columns, strict=True)), *rows]
    return "\n".join(
        "  ".join(line[name].ljust(widths[name]) for name in columns).rstrip() for line in lines
    )


def _paired(
    first: Mapping[tuple[int, str], Record] | None, second: Mapping[tuple[int, str], Record]
) -> Paired | None:
    if first is None:
        return None
    keys = [key for key in second if key in first]
    return Paired.of(
        [bool(first[key].correct) for key in keys], [bool(second[key].correct) for key in keys]
    )


def _difference(paired: Paired | None) -> str:
    if paired is None:
        return "-"
    return f"{100 * paired.difference:+.1f} (p {paired.p_value:.2g})"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
