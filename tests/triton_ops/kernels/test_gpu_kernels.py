"""The benchmark of the kernels runs at toy size; no time is ever judged here."""

import csv
from dataclasses import replace

import pytest
import torch

from examples.benchmarks import gpu_kernels
from tests.support.ops.tape import NotReplayableError, TapeRecorder
from triton_ops.backend import interpreting


def test_every_kernel_has_a_line(tmp_path, device):
    lines = []
    gpu_kernels.run(gpu_kernels.TOY, tmp_path, lines.append)
    assert max(len(line) for part in lines[1:] for line in part.splitlines()) <= 80
    with (tmp_path / "gpu_kernels.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    rows = [row for row in table if row["implementation"] == "ours"]
    assert {row["op"] for row in rows} == {
        "decode_attention",
        "window_scores",
        "redundancy",
        "compact",
        "prefix_attention",
    }
    for row in rows:
        assert float(row["us"]) > 0 and row["gpu"] and row["triton"] and row["date"]
    assert {row["note"] for row in table if row["implementation"] == "torch"} == {"eager"}
    last = lines[-1]
    assert last.startswith("redundancy / 128 steps")
    assert device.type == "cuda" or last.endswith("not judged)")


@pytest.mark.skipif(not interpreting(), reason="the tape records the interpreter's launches")
def test_what_is_timed_in_a_graph_can_be_recorded(device):
    """One call that reads from the device ends a run on a GPU."""
    refused = set()
    for case in gpu_kernels.Cases(gpu_kernels.TOY, device):
        for name, made in case.make().items():
            if made.call is None:
                continue
            made.call()
            try:
                TapeRecorder().record(made.call)
            except NotReplayableError:
                assert not made.graph, f"{case.op}: {name}"
                refused.add(case.op)
    assert refused == {"window_scores", "redundancy", "compact"}, "what need not be left out is not"


@pytest.mark.parametrize(
    ("dtype", "kind", "said"),
    [
        (torch.float32, "cuda", "bf16, fp16 only"),
        (torch.float32, "cpu", "bf16, fp16 only"),
        (torch.bfloat16, "cpu", "needs a GPU"),
        (torch.bfloat16, "cuda", ""),
    ],
)
def test_flash_attention_is_asked_for_what_it_has(dtype, kind, said):
    plan = replace(gpu_kernels.TOY, dtype=dtype)
    found = gpu_kernels.Cases(plan, torch.device(kind))._flash(lambda: None)
    assert (found.call is None, found.note) == (bool(said), said)


def test_flash_attention_that_refuses_is_left_out_with_its_reason():
    def refuses():
        raise RuntimeError("expected another head size")

    plan = replace(gpu_kernels.TOY, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="another head size"):
        found = gpu_kernels.Cases(plan, torch.device("cuda"))._flash(refuses)
    assert (found.call, found.note) == (None, "refused")


def test_lines_of_the_largest_cases_fit_a_terminal():
    row = dict(op="decode_attention", case="131072 tokens", implementation="sdpa flash")
    row |= dict(megabytes=536.9, floor_us=210.3)
    lines = [
        gpu_kernels.Row(**row, us=12345.6, share=1.0, goal=">= 90%"),
        gpu_kernels.Row(**row, us=None, share=None, note="bf16, fp16 only"),
    ]
    assert max(len(str(line)) for line in lines) <= 80
    assert "131072 tokens sdpa flash  " in str(lines[0])
