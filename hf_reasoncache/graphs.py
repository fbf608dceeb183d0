"""Decode steps as CUDA graphs: the launches of a step, recorded once and repeated as one.

Between two evictions a step of our caches has static shapes, allocates nothing that stays and never
waits for the device: positions and lengths are counted there. What an eager forward costs the host,
dozens of launches per layer, then shrinks to one. `model_graphs` brings this to a model.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers.cache_utils import LinearAttentionLayer

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.graph_use import GraphUse
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.messages import shortened
from hf_reasoncache.precision import autocasts
from hf_reasoncache.releases import cache_kwarg, take_cache
from hf_reasoncache.shards import ALONE
from hf_reasoncache.sliding import SlidingLayer

T = TypeVar("T")


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
            except BaseException:
                # What went wrong in the step says more than that the recording is no good.
                with suppress(RuntimeError):
                    graph.capture_end()
                self._give_back_random_numbers()
                raise
            try:
                graph.capture_end()
            except RuntimeError:
                self._give_back_random_numbers()
                raise
        self._last = graph
        # Recording launches nothing.
        graph.replay()
        return result, graph.replay

    def _give_back_random_numbers(self) -> None:
        """Let the generator work after a failed recording, which keeps its state to itself."""
        index = torch.cuda.current_device() if self._device is None else self._device.index
        generator = torch.cuda.default_generators[index or 0]
        generator.graphsafe_set_state(generator.clone_state())


def obstacle_of(cache: ReasonCache) -> str | None:
    """Say what keeps all steps of a cache from being recorded: "expected ..., got ..."."""
    foreign = {
        type(each).__name__
        for each in cache.foreign_layers
        # Not by isinstance: those that join two kinds keep more than either.
        if type(each) not in (SlidingLayer, LinearAttentionLayer)
    }
    if foreign:
        return (
            "expected layers of full, sliding-window or linear attention, got "
            f"{', '.join(sorted(foreign))}"
        )
    if any(layer.observers for layer in cache.own_layers):
        return "expected plain decoding, got probes, whose shadow cannot follow"
    if cache.own_layers[0].shard is not ALONE:
        return "expected all KV heads in one process, got tensor parallelism"
    windows = {layer.sliding_window for layer in _sliding(cache)}
    if len(windows) > 1:
        return f"expected one sliding window, got {sorted(windows)}"
    return None


class DecodeGraphs:
    """A model's forward with one of our caches: single tokens from a graph, the rest as it was.

    Parameters
    ----------
    forward : Callable
        The model's.
    cache : ReasonCache
        Only referred to: it does not live longer for its graphs, nor they for it.
    recorder : Recorder
    falls_back : bool
        Whether a step that cannot be recorded runs without a graph, with all that follow; else the
        error that kept it from being recorded is raised. The cache is as before the step in both.
    obstacle : Callable[[ReasonCache], str or None]
        Asked at the first step after any other forward: what keeps this one from being recorded.

    Attributes
    ----------
    use : GraphUse
        The cache's.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        cache: ReasonCache,
        recorder: Recorder,
        *,
        falls_back: bool = False,
        obstacle: Callable[[ReasonCache], str | None] = obstacle_of,
    ) -> None:
        self.forward, self.recorder, self.falls_back = forward, recorder, falls_back
        self.use: GraphUse = cache.graph_use
        self._cache = weakref.ref(cache)
        self._ask, self._asked = obstacle, False
        self._obstacle: str | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._real: torch.Tensor | None = None
        self._recording: tuple[list[Any], Any, Callable[[], object]] | None = None
        self._last: list[Any] = []

    @property
    def recorded(self) -> int:
        """Single-token steps that were recorded."""
        return self.use.recorded

    @property
    def replayed(self) -> int:
        """Single-token steps that were repeated."""
        return self.use.replayed

    @property
    def eager(self) -> int:
        """Single-token steps that ran without a graph."""
        return self.use.eager

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, from a graph if it can be."""
        settings, cache = dict(kwargs), self._cache()
        if args or cache is None or take_cache(settings) is not cache:
            return self.forward(*args, **kwargs)
        self.use = cache.graph_use
        if not _is_step(cache, settings):
            # Another turn of a chat, for which weights or adapters may have been exchanged.
            self._forget()
            return self.forward(**kwargs)
        reason = self._obstacle_of_step(cache, settings)
        if reason is not None:
            self.use.run_without(reason)
            return self.forward(**kwargs)
        # What the mask hides is in no pool now.
        settings.pop("attention_mask", None)
        try:
            result = self._step(cache, settings)
        except RecordingError as error:
            if not self.falls_back:
                raise error.cause from None
            self._obstacle = shortened(f"recording failed: {error.cause}")
            warnings.warn(
                f"decode steps run without CUDA graphs, {self._obstacle}", UserWarning, stacklevel=2
            )
            self.use.run_without(self._obstacle)
            return self.forward(**kwargs)
        # The next step overwrites what this one returns.
        return _mapped(result, lambda each: cache if each is _CACHE else each)

    def _forget(self) -> None:
        self._recording, self._last, self._asked = None, [], False

    def _obstacle_of_step(self, cache: ReasonCache, settings: dict[str, Any]) -> str | None:
        """Say why a step must run without a graph; afterwards the cache has seen its mask."""
        if not self._asked:
            self._obstacle, self._asked = self._ask(cache), True
        if self._obstacle is not None:
            return self._obstacle
        first, mask = cache.own_layers[0], settings.get("attention_mask")
        if torch.is_grad_enabled():
            return "expected torch.no_grad(), got a step that records gradients"
        if autocasts(first.device):
            return "expected weights in the type of the step, got autocast, which makes copies"
        if any(getattr(layer, "record_past", False) for layer in cache.layers):
            return "expected steps that stay, got a cache that may be cropped after each"
        if first.gives_weights or settings.get("output_attentions"):
            return "expected tokens only, got output_attentions"
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return "expected a 2-D mask, got another one"
        others = {
            name
            for name, value in settings.items()
            if name not in _KNOWN
            and any(isinstance(each, torch.Tensor) for each in pytree.tree_leaves(value))
        }
        if others:
            return f"expected tokens and a mask, got {', '.join(sorted(others))}"
        if cache.see_mask(mask, 1) is not None:
            # A graph would store one in each row.
            return "expected a token in every row, got rows without one"
        return None

    def _step(self, cache: ReasonCache, settings: dict[str, Any]) -> Any:
        """Run a step that can be recorded: repeated, recorded, or as usual ahead of a recording."""
        self._place(cache, settings.pop("input_ids"), settings.pop("position_ids", None))
        layers: list[CacheLayer | SlidingLayer] = [*cache.own_layers, *_sliding(cache)]
        cache.evict_due()
        for layer in layers:
            layer.prepare()
        parts = [*self._inputs, *(part for each in cache.layers for part in _static_parts(each))]
        parts += [torch.is_inference_mode_enabled(), *sorted(settings.items())]
        run = functools.partial(self._run, cache, settings)
        if self._recording is not None and _same(self._recording[0], parts):
            for layer in layers:
                layer.advance()
            self._recording[2]()
            self.use.replayed += 1
            result = self._recording[1]
        elif _same(self._last, parts):
            self._recording = None
            result, replay = self._record(cache, run)
            self._recording = (_remember(parts), result, replay)
            self.use.recorded += 1
        else:
            self._recording = None
            # New memory, an eviction's for instance: a step as usual, after which all that is made
            # once has been made, and the next one can be recorded.
            self.use.run_without()
            result = run()
        self._last = _remember(parts)
        return _mapped(result, lambda each: each.clone() if _is_tensor(each) else each)

    def _record(
        self, cache: ReasonCache, run: Callable[[], Any]
    ) -> tuple[Any, Callable[[], object]]:
        """Record a step; a failure leaves the cache as it was: nothing has run on the device."""
        before = _with_the_same_tensors(cache)
        try:
            return self.recorder.record(run)
        except BaseException as error:
            vars(cache).update(vars(before))
            self.use = cache.graph_use
            self._forget()
            # The answer stays the same until the next forward of several tokens.
            self._asked = True
            if isinstance(error, RuntimeError):
                raise RecordingError(error) from error
            raise

    def _run(self, cache: ReasonCache, settings: dict[str, Any]) -> Any:
        """Run the forward on the tensors that stay; its result without the cache."""
        ids, positions, clock = self._inputs
        sliding = _sliding(cache)
        clocked: list[Any] = [*(layer.store for layer in cache.own_layers), *sliding]
        for each in clocked:
            each.clock = clock
        for layer in sliding:
            layer.real = self._real
        try:
            result = self.forward(
                input_ids=ids, position_ids=positions, **cache_kwarg(cache), **settings
            )
        finally:
            for each in clocked:
                each.clock = None
            for layer in sliding:
                layer.real = None
        # Kept with it, the cache would never be freed.
        return _mapped(result, lambda each: _CACHE if each is cache else each)

    def _place(self, cache: ReasonCache, ids: torch.Tensor, positions: torch.Tensor | None) -> None:
        """Put what a step reads where the graph reads it."""
        first, sliding = cache.own_layers[0], _sliding(cache)
        if positions is None:
            positions = torch.full_like(ids, first.seen)
        shapes = [tensor.shape for tensor in self._inputs[:2]]
        # Tensors that may be written to, wherever the cache came from.
        with torch.inference_mode(False), torch.no_grad():
            if shapes != [ids.shape, positions.shape]:
                clock = torch.zeros(1, dtype=torch.long, device=ids.device)
                self._inputs = (torch.empty_like(ids), torch.empty_like(positions), clock)
                self._real = None
            if sliding and self._real is None:
                shape = (len(ids), sliding[0].sliding_window)
                self._real = torch.ones(shape, dtype=torch.bool, device=ids.device)
            self._inputs[0].copy_(ids)
            self._inputs[1].copy_(positions)
            self._inputs[2].fill_(first.seen)
            if self._real is not None:
                _place_mask(self._real, first.shown, first.seen + 1)


class RecordingError(Exception):
    """A step that could not be recorded, for a reason that PyTorch or CUDA gives.

    Attributes
    ----------
    cause : RuntimeError
    """

    def __init__(self, cause: RuntimeError) -> None:
        super().__init__(str(cause))
        self.cause = cause


_KNOWN = ("input_ids", "position_ids", "attention_mask")
_CACHE = object()
"""Stands for the cache in a result that is kept."""


def _is_step(cache: ReasonCache, settings: dict[str, Any]) -> bool:
    """Whether a forward brings one token per row to what the cache holds already."""
    ids, first = settings.get("input_ids"), cache.own_layers[0]
    return (
        isinstance(ids, torch.Tensor) and ids.shape == (first.rows, 1) and not first.expects_prompt
    )


def _sliding(cache: ReasonCache) -> list[SlidingLayer]:
    return [layer for layer in cache.foreign_layers if isinstance(layer, SlidingLayer)]


def _static_parts(layer: Any) -> Iterator[Any]:
    """Yield the objects that a captured step reads and writes where they are."""
    if not isinstance(layer, LinearAttentionLayer):
        yield from layer.static_parts()
        return
    # They have one shape, and transformers writes them in place.
    for states in (layer.conv_states, layer.recurrent_states):
        yield from (state for state in states.values() if state is not None)


def _place_mask(real: torch.Tensor, shown: torch.Tensor | None, end: int) -> None:
    """Put the newest columns of a mask, BoolTensor[B, end], where they stand in a ring."""
    places = real.shape[1]
    if shown is None:
        real.fill_(True)
        return
    begin = max(end - places, 0)
    turn = end - end % places
    if begin < turn:
        real[:, begin % places :].copy_(shown[:, begin:turn])
    if turn < end:
        real[:, : end - turn].copy_(shown[:, turn:end])


def _is_tensor(each: Any) -> bool:
    return isinstance(each, torch.Tensor)


def _mapped(result: T, change: Callable[[Any], Any]) -> T:
    """Change the tensors, and whatever else has no parts, of a model's output."""
    changed: T = pytree.tree_map(change, result)
    return changed


class _SameTensors(TorchFunctionMode):
    """Lets a deep copy share its tensors with the original."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return args[0]
        return func(*args, **(kwargs or {}))


def _with_the_same_tensors(cache: ReasonCache) -> ReasonCache:
    """Copy all that the host knows of a cache, and nothing of what it holds."""
    with _SameTensors():
        return copy.deepcopy(cache)


def _remember(parts: list[Any]) -> list[Any]:
    """Note which objects these are, without keeping a pool alive that is about to be replaced."""
    return [weakref.ref(part) if isinstance(part, torch.Tensor) else part for part in parts]


def _same(before: list[Any], now: list[Any]) -> bool:
    """Whether these are the objects that were remembered, and everything else is equal."""
    return len(before) == len(now) and all(
        old() is new if isinstance(old, weakref.ref) else old == new
        for old, new in zip(before, now, strict=True)
    )
