"""The GPU benchmark of decoding runs at toy size on a CPU; no time is ever judged here."""

import csv

import pytest
import torch

from examples.benchmarks import gpu_decode
from examples.benchmarks.gpu_decode import Row, judge


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("gpu"), []
    plan, _ = gpu_decode.parse(["--toy"])
    gpu_decode.run(plan, folder, lines.append)
    return lines, folder


def test_every_arm_has_a_line(printed):
    lines, _ = printed
    text = "\n".join(lines)
    for arm in ("DynamicCache + sdpa", "StaticCache + compile", "no cache (floor)"):
        assert f"  1  {arm} " in text
    assert "  1  with a budget, graphs          not run: CUDA graphs need a GPU" in text
    assert "  2  ReasonAllocCache, budget=16 " in text, "the search for the largest batch"
    assert "the times mean nothing" in text
    assert max(len(line) for part in lines[2:] for line in part.splitlines()) <= 80


def test_the_csv_says_where_it_was_made(printed):
    with (printed[1] / "gpu_decode.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["gpu"] for row in rows} == {"none (toy sizes)"}
    assert all(row["triton"] and row["torch"] and row["commit"] and row["date"] for row in rows)
    ran = {row["kind"]: row for row in rows if row["ms"]}
    assert set(ran) == {"Arm", "Compressed", "NoCache"}
    assert 0 < int(ran["Compressed"]["held"]) < int(ran["Arm"]["held"])


def test_goals_are_held_against_the_best_baseline():
    def row(kind, speed):
        return Row("toy", 1, 9, kind, kind, ms=1.0, tokens_per_second=speed)

    rows = [row("Arm", 10.0), row("Static", 20.0), row("CompressedGraphs", 50.0)]
    assert judge(rows, 2.4, "batch 1") == "batch 1: 2.50x (goal >= 2.4, met)"
    assert judge(rows, 2.6, "batch 1").endswith("missed)")
    assert judge(rows[:2], 2.0, "batch 1") == "batch 1: not measured"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="expected a CUDA device, got none"):
        gpu_decode.main([])
