"""Static budgets: how many tokens each layer keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_reasoncache.budgets.robustify import robustify


def uniform(layers: int) -> list[float]:
    """Return the demand that asks the same for each of `layers` layers.

    Raises
    ------
    ValueError
        If there is no layer.
    """
    _expect_layers(layers)
    return [1.0] * layers


def pyramid(layers: int, *, beta: float = 20.0) -> list[float]:
    """Return the linearly falling demand of PyramidKV (arXiv 2406.02069), with mean 1.

    Layer `l` of `n` asks for `top - l * (top - bottom) / (n - 1)` with `bottom = 1 / beta` and `top
    = 2 - 1 / beta`; a single layer asks for 1. The paper's line is spent with `exponent=1, low=0,
    high=2` in `layer_budgets`. Ours: the line covers the whole budget, where the paper's covers
    what the observation window leaves.

    Parameters
    ----------
    layers : int
    beta : float
        Steepness, at least 1; 1 is uniform, the paper uses 20.

    Raises
    ------
    ValueError
        If there is no layer, or `beta` is below 1 or not finite.
    """
    _expect_layers(layers)
    if not (math.isfinite(beta) and beta >= 1.0):
        raise ValueError(f"pyramid expects a finite beta >= 1, got {beta}; the paper uses 20.")
    bottom = 1.0 / beta
    top = 2.0 - bottom
    if layers == 1:
        return [1.0]
    return [top - layer * (top - bottom) / (layers - 1) for layer in range(layers)]


def layer_budgets(
    demand: Sequence[float],
    mean_budget: int,
    *,
    exponent: float = 0.5,
    low: float = 0.25,
    high: float = 2.0,
    floor: int = 0,
) -> list[int]:
    """Split the budget of a model over its layers by their demand.

    Exponent and bounds are those of ReasonAlloc (arXiv 2606.11164); the floor is ours. It
    overrides the lower bound and cannot exceed the upper one, as it may not exceed the mean.

    Parameters
    ----------
    demand : Sequence[float]
        What each layer asks for, in any unit; a calibrated wave, `uniform` or `pyramid`.
    mean_budget : int
        Tokens per KV head, on average over the layers.
    exponent : float
        Flattens the demand below 1, see `robustify`.
    low, high : float
        Bounds in multiples of `mean_budget`, with `0 <= low <= 1 <= high`.
    floor : int
        Tokens each layer must be able to hold: protected prompt and observation window.

    Returns
    -------
    list[int]
        Tokens per KV head for each layer; they sum to `mean_budget * len(demand)`.

    Raises
    ------
    ValueError
        If the floor exceeds the mean budget, the bounds do not enclose 1, or the demand is
        unusable.
    """
    expect_bounds("layer_budgets", low, high)
    if mean_budget < 1 or not 0 <= floor <= mean_budget:
        raise ValueError(
            "layer_budgets expects 0 <= floor <= mean_budget and mean_budget >= 1, got "
            f"floor = {floor} and mean_budget = {mean_budget}; raise the budget, or protect "
            "fewer tokens."
        )
    lower = max(low * mean_budget, float(floor))
    # No layer gets more than all of it; a bound without limit would lose its last digits.
    upper = min(high, len(demand)) * mean_budget
    return robustify(demand, mean_budget * len(demand), exponent=exponent, low=lower, high=upper)


def expect_bounds(caller: str, low: float, high: float) -> None:
    """Raise ValueError unless the multiples of the mean satisfy `0 <= low <= 1 <= high`."""
    if not (0.0 <= low <= 1.0 <= high < math.inf):
        raise ValueError(
            f"{caller} expects 0 <= low <= 1 <= high in multiples of the mean budget, got "
            f"low = {low} and high = {high}; ReasonAlloc uses 0.25 and 2."
        )


def _expect_layers(layers: int) -> None:
    if layers < 1:
        raise ValueError(f"A model has at least 1 layer, got {layers}; pass num_hidden_layers.")
