"""From tokens to what a scorer sees, and from scores to what is kept."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch

from hf_reasoncache.budgets.ranking import kth_largest, lowest_first
from hf_reasoncache.layers.policy import EvictionPolicy
from hf_reasoncache.layers.row_budgets import RowBudgets
from hf_reasoncache.risk.guard import Select
from hf_reasoncache.scorers.base import HeldTokens
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool import RaggedPool


@dataclass(frozen=True, eq=False)
class EvictionContext:
    """Which rows of a layer are to be scored, and when.

    Attributes
    ----------
    rows : LongTensor[R]
        On the CPU.
    first : LongTensor[R]
        Column of each of these rows' first real token.
    columns : int
        Columns of the padded sequence seen so far.
    queries : Tensor[B, H_q, A, D] or None
        The queries of the newest `A` columns, all rows of the batch.
    scaling, layer, first_head
        See `HeldTokens`.
    """

    rows: torch.Tensor
    first: torch.Tensor
    columns: int
    queries: torch.Tensor | None
    scaling: float
    layer: int
    first_head: int = 0


def gather_held(
    pool: RaggedPool,
    occasion: EvictionContext,
    span: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[HeldTokens, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Collect what some rows hold, in order of position.

    Parameters
    ----------
    pool : RaggedPool
    occasion : EvictionContext
    span : two of LongTensor[R], optional
        First column of each row to collect, and first one after it not to; all by default.

    Returns
    -------
    held : HeldTokens
    slots, offset : LongTensor[R, H_kv, N]
        Where each token lies; see `RaggedPool.slots`.
    at : LongTensor[R, H_kv, N]
        Column of each token, -1 for filler.
    """
    slots, offset = pool.slots(occasion.rows)
    at = pool.take("positions", slots).long().masked_fill(offset < 0, -1)
    if span is None:
        order = lowest_first(at.masked_fill(offset < 0, occasion.columns + 1))
    else:
        low, high = (column.to(at.device)[:, None, None] for column in span)
        inside = (at >= low) & (at < high)
        offset, at = (x.masked_fill(~inside, -1) for x in (offset, at))
        # Selection, not a sort of everything: a span is short and the past may be long.
        far = at.masked_fill(~inside, occasion.columns + 1)
        order = far.topk(int(inside.sum(-1).max()), largest=False).indices
    slots, offset, at = (x.gather(-1, order) for x in (slots, offset, at))
    held = _held_tokens(occasion, at, lambda name: pool.take(name, slots), pool.fields)
    return held, slots, offset, at


def incoming_held(
    new: NewTokens, occasion: EvictionContext, *, keeps_notes: bool
) -> tuple[HeldTokens, torch.Tensor]:
    """Collect what a first forward brings for some rows, in order of position, before it is stored.

    Without padding, and if all rows are asked for, keys and values are not copied.

    Returns
    -------
    held : HeldTokens
    column : LongTensor[R, H_kv, N]
        Where each token lies among the new ones; filler lies on padding.
    """
    device, heads = new.keys.device, new.keys.shape[1]
    rows = occasion.rows.to(device)
    if new.valid is None:
        column = torch.arange(new.steps, device=device).expand(len(rows), -1)
        at = column
    else:
        real = new.valid[rows]
        count = real.sum(-1, keepdim=True)
        column = (~real).to(torch.uint8).argsort(dim=-1, stable=True)[:, : int(count.max())]
        at = column.where(torch.arange(column.shape[1], device=device) < count, -1)
    column, at = (x[:, None].expand(-1, heads, -1) for x in (column, at))

    def load(name: str) -> torch.Tensor:
        if name == "notes":
            return torch.zeros(at.shape, dtype=torch.int32, device=device)
        source = new.keys if name == "keys" else new.values
        source = source if len(rows) == len(source) else source[rows]
        if new.valid is None:
            return source
        return source.gather(2, column[..., None].expand(-1, -1, -1, source.shape[-1]))

    names = {"keys", "values", "notes"} if keeps_notes else {"keys", "values"}
    return _held_tokens(occasion, at, load, names), column


