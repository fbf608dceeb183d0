"""Which policies can compress what branches write themselves, while they share their prompt.

The prompt is held elsewhere: it counts against a row's budget, but is not scored, not evicted and
not copied.
"""

from __future__ import annotations

from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.layers.evicting import EvictingLayer
from hf_reasoncache.storage.branch_store import BranchStore


def share(layer: CacheLayer, store: BranchStore) -> CacheLayer:
    """Let a new layer keep its tokens in `store`.

    Raises
    ------
    ValueError
        If its policy cannot leave the prompt alone.
    """
    if layer.store.shares:
        raise ValueError(
            "suffix: expected the policy of ReasonAllocCache or SlidingWindowCompressCache, got "
            "that of a SharedBranchCache."
        )
    if isinstance(layer, EvictingLayer):
        _require_suffix(layer)
        layer.use(store)
    else:
        layer.store = store
    return layer


def _require_suffix(layer: EvictingLayer) -> None:
    policy = layer.policy
    if not policy.protect_prompt:
        raise ValueError(
            "suffix: expected protect_prompt=True, got False; branches share their prompt, and "
            "it cannot be evicted for one of them."
        )
    if policy.scorer.needs_mass:
        raise ValueError(
            f"suffix: expected a scorer that needs no attention mass, got {policy.scorer!r}: "
            "attention to a shared prompt keeps no account per branch. Use RKV or SnapKV."
        )
    if policy.risk is not None or policy.probes is not None:
        raise ValueError(
            "suffix: expected measure_risk=False, max_risk=None and probes=None, got one of "
            "them set: the error of an output is measured over what one layer's pool holds, "
            "and the prompt of a branch is not in it."
        )
