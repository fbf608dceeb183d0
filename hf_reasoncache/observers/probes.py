"""Shadow probes: at some heads and steps, how far the output is from that of all tokens ever seen.

What an eviction does to the queries known before it is `Damage`; what it does to later ones shows
only there. A shadow keeps every key and value of a few heads in CPU memory, and now and then
attends to them as well.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from hf_reasoncache.observers.base import Observed, Observer
from hf_reasoncache.risk.damage import eviction_damage
from hf_reasoncache.risk.log import RiskLog
from hf_reasoncache.risk.probes import Probes
from hf_reasoncache.storage.new_tokens import NewTokens


class Shadow(Observer):
    """All keys and values of some heads of one layer, on the CPU, and what probes have found.

    Parameters
    ----------
    settings : Probes

    Attributes
    ----------
    heads : LongTensor[H']
        Those that are probed, drawn with the first tokens.
    log : RiskLog or None
        One entry per probe and row; heads in the order of `heads`. None where no head was drawn.
    """

    def __init__(self, settings: Probes) -> None:
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """See `Observer.reset`."""
        self.heads: torch.Tensor | None = None
        self._phase = 0
        self.log = None
        self._chunks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._hidden: torch.Tensor | None = None

    def attended(self, layer: Observed, new: NewTokens) -> None:
        """See `Observer.attended`: keeps the tokens, and probes where a single one is due."""
        if self.heads is None:
            heads, self._phase = self.settings.draw(layer.index, new.keys.shape[1], layer.shard)
            self.heads = torch.tensor(heads, dtype=torch.long, device="cpu")
            self.log = RiskLog() if heads else None
        if self.log is None:
            return
        self.append(new.keys, new.values, new.valid)
        if new.q_len == 1 and self.columns % self.settings.interval == self._phase:
            rows = torch.arange(new.keys.shape[0], device="cpu")
            self.probe(new.query, layer.store.read(rows).columns, new.settings)

    @property
    def columns(self) -> int:
        """Columns stored."""
        return sum(valid.shape[1] for *_, valid in self._chunks)

    def _drawn(self) -> torch.Tensor:
        if self.heads is None:
            raise ValueError("expected heads that are probed, got none before the first tokens.")
        return self.heads

    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Store new tokens.

        Parameters
        ----------
        keys, values : Tensor[B, H_kv, T, D], Tensor[B, H_kv, T, D_v]
        valid : BoolTensor[B, T] or None
            False for padding.
        """
        if valid is None:
            valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device="cpu")
        own = self._drawn().to(keys.device, non_blocking=True)
        keys, values = (x.index_select(1, own).cpu() for x in (keys, values))
        self._chunks.append((keys, values, valid.cpu()))

    def hide(self, hidden: torch.Tensor) -> None:
        """See `Observer.hide`; what is hidden is no part of the truth."""
        self._hidden = hidden.cpu()

    def probe(self, query: torch.Tensor, columns: torch.Tensor, settings: dict[str, Any]) -> None:
        """Compare the newest token's attention to what is held with that to everything.

        Parameters
        ----------
        query : Tensor[B, H_q, 1, D]
        columns : LongTensor[B, H_kv, N]
            Columns that each head holds, -1 for filler.
        settings : dict
            `scaling`, `softcap`, `s_aux` of the attention.
        """
        if len(self._chunks) > 1:
            parts = zip(*self._chunks, strict=True)
            keys, values, valid = (
                torch.cat(part, dim=-1 if part[0].dim() == 2 else 2) for part in parts
            )
            self._chunks = [(keys, values, valid)]
        keys, values, valid = self._chunks[0]
        rows, total = valid.shape
        if self._hidden is not None:
            missing = total - self._hidden.shape[1]
            valid = valid & ~torch.nn.functional.pad(self._hidden, (0, missing))
        heads = self._drawn()
        own = columns.cpu()[:, heads]
        held = torch.zeros(rows, len(heads), total + 1, dtype=torch.bool, device="cpu")
        held.scatter_(-1, own.where(own >= 0, total), True)
        at = torch.arange(total, device="cpu").where(valid, -1)[:, None].expand(-1, len(heads), -1)
        grouped = query.cpu().unflatten(1, (columns.shape[1], -1))
        sinks = settings.get("s_aux")
        if sinks is not None:
            sinks = sinks.detach().cpu().view(columns.shape[1], -1)[heads].flatten()
        [damage] = eviction_damage(
            grouped[:, heads],
            torch.full((rows, 1), total - 1, device="cpu"),
            keys,
            values,
            at,
            [held[..., :total]],
            **(settings | {"s_aux": sinks}),
        )
        log = RiskLog() if self.log is None else self.log
        self.log = log.add(torch.arange(rows, device="cpu"), total, damage)

    def crop(self, columns: int) -> None:
        """See `Observer.crop`; what was found later is forgotten too."""
        kept, begin = [], 0
        for keys, values, valid in self._chunks:
            left = max(0, min(valid.shape[1], columns - begin))
            if left:
                kept.append((keys[:, :, :left], values[:, :, :left], valid[:, :left]))
            begin += valid.shape[1]
        self._chunks = kept
        if self._hidden is not None:
            self._hidden = self._hidden[:, :columns]
        self.log = None if self.log is None else self.log.until(columns)

    def select_rows(self, rows: torch.Tensor) -> None:
        """See `Observer.select_rows`."""
        self._chunks = [
            (keys[rows], values[rows], valid[rows]) for keys, values, valid in self._chunks
        ]
        if self._hidden is not None:
            self._hidden = self._hidden[rows]
        self.log = None if self.log is None else self.log.select_rows(rows)

    def clone(self) -> Shadow:
        """See `Observer.clone`; stored tensors are never written to."""
        copied = copy.copy(self)
        copied._chunks = list(self._chunks)
        return copied

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of CPU memory."""
        stored = sum(x.untyped_storage().nbytes() for chunk in self._chunks for x in chunk)
        return stored + (0 if self.log is None else self.log.nbytes)
