"""A profile in words and rows, for terminals and model cards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_reasoncache.profiles.profile import BudgetProfile

_SHORT = 12  # digits of a hash that are shown
_LIST = 60  # characters of a list that is shown
_JUDGED = ("tune", "check")  # settings that say what came out


@dataclass(frozen=True)
class LayerDemand:
    """One full-attention layer.

    Attributes
    ----------
    layer : int
        Its index in the model.
    demand, standard_error : float
    relative : float
        Demand divided by the mean over the layers.
    budget : int or None
        Tokens per KV head, for the mean budget that was asked for.
    """

    layer: int
    demand: float
    standard_error: float
    relative: float
    budget: int | None


def layer_rows(profile: BudgetProfile, budget: int | None = None) -> list[LayerDemand]:
    """One row per full-attention layer, in the order of the model.

    Parameters
    ----------
    profile : BudgetProfile
    budget : int, optional
        Mean tokens per KV head to split.

    Raises
    ------
    ValueError
        If the budget is below 1.
    """
    count = len(profile.demand)
    mean = sum(profile.demand) / count
    split = [None] * count if budget is None else profile.layer_budgets(budget)
    columns = zip(
        profile.geometry.full_attention_layers,
        profile.demand,
        profile.standard_error,
        split,
        strict=True,
    )
    return [
        LayerDemand(layer, demand, error, demand / mean, tokens)
        for layer, demand, error, tokens in columns
    ]


def title(profile: BudgetProfile) -> str:
    """What to call a profile in a picture."""
    return f"{profile.base_model} ({profile.estimator})"


def facts(profile: BudgetProfile) -> dict[str, str]:
    """What a reader wants to know before the numbers: label to text."""
    geometry, rule, run = profile.geometry, profile.rule, profile.calibration
    commit, revision = profile.base_model_revision, run.data_revision
    settings = dict(run.settings)
    judged = {name: found for name in _JUDGED if (found := settings.pop(name, None)) is not None}
    return {
        "model": profile.base_model + (f" at {commit}" if commit else ""),
        "estimator": profile.estimator,
        "geometry": f"{_counted(len(geometry.full_attention_layers), 'full-attention layer')}, "
        f"{_counted(geometry.kv_heads, 'KV head')} of size {geometry.head_size}",
        "rule": f"exponent {rule.exponent:g}, bounds {rule.low:g} to {rule.high:g} times the mean",
        "data": run.data + (f" at {revision}" if revision else ""),
        "run": f"{_counted(len(run.prompts), 'prompt')}, "
        f"{_counted(run.tokens, 'generated token')}, seed {run.seed}",
        "settings": ", ".join(_flat(settings)) or "-",
        **{
            name: ", ".join(_flat(found if isinstance(found, dict) else {name: found}))
            for name, found in judged.items()
        },
        "versions": ", ".join(_flat(run.versions)) or "-",
        "weights": profile.fingerprint[: -64 + _SHORT],
    }


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield "name value", inner names after those above them: "estimator.mass 0.93".

    Of a long list, such as the prompts that were held out, only the length is said.
    """
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            if isinstance(value, float):
                value = float(f"{value:.4g}")
            text = value if isinstance(value, str) else json.dumps(value)
            long = isinstance(value, list) and len(text) > _LIST
            yield f"{above}{name} {f'({len(value)} entries)' if long else text}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)
