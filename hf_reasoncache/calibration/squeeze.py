"""What eviction does to a model's output: the error of many budgets at once.

The first row of a batch reads a trace with the full cache. A squeezed row differs from it only
after its first eviction, and only above the lowest layer that evicts, so that is where it joins the
batch: what it shares with the first row is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.calibration.replay import replay
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.policies.budget import BudgetPolicy
from hf_reasoncache.policies.row_budgets import RowBudgets
from hf_reasoncache.releases import cache_kwarg

TOKENS = 2048
"""Tokens of all rows per forward: bounds the logits, 614 MB in bfloat16 for 150k words."""

HELD = 32_768
"""Tokens that the rows of a batch may hold together: bounds the cache, 4 GB for a Llama 3.1 8B."""


def rows_per_batch(trace: Trace, rows: int | None) -> int:
    """Squeezes that share the forwards of a trace: `rows`, or as many as hold `HELD` tokens."""
    return rows or max(1, HELD // trace.length)


def first_eviction(trace: Trace, budget: int, buffer: int) -> int:
    """Column before which a budget evicts first.

    A prompt beyond the capacity is cut at once, a shorter one when the buffer is full.
    """
    return max(len(trace.prompt), budget + buffer)


def output_error(
    model: PreTrainedModel,
    trace: Trace,
    policy: BudgetPolicy,
    budgets: torch.Tensor,
    *,
    rows: int | None = None,
    every: int = 1,
    chunk: int | None = None,
) -> torch.Tensor:
    """Divergence of the next-token distribution from the full cache, for many budgets at once.

    Parameters
    ----------
    model : PreTrainedModel
        Runs the "reasoncache" attention.
    trace : Trace
    policy : BudgetPolicy
        How a layer evicts; its budget and demand are not used.
    budgets : LongTensor[R, L, H_kv]
        Tokens each head keeps in each of `R` settings; the trace's length or more keeps all.
        Neighbours share forwards, so settings whose lowest evicting layers are near belong
        together.
    rows : int, optional
        See `rows_per_batch`.
    every : int
        Measure the predictions after every so many tokens of the completion.
    chunk : int, optional
        Tokens of the longest forward. By default forwards end wherever a row evicts, which is
        nearly everywhere if each layer of a row has a budget of its own. The result is the same.

    Returns
    -------
    Tensor[R]
        `KL(full || evicted)` in nats, averaged over the measured predictions from that after the
        first generated token on, which the prompt's exact attention makes; float64.

    Raises
    ------
    ValueError
        If a budget cannot hold the protected prompt and the window.
    """
    settings = [_Squeeze.of(trace, each, policy.buffer) for each in budgets]
    size = rows_per_batch(trace, rows)
    parts = [settings[place : place + size] for place in range(0, len(settings), size)]
    blocks = joinable_blocks(model, Geometry.of(model.config).full_attention_layers)
    return torch.cat([_errors(model, blocks, trace, policy, part, every, chunk) for part in parts])


def _errors(
    model: PreTrainedModel,
    blocks: Sequence[torch.nn.Module],
    trace: Trace,
    policy: BudgetPolicy,
    settings: Sequence[_Squeeze],
    every: int,
    chunk: int | None,
) -> torch.Tensor:
    """`output_error` of settings that share their forwards."""
    measured = range(len(trace.prompt), trace.length - 1, every)
    total = torch.zeros(len(settings), dtype=torch.float64)
    if not any(each.evictions for each in settings):
        return total
    batch = _Batch(model, blocks, trace, policy, settings)
    # Rows join where they evict first; a later eviction may fall within a forward.
    ends = None if chunk is None else 1
    forwards = replay(
        model,
        batch.cache,
        trace,
        edges={column for each in settings for column in each.evictions[:ends]},
        longest=min(chunk or TOKENS, max(1, TOKENS // (1 + len(settings)))),
        measured=measured,
        rows=lambda: batch.fed,
    )
    with torch.inference_mode(), batch.growing():
        for end, logits in forwards:
            if len(logits) > 1:
                total[batch.members] += divergence(logits)
            batch.join(end)
    return total / max(len(measured), 1)


@dataclass(frozen=True, eq=False)
class _Squeeze:
    """One setting of the budgets, and where it begins to matter.

    Attributes
    ----------
    kept : LongTensor[L, H_kv]
        Tokens that each head keeps; what keeps all has the trace's length.
    rank : int
        The lowest full-attention layer that evicts.
    evictions : tuple of int
        Columns before which it evicts, ascending; a chunk that ends there needs no second pass.
    """

    kept: torch.Tensor
    rank: int
    evictions: tuple[int, ...]

    @staticmethod
    def of(trace: Trace, budgets: torch.Tensor, buffer: int) -> _Squeeze:
        """Read it from budgets, LongTensor[L, H_kv]."""
        kept, last = budgets.clamp(max=trace.length), trace.length - 1
        starts = {first_eviction(trace, budget, buffer) for budget in kept.unique().tolist()}
        columns = {column for start in starts for column in range(start, last, buffer)}
        evicts = (kept < trace.length).any(-1).nonzero()
        rank = int(evicts[0]) if len(evicts) else len(kept)
        return _Squeeze(kept, rank, tuple(sorted(columns)))


class _Batch:
    """The rows of a model's blocks: the full one, and behind it those that have joined.

    A block computes the squeezes of its layer and of those below it, in the order of their layers.
    Where a model does not let rows join between two blocks, they run through all of them.

    Attributes
    ----------
    members : list of int
        Settings of the rows behind the first one at the last block.
    blocks : sequence of Module
        Where rows join; empty if they are fed from the first block on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[torch.nn.Module],
        trace: Trace,
        policy: BudgetPolicy,
        settings: Sequence[_Squeeze],
    ) -> None:
        # No token of this trace is ever evicted from a row with so much room.
        self.everything = trace.length + policy.window
        whole = replace(policy, budget=self.everything, demand=None)
        self.cache = ReasonCache(model.config, lambda index, rank, layers: CacheLayer(index, whole))
        self.settings, self.members = settings, list[int]()
        indices = [layer.index for layer in self.cache.own_layers]
        self.blocks = blocks
        # The cache counts its rows at block 0 and at its own first layer: these are to agree.
        homes = [0, *indices[1:]] if self.blocks else [0] * len(indices)
        self.home = {
            place: homes[each.rank] for place, each in enumerate(settings) if each.evictions
        }

    @property
    def fed(self) -> int:
        """Rows that the model is fed."""
        return 1 if self.blocks else 1 + len(self.members)

    def at(self, block: int) -> list[int]:
        """Settings of the rows behind the first one at a block."""
        return [place for place in self.members if self.home[place] <= block]

    def join(self, column: int) -> None:
        """Let those join that evict for the first time before this column."""
        settings = enumerate(self.settings)
        new = [place for place, each in settings if each.evictions[:1] == (column,)]
        if not new:
            return
        before = {block: self.at(block) for block in range(len(self.cache.layers))}
        self.members = sorted([*self.members, *new], key=lambda place: self.home[place])
        for block, layer in enumerate(self.cache.layers):
            if self.at(block) != before[block]:
                old = {place: row for row, place in enumerate(before[block], 1)}
                rows = torch.LongTensor([0, *(old.get(place, 0) for place in self.at(block))])
                layer.reorder_cache(rows)
        for rank, layer in enumerate(self.cache.own_layers):
            places = self.at(layer.index)
            joined = [row for row, place in enumerate(places, 1) if place in new]
            if joined:
                kept = [self.settings[places[row - 1]].kept[rank] for row in joined]
                self._squeeze(layer, torch.tensor(joined), torch.stack(kept))

    def _squeeze(self, layer: CacheLayer, rows: torch.Tensor, heads: torch.Tensor) -> None:
        """Give the heads of some rows of a layer their budgets, LongTensor[R, H_kv]."""
        state = cast(RowBudgets, layer.state)
        floor = state.floor[rows]
        if bool((heads < floor[:, None]).any()):
            raise ValueError(
                f"heads: expected budgets >= {int(floor.max())} (protected prompt and window of "
                f"{state.policy.window}), got {int(heads.min())}; raise the smallest budget or do "
                "not protect the prompt."
            )
        layer.adopt(replace(state, heads=state.heads.index_put((rows,), heads)))

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Make the model's blocks append the rows that join there."""
        with ExitStack() as hooks:
            for index, block in enumerate(self.blocks):
                rows = partial(lambda index: 1 + len(self.at(index)), index)
                hooks.enter_context(appending(block, rows))
            yield


