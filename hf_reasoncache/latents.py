"""How a model expands latents to keys and values, absorbed into its queries and outputs.

In multi-head latent attention the cache holds a latent and a rotary key per token, and the module
expands all of them at every step. Multiplied out the other way, nothing is expanded: a query meets
the latents themselves, after one product with the key half of the up-projection, and the value half
is applied to what attention makes of them (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
"""

from __future__ import annotations

from typing import Any

import torch

from hf_reasoncache.precision import without_autocast

TOLERANCE = 64
"""Units in the last place by which a projection may differ from the matrix that it is taken for."""


class UpProjection:
    """The up-projection of one attention module, as a matrix.

    Parameters
    ----------
    module : Module
        An attention module of transformers: `kv_b_proj` expands latents, and `qk_nope_head_dim` and
        `v_head_dim` say what to.
    latents : Tensor[B, 1, T, R]
        Some latents, for their type and device.
    dtype : torch.dtype
        Of the queries and outputs that it will be applied to.

    Raises
    ------
    ValueError
        If the projection is not linear: some kinds of quantised weights.
    """

    def __init__(self, module: Any, latents: torch.Tensor, dtype: torch.dtype) -> None:
        self.key_size = module.qk_nope_head_dim
        self.sizes = [self.key_size, module.v_head_dim]
        self._linear: Any = None
        linear = module.kv_b_proj
        if _is_plain(linear) and linear.weight.dtype == dtype:
            # Not its weight, which another adapter or a step of training may replace.
            self._linear = linear
        else:
            self._matrix = _effective_weight(linear, latents).to(dtype)

    def __deepcopy__(self, memo: Any) -> UpProjection:
        """Return itself: it belongs to the model, of which copies of a cache are no copy."""
        return self

    def _halves(self) -> tuple[torch.Tensor, ...]:
        """Tensor[H, D_nope, R] and Tensor[H, D_v, R]."""
        weight: torch.Tensor
        weight = self._matrix if self._linear is None else self._linear.weight.detach()
        return weight.view(-1, sum(self.sizes), weight.shape[1]).split(self.sizes, dim=1)

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Move queries into the space of the latents and rotary keys.

        Parameters
        ----------
        query : Tensor[B, H, T, D_nope + D_rope]

        Returns
        -------
        Tensor[B, H, T, R + D_rope]
        """
        keys = self._halves()[0]
        plain, rotary = query.split([self.key_size, query.shape[-1] - self.key_size], dim=-1)
        # One product per head for all rows: [H, B * T, D_nope] @ [H, D_nope, R].
        by_head = plain.transpose(0, 1).flatten(1, 2) @ keys
        absorbed = by_head.unflatten(1, (query.shape[0], query.shape[2])).transpose(0, 1)
        return torch.cat([absorbed, rotary], dim=-1)

    def expand(self, out: torch.Tensor) -> torch.Tensor:
        """Turn means of latents into outputs of the heads.

        Parameters
        ----------
        out : Tensor[B, T, H, R]

        Returns
        -------
        Tensor[B, T, H, D_v]
        """
        values = self._halves()[1]
        by_head = out.flatten(0, 1).transpose(0, 1) @ values.mT
        return by_head.transpose(0, 1).unflatten(0, out.shape[:2])


def _is_plain(linear: Any) -> bool:
    """Whether a projection is a matrix that lies where it says, and nothing else."""
    return (
        type(linear) is torch.nn.Linear
        and linear.bias is None
        and linear.weight.device.type != "meta"
        # What accelerate does to modules whose weights it moves in and out.
        and "forward" not in vars(linear)
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
    )


@torch.no_grad()
def _effective_weight(linear: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return the matrix that a projection (quantised, or with an adapter) multiplies with.

    Parameters
    ----------
    linear : Module
    latents : Tensor[B, 1, T, R]

    Returns
    -------
    Tensor[H * (D_nope + D_v), R]
    """
    rank = latents.shape[-1]
    unit = torch.eye(rank, dtype=latents.dtype, device=latents.device)
    probe = latents[:1, :, -1:]
    matrix, zero, expected = (
        linear(x)[0, 0] for x in (unit[None, None], torch.zeros_like(probe), probe)
    )
    with without_autocast(latents.device):
        got = probe[0, 0].to(matrix.dtype).double() @ matrix.double()
        scale = probe[0, 0].double().abs() @ matrix.double().abs()
        allowed = TOLERANCE * torch.finfo(matrix.dtype).eps * scale
        if bool(zero.any()) or bool(((got - expected.double()).abs() > allowed).any()):
            raise ValueError(
                f"kv_b_proj: expected a linear projection of latents, got {type(linear).__name__}, "
                "which is none (a bias, or numbers rounded on the way); exclude kv_b_proj from the "
                "quantisation, or use DynamicCache."
            )
        return matrix.mT.contiguous()
