"""RaggedPool against a model of it: every (row, head) is a list of tokens, and nothing else."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_reasoncache.storage.pool import RaggedPool

KEY_SIZE, VALUE_SIZE = 2, 3


def token_keys(ids):
    return torch.stack([ids, -ids], dim=-1).float()


def token_values(ids):
    return torch.stack([ids, 2 * ids, ids + 0.5], dim=-1).float()


def token_fields(ids):
    return {"keys": token_keys(ids), "values": token_values(ids)}


def contents(pool):
    """Per row and head: [(id, column, mass)] in slot order, read from the fields themselves."""
    result = []
    for row in range(pool.length.shape[0]):
        heads = []
        for head in range(pool.length.shape[1]):
            start, used = int(pool.layout.start[row, head]), int(pool.length[row, head])
            own = slice(start, start + used)
            ids = pool.fields["keys"][own, 0]
            assert torch.equal(pool.fields["keys"][own], token_keys(ids))
            assert torch.equal(pool.fields["values"][own], token_values(ids))
            columns, mass = pool.fields["positions"][own], pool.fields["mass"][own]
            heads.append(list(zip(ids.tolist(), columns.tolist(), mass.tolist(), strict=True)))
        result.append(heads)
    return result


def sorted_heads(rows):
    return [[sorted(head) for head in row] for row in rows]


class PoolMachine(RuleBasedStateMachine):
    """Any legal sequence of operations; after each one, pool and model hold the same tokens."""

    @initialize(batch=st.integers(1, 3), heads=st.integers(1, 3), data=st.data())
    def allocate(self, batch, heads, data):
        capacity = self.draw_counts(data, batch * heads, high=4).view(batch, heads)
        self.pool = RaggedPool(
            capacity,
            token_fields(torch.ones(1)),
            {"mass": torch.float32},
            movable=data.draw(st.booleans()),
        )
        self.model = [[[] for _ in range(heads)] for _ in range(batch)]
        self.next_id, self.column, self.tail = 1, 0, 0
        self.deep = self.shallow = None
        self.append_to_all(data.draw(st.integers(0, 5)), data.draw(st.booleans()), data)

    # ------------------------------------------------------------------------------------ helpers

    @property
    def batch(self):
        return len(self.model)

    @property
    def heads(self):
        return len(self.model[0])

    @staticmethod
    def draw_counts(data, count, high=3):
        return torch.tensor(
            data.draw(st.lists(st.integers(0, high), min_size=count, max_size=count))
        )

    @staticmethod
    def maybe_number(columns, data):
        """A single column may be given as a number."""
        return int(columns) if len(columns) == 1 and data.draw(st.booleans()) else columns

    def new_tokens(self, steps):
        count = self.batch * self.heads * steps
        ids = torch.arange(self.next_id, self.next_id + count)
        self.next_id += count
        columns = torch.arange(self.column, self.column + steps)
        self.column += steps
        return ids.view(self.batch, self.heads, steps), columns

    def make_room(self, added, data):
        extra = self.draw_counts(data, self.batch * self.heads, high=2)
        needed = self.pool.length + added + extra.view(self.batch, self.heads)
        self.pool.relayout(torch.maximum(self.pool.capacity, needed))

    def state(self):
        model = [[list(head) for head in row] for row in self.model]
        return model, self.tail

    # -------------------------------------------------------------------------------------- rules

    @rule(steps=st.integers(1, 4), given_mass=st.booleans(), data=st.data())
    def append_to_all(self, steps, given_mass, data):
        if bool((self.pool.length + steps > self.pool.capacity).any()):
            self.make_room(steps, data)
        ids, columns = self.new_tokens(steps)
        statistics = {"mass": ids.float() / 4} if given_mass else {}
        given = self.maybe_number(columns, data)
        self.pool.append(token_fields(ids), given, **statistics)
        for row in range(self.batch):
            for head in range(self.heads):
                for step in range(steps):
                    token = float(ids[row, head, step])
                    mass = token / 4 if given_mass else 0.0
                    self.model[row][head].append((token, int(columns[step]), mass))
        self.tail += steps

    @rule(steps=st.integers(1, 4), given_mass=st.booleans(), data=st.data())
    def append_some(self, steps, given_mass, data):
        count = self.batch * self.heads * steps
        chosen = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
        keep = torch.tensor(chosen).view(self.batch, self.heads, steps)
        if bool((self.pool.length + keep.sum(-1) > self.pool.capacity).any()):
            self.make_room(keep.sum(-1), data)
        ids, columns = self.new_tokens(steps)
        statistics = {"mass": ids.float() / 4} if given_mass else {}
        given = self.maybe_number(columns, data)
        self.pool.append(token_fields(ids), given, keep, **statistics)
        for row, head, step in keep.nonzero().tolist():
            token = float(ids[row, head, step])
            mass = token / 4 if given_mass else 0.0
            self.model[row][head].append((token, int(columns[step]), mass))
        self.tail = 0

    @rule(excess=st.integers(1, 3), masked=st.booleans())
    def append_beyond_capacity_is_refused(self, excess, masked):
        free = int((self.pool.capacity - self.pool.length).min())
        steps, before = free + excess, contents(self.pool)
        ids = torch.ones(self.batch, self.heads, steps)
        keep = torch.ones(self.batch, self.heads, steps, dtype=torch.bool) if masked else None
        with pytest.raises(
            ValueError, match=rf"room for {steps} tokens.*got {free} free.*relayout"
        ):
            self.pool.append(token_fields(ids), torch.arange(steps), keep)
        assert contents(self.pool) == before

    @rule(data=st.data())
    def compact(self, data):
        rows = data.draw(st.permutations(range(self.batch)))
        rows = sorted(rows[: data.draw(st.integers(1, self.batch))])
        slots, offset = self.pool.slots(torch.tensor(rows))
        bits = data.draw(st.lists(st.booleans(), min_size=offset.numel(), max_size=offset.numel()))
        keep = torch.tensor(bits, dtype=torch.bool).view_as(offset) & (offset >= 0)
        if offset.shape[-1]:
            # Callers sort the tokens by position; the order must not matter.
            order = torch.tensor(data.draw(st.permutations(range(offset.shape[-1]))))
            slots, offset, keep = slots[..., order], offset[..., order], keep[..., order]
        kept_ids = self.pool.fields["keys"][:, 0]
        for index, row in enumerate(rows):
            for head in range(self.heads):
                kept = set(kept_ids[slots[index, head][keep[index, head]]].tolist())
                self.model[row][head] = [t for t in self.model[row][head] if t[0] in kept]
        self.pool.compact(torch.tensor(rows), slots, offset, keep)
        self.tail, self.shallow = 0, None

    @precondition(lambda self: self.tail > 0)
    @rule(data=st.data())
    def drop_newest(self, data):
        count = data.draw(st.integers(1, self.tail))
        self.pool.drop_newest(count)
        self.model = [[head[:-count] for head in row] for row in self.model]
        self.tail -= count
        self.shallow = None

    @rule(data=st.data())
    def relayout(self, data):
        extra = self.draw_counts(data, self.batch * self.heads)
        self.pool.relayout(self.pool.length + extra.view(self.batch, self.heads))

    @precondition(lambda self: self.pool.layout.movable)
    @rule(data=st.data())
    def share_the_slots_out_otherwise(self, data):
        """In place: what a graph reads and writes stays where it is."""
        free = self.pool.layout.slots - int(self.pool.length.sum())
        cuts = sorted(data.draw(st.integers(0, free)) for _ in range(self.pool.length.numel() - 1))
        extra = torch.tensor([0, *cuts, free]).diff().view_as(self.pool.length)
        start = self.pool.layout.start_on(torch.device("cpu"))
        before = [start, self.pool.device_length, *self.pool.fields.values()]
        self.pool.relayout(self.pool.length + extra)
        assert torch.equal(self.pool.capacity, self.pool.length + extra)
        assert torch.equal(start, self.pool.layout.start)
        now = [self.pool.layout.start_on(start.device), self.pool.device_length]
        assert all(a is b for a, b in zip(before, [*now, *self.pool.fields.values()], strict=True))
        self.shallow = None

    @rule(data=st.data())
    def relayout_to_one_capacity(self, data):
        room = int(self.pool.length.max()) + data.draw(st.integers(0, 3))
        self.pool.relayout(torch.full_like(self.pool.capacity, room))

    @rule(data=st.data())
    def select_rows(self, data):
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4))
        self.pool.select_rows(torch.tensor(rows))
        self.model = [[list(head) for head in self.model[row]] for row in rows]

    @rule(data=st.data())
    def relayout_other_rows(self, data):
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4))
        extra = self.draw_counts(data, len(rows) * self.heads).view(len(rows), self.heads)
        self.pool.relayout(self.pool.length[rows] + extra, torch.tensor(rows))
        self.model = [[list(head) for head in self.model[row]] for row in rows]

    @rule()
    def add_mass(self):
        """As attention does: in place, to used slots."""
        for row in range(self.batch):
            for head in range(self.heads):
                start, used = int(self.pool.layout.start[row, head]), len(self.model[row][head])
                self.pool.fields["mass"][start : start + used] += 0.25
        self.model = [
            [[(token, at, mass + 0.25) for token, at, mass in head] for head in row]
            for row in self.model
        ]

    @rule()
    def snapshot_deep(self):
        self.deep = (self.pool.snapshot(deep=True), self.state())

    @rule()
    def snapshot_shallow(self):
        self.shallow = (self.pool.snapshot(deep=False), self.state())

    @precondition(lambda self: self.deep is not None)
    @rule()
    def restore_deep(self):
        self.pool, (self.model, self.tail) = self.deep
        self.deep = self.shallow = None

    @precondition(lambda self: self.shallow is not None)
    @rule()
    def restore_shallow(self):
        self.pool, (self.model, self.tail) = self.shallow
        self.shallow = None

    # --------------------------------------------------------------------------------- invariants

    @invariant()
    def holds_the_same_tokens(self):
        found = contents(self.pool)
        assert sorted_heads(found) == sorted_heads(self.model)
        positions = [[sorted(at for _, at, _ in head) for head in row] for row in self.model]
        assert self.pool.held().lists() == positions

    @invariant()
    def newest_tokens_are_in_the_last_slots(self):
        if self.tail:
            for row, expected in zip(contents(self.pool), self.model, strict=True):
                for found, head in zip(row, expected, strict=True):
                    assert found[-self.tail :] == head[-self.tail :]

    @invariant()
    def snapshots_stay_as_they_were(self):
        for snapshot in (self.deep, self.shallow):
            if snapshot is not None:
                pool, (model, _) = snapshot
                assert sorted_heads(contents(pool)) == sorted_heads(model)

    @invariant()
    def every_slot_is_finite(self):
        for field in self.pool.fields.values():
            assert bool(field.isfinite().all())

    @invariant()
    def heads_own_disjoint_stretches_that_fill_the_storage(self):
        pool = self.pool
        assert bool((pool.length <= pool.capacity).all()) and bool((pool.length >= 0).all())
        ends = 0
        stretches = zip(
            pool.layout.start.flatten().tolist(), pool.capacity.flatten().tolist(), strict=True
        )
        for start, size in sorted(stretches):
            assert start == ends
            ends += size
        assert {field.shape[0] for field in pool.fields.values()} == {ends}
        itemsizes = 4 * KEY_SIZE + 4 * VALUE_SIZE + 4 + 4
        owned = sum(field.untyped_storage().nbytes() for field in pool.fields.values())
        assert owned == ends * itemsizes

    @invariant()
    def buckets_show_every_head_once(self):
        layout, keys = self.pool.layout, self.pool.fields["keys"]
        shown = {}
        for bucket in layout.buckets:
            view = bucket.view(keys)
            assert view.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
            for index in range(bucket.count):
                shown[int(layout.order[bucket.first + index])] = view[index, :, 0]
        assert sorted(shown) == list(range(self.batch * self.heads))
        for flat, (row, head) in enumerate(
            (row, head) for row in range(self.batch) for head in range(self.heads)
        ):
            used = len(self.model[row][head])
            ids = sorted(token for token, _, _ in self.model[row][head])
            assert sorted(shown[flat][:used].tolist()) == ids
            assert shown[flat].shape[0] == int(self.pool.capacity[row, head])


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPoolAgainstLists = PoolMachine.TestCase


def small_pool(capacity):
    """Heads `[[1, 2, 3], [4, 5, 6]], [[7, ...` with mass 1."""
    pool = RaggedPool(capacity, token_fields(torch.ones(1)), {"mass": torch.float32})
    ids = torch.arange(1, 13).view(2, 2, 3)
    pool.append(token_fields(ids), torch.arange(3), mass=torch.ones(2, 2, 3))
    return pool


UNIFORM_AND_RAGGED = pytest.mark.parametrize(
    "capacity",
    [torch.full((2, 2), 4), torch.tensor([[4, 3], [5, 4]])],
    ids=["uniform", "ragged"],
)


@UNIFORM_AND_RAGGED
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_of_a_token_in_a_used_slot_start_at_zero(capacity, masked):
    pool = small_pool(capacity)
    rows = torch.arange(2)
    slots, offset = pool.slots(rows)
    pool.compact(rows, slots, offset, offset < 2)
    ids = torch.arange(20, 24).view(2, 2, 1)
    keep = torch.ones(2, 2, 1, dtype=torch.bool) if masked else None
    pool.append(token_fields(ids), torch.tensor([3]), keep)
    assert all([t[2] for t in head] == [1.0, 1.0, 0.0] for row in contents(pool) for head in row)


@UNIFORM_AND_RAGGED
@pytest.mark.parametrize("deep", [False, True])
def test_snapshot_survives_appends_and_mass(capacity, deep):
    pool = small_pool(capacity)
    pool.drop_newest(1)
    before, snapshot = contents(pool), pool.snapshot(deep=deep)
    ids = torch.arange(20, 24).view(2, 2, 1)
    pool.append(token_fields(ids), torch.tensor([3]))
    pool.fields["mass"] += 1
    assert contents(snapshot) == before


@UNIFORM_AND_RAGGED
def test_deep_snapshot_survives_compaction(capacity):
    pool = small_pool(capacity)
    before, snapshot = contents(pool), pool.snapshot(deep=True)
    slots, offset = pool.slots(torch.arange(2))
    pool.compact(torch.arange(2), slots, offset, offset == 2)
    assert contents(snapshot) == before != contents(pool)


@UNIFORM_AND_RAGGED
def test_select_rows_gives_independent_copies(capacity):
    pool = small_pool(capacity)
    pool.select_rows(torch.tensor([1, 1]))
    slots, offset = pool.slots(torch.tensor([0]))
    pool.compact(torch.tensor([0]), slots, offset, offset == 2)
    assert [[len(head) for head in row] for row in contents(pool)] == [[1, 1], [3, 3]]
    assert [t[0] for t in contents(pool)[1][0]] == [7, 8, 9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pool_keeps_dtype_and_mass_is_float32(dtype):
    pool = RaggedPool(
        torch.tensor([[2, 3]]),
        {"keys": torch.zeros(1, 2, dtype=dtype), "values": torch.zeros(1, 3, dtype=dtype)},
        {"mass": torch.float32},
    )
    pool.relayout(torch.tensor([[3, 4]]))
    pool.select_rows(torch.tensor([0, 0]))
    assert {name: field.dtype for name, field in pool.snapshot(deep=True).fields.items()} == {
        "keys": dtype,
        "values": dtype,
        "positions": torch.int32,
        "mass": torch.float32,
    }
