"""The entry point of `hf-reasoncache`: what needs no model at once, all else with the package.

Importing transformers and torch takes seconds; neither is needed to say what a command takes. The
texts in `help/` are what typer prints for `-h` at 80 columns; a test holds them to it, and
`python -m tests.support.command_help` writes them anew.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.resources import files

from hf_reasoncache_cli.completion import SHELLS, script

_HELP = ("-h", "--help")
_ALL = "hf-reasoncache"


def main() -> None:
    """Run the command."""
    text = answer(sys.argv[1:])
    if text is not None:
        print(text)
        return
    from hf_reasoncache.cli import main as run

    run()


def answer(arguments: list[str]) -> str | None:
    """Return what needs no more than this module, or None."""
    if arguments == ["--version"]:
        return f"hf-reasoncache {version('hf-reasoncache')}"
    if not arguments or arguments in [[flag] for flag in _HELP]:
        return help_of(_ALL)
    if len(arguments) == 2 and arguments[1] in _HELP and arguments[0].isalpha():
        return help_of(arguments[0])
    if len(arguments) == 2 and arguments[0] == "completion" and arguments[1] in SHELLS:
        return completion_of(arguments[1])
    return None


def completion_of(shell: str) -> str:
    """Return what a shell of `SHELLS` reads to complete the command."""
    names = [file.name.removesuffix(".txt") for file in (files(__name__) / "help").iterdir()]
    texts = {name: help_of(name) or "" for name in names if name != _ALL}
    return script(shell, texts)


def help_of(command: str) -> str | None:
    """Return the help of a command, or of all; None where there is no such command."""
    file = files(__name__) / "help" / f"{command}.txt"
    return file.read_text("utf-8").rstrip("\n") if file.is_file() else None
