"""Online budgets: how many tokens each head of a layer keeps until the next eviction."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

from hf_reasoncache.budgets.layers import expect_bounds
from hf_reasoncache.budgets.ranking import kth_largest
from hf_reasoncache.budgets.robustify import Integers, split

Comparable = Literal["length", "raw"]


def head_budgets(
    scores: torch.Tensor,
    valid: torch.Tensor,
    total: int | torch.Tensor,
    *,
    exponent: float = 0.5,
    floor: int | torch.Tensor = 0,
    low: float = 0.25,
    high: float = 2.0,
    comparable: Comparable = "length",
    lattice: bool = True,
) -> torch.Tensor:
    """Split a layer's budget over its heads by where the best tokens of all heads are.

    Level 2 of ReasonAlloc (arXiv 2606.11164): pool the utilities of a row over its heads, take the
    `total`-th largest as the bar, count each head's tokens that reach it, and robustify the counts.
    The upper bound, the floor, the length correction and the lattice are ours.

    **The lattice.** Attention over heads of many different capacities is many small calls; over
    heads of equal capacity it is one batched call. So the budgets are moved to `lo + k * unit` with
    `unit = max(1, (mean - lo) // 2)` and `lo` the effective lower bound, by largest remainder: at
    most six classes under the default bounds, one to three in practice. The sum stays exact: what
    no unit divides goes to one head, the one furthest below its share. Where the bounds are too
    narrow for the lattice, the unit is 1.

    Parameters
    ----------
    scores : Tensor[R, H, N]
        Utility of each held token, higher is kept; +inf for protected tokens, which count in every
        case.
    valid : BoolTensor[R, H, N]
        False marks filler.
    total : int, or LongTensor[R]
        Tokens of all heads of the row together (`T = B_l * H`).
    exponent : float
        Flattens the counts, see `robustify`.
    floor : int, or LongTensor[R]
        Tokens every head must be able to hold: protected prompt and observation window. It
        overrides `low`.
    low, high : float
        Bounds in multiples of the mean head budget `total / H`, with `0 <= low <= 1 <= high`,
        rounded to integers between which the mean lies.
    comparable : {"length", "raw"}
        "length" multiplies a score by its head's number of held tokens before pooling: for scores
        normalised over each head's own tokens (R-KV), which shrink as a head holds more. "raw"
        pools scores as they are: for attention mass and for scores without a normalisation.
    lattice : bool
        Whether budgets lie on the lattice; without it each is what its share rounds to.

    Returns
    -------
    LongTensor[R, H]
        On the device of `scores`; sums to `total` in every row. A budget is a capacity: it may
        exceed what the head holds now. Rows do not influence each other.

    Raises
    ------
    ValueError
        If the shapes do not fit, `comparable` is unknown, `low` and `high` do not enclose 1, or the
        heads' floors exceed the total.
    """
    if scores.dim() != 3 or valid.shape != scores.shape:
        raise ValueError(
            "head_budgets expects scores and valid [R, H, N], got "
            f"{list(scores.shape)} and {list(valid.shape)}."
        )
    if comparable not in get_args(Comparable):
        raise ValueError(
            f"head_budgets expects comparable in {get_args(Comparable)}, got {comparable!r}."
        )
    expect_bounds("head_budgets", low, high)
    rows, heads, _ = scores.shape
    budget = _per_row("total", total, rows)
    least = _per_row("floor", floor, rows)
    if ((least * heads > budget) | (least < 0)).any():
        raise ValueError(
            "head_budgets expects 0 <= floor * heads <= total in every row, got floor = "
            f"{least.tolist()}, heads = {heads} and total = {budget.tolist()}; raise the budget, "
            "or protect fewer tokens."
        )
    demand = _reaching(scores, valid, torch.from_numpy(budget), comparable).cpu().numpy()
    mean = budget / heads
    # The mean's own integers keep bounds of 1 solvable when the heads do not divide the total.
    lower = np.minimum(np.ceil(low * mean - 1e-9), np.floor(mean)).astype(np.int64)
    upper = np.maximum(np.floor(high * mean + 1e-9), np.ceil(mean)).astype(np.int64)
    lower = np.maximum(lower, least)
    found = split(demand, budget, exponent=exponent, low=lower[:, None], high=upper[:, None])
    if lattice:
        found = _on_lattice(found, budget, lower, upper)
    return torch.from_numpy(found).to(scores.device)


def _per_row(name: str, value: int | torch.Tensor, rows: int) -> Integers:
    array = np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value, dtype=np.int64)
    if array.ndim > 1 or (array.ndim == 1 and len(array) != rows):
        raise ValueError(
            f"head_budgets expects {name} as an integer or as [{rows}], got {list(array.shape)}."
        )
    return np.full(rows, array)


def _reaching(
    scores: torch.Tensor, valid: torch.Tensor, budget: torch.Tensor, comparable: str
) -> torch.Tensor:
    """Count each head's tokens among the `budget` best of its row: LongTensor `[R, H]`."""
    utility = scores
    if comparable == "length":
        # Filler is masked below; until then its product may be anything.
        utility = scores * valid.sum(-1, keepdim=True)
    utility = utility.masked_fill(~valid, -torch.inf)
    # A row that holds less than its budget keeps everything; its bar is its smallest utility.
    rank = torch.minimum(budget, valid.flatten(1).sum(-1).cpu()).clamp(min=1)
    bar = kth_largest(utility.flatten(1), rank)[:, None, None]
    return ((utility >= bar) & valid).sum(-1)


def _on_lattice(budgets: Integers, total: Integers, lower: Integers, upper: Integers) -> Integers:
    """Move budgets `[R, H]` to `lower + k * unit`, but for one head per row; keep the sum."""
    heads = budgets.shape[1]
    spare = total - heads * lower
    unit = np.maximum(spare // heads // 2, 1)
    steps = (upper - lower) // unit
    # Some head must have room for the remainder besides its units.
    fits = heads * steps >= spare // unit + (spare % unit > 0)
    unit = np.where(fits, unit, 1)
    count, remainder = spare // unit, spare % unit
    above = budgets - lower[:, None]
    steps = (upper - lower) // unit
    level = split(above, count, exponent=1.0, low=np.zeros(1), high=steps[:, None])
    level *= unit[:, None]
    room = level + remainder[:, None] <= (upper - lower)[:, None]
    shortfall = np.where(room, above - level, -np.iinfo(np.int64).max)
    level[np.arange(len(level)), shortfall.argmax(-1)] += remainder
    return lower[:, None] + level
