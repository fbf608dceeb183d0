"""Evictions of all layers at once, where a GPU would wait for the host instead.

An eviction is some seventy operations and launches, most of them over in microseconds. With as many
for each of 32 layers the host needs longer to ask for them than all else takes. Layers that evict
by the same settings do it at the same step, and a scorer knows no rows: rows of different layers
are rows. So they are read, scored and compacted together, before the first layer's forward. What
cannot be done so is left to the layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.policies.base import RowState, of_rows
from hf_reasoncache.precision import without_autocast
from hf_reasoncache.scorers.base import HeldTokens
from hf_reasoncache.storage.pool_store import SCORER_STATE
from hf_reasoncache.storage.query_window import last_of_several
from triton_ops.launch import send
from triton_ops.pools import HeadsOfPools, Pools

MOST_BYTES = 256 * 2**20
"""Keys that are copied at once to be scored, in the model's type, as wide as the widest field."""


class JointEvictions:
    """Evicts from several layers of a cache together.

    Parameters
    ----------
    layers : sequence of CacheLayer
        All of a cache that are ours.
    """

    def __init__(self, layers: Sequence[CacheLayer]) -> None:
        policies = [layer.policy for layer in layers]
        first = policies[0] if policies else None
        alike = first is not None and all(
            each is not None and first.evicts_like(each) for each in policies
        )
        self.layers = layers if alike else ()
        self._pools: dict[int, Pools] = {}
        self._seen = self._until = 0  # columns at the last look, and until when nothing is due

    def __getstate__(self) -> dict[str, Any]:
        """Leave out where pools lie: a copy has others."""
        return vars(self) | {"_pools": {}}

    def run(self) -> None:
        """Evict what is due before one more token; nothing where layers must do it themselves."""
        if not self.layers:
            return
        before, self._seen = self._seen, self.layers[0].seen
        # Whatever has changed meanwhile, layers evict themselves what is due and left out here.
        if before <= self._seen < self._until:
            return
        groups: dict[Any, list[CacheLayer]] = defaultdict(list)
        for layer in filter(_ready, self.layers):
            state, store = _state(layer), layer.store
            rows = state.due(store, layer.seen, 1)
            if rows.numel():
                fields = store.tokens.held_fields
                kinds = tuple((name, x.dtype, x.shape[1:]) for name, x in fields.items())
                kind = (store.tokens.device, kinds, store.length.shape[1])
                groups[kind, tuple(rows.tolist())].append(layer)
        number = 0
        for (_, numbers), some in groups.items():
            rows = torch.tensor(numbers, device="cpu")
            most = max(_row_bytes(layer) for layer in some) * len(rows)
            at_once = max(1, MOST_BYTES // max(most, 1))
            for begin in range(0, len(some), at_once):
                with without_autocast(some[0].device):
                    self._evict(number, some[begin : begin + at_once], rows)
                number += 1
        rooms = [layer.state.room(layer.store, layer.seen) for layer in self.layers if layer.state]
        self._until = self._seen + min(rooms, default=0)

    def _evict(self, number: int, layers: Sequence[CacheLayer], rows: torch.Tensor) -> None:
        """Evict from the same rows of some layers."""
        mine, *others = (_state(layer) for layer in layers)
        state, span = mine.join(others, rows, layers[0].seen)
        policy, pools = state.policy, self._pools_of(number, layers)
        length = of_rows([layer.store.length for layer in layers], rows)
        start = of_rows([layer.store.tokens.layout.start for layer in layers], rows)
        # 1. What the host knows is sent at once.
        heads = start.shape[1]
        pool = torch.arange(len(layers), device="cpu").repeat_interleave(len(rows))
        place = (rows[:, None] * heads + torch.arange(heads, device="cpu")).repeat(len(layers), 1)
        table = torch.stack([pool[:, None].expand_as(start), place, start, length])
        queries = last_of_several([layer.queries for layer in layers], rows, policy.queries)
        asked = span.newest(0 if queries is None else queries.shape[2], span.first)
        parts = (table, span.first, span.now, asked)
        sent = send(torch.cat([part.flatten() for part in parts]), pools.addresses.device)
        split = sent.split([part.numel() for part in parts])
        table, first, now, asked = (x.view(y.shape) for x, y in zip(split, parts, strict=True))
        # 2. Read and score.
        tokens = HeadsOfPools.read(pools, table, first, int(length.max()))
        form = layers[0].store.form
        statistics: dict[str, Any] = {name: tokens.field(name) for name in pools.statistics}
        held = HeldTokens(
            keys=form.read("keys", tokens.field),
            positions=tokens.positions,
            valid=tokens.valid,
            length=now,
            scaling=layers[0].settings["scaling"],
            layer=layers[0].index,
            load_values=partial(form.read, "values", tokens.field),
            queries=None if queries is None else queries.unflatten(1, (heads, -1)),
            query_positions=None if queries is None else asked,
            filler=bool((length < length.max()).any()),
            **statistics,
        )
        _, plan = state.plan(span, held, policy.scorer.score(held))
        # 3. Choose and evict.
        kept = plan.known(length)
        if kept is None:
            raise RuntimeError(f"{policy}: expected a plan whose numbers say how much is kept.")
        stays = send(kept, pools.addresses.device)
        keep = plan.keep(stays)
        if held.scorer_state is not None:
            tokens.write(SCORER_STATE, held.scorer_state)
        tokens.compact(keep, stays)
        gone = (length - kept).view(len(layers), -1).sum(-1).tolist()
        for layer, left, count in zip(layers, kept.split(len(rows)), gone, strict=True):
            layer.evicted_elsewhere(rows, left, count)

    def _pools_of(self, number: int, layers: Sequence[CacheLayer]) -> Pools:
        """Return where the pools of some layers lie; looked up again when one has moved."""
        fields = [layer.store.tokens.fields for layer in layers]
        lengths = [layer.store.tokens.device_length for layer in layers]
        known = self._pools.get(number)
        if known is None or not known.are(fields, lengths):
            statistics = tuple(layers[0].store.statistics)
            known = self._pools[number] = Pools.of(fields, lengths, statistics)
        return known


def _ready(layer: CacheLayer) -> bool:
    """Whether something is due in a layer, and is a matter of its pool alone."""
    store, state = layer.store, layer.state
    return (
        state is not None
        and state.joins
        and layer.prompt_is_complete
        and state.room(store, layer.seen) < 1
        and store.in_pool
        and not store.hides
        and not layer.record_past
        and not layer.observers
        and store.uses_kernels
    )


def _state(layer: CacheLayer) -> RowState:
    if layer.state is None:
        raise ValueError(f"layer {layer.index}: expected a prompt, got a layer without one.")
    return layer.state


def _row_bytes(layer: CacheLayer) -> int:
    """Bytes of what scorers see of one row at once: its keys."""
    pool = layer.store.tokens
    widest = max(field.shape[1:].numel() for field in pool.held_fields.values())
    return pool.longest * pool.length.shape[1] * widest * layer.dtype.itemsize
