"""The robustification operator R of ReasonAlloc: demand in, bounded integer budgets out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch

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
    tensor = torch.as_tensor(demand, dtype=torch.float64, device="cpu")
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(
            "robustify expects at least one demand, got none; pass one per layer or head."
        )
    if not (math.isfinite(exponent) and exponent >= 0.0):
        raise ValueError(f"robustify expects an exponent >= 0, got {exponent}; the paper uses 0.5.")
    if not bool(((tensor >= 0.0) & tensor.isfinite()).all()):
        raise ValueError(
            f"robustify expects finite demand >= 0, got {tensor.tolist()}; repair the measurement."
        )
    budget, lower, upper = _broadcast(tensor, total, low, high)
    largest = tensor.amax(-1, keepdim=True)
    share = (tensor / largest.where(largest > 0.0, 1.0)).pow(exponent).clamp(min=_LEAST)
    integers = largest_remainder(_fill(share, budget, lower, upper), budget)
    if isinstance(demand, torch.Tensor):
        return integers.to(demand.device)
    return integers.tolist()


def _broadcast(
    demand: torch.Tensor, total: int | torch.Tensor, low: Bound, high: Bound
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return total `[..., 1]`, low and high `[..., n]` in whole numbers that admit a solution."""
    budget, lower, upper = (
        torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in (total, low, high)
    )
    try:
        budget = budget.expand(demand.shape[:-1]).unsqueeze(-1)
        lower = ((lower - _SLACK).ceil() + 0.0).expand(demand.shape)
        upper = (upper + _SLACK).floor().expand(demand.shape)
    except RuntimeError as error:
        raise ValueError(
            f"robustify expects total [...] and bounds [..., n] for demand {list(demand.shape)}, "
            f"got {list(budget.shape)}, {list(lower.shape)} and {list(upper.shape)}."
        ) from error
    floor, ceiling = lower.sum(-1, keepdim=True), upper.sum(-1, keepdim=True)
    feasible = (floor <= budget) & (budget <= ceiling) & (budget == budget.round())
    feasible = feasible & ((lower >= 0.0) & (lower <= upper)).all(-1, keepdim=True)
    if not bool(feasible.all()):
        row = int((~feasible).flatten().nonzero()[0])
        count = demand.shape[-1]
        lo, hi = (bound.reshape(-1, count)[row].tolist() for bound in (lower, upper))
        raise ValueError(
            "robustify expects an integer B with sum(lo) <= B <= sum(hi) and 0 <= lo <= hi, got "
            f"B = {budget.flatten()[row].item():g}, count = {count}, lo = {_short(lo)}, "
            f"hi = {_short(hi)}; raise the budget or loosen the bounds."
        )
    return budget, lower, upper


def _short(bound: list[float]) -> str:
    return f"{bound[0]:g}" if len(set(bound)) == 1 else str(bound)


def _fill(
    share: torch.Tensor, budget: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """Water-filling: `clip(c * share, lower, upper)` with the `c` at which a row sums to `budget`.

    The sum is piecewise linear in `c` with a break wherever an entry reaches a bound. Evaluated at
    all `2 n` breaks it says between which two the solution lies, and there one division gives it.
    """
    breaks = torch.cat([lower / share, upper / share], -1).sort(-1).values
    filled = (breaks.unsqueeze(-1) * share.unsqueeze(-2)).clamp(
        lower.unsqueeze(-2), upper.unsqueeze(-2)
    )
    reached = (filled.sum(-1) < budget).sum(-1, keepdim=True).clamp(max=breaks.shape[-1] - 1)
    right = breaks.gather(-1, reached)
    left = breaks.gather(-1, (reached - 1).clamp(min=0))
    # Free between the two breaks: entries past their lower bound on the left of it and below their
    # upper bound on the right. The midpoint decides safely, rounding errors at the breaks do not.
    level = (left + right) / 2 * share
    free = (lower < level) & (level < upper)
    fixed = level.clamp(lower, upper).where(~free, 0.0).sum(-1, keepdim=True)
    slope = share.where(free, 0.0).sum(-1, keepdim=True)
    # Without a free entry every c of the segment gives the same, and that sum is the budget.
    level = ((budget - fixed) / slope).where(slope > 0.0, right) * share
    return level.clamp(lower, upper)


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
    # A sum's rounding error depends on how many entries there are; it must not decide a tie, or a
    # row would depend on the padding of its batch.
    filled = (filled * _GRID).round() / _GRID
    down = filled.floor()
    missing = budget - down.sum(-1, keepdim=True)
    # An entry at its upper bound has no fraction, so it is never among the `missing` ones.
    order = (filled - down).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1]).expand_as(order)
    )
    return (down + (rank < missing)).long()
