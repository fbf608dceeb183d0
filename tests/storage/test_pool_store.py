"""What a store reads and lets go, held against the tokens that went in."""

import pytest
import torch

from hf_reasoncache.shards import ALONE
from hf_reasoncache.storage import pool_store
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool_store import PoolStore

ROWS, HEADS, COLUMNS = 2, 3, 20
FIRST = [0, 4]


def tokens(begin, end):
    """Columns `begin` to `end - 1`; every key says which row, head and column it is of."""
    row, head = torch.arange(ROWS)[:, None, None], torch.arange(HEADS)[None, :, None]
    number = 1000.0 * row + 100 * head + torch.arange(begin, end)
    keys = number[..., None].expand(-1, -1, -1, 4)
    valid = torch.arange(begin, end) >= torch.tensor(FIRST)[:, None]
    settings = {"scaling": 1.0, "softcap": None, "s_aux": None}
    return NewTokens(keys, keys, -keys, None if valid.all() else valid, settings)


@pytest.fixture
def store():
    made = PoolStore()
    made.keep_statistics(cumulative_attention=False, decay=1.0, scorer_state=True)
    made.store_first(tokens(0, 12), 12, ALONE)
    for column in range(12, COLUMNS):
        made.make_room(1)
        made.append(tokens(column, column + 1), column + 1)
    return made


def held(store, row, head):
    return store.held_positions()[row][head]


def test_tokens_are_read_in_order_of_column_wherever_they_lie(store):
    rows = torch.tensor([1, 0])
    found = store.read(rows)
    # Every third token goes: what is left lies where there was room.
    store.evict(found, found.valid & (found.columns % 3 > 0))
    again = store.read(rows)
    for place, row in enumerate(rows.tolist()):
        for head in range(HEADS):
            expected = [at for at in range(FIRST[row], COLUMNS) if at % 3]
            own = again.valid[place, head]
            assert again.columns[place, head][own].tolist() == expected == held(store, row, head)
            numbers = again.field("keys")[place, head, :, 0]
            assert numbers[own].tolist() == [1000.0 * row + 100 * head + at for at in expected]
            assert not numbers[~own].any(), "filler is zero"


def test_a_span_is_read_and_evicted_from_alone(store):
    rows, bounds = torch.tensor([0, 1]), (torch.tensor([5, 9]), torch.tensor([9, 15]))
    span = store.read(rows, bounds)
    assert [row[0][row[0] >= 0].tolist() for row in span.columns] == [
        [5, 6, 7, 8],
        [9, 10, 11, 12, 13, 14],
    ]
    store.write_scorer_state(span, torch.full_like(span.columns, 7, dtype=torch.int32))
    # The first token of each stays.
    keep = span.columns == span.columns[..., :1]
    store.evict(span, keep & span.valid)
    assert held(store, 0, 2) == [0, 1, 2, 3, 4, 5, *range(9, COLUMNS)]
    assert held(store, 1, 0) == [4, 5, 6, 7, 8, 9, *range(15, COLUMNS)]
    found = store.read(rows)
    noted = (found.field("scorer_state") == 7).sum(-1)
    assert (noted == 1).all(), "of noted tokens one is left in each head"
    assert (store.before(rows, torch.tensor([9, 9])) == torch.tensor([[6], [5]])).all()


def test_nothing_can_be_read_from_an_empty_store():
    with pytest.raises(ValueError, match="expected stored tokens, got an empty layer"):
        PoolStore().read(torch.tensor([0]))


def test_a_large_pool_grows_by_a_part_of_itself():
    store, zeros = PoolStore(), torch.zeros(1, 1, 4000, 2)
    store.store_first(NewTokens(zeros, zeros, zeros, None, {}), 4000, ALONE)
    store.make_room(257)
    assert store.capacity.item() == 4256 + 4256 // pool_store.GROWTH
    assert store.capacity.item() == store.slots_without_budget(4000, 257)
