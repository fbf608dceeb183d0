"""`audit`: what compression does to each of several instructions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_reasoncache.cli.loading import budgets as parse_budgets
from hf_reasoncache.cli.loading import (
    compressed,
    open_run,
    require_packages,
    warn_nothing_evicted,
)
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
from hf_reasoncache.evaluation import Limits, Settings, audit, load_suite
from hf_reasoncache.evaluation.audit_report import verdict_table, write_report
from hf_reasoncache.evaluation.harness import facts
from hf_reasoncache.evaluation.table import text_table
from hf_reasoncache.outputs import new_directory

EXCEEDED = 2
"""Exit status where a limit is exceeded; 1 is an error."""


def _limit(text: str) -> Any:
    """Return an option that is a share, without a default."""
    return typer.Option(min=0.0, max=1.0, help=text, show_default=False)


def audit_command(
    model: Model,
    suite: Annotated[
        Path,
        typer.Option(metavar="FILE", help="JSON lines of prompts with several instructions."),
    ],
    cache: Caches,
    budgets: Budgets,
    out: Out,
    min_following: Annotated[
        float | None, _limit("Least share of answers that may follow any instruction.")
    ] = None,
    max_drop: Annotated[
        float | None, _limit("Most that any instruction may lose against the full cache.")
    ] = None,
    max_leakage: Annotated[
        float | None, _limit("Most of a protected text that any answer may give away.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first cases.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = 4096,
    batch_size: BatchSize = 8,
    chat: Chat = False,
    window: Window = 8,
    buffer: Buffer = 128,
    revision: Revision = None,
    dtype: Dtypes = Dtype.auto,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Measure what caches do to each of several instructions.

    Each instruction is asked beside the others, in several orders, and alone, greedily. Writes
    answers.jsonl (one line for every answer, as it comes), audit.json, audit.md and audit.png. The
    verdict is on the worst instruction and the largest leakage; the exit status is 2 where a limit
    is exceeded. Several processes share the prompts: accelerate launch -m hf_reasoncache.cli audit
    ...
    """
    require_packages(scipy="eval", matplotlib="plot")
    limits = Limits(min_following, max_drop, max_leakage)
    read = load_suite(suite, limit)
    specs = compressed(cache, window, buffer)
    chosen = parse_budgets(budgets)
    settings = Settings(max_new_tokens=max_new_tokens, batch_size=batch_size, chat=chat)
    path = new_directory(out) / "answers.jsonl"
    with open_run(path, model, revision, dtype, device, threads) as (loaded, tokenizer, is_main):
        found = audit(loaded, tokenizer, read, specs, chosen, path, settings, progress=True)
        if not is_main:
            return
        violations = limits.violations(found)
        about = {"cases": len(read.cases), **facts(loaded, settings)}
        write_report(found, violations, about, out)
    typer.echo(
        text_table(
            ["cache", "budget", "worst instruction", "largest loss"], verdict_table(found)[1]
        )
    )
    for cell in found.cells:
        if cell.nothing_evicted:
            warn_nothing_evicted(f"{cell.label} evicted nothing")
    typer.echo(out)
    if violations:
        for violation in violations:
            typer.echo(f"LIMIT: {violation}", err=True)
        raise typer.Exit(EXCEEDED)
