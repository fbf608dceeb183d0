"""Runs a command: what its user can mend is one line on stderr, and a bug shows where it is."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from hf_reasoncache.messages import shortened


def run(app: typer.Typer) -> NoReturn:
    """Run the command line and end the process.

    ValueError, OSError and ImportError are what this package, transformers and the Hub's library
    raise where an argument, a file, a device or an installation is not right: exit status 1. Wrong
    usage has status 2, and a message as short as all others. Everything else is a bug.
    """
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        raise SystemExit("Aborted!") from None
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(shortened(f"error: {error}")) from error
    except Exception as error:
        # The errors of usage: typer keeps their classes to itself.
        if not hasattr(error, "format_message"):
            raise
        error.message = shortened(error.message, 200)  # type: ignore[attr-defined]
        error.show()  # type: ignore[attr-defined]
        sys.exit(error.exit_code)  # type: ignore[attr-defined]
    sys.exit(status or 0)
