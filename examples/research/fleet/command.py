"""Runs a function as a command whose errors are one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from hf_reasoncache.cli.errors import run


def run_command(function: Callable[..., Any]) -> None:
    """Take the arguments from the command line; what the user can mend is a line on stderr."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(function)
    run(app)
