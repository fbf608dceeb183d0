"""Answers of an evaluation, made up."""

from __future__ import annotations

from dataclasses import replace

from hf_reasoncache.evaluation import Record


def record(**changes: object) -> Record:
    """Return a right answer of the full cache, but for `changes`."""
    made = Record(
        task="sums",
        seed=0,
        cache="full",
        budget=None,
        question="a",
        digest="qa",
        prompt_tokens=9,
        answer="4",
        tokens=1,
        finished=True,
        correct=True,
        evicted=0,
        seconds=0.1,
    )
    return replace(made, **changes)
