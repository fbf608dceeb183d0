"""Observation windows over ragged heads, and their scores one query and one key at a time."""

import math

import torch

SCALING = 0.3


def by_hand(queries, keys, query_positions, key_positions, group, sees):
    """Loop over rows, heads and queries; exponentials of one row at a time."""
    rows, heads, group_size, window, _ = queries.shape
    scores = torch.zeros(keys.shape[:3], dtype=torch.float64)
    for row in range(rows):
        present = [a for a in range(window) if query_positions[row, a] >= 0]
        oldest = min((int(query_positions[row, a]) for a in present), default=0)
        for head in range(heads):
            for a in present:
                limits = {"past": oldest - 1, "causal": int(query_positions[row, a])}
                limit = limits.get(sees, math.inf)
                seen = [
                    n for n, p in enumerate(key_positions[row, head].tolist()) if 0 <= p <= limit
                ]
                logits = [
                    [SCALING * float(queries[row, head, g, a] @ keys[row, head, n]) for n in seen]
                    for g in range(group_size)
                ]
                if group == "max":
                    logits = [[max(column) for column in zip(*logits, strict=True)]]
                for line in logits:
                    weights = [math.exp(logit) for logit in line]
                    for n, weight in zip(seen, weights, strict=True):
                        share = weight / sum(weights) / len(logits) / len(present)
                        scores[row, head, n] += share
    return scores


def example(rows=2, heads=3, group_size=4, window=5, held=17, size=8, positions=None):
    queries = torch.randn(rows, heads, group_size, window, size, dtype=torch.float64)
    keys = torch.randn(rows, heads, held, size, dtype=torch.float64)
    span = positions or max(40, held)
    shuffled = torch.stack([torch.randperm(span)[:held] for _ in range(rows * heads)])
    key_positions = shuffled.view(rows, heads, held)
    key_positions[0, -2 if heads > 1 else 0, 11:] = -1  # a ragged head
    query_positions = torch.arange(30, 30 + window).repeat(rows, 1)
    query_positions[1, : window // 2] = -1  # a row with fewer queries
    return queries, keys, query_positions, key_positions
