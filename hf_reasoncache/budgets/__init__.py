"""Budgets: how many tokens each layer and each head keeps."""

from hf_reasoncache.budgets.heads import Comparable, head_budgets
from hf_reasoncache.budgets.layers import layer_budgets, pyramid, uniform
from hf_reasoncache.budgets.robustify import robustify
from hf_reasoncache.budgets.rule import BudgetRule

__all__ = [
    "BudgetRule",
    "Comparable",
    "head_budgets",
    "layer_budgets",
    "pyramid",
    "robustify",
    "uniform",
]
