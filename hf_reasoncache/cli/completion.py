"""`completion`: what a shell reads to complete the command."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

import hf_reasoncache_cli


class Shell(str, Enum):
    """Those of `hf_reasoncache_cli.completion.SHELLS`."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(help="The shell that is to read it.")],
) -> None:
    """Print a script that completes commands and options.

    For example in ~/.bashrc: source <(hf-reasoncache completion bash)
    """
    typer.echo(hf_reasoncache_cli.completion_of(shell.value), nl=False)
