"""transformers' text generation pipeline, with a new compressed cache for every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import Cache, PretrainedConfig, PreTrainedModel, TextGenerationPipeline

from hf_reasoncache.attention import BASES
from hf_reasoncache.model_graphs import enable_graphs
from hf_reasoncache.releases import cache_kwarg, take_cache

CacheMaker = Callable[[PretrainedConfig], Cache]
"""Makes a new cache from a model's config: `ReasonAllocCache.policy(budget=1024)`, or a class."""


class ReasonCachePipeline(TextGenerationPipeline):
    """`transformers.TextGenerationPipeline` that gives every batch a cache of its own.

    transformers hands one cache to all prompts of `pipe([...])`, so that each continues the
    prompt before; here no prompt can. Made by `pipeline`.

    Attributes
    ----------
    new_cache : Callable[[PretrainedConfig], Cache]
        Makes the cache of a batch from the model's config.
    cache : Cache or None
        That of the last batch, for its `report()`; None before the first.
    """

    def __init__(self, *args: Any, new_cache: CacheMaker, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.new_cache = new_cache
        self.cache: Cache | None = None

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:  # type: ignore[override]
        if take_cache(generate_kwargs) is not None:
            raise ValueError(
                "expected a call without a cache, since every batch gets a new one, got a cache; "
                "say which with hf_reasoncache.pipeline(..., cache=...)."
            )
        self.cache = self.new_cache(self.model.config)
        return super()._forward(model_inputs, **cache_kwarg(self.cache), **generate_kwargs)


def pipeline(
    model: PreTrainedModel | str,
    tokenizer: Any = None,
    *,
    cache: CacheMaker,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> ReasonCachePipeline:
    """Return a text generation pipeline whose answers are written with a compressed cache.

    It is called as transformers' own: with a prompt, a chat, or a list of either, with
    `batch_size=`, `streamer=` and the arguments of `generate`.

    Parameters
    ----------
    model : PreTrainedModel or str
        A model, or the name or directory to load one from. A model that runs another attention is
        switched to the "reasoncache" implementation that extends it, which changes nothing for
        other caches, and `enable_graphs` is called for it.
    tokenizer
        As in `transformers.pipeline`; that of a `model` given by name by default.
    cache : Callable[[PretrainedConfig], Cache]
        What makes the cache of a batch from the model's config: a description like
        `ReasonAllocCache.policy(budget=1024)`, a class that needs no more than a config, or a
        function of your own.
    model_kwargs : dict, optional
        How a model given by name is loaded.
    **kwargs
        Everything else that `transformers.pipeline` takes.

    Raises
    ------
    ValueError
        If `cache` is a cache instead of what makes one, or the model's attention is none that ours
        extends.

    Examples
    --------
    >>> pipe = pipeline("Qwen/Qwen3-8B", cache=ReasonAllocCache.policy(budget=1024))
    >>> chat = [{"role": "user", "content": "How many primes are there below 1000?"}]
    >>> print(pipe(chat, max_new_tokens=8192)[0]["generated_text"][-1]["content"])
    >>> print(pipe.cache.report())
    """
    if isinstance(cache, Cache) or not callable(cache):
        raise ValueError(
            "cache: expected what makes a new cache from a config, like "
            f"ReasonAllocCache.policy(budget=1024), got {type(cache).__name__}."
        )
    if isinstance(model, str):
        model_kwargs = {"attn_implementation": "reasoncache"} | (model_kwargs or {})
    pipe: ReasonCachePipeline = transformers.pipeline(  # type: ignore[assignment]
        "text-generation",
        model=model,
        tokenizer=tokenizer,
        model_kwargs=model_kwargs,
        pipeline_class=ReasonCachePipeline,
        new_cache=cache,
        **kwargs,
    )
    _run_reasoncache(pipe.model)
    enable_graphs(pipe.model)
    return pipe


def _run_reasoncache(model: PreTrainedModel) -> None:
    """Switch a model to the attention implementation of ours that extends its own."""
    found = model.config._attn_implementation
    if found in BASES:
        return
    extending = {base: name for name, base in BASES.items()}
    if found not in extending:
        raise ValueError(
            f"model: expected an attention implementation of {[*extending, *BASES]}, got "
            f"{found!r}; call model.set_attn_implementation('reasoncache') before."
        )
    model.set_attn_implementation(extending[found])
