from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.research.fleet.trace import (
    Lengths,
    poisson_requests,
    rate_of,
    read_trace,
    recorded_requests,
    synthetic_trace,
    write_trace,
)

SHIPPED = Path(__file__).parents[3] / "examples/research/fleet/trace.csv"


def test_the_shipped_trace_is_what_its_command_writes(tmp_path: Path) -> None:
    write_trace(tmp_path / "again.csv", synthetic_trace(500, seed=0))
    assert (tmp_path / "again.csv").read_bytes() == SHIPPED.read_bytes()
    trace = read_trace(SHIPPED)
    assert len(trace) == 500
    assert 130 < np.median([each.prompt for each in trace]) < 170
    assert 3500 < np.median([each.answer for each in trace]) < 4500


def test_both_formats(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt_tokens,answer_tokens,arrival\n5,7,0.5\n6,8,1\n")
    (tmp_path / "a.jsonl").write_text(
        '{"prompt_tokens": 5, "answer_tokens": 7, "arrival": 0.5, "more": 1}\n\n'
        '{"prompt_tokens": 6, "answer_tokens": 8, "arrival": 1}\n'
    )
    expected = [Lengths(5, 7, 0.5), Lengths(6, 8, 1.0)]
    assert read_trace(tmp_path / "a.csv") == read_trace(tmp_path / "a.jsonl") == expected
    requests = recorded_requests(expected, branches=2, speed=2.0)
    assert [(r.arrival, r.prompt, r.answers) for r in requests] == [
        (0.25, 5, (7, 7)),
        (0.5, 6, (8, 8)),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "expected a name that ends in .csv or .jsonl"),
        ("a.csv", "prompt_tokens,answer_tokens\n", "expected at least one request"),
        ("a.csv", "prompt_tokens,answer_tokens\n5,x\n", "a.csv:2: answer_tokens: expected a whole"),
        ("a.csv", "prompt_tokens\n5\n", "a.csv:2: answer_tokens: expected a whole number"),
        ("a.jsonl", '{"prompt_tokens": 0, "answer_tokens": 4}', "a.jsonl:1: prompt_tokens"),
        ("a.jsonl", '{"prompt_tokens": 5, "answer_tokens": 4}\n{', "a.jsonl:2: expected a JSON"),
        ("a.jsonl", "[1]", "a.jsonl:1: prompt_tokens: expected a whole number"),
        (
            "a.jsonl",
            '{"prompt_tokens": 5, "answer_tokens": 4, "arrival": -1}',
            "a.jsonl:1: arrival: expected seconds >= 0",
        ),
        (
            "a.csv",
            "prompt_tokens,answer_tokens,arrival\n5,7,1\n5,7,\n",
            "expected an arrival in all lines or in none",
        ),
    ],
)
def test_bad_traces(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / name)


def test_the_rate_of_a_trace() -> None:
    assert rate_of([Lengths(1, 2, 9.0), Lengths(1, 2, 3.0), Lengths(1, 2, 5.0)]) == 2 / 6
    with pytest.raises(ValueError, match="expected a trace with the column arrival"):
        rate_of([Lengths(1, 2)])
    with pytest.raises(ValueError, match="arrival: expected times that differ, got 3 everywhere"):
        rate_of([Lengths(1, 2, 3.0), Lengths(1, 2, 3.0)])


def test_requests_at_a_rate() -> None:
    trace = synthetic_trace(50, seed=1)
    slow, fast = (poisson_requests(trace, rate, 3000, 2, seed=5) for rate in (0.5, 2.0))
    assert [r.answers for r in slow] == [r.answers for r in fast]
    assert [r.arrival for r in slow] == pytest.approx([4 * r.arrival for r in fast])
    gaps = np.diff([r.arrival for r in slow])
    assert np.mean(gaps) == pytest.approx(2.0, rel=0.05) == np.std(gaps).round(0)
    pairs = {(each.prompt, each.answer) for each in trace}
    assert all((r.prompt, r.answers[0]) in pairs for r in slow)
