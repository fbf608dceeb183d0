"""The GPU benchmark of decoding runs at toy size on a CPU; no time is ever judged here."""

import csv
import re
from dataclasses import replace

import pytest
import torch

from examples.benchmarks import gpu_decode
from examples.benchmarks.gpu_decode import GOALS, Row, judge
from examples.benchmarks.gpu_decoders import UnequalGraphs


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("gpu"), []
    options, _ = gpu_decode.parse(["--toy", "--profile", "dynamic,budget"])
    gpu_decode.run(options, folder, lines.append)
    return lines, folder


def test_every_arm_has_a_line(printed):
    lines, _ = printed
    text = "\n".join(lines)
    for decoder in ("DynamicCache + sdpa", "StaticCache + compile", "no cache (floor)"):
        assert f"\n1x48      {decoder} " in text
    assert "\n1x48      with a budget, graphs         not run: CUDA graphs need a GPU\n" in text
    assert "\n1x48      unequal prompts, graphs       not run: one row only\n" in text
    assert "\n4x48      ReasonAllocCache, budget=16 " in text, "the search for the largest batch"
    assert "\n8x48 " not in text, "the search is bounded"
    assert "the times mean nothing" in text
    assert max(len(line) for part in lines[2:] for line in part.splitlines()) <= 80


def test_the_csv_says_where_it_was_made(printed):
    with (printed[1] / "gpu_decode.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["gpu"] for row in rows} == {"none (toy sizes)"}
    assert all(row["triton"] and row["torch"] and row["commit"] and row["date"] for row in rows)
    ran = {row["kind"]: row for row in rows if row["ms"]}
    assert set(ran) == {"Decoder", "Compressed", "NoCache"}
    assert 0 < int(ran["Compressed"]["held"]) < int(ran["Decoder"]["held"])
    for row in ran.values():
        assert 0 < float(row["median_ms"]) <= float(row["worst_ms"])
        assert row["recorded"] == row["replayed"] == row["eager"] == "", "no graphs without a GPU"


def test_an_evicting_step_is_profiled(printed):
    text = (printed[1] / "gpu_decode_profile.txt").read_text()
    parts = text.split("ReasonAllocCache, budget=16, ")
    titles = [part.split("\n")[0] for part in parts]
    assert titles == ["DynamicCache + sdpa, 1x48", "1x48", "2x48", "4x48"]
    assert all("Self CPU" in part for part in parts)


def test_goals_are_held_against_the_best_baseline():
    def row(kind, speed):
        return Row("toy", 1, 9, kind, kind, ms=1.0, tokens_per_second=speed)

    rows = [row("Decoder", 10.0), row("Static", 20.0), row("CompressedGraphs", 50.0)]
    assert judge(rows, 2.4, "batch 1") == "batch 1: 2.50x (goal >= 2.4, met)"
    assert judge(rows, 2.6, "batch 1").endswith("missed)")
    assert judge(rows, None, "batch 1") == "batch 1: 2.50x"
    assert judge(rows[:2], 2.0, "batch 1") == "batch 1: not measured"


def test_goals_belong_to_a_batch_and_a_context():
    options, _ = gpu_decode.parse([])
    assert options.cases == ((1, 32768), (16, 8192)), "16 x 32768 takes more than a GPU of 80 GB"
    assert (1, 32768) in GOALS and (16, 8192) not in GOALS


def test_arms_and_limits_can_be_chosen():
    options, _ = gpu_decode.parse(
        ["--decoders", "static,floor-graph", "--cases", "2x64", "--compile-limit", "7"]
    )
    assert options.decoders == ("static", "floor-graph") and options.cases == ((2, 64),)
    assert options.compile_limit == 7.0 and options.sized(2, 64).context == 64


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--decoders", "budget,magic", "expected some of dynamic,.*, got magic"),
        ("--cases", "16", "expected BATCHxCONTEXT, comma-separated, got '16'"),
    ],
)
def test_wrong_choices_are_named(option, value, said, capsys):
    with pytest.raises(SystemExit):
        gpu_decode.parse([option, value])
    assert re.search(said, capsys.readouterr().err)


def test_unequal_prompts_evict_one_after_another():
    """Rows reach the end of their buffer at steps of their own."""
    # Without kernels there is nothing to record: the decoder's steps run as usual.
    work = replace(gpu_decode.parse(["--toy"])[0].sized(4, 48), recorder=object)
    model = work.shape.build(0)
    with torch.no_grad():
        decoder = UnequalGraphs(model, work)
        decoder.forward = model
        decoder.warm_up()
        held = [layer.store.pool.length.sum(-1).tolist() for layer in decoder.cache.layers]
    assert all(sorted(row) == [2 * (16 + more) for more in range(1, 5)] for row in held)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="expected a CUDA device, got none"):
        gpu_decode.main([])
