"""Steps that say the same again share their blocks (ReasonCache, arXiv 2507.21433)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_reasoncache.arguments import require_bool, require_int, require_share
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.experimental.block_store import BlockStore, refusal
from hf_reasoncache.experimental.blocks import Block
from hf_reasoncache.experimental.rotation import Rotation
from hf_reasoncache.experimental.step_report import StepShareReport
from hf_reasoncache.experimental.step_watcher import StepWatcher
from hf_reasoncache.experimental.steps import Boundaries, Step, lexical_similarity
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.storage.pool_store import distinct_bytes

Share = Literal["values", "keys_values"]

Sealed = tuple[Block, ...]
"""Some tokens in all layers: a block of each."""


class StepShareCache(ReasonCache):
    """A cache in which a step that resembles an earlier one points at that one's blocks.

    Approximate: a shared block holds the keys and values of similar tokens, not of
    these. It saves memory, not time: a block is computed before it is compared, and every step
    gathers the blocks.

    The model must run the "reasoncache" attention (or "reasoncache_eager", "reasoncache_fa2").

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
        Finds the steps.
    share : "values" or "keys_values"
        With "values", keys stay private. With both, a shared key is rotated to its new position
        whenever it is read.
    rerotate : bool
        False leaves shared keys at their old position, as the paper does.
    boundaries : Boundaries
    lexical : float
        Least cosine of the token counts of two steps; the paper's 0.9.
    distance : float
        Largest relative Euclidean distance of two blocks, `|a - b| / |b|` over all layers together,
        of the values and, if they are shared, of the keys in their new position. 0 shares nothing.
    block : int
        Tokens of a block. A step starts a block of its own, so that similar steps have comparable
        blocks; blocks of equal size at equal places of two steps are compared.
    candidates : int
        Lexically most similar steps that are compared block by block.
    branches : int
        Rows of a problem (`num_return_sequences`); steps are shared among them, and their prompt
        is held once.

    Attributes
    ----------
    watcher : StoppingCriteria
        Goes to generate: it shows the tokens to the cache and stops nothing.

    Raises
    ------
    ValueError
        If an argument is out of range, the model is not supported, or its keys cannot be rotated;
        and while generating, if the watcher is missing, or for beams, assisted decoding and rows
        that are dropped.

    Examples
    --------
    >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")
    >>> cache = StepShareCache(model, tokenizer, share="values", distance=0.2)
    >>> model.generate(**inputs, past_key_values=cache, stopping_criteria=[cache.watcher])
    >>> print(cache.report())

    Notes
    -----
    From the paper: steps cut while streaming, a lexical stage before a Euclidean one, zero-copy
    remapping of blocks, one decision for all layers. Ours: relative distances, values alone,
    re-rotation, sharing between branches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        share: Share = "values",
        rerotate: bool = True,
        boundaries: Boundaries | None = None,
        lexical: float = 0.9,
        distance: float = 0.2,
        block: int = 16,
        candidates: int = 4,
        branches: int = 1,
    ) -> None:
        if share not in ("values", "keys_values"):
            raise ValueError(f"share: expected 'values' or 'keys_values', got {share!r}.")
        require_bool("rerotate", rerotate)
        require_share("lexical", lexical)
        for name, value in (("block", block), ("candidates", candidates), ("branches", branches)):
            require_int(name, value, low=1)
        if not isinstance(distance, int | float) or not distance >= 0:
            raise ValueError(f"distance: expected a number >= 0, got {distance!r}.")
        self.tokenizer, self.share = tokenizer, share
        self.boundaries = Boundaries() if boundaries is None else boundaries
        self.lexical, self.distance = lexical, distance
        self.block, self.candidates, self.branches = block, candidates, branches
        self._rotation = Rotation(model) if share == "keys_values" and rerotate else None
        self._stores: list[BlockStore] = []

        def make_layer(index: int, rank: int, layers: int) -> CacheLayer:
            self._stores.append(BlockStore(self._rotation))
            return CacheLayer(index, store=self._stores[-1])

        super().__init__(model.config, make_layer)
        if any(layer.rank for layer in self.own_layers):
            raise ValueError(
                "StepShareCache: expected a model that caches keys and values, got one that caches "
                "latents, which are both at once; use SharedBranchCache."
            )
        self.watcher = StepWatcher(self)
        self._forget()

    def _forget(self) -> None:
        self._known: list[tuple[int, Step, list[Sealed]]] = []
        self._steps = self._candidates = self._matched = self._blocks = 0
        self._distances: list[tuple[float, float]] = []
        self._freed = self._prompt_bytes = 0

    def reset(self) -> None:
        """See `ReasonCache.reset`; the watcher gets ready for another generation too."""
        super().reset()
        self._forget()
        self.watcher.reset()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ReasonCache.update`; the watcher must have seen the tokens before these."""
        if layer_idx == 0:
            self.watcher.expect(self.get_seq_length(), key_states.shape[-2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def is_croppable(self) -> bool:
        """False: tokens that are taken back may be shared."""
        return False

    def activate_past_recording(self) -> None:
        """Refuse assisted decoding, which announces here that it will take tokens back."""
        raise refusal("assisted decoding")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back, which the watcher has seen."""
        if int(tokens_to_remove):
            raise refusal("crop")

    def begin(self, rows: int) -> None:
        """Prepare for that many rows."""
        if rows != self._stores[0].rows:
            raise refusal(f"{rows} rows for the {self._stores[0].rows} in the cache (beam search?)")

    @torch.no_grad()
    def seal_prompt(self, row: int, end: int, like: int) -> None:
        """Turn a prompt into a block, or point at that of a row with the same prompt.

        Parameters
        ----------
        row : int
        end : int
            Column behind the prompt.
        like : int
            An earlier row with the same tokens, or the row itself.
        """
        own = [store.cut(row, end) for store in self._stores]
        if like != row:
            found = [store.table.rows[like][0] for store in self._stores]
            # Of equal tokens, a mask may hide others.
            if torch.equal(found[0].columns, own[0].columns):
                self._prompt_bytes += sum(_nbytes(own))
                own = found
        self._add(row, [own])

    @torch.no_grad()
    def seal(self, row: int, step: Step) -> None:
        """Turn a step, the oldest tokens of a row's tail, into blocks, shared where they may be."""
        cut = [store.cut(row, step.stop).split(self.block) for store in self._stores]
        similar, shared = self._similar(row, step), len(self._distances)
        blocks = [
            self._share(own, [each[place] for each in similar if place < len(each)])
            for place, own in enumerate(zip(*cut, strict=True))
        ]
        self._add(row, blocks)
        self._steps += 1
        self._blocks += len(blocks)
        self._candidates += bool(similar)
        self._matched += len(self._distances) > shared
        self._known.append((row, step, blocks))

    def _add(self, row: int, blocks: Iterable[Iterable[Block]]) -> None:
        for store, parts in zip(self._stores, zip(*blocks, strict=True), strict=True):
            store.add(row, parts)

    def _similar(self, row: int, step: Step) -> list[list[Sealed]]:
        """Blocks of the lexically most similar steps, best first, of equals the latest."""
        problem = row // self.branches
        found = [
            (similarity, index)
            for index, (other, known, _) in enumerate(self._known)
            if other // self.branches == problem
            and (similarity := lexical_similarity(step, known)) >= self.lexical
        ]
        best = sorted(found, reverse=True)[: self.candidates]
        return [self._known[index][2] for _, index in best]

    def _share(self, own: Sealed, candidates: list[Sealed]) -> Sealed:
        """Return the nearest candidate in place of a block, if near enough."""
        best, nearest = own, (float("inf"), float("inf"))
        for candidate in candidates:
            if candidate[0].tokens == own[0].tokens:
                other = tuple(block.at(own[0].columns) for block in candidate)
                apart = self._apart(own, other)
                if self._judged(apart) < self._judged(nearest):
                    best, nearest = other, apart
        if self._judged(nearest) > self.distance or self.distance == 0:
            return own
        self._distances.append(nearest)
        keys, values = _nbytes(own)
        self._freed += values
        if self.share == "values":
            pairs = zip(own, best, strict=True)
            return tuple(replace(mine, values=other.values) for mine, other in pairs)
        self._freed += keys
        return best

    def _judged(self, apart: tuple[float, float]) -> float:
        return max(apart) if self.share == "keys_values" else apart[1]

    def _apart(self, own: Sealed, other: Sealed) -> tuple[float, float]:
        """Relative distances of keys, NaN where they stay private, and of values."""
        values = _relative((x.values for x in other), [x.values for x in own])
        if self.share == "values":
            return float("nan"), values
        keys = [block.keys for block in other]
        if self._rotation is not None and other[0].offset:
            keys = [self._rotation.move(part[None], other[0].offset)[0] for part in keys]
        return _relative(keys, [x.keys for x in own]), values

    def report(self, *, positions: bool = False) -> StepShareReport:
        """See `ReasonCache.report`; with what is shared, and how far from what it replaced."""
        count = len(self._distances)
        keys, values = (
            sum(pair[side] for pair in self._distances) / count if count else float("nan")
            for side in (0, 1)
        )
        sealed = (store.table.kv_tensors() for store in self._stores)
        return StepShareReport(
            **vars(super().report(positions=positions)),
            steps=self._steps,
            candidates=self._candidates,
            matched=self._matched,
            blocks=self._blocks,
            shared_blocks=count,
            held_bytes=distinct_bytes(chain.from_iterable(sealed))
            + sum(store.tail_bytes for store in self._stores),
            saved_bytes=self._freed,
            prompt_bytes=self._prompt_bytes,
            key_distance=keys,
            value_distance=values,
        )


def _nbytes(blocks: Iterable[Block]) -> tuple[int, int]:
    """Bytes of the keys and of the values of some tokens."""
    pairs = [(block.keys.nbytes, block.values.nbytes) for block in blocks]
    return sum(keys for keys, _ in pairs), sum(values for _, values in pairs)


def _relative(candidate: Iterable[torch.Tensor], own: Sequence[torch.Tensor]) -> float:
    apart = sum(
        float((a.float() - b.float()).square().sum()) for a, b in zip(candidate, own, strict=True)
    )
    return (apart / max(sum(float(b.float().square().sum()) for b in own), 1e-30)) ** 0.5
