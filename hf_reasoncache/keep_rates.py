"""How much of some spans a layer still holds."""

from __future__ import annotations

import torch

from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.protection import Spans


def keep_rates(layer: CacheLayer, spans: Spans) -> torch.Tensor:
    """Share of every span's tokens that a layer holds, on average over its heads.

    Returns
    -------
    Tensor[B, S]
        float64, on the CPU; NaN where a row has fewer than `S` spans.

    Raises
    ------
    ValueError
        If the layer holds nothing yet, or the spans are for another number of rows.
    """
    held = layer.held_now()
    if not held:
        raise ValueError("keep_rates: expected a cache that holds tokens, got an empty one.")
    sources = spans.sources(len(held))
    longest = max(map(len, spans.rows))
    rates = torch.full((len(sources), longest), torch.nan, dtype=torch.float64, device="cpu")
    for row, source in enumerate(sources):
        first = int(layer.store.first[row])
        for place, (start, stop) in enumerate(spans.rows[source]):
            span = range(first + start, first + stop)
            kept = sum(column in span for head in held[row] for column in head)
            rates[row, place] = kept / (len(held[row]) * len(span))
    return rates
