"""What evictions have cost so far in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_reasoncache.risk.damage import Damage


def _none() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.long, device="cpu")


@dataclass(frozen=True, eq=False)
class RiskLog:
    """The damage of every eviction of a layer, rows apart; on the CPU. Changes give a new object.

    It says how far one head's output moved, for the queries known just before each eviction,
    against all that was held then. Earlier losses, later queries and the answer are not in it.

    Attributes
    ----------
    rows, columns : LongTensor[M]
        Row of the batch, and columns seen, of each eviction.
    mass, error, worst : Tensor[M, H]
        See `Damage`.
    """

    rows: torch.Tensor = field(default_factory=_none)
    columns: torch.Tensor = field(default_factory=_none)
    mass: torch.Tensor = field(default_factory=lambda: _none().float()[:, None])
    error: torch.Tensor = field(default_factory=lambda: _none().float()[:, None])
    worst: torch.Tensor = field(default_factory=lambda: _none().float()[:, None])

    def __len__(self) -> int:
        """Evictions measured, each row counted."""
        return len(self.rows)

    def add(self, rows: torch.Tensor, column: int, damage: Damage) -> RiskLog:
        """Take note of an eviction of some `rows`, LongTensor[R]."""

        def join(name: str) -> torch.Tensor:
            new = getattr(damage, name).float().cpu()
            return torch.cat([getattr(self, name), new]) if len(self) else new

        return RiskLog(
            rows=torch.cat([self.rows, rows]),
            columns=torch.cat([self.columns, torch.full_like(rows, column)]),
            mass=join("mass"),
            error=join("error"),
            worst=join("worst"),
        )

    def select_rows(self, rows: torch.Tensor) -> RiskLog:
        """Keep, repeat or reorder rows: a copy of a row has its past."""
        new, entry = (rows[:, None] == self.rows).nonzero(as_tuple=True)
        return RiskLog(new, *(x[entry] for x in (self.columns, self.mass, self.error, self.worst)))

    def of_row(self, row: int) -> RiskLog:
        """The evictions of one row of the batch."""
        return self._only(self.rows == row)

    def until(self, columns: int) -> RiskLog:
        """The entries made when no more than `columns` columns had been seen."""
        return self._only(self.columns <= columns)

    def _only(self, chosen: torch.Tensor) -> RiskLog:
        entries = (self.rows, self.columns, self.mass, self.error, self.worst)
        return RiskLog(*(x[chosen] for x in entries))

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(x.untyped_storage().nbytes() for x in vars(self).values())

    @property
    def latest(self) -> torch.Tensor:
        """Tensor[H]: largest error over the rows of the newest eviction; NaN without one."""
        if not len(self):
            return torch.full((self.error.shape[1],), torch.nan, device="cpu")
        return self.error[self.columns == self.columns.max()].amax(0)

    @staticmethod
    def join(logs: Sequence[RiskLog]) -> torch.Tensor:
        """Tensor[...]: the errors of all evictions, rows and heads of some layers."""
        return torch.cat([log.error.flatten() for log in logs])

    def quantile(self, share: float) -> torch.Tensor:
        """Tensor[H]: the error that `share` of a head's evictions do not exceed; NaN without."""
        if not len(self):
            return torch.full((self.error.shape[1],), torch.nan, device="cpu")
        return self.error.quantile(share, dim=0)
