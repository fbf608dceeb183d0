"""Observation windows over ragged heads."""

import torch

SCALING = 0.3


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
