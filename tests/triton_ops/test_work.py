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


@given(
    capacity=st.lists(st.integers(0, 3000), min_size=2, max_size=20),
    shares=st.lists(st.integers(0, 3000), min_size=20, max_size=20),
    tiles=st.sampled_from([1, 2]),
)
def test_a_list_for_all_shares_of_the_slots_keeps_its_tensors(capacity, shares, tiles):
    layout = RaggedLayout(torch.tensor([capacity]), movable=True)
    plan, start = work(layout, tiles, CPU), layout.start_on(CPU)
    items, first = plan.items, plan.first
    # Any other shares of as many slots.
    cuts = sorted(share % (layout.slots + 1) for share in shares[1 : len(capacity)])
    other = torch.tensor([[0, *cuts, layout.slots]]).diff()
    moved = layout.moved(other)
    assert work(moved, tiles, CPU) is plan and plan.items is items and plan.first is first
    assert moved.start_on(CPU) is start and torch.equal(start, moved.start)
    covered = [[] for _ in capacity]
    for head, offset, _ in items.tolist():
        covered[head] += range(offset, min(offset + plan.chunk, int(other[0, head])))
    assert [sorted(each) for each in covered] == [list(range(n)) for n in other[0].tolist()]
    for head, offset, partial in items.tolist():
        assert first[head] <= partial < first[head + 1] and offset % plan.chunk == 0
    assert sorted(items[:, 2].tolist()) == list(range(plan.partials)) and first.diff().min() >= 1
    assert work(layout, tiles, CPU) is not plan, "the old shares have lists of their own"


def test_only_other_shares_of_the_same_slots_are_taken_over():
    fixed, movable = (RaggedLayout(torch.tensor([[3, 4]]), movable) for movable in (False, True))
    for layout, capacity in ((fixed, [[4, 3]]), (movable, [[4, 4]]), (movable, [[3, 3, 1]])):
        with pytest.raises(ValueError, match=r"moved: expected other shares of 7 slots, movable"):
            layout.moved(torch.tensor(capacity))


def test_work_is_spread_over_the_multiprocessors():
    """Tokens of the multiprocessor with the most, over the mean."""
    for rows, heads, capacity, worst in ((16, 8, 1152, 1.04), (1, 8, 32768, 1.04)):
        layout = RaggedLayout(torch.full((rows, heads), capacity))
        chunk = chunk_size(layout, 1)
        programs = rows * heads * -(-capacity // chunk)
        most = -(-programs // MULTIPROCESSORS) * chunk
        assert most <= worst * rows * heads * capacity / MULTIPROCESSORS
