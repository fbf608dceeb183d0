"""What a `StepShareCache` shares, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from hf_reasoncache.report import CacheReport


@dataclass(frozen=True, kw_only=True)
class StepShareReport(CacheReport):
    """What is held and shared now.

    Attributes
    ----------
    steps, candidates, matched : int
        Steps that ended; those with a lexically similar earlier one; those that share a block.
    blocks, shared_blocks : int
        Blocks of generated steps, and those that point at an earlier one.
    held_bytes, saved_bytes : int
        Bytes of keys and values that are held in blocks and tails, free slots of the pools not
        counted, and that sharing steps freed.
    prompt_bytes : int
        Bytes that were freed, without any error, since branches have the same prompt.
    key_distance, value_distance : float
        Mean relative distance of shared blocks from what they replaced; NaN where none is shared.
    """

    steps: int
    candidates: int
    matched: int
    blocks: int
    shared_blocks: int
    held_bytes: int
    saved_bytes: int
    prompt_bytes: int
    key_distance: float
    value_distance: float

    def __str__(self) -> str:
        whole = self.held_bytes + self.saved_bytes
        share = self.saved_bytes / whole if whole else 0.0
        return "\n".join(
            [
                super().__str__(),
                f"{self.steps} steps, {self.candidates} with a similar one, {self.matched} share; "
                f"{self.shared_blocks} of {self.blocks} blocks shared",
                f"{self.held_bytes:,} bytes in blocks and tails, {self.saved_bytes:,} "
                f"({share:.1%}) saved",
                f"mean relative distance of keys {self.key_distance:.3f}, of values "
                f"{self.value_distance:.3f}",
            ]
        )
