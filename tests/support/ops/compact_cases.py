"""Requests to compact a ragged pool, and what must hold after any of them."""

import torch
from hypothesis import strategies as st

from triton_ops.compact import compact
from triton_ops.layout import RaggedLayout


@st.composite
def requests(draw):
    """Some rows of a pool, their tokens in any order with filler anywhere, and what to keep."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    capacity = torch.tensor([[draw(st.integers(0, 9)) for _ in range(heads)] for _ in range(batch)])
    length = torch.tensor(
        [[draw(st.integers(0, slots)) for slots in row] for row in capacity.tolist()]
    )
    rows = sorted(draw(st.sets(st.integers(0, batch - 1), min_size=1)))
    layout, width = RaggedLayout(capacity), int(length[rows].max()) + draw(st.integers(0, 2))
    offset = torch.full((len(rows), heads, width), -1)
    keep = torch.zeros(offset.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        for head in range(heads):
            used = int(length[row, head])
            order = draw(st.permutations([*range(used)] + [-1] * (width - used)))
            offset[index, head] = torch.tensor(order, dtype=torch.long)
            bits = draw(st.lists(st.booleans(), min_size=width, max_size=width))
            keep[index, head] = torch.tensor(bits, dtype=torch.bool) & (offset[index, head] >= 0)
    start = layout.start[rows][..., None]
    slots = (start + offset.clamp_min(0)).clamp_max(max(layout.slots - 1, 0))
    return layout, rows, slots, offset, keep


def check(request, device=None):
    """Kept tokens fill the first slots of their head, and nothing else changes."""
    layout, rows, slots, offset, keep = request
    ids = torch.arange(layout.slots)
    fields = [
        ids.clone(),
        torch.stack([ids, -ids], 1).float(),
        ids.view(-1, 1, 1).expand(-1, 2, 2).clone(),
    ]
    fields = [field.to(device) for field in fields]
    compact(fields, slots.to(device), offset.to(device), keep.to(device))
    fields = [field.cpu() for field in fields]
    now = fields[0]
    assert torch.equal(fields[1], torch.stack([now, -now], 1).float()), "fields move together"
    assert torch.equal(fields[2], now.view(-1, 1, 1).expand(-1, 2, 2)), "fields move together"

    may_change = torch.zeros(layout.slots, dtype=torch.bool)
    for index, row in enumerate(rows):
        for head in range(slots.shape[1]):
            kept = set(slots[index, head][keep[index, head]].tolist())
            start = int(layout.start[row, head])
            prefix = range(start, start + len(kept))
            assert {int(now[slot]) for slot in prefix} == kept
            for slot in prefix:
                if slot in kept:
                    assert int(now[slot]) == slot, "a token that lies right stays where it is"
                else:
                    may_change[slot] = True
            held = int((offset[index, head] >= 0).sum())
            assert len([s for s in prefix if s not in kept]) <= held - len(kept), (
                "a head moves at most as many tokens as it evicts"
            )
    assert torch.equal(now[~may_change], ids[~may_change])
