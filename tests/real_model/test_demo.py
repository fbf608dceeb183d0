"""The demo's tables, on a tiny random model instead of the pretrained one."""

import pytest
import torch

from examples.real_model import demo, perplexity
from hf_reasoncache.evaluation import Record
from tests.support.models import SHAPE, build
from tests.support.tokenizers import make_tokenizer


def records(cache, budget, correct):
    return [
        Record(
            task="copy", seed=0, cache=cache, budget=budget, question=str(n), digest="",
            prompt_tokens=9, answer="", tokens=1, finished=True, correct=mark, evicted=1,
            seconds=0.0,
        )
        for n, mark in enumerate(correct)
    ]  # fmt: skip


def test_tables_count_and_pair():
    both = [
        *records("full", None, [True, True, True, False]),
        *records(demo.UNIFORM, 9, [False, False, False, False]),
        *records(demo.PROFILED, 9, [True, True, False, True]),
        *records(demo.CHANCE, 9, [False, True, False, False]),
    ]
    cells = [("full", None), *((name, 9) for name in (demo.UNIFORM, demo.PROFILED, demo.CHANCE))]
    read = {
        cell: demo.Reading(torch.full((2, 128), float(n)), 2048.0) for n, cell in enumerate(cells)
    }
    rows = demo.table(both, read)
    assert [row["copy"] for row in rows] == ["75", "0", "75", "25"]
    assert rows[0]["perplexity"] == "1.00" and rows[2]["perplexity"] == "7.39"
    assert {row["KiB"] for row in rows} == {"2"}
    against = {row[demo.PROFILED]: row for row in demo.pairs(both, read, [9])}
    assert [(row["gained"], row["lost"]) for row in against.values()] == [
        ("1", "1"),
        ("3", "0"),
        ("2", "0"),
    ]
    assert against[f"9 against {demo.UNIFORM}"]["p (McNemar)"] == "0.25"
    assert against[f"9 against {demo.CHANCE}"]["loss, nats (95%)"].startswith("-1.000")


def test_the_demo_runs_and_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    tokenizer = make_tokenizer()
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    monkeypatch.setitem(SHAPE, "vocab_size", shape["vocab_size"])
    monkeypatch.setitem(SHAPE, "max_position_embeddings", shape["max_position_embeddings"])
    model = build("llama")
    monkeypatch.setattr(demo, "load", lambda dtype, folder: (model, tokenizer))
    monkeypatch.setattr(demo, "TOKENS", 160)
    monkeypatch.setattr(demo, "PROFILED_SETTINGS", demo.COMMON | {"profile": [1.0, 2.0, 1.0]})
    page = tmp_path / "page.md"
    page.write_text("<!-- demo-real -->\n<!-- end demo-real -->\n")
    arguments = ["--questions", "2", "--budgets", "32", "--output", str(tmp_path), "--threads", "1"]
    demo.main([*arguments, "--document", str(page)])
    first = capsys.readouterr().out
    assert max(map(len, first.split("\n\n")[0].splitlines())) <= 80
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "| random, profile | 32 |" in page.read_text()
    answers = (tmp_path / "answers.jsonl").read_text()
    demo.main(arguments)
    assert (tmp_path / "answers.jsonl").read_text() == answers
    assert capsys.readouterr().out.split("\n\n")[0] == first.split("\n\n")[0]


def test_texts_that_are_too_short_are_named():
    with pytest.raises(SystemExit, match="expected pages of"):
        perplexity.texts(make_tokenizer(), 10**6)