@contextmanager
def appending(block: torch.nn.Module, rows: Callable[[], int]) -> Iterator[None]:
    """Make a block append copies of the first row to its hidden states, up to so many rows."""

    def append(
        block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.cat([hidden, hidden[:1].expand(rows() - len(hidden), -1, -1)])
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    hook = block.register_forward_pre_hook(append, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def joinable_blocks(model: PreTrainedModel, layers: Sequence[int]) -> Sequence[torch.nn.Module]:
    """Return a model's blocks, where block `i` has the attention of layer `i`.

    Empty if there is no such list, or if the model relies on the number of rows that it was fed.
    """
    for found in model.modules():
        if isinstance(found, torch.nn.ModuleList) and len(found) > max(layers):
            parts = ((index, part) for index in layers for part in found[index].modules())
            owned = {index for index, part in parts if getattr(part, "layer_idx", None) == index}
            if owned == {*layers}:
                return list(found) if _rows_may_join(model, found[0]) else []
    return []


@torch.inference_mode()
def _rows_may_join(model: PreTrainedModel, block: torch.nn.Module) -> bool:
    """Try it with a few tokens: a row that joins at the first block is to see what row 0 does."""
    cache = ReasonCache(model.config, lambda index, rank, layers: CacheLayer(index))
    ids = torch.ones(1, 4, dtype=torch.long, device=model.device)
    model(input_ids=ids, **cache_kwarg(cache), use_cache=True)
    for layer in cache.layers:
        layer.reorder_cache(torch.LongTensor([0, 0]))
    try:
        with appending(block, lambda: 2):
            logits = model(input_ids=ids[:, :2], **cache_kwarg(cache), use_cache=True).logits
    except (RuntimeError, ValueError):
        return False
    return len(logits) == 2 and torch.allclose(logits[0], logits[1], rtol=1e-2, atol=1e-2)


def divergence(logits: torch.Tensor) -> torch.Tensor:
    """Sum over `T` of KL(row 0 || row r) for logits `[1 + R, T, V]`: Tensor `[R]`, float64.

    With `d` the difference of a row's logits to those of row 0, less its mean over row 0's
    probabilities, KL = log(1 + mean(exp(d) - 1)): two dot products, and no difference of large
    numbers where rows are nearly the same.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    full = logits[0].to(dtype)
    weight = full.softmax(-1)

    def each() -> Iterator[torch.Tensor]:
        # Row by row: the probabilities of a large vocabulary are the largest tensors here.
        for row in logits[1:]:
            apart = row - full
            apart -= torch.linalg.vecdot(weight, apart)[..., None]
            found = torch.linalg.vecdot(weight, apart.expm1_()).log1p().sum()
            if not bool(found.isfinite()):
                # A token that had next to no weight has nearly all: exp overflows.
                ours, theirs = full.double().log_softmax(-1), row.double().log_softmax(-1)
                found = (ours.exp() * (ours - theirs)).sum()
            yield found.cpu().double()

    return torch.stack(list(each()))