def _held_tokens(
    occasion: EvictionContext,
    at: torch.Tensor,
    load: Callable[[str], torch.Tensor],
    names: Container[str],
) -> HeldTokens:
    """Describe tokens to a scorer.

    `load` gives a quantity per token; where there is filler, a copy with anything in its place.
    """
    device, columns = at.device, occasion.columns
    valid, start = at >= 0, occasion.first.to(device)
    filler = (~valid).flatten().nonzero()[:, 0]
    positions = at - start[:, None, None]
    if filler.numel():
        positions.masked_fill_(~valid, -1)

    def clean(name: str) -> torch.Tensor:
        field = load(name)
        if filler.numel():
            field.view(-1, *field.shape[3:]).index_fill_(0, filler, 0)
        return field

    grouped = asked_at = None
    if occasion.queries is not None:
        chosen = occasion.queries[occasion.rows.to(device)]
        grouped = chosen.unflatten(1, (at.shape[1], -1))
        asked_at = torch.arange(columns - chosen.shape[2], columns, device=device) - start[:, None]
        asked_at = asked_at.clamp_min(-1)
    return HeldTokens(
        keys=clean("keys"),
        positions=positions,
        valid=valid,
        length=columns - start,
        scaling=occasion.scaling,
        layer=occasion.layer,
        first_head=occasion.first_head,
        load_values=lambda: clean("values"),
        queries=grouped,
        query_positions=asked_at,
        mass=clean("mass") if "mass" in names else None,
        notes=clean("notes") if "notes" in names else None,
    )


def rank(
    policy: EvictionPolicy,
    budgets: RowBudgets,
    occasion: EvictionContext,
    held: HeldTokens,
    protected: torch.Tensor,
) -> tuple[Select, RowBudgets]:
    """Score tokens, so that any number of them can be chosen to stay.

    Parameters
    ----------
    policy : EvictionPolicy
    budgets : RowBudgets
        Of all rows of the layer.
    occasion : EvictionContext
    held : HeldTokens
    protected : BoolTensor[R, H_kv, N]
        Tokens that stay whatever their score.

    Returns
    -------
    select : Callable
        From LongTensor[R, H_kv], tokens per head, to BoolTensor[R, H_kv, N], what stays.
    budgets : RowBudgets
        With the heads re-allocated where that was due.
    """
    scores = policy.scorer.score(held).masked_fill(protected, torch.inf)
    scores = held.blank(scores, -torch.inf)
    budgets = budgets.resplit(occasion.rows, scores, held.valid, occasion.columns)

    def select(per_head: torch.Tensor) -> torch.Tensor:
        keep = keep_top(scores, per_head) & held.valid
        if budgets.protection is None:
            return keep
        return budgets.protection.rebalance(
            occasion.rows, held.positions, keep, scores, held.valid, protected & held.valid
        )

    return select, budgets


def keep_top(scores: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """Mark the highest scores of every head; of equal scores the later one wins.

    Ties are common, since max-pooling copies a score to its neighbours, and an arbitrary choice
    among them would make a row depend on its batch.

    Parameters
    ----------
    scores : Tensor[R, H_kv, N]
        In order of position.
    budgets : LongTensor[R, H_kv]
        On any device.

    Returns
    -------
    BoolTensor[R, H_kv, N]
    """
    tokens = scores.shape[-1]
    if not tokens:
        return torch.zeros_like(scores, dtype=torch.bool)
    budgets = budgets.cpu().clamp(max=tokens)
    bar = kth_largest(scores, budgets.clamp(min=1))[..., None]
    budgets = budgets.to(scores.device)
    keep = scores >= bar
    if torch.equal(keep.sum(-1), budgets):
        return keep
    over, on_it = scores > bar, scores == bar
    spare = budgets[..., None] - over.sum(-1, keepdim=True)
    from_the_end = on_it.flip(-1).cumsum(-1).flip(-1)
    # Without a budget even the best score is one too many.
    return (over & (spare >= 0)) | (on_it & (from_the_end <= spare))
