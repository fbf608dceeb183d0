"""Definition of `redundancy` in plain PyTorch, with the whole matrix of cosines."""

from __future__ import annotations

import torch

from .places import NONE


def redundancy_reference(
    keys: torch.Tensor, valid: torch.Tensor, *, threshold: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.redundancy.redundancy`; what is known changes nothing, so it is not asked."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    held = keys.to(dtype).where(valid[..., None], 0.0)
    norm = held.norm(dim=-1, keepdim=True)
    unit = held / norm.where(norm > 0, 1.0)
    place = torch.arange(keys.shape[2], device=keys.device)
    # A key is no repeat of itself, and the zeros of filler exceed no threshold.
    cosine = (unit @ unit.mT).where(place != place[:, None], 0.0)
    repeat = place.where(cosine > threshold, NONE).amax(-1)
    counted = cosine.where(place != repeat[..., None], 0.0)
    return counted.sum(-2) / valid.sum(-1, keepdim=True).clamp(min=1), repeat
