"""The benchmarks run and write what they say; no time is ever judged here."""

import csv
import itertools
from dataclasses import replace

import pytest

from examples.benchmarks import (
    batch_memory,
    branches,
    cpu_decode,
    devices,
    growth,
    latents,
    step_latency,
    tensor_parallel,
)

DECODERS = (
    "DynamicCache + sdpa",
    "StaticCache + compile",
    "ReasonAllocCache, budget=None",
    "ReasonAllocCache, storage=fp8",
    "ReasonAllocCache, budget=48",
    "holds 48, never evicts",
    "no cache (floor)",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def printed(output):
    lines = []
    options, folder = cpu_decode.parse(
        ["--quick", "--batches", "1", "--compile-limit", "0", "--output", str(output)]
    )
    cpu_decode.run(options, lines.append, folder)
    return "\n".join(lines)


def test_table_has_every_arm_in_80_columns(printed):
    for decoder in DECODERS:
        assert f"\n{decoder} " in printed
    assert "left out by --compile-limit 0" in printed
    assert max(len(line) for line in printed.splitlines() if "wrote" not in line) <= 80


def test_speed_is_shown_by_length(printed):
    head, _, *lines = printed[printed.index("| dtype ") :].splitlines()
    assert head == "| dtype | batch | speed over DynamicCache | 96 | 192 |"
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| float32 | 1 |")]
    slow = {"DynamicCache + sdpa", "StaticCache + compile"}
    assert [row[2] for row in rows] == [name for name in DECODERS if name not in slow]
    assert all(float(cell.removesuffix("x")) > 0 for row in rows for cell in row[3:])


def test_csv_has_a_line_per_arm(printed, output):
    with (output / "cpu_decode.csv").open(newline="") as file:
        rows = {row["decoder"]: row for row in csv.DictReader(file)}
    assert tuple(rows) == DECODERS
    assert rows["StaticCache + compile"]["ms"] == ""
    for name in set(DECODERS) - {"StaticCache + compile"}:
        row = rows[name]
        assert float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"])
    held = {decoder: int(rows[decoder]["held_bytes"] or 0) for decoder in DECODERS}
    assert 0 < held["ReasonAllocCache, budget=48"] < held["DynamicCache + sdpa"]
    assert held["ReasonAllocCache, storage=fp8"] < held["ReasonAllocCache, budget=None"]
    assert all(row["torch"] and row["commit"] and row["seed"] == "0" for row in rows.values())


def test_memory_csv_has_both_caches(printed, output):
    with (output / "cpu_prefill.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    full, compressed = rows["DynamicCache"], rows["budget=48"]
    assert 0 < int(compressed["resident"]) < int(full["resident"])
    assert int(compressed["peak_held"]) <= int(compressed["peak_allocated"])


def test_picture_is_a_png(printed, output):
    assert (output / "cpu_decode.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_dtype_is_refused(capsys):
    with pytest.raises(SystemExit):
        cpu_decode.parse(["--dtypes", "float8"])
    assert "expected some of float32, bfloat16, got float8" in capsys.readouterr().err


def test_step_latency_draws_every_cache(tmp_path, capsys):
    step_latency.main(["--quick", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    with (tmp_path / "step_latency.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    caches = {row["cache"] for row in rows}
    assert len(caches) == 4 and len(rows) == 4 * 16
    assert all(any(line.startswith(name) for line in lines) for name in caches)
    assert all(float(row["ms"]) > 0 and row["commit"] for row in rows)
    assert (tmp_path / "step_latency.png").read_bytes().startswith(b"\x89PNG")


def test_latents_are_measured_with_their_bytes(tmp_path):
    lines = []
    options, folder = latents.parse(["--quick", "--rounds", "1", "--output", str(tmp_path)])
    latents.run(options, lines.append, folder)
    assert max(len(line) for line in "\n".join(lines).splitlines() if "wrote" not in line) <= 80
    with (tmp_path / "latents.csv").open(newline="") as file:
        rows = {row["kind"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"Decoder", "Uncompressed", "Compressed", "Holds", "NoCache"}
    # Two layers of 96 latents and rotary keys, and room of `steps` after a crop; float32.
    assert int(rows["Decoder"]["held_bytes"]) == 2 * (96 + options.steps) * 576 * 4
    assert int(rows["Compressed"]["held_bytes"]) < int(rows["Uncompressed"]["held_bytes"])


def test_branches_are_measured_with_their_memory(tmp_path):
    lines = []
    options, folder = branches.parse(
        ["--quick", "--branches", "3", "--rounds", "1", "--output", str(tmp_path)]
    )
    branches.run(options, lines.append, folder)
    text = "\n".join(lines)
    assert "keys and values 0.00% above prefix and suffixes" in text
    assert max(len(line) for line in text.splitlines() if "wrote" not in line) <= 80
    with (tmp_path / "branches.csv").open(newline="") as file:
        rows = {row["kind"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["Decoder", "Uncompressed", "Continuous", "Shared", "NoCache"]
    # A difference of two short runs may be anything; that there is one means that it ran.
    assert all(row["ms"] for row in rows.values())
    held = {kind: int(row["held_bytes"]) for kind, row in rows.items()}
    assert held["Shared"] < held["Continuous"] < held["Decoder"]
    assert (tmp_path / "branches.png").stat().st_size > 10_000


def test_branches_leave_out_what_does_not_fit():
    lines = []
    options, _ = branches.parse(
        ["--quick", "--branches", "2", "--rounds", "1", "--memory", "0.0001"]
    )
    options = replace(options, continuous_limit=10)
    branches.run(options, lines.append, None)
    text = "\n".join(lines)
    assert text.count("needs 0.0 GB, --memory is 0.0001") == 2
    assert "left out above 10 tokens in all rows" in text


def test_processes_that_share_a_model_are_counted(tmp_path, capsys):
    """Here one process, which tells nobody anything; with two it is run by hand."""
    table = tmp_path / "table.csv"
    arguments = ["--quick", "--tasks", "walk", "--only", "ReasonAlloc, agree"]
    tensor_parallel.main([*arguments, "--output", str(table)])
    (row,) = csv.DictReader(table.open())
    assert int(row["compactions"]) > 0
    assert row["messages"] == "0" and row["ms each"] == "-"
    printed = capsys.readouterr().out
    assert "1 processes, 1 problems" in printed
    assert max(map(len, printed.splitlines()[:6])) <= 80


def test_offloaded_weights_are_counted(capsys):
    devices.main(["--steps", "4"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "Cache" in line]
    assert len(lines) >= 12
    assert all(line.endswith("same") and len(line) <= 80 for line in lines)
    of = {line[:22].strip(): set() for line in lines}
    for line in lines:
        of[line[:22].strip()].add(tuple(line.split()[-3:]))
    assert all(len(numbers) == 1 for numbers in of.values()), of


def test_caches_answer_the_same_prompts_at_one_bound(tmp_path, capsys, monkeypatch):
    whole, problems = batch_memory.trials(2), batch_memory.in_turn
    chosen = [trial for trial in whole if trial.name in ("full", "random, 96") or trial.samples > 1]
    monkeypatch.setattr(batch_memory, "trials", lambda samples: chosen)
    monkeypatch.setattr(
        batch_memory,
        "in_turn",
        lambda *given: [replace(each, max_new_tokens=9) for each in problems(*given)],
    )
    page, table = tmp_path / "page.md", tmp_path / "x.csv"
    page.write_text("<!-- batch-memory -->\n<!-- end batch-memory -->\n")
    arguments = ["--count", "1", "--rounds", "1", "--csv", str(table), "--document", str(page)]
    monkeypatch.setattr("sys.argv", ["batch_memory", *arguments])
    batch_memory.main()
    assert page.read_text().count("\n| ") == 1 + len(chosen)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == [str(3 * 9 * trial.samples) for trial in chosen]
    assert all(0 < float(row["peak, MB"]) <= 16 for row in rows)
    assert capsys.readouterr().out.count("\n| ") == 1 + len(chosen)


def test_growth_is_measured_beside_a_dynamic_cache(tmp_path):
    rows = growth.run(prompt=24, tokens=600, every=300, output=tmp_path)
    with (tmp_path / "growth.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["grows"] for row in table] == [row.grows for row in rows]
    *ours, theirs = rows
    assert theirs.grows == "DynamicCache" and theirs.moves == 600
    for before, after in itertools.pairwise(ours):
        assert before.moves <= after.moves < theirs.moves and before.slots >= after.slots >= 1
    assert ours[0].peak > theirs.peak
