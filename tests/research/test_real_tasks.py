"""The tables of tasks on pretrained weights, from answers that are made up."""

from __future__ import annotations

import pytest

from examples.real_model.demo import PROFILED
from examples.research.real_tasks import (
    ALONE,
    EIGHT,
    FOR_48,
    MAIN,
    NARROW,
    WHOLE,
    changed,
    long_tasks,
    rows,
)
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation import CacheSpec, Record
from tests.support.records import record


def answers(cache: str, budget: int | None, right: str) -> list[Record]:
    """Four answers of one cache, by whether each is right."""
    return [
        record(
            task="recall" if number < 2 else "table",
            question=f"{number}",
            cache=cache,
            budget=budget,
            correct=mark == "x",
            mean_bytes=2048.0,
        )
        for number, mark in enumerate(right)
    ]


def test_scorers_are_compared_with_the_first_at_the_same_budget() -> None:
    found = rows(
        answers("random", 32, "x...")
        + answers(MAIN, 32, "....")
        + answers("full", None, "xxxx")
        + answers(MAIN, 64, "xx..")
        + answers("random", 64, "..xx"),
        "scorers",
    )
    assert [(row["budget"], row["cache"]) for row in found] == [
        ("full", "full"),
        ("64 (4x)", MAIN),
        ("64 (4x)", "random"),
        ("32 (8x)", "random"),
        ("32 (8x)", MAIN),
    ]
    assert [row["gained"] for row in found] == ["", "", "2", "1", ""]
    assert [row["lost"] for row in found] == ["", "", "2", "0", ""]
    assert found[2]["recall"].startswith("0.0 (") and found[2]["table"].startswith("100.0 (")
    assert found[2]["points"].startswith("+0.0 (-") and found[2]["p"] == "1"
    assert found[3]["points"].startswith("+25.0 (+0.0, ")
    assert found[1]["KiB"] == "2"


def test_eight_bits_are_compared_with_sixteen_and_alone_with_the_full_cache() -> None:
    spec = changed(
        CacheSpec(PROFILED, ReasonAllocCache, {"window": 8}, "rkv"), EIGHT, {"storage": "fp8"}
    )
    assert spec.settings == {"window": 8, "storage": "fp8"} and spec.scorer == "rkv"
    found = rows(
        answers("full", None, "xxxx")
        + answers(ALONE, WHOLE, "xx.x")
        + answers(PROFILED, 64, "...x")
        + answers(spec.name, 64, "x..."),
        "fp8",
    )
    assert [row["budget"] for row in found] == ["full", "full", "64", "64"]
    assert [(row["gained"], row["lost"]) for row in found] == [
        ("", ""),
        ("0", "1"),
        ("", ""),
        ("1", "1"),
    ]
    assert found[1]["KiB"] == "", "room for all questions was made at once"


def test_both_bounds_are_compared_with_the_profile_of_the_package() -> None:
    names = (PROFILED, PROFILED + FOR_48, PROFILED + NARROW)
    marks = ("..xx", "xxxx", "x.xx")
    found = rows(
        answers("full", None, "xxxx")
        + [
            each
            for name, right in zip(names, marks, strict=True)
            for each in answers(name, 48, right)
        ],
        "profile",
    )
    assert [row["cache"] for row in found] == ["full", *names]
    assert [row["gained"] for row in found] == ["", "", "2", "1"]


@pytest.mark.parametrize("task", long_tasks(1), ids=lambda task: task.name)
def test_the_longer_questions_hold_their_answers(task) -> None:
    question = task.questions(1)[0]
    text = str(question.prompt)
    expected = question.id.partition(": ")[2]
    assert expected in text and len(text.split()) > 50
    assert task.check(question, expected).correct
