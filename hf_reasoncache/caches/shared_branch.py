"""Branches of one problem: their prompt is stored once, and so is all they share before a fork."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from numbers import Real
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_reasoncache.arguments import Storage, require_int, require_storage
from hf_reasoncache.cache import CacheFactory, ReasonCache
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.policies.base import require_suffix
from hf_reasoncache.report import BranchReport, CacheReport
from hf_reasoncache.shards import TPMode
from hf_reasoncache.storage.branch_store import BranchStore
from hf_reasoncache.storage.forms import Form
from hf_reasoncache.storage.parking import Parked, Parking
from hf_reasoncache.storage.pool_store import distinct_bytes
from hf_reasoncache.storage.prompt_deduplicator import PromptDeduplicator


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
    suffix : CacheFactory, optional
        `ReasonAllocCache.policy(...)` or `SlidingWindowCompressCache.policy(...)`: what a branch
        writes itself is compressed, and budgets mean what they mean there: resident tokens per KV
        head *of a branch*, prompt included. The prompt is never evicted. By default every token is
        kept.
    max_bytes : int, optional
        Bound on the bytes of keys and values in the full-attention layers. When it is reached,
        blocks of parked branches go (see `park`); what the branches in the batch need stays, and
        `report()` says in how many steps that was more than the bound.
    storage : {"fp8", "fp8-keys", "fp8-values"}, optional
        As for `ReasonAllocCache`, of prompts, shared text and suffixes; that of the suffix policy
        by default.

    Raises
    ------
    ValueError
        If the model is not supported, or a suffix policy cannot leave the prompt alone or has
        another storage.

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
        suffix: CacheFactory | None = None,
        max_bytes: int | None = None,
        storage: Storage | None = None,
    ) -> None:
        if suffix is not None and not isinstance(suffix, CacheFactory):
            raise ValueError(
                f"suffix: expected ReasonAllocCache.policy(...) or SlidingWindowCompressCache."
                f"policy(...), got {suffix!r}."
            )
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise ValueError(f"max_bytes: expected an integer >= 1, got {max_bytes!r}.")
        self.max_bytes = max_bytes
        self._forget_parked()
        # It checks its arguments, and has a layer for each of ours.
        compressed = None if suffix is None else suffix(config)
        form = _form(storage, suffix)
        deduplicator = PromptDeduplicator()
        self._stores: list[BranchStore] = []

        def make_layer(index: int, layer_rank: int, layers: int) -> CacheLayer:
            store = BranchStore(deduplicator, index, form)
            self._stores.append(store)
            if compressed is None:
                return CacheLayer(index, store=store)
            alone = compressed.own_layers[layer_rank]
            if alone.store.shares:
                raise ValueError(
                    "suffix: expected the policy of ReasonAllocCache or "
                    "SlidingWindowCompressCache, got that of a SharedBranchCache."
                )
            if alone.policy is not None:
                require_suffix(alone.policy, probed=bool(alone.observers))
            return CacheLayer(index, alone.policy, store)

        tp_mode: TPMode = "agree" if compressed is None else compressed.tp_mode
        super().__init__(config, make_layer, tensor_parallel=tp_mode)

    def reserve(self, tokens: int) -> None:
        """Allocate room for so many own tokens of each branch at once, where all are kept.

        Without it storages grow by 1/16, which moves them now and then and leaves 3% of a suffix
        unused on average.

        Parameters
        ----------
        tokens : int
            What a branch will write: `max_new_tokens`, at most.
        """
        require_int("tokens", tokens, low=1)
        for store in self._stores:
            store.reserved = tokens

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
        source = torch.cat(
            [torch.arange(rows, device="cpu"), torch.full((copies,), row, device="cpu")]
        )
        rigid = {type(x).__name__ for x in self.layers if not hasattr(x, "batch_select_indices")}
        if rigid:
            raise ValueError(f"fork: expected layers whose rows can be repeated, got {rigid}.")
        for layer in self.own_layers:
            layer.fork(source)
        for foreign in self.foreign_layers:
            foreign.batch_select_indices(source)
        return list(range(rows, rows + copies))

    def park(self, row: int, score: float) -> Parked:
        """Put a branch aside: it leaves the batch, and its tokens stay for `resume`.

        The rows behind it move up by one. With `max_bytes`, parked blocks go when memory is short,
        lowest `score / (depth + 1)` first, prompts last.

        Parameters
        ----------
        row : int
        score : float
            What the branch is worth, >= 0.

        Raises
        ------
        ValueError
            If there is no such row or no other one, or suffixes are compressed, or some layers of
            the model are not full-attention.
        """
        self._require_exact("park")
        self._require_row(row)
        if not isinstance(score, Real) or isinstance(score, bool) or not 0 <= score < math.inf:
            raise ValueError(f"score: expected a finite number >= 0, got {score!r}.")
        if self._rows() == 1:
            raise ValueError("park: expected another row to stay in the batch, got the only one.")
        for store in self._stores:
            store.freeze(torch.tensor([row], device="cpu"))
        parked = Parked(
            score=float(score),
            first=int(self._stores[0].first[row]),
            end=self.get_seq_length(),
            _paths=[store.tree.paths[row] for store in self._stores],
        )
        others = [other for other in range(self._rows()) if other != row]
        self.batch_select_indices(torch.tensor(others, device="cpu"))
        self._parking.branches.append(parked)
        self._hold_bound()
        return parked

    def resume(self, parked: Parked) -> int:
        """Bring a parked branch back, as the last row of the batch.

        Rows of a batch stand at the same column. To the branch, the columns from `parked.end` to
        `get_seq_length()` are padding: pass an `attention_mask` with zeros there, and feed the
        tokens from `parked.end` on again if blocks of the branch had to go.

        Returns
        -------
        int
            The new row.

        Raises
        ------
        ValueError
            If the branch is not parked here (any more).
        """
        if parked not in self._parking.branches:
            raise ValueError(
                "resume: expected what park() of this cache returned, got a branch that is not "
                "parked here; it was resumed already, or the cache was reset."
            )
        self._require_exact("resume")
        for layer, path in zip(self.own_layers, parked.paths, strict=True):
            layer.add_row(path, parked.first)
        self._parking.branches.remove(parked)
        return self._rows() - 1

    def discard(self, parked: Parked) -> None:
        """Give up a parked branch and the memory that only it needs; again is no error."""
        if parked in self._parking.branches:
            self._parking.branches.remove(parked)

    def reset(self) -> None:
        """See `ReasonCache.reset`; parked branches are given up too."""
        super().reset()
        self._forget_parked()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ReasonCache.update`; holds the bound before each forward."""
        if layer_idx == 0 and not self._hold_bound():
            self._steps_over += 1
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def report(self, *, positions: bool = False) -> CacheReport:
        """See `ReasonCache.report`; with what branches share."""
        report = super().report(positions=positions)
        branches = BranchReport(
            rows=self._rows(),
            parked=len(self._parking.branches),
            segments=len(self._stores[0].tree.readers),
            unshared_bytes=sum(store.unshared_bytes for store in self._stores),
            parked_bytes=self._kv_bytes() - report.kv_bytes,
            max_bytes=self.max_bytes,
            blocks_evicted=self._parking.blocks_evicted,
            steps_over=self._steps_over,
        )
        return replace(report, branches=branches)

    def _forget_parked(self) -> None:
        self._parking = Parking()
        self._steps_over = 0

    def _kv_bytes(self) -> int:
        live = (tensor for store in self._stores for tensor in store.kv_tensors())
        return distinct_bytes(chain(live, self._parking.tensors()))

    def _hold_bound(self) -> bool:
        """Let parked blocks go until the bound holds; False if that is not enough."""
        if self.max_bytes is None:
            return True
        while self._kv_bytes() > self.max_bytes:
            if not self._parking.evict_one(self._stores[0].tree.paths):
                return False
        return True

    def _require_exact(self, action: str) -> None:
        """Raise ValueError unless all layers are ours and keep every token."""
        other = {type(layer).__name__ for layer in self.layers if layer not in self.own_layers}
        evicting = {type(layer.policy).__name__ for layer in self.own_layers if layer.policy}
        if other or evicting:
            raise ValueError(
                f"{action}: expected full-attention layers that keep every token, got "
                f"{', '.join(sorted(other | evicting))}; use fork(), or a cache without suffix on "
                "a model without sliding-window layers."
            )

    def _rows(self) -> int:
        return self._stores[0].rows or 0

    def _require_row(self, row: int) -> None:
        require_int("row", row, low=0)
        if row >= self._rows():
            raise ValueError(f"row: expected one of {self._rows()} rows of the batch, got {row}.")


def _form(storage: Storage | None, suffix: CacheFactory | None) -> Form:
    """Return the form of all that branches hold; ValueError if two are asked for."""
    of_suffix = None if suffix is None else suffix.settings.get("storage")
    if None not in (storage, of_suffix) and storage != of_suffix:
        raise ValueError(
            f"storage: expected that of the suffix policy, {of_suffix!r}, got {storage!r}; name it "
            "once."
        )
    return require_storage(of_suffix if storage is None else storage)
