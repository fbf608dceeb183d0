"""`perplexity` as a user meets it: files, columns, a second run, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, make_problems

MODEL = MODELS["llama"]
SMALL = ["--dtype", "float32", "--device", "cpu", "--window", "16", "--buffer", "16"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "walks.txt"
    problems = make_problems("walk", 4, DEVELOPMENT_SEEDS[760], "llama")
    path.write_text(" ".join(f"{each.prompt} {each.solution}" for each in problems))
    return path


def test_perplexity_compares_and_goes_on(run, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    command = ["perplexity", MODEL, "--text", text, "--cache", "snapkv:prompt=evict", *SMALL]
    command += ["--tokens", "160", "--pieces", "2", "--budgets", "48,400", "--out", out]
    status, printed, said = run(*command)
    assert status == 0
    lines = printed.splitlines()
    assert max(len(line) for line in lines if str(out) not in line) <= 80
    assert lines[0] == "2 pieces of 160 tokens, 8 per forward"
    assert lines[1].split() == ["cache", "budget", "perplexity", "KL", "same", "until"]
    assert "WARNING: snapkv:prompt=evict at 400 evicted nothing" in said
    results = json.loads((out / "results.json").read_text())
    names = [(row["cache"], row["budget"]) for row in results]
    assert names == [
        ("full", None),
        ("snapkv:prompt=evict", 48),
        ("random:prompt=evict", 48),
        ("snapkv:prompt=evict", 400),
        ("random:prompt=evict", 400),
    ]
    full, snapkv, random, large, _ = results
    assert full["divergence"]["value"] == 0 and abs(large["divergence"]["value"]) < 1e-4
    assert 1 < full["perplexity"]["value"] < random["perplexity"]["value"]
    above = snapkv["loss"]["value"] - random["loss"]["value"]
    assert snapkv["above_control"]["value"] == pytest.approx(above)
    assert (out / "results.md").read_text().count("\n") == 2 + 5
    readings = (out / "readings.jsonl").read_bytes()
    assert readings.count(b"\n") == 1 + 2 * 5
    status, printed, _ = run(*command, "--json")
    assert status == 0 and json.loads(printed) == results
    assert (out / "readings.jsonl").read_bytes() == readings


def test_help_fits_80_columns(run) -> None:
    status, out, _ = run("perplexity", "--help")
    assert status == 0 and max(map(len, out.splitlines())) <= 80


def test_a_text_that_is_too_short(run, text: Path, tmp_path: Path) -> None:
    command = ["perplexity", MODEL, "--text", text, "--cache", "snapkv", *SMALL, "--budgets", "48"]
    status, _, said = run(*command, "--out", tmp_path / "found", "--tokens", "100000")
    assert status == 1
    assert "walks.txt: expected text of 100000 tokens or more, got" in said
