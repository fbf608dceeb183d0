"""Protection as a layer of a cache knows it: settings, and what they mean for each row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from hf_reasoncache.protection.fair import Fair, share_fairly
from hf_reasoncache.protection.ranges import Spans, expect_inside

_NEVER = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class Protection:
    """What all layers of a cache protect.

    Attributes
    ----------
    keep : Spans or None
        The whitelist: never evicted, counted inside the budget.
    fair : Fair or None
    """

    keep: Spans | None = None
    fair: Fair | None = None

    def for_rows(self, prompt: torch.Tensor) -> RowProtection:
        """Begin a batch whose prompts have `prompt` tokens so far, LongTensor[B].

        Raises
        ------
        ValueError
            If the spans are for another number of rows.
        """
        rows = len(prompt)
        return RowProtection(
            settings=self,
            keep=_sources(self.keep, rows),
            fair=_sources(self.fair.spans if self.fair else None, rows),
            prompt=prompt,
        )


@dataclass(frozen=True, eq=False)
class RowProtection:
    """Protected tokens and spans of the rows of one layer; changes give a new object.

    Attributes
    ----------
    settings : Protection
    keep, fair : LongTensor[B]
        Row of the whitelist and of the fair spans that each row of the batch has.
    prompt : LongTensor[B]
        Prompt tokens of each row.
    """

    settings: Protection
    keep: torch.Tensor
    fair: torch.Tensor
    prompt: torch.Tensor

    def grown(self, prompt: torch.Tensor) -> RowProtection:
        """Take note of prompts that have grown."""
        return replace(self, prompt=prompt)

    def select_rows(self, rows: torch.Tensor) -> RowProtection:
        """Keep, repeat or reorder rows."""
        return replace(self, keep=self.keep[rows], fair=self.fair[rows], prompt=self.prompt[rows])

    def check(self) -> None:
        """Raise ValueError unless the spans fit the prompts, which are complete now."""
        fair = self.settings.fair.spans if self.settings.fair else None
        for spans, sources in ((self.settings.keep, self.keep), (fair, self.fair)):
            if spans is None:
                continue
            pairs = zip(sources.tolist(), self.prompt.tolist(), strict=True)
            for row, (source, prompt) in enumerate(pairs):
                if spans.tokens is not None and spans.tokens[source] != prompt:
                    raise ValueError(
                        f"spans: expected a prompt of {spans.tokens[source]} tokens in row {row}, "
                        f"got {prompt}; find the spans in the very prompts that generate is given "
                        "(same order, special tokens and chat template), and pass "
                        "Protect(prompt_length=...) with assisted decoding or prefill_chunk_size."
                    )
                expect_inside(row, spans.rows[source], prompt)

    # ------------------------------------------------------------------------------------ whitelist

    @cached_property
    def count(self) -> torch.Tensor:
        """LongTensor[B]: tokens of the whitelist."""
        if self.settings.keep is None:
            return torch.zeros_like(self.prompt)
        return torch.tensor(self.settings.keep.counts, device="cpu")[self.keep]

    @cached_property
    def _edges(self) -> torch.Tensor:
        """LongTensor[B, 2 S]: ends of the whitelist's ranges in order, then filler."""
        ranges = self.settings.keep.merged if self.settings.keep else ((),)
        return _filled([[end for each in row for end in each] for row in ranges])[self.keep]

    def count_below(self, position: torch.Tensor) -> torch.Tensor:
        """LongTensor[B]: tokens of the whitelist before a position of each row."""
        starts, stops = self._edges[:, ::2], self._edges[:, 1::2]
        end = position[:, None]
        return (torch.minimum(stops, end) - torch.minimum(starts, end)).sum(-1)

    def covers(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Which tokens of some rows are in the whitelist.

        Parameters
        ----------
        rows : LongTensor[R]
        positions : LongTensor[R, H, N]
            Counted from the row's first real token; negative for filler.

        Returns
        -------
        BoolTensor[R, H, N]
        """
        # Between the first and second edge, the third and fourth, ...
        return _place(self._edges[rows], positions) % 2 == 1

    # ------------------------------------------------------------------------------- fair eviction

    @cached_property
    def _cuts(self) -> torch.Tensor:
        """LongTensor[B, S]: where the spans of the prompt begin, then filler."""
        fair = self.settings.fair
        if fair is None:
            raise ValueError("expected fair eviction to be set, got none.")
        pairs = zip(self.fair.tolist(), self.prompt.tolist(), strict=True)
        return _filled([fair.cuts(*pair) for pair in pairs])

    def rebalance(
        self,
        rows: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor,
        scores: torch.Tensor,
        valid: torch.Tensor,
        forced: torch.Tensor,
    ) -> torch.Tensor:
        """Choose as many tokens as `keep` does, more fairly if that was asked for.

        Parameters
        ----------
        rows : LongTensor[R]
        positions : LongTensor[R, H, N]
        keep, scores, valid, forced
            See `share_fairly`.

        Returns
        -------
        BoolTensor[R, H, N]
        """
        fair = self.settings.fair
        if fair is None or fair.strength == 0:
            return keep
        cuts, prompt = self._cuts[rows], self.prompt[rows]
        in_prompt = cuts.shape[1]
        length = positions.flatten(1).amax(-1).cpu() + 1
        after = int(((length - prompt).clamp_min(0) + fair.window - 1).amax()) // fair.window
        end = torch.maximum(prompt, length)[:, None]
        generated = prompt[:, None] + torch.arange(after + 1, device="cpu") * fair.window
        begins = torch.cat([cuts, prompt[:, None]], -1).minimum(prompt[:, None])
        lengths = torch.cat([begins.diff(), generated.minimum(end).diff()], -1)

        device = positions.device
        prompt = prompt.to(device)[:, None, None]
        span = torch.where(
            positions < prompt,
            _place(cuts, positions) - 1,
            in_prompt + (positions - prompt) // fair.window,
        )
        return share_fairly(
            keep, scores, valid, forced, span, lengths.to(device), float(fair.strength)
        )


def _sources(spans: Spans | None, rows: int) -> torch.Tensor:
    return torch.tensor([0] * rows if spans is None else spans.sources(rows), device="cpu")


def _filled(lists: list[list[int]]) -> torch.Tensor:
    """LongTensor of lists of different length, the rest behind every position."""
    longest = max(map(len, lists))
    return torch.tensor(
        [[*each, *[_NEVER] * (longest - len(each))] for each in lists], device="cpu"
    ).long()


def _place(edges: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """How many edges of its row each position has reached: LongTensor[R, H, N]."""
    flat = positions.flatten(1).contiguous()
    edges = edges.to(positions.device).contiguous()
    return torch.searchsorted(edges, flat, right=True).view_as(positions)
