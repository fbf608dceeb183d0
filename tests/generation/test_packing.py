"""Batches hold every answer once, within the limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_reasoncache.evaluation.tasks import Question
from hf_reasoncache.generation import Job, Limits, Line, Sampling, pack
from hf_reasoncache.generation.packing import batch_bytes


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    samples=st.integers(1, 5),
    memory=st.integers(60, 400),
    rows=st.integers(1, 6),
    look_ahead=st.sampled_from((1, 3, 60)),
)
def test_batches_hold_every_answer_once_within_the_limits(
    lengths: list[int], samples: int, memory: int, rows: int, look_ahead: int
) -> None:
    lines = [
        Line(Question(str(n), "x"), (0,) * length, 30 - n % 7, Sampling(0.0), 0, {}, f"line {n}")
        for n, length in enumerate(lengths)
    ]

    def row_bytes(prompt: int, new: int, count: int) -> int:
        return prompt + new * count

    limits = Limits(memory, rows, look_ahead)
    batches = pack([(line, range(samples)) for line in lines], row_bytes, limits)
    made = [(job.line.id, sample) for batch in batches for job in batch for sample in job.samples]
    assert sorted(made) == sorted((line.id, n) for line in lines for n in range(samples))
    for batch, after in zip(batches, [*batches[1:], None], strict=True):
        assert batch_bytes(batch, row_bytes) <= memory
        count = sum(len(job.samples) for job in batch)
        assert count <= rows
        if look_ahead >= samples * len(lines) and after is not None:
            # One window, and the next answer would not have fitted.
            more = [*batch, Job(after[0].line, after[0].samples[:1])]
            assert count == rows or batch_bytes(more, row_bytes) > memory
    with pytest.raises(ValueError, match="line 0: expected an answer of 30 tokens to a prompt"):
        pack([(lines[0], [0])], row_bytes, Limits(30, rows, look_ahead))
