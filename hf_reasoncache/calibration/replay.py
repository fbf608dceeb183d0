"""Reading a trace again, in chunks, as if its tokens came one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.releases import cache_kwarg

LONGEST = 256
"""Tokens per forward: bounds the logits, 154 MB a row for a vocabulary of 150k in float32."""


def replay(
    model: PreTrainedModel,
    cache: ReasonCache,
    trace: Trace,
    *,
    rows: int,
    edges: Sequence[int],
    longest: int = LONGEST,
) -> Iterator[torch.Tensor]:
    """Force a trace through a model, the same in every row of a batch.

    The prompt is one forward, as in `generate`. The cache then takes every chunk for a draft, which
    our layers attend to as if its tokens came one by one, evictions between them included. That is
    exact wherever the chunks end; it is fast if evictions fall between chunks.

    Parameters
    ----------
    model : PreTrainedModel
        Runs the "reasoncache" attention.
    cache : ReasonCache
        New.
    trace : Trace
    rows : int
    edges : sequence of int
        Columns, counted from the first of the prompt, at which a chunk ends; those within the
        completion are used. The last token of the completion is not fed: nothing follows it.
    longest : int
        Tokens of the longest chunk.

    Yields
    ------
    Tensor[rows, T, V]
        Logits of each chunk after the prompt.
    """
    begin, last = len(trace.prompt), trace.length - 1
    ids = torch.tensor(trace.prompt + trace.completion, device=model.device)
    ids = ids.expand(rows, -1)
    model(input_ids=ids[:, :begin], **cache_kwarg(cache), use_cache=True, logits_to_keep=1)
    for layer in cache.own_layers:
        layer.activate_past_recording()
    for end in [*sorted({edge for edge in edges if begin < edge < last}), last]:
        while begin < end:
            stop = min(end, begin + longest)
            yield model(input_ids=ids[:, begin:stop], **cache_kwarg(cache), use_cache=True).logits
            begin = stop
