"""The script for a day with a GPU, rehearsed at toy size without one."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "benchmarks" / "gpu_day.sh"


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        cwd="/",
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_every_part_runs_and_leaves_its_files(tmp_path):
    done = run("--rehearse", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = table(tmp_path / "parts.csv")
    assert [part["part"] for part in parts] == ["tests", "kernels", "graphs", "eager"]
    assert {part["status"] for part in parts} == {"0"}
    assert sum(int(part["limit"]) for part in parts) <= 8 * 60
    for part in parts:
        assert (tmp_path / f"{part['part']}.txt").stat().st_size
    assert "<testsuite " in (tmp_path / "tests.xml").read_text()
    assert " passed" in (tmp_path / "tests.txt").read_text()
    assert {row["op"] for row in table(tmp_path / "gpu_kernels.csv")} > {"redundancy", "compact"}
    graphs, eager = (table(tmp_path / name / "gpu_decode.csv") for name in ("graphs", "eager"))
    assert [row["kind"] for row in graphs[:2]] == ["CompressedGraphs", "Decoder"]
    assert {row["kind"] for row in graphs} >= {"MovingGraphs", "UnequalGraphs", "NoCacheGraphs"}
    assert [row["kind"] for row in eager if row["ms"]][:2] == ["Compressed", "NoCache"]
    assert (tmp_path / "eager" / "gpu_decode_profile.txt").stat().st_size


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    done = run(tmp_path, PYTHON="false")
    assert done.returncode == 1
    assert [part["status"] for part in table(tmp_path / "parts.csv")] == ["1"] * 4


def test_a_folder_is_asked_for():
    done = run(OUT="")
    assert done.returncode != 0 and "expected a folder for the results" in done.stderr
