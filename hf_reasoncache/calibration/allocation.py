"""Budgets from measured curves: every token goes where it lowers the error most."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

_NOISE = 2e-3
"""Share of the largest measured error below which an error counts as none. A few prompts say little
about the rare ones that fail: at 1e-3 the split changed more from one sample to the next."""

Point = tuple[float, float]


def marginal_allocation(
    budgets: Sequence[int], errors: torch.Tensor, length: int, total: int
) -> list[int]:
    """How many tokens each layer needs: at most a given budget, spent for the least error.

    Errors fall about exponentially with the budget, so each layer's curve is the lower convex hull
    of its measured points in the logarithm. Such curves are convex, and for those it is optimal to
    hand out the tokens one by one, each to the layer whose error falls most, until the budget is
    spent or no error is left.

    Parameters
    ----------
    budgets : sequence of int
        Where errors were measured, ascending. No layer gets less than the first.
    errors : Tensor[L, len(budgets)]
        Error of the output when one layer has that budget and all others keep everything.
    length : int
        Tokens of a text: with as many, a layer makes no error.
    total : int
        Tokens to spend, at least `budgets[0] * L`.

    Returns
    -------
    list of int
        Tokens for each layer; their sum is at most `total`.
    """
    layers, low = len(errors), budgets[0]
    floor = max(float(errors.max()) * _NOISE, torch.finfo(torch.float64).tiny)
    logs = errors.double().clamp(min=floor).log()
    end = (float(length), float(torch.tensor(floor, dtype=torch.float64).log()))
    curves = []
    for layer in logs.tolist():
        points = [(float(b), e) for b, e in zip(budgets, layer, strict=True) if b < length]
        curves.append(_on_hull([*points, end], low, max(length, low)))
    # By budget, then by layer: of equal gains a stable sort takes the layer that has least.
    gains = -torch.stack(curves).exp().diff(dim=1).T.flatten()
    order = gains.argsort(descending=True, stable=True)[: total - low * layers]
    useful = order[gains[order] > 0]
    return (low + (useful % layers).bincount(minlength=layers)).tolist()


def convex_hull(points: Sequence[Point]) -> list[Point]:
    """Lower convex hull of points `(x, y)` that ascend in `x`."""
    hull: list[Point] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _on_hull(points: Sequence[Point], low: int, high: int) -> torch.Tensor:
    """Hull of the points at the budgets `low` to `high`: float64; constant beyond the last."""
    hull = convex_hull(points)
    at = torch.arange(low, high + 1, dtype=torch.float64)
    result = torch.full_like(at, hull[-1][1])
    for left, right in pairwise(hull):
        inside = (left[0] <= at) & (at < right[0])
        result[inside] = left[1] + _slope(left, right) * (at[inside] - left[0])
    return result


def _slope(left: Point, right: Point) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
