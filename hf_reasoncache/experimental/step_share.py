"""Steps that say the same again share their blocks (ReasonCache, arXiv 2507.21433)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from hf_reasoncache.arguments import require_bool, require_int, require_share
from hf_reasoncache.experimental.blocks import Block, BlockLayer, Entry, refusal
from hf_reasoncache.experimental.rotation import Rotation
from hf_reasoncache.experimental.step_report import StepShareReport
from hf_reasoncache.experimental.step_watcher import StepWatcher
from hf_reasoncache.experimental.steps import Boundaries, Step, lexical_similarity
from hf_reasoncache.geometry import supported_layers

Share = Literal["values", "keys_values"]


class StepShareCache(Cache):
    """A cache in which a step that resembles an earlier one points at that one's blocks.

    Approximate: a shared block holds the keys and values of similar tokens, not of
    these. It saves memory, not time: a block is computed before it is compared, and every step
    gathers the blocks. Any attention implementation works.

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
        self._rotation = Rotation(model).move if share == "keys_values" and rerotate else None
        self.table: list[list[Entry]] = []
        layers = supported_layers(model.config)
        ours = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        for rank, index in enumerate(ours):
            layers[index] = BlockLayer(rank, self.table, self._rotation)
        # Kept unused for `reset`: some releases leave tokens behind in their own layers.
        self._blank = {
            index: copy.deepcopy(layer) for index, layer in enumerate(layers) if index not in ours
        }
        super().__init__(layers=layers)
        self._ours: list[BlockLayer] = [layers[index] for index in ours]
        self.watcher = StepWatcher(self)
        self._forget()

    def _forget(self) -> None:
        self.table.clear()
        self._known: list[tuple[int, Step, list[Entry]]] = []
        self._steps = self._candidates = self._matched = self._blocks = 0
        self._distances: list[tuple[float, float]] = []
        self._freed = self._prompt_bytes = 0

    def reset(self) -> None:
        """Make the cache new."""
        for layer in self._ours:
            layer.reset()
        for index, blank in self._blank.items():
            self.layers[index] = copy.deepcopy(blank)
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
        """Add tokens to a layer; see `transformers.Cache.update`."""
        if layer_idx == 0:
            self.watcher.expect(self.get_seq_length(), key_states.shape[-2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def begin(self, rows: int) -> None:
        """Prepare for that many rows."""
        if rows != self._ours[0].rows:
            raise refusal(f"{rows} rows for the {self._ours[0].rows} in the cache (beam search?)")
        self.table += [[] for _ in range(rows)]

    @torch.no_grad()
    def seal_prompt(self, row: int, tokens: int, like: int) -> None:
        """Turn a prompt into a block, or point at that of a row with the same prompt.

        Parameters
        ----------
        row, tokens : int
        like : int
            An earlier row with the same tokens, or the row itself.
        """
        parts = [layer.cut(row, tokens) for layer in self._ours]
        if like != row:
            self.table[row] += self.table[like]
            self._prompt_bytes += sum(keys.nbytes + values.nbytes for keys, values in parts)
            return
        keys, values = (Block(0, tuple(part[side] for part in parts)) for side in (0, 1))
        self.table[row].append(Entry(0, keys, values))

    @torch.no_grad()
    def seal(self, row: int, step: Step) -> None:
        """Turn a step, the oldest tokens of a row's tail, into blocks, shared where they may be."""
        parts = [layer.cut(row, len(step.ids)) for layer in self._ours]
        similar, shared = self._similar(row, step), len(self._distances)
        entries = []
        for place, first in enumerate(range(0, len(step.ids), self.block)):
            here, start = slice(first, first + self.block), step.start + first
            keys = Block(start, tuple(k[:, here].clone() for k, _ in parts))
            values = Block(start, tuple(v[:, here].clone() for _, v in parts))
            there = [each[place] for each in similar if place < len(each)]
            entries.append(self._share(Entry(start, keys, values), there))
        self.table[row] += entries
        self._steps += 1
        self._blocks += len(entries)
        self._candidates += bool(similar)
        self._matched += len(self._distances) > shared
        self._known.append((row, step, entries))

    def _similar(self, row: int, step: Step) -> list[list[Entry]]:
        """Entries of the lexically most similar steps, best first, of equals the latest."""
        problem = row // self.branches
        found = [
            (similarity, index)
            for index, (other, known, _) in enumerate(self._known)
            if other // self.branches == problem
            and (similarity := lexical_similarity(step, known)) >= self.lexical
        ]
        best = sorted(found, reverse=True)[: self.candidates]
        return [self._known[index][2] for _, index in best]

    def _share(self, own: Entry, candidates: list[Entry]) -> Entry:
        """Return the nearest candidate's blocks in place of a block's own, if near enough."""
        best, nearest = own, (float("inf"), float("inf"))
        for entry in candidates:
            if entry.values.tokens == own.values.tokens:
                other = Entry(own.start, entry.keys, entry.values)
                apart = self._apart(own, other)
                if self._judged(apart) < self._judged(nearest):
                    best, nearest = other, apart
        if self._judged(nearest) > self.distance or self.distance == 0:
            return own
        self._distances.append(nearest)
        self._freed += own.values.nbytes
        if self.share == "values":
            return Entry(own.start, own.keys, best.values)
        self._freed += own.keys.nbytes
        return best

    def _judged(self, apart: tuple[float, float]) -> float:
        return max(apart) if self.share == "keys_values" else apart[1]

    def _apart(self, own: Entry, other: Entry) -> tuple[float, float]:
        """Relative distances of keys, NaN where they stay private, and of values."""
        values = _relative(other.values.parts, own.values.parts)
        if self.share == "values":
            return float("nan"), values
        keys = list(other.keys.parts)
        if self._rotation is not None and other.offset:
            keys = [self._rotation(part[None], other.offset)[0] for part in keys]
        return _relative(keys, own.keys.parts), values

    def _unique(self) -> Iterator[Block]:
        blocks = {}
        for row in self.table:
            for entry in row:
                blocks.update({id(entry.keys): entry.keys, id(entry.values): entry.values})
        yield from blocks.values()

    def report(self) -> StepShareReport:
        """Return what is shared, and how far it is from what it replaced."""
        count = len(self._distances)
        keys, values = (
            sum(pair[side] for pair in self._distances) / count if count else float("nan")
            for side in (0, 1)
        )
        return StepShareReport(
            steps=self._steps,
            candidates=self._candidates,
            matched=self._matched,
            blocks=self._blocks,
            shared_blocks=count,
            held_bytes=sum(block.nbytes for block in self._unique())
            + sum(layer.tail_bytes for layer in self._ours),
            saved_bytes=self._freed,
            prompt_bytes=self._prompt_bytes,
            key_distance=keys,
            value_distance=values,
        )


def _relative(candidate: Any, own: Any) -> float:
    apart = sum(
        float((a.float() - b.float()).square().sum()) for a, b in zip(candidate, own, strict=True)
    )
    return (apart / max(sum(float(b.float().square().sum()) for b in own), 1e-30)) ** 0.5
