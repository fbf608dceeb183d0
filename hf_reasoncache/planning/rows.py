"""What a row of a batch takes in a cache, computed from the config: no weights, no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_reasoncache.geometry import head_shape
from hf_reasoncache.layers.branched import GROWTH, ROOM, BranchedLayer, Branching
from hf_reasoncache.layers.budgeted import BudgetedLayer
from hf_reasoncache.layers.evicting import EvictingLayer
from hf_reasoncache.layers.pooled import FIRST_ROOM, PooledLayer
from hf_reasoncache.layers.windowed import WindowedLayer
from hf_reasoncache.planning.windows import window_slots

_POSITION = 4  # bytes of what says where a token stands, and of each statistic of a slot


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one prompt and one row that continues it.

    Attributes
    ----------
    shared : int
        Held once for all branches of the prompt; 0 unless they share it.
    own : int
        Held for every row.
    moving : int
        Held for a moment besides, when a layer's storage moves: the largest of the layers that
        move theirs while tokens are generated.
    prompt : int
        Held while the prompt is read: `shared + own` then, and keys and values of the whole prompt
        in one layer, as the model has made them.
    """

    shared: int
    own: int
    moving: int
    prompt: int

    def held(self, branches: int = 1) -> int:
        """Bytes of a prompt with so many branches, between two steps."""
        return self.shared + branches * self.own

    def most(self, branches: int = 1) -> int:
        """Most bytes of a prompt with so many branches at any time up to this length.

        The prompt is read once for all branches if they share it (`branch_generate`), else in every
        row.
        """
        reading = self.prompt if self.shared else branches * self.prompt
        return max(self.held(branches) + branches * self.moving, reading)


def row_bytes(
    cache: Cache,
    config: PretrainedConfig,
    *,
    prompt: int,
    generated: int,
    dtype: torch.dtype,
) -> RowBytes:
    """Compute what a row takes in a cache that has read its prompt and so many tokens more.

    Counts what `report().total_bytes` counts: keys, values, positions, statistics, and the queries
    that are kept for scoring, with the slots that the pools allocate in advance; sliding-window
    layers of hybrids too. A batch of equal rows takes as many times that. In a batch of unequal
    rows a `DynamicCache` pads all to the longest; so does the room of a cache without budget.

    Parameters
    ----------
    cache : Cache
        A new cache with the settings in question: `DynamicCache(config=config)`,
        `ReasonAllocCache(config, ...)`, `SlidingWindowCompressCache(config, ...)` or
        `SharedBranchCache(config, ...)`. It stays as it is.
    config : PretrainedConfig
        The model's.
    prompt : int
        Tokens of the prompt, at least 1.
    generated : int
        Tokens stored after it. `generate(max_new_tokens=n)` stores `n - 1`: it does not feed the
        last one.
    dtype : torch.dtype
        Of keys and values, which is that of the model.

    Returns
    -------
    RowBytes

    Raises
    ------
    ValueError
        If a length is not valid, a budget cannot hold the prompt, or a layer is of a kind whose
        bytes are not known (linear attention).

    Notes
    -----
    Exact but for these: `head_budgets=True` of a `SlidingWindowCompressCache` gives heads of one
    layer different lengths, and a second pass under its `max_budget` finds an estimated number of
    tokens. `max_risk` may keep more than the windows' share, and probes' shadows (CPU memory) and
    the few bytes that only Triton's kernels and recorded steps need are left out; so are, until the
    first token is fed, the positions that `held_positions` reports of a prompt that was cut.
    """
    for name, value, low in (("prompt", prompt, 1), ("generated", generated, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}.")
    decoder = config.get_text_config(decoder=True)
    reading = [_Layer.of(x, i, decoder, prompt, 0, dtype) for i, x in enumerate(cache.layers)]
    layers = [
        _Layer.of(x, i, decoder, prompt, generated, dtype) for i, x in enumerate(cache.layers)
    ]
    dense = max(layer.token for layer in layers) * prompt
    return RowBytes(
        shared=sum(layer.shared for layer in layers),
        own=sum(layer.own for layer in layers),
        moving=max(layer.own if layer.moves else 0 for layer in layers),
        prompt=sum(layer.shared + layer.own for layer in reading) + dense,
    )


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer: shared and own ones, those of a token, and whether its storage moves."""

    own: int
    token: int
    shared: int = 0
    moves: bool = False

    @staticmethod
    def of(
        layer: Any,
        index: int,
        decoder: PretrainedConfig,
        prompt: int,
        generated: int,
        dtype: torch.dtype,
    ) -> _Layer:
        heads, size = head_shape(decoder, index)
        number = dtype.itemsize
        token = 2 * heads * size * number
        if isinstance(layer, PooledLayer):
            shares = isinstance(layer, Branching)
            per_slot = 2 * size * number + _POSITION * (1 + len(layer.statistics))
            own = heads * _slots(layer, prompt, generated) * per_slot
            if isinstance(layer, EvictingLayer):
                query = decoder.num_attention_heads * size * number
                own += _queries_kept(layer, prompt, generated) * query
            return _Layer(
                own=own,
                token=token,
                # Positions of a segment are the same for all heads.
                shared=(token + _POSITION) * prompt if shares else 0,
                moves=not isinstance(layer, BudgetedLayer) or layer.policy.head_budgets,
            )
        if type(layer) is DynamicLayer:
            return _Layer(own=token * (prompt + generated), token=token, moves=True)
        if type(layer) is DynamicSlidingWindowLayer:
            # It keeps one token less, as a view of what the last forward attended to.
            seen = min(prompt + generated, layer.sliding_window) if generated else prompt
            return _Layer(own=token * seen, token=token, moves=True)
        raise ValueError(
            f"layer {index}: expected attention layers, got {type(layer).__name__}, whose bytes "
            "cannot be planned from a config; run the model once and read cache.report()."
        )


def _slots(layer: PooledLayer, prompt: int, generated: int) -> int:
    """Slots per KV head in a layer's pool."""
    elsewhere = prompt if isinstance(layer, Branching) else 0
    if isinstance(layer, BudgetedLayer):
        policy = layer.policy
        protected = prompt if policy.protect_prompt else 0
        return policy.layer_budget(layer.rank, protected) + policy.buffer - elsewhere
    if isinstance(layer, WindowedLayer):
        return window_slots(layer.policy, prompt, generated, elsewhere)
    if isinstance(layer, BranchedLayer):
        return _grown(generated, layer.reserved)
    slots = prompt + FIRST_ROOM
    while slots < prompt + generated:
        slots = 2 * slots
    return slots


def _grown(tokens: int, reserved: int) -> int:
    """Slots of a suffix that has been appended to token by token, see `BranchedLayer`."""
    slots = 0
    while slots < tokens:
        held = slots
        slots = reserved if held < reserved else held + 1 + max(ROOM, held // GROWTH)
    return slots


def _queries_kept(layer: EvictingLayer, prompt: int, generated: int) -> int:
    """Columns whose queries a layer keeps: the prompt's go when there are as many newer ones."""
    size = layer.log_size
    return size if generated >= size else min(prompt, size) + generated
