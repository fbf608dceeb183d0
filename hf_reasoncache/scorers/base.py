"""What a token scorer sees, and what it must answer.

A scorer decides *which* tokens a head keeps; how many it may keep is decided by
`hf_reasoncache.budgets`, and what must be kept whatever the score (prompt, observation window) by
the layer that asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch

from triton_ops.window_scores import window_scores


@dataclass(frozen=True)
class HeldTokens:
    """The resident tokens of one layer for the rows that are about to evict.

    Tokens are sorted by position, so neighbours along `N` are neighbours in the text that is still
    held; the heads of a row may hold different numbers of tokens, and the tail beyond a head's own
    number is filler with `valid == False`. A scorer may return any finite number there.

    Attributes
    ----------
    keys : Tensor[R, H_kv, N, D]
        Keys as cached: rotated at their logical position. Filler is zero.
    positions : LongTensor[R, H_kv, N]
        Logical positions counted from the first real token of the row (left padding is not
        counted), so that a row in a padded batch looks the same as that row alone. Filler is -1.
    valid : BoolTensor[R, H_kv, N]
    length : LongTensor[R]
        Tokens the row has seen: the newest has position `length - 1`.
    scaling : float
        Factor on the logits, usually `D ** -0.5`.
    layer : int
        Index of the layer among the model's layers.
    queries : Tensor[R, H_kv, G, A, D] or None
        The row's last `A <= scorer.queries` post-RoPE queries, oldest first, grouped by the KV head
        they read.
    query_positions : LongTensor[R, A] or None
        Position of each query, -1 where the row had no such query (a prompt shorter than `A`).
    cumulative_attention : Tensor[R, H_kv, N] or None
        Attention probability each token has received since it came, summed over all queries and
        over the query group, decayed by `scorer.attention_decay` per query; only for scorers with
        `needs_cumulative_attention`.
    scorer_state : IntTensor[R, H_kv, N] or None
        One number per token that the scorer may write to, in place, and finds again at the next
        eviction; 0 for tokens that came since, for filler, and for all after a crop. Only for
        scorers with `keeps_state`.
    load_values : Callable
        Gathers the values; use `values`.
    first_head : int
        Number of the first head among the heads of the layer, not 0 where another process has some
        of them.
    filler : bool or None
        Whether there may be any; None looks.
    prompt : LongTensor[R] or None
        Tokens of the row's prompt; None where the policy does not say.
    """

    keys: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    length: torch.Tensor
    scaling: float
    layer: int
    load_values: Callable[[], torch.Tensor]
    queries: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    cumulative_attention: torch.Tensor | None = None
    scorer_state: torch.Tensor | None = None
    first_head: int = 0
    filler: bool | None = None
    prompt: torch.Tensor | None = None

    @cached_property
    def values(self) -> torch.Tensor:
        """Values `[R, H_kv, N, D_v]` in the order of `keys`, gathered on first use; filler 0."""
        return self.load_values()

    def window(self, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the newest `last` queries, or as many as there are, and their positions.

        Returns
        -------
        Tensor[R, H_kv, G, A, D]
        LongTensor[R, A]

        Raises
        ------
        ValueError
            If the layer kept no queries.
        """
        if self.queries is None or self.query_positions is None:
            raise ValueError(
                f"The scorer of layer {self.layer} expects the last {last} queries, got none; keep "
                "`scorer.queries` of them and pass `queries` and `query_positions`."
            )
        return self.queries[..., -last:, :], self.query_positions[:, -last:]

    def mean_attention(self, last: int, *, sees: Literal["causal", "all"]) -> torch.Tensor:
        """Mean attention of the newest `last` queries, over them and the query group.

        Parameters
        ----------
        last : int
        sees : {"causal", "all"}
            Whether a query sees the keys up to its own position, or younger ones too.

        Returns
        -------
        Tensor[R, H_kv, N]
        """
        queries, at = self.window(last)
        return window_scores(
            queries, self.keys, at, self.positions, self.scaling, group="mean", sees=sees
        )

    @cached_property
    def has_filler(self) -> bool:
        """Whether some head holds fewer tokens than another."""
        return not bool(self.valid.all()) if self.filler is None else self.filler

    def blank(self, numbers: torch.Tensor, value: float) -> torch.Tensor:
        """Return `numbers` `[R, H_kv, N]` with `value` for filler; themselves if there is none."""
        return numbers.masked_fill(~self.valid, value) if self.has_filler else numbers

    @cached_property
    def count(self) -> torch.Tensor:
        """Tokens held per head: LongTensor `[R, H_kv]`."""
        return self.valid.sum(-1)

    @cached_property
    def recency(self) -> torch.Tensor:
        """Position over length, in (0, 1] and highest for the newest token: `[R, H_kv, N]`.

        float32: the order is exact up to 2^24 tokens. Filler is 0.
        """
        return (self.positions + 1).float() / self.length[:, None, None].clamp(min=1)


@runtime_checkable
class Scorer(Protocol):
    """One eviction policy: higher score, kept longer.

    Implementations are small frozen dataclasses, one per file, that inherit from this protocol to
    get the class-level defaults below and override only what they need. A scorer is never told the
    batch row it works on: its answer for a row must not depend on the row's neighbours.
    """

    @property
    def queries(self) -> int:
        """Number of most recent queries the layer has to keep for this scorer; 0 keeps none."""
        return 0

    comparable: ClassVar[Literal["length", "raw"]] = "raw"
    """How scores compare between heads, see `budgets.head_budgets`: as they are ("raw"), or times
    the number of tokens a head holds ("length"), which undoes a normalisation over those."""

    needs_cumulative_attention: ClassVar[bool] = False
    """Whether the layer sums up attention probabilities: a pass over the keys per step."""

    keeps_state: ClassVar[bool] = False
    """Whether the layer stores `HeldTokens.scorer_state` from one eviction to the next."""

    joins_layers: ClassVar[bool] = False
    """Whether scores depend on the tokens alone, whatever `HeldTokens.layer` says: rows of several
    layers may then be scored at once, as rows of one."""

    @property
    def attention_decay(self) -> float:
        """Factor in (0, 1] on the accumulated attention at every new query; 1 forgets nothing."""
        return 1.0

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Score the held tokens.

        Parameters
        ----------
        held : HeldTokens

        Returns
        -------
        Tensor[R, H_kv, N]
            float32, higher is kept longer.
        """
        ...
