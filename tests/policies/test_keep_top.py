"""The highest scores of every head, by selection on a CPU and by sorting elsewhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_reasoncache.policies.keep_top import _sorted_top, keep_top


def literally(scores, budgets):
    """Of equal scores the later one wins, one head after the other."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            ranked = [(float(score), place) for place, score in enumerate(scores[row, head])]
            for _, place in sorted(ranked, reverse=True)[: int(budgets[row, head])]:
                keep[row, head, place] = True
    return keep


@pytest.mark.parametrize("choose", [keep_top, _sorted_top])
@given(seed=st.integers(0, 999), tokens=st.integers(1, 9), different=st.integers(1, 5))
def test_the_highest_stay_and_of_equals_the_later(choose, seed, tokens, different):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, different, (2, 3, tokens), generator=generator).float()
    scores[scores == 0], scores[scores == 4] = -torch.inf, torch.inf
    budgets = torch.randint(0, tokens + 2, (2, 3), generator=generator)
    assert torch.equal(choose(scores, budgets), literally(scores, budgets))


def test_without_tokens_nothing_stays():
    assert keep_top(torch.zeros(1, 2, 0), torch.ones(1, 2)).shape == (1, 2, 0)
