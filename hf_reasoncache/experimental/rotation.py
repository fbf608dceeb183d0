"""Moves keys that were rotated by RoPE to other positions."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

_FIXED = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of RoPE whose angle is the position times a constant; others change with the length."""


class Rotation:
    """The rotary embedding of a model, applied to keys that have been rotated already.

    A rotation by `a` and then by `b` is one by `a + b`, so a key at position p moves to q by the
    angles of `q - p`, which the model's own embedding gives. Its own function applies them, so that
    halves, pairs and partial rotation are as the model has them.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder with one rotary embedding for all its layers.

    Raises
    ------
    ValueError
        If the model has none or several, or one whose angles depend on the length.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        name = type(model).__name__
        embedding = getattr(model.get_decoder(), "rotary_emb", None)
        apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
        kind = getattr(embedding, "rope_type", None)
        if embedding is None or apply is None or isinstance(kind, dict):
            raise ValueError(
                f"rotation: expected a model with one rotary embedding for all layers, got {name}; "
                "use share='values', which leaves keys alone."
            )
        if kind not in _FIXED:
            raise ValueError(
                f"rotation: expected RoPE of a kind in {_FIXED}, got {kind!r}, whose angles change "
                "with the length; use share='values'."
            )
        if len(inspect.signature(embedding.forward).parameters) != 2:
            raise ValueError(
                f"rotation: expected a rotary embedding of (x, position_ids), got that of {name}; "
                "use share='values'."
            )
        self._embedding: Any = embedding
        self._apply = apply

    @torch.no_grad()
    def move(self, keys: torch.Tensor, offset: int | torch.Tensor) -> torch.Tensor:
        """Return the keys as they would be `offset` positions later.

        Parameters
        ----------
        keys : Tensor[B, H_kv, T, D]
            As the model caches them: rotated.
        offset : int or LongTensor[B, T]
            May be negative.

        Returns
        -------
        Tensor[B, H_kv, T, D]
            Computed in float32.
        """
        if isinstance(offset, int):
            offset = torch.full((1, keys.shape[-2]), offset, device=keys.device)
        wide = keys.float()
        cos, sin = self._embedding(wide, offset)
        # YaRN scales cosines and sines; the keys have been scaled once already.
        scaling = self._embedding.attention_scaling
        moved, _ = self._apply(wide, wide, cos / scaling, sin / scaling)
        return moved.to(keys.dtype)
