"""What a cache measures of its risk, and what it does about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, get_args

import torch

from hf_reasoncache.messages import shown
from hf_reasoncache.risk.damage import Damage
from hf_reasoncache.risk.guard import Action, Choice, Guard, Scale
from hf_reasoncache.risk.probes import Probes
from hf_reasoncache.shards import ALONE, Shard


@dataclass(frozen=True)
class Risk:
    """What is measured of evictions, in `report()`, and how large their error may be.

    An eviction is measured before it happens: how far it moves the output of each head for the
    newest queries. That certifies these outputs, not the quality of the answer.

    Attributes
    ----------
    limit : float, optional
        Largest relative error of a head's output (`Damage.error`) that an eviction may cause;
        beyond it, `action` is taken. By default evictions are measured only.
    action : {"shrink", "abstain", "move"}
        "shrink" keeps as many more tokens of the head as bring its error to the limit, or the most
        there is room for. "abstain" keeps the most at once. "move" lets heads of the same row and
        layer pay for it, as long as their own error stays the smaller one: the row keeps as many
        tokens as without a limit.
    measure : bool
        Whether evictions are measured; a limit needs that.
    probes : Probes, optional
        Keep all tokens of some heads in CPU memory, and now and then measure the true error.
    queries : int
        Newest queries of a row that an eviction is measured with.

    Raises
    ------
    ValueError
        If a value is not valid, or there is a limit and nothing is measured.

    Notes
    -----
    A limit spends the room that would stay free until the next eviction, never more: a head of a
    `ReasonAllocCache` holds `budget + buffer` tokens at most with or without it, and after an
    eviction at least a quarter of `buffer` is free. So evictions come up to four times as often,
    and after one a head may hold more than its budget. A head of a `SlidingWindowCompressCache`
    keeps at most three quarters of what a window would lose, and `max_budget` holds as without.
    """

    limit: float | None = None
    action: Action = "shrink"
    measure: bool = True
    probes: Probes | None = None
    queries: int = 8

    def __post_init__(self) -> None:
        """Check."""
        if self.limit is not None:
            number = isinstance(self.limit, Real) and not isinstance(self.limit, bool)
            if not number or not 0 <= self.limit < math.inf:
                raise ValueError(
                    "risk: expected the limit as a finite number >= 0, got "
                    f"{shown(self.limit)}; True only measures, a Risk says more."
                )
        if self.action not in get_args(Action):
            raise ValueError(
                f"risk: expected an action in {get_args(Action)}, got {shown(self.action)}."
            )
        if not isinstance(self.measure, bool):
            raise ValueError(f"risk: expected measure as True or False, got {shown(self.measure)}.")
        if self.limit is not None and not self.measure:
            raise ValueError(
                "risk: expected measure=True beside a limit, got False; an eviction has to be "
                "measured to be held to it."
            )
        if not isinstance(self.probes, Probes | None):
            raise ValueError(
                f"risk: expected probes as a risk.Probes, got {shown(self.probes)}; pass Probes()."
            )
        if type(self.queries) is not int or self.queries < 1:
            raise ValueError(
                f"risk: expected queries as an integer >= 1, got {shown(self.queries)}."
            )

    @staticmethod
    def of(value: Any) -> Risk | None:
        """Make settings of what users pass; None measures nothing.

        Parameters
        ----------
        value : Risk, float, bool or None
            As it is; a limit; whether to measure.

        Raises
        ------
        ValueError
            If it is anything else.
        """
        if value is None or isinstance(value, Risk):
            return value
        if isinstance(value, bool):
            return Risk() if value else None
        return Risk(limit=value)

    @property
    def guard(self) -> Guard | None:
        """What holds evictions to the limit, if there is one."""
        return None if self.limit is None else Guard(self.limit, self.action)

    def choose(
        self, plan: Choice, scale: Scale, shard: Shard = ALONE
    ) -> tuple[torch.Tensor, Damage]:
        """Choose what stays, and measure it; see `Guard.choose`."""
        guard = self.guard
        if guard is not None:
            return guard.choose(plan, scale, shard)
        keep = plan.keep(plan.per_head)
        return keep, scale.measure([keep])[0]
