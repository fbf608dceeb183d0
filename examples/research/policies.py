"""Which settings of ReasonAllocCache are compared, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.tiny_reasoner import MODELS
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.budgets.layers import pyramid
from hf_reasoncache.evaluation import CacheSpec
from hf_reasoncache.profiles import BudgetProfile
from hf_reasoncache.scorers import (
    H2O,
    RKV,
    TOVA,
    KeyDiff,
    KeyNorm,
    LagKV,
    Random,
    SnapKV,
    StreamingLLM,
    ValueNorm,
)

BUFFER = WINDOW = 16
"""Smaller than the defaults (128 and 8): chains of thought here are 200 to 400 tokens long, and the
observation window must span more than one step of about 8 tokens."""

COMMON: dict[str, Any] = {"buffer": BUFFER, "window": WINDOW}


def wave(family: str, estimator: str) -> BudgetProfile:
    """The profile that is shipped beside a family's model; docs/calibration.md has the command."""
    return BudgetProfile.from_pretrained(MODELS[family] / estimator, with_statistics=False)


def policies(family: str) -> dict[str, dict[str, Any]]:
    """Arguments of ReasonAllocCache for each policy of the published table."""
    profile = {"profile": wave(family, "sensitivity")}
    rkv, attention = RKV(queries=WINDOW), H2O(recent_ratio=0.0)
    scorers = {
        "random": Random(),
        "StreamingLLM": StreamingLLM(),
        "key norm": KeyNorm(),
        "value norm": ValueNorm(),
        "KeyDiff": KeyDiff(),
        "LagKV": LagKV(lag=WINDOW),
        "TOVA": TOVA(),
        "SnapKV": SnapKV(queries=WINDOW),
        "R-KV": rkv,
        "H2O (half recent)": H2O(),
        "H2O (attention only)": attention,
    }
    table: dict[str, dict[str, Any]] = {name: {"scorer": s} for name, s in scorers.items()}
    table |= {
        "R-KV + wave": {"scorer": rkv, **profile},
        "R-KV + wave + heads (ReasonAlloc)": {"scorer": rkv, "head_budgets": True, **profile},
        "random + wave": {"scorer": Random(), **profile},
        "H2O (attention only) + wave": {"scorer": attention, **profile},
        "H2O (attention only) + wave + heads": {
            "scorer": attention,
            "head_budgets": True,
            **profile,
        },
    }
    return table


def ablation(family: str) -> dict[str, dict[str, Any]]:
    """R-KV under every split over layers, each with and without online head budgets."""
    layers = len(wave(family, "coverage").demand)
    splits: dict[str, dict[str, Any]] = {
        "uniform": {},
        "pyramid": {"profile": pyramid(layers)},
        "coverage wave": {"profile": wave(family, "coverage")},
        "sensitivity wave": {"profile": wave(family, "sensitivity")},
        "tuned wave": {"profile": wave(family, "tuned")},
    }
    return {
        name + suffix: {"scorer": RKV(queries=WINDOW), "head_budgets": heads, **split}
        for name, split in splits.items()
        for suffix, heads in (("", False), (" + heads", True))
    }


def sweep() -> dict[str, dict[str, Any]]:
    """Settings to choose the tiny reasoners' defaults from (on development problems)."""
    table: dict[str, dict[str, Any]] = {
        f"window {window}, {name}": {"window": window, "scorer": scorer}
        for window in (4, 8, 16, 32)
        for name, scorer in (
            ("SnapKV", SnapKV(queries=window)),
            ("R-KV", RKV(queries=window)),
            ("H2O (attention only)", H2O(recent_ratio=0.0)),
        )
    }
    table |= {f"SnapKV pool {k}": {"scorer": SnapKV(queries=WINDOW, kernel=k)} for k in (1, 3)}
    table |= {f"R-KV pool {k}": {"scorer": RKV(queries=WINDOW, kernel=k)} for k in (1, 3)}
    table |= {
        f"R-KV lambda {lam}": {"scorer": RKV(queries=WINDOW, lam=lam)} for lam in (0.5, 0.9, 1.0)
    }
    table |= {
        f"H2O decay {decay}": {"scorer": H2O(recent_ratio=0.0, attention_decay=decay)}
        for decay in (0.9, 0.99)
    }
    table["H2O average"] = {"scorer": H2O(recent_ratio=0.0, average=True)}
    return table


TABLES = {"policies": policies, "ablation": ablation, "sweep": lambda family: sweep()}


def make_spec(name: str, settings: Mapping[str, Any], protect: bool) -> CacheSpec:
    """Turn a policy into the description of a cache."""
    return CacheSpec(name, ReasonAllocCache, {**COMMON, "protect": protect, **settings})
