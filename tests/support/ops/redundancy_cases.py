"""Keys that repeat each other."""

import torch


def prefix(counts, held):
    return torch.arange(held) < torch.tensor(counts).unsqueeze(-1)


def keys_with(common, shape, dtype=torch.float64):
    """Noise plus a component all keys share: 0 gives few repeats, 2 makes every pair one."""
    return (torch.randn(shape, dtype=torch.float64) + common).to(dtype)
