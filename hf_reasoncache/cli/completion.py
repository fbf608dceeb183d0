"""`completion`: what a shell reads to complete the command."""

from __future__ import annotations

from typing import Annotated

import typer

import hf_reasoncache_cli
from hf_reasoncache_cli.completion import Shell


def completion(
    shell: Annotated[Shell, typer.Argument(help="The shell that is to read it.")],
) -> None:
    """Print a script that completes commands and options.

    For example in ~/.bashrc: source <(hf-reasoncache completion bash)
    """
    typer.echo(hf_reasoncache_cli.completion_of(shell.value), nl=False)
