"""Branches of one problem: their prompt is stored once, and so is all they share before a fork."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from hf_reasoncache.arguments import require_int
from hf_reasoncache.cache import ReasonCache, SuffixPolicy
from hf_reasoncache.layers.branched import (
    BranchedLayer,
    Branching,
    BudgetedBranch,
    WindowedBranch,
)
from hf_reasoncache.layers.budgeted import BudgetedLayer
from hf_reasoncache.layers.evicting import EvictingLayer
from hf_reasoncache.layers.pooled import PooledLayer
from hf_reasoncache.layers.twins import Twins
from hf_reasoncache.layers.windowed import WindowedLayer


class SharedBranchCache(ReasonCache):
    """A cache for many continuations of a few prompts, each prompt stored once.

    Rows of a batch with the same prompt are recognised by themselves, so plain
    `generate(num_return_sequences=N, past_key_values=cache)` shares memory, and so do beams.
    `branch_generate` also reads the prompt only once. Attention reads a shared prompt once for all
    its branches and joins the result with each branch's own tokens.

    The model must run the "reasoncache" attention (or "reasoncache_eager", "reasoncache_fa2").

    Parameters
    ----------
    config : PretrainedConfig
        `model.config`.
    suffix : SuffixPolicy, optional
        `ReasonAllocCache.policy(...)` or `SlidingWindowCompressCache.policy(...)`: what a branch
        writes itself is compressed, and budgets mean what they mean there: resident tokens per KV
        head *of a branch*, prompt included. The prompt is never evicted. By default every token is
        kept.
    offloading : bool
        Not supported.

    Raises
    ------
    ValueError
        If the model is not supported, or a suffix policy cannot leave the prompt alone.

    Examples
    --------
    >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")
    >>> cache = SharedBranchCache(model.config)
    >>> out = branch_generate(model, inputs, num_branches=16, past_key_values=cache, do_sample=True)
    >>> print(cache.report())

    Notes
    -----
    Attention to a shared prefix as one product for all branches is Hydragen's (arXiv 2402.05099);
    a tree of segments with one copy of what branches have in common is that of RadixAttention
    (arXiv 2312.07104) and DeFT (arXiv 2404.00242). Ours: branches that are compressed while they
    share, recognition of equal prompts from keys and values, and left-padded batches of prompts.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        suffix: SuffixPolicy | None = None,
        offloading: bool = False,
    ) -> None:
        if suffix is not None and not isinstance(suffix, SuffixPolicy):
            raise ValueError(
                f"suffix: expected ReasonAllocCache.policy(...) or SlidingWindowCompressCache."
                f"policy(...), got {suffix!r}."
            )
        # It checks its arguments, and has a layer for each of ours.
        compressed = None if suffix is None else suffix.cache(config, **suffix.settings)
        twins = Twins()

        def make_layer(index: int, rank: int, layers: int) -> PooledLayer:
            if compressed is None:
                return BranchedLayer(twins, index)
            return _branching(compressed.layers[index], twins)

        super().__init__(config, make_layer, offloading=offloading)

    def fork(self, row: int, copies: int = 1) -> list[int]:
        """Add copies of a row to the batch, behind the last one.

        Row and copies share what the row has read and written so far. Where suffixes are
        compressed, each copy gets its own, as its tokens will be evicted apart.

        Parameters
        ----------
        row : int
        copies : int

        Returns
        -------
        list of int
            The new rows.

        Raises
        ------
        ValueError
            If there is no such row.
        """
        require_int("copies", copies, low=1)
        rows = self._rows()
        self._require_row(row)
        source = torch.cat([torch.arange(rows), torch.full((copies,), row)])
        for layer in self.layers:
            if isinstance(layer, Branching):
                layer.fork(source)
            elif hasattr(layer, "batch_select_indices"):
                layer.batch_select_indices(source)
            else:
                raise ValueError(
                    f"fork: expected layers whose rows can be repeated, got {type(layer).__name__}."
                )
        return list(range(rows, rows + copies))

    def _branches(self) -> list[Branching]:
        return [layer for layer in self.layers if isinstance(layer, Branching)]

    def _rows(self) -> int:
        return self._branches()[0].rows or 0

    def _require_row(self, row: int) -> None:
        require_int("row", row, low=0)
        if row >= self._rows():
            raise ValueError(f"row: expected one of {self._rows()} rows of the batch, got {row}.")


def _branching(layer: object, twins: Twins) -> Branching:
    """Return the branching form of a layer."""
    if isinstance(layer, EvictingLayer):
        policy = layer.policy
        if not policy.protect_prompt:
            raise ValueError(
                "suffix: expected protect_prompt=True, got False; branches share their prompt, and "
                "it cannot be evicted for one of them."
            )
        if policy.prompt_length is not None:
            raise ValueError(
                f"suffix: expected no prompt_length, got {policy.prompt_length}; it is for "
                "assisted decoding, which compressed branches do not support."
            )
        if policy.scorer.needs_mass:
            raise ValueError(
                f"suffix: expected a scorer that needs no attention mass, got {policy.scorer!r}: "
                "attention to a shared prompt keeps no account per branch. Use RKV or SnapKV."
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
