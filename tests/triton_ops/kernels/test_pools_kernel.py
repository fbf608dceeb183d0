"""Several pools read and compacted as one, against what each of their heads holds."""

import pytest
import torch

from triton_ops.layout import RaggedLayout
from triton_ops.pools import HeadsOfPools, Pools

HEADS = 2


def make(count, dtype, device, seed=0):
    """Pools of different sizes whose heads hold different numbers of tokens in any order."""
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for number in range(count):
        layout = RaggedLayout(torch.randint(5, 12, (3, HEADS), generator=generator))
        length = torch.randint(0, 6, (3, HEADS), generator=generator)
        length[0] = 5 - number
        positions = torch.full((layout.slots,), -1, dtype=torch.int32)
        for start, used in zip(
            layout.start.flatten().tolist(), length.flatten().tolist(), strict=True
        ):
            order = torch.randperm(40, generator=generator)[:used] + 3
            positions[start : start + used] = order.int()
        fields = {
            "keys": torch.randn(layout.slots, 20, generator=generator).to(dtype),
            "values": torch.randn(layout.slots, 5, generator=generator).to(dtype),
            "positions": positions,
            "state": torch.randint(1, 9, (layout.slots,), generator=generator, dtype=torch.int32),
        }
        # Statistics are zero in slots that are not used.
        fields["state"].masked_fill_(positions < 0, 0)
        pools.append((layout, length, {name: x.to(device) for name, x in fields.items()}))
    return pools


def choose(pools, rows, device):
    """The table of some rows of all pools, pool by pool."""
    places = torch.tensor(rows)[:, None] * HEADS + torch.arange(HEADS)
    parts = [
        torch.stack([torch.full_like(places, number), places, layout.start[rows], length[rows]])
        for number, (layout, length, _) in enumerate(pools)
    ]
    return torch.cat(parts, 1).to(device)


def contents(pool):
    """What each head holds, in order of position: (position, key, value, state)."""
    layout, length, fields = pool
    found = []
    for row in range(3):
        for head in range(HEADS):
            slots = layout.head(row, head, length)
            names = ("positions", "keys", "values", "state")
            columns = [fields[name][slots].cpu().tolist() for name in names]
            found.append(sorted(zip(*columns, strict=True)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [0, 2]], ids=str)
def test_what_is_kept_stays_and_nothing_else_changes(rows, dtype, device):
    pools = make(3, dtype, device)
    lengths = [length.to(device, copy=True) for _, length, _ in pools]
    before = [contents(pool) for pool in pools]
    table, first = choose(pools, rows, device), torch.tensor([3] * len(rows) * 3, device=device)
    known = Pools.of([fields for *_, fields in pools], lengths, ["state"])
    held = HeadsOfPools.read(known, table, first, int(table[3].max()))

    # Read: in order of position, filler last and zero.
    count = table[3].cpu()
    filler = torch.arange(held.positions.shape[-1]) >= count[..., None]
    assert torch.equal(held.valid.cpu(), ~filler)
    assert (held.positions.cpu()[filler] == -1).all() and (held.offset.cpu()[filler] == -1).all()
    expected = [
        before[n][row * HEADS + head] for n in range(3) for row in rows for head in range(2)
    ]
    keys, values, state = (held.field(name).flatten(0, 1) for name in ("keys", "values", "state"))
    for number, tokens in enumerate(expected):
        read = zip(
            (held.positions.flatten(0, 1)[number] + 3).tolist(),
            *(field[number].tolist() for field in (keys, values, state)),
            strict=True,
        )
        assert list(read)[: len(tokens)] == tokens
    assert (
        not keys.cpu()[filler.flatten(0, 1)].any() and not state.cpu()[filler.flatten(0, 1)].any()
    )

    # Write and compact.
    noted = torch.randint(1, 9, held.offset.shape, dtype=torch.int32).to(device)
    held.write("state", noted)
    keep = (torch.rand(held.offset.shape) < 0.5).to(device) & held.valid
    held.compact(keep, keep.sum(-1))
    flat_keep, flat_noted = keep.flatten(0, 1).tolist(), noted.flatten(0, 1).tolist()
    for number, (layout, _, fields) in enumerate(pools):
        stays = list(before[number])
        for index, row in enumerate(rows):
            for head in range(HEADS):
                which = (number * len(rows) + index) * HEADS + head
                own = before[number][row * HEADS + head]
                stays[row * HEADS + head] = [
                    (*token[:3], flat_noted[which][place])
                    for place, token in enumerate(own)
                    if flat_keep[which][place]
                ]
        now = lengths[number].cpu()
        assert now.flatten().tolist() == [len(tokens) for tokens in stays]
        assert contents((layout, now, fields)) == stays
        used = torch.zeros(layout.slots, dtype=torch.bool)
        for row in range(3):
            for head in range(HEADS):
                used[layout.head(row, head, now)] = True
        assert not fields["state"].cpu()[~used].any()


def test_pools_that_moved_are_others_and_are_not_kept_alive(device):
    pools = make(2, torch.float32, device)
    fields, lengths = [pool[2] for pool in pools], [pool[1].to(device, copy=True) for pool in pools]
    known = Pools.of(fields, lengths, [])
    assert known.are(fields, lengths)
    assert not known.are(fields[:1], lengths[:1])
    assert not known.are(fields, [lengths[0], lengths[1].clone()])
    fields[0]["keys"] = fields[0]["keys"].clone()
    assert not known.are(fields, lengths)
    assert known.known[0]() is None


def test_pools_of_different_kinds_are_refused(device):
    fields = [{"positions": torch.zeros(4, dtype=kind)} for kind in (torch.int32, torch.int64)]
    with pytest.raises(ValueError, match="expected contiguous fields of the same names, types"):
        Pools.of(fields, [torch.zeros(1, 1, dtype=torch.long)] * 2, [])
