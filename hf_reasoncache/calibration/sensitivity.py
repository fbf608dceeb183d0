"""Our estimator: how much the output changes when one layer alone is squeezed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from hf_reasoncache.arguments import require_int
from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.calibration.allocation import marginal_allocation
from hf_reasoncache.calibration.estimate import Estimate, Record
from hf_reasoncache.calibration.squeeze import first_eviction, output_error, rows_per_batch
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.messages import shown
from hf_reasoncache.policies.budget import BudgetPolicy
from hf_reasoncache.scorers import RKV
from hf_reasoncache.scorers.base import Scorer

RULE = BudgetRule(exponent=1.0, low=0.1, high=4.0)
"""How the demand becomes budgets."""

_RESAMPLES = 200


@dataclass(frozen=True)
class Eviction:
    """How a measurement evicts: the settings of `ReasonAllocCache` that matter here.

    Attributes
    ----------
    scorer : Scorer
    buffer : int
        Tokens between two compactions.
    window : int
        Newest tokens that are never evicted.
    protect_prompt : bool
    head_budgets : bool
    """

    scorer: Scorer = field(default_factory=RKV)
    buffer: int = 128
    window: int = 8
    protect_prompt: bool = False
    head_budgets: bool = False

    def budget(self, traces: Sequence[Trace], part: int) -> int:
        """One `part`-th of the median trace, beyond the longest prompt if that is protected."""
        kept = max(len(trace.prompt) for trace in traces) if self.protect_prompt else 0
        middle = int(median(trace.length for trace in traces))
        return kept + max(self.window + 1, (middle - kept) // part)

    def expect_room(self, name: str, budget: int | None, prompts: Sequence[int]) -> None:
        """Raise ValueError if a budget, where it is given, cannot hold a protected prompt."""
        least = max(prompts) * self.protect_prompt + self.window
        if budget is not None and budget < least:
            raise ValueError(
                f"{name}: expected at least {least} tokens (the longest protected prompt and a "
                f"window of {self.window}), got {budget}; raise it, or do not protect the prompt."
            )

    def policy(self) -> BudgetPolicy:
        """Return the policy of a layer, whose budgets come from elsewhere."""
        return BudgetPolicy(budget=1, **vars(self))


@dataclass(frozen=True)
class Sensitivity:
    """Demand by what eviction does to the output.

    The curves are measured by teacher-forcing: one layer has a budget, all others keep everything,
    and the divergence of the next-token distribution from the full cache is averaged over the
    completion. The demand is what each layer gets when `budget` is spent for the least error by
    these curves, at least the smallest budget that was measured, and no more than removes the
    error: what is left over, the rule spreads in proportion. It is in tokens per KV head, so the
    rule's exponent is 1. The rule's bounds, 0.1 and 4 times the mean, are wider than the paper's
    0.25 and 2, which cost answers where the budget is tight (docs/calibration.md). The demand of
    the heads splits that of their layer in the same way.

    Errors of several layers are added, as if they did not interact; `Tune` and `Check` measure all
    layers squeezed together.

    Attributes
    ----------
    budgets : tuple of int
        Where the curves are measured, in tokens per KV head; empty takes 1/16, 1/8, 1/4 and 1/2 of
        the median trace, see `Eviction.budget`.
    budget : int or None
        The mean budget that the demand is to be best for; None takes 1/4.
    eviction : Eviction
    heads : bool
        Whether single KV heads are squeezed as well, for the demand of each head: that costs as
        many times more as a layer has KV heads.
    rows : int or None
        Squeezes that share a forward; None takes as many as hold 32,768 tokens together.
    every : int
        Predictions after every so many tokens of a completion are measured: four times fewer cost
        a third less and give the same wave.
    """

    budgets: tuple[int, ...] = ()
    budget: int | None = None
    eviction: Eviction = field(default_factory=Eviction)
    heads: bool = False
    rows: int | None = None
    every: int = 4

    name: ClassVar[str] = "sensitivity"

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("budget", self.budget), ("every", self.every)):
            if value is not None:
                require_int(name, value, low=1)
        for value in self.budgets:
            require_int("budgets", value, low=1)
        if list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets: expected ascending integers, got {shown(self.budgets)}.")
        if self.budgets and self.budgets[0] <= self.eviction.window:
            raise ValueError(
                f"budgets: expected more than the window of {self.eviction.window} tokens, which "
                f"are never evicted, got {self.budgets[0]}."
            )
        if self.budgets and self.budget is not None and self.budget <= self.budgets[0]:
            raise ValueError(
                f"budget: expected more than the smallest of the measured budgets, "
                f"{self.budgets[0]}, which every layer gets, got {self.budget}; there would be "
                "nothing to share out. Measure a smaller budget too."
            )

    def expect(self, prompts: Sequence[int], most: int) -> None:
        """See `Estimator.expect`."""
        self._expect_prompts(len(prompts))
        for budget in self.budgets[:1]:
            self.eviction.expect_room("budgets", budget, prompts)
            self._expect_text(max(prompts) + most, budget)

    def _expect_prompts(self, count: int) -> None:
        if count < 2:
            raise ValueError(f"sensitivity: expected at least 2 prompts, got {count}.")

    def _expect_text(self, longest: int, budget: int) -> None:
        room = budget + self.eviction.buffer
        if longest <= room:
            raise ValueError(
                f"sensitivity: expected texts longer than {room} tokens (the smallest budget and "
                f"the buffer), got at most {longest}: nothing would be evicted. Measure smaller "
                "budgets, use a smaller buffer, or let the model write more."
            )

    def resolve(self, traces: Sequence[Trace]) -> Sensitivity:
        """See `Estimator.resolve`.

        Raises
        ------
        ValueError
            If no trace is long enough for an eviction.
        """
        shares = sorted({self.eviction.budget(traces, part) for part in (16, 8, 4, 2)})
        budgets = self.budgets or tuple(shares)
        budget = self.budget or max(budgets[0] + 1, self.eviction.budget(traces, 4))
        self._expect_text(max(trace.length for trace in traces), budgets[0])
        return replace(self, budgets=budgets, budget=budget)

    def bound(self, prompts: Sequence[int], most: int, geometry: Geometry) -> int:
        """See `Estimator.bound`."""
        longest = Trace.longest(prompts, most)
        # Where the budgets follow from the answers, no four of them evict earlier than these.
        least = self.eviction.window + 1
        budgets = self.budgets or tuple(range(least, least + 4))
        return replace(self, budgets=budgets, budget=None).cost(longest, geometry)

    def cost(self, traces: Sequence[Trace], geometry: Geometry) -> int:
        """See `Estimator.cost`.

        A squeezed row is read from its first eviction on, and in the layers from its own on.
        """
        layers = geometry.full_attention_layers
        depth, units = layers[-1] + 1, 1 + geometry.kv_heads * self.heads
        above = units * sum(depth - layer for layer in layers) / depth
        total = 0.0
        for trace in traces:
            last, rows = trace.length - 1, units * len(layers) * len(self.budgets)
            total += -(-rows // rows_per_batch(trace, self.rows)) * last
            for budget in self.budgets:
                total += above * max(last - first_eviction(trace, budget, self.eviction.buffer), 0)
        return round(total)

    def measure(self, model: PreTrainedModel, trace: Trace) -> Record:
        """See `Estimator.measure`.

        Returns
        -------
        dict[str, Tensor]
            ``divergence`` `[L, budgets]` in nats, float64; with `heads` also ``head_divergence``
            `[L, H_kv, budgets]`.
        """
        geometry = Geometry.of(model.config)
        layers, heads = len(geometry.full_attention_layers), geometry.kv_heads
        # Which heads [U, H_kv] of a layer are squeezed: all, then each.
        units = torch.ones(1, heads, dtype=torch.bool)
        if self.heads:
            units = torch.cat([units, torch.eye(heads, dtype=torch.bool)])
        kept = torch.full((layers, len(units), len(self.budgets), layers, heads), trace.length)
        for layer in range(layers):
            for place, budget in enumerate(self.budgets):
                kept[layer, :, place, layer].masked_fill_(units, budget)
        found = output_error(
            model,
            trace,
            self.eviction.policy(),
            kept.flatten(0, 2),
            rows=self.rows,
            every=self.every,
        ).view(layers, len(units), -1)
        record = {"divergence": found[:, 0]}
        if self.heads:
            record["head_divergence"] = found[:, 1:]
        return record

    def estimate(self, records: Sequence[Record], traces: Sequence[Trace]) -> Estimate:
        """See `Estimator.estimate`; the error is that of 200 bootstrap samples of the prompts."""
        self._expect_prompts(len(records))
        curves = torch.stack([record["divergence"] for record in records])
        length = max(trace.length for trace in traces)
        resolved = self.resolve(traces)
        total = (resolved.budget or 0) * curves.shape[1]

        def split(some: torch.Tensor) -> torch.Tensor:
            found = marginal_allocation(resolved.budgets, some.mean(0), length, total)
            return torch.tensor(found, dtype=torch.float64)

        draws = torch.randint(
            len(curves),
            (_RESAMPLES, len(curves)),
            generator=torch.Generator().manual_seed(0),
        )
        spread = torch.stack([split(curves[draw]) for draw in draws]).std(0)
        demand, by_head = split(curves), None
        if self.heads:
            single = torch.stack([record["head_divergence"] for record in records]).mean(0)
            totals = (demand * single.shape[1]).long().tolist()
            shares = [
                marginal_allocation(resolved.budgets, layer, length, total)
                for layer, total in zip(single, totals, strict=True)
            ]
            by_head = torch.tensor(shares, dtype=torch.float64)
        return Estimate(demand, spread, RULE, by_head)
