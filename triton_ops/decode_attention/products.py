"""Products with keys and with values, which may be codes of 8 bits: these are widened in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..fp8.cpu import decoded

TOKENS = 512
"""Tokens of a block. Shorter ones take more calls, longer ones leave the cache of a core."""

BYTES = 1 << 20
"""Bytes of a widened block, unless one head alone takes more."""


def key_products(
    query: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor:
    """Multiply all queries of heads with all their keys, in float32.

    Parameters
    ----------
    query, keys : Tensor[C, M, D], Tensor[C, N, D]
    scales : Tensor[C, N] or None
        Of keys that are codes, see `triton_ops.fp8`.

    Returns
    -------
    Tensor[C, M, N]
    """
    if scales is None:
        return torch.bmm(query, keys.transpose(1, 2)).float()
    out = query.new_empty(*query.shape[:2], keys.shape[1], dtype=torch.float32)
    query = query.float()
    for heads, tokens in _blocks(keys):
        block = decoded(keys[heads, tokens], torch.float32)
        out[heads, :, tokens] = torch.bmm(query[heads], block.transpose(1, 2))
    return out.mul_(scales.float()[:, None])


def value_products(
    weights: torch.Tensor, values: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Sum the values of heads with the weights of each query.

    Parameters
    ----------
    weights, values : Tensor[C, M, N], Tensor[C, N, D_v]
    scales : Tensor[C, N] or None
        Of values that are codes.
    dtype : dtype
        Of the result.

    Returns
    -------
    Tensor[C, M, D_v]
    """
    if scales is None:
        return torch.bmm(weights.to(values.dtype), values).to(dtype)
    out = weights.new_zeros(*weights.shape[:2], values.shape[2], dtype=torch.float32)
    weights = weights * scales.float()[:, None]
    for heads, tokens in _blocks(values):
        block = decoded(values[heads, tokens], torch.float32)
        out[heads] = out[heads].baddbmm_(weights[heads, :, tokens], block)
    return out.to(dtype)


def _blocks(codes: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield heads and tokens of each block of codes, ByteTensor[C, N, D]."""
    count, length, size = codes.shape
    at_once = max(1, BYTES // (TOKENS * size * torch.float32.itemsize))
    for head in range(0, count, at_once):
        for token in range(0, length, TOKENS):
            yield slice(head, head + at_once), slice(token, token + TOKENS)
