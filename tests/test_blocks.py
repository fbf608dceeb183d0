"""Code on the pages: it parses, its imports are there, calls and commands take what they give.

Names that a block uses without importing them are those of `hf_reasoncache`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hf_reasoncache
from tests.support.command_help import FOLDER

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(*kinds: str) -> list[Any]:
    """Every block of these languages, with its page and number."""
    found = []
    for page in PAGES:
        for number, (kind, text) in enumerate(BLOCK.findall(page.read_text("utf-8"))):
            if kind in kinds:
                name = f"{page.relative_to(ROOT)}-{number}"
                found.append(pytest.param(text, id=name))
    return found


def imported(tree: ast.Module) -> dict[str, Any]:
    """What a block imports of ours, by name; an error where it is not there."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_reasoncache"):
            module = importlib.import_module(node.module)
            found |= {name.asname or name.name: getattr(module, name.name) for name in node.names}
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("hf_reasoncache"):
                    importlib.import_module(name.name)
    return found


def target(node: ast.expr, names: dict[str, Any]) -> Any:
    """What a call calls, if it is ours."""
    if isinstance(node, ast.Name):
        public = node.id in hf_reasoncache.__all__
        return names.get(node.id, getattr(hf_reasoncache, node.id) if public else None)
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "hf_reasoncache":
            return getattr(hf_reasoncache, node.attr)
        owner = target(node.value, names)
        return None if owner is None else getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("text", blocks("python"))
def test_python_fits_the_package(text: str) -> None:
    tree = ast.parse(text)
    try:
        names = imported(tree)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hf_reasoncache"):
            raise
        pytest.skip(f"needs the package {error.name}")
    for node in ast.walk(tree):
        called = target(node.func, names) if isinstance(node, ast.Call) else None
        if called is None or any(each.arg is None for each in node.keywords):
            continue
        if getattr(called, "__name__", "") == "policy":
            called = called.__self__
            arguments: list[Any] = [None]
        else:
            arguments = []
        if any(isinstance(each, ast.Starred) for each in node.args):
            continue
        arguments += node.args
        inspect.signature(called).bind_partial(
            *arguments, **{each.arg: 0 for each in node.keywords}
        )


def commands(text: str) -> Iterator[list[str]]:
    """The `hf-reasoncache` commands of a block, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "hf-reasoncache" in words:
            yield words[words.index("hf-reasoncache") + 1 :]


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_have_these_options(text: str) -> None:
    for name, *words in commands(text):
        file = FOLDER / f"{name}.txt"
        assert file.is_file(), name
        known = set(re.findall(r"--[\w-]+", file.read_text("utf-8")))
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known, (name, given - known)


def test_what_does_not_fit_is_found() -> None:
    with pytest.raises(TypeError):
        test_python_fits_the_package("ReasonAllocCache(config, budge=3)")
    with pytest.raises(AttributeError):
        test_python_fits_the_package("from hf_reasoncache import Nothing")
    with pytest.raises(AssertionError):
        test_commands_have_these_options("hf-reasoncache show DIR --budgets 3")
