"""`evaluate`: tasks x caches x budgets x seeds in one command."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer

from hf_reasoncache.cli.loading import budgets as parse_budgets
from hf_reasoncache.cli.loading import (
    compressed,
    open_run,
    require_packages,
    warn_nothing_evicted,
)
from hf_reasoncache.cli.loading import seeds as parse_seeds
from hf_reasoncache.cli.options import (
    BatchSize,
    Budgets,
    Buffer,
    Caches,
    Chat,
    Device,
    Dtype,
    Dtypes,
    MaxNewTokens,
    Model,
    Out,
    Revision,
    Threads,
    Window,
)
from hf_reasoncache.evaluation import (
    CacheSpec,
    Certificate,
    Grid,
    Record,
    Settings,
    certificates,
    evaluate,
    load_task,
    parse_spec,
    tabulate,
)
from hf_reasoncache.evaluation import baseline as make_baseline
from hf_reasoncache.evaluation.fidelity import Fidelity
from hf_reasoncache.evaluation.plot import results_png
from hf_reasoncache.evaluation.reread import reread
from hf_reasoncache.evaluation.specs import controls
from hf_reasoncache.evaluation.table import WIDTH, Row, cells, markdown_table, text_table
from hf_reasoncache.outputs import new_directory, write_bytes, write_text


def evaluate_command(
    model: Model,
    task: Annotated[
        list[str],
        typer.Option(
            metavar="FILE|MODULE:NAME",
            help="JSON lines with prompt (or messages) and answer or check; or a task in Python. "
            "Give it several times.",
        ),
    ],
    cache: Caches,
    budgets: Budgets,
    out: Out,
    seeds: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Of drawn questions, sampling and random eviction."),
    ] = "0",
    baseline: Annotated[
        bool, typer.Option(help="Also try random eviction beside a protected prompt.")
    ] = True,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Take the first questions of each task.", show_default=False),
    ] = None,
    max_new_tokens: MaxNewTokens = 4096,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    batch_size: BatchSize = 8,
    chat: Chat = False,
    certify: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA",
            help="Also name each cache's smallest budget that loses at most this share of the "
            "answers that the full cache gets right.",
            show_default=False,
        ),
    ] = None,
    fidelity: Annotated[
        bool,
        typer.Option(
            "--fidelity",
            help="Also read the full cache's answers with every cache: KL, and tokens before the "
            "first difference.",
        ),
    ] = False,
    window: Window = 8,
    buffer: Buffer = 128,
    revision: Revision = None,
    dtype: Dtypes = Dtype.auto,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Compare caches with the full one on your tasks.

    Writes answers.jsonl (one line for every answer, as it comes), results.json, results.md and
    results.png; with --certify also certified.json. What other commands have answered of the same
    questions in the same --out is part of the tables. Differences carry the p of McNemar's exact
    test on the same questions. Several processes share the questions: accelerate launch -m
    hf_reasoncache.cli evaluate ...
    """
    require_packages(scipy="eval", matplotlib="plot")
    if certify is not None and not 0.0 < certify < 1.0:
        raise ValueError(f"--certify: expected a share in (0, 1), got {certify}.")
    # `--task module:name` finds modules where the command runs, as `python -m` does.
    sys.path.insert(0, "")
    grid = Grid(
        tasks=[load_task(each) for each in task],
        specs=compressed(cache, window, buffer),
        budgets=parse_budgets(budgets),
        seeds=parse_seeds(seeds),
        baseline=make_baseline(window, buffer) if baseline else None,
        limit=limit,
    )
    settings = Settings(max_new_tokens, temperature, batch_size, chat)
    path = new_directory(out) / "answers.jsonl"
    with open_run(path, model, revision, dtype, device, threads) as (loaded, tokenizer, is_main):
        say = partial(typer.echo, err=True)
        records = evaluate(
            loaded, tokenizer, grid, path, settings, progress=True, say=say, earlier=True
        )
        read = {}
        if fidelity:
            read = reread(loaded, tokenizer, grid, records, out, chat=chat, progress=True)
        if not is_main:
            return
        specs = _specs(records, grid.specs, window, buffer)
        rows = tabulate(records, controls(specs, make_baseline(window, buffer)))
        columns, lines = cells(rows)
        content = list(map(_facts, rows))
        if fidelity:
            columns += ["KL", "until"]
            for row, line, facts in zip(rows, lines, content, strict=True):
                found = read.get((row.task, row.cache, row.budget))
                line |= _fidelity(found)
                facts["fidelity"] = found and asdict(found)
        write_text(out / "results.json", json.dumps(content, indent=1) + "\n")
        write_text(out / "results.md", markdown_table(columns, lines))
        write_bytes(out / "results.png", results_png(rows))
        certified = {} if certify is None else certificates(records, certify)
        if certify is not None:
            content = [
                {"task": task, "cache": cache, **asdict(each)}
                for (task, cache), found in certified.items()
                for each in found
            ]
            write_text(out / "certified.json", json.dumps(content, indent=1) + "\n")
    for name in dict.fromkeys(row.task for row in rows):
        typer.echo(f"{name}, {next(r.correct.total for r in rows if r.task == name)} answers each")
        mine = [line for line in lines if line["task"] == name]
        typer.echo(text_table(["cache", "budget", "correct", "vs full", "vs random"], mine))
        if fidelity:
            typer.echo(text_table(["cache", "budget", "KL", "until"], mine))
        if certify is not None:
            typer.echo(_certified(name, certified, certify))
    for row in rows:
        if row.nothing_evicted:
            warn_nothing_evicted(f"{row.cache} at {row.budget} evicted nothing on {row.task}")
    typer.echo(out)


def _specs(
    records: Sequence[Record], given: Sequence[CacheSpec], window: int, buffer: int
) -> list[CacheSpec]:
    """Return the caches that commands have named, those of earlier ones included."""
    known = {spec.name: spec for spec in given}
    for name in dict.fromkeys(each.cache for each in records if each.cache not in known):
        try:
            known[name] = parse_spec(name, window, buffer)
        except ValueError:
            # The baseline, or named in Python: nothing says what it is to be compared with.
            continue
    return list(known.values())


def _fidelity(found: Fidelity | None) -> dict[str, str]:
    if found is None:
        return {"KL": "-", "until": "-"}
    until = f"{'>' if found.never else ''}{found.until:.0f}"
    return {"KL": f"{found.divergence.value:.3f}", "until": until}


def _certified(
    task: str, found: Mapping[tuple[str, str], Sequence[Certificate]], alpha: float
) -> str:
    """Return a table of what is certified on a task, and below it why the rest is not."""
    mine = [(cache, each) for (name, cache), made in found.items() if name == task for each in made]
    lines = [
        {
            "cache": cache,
            "certified": "none" if each.budget is None else str(each.budget),
            "loss": f"{each.mean_loss:.3f}",
            "bound": f"{each.bound:.3f}",
            "questions": str(each.questions),
        }
        for cache, each in mine
    ]
    reasons = [
        textwrap.fill(f"{cache}: {each.refusal}.", WIDTH, break_on_hyphens=False)
        for cache, each in mine
        if each.refusal
    ]
    columns = ["cache", "certified", "loss", "bound", "questions"]
    head = f"Smallest budgets with an excess loss over the full cache of at most {alpha:g}:"
    return "\n".join([head, text_table(columns, lines), *reasons])


def _facts(row: Row) -> dict[str, Any]:
    """Return a row of the table with what its text rounds."""
    return asdict(row) | {
        "interval": row.correct.interval,
        "p_full": row.against_full and row.against_full.p_value,
        "p_random": row.against_random and row.against_random.p_value,
    }
