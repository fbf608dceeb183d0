"""Compile what evictions launch before a generation needs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.geometry import head_shape
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.policies.base import Policy
from hf_reasoncache.scorers.base import HeldTokens
from hf_reasoncache.storage.pool import RaggedPool
from hf_reasoncache.storage.pool_store import SCORER_STATE
from triton_ops.backend import chosen
from triton_ops.pools import HeadsOfPools, Pools

TOKENS = 32
"""Tokens of the eviction that is tried: kernels are the same for any number."""


@torch.no_grad()
def warm_up(model: torch.nn.Module, cache: ReasonCache) -> None:
    """Compile the kernels of an eviction, so that the first one in a generation does not wait.

    Triton compiles a kernel when it is first launched, about a second each, and keeps it on disk
    for later processes. A prompt beyond the budget is cut while it is read; with a shorter one the
    compiler would run between two tokens. Nothing happens where no kernel runs.

    Parameters
    ----------
    model : PreTrainedModel
    cache : ReasonCache
        Its scorers are tried on random tokens; it stays as it is.

    Examples
    --------
    >>> cache = ReasonAllocCache(model.config, budget=1024)
    >>> warm_up(model, cache)
    >>> out = model.generate(**inputs, past_key_values=cache, max_new_tokens=16384)
    """
    config: Any = model.config
    decoder = config.get_text_config(decoder=True)
    for device, dtype in {(tensor.device, tensor.dtype) for tensor in model.parameters()}:
        if not dtype.is_floating_point or chosen(device, dtype) != "triton":
            continue
        for layer in cache.own_layers:
            if layer.policy is not None:
                heads, size = head_shape(decoder, layer.index)
                keys = torch.randn(1, heads, TOKENS, size, dtype=dtype, device=device)
                group = decoder.num_attention_heads // heads
                _evict(layer, layer.policy, keys, group, together=cache.evicts_together)


def _evict(
    layer: CacheLayer, policy: Policy, keys: torch.Tensor, group: int, *, together: bool
) -> None:
    """Score and compact tokens as the layer would, in a pool of their own."""
    scorer, (_, heads, tokens, size), device = policy.scorer, keys.shape, keys.device
    form = layer.store.form
    new = form.fields(keys, keys)
    pool = RaggedPool(
        torch.full((1, heads), tokens, device="cpu"),
        {name: field[0, 0] for name, field in new.items()},
        layer.store.statistics,
    )
    pool.append(new, torch.arange(tokens, device=device))
    rows = torch.arange(1, device="cpu")
    slots, offset = pool.slots(rows)
    asked = policy.queries
    queries = asked_at = None
    if asked:
        queries = torch.randn(1, heads, group, asked, size, dtype=keys.dtype, device=device)
        asked_at = torch.arange(tokens - asked, tokens, device=device)[None].clamp_min(-1)
    field: Callable[[str], torch.Tensor] = partial(pool.take, slots=slots)
    found: HeadsOfPools | None = None
    if together:
        place = torch.arange(heads, device="cpu")[None]
        table = torch.stack([torch.zeros_like(place), place, pool.layout.start, pool.length])
        statistics = tuple(layer.store.statistics)
        pools = Pools.of([pool.fields], [pool.device_length], statistics)
        first = torch.zeros(1, dtype=torch.long, device=device)
        found = HeadsOfPools.read(pools, table.to(device), first, tokens)
        field = found.field
    noted: dict[str, Any] = {name: field(name) for name in layer.store.statistics}
    held = HeldTokens(
        keys=form.read("keys", field),
        positions=offset,
        valid=offset >= 0,
        length=torch.full((1,), tokens, device=device),
        scaling=size**-0.5,
        layer=layer.index,
        load_values=lambda: form.read("values", field),
        queries=queries,
        query_positions=asked_at,
        **noted,
    )
    scorer.score(held)
    if found is None:
        pool.compact(rows, slots, offset, offset % 2 == 0)
        return
    if held.scorer_state is not None:
        found.write(SCORER_STATE, held.scorer_state)
    keep = found.offset % 2 == 0
    found.compact(keep, keep.sum(-1))
