"""Memory of a cache while the model reads a prompt: what is held, and what that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache, LlamaForCausalLM

from examples.benchmarks.workload import Work, held_bytes
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.releases import cache_kwarg


@dataclass(frozen=True)
class PrefillMemory:
    """Bytes of one cache during one prompt.

    Attributes
    ----------
    dtype, name : str
    resident : int
        Held when the prompt has been read.
    peak_held : int
        Most that was held right after the attention of some layer.
    peak_allocated : int
        Most that the cache's own code had allocated at any time, scratch included.
    bound : int or None
        Keys and values of budget plus buffer in all layers, and of the whole prompt in one; None
        where no budget was given.
    """

    dtype: str
    name: str
    resident: int
    peak_held: int
    peak_allocated: int
    bound: int | None


class Allocations(TorchDispatchMode):
    """Counts the storages that operators allocate while it is on, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = _storage(tensor)
            if storage._cdata not in given:
                self._sizes[StorageWeakRef(storage)] = storage.nbytes()
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._sizes.values()))
        return out


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    # A guarded tensor answers no method but those of its metadata.
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage()


def _under(mode: Allocations, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return method(*args, **kwargs)

    return call


def measure_prefill(model: LlamaForCausalLM, work: Work) -> list[PrefillMemory]:
    """Read one prompt of `work.context` random tokens with each cache, through the real model."""
    shape = work.shape
    bound = shape.layers * shape.kv_bytes(work.budget + work.buffer, work.batch, work.dtype)
    bound += shape.kv_bytes(work.context, work.batch, work.dtype)
    compressed = ReasonAllocCache(
        model.config, budget=work.budget, buffer=work.buffer, protect=False
    )
    return [
        _measure("DynamicCache", "sdpa", DynamicCache(config=model.config), None, model, work),
        _measure(f"budget={work.budget}", "reasoncache", compressed, bound, model, work),
    ]


def _measure(
    name: str, attention: str, cache: Cache, bound: int | None, model: LlamaForCausalLM, work: Work
) -> PrefillMemory:
    model.set_attn_implementation(attention)
    mode, held = Allocations(), [0]
    for layer in cache.layers:
        # The cache's code and nothing else: activations are the same whichever cache runs.
        for entry in ("update", "store_first"):
            if hasattr(layer, entry):
                setattr(layer, entry, _under(mode, getattr(layer, entry)))
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_: held.append(held_bytes(cache)))
        for layer in model.model.layers
    ]
    generator = torch.Generator().manual_seed(work.seed)
    size = (work.batch, work.context)
    prompt = torch.randint(work.shape.vocabulary, size, generator=generator)
    try:
        model(input_ids=prompt, **cache_kwarg(cache), use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    dtype = str(work.dtype).removeprefix("torch.")
    return PrefillMemory(dtype, name, held_bytes(cache), max(held), mode.peak, bound)
