"""What autocast may lower: what the model brings, as in every attention; nothing that we compute.

Under autocast, rotary embeddings leave keys in float32 while values come in a lower type, and
attention casts all that it reads, all keys at every step. A pool takes new tokens in that type at
once: the same numbers, read without a cast and held in half the bytes. Scores, sums, the risk and
the joining of partial results are float32 on purpose and run without autocast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

# Every layer asks several times per step.
_is_available = cache(torch.amp.is_autocast_available)
_NOTHING = nullcontext()


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    kind = device.type
    return _is_available(kind) and torch.is_autocast_enabled(kind)


def as_attended(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return queries, keys or values of one device in the type in which attention reads them."""
    device = tensors[0].device
    if not autocasts(device):
        return tensors
    lower = torch.get_autocast_dtype(device.type)
    # Autocast leaves float64 alone.
    return tuple(x if x.dtype == torch.float64 else x.to(lower) for x in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which types on a device are what they seem; nearly free without."""
    if not autocasts(device):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)
