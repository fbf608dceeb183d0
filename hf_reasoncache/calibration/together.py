"""All layers squeezed together, as in use: what a split of the budget does to the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_reasoncache.arguments import require_int
from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.calibration.bootstrap import mean_interval
from hf_reasoncache.calibration.estimate import Estimate, Record
from hf_reasoncache.calibration.sensitivity import Eviction
from hf_reasoncache.calibration.squeeze import first_eviction, output_error, rows_per_batch
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.geometry import Geometry

CHUNK = 16
"""Tokens per forward: each layer evicts at its own times, which forwards cannot all end at."""


def split_errors(
    model: PreTrainedModel,
    trace: Trace,
    eviction: Eviction,
    budget: int,
    demand: Sequence[float],
    rules: Sequence[BudgetRule],
    *,
    rows: int | None = None,
    every: int = 1,
) -> torch.Tensor:
    """Divergence from the full cache under the splits that rules make of a mean budget.

    Returns
    -------
    Tensor[rules]
        In nats per token; see `output_error`.
    """
    floor = eviction.window + len(trace.prompt) * eviction.protect_prompt
    splits = [rule.layer_budgets(demand, budget, floor=floor) for rule in rules]
    heads = Geometry.of(model.config).kv_heads
    budgets = torch.tensor(splits)[:, :, None].expand(-1, -1, heads)
    return output_error(
        model, trace, eviction.policy(), budgets, rows=rows, every=every, chunk=CHUNK
    )


def split_cost(traces: Sequence[Trace], splits: int, rows: int | None) -> int:
    """Count the tokens that `split_errors` feeds through the whole model."""
    total = 0
    for trace in traces:
        last, batches = trace.length - 1, -(-splits // rows_per_batch(trace, rows))
        total += last * (batches + splits)
    return total


@dataclass(frozen=True)
class Comparison:
    """Divergence under one split of the budget less that under another, over prompts.

    Attributes
    ----------
    other : str
    difference : float
        Mean, in nats per token; negative if the first is better.
    low, high : float
        Bootstrap 95% interval of the mean.
    """

    other: str
    difference: float
    low: float
    high: float

    @staticmethod
    def of(other: str, differences: torch.Tensor) -> Comparison:
        """Judge paired differences, Tensor[prompts]."""
        low, high = mean_interval(differences)
        return Comparison(other, float(differences.mean()), low, high)

    def to_json(self) -> dict[str, Any]:
        """JSON values for a profile."""
        return asdict(self) | {"verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """The conclusion that the interval allows."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "no difference shown"

    def __str__(self) -> str:
        return (
            f"against {self.other}: {self.verdict}, {self.difference:+.3g} nats per token "
            f"(95% interval {self.low:+.3g} to {self.high:+.3g})"
        )


@dataclass(frozen=True)
class Check:
    """Whether a profile does better than equal layers on the texts that it was measured on.

    The texts are not fresh: a profile that is no better here is of no use, one that is better here
    still has to show it on others.

    Attributes
    ----------
    budget : int or None
        Mean budget that both split; None takes 1/4 of the median trace, see `Eviction.budget`.
    eviction : Eviction
    rows : int or None
        See `rows_per_batch`.
    every : int
        Predictions after every so many tokens of a completion are measured.
    """

    budget: int | None = None
    eviction: Eviction = field(default_factory=Eviction)
    rows: int | None = None
    every: int = 4

    def __post_init__(self) -> None:
        for name, value in (("budget", self.budget), ("rows", self.rows), ("every", self.every)):
            if value is not None:
                require_int(name, value, low=1)

    def resolve(self, traces: Sequence[Trace]) -> Check | None:
        """Fill in the budget; None if no trace is long enough for an eviction."""
        budget, buffer = self.budget or self.eviction.budget(traces, 4), self.eviction.buffer
        evicts = any(first_eviction(trace, budget, buffer) < trace.length - 1 for trace in traces)
        return replace(self, budget=budget) if evicts else None

    def cost(self, traces: Sequence[Trace]) -> int:
        """Count the tokens that measuring feeds through the whole model."""
        return split_cost(traces, 2, self.rows)

    def measure(self, model: PreTrainedModel, trace: Trace, estimate: Estimate) -> Record:
        """Measure one prompt: ``divergence`` `[2]` in nats, of the profile and of equal layers.

        Raises
        ------
        ValueError
            If the budget was not resolved.
        """
        if self.budget is None:
            raise ValueError("check: expected a budget, got None; resolve it first.")
        rules = [estimate.rule, replace(estimate.rule, exponent=0.0)]
        return {
            "divergence": split_errors(
                model,
                trace,
                self.eviction,
                self.budget,
                estimate.demand.tolist(),
                rules,
                rows=self.rows,
                every=self.every,
            )
        }

    @staticmethod
    def outcome(records: Sequence[Record]) -> Comparison:
        """Compare what was measured on all prompts."""
        errors = torch.stack([record["divergence"] for record in records])
        return Comparison.of("equal layers", errors[:, 0] - errors[:, 1])
