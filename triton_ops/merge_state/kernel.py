"""Kernels that join partial softmax results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launcher
from ..tiles import LOG2_E, NOTHING, block_d, blocks, load_rows


@triton.jit
def join_row(
    partial_out,
    partial_lse,
    first,
    s_aux,
    out,
    logsumexp,
    head,
    row,
    heads,
    group,
    steps,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join the partial results of one query of one head, and its sink; write in output order.

    They are summed in the order of their numbers, whichever was written first.
    """
    rows = group * steps
    step = row % steps
    query_head = head % heads * group + row // steps
    begin = tl.load(first + head)
    end = tl.load(first + head + 1)

    top = tl.full([], NOTHING, tl.float32)
    total = tl.zeros([], tl.float32)
    if s_aux is not None:
        top = tl.load(s_aux + query_head).to(tl.float32) * LOG2_E
        total = total + 1.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    column = tl.arange(0, BLOCK_DV)
    for at in tl.range(begin, end, BLOCK_S):
        split = at + tl.arange(0, BLOCK_S)
        held = split < end
        where = split.to(tl.int64) * rows + row
        lse = tl.load(partial_lse + where, mask=held, other=NOTHING)
        part = tl.load(
            partial_out + where[:, None] * DV + column[None, :],
            mask=held[:, None] & (column < DV)[None, :],
            other=0.0,
        )
        higher = tl.maximum(top, tl.max(lse, 0))
        # Where nothing has been seen yet, all differences are 0, hence the mask.
        weights = tl.where(lse > 0.5 * NOTHING, tl.exp2(lse - higher), 0.0)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        top = higher
    safe = tl.where(total > 0.0, total, 1.0)
    to = (head // heads * steps + step).to(tl.int64) * (heads * group) + query_head
    tl.store(out + to * DV + column, (acc / safe).to(out.dtype.element_ty), mask=column < DV)
    lse = tl.where(total > 0.0, (top + tl.log2(safe)) / LOG2_E, -float("inf"))
    tl.store(logsumexp + to, lse)


@triton.jit(do_not_specialize=["steps"])
def join_kernel(
    partial_out,
    partial_lse,
    first,
    s_aux,
    out,
    logsumexp,
    heads,
    group,
    steps,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join the partial results of one query of one head."""
    # The second axis of a grid ends at 65,535, which a long chunk has more queries than.
    join_row(
        partial_out, partial_lse, first, s_aux, out, logsumexp,
        tl.program_id(1), tl.program_id(0), heads, group, steps, DV, BLOCK_DV, BLOCK_S,
    )  # fmt: skip


def joined_at_once(value_size: int) -> int:
    """How many partial results of a query `join_row` loads at once."""
    return max(16, min(64, 8192 // block_d(value_size)))


def join(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    first: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    *,
    kv_heads: int,
    s_aux: torch.Tensor | None,
) -> None:
    """Join the partial results of every head.

    Parameters
    ----------
    partial_out, partial_lse : Tensor[n, G * T, D_v], Tensor[n, G * T]
        float32; results of the queries of a head, and the base-2 logarithm of their weight.
    first : IntTensor[B * H_kv + 1]
        Partial results `first[i]` to `first[i + 1] - 1` belong to head `i`.
    out, logsumexp : Tensor[B, T, H_q, D_v], Tensor[B, T, H_q]
        Written; the logsumexp is natural and counts the sink.
    kv_heads : int
    s_aux : Tensor[H_q] or None
        Sink logits.
    """
    batch, steps, query_heads, value_size = out.shape
    group = query_heads // kv_heads
    join_kernel[(group * steps, batch * kv_heads)](
        partial_out,
        partial_lse,
        first,
        s_aux,
        out,
        logsumexp,
        kv_heads,
        group,
        steps,
        value_size,
        block_d(value_size),
        BLOCK_S=joined_at_once(value_size),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    out,
    logsumexp,
    other,
    other_logsumexp,
    merged,
    merged_logsumexp,
    rows,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Join two results of some rows."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < rows
    a = tl.load(logsumexp + row, mask=real, other=0.0)
    b = tl.load(other_logsumexp + row, mask=real, other=0.0)
    top = tl.maximum(tl.maximum(a, b), NOTHING)
    first = tl.exp2((a - top) * LOG2_E)
    second = tl.exp2((b - top) * LOG2_E)
    total = first + second
    safe = tl.where(total > 0.0, total, 1.0)
    tl.store(
        merged_logsumexp + row, tl.where(total > 0.0, top + tl.log2(safe) / LOG2_E, a), mask=real
    )
    x = load_rows(out, row, real, DV, BLOCK_DV).to(tl.float32)
    y = load_rows(other, row, real, DV, BLOCK_DV).to(tl.float32)
    # A side that saw nothing may hold anything.
    x = tl.where(first[:, None] > 0.0, x, 0.0) * (first / safe)[:, None]
    y = tl.where(second[:, None] > 0.0, y, 0.0) * (second / safe)[:, None]
    column = tl.arange(0, BLOCK_DV)
    tl.store(
        merged + row.to(tl.int64)[:, None] * DV + column[None, :],
        (x + y).to(merged.dtype.element_ty),
        mask=real[:, None] & (column < DV)[None, :],
    )


@launcher
def merge_state_triton(
    out: torch.Tensor, logsumexp: torch.Tensor, other: torch.Tensor, other_logsumexp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.merge_state.merge_state`."""
    merged = torch.empty_like(out, memory_format=torch.contiguous_format)
    total = torch.empty(logsumexp.shape, dtype=torch.float32, device=out.device)
    rows, size = total.numel(), out.shape[-1]
    if merged.numel():
        block = max(1, 1024 // block_d(size))
        merge_kernel[(blocks(rows, block),)](
            out.contiguous(),
            logsumexp.float().contiguous(),
            other.contiguous(),
            other_logsumexp.float().contiguous(),
            merged,
            total,
            rows,
            size,
            BLOCK_M=block,
            BLOCK_DV=block_d(size),
            num_warps=4,
        )
    return merged, total
