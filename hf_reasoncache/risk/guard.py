"""A guard: where an eviction would move a head's output too far, fewer of its tokens go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from hf_reasoncache.risk.damage import Damage
from hf_reasoncache.shards import ALONE, Shard

Action = Literal["shrink", "abstain", "move"]

STEPS = 4
"""Steps between what a head is to keep and the most that it may."""


class Choice(Protocol):
    """What an eviction may keep; see `EvictionPlan`."""

    @property
    def per_head(self) -> torch.Tensor:
        """LongTensor[R, H]: tokens that a head is to keep."""
        ...

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Fewest and most that it may keep, LongTensor[R, H] on the CPU; None for no other."""
        ...

    def keep(self, per_head: torch.Tensor) -> torch.Tensor:
        """Return what stays, BoolTensor[R, H, N], of LongTensor[R, H] tokens per head."""
        ...


class Scale(Protocol):
    """What weighs choices; see `DamageScale`."""

    def measure(self, keeps: Sequence[torch.Tensor]) -> list[Damage]:
        """Return the damage of each of some choices, BoolTensor[R, H, N]."""
        ...


@dataclass(frozen=True)
class Guard:
    """What holds an eviction's error to a limit; ours. See `Risk`, which makes it.

    Attributes
    ----------
    limit : float
        Largest `Damage.error` of a head that is accepted.
    action : {"shrink", "abstain", "move"}
        What to do beyond it.
    """

    limit: float
    action: Action = "shrink"

    def choose(
        self, plan: Choice, scale: Scale, shard: Shard = ALONE
    ) -> tuple[torch.Tensor, Damage]:
        """Choose what stays.

        Parameters
        ----------
        plan : Choice
        scale : Scale
        shard : Shard
            Where other processes have heads of the layer, "move" takes those in.

        Returns
        -------
        keep : BoolTensor[R, H, N]
        damage : Damage
            Of that choice.
        """
        keep = plan.keep(plan.per_head)
        damage = scale.measure([keep])[0]
        if plan.bounds is None:
            return keep, damage
        over = (damage.error > self.limit).cpu()
        budgets, most = torch.broadcast_tensors(plan.per_head.cpu(), plan.bounds[1])
        unit = (most - budgets).clamp_min(0) // STEPS
        down, anywhere, moves = 0, over, self.action == "move"
        if moves:
            # One step of one head is one step of another.
            units, anywhere = shard.gather(torch.stack([unit, over.long()], -1)).unbind(-1)
            down, unit = STEPS - 1, units.amin(-1, keepdim=True).expand_as(unit)
        if not bool(anywhere.any()):
            return keep, damage
        if self.action == "abstain":
            chosen = most.where(over, budgets)
        else:
            least = torch.minimum(plan.bounds[0], budgets)
            steps = range(-down, STEPS + 1)
            ladder = [torch.maximum(budgets + step * unit, least) for step in steps]
            errors = [damage.error for damage in scale.measure([plan.keep(x) for x in ladder])]
            by_step = torch.stack(errors, -1).cpu()
            if moves:
                lowest = -((budgets - least) // unit.clamp_min(1)).clamp_max(down)
                told = shard.gather(torch.cat([by_step, lowest[..., None].to(by_step.dtype)], -1))
                level = self._moved(told[..., :-1], told[..., -1].long(), down)
                level = shard.own(level, lowest.shape[1])
                chosen = budgets + level * unit
            else:
                level = self._raised(by_step)
                # Where no step is enough: all the room there is, what no step divides too.
                chosen = most.where(level == STEPS, budgets + level * unit)
        keep = plan.keep(chosen)
        return keep, scale.measure([keep])[0]

    def _raised(self, errors: torch.Tensor) -> torch.Tensor:
        """LongTensor[R, H]: fewest steps up that bring a head's error to the limit, or all."""
        fine = errors <= self.limit
        return fine.int().argmax(-1).where(fine.any(-1), STEPS)

    def _moved(self, errors: torch.Tensor, lowest: torch.Tensor, down: int) -> torch.Tensor:
        """Give steps to the head with the largest error, as long as another can pay.

        Parameters
        ----------
        errors : Tensor[R, H, down + 1 + STEPS]
            Error of each head by level.
        lowest : LongTensor[R, H]
            Steps that a head may go down, negative.
        down : int

        Returns
        -------
        LongTensor[R, H]
            Steps up or down; a row's sum to zero.
        """
        level = torch.zeros_like(lowest)
        for own, at, end in zip(level, errors, lowest, strict=True):
            while True:
                now = at.gather(-1, (own + down)[:, None])[:, 0]
                lower = at.gather(-1, (own + down - 1).clamp_min(0)[:, None])[:, 0]
                # A head that has paid is not given, nor the other way round: this ends.
                needy = now.masked_fill((own < 0) | (own == STEPS), -torch.inf)
                payer = lower.masked_fill((own > 0) | (own == end), torch.inf)
                taker = int(needy.argmax())
                payer[taker] = torch.inf
                giver = int(payer.argmin())
                if needy[taker] <= self.limit or payer[giver] >= needy[taker]:
                    break
                own[taker] += 1
                own[giver] -= 1
        return level
