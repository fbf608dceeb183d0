"""The simulation as a user runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples.research.fleet.__main__ import fleet
from examples.research.fleet.command import run_command
from examples.research.tables import read_csv

TINY = Path(__file__).parents[3] / "examples/tiny_reasoner/llama"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Exit status, stdout and stderr."""
    trace = tmp_path / "trace.csv"
    trace.write_text("prompt_tokens,answer_tokens\n60,100\n80,240\n40,30\n")

    def call(*arguments: object) -> tuple[object, str, str]:
        given = ["--trace", trace, "--model", TINY, "--memory", "12MB", "--budget", 96]
        given += ["--cache", "reason-alloc:buffer=16"]
        monkeypatch.setattr(sys, "argv", ["fleet", *map(str, [*given, *arguments])])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as ended:
            run_command(fleet)
        written = capsys.readouterr()
        if isinstance(ended.value.code, str):
            return 1, written.out, written.err + ended.value.code
        return ended.value.code or 0, written.out, written.err

    return call


def test_a_fleet(run, tmp_path: Path) -> None:
    status, out, _ = run("--out", tmp_path / "out", "--requests", 60, "--overhead", 5)
    assert status == 0 and all(len(line) <= 80 for line in out.splitlines())
    assert "everything below is simulated" in out
    lines = read_csv(tmp_path / "out" / "fleet.csv")
    rates = {(x["cache"], x["batches"]): float(x["sustained/s"]) for x in lines}
    assert set(rates) == {
        (name, mode)
        for name in ("no budget", "DynamicCache", "reason-alloc 96")
        for mode in ("continuous", "static")
    }
    for mode in ("continuous", "static"):
        assert rates["reason-alloc 96", mode] > 1.2 * rates["DynamicCache", mode]
    assert rates["DynamicCache", "continuous"] > rates["DynamicCache", "static"]
    for name, mode in rates:
        mine = [x for x in lines if (x["cache"], x["batches"]) == (name, mode)]
        slow = [float(x["p99 s"]) for x in mine]
        assert slow[-1] > slow[0] >= float(mine[0]["p50 s"])
    assert (tmp_path / "out" / "fleet.png").read_bytes().startswith(b"\x89PNG")


def test_branches(run) -> None:
    status, out, _ = run("--branches", 4, "--mode", "continuous", "--requests", 40)
    assert status == 0 and all(len(line) <= 80 for line in out.splitlines())
    for name in (
        "no budget",
        "DynamicCache",
        "shared, no budget",
        "reason-alloc 96",
        "shared, reason-alloc 96",
    ):
        assert f"\n{name} " in out


def test_a_recorded_trace(run, tmp_path: Path) -> None:
    """Requests that come ten at a time wait longer than one by one, at about the same rate."""
    waits = {}
    for name, gap, rate in (("even", 1, "1"), ("bursts", 10, "1.18")):
        lines = "".join(f"60,{100 + n % 7},{gap * (n // gap)}\n" for n in range(60))
        trace = tmp_path / f"{name}.csv"
        trace.write_text(f"prompt_tokens,answer_tokens,arrival\n{lines}")
        arguments = ("--trace", trace, "--recorded", "--mode", "continuous", "--overhead", 5)
        status, out, _ = run(*arguments, "--out", tmp_path / name)
        assert status == 0 and all(len(line) <= 80 for line in out.splitlines())
        assert f"the trace itself: {rate} requests/s" in out
        found = read_csv(tmp_path / name / "fleet.csv")
        (own,) = (x for x in found if (x["cache"], x["rate/s"]) == ("reason-alloc 96", rate))
        waits[name] = float(own["p99 s"])
    assert waits["bursts"] > waits["even"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recorded"], "--requests: expected none with --recorded"),
        (["--mode", "dynamic"], "--mode: expected continuous, static or both"),
        (["--memory", "1MB"], "memory: expected more than"),
        (["--memory", "2.5MB"], "to fit into"),
        (["--budget", "80"], "budget too small: expected budget >= 88"),
        (["--gpu", "H300"], "gpu: expected one of"),
        (["--trace", "nothing.csv"], "nothing.csv"),
        (["--measured", "nothing.csv"], "nothing.csv"),
        (["--dtype", "float31"], "--dtype: expected auto, float32, bfloat16 or float16"),
    ],
)
def test_errors_are_one_line(run, arguments: list[str], message: str) -> None:
    status, _, err = run("--requests", 20, *arguments)
    assert status == 1 and message in err
    assert "Traceback" not in err and err.strip().splitlines()[-1].startswith("error: ")
