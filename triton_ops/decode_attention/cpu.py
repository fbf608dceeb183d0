"""`decode_attention` in plain PyTorch.

One batched call per bucket of equal capacity, or per stretch of heads that hold equally many. The
group's queries are packed as rows of one matrix, so keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from ..layout import Bucket, RaggedLayout
from .fused import fused_attention, fused_attention_with_sums, has_sums
from .products import key_products, value_products

# One more call takes as long as a head with so many tokens, and a mask adds this share to a call:
# measured on one core.
_CALL = 1000
_MASK = 0.1

Scales = tuple[torch.Tensor | None, torch.Tensor | None]
"""Of the keys and of the values that are codes of 8 bits."""

_LOGITS = 1 << 24
"""Logits that are in memory at once, where they are written out at all."""


def decode_attention_cpu(
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
    logsumexp: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `triton_ops.decode_attention.decode_attention`."""
    batch, kv_heads, group, steps, head_size = query.shape
    packed = query.reshape(batch * kv_heads, group * steps, head_size)
    lengths = length.flatten()
    if not layout.is_uniform:
        # Whole rows, faster on a CPU than indexing.
        packed = packed.index_select(0, layout.order.to(packed.device))
        lengths = lengths.index_select(0, layout.order)
    # Plain numbers: tensor arithmetic on a handful of lengths would cost more than small attention.
    used = lengths.tolist()
    needed = (softcap, s_aux, cumulative_attention, key_scales, value_scales)
    explicit = any(x is not None for x in needed)
    explicit = explicit or (logsumexp is not None and not has_sums(query, keys, values))

    outputs, sums = [], []
    for bucket in _calls(layout, used, query):
        heads = slice(bucket.first, bucket.first + bucket.count)
        longest = max(*used[heads], 1)
        q = packed[heads]
        k = bucket.view(keys, longest)
        v = bucket.view(values, longest)
        visible = None
        if query_positions is not None or min(used[heads]) != longest:
            visible = _visible(
                bucket, lengths[heads], longest, positions, query_positions, layout, kv_heads, group
            )
        if explicit:
            sink = None if s_aux is None else _sink(s_aux, bucket, layout, kv_heads, group, steps)
            scales = _scales(bucket, longest, key_scales, value_scales)
            received = None
            if cumulative_attention is not None:
                received = bucket.view(cumulative_attention, longest)
            each = None if attention_weight is None else attention_weight.repeat(group)
            out, total = _in_parts(
                q, k, v, scales, visible, scaling, softcap, sink, received, each,
                with_sums=logsumexp is not None,
            )  # fmt: skip
            if total is not None:
                sums.append(total)
        else:
            bias = None if visible is None else _additive(visible, q.dtype)
            if logsumexp is None:
                out = fused_attention(q, k, v, bias, scaling)
            else:
                out, total = fused_attention_with_sums(q, k, v, bias, scaling)
                sums.append(total)
        outputs.append(out)

    def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
        result = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not layout.is_uniform:
            result = result.index_select(0, layout.rank.to(result.device))
        # Fused attention answers in the strides of the query.
        return result.reshape(batch, kv_heads * group, steps, -1).transpose(1, 2)

    if logsumexp is not None:
        logsumexp.copy_(in_order(sums)[..., 0])
    return in_order(outputs).contiguous()


