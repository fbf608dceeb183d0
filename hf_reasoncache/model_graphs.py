"""CUDA graphs for a model: its forward asks each cache that it is given whether it has a graph."""

from __future__ import annotations

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.graphs import CudaRecorder, DecodeGraphs, Recorder, obstacle_of
from hf_reasoncache.releases import take_cache
from triton_ops.backend import chosen

RecorderFactory = Callable[[torch.device], Recorder]

_SWITCHING = threading.Lock()


class PlainForward:
    """The forward of a model, which it does not keep alive.

    Parameters
    ----------
    model : Module
    own : Callable or None
        What the model had as its attribute `forward`, a hook of accelerate for instance; None for
        the forward of its class.
    """

    def __init__(self, model: torch.nn.Module, own: Callable[..., Any] | None) -> None:
        self.own = own
        self._model = weakref.ref(model)

    @property
    def model(self) -> torch.nn.Module:
        """The model; ReferenceError if it is gone."""
        model = self._model()
        if model is None:
            raise ReferenceError("expected a model, got one that has been deleted.")
        return model

    @property
    def method(self) -> Callable[..., Any]:
        """The forward itself."""
        model = self.model
        return types.MethodType(type(model).forward, model) if self.own is None else self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        return self.method(*args, **kwargs)


class GraphedForward:
    """A model's forward whose steps with our caches come from graphs, cache by cache.

    One stands in a model however often graphs are asked for, so that generations which overlap, in
    threads or one inside another, take nothing from each other. A copy of the model, or one that
    comes from a file, has one of its own that has recorded nothing.

    Attributes
    ----------
    make_recorder : RecorderFactory or None
        Makes what records the steps of a cache that nobody has named; None where such caches have
        no graphs.
    """

    def __init__(self, model: torch.nn.Module, own: Callable[..., Any] | None) -> None:
        self.plain = PlainForward(model, own)
        # `generate` looks at what a forward takes.
        self.__signature__ = inspect.signature(self.plain.method)
        self.make_recorder: RecorderFactory | None = None
        self._named: weakref.WeakKeyDictionary[ReasonCache, DecodeGraphs] = (
            weakref.WeakKeyDictionary()
        )
        self._found: weakref.WeakKeyDictionary[ReasonCache, DecodeGraphs] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.plain.model, self.plain.own, self.make_recorder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, from a graph if it can be."""
        graphs = None if torch.compiler.is_compiling() else self._graphs_of(kwargs)
        return (self.plain if graphs is None else graphs)(*args, **kwargs)

    def _graphs_of(self, kwargs: dict[str, Any]) -> DecodeGraphs | None:
        cache = take_cache(dict(kwargs))
        if not isinstance(cache, ReasonCache):
            return None
        graphs = self._named.get(cache)
        if graphs is None and self.make_recorder is not None and cache.graphs == "auto":
            graphs = self._found.get(cache)
            if graphs is None:
                graphs = self._found[cache] = self._open(cache, self.make_recorder)
        return graphs

    def _open(self, cache: ReasonCache, make_recorder: RecorderFactory) -> DecodeGraphs:
        device = next(self.plain.model.parameters()).device
        needs_cuda = make_recorder is CudaRecorder
        # A closure over the model would keep it alive.
        obstacle = functools.partial(_obstacle, self.plain, needs_cuda=needs_cuda)
        return DecodeGraphs(
            self.plain,
            cache,
            _Later(functools.partial(make_recorder, device)),
            falls_back=True,
            obstacle=obstacle,
        )

    def name(self, cache: ReasonCache, recorder: Recorder) -> DecodeGraphs:
        """Give a cache graphs until `forget`, whatever its own setting is."""
        graphs = self._named[cache] = DecodeGraphs(self.plain, cache, recorder)
        return graphs

    def forget(self, cache: ReasonCache) -> None:
        """Take the graphs of a cache away that was named."""
        self._named.pop(cache, None)

    def drop(self) -> None:
        """Free the graphs of caches that nobody has named."""
        self._found.clear()

    @property
    def is_idle(self) -> bool:
        """Whether no cache can have a graph."""
        return self.make_recorder is None and not self._named


class _Later:
    """A recorder that is made when the first step is recorded."""

    def __init__(self, make: Callable[[], Recorder]) -> None:
        self._make = make
        self._recorder: Recorder | None = None

    def record(self, step: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        """See `Recorder.record`."""
        if self._recorder is None:
            self._recorder = self._make()
        return self._recorder.record(step)


def _restored(
    model: torch.nn.Module, own: Callable[..., Any] | None, make: RecorderFactory | None
) -> GraphedForward:
    """Make the forward of a copied model."""
    forward = GraphedForward(model, own)
    forward.make_recorder = make
    return forward


def _obstacle(plain: PlainForward, cache: ReasonCache, *, needs_cuda: bool) -> str | None:
    """Say what keeps the steps of a model with a cache from being recorded."""
    model = plain.model
    reason = obstacle_of(cache)
    if reason is not None:
        return reason
    config = getattr(model, "config", None)
    if config is not None:
        decoder = config.get_text_config(decoder=True)
        if "chunked_attention" in (getattr(decoder, "layer_types", None) or ()):
            return "expected windows that slide, got chunked attention, whose mask counts padding"
        sliding = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
        if sliding and decoder._attn_implementation == "reasoncache_fa2":
            return (
                "expected 'reasoncache' or 'reasoncache_eager' beside sliding windows, got "
                "'reasoncache_fa2', which counts the keys on the host"
            )
    parameters = list(model.parameters())
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or (needs_cuda and next(iter(devices)).type != "cuda"):
        return f"expected a model on one CUDA device, got {', '.join(sorted(map(str, devices)))}"
    if chosen(parameters[0].device, parameters[0].dtype) != "triton":
        return "expected the Triton backend, got torch, which reads lengths on the host"
    return None


_REMEDY = (
    "generate without graphs, or change that: one GPU, float32, float16 or bfloat16, "
    "the backend 'auto' or 'triton'"
)


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model whose forward `generate` calls, inside of PEFT's wrappers."""
    if "_orig_mod" in model._modules:
        raise ValueError(
            "graphs: expected a model, got the result of torch.compile, which our caches do not "
            "support; pass the model itself."
        )
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) else model


