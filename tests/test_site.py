"""The site has every public name, every command, every page, and README as its home."""

import importlib
import re
from pathlib import Path

import pytest
import typer
import yaml

import mkdocs_hooks
from hf_reasoncache.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SHOWN = {
    name
    for page in (DOCS / "reference").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
}
PACKAGES = ("scorers", "protection", "risk", "branching", "profiles", "evaluation", "generation")
NO_PAGE = {"SCORERS", "CHECKS", "FULL", "DEVICES", "__version__", "ExitMeasurement"}
"""Constants, which their users' docstrings name."""


def resolved(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("package", ("", *(f".{name}" for name in PACKAGES), ".planning"))
def test_every_public_name_is_in_the_reference(package):
    module = importlib.import_module(f"hf_reasoncache{package}")
    shown = [resolved(path) for path in SHOWN]
    missing = [
        name
        for name in module.__all__
        if name not in NO_PAGE and not any(getattr(module, name) is each for each in shown)
    ]
    assert missing == []


def test_every_page_has_a_place():
    def pages(part):
        if isinstance(part, str):
            return [part]
        parts = part.values() if isinstance(part, dict) else part
        return [page for each in parts for page in pages(each)]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    listed = pages(config["nav"])
    assert len(listed) == len(set(listed))
    found = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert {page for page in found if not page.startswith("results/")} == set(listed)


def test_the_home_is_readme_with_links_of_the_site():
    text = "[a](docs/a.md#b), ![c](docs/images/c.png), [d](examples/d), [X](X), [e](https://e.org)"
    assert mkdocs_hooks.home(text) == (
        "[a](a.md#b), ![c](images/c.png), d (`examples/d`), X, [e](https://e.org)"
    )
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 150
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", readme):
        assert (ROOT / target).exists(), target


def test_the_commands_are_all_there():
    text = mkdocs_hooks.commands()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == list(
        typer.main.get_command(app).commands
    )
    assert "Usage: hf-reasoncache chat [OPTIONS]" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_notebook_becomes_a_page():
    book = {
        "cells": [
            {"cell_type": "markdown", "source": ["# T\n", "text"]},
            {
                "cell_type": "code",
                "source": ["print(1)"],
                "outputs": [
                    {"name": "stdout", "text": ["a:  0%|  \r", "a: 9%|##\r\n", "x\r1\n"]},
                    {"name": "stderr", "text": ["a bar\n"]},
                    {"data": {"image/png": "QUJD\n"}},
                ],
            },
            {"cell_type": "code", "source": ["!ls"], "outputs": []},
        ]
    }
    assert mkdocs_hooks.notebook(book) == (
        "# T\ntext\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
        "![](data:image/png;base64,QUJD)\n\n```sh\n!ls\n```"
    )
