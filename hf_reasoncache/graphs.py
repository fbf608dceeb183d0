"""Decode steps as CUDA graphs: the launches of a step, recorded once and repeated as one.

Between two evictions a step of our caches has static shapes, allocates nothing that stays and never
waits for the device: positions and lengths are counted there. What an eager forward costs the host,
dozens of launches per layer, then shrinks to one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.releases import cache_kwarg, take_cache
from triton_ops.backend import chosen
from triton_ops.layout import RaggedLayout


class Recorder(Protocol):
    """Something that can run a step, and repeat it later on the same memory."""

    def record(self, step: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        """Run `step`; return its result and what runs it again and overwrites that result."""


class CudaRecorder:
    """Records CUDA graphs, one after another in the same memory.

    Parameters
    ----------
    device : device, optional
        Where the steps run; by default the current device when the first one is recorded.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.CUDAGraph | None = None

    def record(self, step: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        """See `Recorder.record`; what an earlier graph returned must no longer be needed."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            # The pool is allocated while recording, when the allocator can take nothing back.
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # The earlier graph lives until this one shares its pool: a pool without graphs is gone.
        pool = None if self._last is None else self._last.pool()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # `torch.cuda.graph` would empty the allocator's cache at each recording, forbid other
        # threads to allocate, and leave its stream current when a recording fails.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                result = step()
            finally:
                graph.capture_end()
        self._last = graph
        # Recording launches nothing.
        graph.replay()
        return result, graph.replay


class DecodeGraphs:
    """A model's forward with one of our caches: single tokens from a graph, the rest as it was.

    Attributes
    ----------
    recorded, replayed, eager : int
        Single-token steps that were recorded, repeated, and run without a graph.
    """

    def __init__(self, forward: Callable[..., Any], cache: ReasonCache, recorder: Recorder) -> None:
        self.forward, self.cache, self.recorder = forward, cache, recorder
        self.recorded = self.replayed = self.eager = 0
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._recording: tuple[list[Any], Any, Callable[[], object]] | None = None
        self._last: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, from a graph if it can be."""
        settings = dict(kwargs)
        if args or take_cache(settings) is not self.cache or not self._is_step(settings):
            return self.forward(*args, **kwargs)
        if self.cache.see_mask(settings.pop("attention_mask", None), 1) is not None:
            # Some rows get no token; a graph would store one.
            self.eager += 1
            return self.forward(**kwargs)
        # What the mask hides is in no pool now.
        ids, positions = settings.pop("input_ids"), settings.pop("position_ids", None)
        self._place(ids, positions)
        layers = self.cache.own_layers
        self.cache.evict_due()
        for layer in layers:
            layer.prepare()
        parts = [*self._inputs, *(part for layer in layers for part in layer.static_parts())]
        parts += sorted(settings.items())
        result = self._step(parts, functools.partial(self._run, settings))
        self._last = _remember(parts)
        # The next step overwrites what this one returns.
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, result)

    def _step(self, parts: list[Any], run: Callable[[], Any]) -> Any:
        if self._recording is not None and _same(self._recording[0], parts):
            for layer in self.cache.own_layers:
                layer.advance()
            self._recording[2]()
            self.replayed += 1
            return self._recording[1]
        self._recording = None
        if not _same(self._last, parts):
            # New memory, an eviction's for instance: a step as usual, after which all that is made
            # once has been made, and the next one can be recorded.
            self.eager += 1
            return run()
        result, replay = self.recorder.record(run)
        self._recording = (_remember(parts), result, replay)
        self.recorded += 1
        return result

    def _run(self, settings: dict[str, Any]) -> Any:
        ids, positions, clock = self._inputs
        for layer in self.cache.own_layers:
            layer.store.clock = clock
        try:
            return self.forward(
                input_ids=ids, position_ids=positions, **cache_kwarg(self.cache), **settings
            )
        finally:
            for layer in self.cache.own_layers:
                layer.store.clock = None

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward with our cache brings one token per row to what it holds already."""
        ids = kwargs.get("input_ids")
        first = self.cache.own_layers[0]
        known, mask = ("input_ids", "position_ids", "attention_mask"), kwargs.get("attention_mask")
        others = [value for name, value in kwargs.items() if name not in known]
        return (
            isinstance(ids, torch.Tensor)
            and ids.shape == (first.rows, 1)
            and not first.record_past
            and not first.expects_prompt
            and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2))
            and not any(isinstance(value, torch.Tensor) for value in others)
        )

    def _place(self, ids: torch.Tensor, positions: torch.Tensor | None) -> None:
        """Put what a step reads where the graph reads it."""
        seen = self.cache.own_layers[0].seen
        if positions is None:
            positions = torch.full_like(ids, seen)
        shapes = [tensor.shape for tensor in self._inputs[:2]]
        if shapes != [ids.shape, positions.shape]:
            clock = torch.zeros(1, dtype=torch.long, device=ids.device)
            self._inputs = (torch.empty_like(ids), torch.empty_like(positions), clock)
        self._inputs[0].copy_(ids)
        self._inputs[1].copy_(positions)
        self._inputs[2].fill_(seen)


def _remember(parts: list[Any]) -> list[Any]:
    """Note which objects these are, without keeping a pool alive that is about to be replaced."""
    kept = (torch.Tensor, RaggedLayout)
    return [weakref.ref(part) if isinstance(part, kept) else part for part in parts]


def _same(before: list[Any], now: list[Any]) -> bool:
    """Whether these are the objects that were remembered, and everything else is equal."""
    return len(before) == len(now) and all(
        old() is new if isinstance(old, weakref.ref) else old == new
        for old, new in zip(before, now, strict=True)
    )


@contextmanager
def decode_graphs(
    model: torch.nn.Module, cache: ReasonCache, *, recorder: Recorder | None = None
) -> Iterator[DecodeGraphs]:
    """Let a model decode from CUDA graphs inside a `with` block.

    The prompt and every other forward of several tokens run as before. A single-token step is
    recorded once and then repeated; evictions run between two repetitions. An eviction that gives
    the heads other budgets moves the pool, and two steps later a new graph is recorded. The tokens
    are those of a generation without graphs.

    Parameters
    ----------
    model : PreTrainedModel
        On one GPU.
    cache : ReasonCache
        The cache of the generation; other caches are not touched.
    recorder : Recorder, optional
        Records CUDA graphs by default.

    Yields
    ------
    DecodeGraphs
        Counts the steps that were recorded, repeated and run as usual.

    Raises
    ------
    ValueError
        If the model has layers that are not ours, is not on one GPU, or the kernels do not run.

    Examples
    --------
    >>> with decode_graphs(model, cache) as graphs:
    ...     out = model.generate(**inputs, past_key_values=cache, max_new_tokens=16384)
    >>> print(graphs.recorded, graphs.replayed, graphs.eager)

    Notes
    -----
    A mask is looked at before each step, which waits for the device once; a batch without padding
    has none. Beam search moves the rows at every step and gains nothing. A forward
    that reads a value from the device (rotary embeddings of type "dynamic", some
    mixtures of experts) cannot be recorded; CUDA says so.
    """
    foreign = {type(each).__name__ for each in cache.foreign_layers}
    if foreign:
        raise ValueError(
            "decode_graphs: expected a model of full-attention layers only, got layers of "
            f"transformers ({', '.join(sorted(foreign))}), which change shape at every step; "
            "generate without graphs."
        )
    parameters = list(model.parameters())
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or (recorder is None and next(iter(devices)).type != "cuda"):
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"decode_graphs: expected a model on one CUDA device, got {names}; move the model to "
            "one GPU, or generate without graphs."
        )
    if chosen(parameters[0].device, parameters[0].dtype) != "triton":
        raise ValueError(
            "decode_graphs: expected the Triton backend, got torch, whose attention reads lengths "
            "on the host; choose 'auto' or 'triton' and float32, float16 or bfloat16."
        )
    own, forward = model.__dict__.get("forward"), model.forward
    graphs = DecodeGraphs(forward, cache, recorder or CudaRecorder(parameters[0].device))

    @functools.wraps(forward)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return graphs(*args, **kwargs)

    model.forward = replaced
    try:
        yield graphs
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own