def even_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: RaggedLayout,
    tokens: int,
    scaling: float,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with one query per head to a pool whose heads hold equally many tokens.

    `decode_attention` without all that such a pool does not need. In a model that is larger than
    the caches of a CPU, every small operation of a layer takes microseconds.

    Parameters
    ----------
    query : Tensor[B, H_q, 1, D]
    keys, values : Tensor[slots, D], Tensor[slots, D_v]
        The pool.
    layout : RaggedLayout
        Heads of equal capacity.
    tokens : int
        What each head holds, at least one.
    scaling : float
    key_scales, value_scales : Tensor[slots], optional
        See `decode_attention`.

    Returns
    -------
    Tensor[B, 1, H_q, D_v]
    """
    batch, heads, _, size = query.shape
    (bucket,) = layout.buckets
    packed = query.reshape(bucket.count, -1, size)
    k, v = bucket.view(keys, tokens), bucket.view(values, tokens)
    if key_scales is None and value_scales is None:
        out = fused_attention(packed, k, v, None, scaling)
    else:
        scales = _scales(bucket, tokens, key_scales, value_scales)
        out, _, _ = _explicit(packed, k, v, scales, None, scaling, None, None)
    return out.reshape(batch, 1, heads, -1)


def _calls(layout: RaggedLayout, used: Sequence[int], query: torch.Tensor) -> Iterator[Bucket]:
    """Yield the heads that are attended to at once."""
    for bucket in layout.buckets:
        own = used[bucket.first : bucket.first + bucket.count]
        # Several queries need a mask in any case.
        if min(own) == max(own) or query.shape[3] > 1 or query.device.type != "cpu":
            yield bucket
            continue
        changes = [i for i in range(1, len(own)) if own[i] != own[i - 1]]
        parts = list(pairwise([0, *changes, len(own)]))
        # A head is worked on by one thread.
        threads = torch.get_num_threads()
        apart = sum(_CALL + -(-(stop - start) // threads) * own[start] for start, stop in parts)
        if apart < _CALL + (1 + _MASK) * -(-len(own) // threads) * max(own):
            yield from (bucket.part(start, stop) for start, stop in parts)
        else:
            yield bucket


def _visible(
    bucket: Bucket,
    used: torch.Tensor,
    longest: int,
    positions: torch.Tensor,
    query_positions: torch.Tensor | None,
    layout: RaggedLayout,
    kv_heads: int,
    group: int,
) -> torch.Tensor:
    """Which slots each packed query sees: BoolTensor `[count, 1 or G * T, longest]`."""
    device = positions.device
    visible = torch.arange(longest, device=device) < used.to(device)[:, None, None]
    if query_positions is None:
        return visible
    rows = layout.order[bucket.first : bucket.first + bucket.count] // kv_heads
    asking = query_positions[rows.to(device)].repeat(1, group)
    held = bucket.view(positions, longest)[:, None]
    return visible & (held <= asking[..., None])


def _sink(
    s_aux: torch.Tensor,
    bucket: Bucket,
    layout: RaggedLayout,
    kv_heads: int,
    group: int,
    steps: int,
) -> torch.Tensor:
    """Sink logit of every packed query: Tensor `[count, G * T, 1]`."""
    heads = layout.order[bucket.first : bucket.first + bucket.count] % kv_heads
    return s_aux.view(kv_heads, group)[heads.to(s_aux.device)].repeat_interleave(steps, 1)[
        ..., None
    ]


def _scales(
    bucket: Bucket,
    longest: int,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> Scales:
    """Scales of the keys and of the values of a bucket, `[count, longest]` each."""
    keys, values = (
        None if x is None else bucket.view(x, longest) for x in (key_scales, value_scales)
    )
    return keys, values


def _queries(x: torch.Tensor | None, some: slice) -> torch.Tensor | None:
    """Part of a Tensor `[count, 1 or G * T, ...]` that is about some of the queries."""
    return x if x is None or x.shape[1] == 1 else x[:, some]


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # The smallest finite number, not -inf: a row that sees nothing must not become NaN.
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, torch.finfo(dtype).min)[None]


def _in_parts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scales: Scales,
    visible: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sink: torch.Tensor | None,
    received: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    *,
    with_sums: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with few enough queries at once: output, and logsumexp if it is asked for.

    What tokens receive is added to `received`, `[count, longest]`, with a weight for each query,
    `[G * T]`.

    Returns
    -------
    Tensor[count, G * T, D_v]
    Tensor[count, G * T] or None
    """
    at_once = max(1, _LOGITS // max(1, k.shape[0] * k.shape[1]))
    outs, totals = [], []
    for first in range(0, q.shape[1], at_once):
        some = slice(first, first + at_once)
        seen, ends = (_queries(x, some) for x in (visible, sink))
        out, weights, logits = _explicit(q[:, some], k, v, scales, seen, scaling, softcap, ends)
        outs.append(out)
        if with_sums:
            totals.append(_logsumexp(logits))
        if received is not None:
            if query_weight is not None:
                weights = weights * query_weight[some, None]
            received.add_(weights.sum(1))
    return torch.cat(outs, 1), torch.cat(totals, 1) if with_sums else None


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scales: Scales,
    visible: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention, its weights `[count, G * T, longest]` and all its logits in float32."""
    logits = key_products(q, k, scales[0]).mul_(scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    if sink is None:
        weights = logits.softmax(-1)
    else:
        logits = torch.cat([logits, sink.float()], dim=-1)
        weights = logits.softmax(-1)[..., :-1]
    if visible is not None:
        # A query that sees nothing (padding) would otherwise spread its weight over the filler.
        weights = weights.masked_fill(~visible, 0.0)
    return value_products(weights, v, scales[1], q.dtype), weights, logits


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """Over the last dimension; -inf where every logit is the stand-in for "not visible"."""
    total = logits.logsumexp(-1)
    return total.masked_fill(total < torch.finfo(logits.dtype).min / 2, -torch.inf)
