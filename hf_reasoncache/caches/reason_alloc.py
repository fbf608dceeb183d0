"""ReasonAlloc (arXiv 2606.11164): layer budgets from a profile, head budgets online."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from hf_reasoncache.arguments import (
    Profile,
    Storage,
    demand_and_rule,
    make_observers,
    require_bool,
    require_demand_of,
    require_int,
    require_open_share,
    require_scorer,
    require_storage,
    what_to_measure,
)
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.policies.budget import BudgetPolicy
from hf_reasoncache.protection import Protect, Ranges, Spans
from hf_reasoncache.risk import Risk
from hf_reasoncache.scorers import RKV
from hf_reasoncache.scorers.base import Scorer
from hf_reasoncache.shards import TPMode
from hf_reasoncache.storage.pool_store import PoolStore

_NOT_GIVEN: Any = object()


class ReasonAllocCache(ReasonCache):
    """A cache that keeps a budget of tokens, for `model.generate(past_key_values=...)`.

    The model must run the "reasoncache" attention (or "reasoncache_eager", "reasoncache_fa2").

    Parameters
    ----------
    config : PretrainedConfig
        `model.config`.
    budget : int or None
        Resident tokens per KV head on average over the model, prompt included, after a compaction;
        between two, up to `buffer` more. None keeps everything: an exact cache that is faster than
        `DynamicCache`.
    ratio : float, optional
        Instead of a budget: the share, in (0, 1), of the tokens that a row has seen by the time of
        a compaction, prompt included. The pool grows at compactions.
    min_budget : int
        With a ratio, the least budget, protected tokens of the prompt not counted.
    profile : BudgetProfile, str, path or sequence of float, optional
        Demand of each full-attention layer (the paper's Reasoning Wave), and the rule that makes
        budgets of it: a calibrated profile, its directory, its repository ORG/NAME on the Hub, or
        bare demands under the paper's rule. By default all layers get `budget`.
    scorer : Scorer or str, optional
        Decides which tokens a head keeps, or its name; R-KV by default, as in the paper.
    head_budgets : bool
        Whether the heads of a layer share its budget by demand, re-allocated every 128 tokens (the
        paper's second level). Off, because it helped on no model measured here: on pretrained
        weights R-KV did not gain beyond chance, and SnapKV and H2O lost (docs/results.md).
    buffer : int
        Tokens between two compactions. At equal memory on average a buffer up to a third of the
        budget costs no answers, one of two thirds does (docs/results.md): lower it with the budget.
    window : int
        Newest tokens that are never evicted (the observation window); counted inside the budget.
    protect : bool, Spans, token ranges or Protect
        What is never evicted of the prompt, counted inside the budget: all of it (True), nothing
        (False), or parts of it. A `Protect` says more: fair eviction, and where the prompt ends.
    risk : float, bool or Risk, optional
        Measure, before each eviction, how far it moves the output of each head (True; see
        `report()`), and evict less where the relative error would exceed a limit (a number), within
        `budget + buffer`. A `Risk` says more: what else to do then, and probes of the true error.
        By default nothing is measured.
    tensor_parallel : {"agree", "local"}
        Under tensor parallelism, where each process has some KV heads of a layer: whether they
        decide together what is evicted, by a small message at an eviction, and get the tokens of
        one process; or each by itself, its heads sharing their part of the layer's budget.
    storage : {"fp8", "fp8-keys", "fp8-values"}, optional
        Hold keys and values, or one of them, in 8 bits: e4m3 numbers with a scale per token and
        head. The first forward still attends in full precision. By default they are held in the
        model's type.

    Raises
    ------
    ValueError
        If an argument is out of range, the profile is not valid or of another geometry than the
        model, or the model is not supported; and in the first forward, before any token is
        generated, if the budget cannot hold what is protected of the prompt; when the prompt is
        complete, if spans were made for another one.
    OSError
        If a profile cannot be read or downloaded.

    Warns
    -----
    UserWarning
        If a profile was calibrated on another model or commit than the config names. The cache
        does not see the weights: `profile.check(model)` does.

    Examples
    --------
    >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")
    >>> cache = ReasonAllocCache(model.config, budget=1024)
    >>> out = model.generate(**inputs, past_key_values=cache, max_new_tokens=16384)
    >>> print(cache.report())

    Notes
    -----
    From the paper: the robustified layer budgets (exponent 0.5, bounds 0.25 and 2), head budgets
    from the pooled top scores every 128 steps. Ours: the layout of the heads in a ragged pool, the
    exact form of the bounds, the correction that makes scores comparable between heads of different
    length, independence of batch rows. The whitelist and fair eviction are those of "The Pitfalls
    of KV Cache Compression" (arXiv 2510.00231), applied at every eviction.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        budget: int | None = _NOT_GIVEN,
        ratio: float | None = None,
        min_budget: int = 128,
        profile: Profile | None = None,
        scorer: Scorer | str | None = None,
        head_budgets: bool = False,
        buffer: int = 128,
        window: int = 8,
        protect: Protect | bool | Spans | Ranges = True,
        risk: Risk | float | bool | None = None,
        tensor_parallel: TPMode = "agree",
        storage: Storage | None = None,
    ) -> None:
        scorer = require_scorer(RKV() if scorer is None else scorer)
        require_int("window", window, low=1)
        require_int("buffer", buffer, low=1)
        if (budget is _NOT_GIVEN) == (ratio is None):
            raise ValueError(
                "ReasonAllocCache: expected either budget or ratio, got "
                f"{'none' if ratio is None else 'both'}; budget=None keeps everything."
            )
        if ratio is not None:
            require_open_share("ratio", ratio)
            require_int("min_budget", min_budget, low=window + 1)
            budget = min_budget
        elif budget is not None:
            require_int("budget", budget, low=window + 1)
        require_bool("head_budgets", head_budgets)
        form = require_storage(storage)
        protected, watched = Protect.of(protect), Risk.of(risk)
        demand, rule = demand_and_rule(profile, config)

        def make_layer(index: int, layer_rank: int, layers: int) -> CacheLayer:
            require_demand_of(layers, demand)
            if budget is None:
                return CacheLayer(index, store=PoolStore(form))
            policy = BudgetPolicy(
                budget=budget,
                buffer=buffer,
                window=window,
                scorer=scorer,
                head_budgets=head_budgets,
                protect_prompt=protected.prompt,
                prompt_length=protected.prompt_length,
                demand=demand,
                rule=rule,
                protection=protected.protection,
                risk=what_to_measure(watched),
                layer_rank=layer_rank,
                ratio=ratio,
            )
            return CacheLayer(index, policy, PoolStore(form), make_observers(watched))

        super().__init__(config, make_layer, tensor_parallel=tensor_parallel)
