"""Token2Chunk against its definition, executed gap by gap."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_reasoncache.policies.token2chunk import token2chunk

# Few different values, so that ties are common; binary fractions, so that means are exact.
SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=14)
SHARES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def greedy(scores, budget, share):
    """Places kept of one head."""
    best = budget - int(budget * share)
    best = max(best, min(budget, 1))
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)
    kept = set(ranked[:best])
    while kept and share > 0 and len(kept) < min(budget, len(scores)):
        inside = sorted(kept)
        gaps = [
            (b - a - 1, -sum(scores[a + 1 : b]) / (b - a - 1), a, b)
            for a, b in pairwise(inside)
            if b - a > 1
        ]
        if gaps:
            _, _, a, b = min(gaps)
            kept |= set(range(a + 1, b)[: budget - len(kept)])
        elif inside[-1] + 1 < len(scores):
            kept.add(inside[-1] + 1)
        else:
            kept.add(inside[0] - 1)
    return kept


@given(st.lists(SCORES, min_size=1, max_size=3), st.integers(0, 16), SHARES)
def test_every_head_is_filled_gap_by_gap(heads, budget, share):
    width = max(map(len, heads)) + 1
    scores, valid = torch.full((1, len(heads), width), 9.0), torch.zeros(1, len(heads), width)
    for index, head in enumerate(heads):
        scores[0, index, : len(head)] = torch.tensor(head)
        valid[0, index, : len(head)] = 1
    budgets = torch.full((1, len(heads)), budget)
    keep = token2chunk(scores, valid.bool(), budgets, share)
    for index, head in enumerate(heads):
        assert set(keep[0, index].nonzero()[:, 0].tolist()) == greedy(head, budget, share)
        assert int(keep[0, index].sum()) == min(budget, len(head))


@given(SCORES, st.integers(1, 14))
def test_more_share_gives_no_more_pieces(head, budget):
    scores, valid = torch.tensor([[head]]), torch.ones(1, 1, len(head), dtype=torch.bool)

    def pieces(share):
        keep = token2chunk(scores, valid, torch.tensor([[budget]]), share)[0, 0].int()
        return int((keep.diff(prepend=torch.zeros(1, dtype=torch.int)) == 1).sum())

    assert pieces(1.0) == 1
    assert pieces(0.0) >= 1
