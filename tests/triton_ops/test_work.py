"""How a ragged pool is split into programs: enough of them, alike, and the longest first."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_ops.decode_attention.work import PROGRAMS, chunk_size, work
from triton_ops.layout import RaggedLayout

CPU = torch.device("cpu")
MULTIPROCESSORS = 132


@pytest.mark.parametrize(
    ("rows", "heads", "capacity", "chunk", "programs"),
    [
        (16, 8, 1152, 384, 384),  # not 512, 512 and 128
        (1, 4, 1152, 32, 144),
        (1, 8, 1152, 32, 288),
        (1, 8, 32768, 512, 512),
        (1, 8, 131072, 960, 1096),
        (64, 8, 1152, 384, 1536),
        (1, 1, 0, 32, 1),
    ],
)
def test_the_sizes_of_real_pools(rows, heads, capacity, chunk, programs):
    layout = RaggedLayout(torch.full((rows, heads), capacity))
    plan = work(layout, 1, CPU)
    assert (plan.chunk, plan.count) == (chunk, programs)


@given(
    capacity=st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    tiles=st.sampled_from([1, 2, 16]),
)
def test_every_slot_is_in_one_chunk_and_the_longest_come_first(capacity, tiles):
    layout = RaggedLayout(torch.tensor([capacity]))
    plan = work(layout, tiles, CPU)
    assert plan.chunk == 32 or plan.chunk % 64 == 0
    covered = [[] for _ in capacity]
    sizes = []
    for head, offset, _ in plan.items.tolist():
        end = min(offset + plan.chunk, capacity[head])
        covered[head] += range(offset, end)
        sizes.append(end - offset)
    assert [sorted(slots) for slots in covered] == [list(range(size)) for size in capacity]
    assert sizes == sorted(sizes, reverse=True)
    assert sorted(plan.items[:, 2].tolist()) == list(range(plan.partials))
    assert plan.count * tiles >= PROGRAMS or plan.chunk <= 64


def test_work_is_spread_over_the_multiprocessors():
    """Tokens of the multiprocessor with the most, over the mean."""
    for rows, heads, capacity, worst in ((16, 8, 1152, 1.04), (1, 8, 32768, 1.04)):
        layout = RaggedLayout(torch.full((rows, heads), capacity))
        chunk = chunk_size(layout, 1)
        programs = rows * heads * -(-capacity // chunk)
        most = -(-programs // MULTIPROCESSORS) * chunk
        assert most <= worst * rows * heads * capacity / MULTIPROCESSORS
