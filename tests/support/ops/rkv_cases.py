"""Tokens and what R-KV has kept about them."""

import torch

from triton_ops.redundancy import GONE, NONE, UNSEEN

ROWS, HEADS = 2, 3


def tokens(count, dtype=torch.float32):
    """Positions with filler behind them, what was kept, and what `redundancy` might answer."""
    positions = torch.randint(0, 3 * count, (ROWS, HEADS, count)).sort(-1).values
    positions += torch.arange(count)  # no two are equal
    lengths = torch.randint(0, count + 1, (ROWS, HEADS))
    lengths[0, 0] = count
    place = torch.arange(count)
    positions = positions.masked_fill(place >= lengths[..., None], -1)
    # Some name a token that is held, some one that is not, some none; new ones come last.
    named = positions.gather(-1, torch.randint(0, count, positions.shape)) + 2
    named = torch.where(torch.rand(named.shape) < 0.3, named + 1, named)
    named = torch.where(torch.rand(named.shape) < 0.2, 1, named.clamp_min(1))
    state = named.masked_fill((positions < 0) | (place >= count - 2), 0).int()
    importance, repeated = torch.rand(2, *positions.shape).to(dtype)
    repeat = torch.minimum(torch.randint(-1, count, positions.shape), lengths[..., None] - 1)
    return positions, state, importance, repeated, repeat


def literally_found(state, positions):
    """What the names stand for, one after the other."""
    found = torch.full_like(positions, UNSEEN)
    for row in range(ROWS):
        for head in range(HEADS):
            held = positions[row, head].tolist()
            for token, name in enumerate(state[row, head].tolist()):
                if name == 1:
                    found[row, head, token] = NONE
                elif name:
                    known = name - 2 in held
                    found[row, head, token] = held.index(name - 2) if known else GONE
    return found
