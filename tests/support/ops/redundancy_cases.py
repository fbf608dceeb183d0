"""Keys that repeat each other, and R-KV's definition with the whole cosine matrix in float64."""

import torch


def by_definition(keys, valid, threshold=0.5):
    """One head at a time: the cosine matrix, its diagonal, one exemption per row, column means."""
    scores = torch.zeros(valid.shape, dtype=torch.float64)
    for row, head in torch.cartesian_prod(*map(torch.arange, valid.shape[:2])).tolist():
        held = keys[row, head][valid[row, head]].double()
        norm = held.norm(dim=-1, keepdim=True)
        unit = torch.where(norm > 0, held / norm, 0.0)
        cosine = unit @ unit.T
        cosine.fill_diagonal_(0.0)
        repeats = (cosine > threshold).fill_diagonal_(False)
        place = torch.arange(len(held))
        newest = torch.where(repeats, place, -1).amax(-1, keepdim=True) if len(held) else place
        scores[row, head, valid[row, head]] = cosine.where(place != newest, 0.0).mean(0)
    return scores


def prefix(counts, held):
    return torch.arange(held) < torch.tensor(counts).unsqueeze(-1)


def keys_with(common, shape, dtype=torch.float64):
    """Noise plus a component all keys share: 0 gives few repeats, 2 makes every pair one."""
    return (torch.randn(shape, dtype=torch.float64) + common).to(dtype)
