"""Does a text look like look-up? The spectrum of what its queries attend to says so.

From "risk" (arXiv 2607.01520, as a third-party note reports it; we have not read the paper): no
choice of `K` tokens, however well it knows the queries, loses less than the spectral tail beyond
`K / 3` of the covariance of the queries' response profiles; and a flat spectrum, where every query
reads something else, needs nearly the whole cache. Ours: the profile is the attention of a query to
tokens older than the window that stays anyhow; the covariance is about zero, not about the mean;
the tail is compared with the energy of the whole profiles, without the factor `1 / K`; and the
least budget is where it falls below a tolerance. That is a rule of thumb, not the theorem.
"""

from __future__ import annotations

import torch


def least_tokens(
    attention: torch.Tensor, positions: torch.Tensor, *, window: int, tolerance: float
) -> torch.Tensor:
    """Return how few tokens each head can hold before its profiles' spectral tail is too large.

    Parameters
    ----------
    attention : Tensor[H, Q, N]
        Attention probabilities of some queries of each head to the `N` tokens of a text.
    positions : LongTensor[Q]
        Position of each query; it attends to no later token.
    window : int
        Newest tokens that are held for every query.
    tolerance : float
        In (0, 1): largest tail, as a share of the mean energy `|a|^2` of the profiles.

    Returns
    -------
    LongTensor[H]
        Between `window` and `N`: the window, and 3 tokens for each direction that is needed.

    Raises
    ------
    ValueError
        If the shapes do not fit, or an argument is out of range.
    """
    if attention.dim() != 3 or positions.shape != attention.shape[1:2] or not len(positions):
        raise ValueError(
            "least_tokens: expected attention [H, Q, N] and positions [Q] with Q >= 1, got "
            f"{list(attention.shape)} and {list(positions.shape)}."
        )
    if not 0.0 < tolerance < 1.0 or window < 0:
        raise ValueError(
            "least_tokens: expected a tolerance in (0, 1) and a window >= 0, got "
            f"{tolerance!r} and {window!r}."
        )
    total, queries = attention.shape[2], len(positions)
    profiles = attention.double()
    old = torch.arange(total, device=positions.device) <= positions[:, None] - window
    energy = profiles.square().sum(-1).mean(-1)
    far = profiles.masked_fill(~old, 0.0)
    # The Gram matrix has the spectrum of the covariance, and as many rows as there are queries.
    spectrum = torch.linalg.eigvalsh(far @ far.mT / queries).clamp_min(0.0).flip(-1)
    tail = spectrum.flip(-1).cumsum(-1).flip(-1)
    # tail[r] is what remains beyond the first r directions; beyond all of them nothing does.
    needed = (tail > tolerance * energy[:, None]).sum(-1)
    return (window + 3 * needed).clamp_max(total)
