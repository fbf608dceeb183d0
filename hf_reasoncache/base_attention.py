"""The attention implementations of transformers that ours extend, called as models call them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def run_base(
    base: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as the base implementation does: its output, and its weights if it computes any."""
    unknown_to_sdpa = kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None
    if base == "sdpa" and unknown_to_sdpa:
        # sdpa drops sinks without a word and refuses softcap; the model's own eager code honours
        # both.
        base, mask = "eager", _additive(mask, query, key)
    function: Callable[..., Any] = (
        _eager_of(module) if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
    )
    caller: Any = module
    if base == "flash_attention_2":
        # It loads the kernel that the config names, and ours is no kernel's name.
        caller = _View(module, config=_View(module.config, _attn_implementation=base))
    return function(caller, query, key, value, mask, *args, **kwargs)


class _View:
    """Another object with some attributes replaced; the object itself stays as it is."""

    def __init__(self, target: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _eager_of(module: torch.nn.Module) -> Callable[..., Any]:
    modeling = sys.modules[type(module).__module__]
    function = getattr(modeling, "eager_attention_forward", None)
    if function is None:
        raise ValueError(
            f"{type(module).__name__}: expected an eager_attention_forward in {modeling.__name__}, "
            "got none; use attn_implementation='reasoncache'."
        )
    return function


def _additive(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """Turn sdpa's mask (None or bool) into eager's (added to the logits)."""
    steps, length = query.shape[2], key.shape[2]
    if mask is None:
        if steps == 1:
            return None
        # sdpa leaves the mask out when plain causality does, aligned at the first key.
        mask = torch.ones(steps, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill_(~mask, torch.finfo(query.dtype).min)
