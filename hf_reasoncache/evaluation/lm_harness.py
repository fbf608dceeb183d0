"""lm-evaluation-harness with a compressed cache. Needs the package lm-eval."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PretrainedConfig

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.releases import cache_kwarg

try:
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lm_harness: expected the package lm-eval, got no module {error.name!r}; pip install "
        "'hf-reasoncache[eval]'.",
        name=error.name,
    ) from error


class ReasonCacheLM(HFLM):
    """A model of lm-evaluation-harness that generates with a new cache for every batch.

    Parameters
    ----------
    pretrained : PreTrainedModel or str
        As `HFLM` takes it; a model must run the "reasoncache" attention, and a name is loaded so.
    make_cache : Callable[[PretrainedConfig], Cache]
        Makes a cache from the model's config, such as
        `lambda config: ReasonAllocCache(config, budget=1024)`.
    **settings
        Whatever else `HFLM` takes: `tokenizer`, `batch_size`, ...

    Examples
    --------
    >>> lm = ReasonCacheLM(model, lambda config: ReasonAllocCache(config, budget=1024))
    >>> lm_eval.simple_evaluate(model=lm, tasks=["gsm8k_cot"])

    Notes
    -----
    Only generation: the likelihood of given texts is read in a single forward, from which no token
    is evicted before it ends. It would equal the full cache and prove nothing, so it is refused.
    """

    def __init__(
        self,
        pretrained: Any,
        make_cache: Callable[[PretrainedConfig], Cache],
        **settings: Any,
    ) -> None:
        if isinstance(pretrained, str):
            settings = {"attn_implementation": "reasoncache"} | settings
        self.make_cache = make_cache
        self.evicted = 0
        super().__init__(pretrained=pretrained, **settings)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests, and warn if that has evicted nothing.

        Warns
        -----
        UserWarning
            If the cache never evicted: the result says nothing about the compression.
        """
        before = self.evicted
        answers: list[str] = super().generate_until(requests, disable_tqdm)
        if self.evicted == before:
            warnings.warn(
                f"ReasonCacheLM: nothing was evicted in {len(requests)} requests; the budget "
                "exceeds the texts, and a result like that of the full cache says nothing.",
                stacklevel=2,
            )
        return answers

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> torch.Tensor:
        cache = self.make_cache(self.model.config)
        output: torch.Tensor = super()._model_generate(
            context, max_length, stop, **cache_kwarg(cache), **settings
        )
        if isinstance(cache, ReasonCache):
            self.evicted += cache.report().evicted
        return output

    def _loglikelihood_tokens(self, *_: Any, **__: Any) -> list[tuple[float, bool]]:
        raise ValueError(
            "ReasonCacheLM: expected a task that generates (output_type generate_until), got one "
            "that asks for likelihoods, which are read in one forward without any eviction; use "
            "the task's generative variant, or HFLM for the full cache."
        )
