"""What the installed release of transformers calls the cache.

transformers 5.24.0 renamed the argument `past_key_values` to `cache`: in `generate`, in every
model's `forward`, in the mask functions, and in what they return. The old name warns from then on,
and goes in 6.0.0. Whatever passes a cache to transformers, or is passed one by it, asks here.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import transformers
from transformers.generation import GenerateDecoderOnlyOutput

_NAMES = ("cache", "past_key_values")

CACHE_ARGUMENT = next(
    name for name in _NAMES if name in {field.name for field in fields(GenerateDecoderOnlyOutput)}
)
"""The name: "cache" from 5.24.0 on, "past_key_values" before. Outputs have it as an attribute."""


def cache_kwarg(cache: Any) -> dict[str, Any]:
    """Name a cache as the installed release does: `model(input_ids=ids, **cache_kwarg(cache))`."""
    return {CACHE_ARGUMENT: cache}


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Take the cache out of keyword arguments, under whichever name it is there.

    Parameters
    ----------
    kwargs : dict
        Loses both names.

    Returns
    -------
    Cache or None
        None if there is none.

    Raises
    ------
    ValueError
        If there is one under either name.
    """
    given = [cache for name in _NAMES if (cache := kwargs.pop(name, None)) is not None]
    if len(given) > 1:
        raise ValueError(
            "expected one cache, got `cache` and `past_key_values`, two names of one argument; "
            f"pass {CACHE_ARGUMENT}=, as transformers {transformers.__version__} calls it."
        )
    return given[0] if given else None
