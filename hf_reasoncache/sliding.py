"""Sliding-window layers of transformers, with a form of constant shape for captured steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


class RingLength(int):
    """Places of a ring; its type tells our mask function that the keys lie in one.

    Attributes
    ----------
    layer : SlidingLayer
        The layer that the mask is made for; others with the same window share it.
    """

    layer: SlidingLayer


class SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' own layer, which joins old and new keys at every step, except when captured.

    A captured step needs memory that stays where it is. There the layer is a ring: column `c`
    stands at place `c % sliding_window`, over the column that has left the window. Outside of
    captured steps whoever reads or changes the layer finds transformers' form again, so it alone
    defines what prompts, drafts, beams and several turns mean. transformers' own static layer
    decides on the host, at every step, whether the window is full, and sends it an index.

    Attributes
    ----------
    clock : LongTensor[1] or None
        On the layer's device, set while a step is captured: the column of the one new token.
    real : BoolTensor[B, sliding_window] or None
        Set with it: whether the column at each place is shown, by the attention mask.
    """

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        self._ring: tuple[torch.Tensor, torch.Tensor] | None = None
        super().__init__(sliding_window, **kwargs)
        self.clock: torch.Tensor | None = None
        self.real: torch.Tensor | None = None

    # -------------------------------------------------------------- what transformers' layer reads

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of the window, oldest first; ends the ring."""
        self._end_ring()
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._end_ring()
        self._keys = keys

    @property
    def values(self) -> torch.Tensor | None:
        """Values of the window, oldest first; ends the ring."""
        self._end_ring()
        return self._values

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._end_ring()
        self._values = values

    def _end_ring(self) -> None:
        """Go back to transformers' form."""
        if self._ring is not None:
            ring, self._ring = self._ring, None
            columns = self._columns(min(self.cumulative_length, self.sliding_window - 1))
            self._keys, self._values = (each.index_select(2, columns) for each in ring)

    def _columns(self, count: int) -> torch.Tensor:
        """Return the places of the newest `count` columns, oldest first."""
        end = self.cumulative_length
        return torch.arange(end - count, end, device=self.device) % self.sliding_window

    # ------------------------------------------------------------------------------ captured steps

    def prepare(self) -> None:
        """Become a ring, so that one new token can be written where the oldest one stands."""
        if self._ring is not None or self._keys is None or self._values is None:
            return
        columns = self._columns(self._keys.shape[-2])
        with torch.inference_mode(False), torch.no_grad():
            keys, values = (
                x.new_zeros(*x.shape[:2], self.sliding_window, x.shape[-1]).index_copy_(
                    2, columns, x
                )
                for x in (self._keys, self._values)
            )
        self._keys = self._values = None
        self._ring = keys, values

    def static_parts(self) -> Iterator[Any]:
        """Yield the objects that a captured step reads and writes where they are."""
        yield from self._ring or ()

    def advance(self) -> None:
        """Take note of one token per row that a replayed step has stored."""
        self.cumulative_length += 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens; return what they may attend to."""
        if self._ring is None or self.clock is None:
            # Here, as transformers counts the new tokens before it looks at the old ones.
            self._end_ring()
            return super().update(key_states, value_states, *args, **kwargs)
        place = self.clock % self.sliding_window
        for ring, new in zip(self._ring, (key_states, value_states), strict=True):
            ring.index_copy_(2, place, new)
        self.advance()
        return self._ring

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that `update` will return."""
        if self._ring is None or self.clock is None:
            return super().get_mask_sizes(query_length)
        length = RingLength(self.sliding_window)
        length.layer = self
        return length, 0

    def mask(self, base: str, arguments: dict[str, Any]) -> Any:
        """Make the mask of a captured step, of what the clock says and nothing else.

        Parameters
        ----------
        base : str
            Name of the implementation that attends.
        arguments : dict
            What transformers passed to the mask function.
        """
        clock, real, places = self.clock, self.real, self.sliding_window
        if clock is None or real is None:
            raise ValueError("expected a captured step, got a mask for a ring outside of one.")
        place = torch.arange(places, device=clock.device)
        columns = clock - (clock - place) % places

        mask = ALL_MASK_ATTENTION_FUNCTIONS[base](
            **arguments
            | {
                "kv_length": places,
                "q_offset": clock,
                # The function adds the number of each place.
                "kv_offset": columns - place,
                "attention_mask": None,
                "allow_is_causal_skip": False,
            }
        )
        # Of a window that is not full, some places belong to columns before the first.
        shown = (real & (columns >= 0))[:, None, None]
        if mask.dtype == torch.bool:
            return mask & shown
        return mask.masked_fill(~shown, torch.finfo(mask.dtype).min)

    # -------------------------------------------------------------------------------------- report

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield keys and values, in whichever form they are."""
        held = self._ring or (self._keys, self._values)
        yield from (each for each in held if each is not None)
