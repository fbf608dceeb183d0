"""The "reasoncache" attention and mask functions: from a model's queries to a layer's pool.

One pair per base implementation. With a foreign cache, or none, each behaves exactly as its base.
With one of our caches, the first forward runs the base on the dense keys and values, and later
forwards attend to the pool. Where a model caches latents, queries are moved into their space, and
what attention makes of the latents is turned into outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_reasoncache.base_attention import run_base
from hf_reasoncache.geometry import head_shape
from hf_reasoncache.guards import GuardTensor, LogicalLength, MaskReader, OnFailure
from hf_reasoncache.latents import UpProjection
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.precision import as_attended, without_autocast
from hf_reasoncache.shards import ALONE, Shard, find_shard, in_several_processes
from hf_reasoncache.sliding import RingLength
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.weights_and_gradients import asks_for_weights, require_weights, without_gradient

BASES = {
    "reasoncache": "sdpa",
    "reasoncache_eager": "eager",
    "reasoncache_fa2": "flash_attention_2",
}
"""Attention implementations that our caches work with, and the base that each one extends."""


@dataclass(eq=False)
class LogicalMask:
    """The mask of one forward over one of our caches, built only as far as somebody asks.

    Memory of what was evicted lives in the layers, so the mask only knows the tokens as the model
    counts them.

    Attributes
    ----------
    base : str
        Name of the base implementation.
    arguments : dict
        What transformers passed to the mask function.
    cache : MaskReader
        The cache that it is for.
    device : torch.device or None
        Where the layers run that it is for; None for where the arguments are.
    new : BoolTensor[B, T] or None
        Which new tokens are real; None when all are.
    made : dict
        What was built, by name and device; shared by the masks for all devices. They do not refer
        to each other: in a cycle, a dense mask of a long prompt would stay until it is found.
    """

    base: str
    arguments: dict[str, Any]
    cache: MaskReader
    device: torch.device | None = None
    new: torch.Tensor | None = None
    made: dict[tuple[str, torch.device | None], Any] = field(default_factory=dict)

    @property
    def dense(self) -> Any:
        """The base implementation's mask over all tokens seen."""
        return self._made("dense", self._build_dense)

    @property
    def valid(self) -> torch.Tensor | None:
        """`new` on the layer's device."""
        valid: torch.Tensor | None = self._made("valid", lambda: self.new)
        return valid

    def _made(self, name: str, build: Callable[[], Any]) -> Any:
        """What `build` answers, on this mask's device; built and moved once in a forward."""
        if (name, None) not in self.made:
            self.made[name, None] = build()
        if (name, self.device) not in self.made:
            source = self.made[name, None]
            self.made[name, self.device] = None if source is None else source.to(self.device)
        return self.made[name, self.device]

    def _build_dense(self) -> Any:
        arguments = self.arguments | {"kv_length": int(self.arguments["kv_length"])}
        return ALL_MASK_ATTENTION_FUNCTIONS[self.base](**arguments)

    @property
    def is_plain(self) -> bool:
        """Whether the pattern is causality and padding only."""
        return not self.arguments.get("use_vmap", False)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> LogicalMask:
        """Return the mask for layers on a device (accelerate moves every argument of a layer).

        Nothing is moved before a layer asks for it, and then once for all layers on that device.
        """
        return replace(self, device=torch.device(device))

    def __getitem__(self, index: Any) -> LogicalMask:
        """Return the mask itself: models slice off rows that a cache of static size would add."""
        return self


