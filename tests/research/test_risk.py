"""The examples about risk, in small: what they count, and that they write what they say."""

import csv
import sys

import numpy as np
import pytest

from examples.benchmarks import risk_cost
from examples.research import lookup, risk_probes, risk_roc
from examples.research.risk_roc import Signals, area, lines


def test_area_under_the_curve():
    for wrong, right, expected in [([3, 4], [1, 2], 1), ([1], [2, 3], 0), ([2, 1], [2, 1], 0.5)]:
        assert area(np.array(wrong), np.array(right)) == expected, "ties count half"


def test_table_has_intervals_where_there_is_something_to_tell_apart():
    answered = [
        Signals("chain" if place % 2 else "walk", place > 30, (place / 60, 0.0, 1.0, 2.0, 3.0))
        for place in range(60)
    ]
    rows = {row["task"]: row for row in lines("R-KV", 96, False, answered)}
    assert rows["all"]["mean error"] == "1.00 (1.00-1.00)"
    assert rows["all"]["length"] == "0.50 (0.50-0.50)", "a constant tells nothing"
    assert rows["all"]["wrong"] == "29" and rows["chain"]["of"] == "30"
    assert rows["instr"]["mean error"] == "", "too few to say"


@pytest.fixture
def document(tmp_path):
    def make(name):
        path = tmp_path / "document.md"
        path.write_text(f"before\n<!-- {name} -->\n<!-- end {name} -->\nafter\n")
        return path

    return make


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_roc_of_a_few_problems(tmp_path, document, monkeypatch):
    monkeypatch.setitem(risk_roc.SPECS, "llama", risk_roc.SPECS["llama"][1:2])
    monkeypatch.setattr(risk_roc, "TASKS", ("chain",))
    path = document("risk_roc-llama")
    run(monkeypatch, risk_roc, "--problems", 3, "--document", path, "--output", tmp_path)
    with (tmp_path / "risk_roc-llama.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["chain", "all"]
    assert "| R-KV + wave | 96 | evictable | chain |" in path.read_text()
    assert (tmp_path / "risk_roc-llama.png").read_bytes().startswith(b"\x89PNG")


def test_bounds_from_a_few_problems(tmp_path, document, monkeypatch):
    monkeypatch.setitem(risk_probes.SPECS, "llama", risk_probes.SPECS["llama"][1:])
    monkeypatch.setattr(risk_probes, "TASKS", ("walk",))
    monkeypatch.setattr(risk_probes, "ALPHAS", (0.5,))
    path = document("risk_probes-llama")
    run(monkeypatch, risk_probes, "--problems", 4, "--document", path, "--output", tmp_path)
    with (tmp_path / "risk_probes-llama.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row["nominal"] == "50" and 0 < float(row["bound"]) < 10
    assert 0 <= float(row["covered, splits"]) <= 100
    assert "probes per problem" in path.read_text()


def test_lookup_of_a_few_prompts(document, monkeypatch, capsys):
    monkeypatch.setattr(lookup, "MODELS", {"llama": lookup.MODELS["llama"]})
    path = document("lookup")
    run(monkeypatch, lookup, "--problems", 2, "--document", path)
    assert capsys.readouterr().out.count("\n") == 2 + 2 * 3 + 1
    assert "| llama | small talk | 100 |" in path.read_text()


def test_cost_of_protecting_and_measuring(capsys):
    risk_cost.main(["--quick"])
    out = capsys.readouterr().out
    for name in ("nothing", "protect", "fair=0.5", "risk=True", "risk=0", "Probes()"):
        assert f"\n{name} " in out
