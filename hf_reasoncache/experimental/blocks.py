"""Keys and values in blocks that several places of a text can point at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

_MERGE = 16
"""Pieces of a tail that are joined, so that a step does not concatenate hundreds."""


@dataclass(frozen=True, eq=False)
class Block:
    """Keys, or values, of some tokens in all layers; never changed, freed with its last entry.

    Attributes
    ----------
    start : int
        Column of the first token, where it was computed.
    parts : tuple of Tensor[H_kv, n, D]
        One per layer.
    """

    start: int
    parts: tuple[torch.Tensor, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)


@dataclass(frozen=True, eq=False)
class Entry:
    """What a row reads at one place.

    Attributes
    ----------
    start : int
        Column of the first token.
    keys, values : Block
        Of equally many tokens, perhaps computed elsewhere.
    """

    start: int
    keys: Block
    values: Block

    @property
    def offset(self) -> int:
        """Positions that the keys have moved."""
        return self.start - self.keys.start


class BlockLayer(CacheLayerMixin):
    """One layer: sealed blocks behind a table that all layers share, and a tail per row.

    `update` returns all keys and values as one tensor, so any attention implementation works; that
    tensor is a copy which lives for one layer's attention.

    Parameters
    ----------
    layer_rank : int
        Which part of a block is this layer's.
    table : list of list of Entry
        Of every row; the cache's, and only read here.
    rotation : Callable or None
        Moves keys: see `Rotation.move`. None leaves shared keys where they were computed.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, layer_rank: int, table: list[list[Entry]], rotation: Any) -> None:
        super().__init__()
        self.layer_rank, self.table, self.rotation = layer_rank, table, rotation
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.seen = 0
        self._tails: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._tails = [([], []) for _ in range(len(key_states))]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens to the tails and return everything.

        Parameters
        ----------
        key_states, value_states : Tensor[B, H_kv, T, D]

        Returns
        -------
        tuple of Tensor[B, H_kv, N, D]
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        for row, tail in enumerate(self._tails):
            for pieces, new in zip(tail, (key_states[row], value_states[row]), strict=True):
                # A clone: a view would keep the tokens of all rows alive.
                pieces.append(new.clone())
                if len(pieces) > _MERGE:
                    pieces[:] = [torch.cat(pieces, dim=1)]
        keys = self._gather([entry.keys for row in self.table for entry in row], 0)
        values = self._gather([entry.values for row in self.table for entry in row], 1)
        offsets = self._offsets()
        if self.rotation is not None and bool(offsets.any()):
            keys = self.rotation(keys, offsets.to(self.device))
        return keys, values

    def _gather(self, blocks: Sequence[Block], side: int) -> torch.Tensor:
        """Tensor[B, H_kv, N, D] of all rows: one concatenation along the tokens."""
        pieces, blocks_of = [], iter(blocks)
        for row, tail in enumerate(self._tails):
            count = len(self.table[row]) if self.table else 0
            pieces += [next(blocks_of).parts[self.layer_rank] for _ in range(count)]
            pieces += tail[side]
        joined = torch.cat(pieces, dim=1)
        heads, _, size = joined.shape
        return joined.view(heads, len(self._tails), self.seen, size).transpose(0, 1)

    def _offsets(self) -> torch.Tensor:
        """LongTensor[B, N]: how far each key has moved."""
        offsets = torch.zeros(len(self._tails), self.seen, dtype=torch.long)
        for row, entries in enumerate(self.table):
            for entry in entries:
                if entry.offset:
                    offsets[row, entry.start : entry.start + entry.keys.tokens] = entry.offset
        return offsets

    def cut(self, row: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the oldest tokens out of a row's tail: keys and values, Tensor[H_kv, tokens, D]."""
        found = []
        for pieces in self._tails[row]:
            whole = torch.cat(pieces, dim=1)
            found.append(whole[:, :tokens].clone())
            pieces[:] = [whole[:, tokens:].clone()]
        return found[0], found[1]

    @property
    def rows(self) -> int:
        """Batch rows held."""
        return len(self._tails)

    @property
    def tail_bytes(self) -> int:
        """Bytes of what is in no block yet."""
        return sum(
            piece.untyped_storage().nbytes()
            for tail in self._tails
            for pieces in tail
            for piece in pieces
        )

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return key length and offset for the mask of `query_length` new tokens."""
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refuse beams."""
        raise refusal("beam search")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuse: rows must stay those of the watcher."""
        raise refusal("dropping rows (branch_generate)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: rows must stay those of the watcher."""
        raise refusal("repeating rows (branch_generate)")

    def activate_past_recording(self) -> None:
        """Refuse assisted decoding, which announces here that it will take tokens back."""
        raise refusal("assisted decoding")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back: they may be shared."""
        if int(tokens_to_remove):
            raise refusal("crop")

    def offload(self) -> None:
        """Refuse."""
        raise refusal("offloading")


def refusal(what: str) -> ValueError:
    """The error for a use of generate that blocks do not support."""
    return ValueError(
        f"StepShareCache: expected plain generate, greedy or sampled, got {what}; use "
        "SharedBranchCache, which shares exactly and supports it."
    )
