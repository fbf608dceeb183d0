"""What one layer of a cache holds for one row, from the settings by which it allocates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_reasoncache.geometry import head_shape, numbers_per_token
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.planning.counted import counted_row, kept_queries
from hf_reasoncache.sliding import SlidingLayer
from hf_reasoncache.storage.forms import AS_THEY_COME


@dataclass(frozen=True)
class LayerRow:
    """One row in one layer.

    Attributes
    ----------
    token : int
        Bytes of the keys and values of one token, as they are held.
    own, shared : int
        Bytes of all storages: of the row itself, and of the prompt that branches share.
    peak : int
        Most bytes of the row itself after any token so far, the prompt's apart.
    tokens : float
        Tokens that a query attends to, besides shared ones; between two compactions the mean.
    shared_tokens : int
        Tokens of a shared prompt.
    moves : bool
        Whether tokens move while others are generated: then old and new places exist together.
    concatenates : bool
        Whether it moves at every step, as in transformers' own layers.
    new_token : int
        Bytes of the keys and values of one token, as the model makes them.
    """

    token: int
    own: int
    tokens: float
    peak: int = 0
    shared: int = 0
    shared_tokens: int = 0
    moves: bool = True
    concatenates: bool = False
    new_token: int = 0

    @staticmethod
    def of_stock(
        layer: Any,
        index: int,
        decoder: PretrainedConfig,
        prompt: int,
        generated: int,
        dtype: torch.dtype,
    ) -> LayerRow:
        """Describe layer `index`, one of transformers' own, after `prompt` and `generated` tokens.

        Raises
        ------
        ValueError
            If the kind of layer is not known.
        """
        token = numbers_per_token(decoder, index) * dtype.itemsize
        seen = prompt + generated
        if type(layer) is DynamicLayer:
            return LayerRow(
                token, token * seen, seen, token * seen, concatenates=True, new_token=token
            )
        if type(layer) in (DynamicSlidingWindowLayer, SlidingLayer):
            # What stays is a view of what the last forward attended to, which may be a prompt.
            held = min(seen, layer.sliding_window) if generated else prompt
            return LayerRow(
                token, token * held, held, token * held, concatenates=True, new_token=token
            )
        raise ValueError(
            f"layer {index}: expected an attention layer, got {type(layer).__name__}, whose bytes "
            "do not follow from a config; run the model once and read cache.report()."
        )

    @staticmethod
    def of(
        layer: CacheLayer,
        decoder: PretrainedConfig,
        prompt: int,
        generated: int,
        dtype: torch.dtype,
    ) -> LayerRow:
        """Describe one of our layers after `prompt` and `generated` tokens.

        Raises
        ------
        ValueError
            If its budget cannot hold the prompt.
        """
        heads, size = head_shape(decoder, layer.index)
        seen, shared = prompt + generated, prompt if layer.store.shares else 0
        token = heads * layer.store.form.token_bytes(size, dtype)
        slot = heads * layer.store.slot_bytes(size, dtype)
        query = decoder.num_attention_heads * size * dtype.itemsize
        tokens: float = seen - shared
        if layer.policy is None:
            own = peak = slot * layer.store.slots_without_budget(prompt, generated)
        else:
            row = counted_row(layer.policy, prompt, shared)
            tokens = row.at(seen).tokens
            kept = kept_queries(row, layer.query_columns, prompt, generated)
            held = {at: slot * row.at(prompt + at).slots + n * query for at, n in kept.items()}
            own, peak = held[generated], max(held.values())
        return LayerRow(
            token=token,
            own=own,
            tokens=tokens,
            peak=peak,
            # The positions of a segment are the same for all heads.
            shared=(token + torch.int32.itemsize) * shared,
            shared_tokens=shared,
            moves=layer.policy is None or layer.policy.moves_heads,
            new_token=heads * AS_THEY_COME.token_bytes(size, dtype),
        )
