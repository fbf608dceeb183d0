"""What every estimator of demand has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from transformers import PreTrainedModel

from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.geometry import Geometry

Record = Mapping[str, torch.Tensor]
"""Named measurements of one prompt, each `[L, ...]`."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Demand, and how sure it is.

    Attributes
    ----------
    demand, standard_error : Tensor[L]
        float64.
    head_demand : Tensor[L, H_kv] or None
    rule : BudgetRule
        Turns this demand into budgets.
    """

    demand: torch.Tensor
    standard_error: torch.Tensor
    rule: BudgetRule
    head_demand: torch.Tensor | None = None


class Estimator(Protocol):
    """A way to measure demand, prompt by prompt; implementations are frozen settings."""

    name: ClassVar[str]

    def expect(self, prompts: Sequence[int], most: int) -> None:
        """Refuse what no answers could satisfy, before there are any.

        Parameters
        ----------
        prompts : sequence of int
            Tokens of each prompt.
        most : int
            Tokens of the longest answer possible.

        Raises
        ------
        ValueError
            If they are too few or too short.
        """
        ...

    def resolve(self, traces: Sequence[Trace]) -> Estimator:
        """Fill in the settings that follow from the traces."""
        ...

    def bound(self, prompts: Sequence[int], most: int, geometry: Geometry) -> int:
        """Bound `cost` from above, before there are answers; arguments as in `expect`."""
        ...

    def cost(self, traces: Sequence[Trace], geometry: Geometry) -> int:
        """Count the tokens that measuring feeds through the whole model.

        One that goes through half of the layers counts half.
        """
        ...

    def measure(self, model: PreTrainedModel, trace: Trace) -> Record:
        """Measure one prompt, independently of all others."""
        ...

    def estimate(self, records: Sequence[Record], traces: Sequence[Trace]) -> Estimate:
        """Join the prompts' records.

        Raises
        ------
        ValueError
            If they are too few or too short.
        """
        ...
