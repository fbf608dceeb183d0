"""The command line as a user meets it."""

from __future__ import annotations

import sys

import pytest
import torch

from hf_reasoncache.cli import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A command in this process, 80 columns wide: exit status, stdout and stderr."""

    def call(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-reasoncache", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("COLUMNS", "80")
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as ended:
            main()
        torch.set_num_threads(threads)
        written = capsys.readouterr()
        # Python prints a text status to stderr and exits with 1.
        if isinstance(ended.value.code, str):
            return 1, written.out, written.err + ended.value.code
        return ended.value.code or 0, written.out, written.err

    return call
