"""What a cache protects, as users say it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from hf_reasoncache.messages import shown
from hf_reasoncache.protection.fair import Fair
from hf_reasoncache.protection.ranges import Ranges, Spans
from hf_reasoncache.protection.rows import Protection


@dataclass(frozen=True)
class Protect:
    """What evictions spare: the prompt, parts of it, or a fair share of every span.

    Attributes
    ----------
    prompt : bool
        Never evict the prompt, which is all that comes before the first single-token forward.
    spans : Spans, or token ranges, optional
        With `prompt=False`: parts of the prompt that are never evicted, counted inside what may
        stay. `hf_reasoncache.protection.spans` finds them in texts and chats; bare ranges
        `(start, stop)`, for all rows or a list for each, count from a row's first real token.
    fair : float or Fair, optional
        From 0 to 1: how far spans of the text keep tokens by their length instead of by score, so
        that none is forgotten whole; a `Fair` says which spans.
    prompt_length : int, optional
        Columns of the prompt, padding included. generate does not tell a cache where a prompt ends,
        so that this is needed where it does not show. Assisted decoding brings the first draft
        together with the prompt: without it, the accepted part of that draft is protected as well.
        A last chunk of `prefill_chunk_size` that has one token looks like the first token
        generated: without it, that token is not protected, and `spans` find the prompt too short.

    Raises
    ------
    ValueError
        If a value is not valid, or spans are given beside a whole prompt.
    """

    prompt: bool = True
    spans: Spans | Ranges | None = None
    fair: float | Fair | None = None
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        """Check and normalise."""
        if not isinstance(self.prompt, bool):
            raise ValueError(
                f"protect: expected prompt as True or False, got {shown(self.prompt)}."
            )
        if self.spans is not None:
            object.__setattr__(self, "spans", Spans.of(self.spans))
        fair = self.fair if isinstance(self.fair, Fair | None) else Fair(self.fair)
        object.__setattr__(self, "fair", fair)
        if self.prompt and (
            self.spans is not None or (fair is not None and fair.spans is not None)
        ):
            raise ValueError(
                "protect: expected prompt=False beside spans of the prompt, got True, which keeps "
                "the whole prompt; pass Protect(prompt=False, ...) to keep the spans alone."
            )
        length = self.prompt_length
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError(
                f"protect: expected prompt_length as an integer >= 1, got {shown(length)}."
            )

    @staticmethod
    def of(value: Any) -> Protect:
        """Make settings of what users pass.

        Parameters
        ----------
        value : Protect, bool, Spans, or token ranges
            As it is; whether to keep the prompt; the parts of the prompt to keep.

        Raises
        ------
        ValueError
            If it is anything else.
        """
        if isinstance(value, Protect):
            return value
        if isinstance(value, bool):
            return Protect(prompt=value)
        if isinstance(value, str | bytes) or not isinstance(value, Spans | Iterable):
            raise ValueError(
                "protect: expected True, False, Spans, token ranges or a Protect, got "
                f"{shown(value)}; hf_reasoncache.protection.spans finds the tokens of a text."
            )
        return Protect(prompt=False, spans=Spans.of(value))

    @property
    def protection(self) -> Protection | None:
        """What is protected besides a whole prompt; None if nothing is."""
        # As `__post_init__` has left them.
        spans, fair = cast("Spans | None", self.spans), cast("Fair | None", self.fair)
        return None if spans is None and fair is None else Protection(spans, fair)
