"""What one layer of a cache holds for one row, from the settings by which it allocates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_reasoncache.geometry import head_shape
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.layers.budgeted import BudgetedLayer
from hf_reasoncache.layers.evicting import EvictingLayer
from hf_reasoncache.layers.windowed import WindowedLayer
from hf_reasoncache.planning.queries import KeptQueries
from hf_reasoncache.planning.windows import window_pool
from hf_reasoncache.storage.branch_store import GROWTH, ROOM, BranchStore
from hf_reasoncache.storage.pool_store import FIRST_ROOM

_POSITION = 4  # bytes of what says where a token stands, and of each statistic of a slot


@dataclass(frozen=True)
class LayerRow:
    """One row in one layer.

    Attributes
    ----------
    token : int
        Bytes of the keys and values of one token.
    own, shared : int
        Bytes of all storages: of the row itself, and of the prompt that branches share.
    rest : int
        Bytes that the row has held besides, when its layer kept most queries for scoring.
    tokens : float
        Tokens that a query attends to, besides shared ones; between two compactions the mean.
    shared_tokens : int
        Tokens of a shared prompt.
    moves : bool
        Whether the storage moves while tokens are generated: then old and new one exist together.
    concatenates : bool
        Whether it moves at every step, as in transformers' own layers.
    """

    token: int
    own: int
    tokens: float
    rest: int = 0
    shared: int = 0
    shared_tokens: int = 0
    moves: bool = True
    concatenates: bool = False

    @staticmethod
    def of(
        layer: Any,
        index: int,
        decoder: PretrainedConfig,
        prompt: int,
        generated: int,
        dtype: torch.dtype,
    ) -> LayerRow:
        """Describe layer `index` after `prompt` and `generated` tokens.

        Raises
        ------
        ValueError
            If the kind of layer is not known, or its budget cannot hold the prompt.
        """
        heads, size = head_shape(decoder, index)
        number, seen = dtype.itemsize, prompt + generated
        token = 2 * heads * size * number
        if type(layer) is DynamicLayer:
            return LayerRow(token, token * seen, seen, concatenates=True)
        if type(layer) is DynamicSlidingWindowLayer:
            # What stays is a view of what the last forward attended to, which may be a prompt.
            held = min(seen, layer.sliding_window) if generated else prompt
            return LayerRow(token, token * held, held, concatenates=True)
        if not isinstance(layer, CacheLayer):
            raise ValueError(
                f"layer {index}: expected an attention layer, got {type(layer).__name__}, whose "
                "bytes do not follow from a config; run the model once and read cache.report()."
            )
        elsewhere = prompt if layer.store.shares else 0
        slots, tokens = _pool(layer, prompt, generated, elsewhere)
        own = heads * slots * (2 * size * number + _POSITION * (1 + len(layer.store.statistics)))
        rest = 0
        if isinstance(layer, EvictingLayer):
            query = decoder.num_attention_heads * size * number
            queries = KeptQueries.of(layer, prompt, slots, elsewhere)
            kept = queries.after(generated)
            own, rest = own + kept * query, (queries.most(generated) - kept) * query
        return LayerRow(
            token=token,
            own=own,
            tokens=tokens,
            rest=rest,
            # The positions of a segment are the same for all heads.
            shared=(token + _POSITION) * elsewhere,
            shared_tokens=elsewhere,
            moves=not isinstance(layer, BudgetedLayer) or layer.policy.head_budgets,
        )


def _pool(layer: CacheLayer, prompt: int, generated: int, elsewhere: int) -> tuple[int, float]:
    """Slots and tokens per KV head of a pool; `elsewhere` tokens of the prompt are not in it."""
    seen = prompt + generated - elsewhere
    if isinstance(layer, BudgetedLayer):
        policy = layer.policy
        protected = prompt if policy.protect_prompt else 0
        budget = policy.layer_budget(layer.rank, protected) - elsewhere
        return budget + policy.buffer, min(seen, budget + policy.buffer / 2)
    if isinstance(layer, WindowedLayer):
        return window_pool(layer.policy, prompt, generated, elsewhere)
    if isinstance(layer.store, BranchStore):
        return _grown(generated, layer.store.reserved), seen
    slots = prompt + FIRST_ROOM
    while slots < seen:
        slots = 2 * slots
    return slots, seen


def _grown(tokens: int, reserved: int) -> int:
    """Slots of a suffix that was appended to token by token, see `BranchStore`."""
    slots = 0
    while slots < tokens:
        held = slots
        slots = reserved if held < reserved else held + 1 + max(ROOM, held // GROWTH)
    return slots
