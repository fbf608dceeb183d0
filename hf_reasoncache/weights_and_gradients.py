"""What a caller may ask of attention besides its output, where a pool can give it or not."""

from __future__ import annotations

from typing import Any

import torch

from hf_reasoncache.layer import CacheLayer


def asks_for_weights(module: Any, layer: CacheLayer, kwargs: dict[str, Any]) -> bool:
    """Whether attention weights are to be returned, by an argument or by the model's config."""
    if not layer.is_initialized:
        # Once, in the first forward: a look at a config takes 6 us.
        layer.gives_weights = bool(getattr(module.config, "output_attentions", False))
    asked = kwargs.get("output_attentions")
    return layer.gives_weights if asked is None else bool(asked)


def require_weights(layer: CacheLayer, base: str) -> None:
    """Raise ValueError unless `base` computes weights and the layer holds all they are about."""
    got = None
    if base != "eager":
        got = "another implementation, which computes none"
    elif layer.may_evict:
        got = "a cache that evicts, whose heads hold different tokens"
    if got is not None:
        raise ValueError(
            "output_attentions=True: expected attn_implementation='reasoncache_eager' and a cache "
            f"that keeps every token (budget=None, or SharedBranchCache), got {got}; change that, "
            "or leave output_attentions out."
        )


def without_gradient(out: torch.Tensor, layer: CacheLayer, *inputs: torch.Tensor) -> torch.Tensor:
    """Return the attention to a pool, which holds numbers and no graph.

    Where the model would give `inputs`, or tokens of an earlier forward, a gradient, the result
    answers a backward pass with an error. Forwards in grad mode alone are none: many loops forget
    `torch.no_grad()`.
    """
    layer.differentiable |= any(x.requires_grad for x in inputs)
    if not layer.differentiable:
        return out
    anchor = out.new_zeros((), requires_grad=True)
    refused: torch.Tensor = _NoGradient.apply(out, anchor, layer.index)
    return refused


class _NoGradient(torch.autograd.Function):
    """The identity forward, an error backward."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, anchor: torch.Tensor, index: int) -> torch.Tensor:
        ctx.index = index
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise ValueError(
            f"layer {ctx.index}: expected inference, got a backward pass through attention to "
            "cached tokens, which are stored without a graph; train on whole sequences in one "
            "forward, or with DynamicCache."
        )
