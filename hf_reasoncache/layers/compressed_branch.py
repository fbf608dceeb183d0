"""Layers that compress what a branch writes itself, and leave the shared prompt alone.

They are the layers that exist, with the prompt held elsewhere: it counts against a row's budget,
but is not scored, not evicted and not copied.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_reasoncache.layers.branched import BranchedLayer, Branching
from hf_reasoncache.layers.budgeted import BudgetedLayer
from hf_reasoncache.layers.chunk import Chunk
from hf_reasoncache.layers.evicting import EvictingLayer
from hf_reasoncache.layers.pooled import PooledLayer
from hf_reasoncache.layers.twins import Twins
from hf_reasoncache.layers.windowed import WindowedLayer


class CompressedBranch(Branching, EvictingLayer):
    """What the compressed kinds have in common."""

    def store_first(self, chunk: Chunk) -> None:
        """See `Branching.store_first`."""
        self._remember(chunk)
        super().store_first(chunk)

    def _extended_prompt(self, chunk: Chunk) -> bool:
        """See `Branching._extended_prompt`."""
        return self._prompt_open

    def _share(self, chunk: Chunk) -> None:
        super()._share(chunk)
        self._allocate()
        self._fit()

    def activate_past_recording(self) -> None:
        """Refuse assisted decoding, whose first forward brings a draft together with the prompt."""
        raise ValueError(
            "assisted decoding: expected branches that keep every token, got a suffix policy; use "
            "SharedBranchCache(config) without suffix, or generate without an assistant."
        )


class BudgetedBranch(CompressedBranch, BudgetedLayer):
    """A `BudgetedLayer` for the suffixes; the budget of a row counts its prompt."""

    def _allocate_for(self, prompt: torch.Tensor) -> None:
        elsewhere = self.trunk.lengths
        super()._allocate_for(prompt + elsewhere[:, None])
        self.budgets = self._require_budgets().without(elsewhere)


class WindowedBranch(CompressedBranch, WindowedLayer):
    """A `WindowedLayer` for the suffixes; the bound of a row counts its prompt."""

    def _allocate(self) -> None:
        super()._allocate()
        whole = self._require_windows()
        if whole.limit is not None:
            self.budgets = replace(whole, limit=whole.limit - self.trunk.lengths)


def branching_form(layer: object, twins: Twins) -> Branching:
    """Return the branching layer that compresses like `layer`.

    Raises
    ------
    ValueError
        If its policy cannot leave the prompt alone.
    """
    if isinstance(layer, EvictingLayer):
        policy = layer.policy
        if not policy.protect_prompt:
            raise ValueError(
                "suffix: expected protect_prompt=True, got False; branches share their prompt, and "
                "it cannot be evicted for one of them."
            )
        if policy.scorer.needs_mass:
            raise ValueError(
                f"suffix: expected a scorer that needs no attention mass, got {policy.scorer!r}: "
                "attention to a shared prompt keeps no account per branch. Use RKV or SnapKV."
            )
        if policy.risk is not None or policy.probes is not None:
            raise ValueError(
                "suffix: expected measure_risk=False, max_risk=None and probes=None, got one of "
                "them set: the error of an output is measured over what one layer's pool holds, "
                "and the prompt of a branch is not in it."
            )
        if isinstance(layer, BudgetedLayer):
            return BudgetedBranch(twins, layer.index, layer.rank, policy)
        if isinstance(layer, WindowedLayer):
            return WindowedBranch(twins, layer.index, policy)
    if type(layer) is PooledLayer:
        return BranchedLayer(twins, layer.index)
    raise ValueError(
        f"suffix: expected the policy of ReasonAllocCache or SlidingWindowCompressCache, got one "
        f"that makes {type(layer).__name__}."
    )
