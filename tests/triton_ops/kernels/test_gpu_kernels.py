"""The benchmark of the kernels runs at toy size; no time is ever judged here."""

import csv

from examples.benchmarks import gpu_kernels


def test_every_kernel_has_a_line(tmp_path, device):
    lines = []
    gpu_kernels.run(gpu_kernels.TOY, tmp_path, lines.append)
    assert max(len(line) for part in lines[1:] for line in part.splitlines()) <= 80
    with (tmp_path / "gpu_kernels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["implementation"] == "ours"]
    assert {row["op"] for row in rows} == {
        "decode_attention",
        "window_scores",
        "redundancy",
        "compact",
        "prefix_attention",
    }
    for row in rows:
        assert float(row["us"]) > 0 and row["gpu"] and row["triton"] and row["date"]
    last = lines[-1]
    assert last.startswith("redundancy / 128 steps")
    assert device.type == "cuda" or last.endswith("not judged)")
