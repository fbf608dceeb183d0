"""Transformers' own cache over keys and values, or latents, in 8 bits, and what these leave.

Written without the package: `torch.float8_e4m3fn` rounds, and everything is held in the model's
type, so that only the numbers are those of `storage="fp8"`.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def rounded(x):
    """What a token in 8 bits is read as: Tensor[..., D], a scale per row."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 448).to(x.dtype)
    scale = torch.where(scale > 0, scale, 1)
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def as_held(storage, latents, keys, values):
    """Keys and values, or latents and rotary keys, as a cache of that storage reads them."""
    if latents:
        return rounded(torch.cat([keys, values], -1)).split([keys.shape[-1], values.shape[-1]], -1)
    return (
        rounded(keys) if storage in ("fp8", "fp8-keys") else keys,
        rounded(values) if storage in ("fp8", "fp8-values") else values,
    )


class RoundedLayer(DynamicLayer):
    """A `DynamicLayer` that holds what 8 bits leave; its first forward attends to all of it."""

    def __init__(self, storage, latents):
        super().__init__()
        self.storage, self.latents = storage, latents

    def update(self, key_states, value_states, *args, **kwargs):
        begins = not self.is_initialized
        held = as_held(self.storage, self.latents, key_states, value_states)
        found = super().update(*held, *args, **kwargs)
        return (key_states, value_states) if begins else found


def stock_cache(model, storage=None):
    """`DynamicCache`, its full-attention layers rounded like a cache of that storage."""
    cache = DynamicCache(config=model.config)
    if storage is None:
        return cache
    latents = bool(getattr(model.config, "kv_lora_rank", None))
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = RoundedLayer(storage, latents)
    return cache
