"""Attention to the chunks of a ragged pool, and the launches that make `decode_attention`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launcher, send
from ..layout import RaggedLayout, SharedPrefix
from ..merge_state.kernel import join, join_row, joined_at_once
from ..prefix_attention.kernel import attend_prefix
from ..tiles import Tile, block_d, blocks, load_rows, parts
from .chunk_kernel import attend_chunk, load_chunk, load_queries, store_partial
from .cumulative_kernel import add_received_attention
from .work import PrefixWork, work

JOINED = 16
"""Queries of a head up to which the launch that attends joins the partial results itself: one tile
of them. One program does it for all, where the launch of its own has a program for each. Codes are
joined by that launch always: widening them takes the registers."""


@triton.jit
def is_last(arrivals, first, head):
    """Whether all other programs of a head have stored their partial results, to be read now.

    By the memory model of PTX. The barrier orders what the threads of a program have stored before
    the atomic addition, which one of them does for all. That is a release and an acquire in one, in
    the scope of the whole GPU: the last program to add reads what the one before it wrote, which
    read what the one before that wrote, and so synchronises with all of them. The second barrier
    orders its addition before whatever any of its threads loads.
    """
    tl.debug_barrier()
    before = tl.atomic_add(arrivals + head, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    last = before + 1 == tl.load(first + head + 1) - tl.load(first + head)
    if last:
        # For the next launch, which a graph may repeat: nobody else will come in this one.
        tl.store(arrivals + head, 0)
    return last


@triton.jit
def attend_own(
    program,
    tile,
    query,
    keys,
    values,
    positions,
    key_scales,
    value_scales,
    scales_stride,
    query_positions,
    start,
    length,
    items,
    partial_out,
    partial_lse,
    first,
    arrivals,
    s_aux,
    joined,
    logsumexp,
    scale,
    softcap,
    chunk,
    heads,
    rows,
    steps,
    D: tl.constexpr,
    DV: tl.constexpr,
    STRIDE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One chunk of one head, attended to by a tile of the queries that belong to the head."""
    head, begin, end, partial = load_chunk(items, program, start, length, chunk)
    row, place, real, q = load_queries(query, head, tile * BLOCK_M, rows, D, BLOCK_M, BLOCK_D)
    q_rest = None
    if BLOCK_REST > 0:
        q_rest = load_rows(query, place, real, D, BLOCK_REST, BLOCK_D)
    asking = None
    if query_positions is not None:
        # A padding row asks at -1 and sees nothing.
        asking = tl.load(query_positions + head // heads * steps + row % steps, mask=real, other=-1)
    out, lse = attend_chunk(
        q, q_rest, asking, keys, values, positions, key_scales, value_scales, scales_stride,
        begin, end, scale, softcap,
        D, STRIDE_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_REST, BLOCK_DV,
    )  # fmt: skip
    store_partial(partial_out, partial_lse, partial.to(tl.int64) * rows + row, real, out, lse, DV)
    if arrivals is not None:
        if is_last(arrivals, first, head):
            for each in tl.range(0, rows):
                join_row(
                    partial_out, partial_lse, first, s_aux, joined, logsumexp,
                    head, each, heads, rows // steps, steps, DV, BLOCK_DV, BLOCK_S,
                )  # fmt: skip


# Drafts, later turns and rows come in any number: none of them may ask for a binary of its own.
@triton.jit(
    do_not_specialize=[
        "chunk", "rows", "steps", "tiles", "prefix_chunk", "prefix_programs", "prefix_tiles",
        "scales_stride",
    ]
)  # fmt: skip
def attend_kernel(
    query,
    keys,
    values,
    positions,
    key_scales,
    value_scales,
    scales_stride,
    query_positions,
    start,
    length,
    items,
    partial_out,
    partial_lse,
    scale,
    softcap,
    chunk,
    heads,
    rows,
    steps,
    tiles,
    first,
    arrivals,
    s_aux,
    joined,
    logsumexp,
    prefix_keys,
    prefix_values,
    prefix_key_scales,
    prefix_value_scales,
    prefix_start,
    prefix_length,
    prefix_items,
    prefix_members,
    prefix_first,
    prefix_chunk,
    prefix_programs,
    prefix_tiles,
    D: tl.constexpr,
    DV: tl.constexpr,
    STRIDE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The first programs read shared prefixes, if there are any, the others own tokens.

    All tiles of queries of a chunk are neighbours, so that its keys are read once. With `arrivals`,
    the last program of a head to come there joins the partial results of the head.
    """
    program = tl.program_id(0)
    own = True
    if prefix_items is not None:
        own = program >= prefix_programs
        if program < prefix_programs:
            attend_prefix(
                program // prefix_tiles, program % prefix_tiles, query,
                prefix_keys, prefix_values, prefix_key_scales, prefix_value_scales, scales_stride,
                prefix_start, prefix_length, prefix_items,
                prefix_members, prefix_first, first, partial_out, partial_lse,
                scale, softcap, prefix_chunk, heads, rows,
                D, DV, STRIDE_V, BLOCK_P, BLOCK_N, BLOCK_D, BLOCK_REST, BLOCK_DV,
            )  # fmt: skip
        program -= prefix_programs
    if own:
        attend_own(
            program // tiles, program % tiles, query, keys, values, positions,
            key_scales, value_scales, scales_stride, query_positions,
            start, length, items, partial_out, partial_lse, first, arrivals, s_aux, joined,
            logsumexp, scale, softcap, chunk, heads, rows, steps,
            D, DV, STRIDE_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_REST, BLOCK_DV, BLOCK_S,
        )  # fmt: skip


@launcher
def decode_attention_triton(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    layout: RaggedLayout,
    length: torch.Tensor,
    *,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    query_positions: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    cumulative_attention: torch.Tensor | None,
    attention_weight: torch.Tensor | None,
    logsumexp: torch.Tensor | None,
    prefix: SharedPrefix | None = None,
) -> torch.Tensor:
    """See `decode_attention`; with a prefix, `prefix_attention`."""
    batch, kv_heads, group, steps, head_size = query.shape
    value_size, device, rows = values.shape[-1], query.device, group * steps
    most = 1 if prefix is None else prefix.most
    pools = [(keys, values)] if prefix is None else [(keys, values), (prefix.keys, prefix.values)]
    latents = [_are_latents(*pool) for pool in pools]
    codes = key_scales is not None or value_scales is not None
    # Widened codes in the layouts of both products would take more registers than there are. They
    # are loaded as keys and as values, the second time from a cache of the GPU.
    loaded_once = [each and not codes for each in latents]
    block, rest = parts(head_size, value_size if any(latents) else 0)
    value_block = block if any(latents) else block_d(value_size)
    columns = (block + rest,) if all(loaded_once) else (block + rest, value_block)
    # Latents in codes leave the registers of 16 queries where a prefix takes a loop of its own.
    few = prefix is not None and codes and any(latents)
    tile = Tile.of(query.dtype, 1 if few else rows, *columns, codes=codes)
    # One launch has one number of warps: that of the larger tile.
    wide = Tile.of(query.dtype, 1 if few else rows * most, *columns, codes=codes)
    tiles, wide_tiles = blocks(rows, tile.m), blocks(rows * most, wide.m)
    plan = work(layout, tiles, device, prefix, wide_tiles)
    scales = _scale_arguments(key_scales, value_scales, prefix)
    apart = [pool[1] for pool, once in zip(pools, loaded_once, strict=True) if not once]
    value_stride = _value_stride(apart) if apart else value_size
    query = query.contiguous()
    start, length = layout.start_on(device), send(length, device)
    if query_positions is not None:
        query_positions = query_positions.contiguous()

    out = query.new_empty(batch, steps, kv_heads * group, value_size)
    if logsumexp is None:
        logsumexp = query.new_empty(out.shape[:-1], dtype=torch.float32)
    partial_out = query.new_empty(plan.partials, rows, value_size, dtype=torch.float32)
    partial_lse = query.new_empty(plan.partials, rows, dtype=torch.float32)
    joins = plan.arrivals is not None and rows <= JOINED and not codes
    if plan.partials:
        shared = 0 if plan.prefix is None else plan.prefix.count * wide_tiles
        attend_kernel[(shared + plan.count * tiles,)](
            query,
            keys,
            None if loaded_once[0] else values,
            positions,
            *scales,
            query_positions,
            start,
            length,
            plan.items,
            partial_out,
            partial_lse,
            scaling,
            softcap,
            plan.chunk,
            kv_heads,
            rows,
            steps,
            tiles,
            plan.first,
            *((plan.arrivals, s_aux, out, logsumexp) if joins else (None,) * 4),
            *_prefix_arguments(prefix, plan.prefix, wide_tiles, loaded_once[-1]),
            head_size,
            value_size,
            value_stride,
            BLOCK_M=tile.m,
            BLOCK_P=wide.m,
            BLOCK_N=tile.n,
            BLOCK_D=block,
            BLOCK_REST=rest,
            BLOCK_DV=value_block,
            BLOCK_S=joined_at_once(value_size),
            num_warps=wide.warps,
            num_stages=tile.stages,
        )
    if not joins:
        join(partial_out, partial_lse, plan.first, out, logsumexp, kv_heads=kv_heads, s_aux=s_aux)
    if cumulative_attention is not None and plan.count:
        add_received_attention(
            cumulative_attention,
            attention_weight,
            query,
            keys,
            positions,
            key_scales,
            query_positions,
            start,
            length,
            plan,
            logsumexp,
            scaling=scaling,
            softcap=softcap,
        )
    return out


def _are_latents(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the first numbers of a key are its value."""
    latents = values.stride() == keys.stride() and values.data_ptr() == keys.data_ptr()
    if not (keys.is_contiguous() and (latents or values.is_contiguous())):
        raise ValueError(
            "decode_attention: expected contiguous keys and values, or values that are the first "
            f"columns of the keys, got strides {keys.stride()} and {values.stride()}."
        )
    return latents


def _value_stride(values: list[torch.Tensor]) -> int:
    """Numbers from one value to the next, in pool and prefix."""
    strides = {each.stride(0) for each in values}
    if len(strides) > 1:
        raise ValueError(
            "decode_attention: expected values of the same strides in pool and prefix, got "
            f"{sorted(strides)}."
        )
    return strides.pop()


def _scale_arguments(
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    prefix: SharedPrefix | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """Scales of keys and values, and the numbers from one slot to the next in all of them."""
    pairs = [(key_scales, value_scales)]
    if prefix is not None:
        pairs.append((prefix.key_scales, prefix.value_scales))
    strides = {x.stride(0) for pair in pairs for x in pair if x is not None}
    if len(strides) > 1 or len({tuple(x is None for x in pair) for pair in pairs}) > 1:
        raise ValueError(
            "decode_attention: expected scales of the same strides for the same fields of pool "
            f"and prefix, got strides {sorted(strides)}."
        )
    return key_scales, value_scales, max(strides, default=1)


def _prefix_arguments(
    prefix: SharedPrefix | None, plan: PrefixWork | None, tiles: int, loaded_once: bool
) -> tuple[object, ...]:
    if prefix is None or plan is None:
        return (None,) * 12
    return (
        prefix.keys,
        None if loaded_once else prefix.values,
        prefix.key_scales,
        prefix.value_scales,
        plan.start,
        plan.length,
        plan.items,
        plan.members,
        plan.first,
        plan.chunk,
        plan.count * tiles,
        tiles,
    )
