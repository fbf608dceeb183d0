"""From a pool to what a scorer sees, and from scores to what is kept."""

from __future__ import annotations

import torch

from hf_reasoncache.layers.pool import RaggedPool
from hf_reasoncache.scorers.base import HeldTokens


def gather_held(
    pool: RaggedPool,
    rows: torch.Tensor,
    *,
    first: torch.Tensor,
    columns: int,
    queries: torch.Tensor | None,
    scaling: float,
    layer: int,
) -> tuple[HeldTokens, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Collect what some rows hold, in order of position.

    Parameters
    ----------
    pool : RaggedPool
    rows : LongTensor[R]
        On the CPU.
    first : LongTensor[R]
        Column of each row's first real token.
    columns : int
        Columns of the padded sequence stored so far.
    queries : Tensor[B, H_q, A, D] or None
        The queries of the newest `A` columns, all rows of the batch.
    scaling, layer
        See `HeldTokens`.

    Returns
    -------
    held : HeldTokens
    slots, offset : LongTensor[R, H_kv, N]
        Where each token lies; see `RaggedPool.slots`.
    at : LongTensor[R, H_kv, N]
        Column of each token, -1 for filler.
    """
    slots, offset = pool.slots(rows)
    fields, device = pool.fields, slots.device
    at = fields["positions"][slots].long().masked_fill(offset < 0, -1)
    order = at.masked_fill(offset < 0, columns + 1).argsort(dim=-1, stable=True)
    slots, offset, at = (x.gather(-1, order) for x in (slots, offset, at))
    valid, start = offset >= 0, first.to(device)
    filler = None if bool(valid.all()) else ~valid

    def load(name: str) -> torch.Tensor:
        field = fields[name][slots]
        return (
            field
            if filler is None
            else field.masked_fill_(filler.view(*filler.shape, *[1] * (field.dim() - 3)), 0)
        )

    grouped = asked_at = None
    if queries is not None:
        chosen = queries[rows.to(queries.device)]
        grouped = chosen.unflatten(1, (slots.shape[1], -1))
        asked_at = torch.arange(columns - chosen.shape[2], columns, device=device) - start[:, None]
        asked_at = asked_at.clamp_min(-1)
    held = HeldTokens(
        keys=load("keys"),
        positions=(at - start[:, None, None]).masked_fill(~valid, -1),
        valid=valid,
        length=columns - start,
        scaling=scaling,
        layer=layer,
        load_values=lambda: load("values"),
        queries=grouped,
        query_positions=asked_at,
        mass=load("mass") if "mass" in fields else None,
        notes=load("notes") if "notes" in fields else None,
    )
    return held, slots, offset, at


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
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return (rank < budgets.to(scores.device)[..., None]).flip(-1)
