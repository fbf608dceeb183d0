"""The robustification operator R of ReasonAlloc: demand in, bounded integer budgets out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch

Array: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]
Numbers: TypeAlias = Array | Integers

# No entry weighs less than this share of the largest: entries without demand then split evenly what
# is left once all others are at their upper bound, and a row without any demand comes out uniform.
_LEAST = 1e-12
# Products such as 0.07 * 100 miss an integer by a rounding error; bounds are cut to integers beyond
# it.
_SLACK = 1e-9
# Fractions closer than this are equal.
_GRID = float(1 << 24)

Bound = float | torch.Tensor


@overload
def robustify(
    demand: Sequence[float], total: int, *, exponent: float, low: Bound, high: Bound
) -> list[int]: ...


@overload
def robustify(
    demand: torch.Tensor, total: int | torch.Tensor, *, exponent: float, low: Bound, high: Bound
) -> torch.Tensor: ...


def robustify(
    demand: Sequence[float] | torch.Tensor,
    total: int | torch.Tensor,
    *,
    exponent: float,
    low: Bound,
    high: Bound,
) -> list[int] | torch.Tensor:
    """Split a budget in proportion to `demand ** exponent`, within bounds, into integers.

    R of ReasonAlloc (arXiv 2606.11164) scales, clips and renormalises. Renormalising after a clip
    can break the bounds, so (ours) the entries that are not clipped share what the clipped ones
    leave, exactly: the result is `clip(c * demand ** exponent, low, high)` with the one `c` that
    spends `total`, rounded by largest remainder, ties to the lower index. Many rows are solved at
    once, each as if it were alone.

    Parameters
    ----------
    demand : Sequence[float] of length n, or Tensor[..., n]
        Non-negative and finite; only ratios matter. All zero means uniform.
    total : int, or LongTensor[...]
        What each row spends, in the unit of the budgets (tokens).
    exponent : float
        Non-negative; below 1 flattens the demand, 0 ignores it.
    low, high : float, or Tensor broadcastable to [..., n]
        Inclusive bounds of each entry. `low` is rounded up and `high` down to integers.

    Returns
    -------
    list[int] for a sequence, LongTensor[..., n] on the demand's device for a tensor
        Sums to `total` exactly and keeps the bounds.

    Raises
    ------
    ValueError
        If a demand is negative or not finite, there is none, the exponent is negative, the sizes do
        not fit, or the bounds leave no solution.
    """
    bounds = {"low": _array(low), "high": _array(high)}
    integers = split(_array(demand), _array(total), exponent=exponent, **bounds)
    if isinstance(demand, torch.Tensor):
        return torch.from_numpy(integers).to(demand.device)
    return integers.tolist()


def split(
    demand: Numbers, total: Numbers, *, exponent: float, low: Numbers, high: Numbers
) -> Integers:
    """`robustify` of arrays.

    NumPy takes a third of torch's time for operations on a handful of numbers, and there are a
    hundred of them, once per layer and eviction.
    """
    if demand.ndim == 0 or demand.shape[-1] == 0:
        raise ValueError(
            "robustify expects at least one demand, got none; pass one per layer or head."
        )
    if not (math.isfinite(exponent) and exponent >= 0.0):
        raise ValueError(f"robustify expects an exponent >= 0, got {exponent}; the paper uses 0.5.")
    if not ((demand >= 0.0) & np.isfinite(demand)).all():
        raise ValueError(
            f"robustify expects finite demand >= 0, got {demand.tolist()}; repair the measurement."
        )
    budget, lower, upper = _broadcast(demand, total, low, high)
    largest = demand.max(-1, keepdims=True)
    share = np.maximum((demand / np.where(largest > 0.0, largest, 1.0)) ** exponent, _LEAST)
    return _largest_remainder(_fill(share, budget, lower, upper), budget)


def _array(value: float | Sequence[float] | torch.Tensor) -> Array:
    return np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value, dtype=np.float64)


def _broadcast(
    demand: Numbers, total: Numbers, low: Numbers, high: Numbers
) -> tuple[Array, Array, Array]:
    """Return total `[..., 1]`, low and high `[..., n]` in whole numbers that admit a solution."""
    try:
        budget = np.broadcast_to(total.astype(np.float64), demand.shape[:-1])[..., None]
        lower = np.broadcast_to(np.ceil(low - _SLACK) + 0.0, demand.shape)
        upper = np.broadcast_to(np.floor(high + _SLACK), demand.shape)
    except ValueError as error:
        raise ValueError(
            f"robustify expects total [...] and bounds [..., n] for demand {list(demand.shape)}, "
            f"got {list(total.shape)}, {list(low.shape)} and {list(high.shape)}."
        ) from error
    floor, ceiling = lower.sum(-1, keepdims=True), upper.sum(-1, keepdims=True)
    feasible = (floor <= budget) & (budget <= ceiling) & (budget == budget.round())
    feasible = feasible & ((lower >= 0.0) & (lower <= upper)).all(-1, keepdims=True)
    if not feasible.all():
        row = int((~feasible).ravel().argmax())
        count = demand.shape[-1]
        lo, hi = (bound.reshape(-1, count)[row].tolist() for bound in (lower, upper))
        raise ValueError(
            "robustify expects an integer B with sum(lo) <= B <= sum(hi) and 0 <= lo <= hi, got "
            f"B = {budget.ravel()[row]:g}, count = {count}, lo = {_short(lo)}, "
            f"hi = {_short(hi)}; raise the budget or loosen the bounds."
        )
    return budget, lower, upper


def _short(bound: list[float]) -> str:
    return f"{bound[0]:g}" if len(set(bound)) == 1 else str(bound)


def _fill(share: Array, budget: Array, lower: Array, upper: Array) -> Array:
    """Water-filling: `clip(c * share, lower, upper)` with the `c` at which a row sums to `budget`.

    The sum is piecewise linear in `c` with a break wherever an entry reaches a bound. Evaluated at
    all `2 n` breaks it says between which two the solution lies, and there one division gives it.
    """
    proportional = budget / share.sum(-1, keepdims=True) * share
    if ((lower < proportional) & (proportional < upper)).all():
        return proportional
    breaks = np.sort(np.concatenate([lower / share, upper / share], -1), -1)
    filled = np.minimum(
        np.maximum(breaks[..., None] * share[..., None, :], lower[..., None, :]),
        upper[..., None, :],
    )
    reached = (filled.sum(-1) < budget).sum(-1, keepdims=True).clip(max=breaks.shape[-1] - 1)
    right = np.take_along_axis(breaks, reached, -1)
    left = np.take_along_axis(breaks, (reached - 1).clip(min=0), -1)
    # Free between the two breaks: entries past their lower bound on the left of it and below their
    # upper bound on the right. The midpoint decides safely, rounding errors at the breaks do not.
    level = (left + right) / 2 * share
    free = (lower < level) & (level < upper)
    fixed = np.where(free, 0.0, level.clip(lower, upper)).sum(-1, keepdims=True)
    slope = np.where(free, share, 0.0).sum(-1, keepdims=True)
    # Without a free entry every c of the segment gives the same, and that sum is the budget.
    scale = np.divide(budget - fixed, slope, out=right.copy(), where=slope > 0.0)
    return (scale * share).clip(lower, upper)


def largest_remainder(filled: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Round down, then one more for the largest fractions until a row sums to `budget`.

    Parameters
    ----------
    filled : Tensor[..., n]
        float64, summing to `budget` up to rounding errors.
    budget : Tensor[..., 1]
        Whole numbers.

    Returns
    -------
    LongTensor[..., n]
        Of equal fractions the one with the lower index is rounded up.
    """
    return torch.from_numpy(_largest_remainder(_array(filled), _array(budget))).to(filled.device)


def _largest_remainder(filled: Array, budget: Array) -> Integers:
    # A sum's rounding error depends on how many entries there are; it must not decide a tie, or a
    # row would depend on the padding of its batch.
    filled = np.round(filled * _GRID) / _GRID
    down = np.floor(filled)
    missing = budget - down.sum(-1, keepdims=True)
    # An entry at its upper bound has no fraction, so it is never among the `missing` ones.
    order = np.argsort(down - filled, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return (down + (rank < missing)).astype(np.int64)
