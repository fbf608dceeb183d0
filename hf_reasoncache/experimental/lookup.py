"""Before a run: how small a budget a prompt admits, as far as its own attention can tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.experimental.spectrum import least_tokens
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.observers import Observed, Observer
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.storage.new_tokens import NewTokens


@dataclass(frozen=True)
class LeastBudget:
    """How few tokens the heads of a model can hold of one prompt.

    It is about the attention of the prompt's own queries. What a text yet to be written will look
    up, it cannot know: a list of facts that nothing in the prompt refers to does not look like
    look-up until somebody asks.

    Attributes
    ----------
    prompt : int
        Tokens of the prompt.
    heads : tuple of tuple of int
        Tokens for each full-attention layer and KV head.
    """

    prompt: int
    heads: tuple[tuple[int, ...], ...]

    @property
    def budget(self) -> int:
        """Tokens per KV head on average, rounded up: do not compress below."""
        counts = [count for layer in self.heads for count in layer]
        return -(-sum(counts) // len(counts))

    @property
    def looks_like_lookup(self) -> bool:
        """Whether more than half of the prompt is needed: better not compressed at all."""
        return 2 * self.budget > self.prompt


class _Spectrum(Observer):
    """Measures the prompts, which are one forward."""

    def __init__(self, window: int, tolerance: float, queries: int) -> None:
        self.settings = (window, tolerance, queries)
        self.found: list[tuple[int, tuple[int, ...]]] = []

    def attended(self, layer: Observed, new: NewTokens) -> None:
        """See `Observer.attended`."""
        for row in range(len(new.keys)):
            real = new.real_tokens()[row, 0]
            query, keys = (x[row][:, real] for x in (new.query, new.keys))
            self.found.append(self._measure(query, keys, new))

    def _measure(
        self, query: torch.Tensor, keys: torch.Tensor, new: NewTokens
    ) -> tuple[int, tuple[int, ...]]:
        window, tolerance, queries = self.settings
        total = keys.shape[1]
        asked = torch.linspace(0, total - 1, min(queries, total)).round().long().to(keys.device)
        grouped = query[:, asked].unflatten(0, (keys.shape[0], -1)).float()
        logits = grouped @ keys.float()[:, None].mT * new.settings["scaling"]
        softcap = new.settings.get("softcap")
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        seen = torch.arange(total, device=keys.device) <= asked[:, None]
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        sinks = new.settings.get("s_aux")
        if sinks is not None:
            sinks = sinks.float().view(*grouped.shape[:2], 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sinks], -1)
        # The query heads of a group share what is held, so they count as one.
        attention = logits.softmax(-1)[..., :total].flatten(1, 2)
        positions = asked.repeat(grouped.shape[1])
        least = least_tokens(attention, positions, window=window, tolerance=tolerance)
        return total, tuple(least.tolist())


@torch.no_grad()
def least_budget(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    *,
    window: int = 8,
    tolerance: float = 0.05,
    queries: int = 256,
) -> list[LeastBudget]:
    """Read prompts once, without compression, and say below which budget not to compress them.

    Parameters
    ----------
    model : PreTrainedModel
        Runs the "reasoncache" attention.
    inputs : mapping
        `input_ids` and `attention_mask`, `[B, T]`, padded on the left.
    window : int
        Newest tokens that the cache will always hold.
    tolerance : float
        In (0, 1): largest spectral tail, see `hf_reasoncache.experimental.spectrum`.
    queries : int
        Queries taken of each prompt, evenly spaced.

    Returns
    -------
    list of LeastBudget
        One for each row.
    """
    found: list[_Spectrum] = []

    def make_layer(index: int, rank: int, layers: int) -> CacheLayer:
        found.append(_Spectrum(window, tolerance, queries))
        return CacheLayer(index, observers=found[-1:])

    config: PretrainedConfig = model.config
    cache = ReasonCache(config, make_layer)
    model(**inputs, **cache_kwarg(cache), use_cache=True, logits_to_keep=1)
    return [
        LeastBudget(found[0].found[row][0], tuple(each.found[row][1] for each in found))
        for row in range(len(inputs["input_ids"]))
    ]
