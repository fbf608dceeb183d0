"""`calibrate`: measure a model and write its profile."""

from __future__ import annotations

from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hf_reasoncache.calibration.coverage import Coverage
from hf_reasoncache.calibration.estimate import Estimator
from hf_reasoncache.calibration.prompts import read_prompts
from hf_reasoncache.calibration.run import calibrate as run_calibration
from hf_reasoncache.calibration.sensitivity import Eviction, Sensitivity
from hf_reasoncache.calibration.settings import CalibrationSettings
from hf_reasoncache.calibration.together import Check
from hf_reasoncache.calibration.traces import TraceSettings
from hf_reasoncache.calibration.tune import Tune
from hf_reasoncache.cli.loading import open_run, require_packages
from hf_reasoncache.cli.options import (
    BatchSize,
    Chat,
    Device,
    Dtype,
    Dtypes,
    Model,
    Revision,
    Threads,
)
from hf_reasoncache.messages import shown
from hf_reasoncache.outputs import new_directory
from hf_reasoncache.profiles.files import expect_place
from hf_reasoncache.profiles.hub import require_repo_id
from hf_reasoncache.scorers import SCORERS, make_scorer


class EstimatorName(str, Enum):
    """How demand is measured."""

    sensitivity = "sensitivity"
    coverage = "coverage"


def calibrate(
    model: Model,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE|DATASET",
            help="JSON lines with `prompt` or `messages`, plain text with one prompt per line, or "
            "the id of a data set on the Hub.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the profile goes.")],
    estimator: Annotated[
        EstimatorName,
        typer.Option(
            help="What eviction in each layer does to the output (ours), or the tokens that hold "
            "93% of a layer's attention (the paper's: cheaper, and on the models that we measured "
            "no better than equal layers)."
        ),
    ] = EstimatorName.sensitivity,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Choose exponent and bounds of the budgets by what eviction does to the output on "
            "a third of the prompts, which is kept from the demand.",
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            help="Compare the profile with equal layers on the same texts in the end; `--tune` "
            "does so on texts of its own.",
        ),
    ] = True,
    push_to: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Then upload it.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest completion.")] = 4096,
    batch_size: BatchSize = 8,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="0 is greedy.", show_default="as the model's generation config says"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    resume: Annotated[
        bool, typer.Option(help="Go on with an unfinished run, or throw it away.")
    ] = True,
    revision: Revision = None,
    dtype: Dtypes = Dtype.auto,
    device: Device = None,
    threads: Threads = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first prompts.", show_default=False)
    ] = None,
    chat: Chat = False,
    tri_attention: Annotated[
        bool,
        typer.Option("--tri-attention", help="Also keep what that scorer needs of the queries."),
    ] = False,
    column: Annotated[
        str | None,
        typer.Option(help="Field of the prompt.", show_default="messages or prompt"),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    data_revision: Annotated[
        str | None, typer.Option(help="Of a data set.", show_default=False)
    ] = None,
    interval: Annotated[
        int, typer.Option(min=1, help="Coverage: generated tokens between measurements.")
    ] = 128,
    queries: Annotated[
        int, typer.Option(min=1, help="Coverage: newest queries that are measured.")
    ] = 8,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sensitivity, tune, check: the mean budget to be best for.",
            show_default="1/4 of the median text",
        ),
    ] = None,
    budgets: Annotated[
        str,
        typer.Option(
            metavar="N,N,...",
            help="Sensitivity: budgets that one layer is squeezed to.",
            show_default="1/16 to 1/2 of the median text",
        ),
    ] = "",
    scorer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"Sensitivity, tune, check: what evicts. One of {', '.join(SCORERS)}.",
        ),
    ] = "rkv",
    buffer: Annotated[
        int, typer.Option(min=1, help="Sensitivity, tune, check: tokens between two compactions.")
    ] = 128,
    window: Annotated[
        int, typer.Option(min=1, help="Sensitivity, tune, check: newest tokens, never evicted.")
    ] = 8,
    protect_prompt: Annotated[
        bool, typer.Option(help="Sensitivity, tune, check: never evict the prompt.")
    ] = False,
    heads: Annotated[
        bool, typer.Option("--heads", help="Sensitivity: squeeze single KV heads as well.")
    ] = False,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sensitivity, tune, check: squeezed copies of a text per forward.",
            show_default="as many as hold 32,768 tokens together",
        ),
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, help="Sensitivity: measure after every so many tokens.")
    ] = 4,
) -> None:
    """Measure how much each layer of a model needs, and write the profile.

    The model answers the prompts with the full cache; then its answers are read again and measured.
    What both take at most is printed first, and a time once the first answer has been measured.
    Several processes share the prompts: accelerate launch -m hf_reasoncache.cli calibrate ...
    """
    if push_to is not None:
        require_repo_id(push_to)
        require_packages(matplotlib="plot")
    eviction = Eviction(
        scorer=make_scorer(scorer, window=window),
        buffer=buffer,
        window=window,
        protect_prompt=protect_prompt,
    )
    chosen: Estimator = (
        Coverage(interval=interval, queries=queries)
        if estimator is EstimatorName.coverage
        else Sensitivity(
            budgets=_numbers(budgets),
            budget=budget,
            eviction=eviction,
            heads=heads,
            rows=rows,
            every=every,
        )
    )
    settings = CalibrationSettings(
        estimator=chosen,
        traces=TraceSettings(max_new_tokens, batch_size, temperature, seed),
        tune=Tune(budget=budget, eviction=eviction, rows=rows) if tune else None,
        check=Check(budget=budget, eviction=eviction, rows=rows) if check and not tune else None,
        chat=chat,
        queries=tri_attention,
    )
    found = read_prompts(prompts, limit=limit, split=split, column=column, revision=data_revision)
    expect_place(out)
    target = new_directory(out.parent) / out.name
    loading = open_run(target, model, revision, dtype, device, threads, attention="reasoncache")
    with loading as (loaded, tokenizer, is_main):
        say = partial(typer.echo, err=True)
        profile = run_calibration(
            loaded, tokenizer, found, out, settings, resume=resume, progress=True, say=say
        )
    if is_main:
        typer.echo(out)
        if push_to is not None:
            typer.echo(profile.push_to_hub(push_to))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(
            f"expected integers with commas between them, got {shown(text)}", param_hint="--budgets"
        ) from error
