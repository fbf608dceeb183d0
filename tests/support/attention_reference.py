"""Attention with and without some tokens, one query at a time, in double precision."""

import torch


def outputs(queries, asked, keys, values, at, keep, scaling, softcap=None, sinks=None):
    """Full and kept outputs `[G, A, D_v]` and evicted mass `[G, A]` of one row and head."""
    group, steps, _ = queries.shape
    full = torch.zeros(group, steps, values.shape[-1], dtype=torch.float64)
    kept, mass = full.clone(), torch.zeros(group, steps, dtype=torch.float64)
    for g in range(group):
        for a in range(steps):
            seen = (at >= 0) & (at <= asked[a])
            logits = keys.double() @ queries[g, a].double() * scaling
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
            for out, visible in ((full, seen), (kept, seen & keep)):
                weight = logits[visible].exp()
                total = weight.sum() + (0 if sinks is None else sinks[g].double().exp())
                out[g, a] = (weight / total) @ values[visible].double()
                if out is full:
                    mass[g, a] = (logits[seen & ~keep].exp() / total).sum()
    return full, kept, mass
