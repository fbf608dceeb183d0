"""`perplexity`: how far caches are from the full one on a text, the quickest check there is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_reasoncache.cli.loading import budgets as parse_budgets
from hf_reasoncache.cli.loading import compressed, open_run, warn_nothing_evicted
from hf_reasoncache.cli.options import (
    BatchSize,
    Budgets,
    Buffer,
    Caches,
    Device,
    Dtype,
    Dtypes,
    Json,
    Model,
    Out,
    Revision,
    Threads,
    Window,
)
from hf_reasoncache.evaluation.fidelity import (
    Fidelity,
    TextGrid,
    pieces_of,
    read_texts,
    sum_up,
)
from hf_reasoncache.evaluation.specs import control
from hf_reasoncache.evaluation.table import markdown_table, text_table
from hf_reasoncache.outputs import new_directory, write_text


def perplexity_command(
    model: Model,
    text: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Text in UTF-8; give it several times.")
    ],
    cache: Caches,
    budgets: Budgets,
    out: Out,
    tokens: Annotated[int, typer.Option(min=2, help="Of each piece of text.")] = 2048,
    pieces: Annotated[int, typer.Option(min=1, help="Most that are taken of a file.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward.")] = 8,
    baseline: Annotated[
        bool, typer.Option(help="Also try random eviction under the settings of each cache.")
    ] = True,
    batch_size: BatchSize = 8,
    window: Window = 8,
    buffer: Buffer = 128,
    revision: Revision = None,
    dtype: Dtypes = Dtype.auto,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare what caches predict on a text with the full one.

    Writes readings.jsonl (a line for each piece of text and cache, as it comes), results.json and
    results.md, with intervals of all differences. KL is that of the next token from the full
    cache's, in nats; same, how often both find the same token likeliest; until, tokens that are
    read before they do not.
    """
    specs = compressed(cache, window, buffer)
    path = new_directory(out) / "readings.jsonl"
    with open_run(path, model, revision, dtype, device, threads) as (loaded, tokenizer, is_main):
        grid = TextGrid(
            pieces=[piece for file in text for piece in pieces_of(file, tokenizer, tokens, pieces)],
            specs=specs,
            budgets=parse_budgets(budgets),
            controls=baseline,
            chunk=chunk,
            batch_size=batch_size,
        )
        readings = read_texts(loaded, grid, path, progress=True)
        if not is_main:
            return
        names = {spec.name: control(spec).name for spec in specs if not spec.is_full}
        rows = sum_up(readings, {name: other for name, other in names.items() if name != other})
        columns, lines = cells(rows)
        content = json.dumps([_facts(row) for row in rows], indent=1)
        write_text(out / "results.json", content + "\n")
        write_text(out / "results.md", markdown_table(columns, lines))
    if as_json:
        typer.echo(content)
    else:
        typer.echo(f"{len(grid.pieces)} pieces of {tokens} tokens, {chunk} per forward")
        typer.echo(text_table(["cache", "budget", "perplexity", "KL", "same", "until"], lines))
        typer.echo(out)
    for row in rows:
        if row.nothing_evicted:
            warn_nothing_evicted(f"{row.cache} at {row.budget} evicted nothing")


def cells(rows: Sequence[Fidelity]) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows as text."""
    table = []
    for row in rows:
        found = row.loss.exp()
        table.append(
            {
                "cache": row.cache,
                "budget": "" if row.budget is None else str(row.budget),
                "perplexity": f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})",
                "KL": f"{row.divergence.value:.3f}",
                "same": f"{100 * row.agreement:.1f}%",
                # Pieces that never differ count with their length: the mean is a lower bound.
                "until": f"{'>' if row.never else ''}{row.until:.0f}",
                "loss above full": "" if row.above_full is None else str(row.above_full),
                "loss against random": "" if row.above_control is None else str(row.above_control),
                "held": f"{row.held:.0f}",
            }
        )
    return list(table[0]), table


def _facts(row: Fidelity) -> dict[str, Any]:
    """Return a row of the table with what its text leaves out."""
    return asdict(row) | {"perplexity": asdict(row.loss.exp())}
