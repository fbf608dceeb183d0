"""Reading a trace again, in chunks, as if its tokens came one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from transformers import PreTrainedModel

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.releases import cache_kwarg


def replay(
    model: PreTrainedModel,
    cache: ReasonCache,
    trace: Trace,
    *,
    edges: Collection[int],
    longest: int,
    measured: Collection[int] = (),
    rows: Callable[[], int] = lambda: 1,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Force a trace through a model.

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
    edges : collection of int
        Columns, counted from the first of the prompt, at which a chunk ends; those within the
        completion are used. The last token of the completion is not fed: nothing follows it.
    longest : int
        Tokens of the longest chunk.
    measured : collection of int
        Columns of the completion whose predictions are asked for. The others have no logits, which
        a large vocabulary makes expensive.
    rows : Callable[[], int]
        How often the next chunk is fed.

    Yields
    ------
    end : int
        Column behind the forward, the prompt's first of all. Rows may join the cache before the
        next one.
    logits : Tensor[B, n, V]
        Predictions after the measured columns of this forward.
    """
    begin, last = len(trace.prompt), trace.length - 1
    ids = torch.tensor(trace.prompt + trace.completion, device=model.device)[None]
    model(input_ids=ids[:, :begin], **cache_kwarg(cache), use_cache=True, logits_to_keep=1)
    for layer in cache.own_layers:
        layer.activate_past_recording()
    yield begin, torch.empty(0)
    for edge in [*sorted({edge for edge in edges if begin < edge < last}), last]:
        while begin < edge:
            end = min(edge, begin + longest)
            asked = [column - begin for column in range(begin, end) if column in measured]
            logits = model(
                input_ids=ids[:, begin:end].expand(rows(), -1),
                **cache_kwarg(cache),
                use_cache=True,
                logits_to_keep=torch.tensor(asked, device=ids.device) if asked else 1,
            ).logits
            yield end, logits[:, -len(asked) :] if asked else logits[:, :0]
            begin = end
