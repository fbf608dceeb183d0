"""`show`, `compare`, `push` and `pull`: what to do with profiles that were measured already."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from hf_reasoncache.cli.loading import expect_hub
from hf_reasoncache.cli.options import Json
from hf_reasoncache.outputs import write_bytes
from hf_reasoncache.profiles.distance import wave_distance
from hf_reasoncache.profiles.files import CONFIG, expect_place, write_profile
from hf_reasoncache.profiles.hub import Repository, is_repo_id, require_repo_id
from hf_reasoncache.profiles.loading import read_profile, shipped
from hf_reasoncache.profiles.profile import BudgetProfile
from hf_reasoncache.profiles.summary import facts, layer_rows, title

_BAR = 24  # characters of the largest demand

Profile = Annotated[
    str,
    typer.Argument(
        metavar="PROFILE",
        help="A directory, a profile of this package (MODEL/ESTIMATOR), or a repository ORG/NAME.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REV", help="Branch, tag or commit of a repository.", show_default=False),
]
Picture = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE", help="Draw the wave.", show_default=False),
]


def show(
    profile: Profile,
    revision: Revision = None,
    budget: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Mean tokens per KV head; shows what each layer gets.",
            show_default=False,
        ),
    ] = None,
    png: Picture = None,
    as_json: Json = False,
) -> None:
    """Print where a profile comes from, and each layer's demand.

    The error is one standard error over the prompts; demand has the unit of the estimator.
    """
    _expect_hub(profile)
    found = BudgetProfile.from_pretrained(profile, revision=revision, with_statistics=False)
    rows = layer_rows(found, budget)
    if as_json:
        content = json.loads(found.to_files()[CONFIG])
        # They were not loaded; the profile may have some.
        del content["statistics"]
        typer.echo(json.dumps(content | {"layers": [vars(row) for row in rows]}, indent=2))
    else:
        for label, text in facts(found).items():
            typer.echo(_wrapped(f"{label:<10} {text}"))
        typer.echo(f"\n{'layer':>5} {'demand':>10} {'error':>9} {'of mean':>8}", nl=False)
        typer.echo("" if budget is None else f" {'budget':>7}")
        largest = max(row.relative for row in rows)
        for row in rows:
            tokens = "" if row.budget is None else f" {row.budget:>7}"
            bar = "#" * round(_BAR * row.relative / largest)
            typer.echo(
                f"{row.layer:>5} {row.demand:>10.4g} {row.standard_error:>9.2g} "
                f"{row.relative:>8.2f}{tokens}  {bar}".rstrip()
            )
    _draw(png, {title(found): found})


def compare(
    profiles: Annotated[
        list[str],
        typer.Argument(metavar="PROFILE...", help="Two or more directories or repositories."),
    ],
    png: Picture = None,
    as_json: Json = False,
) -> None:
    """Print how far the waves of profiles are apart.

    The figure is the Wasserstein-1 distance of the demand over the model's depth, which runs from 0
    to 1: models of different depth compare, and the unit of the demand does not count.
    """
    if len(profiles) < 2:
        raise typer.BadParameter("expected at least two profiles", param_hint="PROFILE...")
    _expect_hub(*profiles)
    found = [BudgetProfile.from_pretrained(name, with_statistics=False) for name in profiles]
    table = [[wave_distance(a.demand, b.demand) for b in found] for a in found]
    if as_json:
        typer.echo(json.dumps({"profiles": profiles, "distances": table}, indent=2))
    else:
        for number, (name, each) in enumerate(zip(profiles, found, strict=True), start=1):
            typer.echo(f"[{number}] {name}: {each.estimator}, {len(each.demand)} layers")
        typer.echo(
            "\n     " + "".join(f"{f'[{number}]':>9}" for number in range(1, len(found) + 1))
        )
        for number, row in enumerate(table, start=1):
            typer.echo(f"{f'[{number}]':<5}" + "".join(f"{value:>9.4f}" for value in row))
    _draw(png, dict(zip(profiles, found, strict=True)))


def push(
    directory: Annotated[
        Path, typer.Argument(help="A profile's directory.", exists=True, file_okay=False)
    ],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Made if it does not exist.")],
    private: Annotated[
        bool | None,
        typer.Option(
            help="Of a repository that is made.",
            show_default="what the organisation has set",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="To commit to.", show_default="main"),
    ] = None,
) -> None:
    """Upload a profile to the Hub, with a model card and its picture.

    The token is that of `hf auth login` or HF_TOKEN.
    """
    profile = BudgetProfile.from_pretrained(directory)
    _expect_hub(repo_id)
    typer.echo(profile.push_to_hub(repo_id, private=private, revision=revision))


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A profile's repository.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the profile goes.")],
    revision: Revision = None,
) -> None:
    """Download a profile from the Hub into a directory.

    A profile that is not valid leaves the directory as it is.
    """
    expect_place(out)
    _expect_hub(repo_id)
    source = Repository(require_repo_id(repo_id), revision)
    content = read_profile(source)
    # Read before it is written, and written as it is: a copy keeps what this release ignores.
    BudgetProfile.from_files(content, name=source.name)
    write_profile(out, content)
    typer.echo(out)


def _expect_hub(*profiles: str) -> None:
    """`expect_hub` for those that can only be repositories."""
    expect_hub(*(name for name in profiles if is_repo_id(name) and name not in shipped()))


def _wrapped(line: str) -> str:
    """Break a line at the width of the terminal, if it goes to one; pipes take whole lines."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent=" " * 11, break_on_hyphens=False)


def _draw(png: Path | None, profiles: dict[str, BudgetProfile]) -> None:
    if png is not None:
        # matplotlib is an extra, and slow to load.
        from hf_reasoncache.profiles.plot import wave_png

        write_bytes(png, wave_png(profiles))
