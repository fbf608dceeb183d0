"""Counting on the device changes nothing: pools with their lengths there, query logs as rings."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_reasoncache.storage.pool import RaggedPool
from hf_reasoncache.storage.query_window import QueryWindow

ACTIONS = st.lists(
    st.sampled_from(["append", "pad", "compact", "relayout", "rows", "drop", "snapshot"]),
    min_size=1,
    max_size=8,
)
LIKE = {"keys": torch.zeros(1, 3), "values": torch.zeros(1, 3)}


def act(pool, action, generator):
    """One change of a pool `[B, 2]`, the same for the same generator."""
    batch, heads = pool.length.shape

    def draw(low, high, *size):
        return torch.randint(low, high, size, generator=generator)

    new = {name: torch.randn(batch, heads, 2, 3, generator=generator) for name in LIKE}
    if action in ("append", "pad"):
        pool.relayout(pool.capacity + 2)
        keep = None if action == "append" else draw(0, 2, batch, heads, 2).bool()
        pool.append(new, torch.arange(2), keep)
    elif action == "compact":
        slots, offset = pool.slots(torch.arange(batch))
        keep = draw(0, 2, *offset.shape).bool() & (offset >= 0)
        pool.compact(torch.arange(batch), slots, offset, keep)
    elif action == "relayout":
        pool.relayout(pool.length + draw(0, 3, batch, heads))
    elif action == "rows":
        pool.select_rows(draw(0, batch, int(draw(1, 4, 1))))
    elif action == "drop":
        pool.drop_newest(1)
    else:
        pool = pool.snapshot(deep=True)
    return pool


@given(actions=ACTIONS, ragged=st.booleans(), seed=st.integers(0, 99))
def test_a_pool_with_lengths_on_the_device_is_the_same_pool(actions, ragged, seed):
    capacity = torch.tensor([[2, 5 if ragged else 2]] * 2)
    pools = [RaggedPool(capacity, LIKE) for _ in range(2)]
    before = pools[1].device_length
    for action in actions:
        generator = torch.Generator().manual_seed(seed)
        pools = [act(pool, action, copy.deepcopy(generator)) for pool in pools]
        here, there = pools
        assert torch.equal(here.length, there.length)
        assert torch.equal(there.device_length, there.length)
        for name in here.fields:
            assert torch.equal(here.fields[name], there.fields[name])
    if not {"rows", "snapshot"} & set(actions):
        assert there.device_length is before, "a graph reads it where it is"


@pytest.mark.parametrize("size", [1, 3, 8])
@given(steps=st.lists(st.integers(1, 4), min_size=1, max_size=10), ring_at=st.integers(0, 9))
def test_a_ring_answers_like_a_list(size, steps, ring_at):
    plain, ring = QueryWindow(size), QueryWindow(size)
    seen = 0
    for index, count in enumerate(steps):
        if index >= ring_at:
            ring.make_ring(seen)
        query = torch.arange(seen, seen + count).float().view(1, 1, count, 1).expand(2, 3, -1, 4)
        query = query + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
        plain.append(query)
        if count == 1 and ring.ring is not None:
            # As whoever stores the token's keys does.
            ring.ring[:, :, seen % size] = query[:, :, 0]
            ring.count_appended()
        else:
            ring.append(query)
        seen += count
        assert torch.equal(plain.last(), ring.last())
        assert torch.equal(ring.clone().last(), plain.last())
        for rows in (torch.tensor([1]), torch.tensor([1, 0])):
            assert torch.equal(plain.last(rows), plain.last()[rows])
            assert torch.equal(ring.last(rows), plain.last()[rows])
    rows = torch.tensor([1, 0, 0])
    for log in (plain, ring):
        log.select_rows(rows)
        log.crop(1)
    # How far back a log reaches after a crop depends on how its columns came in.
    known = [0 if log.last() is None else log.last().shape[2] for log in (plain, ring)]
    if held := min(known):
        assert torch.equal(plain.last()[:, :, -held:], ring.last()[:, :, -held:])
    assert min(known) >= min(size, seen) - 1 - max(steps)


def test_a_ring_of_nothing_stays_nothing():
    log = QueryWindow(0)
    log.make_ring(3)
    log.append(torch.ones(1, 1, 1, 2))
    log.count_appended()
    assert log.ring is None and log.last() is None and list(log.tensors()) == []


class Made(TorchDispatchMode):
    """Notes the largest tensor that is made on the host, and what is copied from there."""

    def __init__(self):
        super().__init__()
        self.on_host, self.copied = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_cpu:
            self.on_host = max(self.on_host, result.numel())
        if func is torch.ops.aten._to_copy.default and args[0].is_cpu and not result.is_cpu:
            self.copied.append(args[0].numel())
        return result


def test_what_has_a_number_per_token_is_made_on_the_device():
    """A meta tensor stands for one on another device: nothing of it can be read."""
    nowhere = {"keys": torch.zeros(1, 3, device="meta")}
    pool = RaggedPool(torch.full((4, 2), 100), nowhere)
    pool.length = torch.full((4, 2), 90)
    with Made() as made:
        slots, offset = pool.slots(torch.arange(3))
    assert slots.is_meta and offset.is_meta and slots.shape == offset.shape == (3, 2, 90)
    assert made.on_host < 90 and made.copied == [2 * 3 * 2]
