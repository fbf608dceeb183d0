"""Profiles to test with."""

from __future__ import annotations

from typing import Any

import torch

from hf_reasoncache.budgets import BudgetRule
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.profiles import BudgetProfile, Calibration

COMMIT = "c0ffee" * 6 + "beef"


def make_profile(**changes: Any) -> BudgetProfile:
    """Three layers, two KV heads, two prompts; every field has something in it."""
    fields: dict[str, Any] = dict(
        base_model="org/model",
        base_model_revision=COMMIT,
        fingerprint="bf16-sample-256:" + "0" * 64,
        geometry=Geometry((0, 1, 2), kv_heads=2, head_size=16),
        estimator="coverage",
        demand=(1 / 3, 90.0, 40.0),
        standard_error=(0.1, 2.5, 0.0),
        head_demand=((0.25, 0.5), (80.0, 100.0), (40.0, 40.0)),
        rule=BudgetRule(exponent=0.7, low=0.2, high=1.9),
        calibration=Calibration(
            data="org/prompts",
            data_revision=COMMIT,
            prompts=("a" * 64, "b" * 64),
            seed=7,
            tokens=4096,
            settings={"rho": 0.93, "levels": [0.5, 0.8], "batch_size": None},
            versions={"torch": "2.13.0"},
        ),
        statistics={
            "tokens_0.93": torch.arange(12, dtype=torch.float64).reshape(2, 3, 2) / 7,
            "count": torch.tensor([[1, 2, 3], [4, 5, 6]]),
        },
    )
    return BudgetProfile(**(fields | changes))
