"""What typer prints for `-h`, as `hf_reasoncache_cli/help` has it.

python -m tests.support.command_help    # writes the files anew
"""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

import hf_reasoncache_cli
from hf_reasoncache.cli import app

FOLDER = Path(hf_reasoncache_cli.__file__).parent / "help"
ALL = "hf-reasoncache"


def texts() -> dict[str, str]:
    """Return the help of every command by its name, and of all of them."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {ALL: _help()} | {name: _help(name) for name in commands}


def _help(*command: str) -> str:
    arguments = [*command, "-h"]
    shown = CliRunner().invoke(app, arguments, prog_name=ALL, env={"COLUMNS": "80"})
    return "\n".join(line.rstrip() for line in shown.output.strip().splitlines()) + "\n"


if __name__ == "__main__":
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for name, text in texts().items():
        (FOLDER / f"{name}.txt").write_text(text, "utf-8")
