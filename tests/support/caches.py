"""The caches that share a contract, with settings that make each compress early and often."""

from hf_reasoncache import ReasonAllocCache, SharedBranchCache, SlidingWindowCompressCache

CLASSES = {"reason_alloc": ReasonAllocCache, "sliding_window": SlidingWindowCompressCache}
SETTINGS = {
    # Heads of many lengths are the harder case.
    "reason_alloc": dict(budget=40, buffer=8, window=4, head_budgets=True),
    "sliding_window": dict(window=8, ratio=0.4, recent=4),
}
EXACT = {"reason_alloc": dict(budget=None), "sliding_window": dict(window=8, ratio=1.0, recent=4)}
BRANCHED = "branched"
"""Branches that evict like a ReasonAllocCache, or keep everything."""
KINDS = (*CLASSES, BRANCHED)


def make_cache(kind, model, **changes):
    """A cache that evicts; `changes` replace its settings."""
    if kind == BRANCHED:
        return SharedBranchCache(model.config, suffix=make_policy("reason_alloc", **changes))
    return CLASSES[kind](model.config, **_settings(kind, changes))


def make_policy(kind, **changes):
    """What makes branches evict; `changes` replace settings."""
    return CLASSES[kind].policy(**_settings(kind, changes))


def _settings(kind, changes):
    settings = SETTINGS[kind] | changes
    if kind == "reason_alloc" and "ratio" in changes:
        del settings["budget"]
    return settings


def exact_cache(kind, model, **changes):
    """A cache that keeps everything; `changes` are further settings."""
    if kind == BRANCHED:
        return SharedBranchCache(model.config, **changes)
    return CLASSES[kind](model.config, **(EXACT[kind] | changes))
