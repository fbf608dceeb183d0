"""Kara (arXiv 2607.01237): each window of generated text is compressed once."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from hf_reasoncache.arguments import (
    Profile,
    Storage,
    demand_and_rule,
    make_observers,
    require_bool,
    require_demand_of,
    require_int,
    require_scorer,
    require_share,
    require_storage,
    what_to_measure,
)
from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.policies.window import WindowPolicy
from hf_reasoncache.protection import Protect, Ranges, Spans
from hf_reasoncache.risk import Risk
from hf_reasoncache.scorers import Bidirectional
from hf_reasoncache.scorers.base import Scorer
from hf_reasoncache.shards import TPMode
from hf_reasoncache.storage.pool_store import PoolStore


class SlidingWindowCompressCache(ReasonCache):
    """A cache that compresses each window of generated text once, when it has been written.

    What a compaction costs does not depend on how long the text has become, and rows and layers
    reach their windows at different steps. Without `max_budget` the cache grows by `ratio` tokens
    per token.

    The model must run the "reasoncache" attention (or "reasoncache_eager", "reasoncache_fa2").

    Parameters
    ----------
    config : PretrainedConfig
        `model.config`.
    window : int
        Tokens of a window.
    ratio : float
        Share of a window that stays, in (0, 1]; the paper uses 0.2 to 0.4. With 1 nothing is ever
        evicted, and the cache is exact.
    recent : int
        Newest tokens that are in no window yet, hence always held.
    chunk_share : float
        Share of the tokens that stay which joins the best ones to contiguous text (Token2Chunk); 0
        keeps the best tokens only.
    max_budget : int, optional
        Resident tokens per KV head on average over the model, prompt and recent ones included,
        after a compaction; between two, up to `window` more. Where it is exceeded, the oldest
        windows are compressed again. By default there is no bound.
    prompt_ratio : float, optional
        `ratio` of the prompt, if it is not protected; `ratio` by default.
    protect, risk
        As for `ReasonAllocCache`, with these differences. What is not protected of a prompt is
        compressed in windows like the rest, but none reaches across the prompt's end; parts of it
        that are protected count inside what stays of it. Fair eviction is for the spans of a
        prompt, as far as they lie in one window: windows of generated text have equal shares
        anyway. To hold an eviction to a limit, at most three quarters of what a window would lose
        stay.
    scorer : Scorer or str, optional
        Ranks the tokens of a window, or its name; `Bidirectional(queries=window)` by default. A
        scorer sees the window alone, as if the text ended there.
    profile : BudgetProfile, str, path or sequence of float, optional
        Demand of each full-attention layer, as for `ReasonAllocCache`: layers that need more keep
        more of a window (and of `max_budget`), `ratio` on average. A layer may keep all of it: the
        profile's upper bound holds for `max_budget` only.
    head_budgets : bool
        Whether the heads of a layer share what stays of a window by demand instead of equally.
    tensor_parallel, storage
        See `ReasonAllocCache`.

    Raises
    ------
    ValueError
        If an argument is out of range, the profile is not valid or of another geometry than the
        model, or the model is not supported; and in the first forward, before any token is
        generated, if `max_budget` cannot hold the protected prompt.
    OSError
        If a profile cannot be read or downloaded.

    Examples
    --------
    >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")
    >>> cache = SlidingWindowCompressCache(model.config, ratio=0.3)
    >>> out = model.generate(**inputs, past_key_values=cache, max_new_tokens=16384)
    >>> print(cache.report())

    Notes
    -----
    From the paper: windows compressed once, bidirectional scores inside the window, selected tokens
    expanded to chunks. Ours: the exact form of both (see `Bidirectional` and `token2chunk`), the
    bound, profile and head budgets on top, independence of batch rows, and where windows lie: they
    end at fixed positions of each row, shifted from layer to layer, so that neither the rows of a
    batch nor the layers of a model compress all at once. Rows of equal length do share their steps.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        window: int = 128,
        ratio: float = 0.3,
        recent: int = 32,
        chunk_share: float = 0.5,
        max_budget: int | None = None,
        prompt_ratio: float | None = None,
        protect: Protect | bool | Spans | Ranges = True,
        risk: Risk | float | bool | None = None,
        scorer: Scorer | str | None = None,
        profile: Profile | None = None,
        head_budgets: bool = False,
        tensor_parallel: TPMode = "agree",
        storage: Storage | None = None,
    ) -> None:
        require_int("window", window, low=2)
        require_int("recent", recent, low=1)
        require_share("ratio", ratio, low=1 / window)
        require_share("chunk_share", chunk_share)
        require_bool("head_budgets", head_budgets)
        prompt_ratio = ratio if prompt_ratio is None else prompt_ratio
        require_share("prompt_ratio", prompt_ratio, low=1 / window)
        scorer = require_scorer(Bidirectional(queries=window) if scorer is None else scorer)
        kept = round(ratio * window)
        if max_budget is not None:
            require_int("max_budget", max_budget, low=recent + kept)
            if kept == window:
                raise ValueError(
                    f"max_budget: expected a ratio below 1 to compress by, got ratio={ratio!r}; "
                    "use a smaller ratio, or ReasonAllocCache."
                )
        form = require_storage(storage)
        protected, watched = Protect.of(protect), Risk.of(risk)
        demand, rule = demand_and_rule(profile, config)

        def make_layer(index: int, layer_rank: int, layers: int) -> CacheLayer:
            require_demand_of(layers, demand)
            policy = WindowPolicy(
                window=window,
                kept=_of_layer(kept, window, demand, rule, layer_rank),
                mean_kept=kept,
                prompt_kept=_of_layer(
                    round(prompt_ratio * window), window, demand, rule, layer_rank
                ),
                recent=recent,
                chunk_share=chunk_share,
                scorer=scorer,
                head_budgets=head_budgets,
                protect_prompt=protected.prompt,
                prompt_length=protected.prompt_length,
                phase=layer_rank * window // layers,
                max_budget=max_budget,
                demand=demand,
                rule=rule,
                layer_rank=layer_rank,
                protection=protected.protection,
                risk=what_to_measure(watched),
            )
            return CacheLayer(index, policy, PoolStore(form), make_observers(watched))

        super().__init__(config, make_layer, tensor_parallel=tensor_parallel)


def _of_layer(
    kept: int, window: int, demand: tuple[float, ...] | None, rule: BudgetRule, layer_rank: int
) -> int:
    """Tokens of a window that stay in one layer, `kept` on average over the layers."""
    if demand is None:
        return kept
    # The rule bounds all that a layer holds. Of that, prompt and recent tokens are the same in all
    # layers, so one that needs its whole text may have it.
    return replace(rule, high=window / kept).layer_budgets(demand, kept)[layer_rank]
