"""Checks of what users pass to the caches."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Literal

from transformers import PretrainedConfig

from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.messages import shown
from hf_reasoncache.observers import Observer, Shadow
from hf_reasoncache.profiles.profile import BudgetProfile
from hf_reasoncache.risk import Risk
from hf_reasoncache.scorers import Scorer, make_scorer
from hf_reasoncache.storage.forms import AS_THEY_COME, Form
from hf_reasoncache.storage.fp8 import FORMS

Profile = BudgetProfile | str | os.PathLike[str] | Sequence[float]
"""A calibrated profile, its directory, its repository on the Hub, or one demand per layer."""

Storage = Literal["fp8", "fp8-keys", "fp8-values"]
"""What is held in 8 bits: keys and values, or one of them."""

LARGEST = 2**31 - 1
"""Largest count of tokens: positions are stored as 32-bit integers."""


def require_int(name: str, value: object, *, low: int) -> None:
    """Raise ValueError unless `value` is an integer from `low` to `LARGEST`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {shown(value)}.")
    if value > LARGEST:
        raise ValueError(f"{name}: expected an integer <= {LARGEST}, got {shown(value)}.")


def require_bool(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}.")


def require_share(name: str, value: object, *, low: float = 0.0) -> None:
    """Raise ValueError unless `value` is a number from `low` to 1."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= float(value) <= 1.0:
        raise ValueError(f"{name}: expected a number from {low:g} to 1, got {shown(value)}.")


def require_open_share(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a number between 0 and 1, neither included."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0.0 < float(value) < 1.0:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {shown(value)}.")


def require_temperature(value: object) -> None:
    """Raise ValueError unless `value` is a temperature of sampling: from 0, greedy, to 10."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 10:
        raise ValueError(f"temperature: expected 0 (greedy) to 10, got {shown(value)}.")


def require_scorer(scorer: object) -> Scorer:
    """Return a scorer, made with its defaults if its name is given.

    Raises
    ------
    ValueError
        If it is anything else, a scorer's class included, or no such name is known.
    """
    if isinstance(scorer, str):
        return make_scorer(scorer)
    if isinstance(scorer, type) or not isinstance(scorer, Scorer):
        raise ValueError(
            f"scorer: expected an object of hf_reasoncache.scorers or a name, got {shown(scorer)}; "
            "pass an instance such as RKV(), or 'rkv'."
        )
    return scorer


def require_storage(storage: object) -> Form:
    """Return the form in which keys and values are held.

    Parameters
    ----------
    storage : str or None
        None holds them as they come.

    Raises
    ------
    ValueError
        If there is no such form.
    """
    if storage is None:
        return AS_THEY_COME
    if not isinstance(storage, str) or storage not in FORMS:
        raise ValueError(f"storage: expected one of {list(FORMS)}, or None, got {shown(storage)}.")
    return FORMS[storage]


def require_demand_of(layers: int, demand: Sequence[float] | None) -> None:
    """Raise ValueError unless a demand, if there is one, has an entry per layer."""
    if demand is not None and len(demand) != layers:
        raise ValueError(
            f"profile: expected {layers} demands, one per full-attention layer of this "
            f"model, got {len(demand)}; use a profile that was calibrated on this model."
        )


def what_to_measure(risk: Risk | None) -> Risk | None:
    """Return what a policy measures of its evictions; None costs nothing."""
    return risk if risk is not None and risk.measure else None


def make_observers(risk: Risk | None) -> list[Observer]:
    """Return what watches a layer."""
    return [] if risk is None or risk.probes is None else [Shadow(risk.probes)]


def demand_and_rule(
    profile: Profile | None, config: PretrainedConfig
) -> tuple[tuple[float, ...] | None, BudgetRule]:
    """Return the demand of every full-attention layer, and how it becomes budgets.

    Raises
    ------
    ValueError
        If a profile is not valid or of another geometry than the model, or bare demands are not
        finite numbers >= 0, or all 0.
    OSError
        If a profile cannot be read or downloaded.
    """
    if isinstance(profile, str | os.PathLike):
        profile = BudgetProfile.from_pretrained(profile, with_statistics=False)
    if isinstance(profile, BudgetProfile):
        profile.check_config(config)
        return profile.demand, profile.rule
    return None if profile is None else _checked_demand(profile), BudgetRule()


def _checked_demand(profile: Sequence[float]) -> tuple[float, ...]:
    problem = ValueError(
        "profile: expected a BudgetProfile, its directory or repository, or one demand per "
        f"full-attention layer, finite numbers >= 0 and not all 0, got {shown(profile)}."
    )
    if isinstance(profile, bytes | Mapping) or not isinstance(profile, Iterable):
        raise problem
    # Elements of tensors and arrays become plain numbers.
    values = [value.item() if hasattr(value, "item") else value for value in profile]
    if not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
        raise problem
    demand = tuple(float(value) for value in values)
    if not all(math.isfinite(value) and value >= 0 for value in demand) or not any(demand):
        raise problem
    return demand
