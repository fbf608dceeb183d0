"""Kernels of R-KV's formula: binary search for repeats, then two passes over a head's tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launcher
from ..redundancy import places
from ..tiles import blocks

GONE = tl.constexpr(places.GONE)
NONE = tl.constexpr(places.NONE)
UNSEEN = tl.constexpr(places.UNSEEN)


@triton.jit(do_not_specialize=["tokens", "halvings"])
def find_kernel(state, positions, found, tokens, halvings, BLOCK: tl.constexpr):
    """Find the places of the positions that some tokens of a head name."""
    base = tl.program_id(0).to(tl.int64) * tokens
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < tokens
    named = tl.load(state + base + index, mask=inside, other=0).to(tl.int64)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + tokens
    for _ in tl.range(0, halvings):
        middle = (low + high) // 2
        at = tl.load(positions + base + middle, mask=low < high, other=0)
        # Filler comes last.
        before = (at >= 0) & (at < named - 2) & (low < high)
        low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
    at = tl.load(positions + base + low, mask=low < tokens, other=-1)
    place = tl.where((named >= 2) & (at == named - 2), low, GONE)
    place = tl.where(named == 1, NONE, tl.where(named == 0, UNSEEN, place))
    tl.store(found + base + index, place.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def mix_kernel(
    importance,
    repeated,
    repeat,
    positions,
    scores,
    state,
    tokens,
    lam,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores and state of one head."""
    base = tl.program_id(0).to(tl.int64) * tokens
    top = tl.full([], -float("inf"), tl.float32)
    for begin in tl.range(0, tokens, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        held = tl.load(positions + base + index, mask=index < tokens, other=-1) >= 0
        value = tl.load(repeated + base + index, mask=held, other=-float("inf"))
        top = tl.maximum(top, tl.max(value, 0))
    total = tl.zeros([], tl.float32)
    for begin in tl.range(0, tokens, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        held = tl.load(positions + base + index, mask=index < tokens, other=-1) >= 0
        value = tl.load(repeated + base + index, mask=held, other=0.0)
        total += tl.sum(tl.where(held, tl.exp(value - top), 0.0), 0)
    for begin in tl.range(0, tokens, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < tokens
        held = tl.load(positions + base + index, mask=inside, other=-1) >= 0
        pooled = tl.full([BLOCK], -float("inf"), tl.float32)
        for step in tl.static_range(KERNEL):
            near = index + (step - KERNEL // 2)
            real = (near >= 0) & (near < tokens)
            real = tl.load(positions + base + near, mask=real, other=-1) >= 0
            value = tl.load(importance + base + near, mask=real, other=-float("inf"))
            pooled = tl.maximum(pooled, value)
        value = tl.load(repeated + base + index, mask=held, other=0.0)
        score = lam * pooled - (1.0 - lam) * tl.exp(value - top) / total
        tl.store(scores + base + index, tl.where(held, score, 0.0), mask=inside)
        place = tl.load(repeat + base + index, mask=held, other=NONE)
        at = tl.load(positions + base + place, mask=held & (place >= 0), other=-1)
        # A token without a repeat has place -1, hence position -1, hence state 1.
        tl.store(state + base + index, tl.where(held, at + 2, 0).to(tl.int32), mask=inside)


@launcher
def find_repeats_triton(state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """See `triton_ops.rkv.find_repeats`."""
    rows, heads, tokens = positions.shape
    found = torch.empty_like(positions, memory_format=torch.contiguous_format)
    if found.numel():
        halvings = tokens.bit_length()
        arguments = (state.contiguous(), positions.contiguous(), found, tokens, halvings)
        find_kernel[(rows * heads, blocks(tokens, 256))](*arguments, BLOCK=256, num_warps=4)
    return found


@launcher
def rkv_scores_triton(
    importance: torch.Tensor,
    repeated: torch.Tensor,
    repeat: torch.Tensor,
    positions: torch.Tensor,
    *,
    lam: float,
    kernel: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.rkv.rkv_scores`."""
    rows, heads, tokens = positions.shape
    given = [each.contiguous() for each in (importance, repeated, repeat, positions)]
    scores = given[0].new_empty(given[0].shape, dtype=torch.float32)
    state = torch.empty_like(scores, dtype=torch.int32)
    if scores.numel():
        mix_kernel[(rows * heads,)](
            *given, scores, state, tokens, lam, KERNEL=kernel, BLOCK=512, num_warps=4
        )
    return scores, state