def mask_function(*, base: str, **arguments: Any) -> Any:
    """Answer for a mask function of transformers.

    Returns
    -------
    LogicalMask
        If the mask is for one of our layers.
    Tensor, BlockMask or None
        Otherwise, whatever `base` answers, about a ring where a captured step has one.
    """
    length = arguments["kv_length"]
    if isinstance(length, LogicalLength):
        new = length.cache.see_mask(arguments["attention_mask"], arguments["q_length"])
        return LogicalMask(base, arguments, length.cache, new=new)
    if isinstance(length, RingLength):
        return length.layer.mask(base, arguments)
    return ALL_MASK_ATTENTION_FUNCTIONS[base](**arguments)


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    base: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as transformers' attention functions do.

    Parameters
    ----------
    module : Module
        The attention module of the model.
    query : Tensor[B, H_q, T, D]
    key, value : GuardTensor or Tensor[B, H_kv, N, D]
        Guarded if they come from one of our layers, unless the model has made them of its latents.
    attention_mask
        What `mask_function` returned.
    base : str
        Name of the base implementation.

    Returns
    -------
    output : Tensor[B, T, H_q, D_v]
        The first forward gives gradients as its base does; later ones answer a backward pass with
        an error, as no gradient flows through a pool.
    weights : Tensor or None
        As its base does in the first forward; later only if they are asked for.

    Raises
    ------
    ValueError
        If the model needs something of attention that the pool cannot give.
    """
    mask = attention_mask
    if isinstance(key, GuardTensor):
        found: tuple[CacheLayer, OnFailure] | None = key.layer, key.on_failure
    elif isinstance(mask, LogicalMask):
        found = mask.cache.announced(getattr(module, "layer_idx", None))
    else:
        found = None
    if found is None:
        mask = mask.dense if isinstance(mask, LogicalMask) else mask
        return run_base(base, module, query, key, value, mask, *args, **kwargs)
    layer, on_failure = found
    try:
        return _attend(module, query, key, value, layer, mask, *args, base=base, **kwargs)
    except Exception as error:
        on_failure(error)
        raise


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: CacheLayer,
    attention_mask: Any,
    *args: Any,
    base: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_function` with one of our layers."""
    if not isinstance(attention_mask, LogicalMask):
        raise ValueError(
            f"layer {layer.index}: expected a 2-D padding mask or none, got a mask that was "
            "prepared outside the model; pass attention_mask with shape [batch, tokens]."
        )
    if kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"layer {layer.index}: expected full attention, got a sliding window of "
            f"{kwargs['sliding_window']} on a layer that the config calls full_attention; this "
            "model is not supported."
        )
    begins = not layer.is_initialized
    if not begins and query.shape[2] > 1 and not attention_mask.is_plain:
        raise ValueError(
            f"layer {layer.index}: expected causal attention after the first forward, got a "
            "model-specific mask pattern over several tokens; feed such a prompt in one forward."
        )
    if begins:
        _require_layers(module, layer)
    weighs = asks_for_weights(module, layer, kwargs)
    if weighs:
        require_weights(layer, base)
    announced = layer.take_incoming()
    # Latents have been expanded since; what was guarded comes back without its guard.
    keys, values = (key, value) if layer.rank else announced
    scaling = kwargs.get("scaling")
    settings: dict[str, Any] = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": kwargs.get("softcap"),
        "s_aux": kwargs.get("s_aux"),
    }
    asking, *stored = as_attended(query.detach(), *(x.detach() for x in announced))
    if layer.rank:
        asking, *stored = _as_latents(module, layer, asking, *stored)
    valid = None if attention_mask.new is None else attention_mask.valid
    new = NewTokens(asking, stored[0], stored[1], valid, settings)
    if begins:
        layer.shard = _shard(module, layer, query, stored[0].shape[1])
        result = run_base(base, module, query, keys, values, attention_mask.dense, *args, **kwargs)
        layer.differentiable = result[0].requires_grad
        with without_autocast(query.device):
            layer.store_first(new)
        return result
    if query.shape[2] > 1:
        _expect_continuation(layer, attention_mask, query.shape[2], kwargs.get("position_ids"))
    with without_autocast(query.device):
        out = layer.attend(new)
        if layer.rank:
            out = layer.projection.expand(out)
    weights = None
    if weighs:
        dense = _dense(module, layer)
        _, weights = run_base(base, module, query, *dense, attention_mask.dense, *args, **kwargs)
    if torch.is_grad_enabled():
        out = without_gradient(out, layer, query, keys, values)
    return out, weights


