"""What a layer hands to transformers so that its attention function finds the way back.

`Cache.update` sees keys and values but no queries and no padding; the attention function sees both
but not the cache. The two objects here bridge that without patching any model. Latents, which a
model expands after `update`, cannot be guarded: from there, the way back is the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

_METADATA = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")]
    + [torch.Tensor.size, torch.Tensor.dim, torch.Tensor.__len__]
)


OnFailure = Callable[[Exception], None]
"""What a cache does when the attention to one of its layers fails."""


def _nothing(error: Exception) -> None:
    """Nothing to undo: the layer belongs to no cache."""


class GuardTensor(torch.Tensor):
    """The new keys or values of one layer, which only our attention function may use.

    The tensor holds the tokens of this forward, not those in the pool. Any computation with it is
    an error, so that a model whose attention implementation was not set fails at once instead of
    attending to too little.

    Attributes
    ----------
    layer : CacheLayer
        The cache layer it came from.
    on_failure : OnFailure
    """

    layer: Any
    on_failure: OnFailure

    @staticmethod
    def wrap(
        keys: torch.Tensor, values: torch.Tensor, layer: Any
    ) -> tuple[GuardTensor, GuardTensor]:
        """Guard keys and values without copying them."""
        guards = keys.as_subclass(GuardTensor), values.as_subclass(GuardTensor)
        for guard in guards:
            guard.layer, guard.on_failure = layer, _nothing
        return guards

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let metadata through and refuse everything else."""
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise foreign_attention(
            f"computes {getattr(func, '__name__', func)} on the cached keys or values",
            "torch.compile traces the forward, or the model changes keys and values after the "
            "cache; neither is supported",
        )


def foreign_attention(got: str, otherwise: str) -> ValueError:
    """Return the error for a model whose attention is not ours.

    Parameters
    ----------
    got : str
        What another implementation does.
    otherwise : str
        What else may be the case.
    """
    return ValueError(
        "This cache needs its own attention implementation: expected the model to run "
        f"'reasoncache' (or 'reasoncache_eager', 'reasoncache_fa2'), got one that {got}. Load the "
        "model with attn_implementation='reasoncache', or call "
        "model.set_attn_implementation('reasoncache') before generating. If that is set already, "
        f"{otherwise}."
    )


class MaskReader(Protocol):
    """A cache, as the mask function and what it returns know it."""

    def announced(self, layer_idx: int | None) -> tuple[Any, OnFailure] | None:
        """Return the layer whose latents a model has expanded since, and what to do on failure."""

    def see_mask(self, mask: torch.Tensor | None, q_len: int) -> torch.Tensor | None:
        """Attend from now on to the columns that a mask shows; return which new ones are real."""


class LogicalLength(int):
    """Number of tokens seen; its type tells our mask function that the layer is ours.

    Attributes
    ----------
    cache : MaskReader
        The cache that the length is of.
    """

    cache: MaskReader
