"""An audit as JSON, as Markdown, and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_reasoncache.evaluation.audit_result import Audit, CellResult, ClassResult
from hf_reasoncache.evaluation.plot import Line, Panel, panels_png
from hf_reasoncache.evaluation.statistics import Share
from hf_reasoncache.evaluation.table import markdown_table
from hf_reasoncache.outputs import new_directory, write_bytes, write_text


def write_report(
    audit: Audit, violations: Sequence[str], facts: Mapping[str, Any], directory: Path
) -> None:
    """Write `audit.json`, `audit.md` and `audit.png`.

    Parameters
    ----------
    audit : Audit
    violations : sequence of str
        See `Limits.violations`.
    facts : Mapping
        JSON values that say how it was made.
    directory : Path
        Made if it does not exist.
    """
    new_directory(directory)
    content = {"facts": dict(facts), "violations": list(violations), **to_json(audit)}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_text(directory / "audit.json", text)
    write_text(directory / "audit.md", markdown(audit, violations, facts))
    write_bytes(directory / "audit.png", picture(audit))


def to_json(audit: Audit) -> dict[str, Any]:
    """Return an audit as JSON values; what is undefined is null."""
    cells = [
        asdict(cell)
        | {
            "worst": cell.worst.name,
            "largest_leakage": cell.largest_leakage,
            "order_effect": cell.order_effect,
            "p_values": {each.name: each.against_full.p_value for each in cell.classes},
        }
        for cell in audit.cells
    ]
    found: dict[str, Any] = _plain({"suite": audit.suite, "cells": cells})
    return found


def verdict_table(audit: Audit) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows: each cache at each budget by its worst instruction."""
    rows = [
        {
            "cache": cell.cache,
            "budget": "" if cell.budget is None else str(cell.budget),
            "worst instruction": _worst(audit, cell),
            "largest loss": _loss(cell.largest_drop),
            "answer": cell.correct.percent,
            "leakage": _leakage(cell),
            "rank": _decimal(cell.rank_correlation),
            "order": _signed(cell.order_effect),
        }
        for cell in audit.cells
    ]
    # A column that says nothing of any cache is left out.
    columns = [name for name in rows[0] if any(row[name] not in ("", "-") for row in rows)]
    return columns, rows


def markdown(audit: Audit, violations: Sequence[str], facts: Mapping[str, Any]) -> str:
    """Return the whole report."""
    parts = [f"# Audit: {audit.suite}"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    warnings = [cell.label for cell in audit.cells if cell.nothing_evicted]
    if warnings:
        parts.append(
            f"**Nothing was evicted** by {', '.join(warnings)}: the budget exceeds the text, so "
            "these lines say nothing about the method."
        )
    if violations:
        parts.append("**Limits exceeded:**\n\n" + "\n".join(f"- {each}" for each in violations))
    parts.append(
        "An instruction counts as followed where an answer follows it everywhere. Percent, Wilson "
        "95% intervals, which take answers for independent: several orders of a prompt are less "
        "than that. Losses against the full cache with McNemar's exact p, not corrected for "
        "the number of comparisons. What the full cache does not follow either, no cache has lost: "
        "its rate stands beside that of each worst instruction. `leakage` is the largest ROUGE-L "
        "recall of a protected text by one answer, and the mean of all; `rank` is Spearman's "
        "correlation of the instructions' rates with the full cache; `order` is the rate of the "
        "last place minus that of the first."
    )
    columns, rows = verdict_table(audit)
    parts += ["## Verdict", markdown_table(columns, rows)]
    names = [each.name for each in audit.full.classes]
    parts += ["## Each instruction, together / alone", _by_class(audit, names)]
    parts += ["## By place in the order", _by_place(audit)]
    kept = [cell for cell in audit.cells if any(each.keep_rates for each in cell.classes)]
    if kept:
        parts += ["## Share of its tokens held, by layer", _kept(kept)]
    return "\n\n".join(parts) + "\n"


def picture(audit: Audit) -> bytes:
    """Draw the following rate of each instruction over the budget, a panel for each cache."""
    caches = list(dict.fromkeys(cell.cache for cell in audit.cells[1:]))
    panels = []
    for cache in caches:
        cells = sorted(
            (cell for cell in audit.cells if cell.cache == cache), key=lambda cell: cell.budget or 0
        )
        lines = [
            Line(
                label=name,
                places=[float(cell.budget or 0) for cell in cells],
                shares=[_of(cell, name).together for cell in cells],
                reference=_of(audit.full, name).together.value,
            )
            for name in (each.name for each in audit.full.classes)
        ]
        panels.append(Panel(cache, lines))
    return panels_png(panels, "budget (tokens per KV head)", "followed everywhere")


def _of(cell: CellResult, name: str) -> ClassResult:
    return next(each for each in cell.classes if each.name == name)


def _by_class(audit: Audit, names: Sequence[str]) -> str:
    rows = [
        {"cache": cell.label}
        | {each.name: f"{_bare(each.together)} / {_bare(each.alone)}" for each in cell.classes}
        for cell in audit.cells
    ]
    return markdown_table(["cache", *names], rows)


def _by_place(audit: Audit) -> str:
    count = len(audit.full.by_place)
    columns = [str(place + 1) for place in range(count)]
    rows = [
        {"cache": cell.label}
        | {name: share.percent for name, share in zip(columns, cell.by_place, strict=True)}
        for cell in audit.cells
    ]
    return markdown_table(["cache", *columns], rows)


def _kept(cells: Sequence[CellResult]) -> str:
    layers = max(len(each.keep_rates) for cell in cells for each in cell.classes)
    columns = [f"layer {layer}" for layer in range(layers)]
    rows = [
        {"cache": cell.label, "instruction": each.name}
        | {name: f"{rate:.2f}" for name, rate in zip(columns, each.keep_rates, strict=True)}
        for cell in cells
        for each in cell.classes
    ]
    return markdown_table(["cache", "instruction", *columns], rows)


def _worst(audit: Audit, cell: CellResult) -> str:
    found = f"{cell.worst.name} {cell.worst.together.percent}"
    if cell is audit.full:
        return found
    return f"{found}, full {_bare(audit.full_rate(cell.worst.name))}"


def _leakage(cell: CellResult) -> str:
    if not cell.leakage:
        return "-"
    return f"{_percent(cell.largest_leakage)}, mean {_percent(cell.mean_leakage)}"


def _loss(worst: ClassResult) -> str:
    paired = worst.against_full
    if not paired.lost and not paired.gained:
        return "-"
    return f"{worst.name} {0 - 100 * paired.difference:.1f} (p {paired.p_value:.2g})"


def _bare(share: Share) -> str:
    return _percent(share.value)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _decimal(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:+.1f}"


def _plain(value: Any) -> Any:
    """JSON values, with None for what is not a number."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
