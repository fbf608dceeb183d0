"""The commands that pages and docstrings name exist, and each example does what it says."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples import demo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
PAGES += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))
FIRST = (
    "quickstart",
    "sliding_window",
    "branches",
    "protect",
    "calibrate",
    "custom_scorer",
    "batch",
)
RESEARCH = ROOT / "examples" / "research"
COMMAND = re.compile(r"-m\s+(examples(?:\.\w+)+)")
FILE = re.compile(r"\b(?:examples|tests|docs)/[\w/]+\.\w+")


def is_module(name: str) -> bool:
    """Whether `python -m name` finds something to run."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def missing(text: str) -> list[str]:
    """Commands and files that a text names, and that are not there."""
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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs an example in this process, on one thread; what it printed, 80 columns wide."""

    def call(name: str) -> str:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        runpy.run_module(f"examples.{name}", run_name="__main__")
        torch.set_num_threads(threads)
        printed = capsys.readouterr().out
        for line in printed.splitlines():
            assert len(line) <= 80 or line.endswith("<eos>"), "but an answer"
        return printed

    return call


@pytest.mark.parametrize("name", [*FIRST, "demo"])
def test_an_example_stands_alone(name: str) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
    if name in FIRST:
        assert 20 <= len(source.splitlines()) <= 60
    imported = re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE)
    ours = [each for each in imported if each.split(".")[0] in ("", "examples")]
    assert all(each.startswith("examples.tiny_reasoner") for each in ours)


# Written as in README, which all supported releases of transformers take.
old_name = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


@old_name
def test_quickstart(run: Callable[[str], str]) -> None:
    answer, truth, *report = run("quickstart").splitlines()
    assert answer.endswith(f"ANS {truth.removeprefix('the answer is ')} <eos>")
    seen, held = re.findall(r"seen (\d+) tokens, hold (\d+)", report[0])[0]
    assert int(held) < 0.7 * int(seen)


@old_name
def test_sliding_window(run: Callable[[str], str]) -> None:
    lines = run("sliding_window").splitlines()[1:4]
    assert all(line.endswith("  right") for line in lines)
    held = [int(line.split()[1]) for line in lines]
    total = int(lines[2].split()[3])
    assert held[0] < held[1] < held[2] == total, "with ratio 1 nothing is evicted"


def test_branches(run: Callable[[str], str]) -> None:
    vote, truth, *report = run("branches").splitlines()
    assert vote.startswith(f"answer {truth.removeprefix('the answer is ')} (")
    assert vote.endswith(" consensus"), "some need not have gone on"
    sizes = re.findall(r"([\d,]+) bytes", "\n".join(report))
    _, held, unshared = (int(size.replace(",", "")) for size in sizes)
    assert held < unshared


@old_name
def test_protect(run: Callable[[str], str]) -> None:
    may_go, lost, stay, followed = run("protect").splitlines()
    assert "100%" in stay and "100%" not in may_go
    marks = re.findall(r"(\d+)/(\d+)", followed)
    assert len(marks) == 5 and all(count == total for count, total in marks)
    assert any(count != total for count, total in re.findall(r"(\d+)/(\d+)", lost))


@old_name
def test_calibrate(run: Callable[[str], str]) -> None:
    *costs, demand, seen = (lines := run("calibrate").splitlines())[:6]
    assert [cost.split(":")[0] for cost in costs] == ["answers", *["sensitivity"] * 3]
    needed = [float(each) for each in demand.rpartition(": ")[2].split()]
    held = []
    for layers, _, mean, *_ in map(str.split, lines[-4:]):
        first, _, last = layers.partition("-")
        if first.isdigit():
            held += [float(mean)] * (int(last or first) - int(first) + 1)
    assert len(needed) == len(held) == 4
    assert needed.index(max(needed)) == held.index(max(held)), "who needs most gets most"
    assert seen.startswith("seen ")


@old_name
def test_custom_scorer(run: Callable[[str], str]) -> None:
    own, chance = (int(each) for each in re.findall(r"(\d+) of 12 right", run("custom_scorer")))
    assert own > chance


@old_name
def test_batch(run: Callable[[str], str]) -> None:
    rows = run("batch").splitlines()[:3]
    assert [row.split()[0] for row in rows] == ["chain", "walk", "instr"]
    assert len({row.split("prompt")[1].split(",")[0] for row in rows}) == 3, "several lengths"
    assert all("right; held" in row for row in rows)


def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "demo.png"
    arguments = ["--problems", "2", "--budgets", "80", "112", "--output", str(picture)]
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    monkeypatch.setattr(demo, "TASKS", ("walk",))
    demo.main()
    printed = capsys.readouterr().out
    rows = [line.split("│") for line in printed.splitlines() if "%│" in line]
    assert [row[1].strip() for row in rows] == [
        *("full (DynamicCache)", "layer profile 112", "layer profile 80", "random 80")
    ]
    shares = [int(row[-2].strip(" %")) for row in rows]
    assert shares[0] == 100 > shares[1] > shares[2] >= shares[3]
    assert "heads of a layer equal" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