def _require_layers(module: Any, layer: CacheLayer) -> None:
    """Raise ValueError if the model has another number of layers than the cache."""
    found = module.config.get_text_config(decoder=True).num_hidden_layers
    if layer.layers not in (0, found):
        raise ValueError(
            f"expected a model of {layer.layers} layers, as in the config of this cache, got one "
            f"of {found}; make the cache from this model's config."
        )


def _expect_continuation(
    layer: CacheLayer, mask: LogicalMask, q_len: int, positions: torch.Tensor | None
) -> None:
    """Warn, once in a forward, if several new tokens begin at position 0 over tokens held."""
    known = ("continues", None)
    if positions is None or positions.dim() != 2 or known in mask.made:
        return
    mask.made[known] = True
    if mask.valid is not None:
        # Padding has any position; rows that are nothing else do not begin again.
        positions = positions.masked_fill(~mask.valid.to(positions.device), 1)
    if bool((positions.amin(-1) == 0).all()) and bool(layer.held().any()):
        warnings.warn(
            f"expected the new tokens to continue the {layer.seen - q_len} that the cache has "
            f"seen, got {q_len} whose positions begin at 0 again: is this another prompt, or "
            "assisted decoding over a used cache, to which transformers feeds the whole text "
            "again? reset() the cache, or use a new one.",
            UserWarning,
            stacklevel=2,
        )


def _as_latents(
    module: Any, layer: CacheLayer, query: torch.Tensor, latents: torch.Tensor, rotary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values in the space of latents.

    Parameters
    ----------
    query : Tensor[B, H_q, T, D_nope + D_rope]
    latents, rotary : Tensor[B, 1, T, R], Tensor[B, 1, T, D_rope]

    Returns
    -------
    query : Tensor[B, H_q, A, R + D_rope]
        Of those tokens that are asked for, see `CacheLayer.first_queries`.
    keys, values : Tensor[B, 1, T, R + D_rope], Tensor[B, 1, T, R]
    """
    if layer.projection is None:
        layer.projection = UpProjection(module, latents, query.dtype)
    if not layer.is_initialized:
        query = query[:, :, query.shape[2] - layer.first_queries(query.shape[2]) :]
    with without_autocast(query.device):
        keys = torch.cat([latents, rotary], dim=-1)
        return layer.projection.absorb(query), keys, keys[..., : layer.rank]


def _dense(module: Any, layer: CacheLayer) -> tuple[Any, Any]:
    """All keys and values of a layer that keeps every token, as its model's attention has them."""
    held: tuple[Any, Any] = layer.keys, layer.values
    return module.expand_kv(*held) if layer.rank else held


def _shard(module: Any, layer: CacheLayer, query: torch.Tensor, heads: int) -> Shard:
    """Which of the layer's KV heads are the `heads` that this process has computed."""
    if not in_several_processes():
        return ALONE
    decoder = module.config.get_text_config(decoder=True)
    if layer.rank and query.shape[1] != decoder.num_attention_heads:
        raise ValueError(
            f"layer {layer.index}: expected all heads of a layer with latents in one process, got "
            f"{query.shape[1]} of {decoder.num_attention_heads} (tensor parallelism), each of "
            "which would evict other latents; use a device_map, or DynamicCache."
        )
    return find_shard(module, heads, head_shape(decoder, layer.index)[0], layer.tp_mode)


def register() -> None:
    """Register the functions under the names in `BASES`; doing it again changes nothing."""
    for name, base in BASES.items():
        AttentionInterface.register(name, partial(attention_function, base=base))
        AttentionMaskInterface.register(name, partial(mask_function, base=base))