def _forward_of(model: torch.nn.Module) -> GraphedForward:
    """Return the forward that stands in a model, put there if it has none of ours."""
    own = model.__dict__.get("forward")
    if isinstance(own, GraphedForward):
        return own
    forward = GraphedForward(model, own)
    model.forward = forward
    return forward


def _leave(model: torch.nn.Module) -> None:
    """Give a model its own forward back, if nobody needs ours any more."""
    forward = model.__dict__.get("forward")
    # What others have put over ours meanwhile stays, and calls ours.
    if not isinstance(forward, GraphedForward) or not forward.is_idle:
        return
    if forward.plain.own is None:
        del model.forward
    else:
        model.forward = forward.plain.own


def enable_graphs(model: torch.nn.Module, *, make_recorder: RecorderFactory = CudaRecorder) -> None:
    """Let a model decode from CUDA graphs with every cache of ours, from now on.

    The first step after a prompt runs as always, the next is recorded, and all later ones repeat
    it; evictions run in between. The tokens are those of a generation without graphs. Where a step
    cannot be recorded, on a CPU for instance, it runs as always, and `cache.report()` says why.

    Parameters
    ----------
    model : PreTrainedModel
        PEFT may be around it. Doing it again changes nothing.
    make_recorder : Callable[[device], Recorder], optional
        Records CUDA graphs by default.

    Raises
    ------
    ValueError
        If `model` is the result of `torch.compile`.

    Examples
    --------
    >>> enable_graphs(model)
    >>> out = model.generate(**inputs, past_key_values=cache, max_new_tokens=16384)
    >>> print(cache.graph_use)
    recorded 1, replayed 16381, eager 1

    Notes
    -----
    `cache.graphs = "off"` leaves one cache out, `disable_graphs` undoes it. A graph belongs to the
    weights of its generation: a forward of several tokens ends it, and where adapters or weights
    are exchanged without one, `disable_graphs` must. Other caches, and training, are not touched.
    """
    model = _unwrapped(model)
    with _SWITCHING:
        _forward_of(model).make_recorder = make_recorder


def disable_graphs(model: torch.nn.Module) -> None:
    """Undo `enable_graphs`, and free its graphs."""
    model = _unwrapped(model)
    with _SWITCHING:
        forward = model.__dict__.get("forward")
        if isinstance(forward, GraphedForward):
            forward.make_recorder = None
            forward.drop()
            _leave(model)


@contextmanager
def decode_graphs(
    model: torch.nn.Module, cache: ReasonCache, *, recorder: Recorder | None = None
) -> Iterator[DecodeGraphs]:
    """Let a model decode from CUDA graphs with one cache inside a `with` block, or say why not.

    Unlike with `enable_graphs`, what keeps steps from being recorded is an error.

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
        If the model has layers that cannot be recorded, is not on one GPU, or the kernels do not
        run.
    RuntimeError
        Inside the block, if CUDA cannot record a step; the cache is as it was before it.

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
    model = _unwrapped(model)
    plain = PlainForward(model, model.__dict__.get("forward"))
    reason = _obstacle(plain, cache, needs_cuda=recorder is None)
    if reason is not None:
        raise ValueError(f"decode_graphs: {reason}; {_REMEDY}.")
    with _SWITCHING:
        forward = _forward_of(model)
        graphs = forward.name(cache, recorder or CudaRecorder(next(model.parameters()).device))
    try:
        yield graphs
    finally:
        with _SWITCHING:
            forward.forget(cache)
            _leave(model)
