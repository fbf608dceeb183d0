"""The command `hf-reasoncache`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_reasoncache.cli.audit import audit_command
from hf_reasoncache.cli.calibrate import calibrate
from hf_reasoncache.cli.chat import chat_command
from hf_reasoncache.cli.completion import completion
from hf_reasoncache.cli.errors import run
from hf_reasoncache.cli.evaluate import evaluate_command
from hf_reasoncache.cli.generate import generate_command
from hf_reasoncache.cli.perplexity import perplexity_command
from hf_reasoncache.cli.plan import plan_command
from hf_reasoncache.cli.profiles import compare, pull, push, show
from hf_reasoncache.version import __version__

app = typer.Typer(
    name="hf-reasoncache",
    help="KV-cache compression: budget profiles, what compression costs on your tasks, and answers "
    "to many prompts at a bound on memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (calibrate, show, compare, push, pull):
    app.command()(_command)
app.command("evaluate")(evaluate_command)
app.command("perplexity")(perplexity_command)
app.command("audit")(audit_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("plan")(plan_command)
app.command()(completion)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-reasoncache {__version__}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_say_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command."""
    run(app)
