"""Ours: exponent and bounds of the budget rule, chosen by what eviction does to the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_reasoncache.arguments import require_int
from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.calibration.estimate import Estimate, Record
from hf_reasoncache.calibration.sensitivity import Eviction
from hf_reasoncache.calibration.together import Comparison, split_cost, split_errors
from hf_reasoncache.calibration.traces import Trace


@dataclass(frozen=True)
class Tune:
    """A search for the rule that has the least error on prompts that the demand did not see.

    The paper chose its constants by hand on one prompt. Here all layers are squeezed together, as
    in use, and the divergence of the next-token distribution from the full cache decides; no task
    labels are needed. Of rules that give the same budgets one is measured, the estimator's own
    first of all.

    Attributes
    ----------
    budget : int or None
        Mean budget at which rules are compared; None takes 1/4 of the median trace, see
        `Eviction.budget`.
    eviction : Eviction
    exponents : tuple of float
        Multiples of the estimator's exponent; 0 is uniform.
    lows, highs : tuple of float
        Bounds in multiples of the mean budget.
    held_out : float
        Share of the prompts that are kept from the demand, at least 4 prompts.
    rows : int or None
        Rules that share a forward; None takes as many as hold 32,768 tokens together.
    """

    budget: int | None = None
    eviction: Eviction = field(default_factory=Eviction)
    exponents: tuple[float, ...] = (0.0, 0.5, 0.75, 1.0, 1.5, 2.0)
    lows: tuple[float, ...] = (0.1, 0.25, 0.5)
    highs: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)
    held_out: float = 1 / 3
    rows: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {self.held_out}.")
        for name, value in (("rows", self.rows), ("budget", self.budget)):
            if value is not None:
                require_int(name, value, low=1)
        for rule in product(self.exponents, self.lows, self.highs):
            BudgetRule(*rule)

    def split(self, prompts: int) -> tuple[list[int], list[int]]:
        """Indices of the prompts for the demand, and of those held out, drawn at random.

        A fixed stride would hold out one kind of prompt where kinds take turns. The draw depends on
        the number of prompts alone.

        Raises
        ------
        ValueError
            If there are too few for both.
        """
        count = max(4, round(self.held_out * prompts))
        if prompts - count < 2:
            raise ValueError(
                f"tune: expected at least 6 prompts, 4 of them held out, got {prompts}; give more "
                "prompts or do not tune."
            )
        order = torch.randperm(prompts, generator=torch.Generator().manual_seed(0)).tolist()
        return sorted(order[count:]), sorted(order[:count])

    def resolve(self, traces: Sequence[Trace]) -> Tune:
        """Fill in the budget."""
        return replace(self, budget=self.budget or self.eviction.budget(traces, 4))

    def candidates(self, estimate: Estimate) -> dict[tuple[int, ...], BudgetRule]:
        """Distinct splits of the budget, and the first rule that gives each.

        The first is the estimator's rule, and a uniform split is among them.
        """
        demand, own = estimate.demand.tolist(), estimate.rule
        rules = [own, replace(own, exponent=0.0)]
        rules += [
            BudgetRule(own.exponent * factor, low, high)
            for factor, low, high in product(self.exponents, self.lows, self.highs)
        ]
        found: dict[tuple[int, ...], BudgetRule] = {}
        for rule in rules:
            split = rule.layer_budgets(demand, self.budget or 1, floor=self.eviction.window)
            found.setdefault(tuple(split), rule)
        return found

    def cost(self, traces: Sequence[Trace], candidates: int) -> int:
        """Count the tokens that measuring feeds through the whole model."""
        return split_cost(traces, candidates, self.rows)

    def measure(
        self, model: PreTrainedModel, trace: Trace, estimate: Estimate, rules: Sequence[BudgetRule]
    ) -> Record:
        """Measure one prompt: ``divergence`` `[rules]` in nats."""
        demand, budget = estimate.demand.tolist(), self.budget or 1
        found = split_errors(model, trace, self.eviction, budget, demand, rules, rows=self.rows)
        return {"divergence": found}


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes
    ----------
    rule : BudgetRule
        With the least mean divergence on all held-out prompts; the estimator's own if tuning is not
        shown to be better.
    best : BudgetRule
        With the least mean divergence, whatever the interval says.
    divergence : dict[str, float]
        Mean of the estimator's rule ("default"), of equal layers ("uniform"), and of `best`.
    comparisons : tuple of Comparison
        Of the procedure with the default rule and with uniform budgets. Every prompt is judged by
        the rule that the other half of the prompts chose, so that the choice does not bias the
        comparison.
    """

    rule: BudgetRule
    best: BudgetRule
    divergence: dict[str, float]
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values for a profile."""
        return {
            "best": asdict(self.best),
            "adopted": self.comparisons[0].verdict == "better",
            "divergence": self.divergence,
            "comparisons": [each.to_json() for each in self.comparisons],
        }


def choose(errors: torch.Tensor, candidates: dict[tuple[int, ...], BudgetRule]) -> Tuned:
    """Choose a rule from the errors of all splits.

    Parameters
    ----------
    errors : Tensor[prompts, splits]
        Of at least 2 held-out prompts, in the order of `candidates`.
    candidates : dict
        See `Tune.candidates`.
    """
    rules = list(candidates.values())
    uniform = next(index for index, split in enumerate(candidates) if len(set(split)) == 1)
    fold = torch.arange(len(errors)) % 2
    chosen = torch.stack([errors[fold != half].mean(0).argmin() for half in (0, 1)])[fold]
    crossed = errors.gather(1, chosen[:, None])[:, 0]
    comparisons = []
    for other, index in (("the default rule", 0), ("uniform budgets", uniform)):
        comparisons.append(Comparison.of(other, crossed - errors[:, index]))
    means = errors.mean(0)
    best = int(means.argmin())
    return Tuned(
        rule=rules[best] if comparisons[0].verdict == "better" else rules[0],
        best=rules[best],
        divergence={
            "default": float(means[0]),
            "uniform": float(means[uniform]),
            "best": float(means[best]),
        },
        comparisons=tuple(comparisons),
    )
