"""What a layer holds besides its tokens, found by looking at everything that it refers to.

Layouts, counts, budgets and logs lie in many small objects, most of them frozen, some with
copies on a device that are made when they are asked for. None is worth a method that lists its
tensors, and a list would miss the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_ELSEWHERE = frozenset({"policy", "settings", "observers", "deduplicator"})
"""Attributes that other layers share, that are the model's, or that a report counts apart."""


def tensors_of(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Yield all tensors that an object refers to, however deep."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = [part for name, part in value.items() if name not in _ELSEWHERE]
    elif isinstance(value, list | tuple | set | frozenset | deque):
        parts = value
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        parts = [vars(value)]
    for part in parts:
        yield from tensors_of(part, seen)
