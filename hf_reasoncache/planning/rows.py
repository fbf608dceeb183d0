"""What a row of a batch takes in a cache, computed from the config: no weights, no tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Cache, PretrainedConfig

from hf_reasoncache.messages import shown
from hf_reasoncache.planning.layers import LayerRow


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one prompt and one row that continues it.

    Attributes
    ----------
    shared : int
        Held once for all branches of the prompt; 0 unless they share it.
    own : int
        Held for every row.
    peak : int
        The most that was held for a row after some forward up to this length: soon after the
        prompt, the queries of its end are kept beside newer ones. Layers of different budgets,
        which evict at different steps, are counted as if all kept most queries at once.
    moving : int
        Held for a moment besides, at most, when a layer's tokens move: the largest of the layers
        whose tokens do while others are generated.
    prompt : int
        Held while the prompt is read: `shared + own` then, and keys and values of the whole prompt
        in one layer, as the model has made them.
    """

    shared: int
    own: int
    peak: int
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
        return max(self.shared + branches * (self.peak + self.moving), reading)


def row_bytes(
    cache: Cache,
    config: PretrainedConfig,
    *,
    prompt: int,
    generated: int,
    dtype: torch.dtype,
) -> RowBytes:
    """Compute what a row takes in a cache that has read its prompt and so many tokens more.

    Counts what `report().total_bytes` counts but for `table_bytes`: keys, values, positions,
    statistics, and the queries that are kept for scoring, with the slots that the pools allocate in
    advance; sliding-window layers of hybrids too. A batch of equal rows takes as many times that.
    In a batch of unequal rows a `DynamicCache` pads all to the longest; so does the room of a cache
    without budget.

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
    tokens (within 2% where the bound has room for 40 tokens beyond the least). A limit of `risk`
    may keep more than the windows' share. Left out are probes' shadows (CPU memory), the few bytes
    that only Triton's kernels and recorded steps need, and, until the first token is fed, the
    positions that `held_positions` reports of a prompt that was cut.
    """
    reading = layer_rows(cache, config, prompt=prompt, generated=0, dtype=dtype)
    layers = layer_rows(cache, config, prompt=prompt, generated=generated, dtype=dtype)
    dense = max(layer.new_token for layer in layers) * prompt
    return RowBytes(
        shared=sum(layer.shared for layer in layers),
        own=sum(layer.own for layer in layers),
        peak=sum(layer.peak for layer in layers),
        moving=max(layer.own if layer.moves else 0 for layer in layers),
        prompt=sum(layer.shared + layer.own for layer in reading) + dense,
    )


def layer_rows(
    cache: Cache, config: PretrainedConfig, *, prompt: int, generated: int, dtype: torch.dtype
) -> list[LayerRow]:
    """Describe every layer for one row; see `row_bytes`, which sums them up."""
    for name, value, low in (("prompt", prompt, 1), ("generated", generated, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name}: expected an integer >= {low}, got {shown(value)}.")
    decoder = config.get_text_config(decoder=True)
    ours = {layer.index: layer for layer in getattr(cache, "own_layers", ())}
    lengths = (decoder, prompt, generated, dtype)
    return [
        LayerRow.of(ours[index], *lengths)
        if index in ours
        else LayerRow.of_stock(layer, index, *lengths)
        for index, layer in enumerate(cache.layers)
    ]
