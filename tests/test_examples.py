"""The commands that pages and docstrings name exist, and each example does what it says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
PAGES += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))
RESEARCH = ROOT / "examples" / "research"
COMMAND = re.compile(r"-m\s+(examples(?:\.\w+)+)")
FILE = re.compile(r"\bexamples/[\w/]+\.\w+")


def is_module(name: str) -> bool:
    """Whether `python -m name` finds something to run."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def missing(text: str) -> list[str]:
    """Commands and files of examples that a text names, and that are not there."""
    gone = [name for name in COMMAND.findall(text) if not is_module(name)]
    return gone + [name for name in FILE.findall(text) if not (ROOT / name).exists()]


def test_what_pages_and_docstrings_name_exists() -> None:
    found = {path: missing(path.read_text("utf-8")) for path in [*PAGES, *SCRIPTS]}
    assert {str(path): names for path, names in found.items() if names} == {}


def test_what_is_gone_is_found() -> None:
    text = "`python -m\nexamples.gone --help`, `python -m examples.demo` or examples/gone.py"
    assert missing(text) == ["examples.gone", "examples/gone.py"]


def test_the_list_of_research_is_complete() -> None:
    listed = re.findall(
        r"^\| `([\w.]+)` \|.*`python -m examples\.research\.([\w.]+)",
        (RESEARCH / "README.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert all(name == command for name, command in listed)
    scripts = {
        ".".join(path.relative_to(RESEARCH).with_suffix("").parts).removesuffix(".__main__")
        for path in RESEARCH.rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text("utf-8")
    }
    assert {name for name, _ in listed} == scripts
