"""Held tokens to score, and what one head of them looks like to a formula."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hf_reasoncache.scorers import HeldTokens


def held_tokens(
    counts: list[list[int]],
    lengths: list[int],
    *,
    queries: int = 8,
    group: int = 2,
    size: int = 16,
    layer: int = 3,
    dtype: torch.dtype = torch.float32,
) -> HeldTokens:
    """Random held tokens with `counts[row][head]` of the `lengths[row]` a row has seen."""
    rows, heads, held = len(counts), len(counts[0]), max(map(max, counts))
    positions = torch.full((rows, heads, held), -1)
    for row, length in enumerate(lengths):
        for head, count in enumerate(counts[row]):
            positions[row, head, :count] = torch.randperm(length)[:count].sort().values
    valid = positions >= 0
    # A shared component, so that some keys repeat each other and others do not.
    keys = (torch.randn(rows, heads, held, size) + 0.6) * valid.unsqueeze(-1)
    values = torch.randn(rows, heads, held, size + 4) * valid.unsqueeze(-1)
    last = torch.tensor(lengths).unsqueeze(-1)
    query_positions = (last + torch.arange(-queries, 0)).clamp(min=-1)
    return HeldTokens(
        keys=keys.to(dtype),
        positions=positions,
        valid=valid,
        length=torch.tensor(lengths),
        scaling=size**-0.5,
        layer=layer,
        load_values=lambda: values.to(dtype),
        queries=(2 * torch.randn(rows, heads, group, queries, size)).to(dtype),
        query_positions=query_positions,
        cumulative_attention=torch.rand(rows, heads, held) * valid,
    )


def row_alone(held: HeldTokens, row: int) -> HeldTokens:
    """Cut one row out, without the filler that its neighbours made necessary."""
    one = slice(row, row + 1)
    width = int(held.count[row].max())
    assert (
        held.queries is not None
        and held.query_positions is not None
        and held.cumulative_attention is not None
    )
    return replace(
        held,
        keys=held.keys[one, :, :width],
        positions=held.positions[one, :, :width],
        valid=held.valid[one, :, :width],
        length=held.length[one],
        load_values=lambda: held.values[one, :, :width],
        queries=held.queries[one],
        query_positions=held.query_positions[one],
        cumulative_attention=held.cumulative_attention[one, :, :width],
    )


def heads_alone(held: HeldTokens, heads: slice) -> HeldTokens:
    """Cut some heads out, as a process has them that holds no others."""
    assert held.queries is not None and held.cumulative_attention is not None
    return replace(
        held,
        keys=held.keys[:, heads],
        positions=held.positions[:, heads],
        valid=held.valid[:, heads],
        load_values=lambda: held.values[:, heads],
        queries=held.queries[:, heads],
        cumulative_attention=held.cumulative_attention[:, heads],
        first_head=heads.start,
    )


@dataclass
class Head:
    """One head without filler, in float64: what the papers' formulas talk about."""

    keys: torch.Tensor  # [n, D]
    values: torch.Tensor  # [n, D_v]
    positions: list[int]
    queries: list[tuple[int, torch.Tensor]]  # present ones: position and [G, D], oldest first
    cumulative_attention: list[float]
    row_mass: float  # largest of all heads of the row
    length: int
    scaling: float

    def __len__(self) -> int:
        return len(self.positions)


def head_of(held: HeldTokens, row: int, head: int) -> Head:
    count = int(held.count[row, head])
    assert (
        held.queries is not None
        and held.query_positions is not None
        and held.cumulative_attention is not None
    )
    queries = [
        (position, held.queries[row, head, :, index].double())
        for index, position in enumerate(held.query_positions[row].tolist())
        if position >= 0
    ]
    return Head(
        keys=held.keys[row, head, :count].double(),
        values=held.values[row, head, :count].double(),
        positions=held.positions[row, head, :count].tolist(),
        queries=queries,
        cumulative_attention=held.cumulative_attention[row, head, :count].tolist(),
        row_mass=float(held.cumulative_attention[row].max()),
        length=int(held.length[row]),
        scaling=held.scaling,
    )
