"""Order statistics against sorting everything."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_reasoncache.budgets.ranking import kth_largest


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kth_largest_is_what_sorting_finds(dtype, ranks, shared, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few different numbers, so that some are equal, and the ends of the range.
    scores = torch.randint(-3, 4, (len(ranks), 9), generator=generator).to(dtype)
    scores[scores == 3] = torch.inf
    scores[scores == -3] = -torch.inf
    wanted = torch.tensor([ranks[0]] * len(ranks) if shared else ranks)
    expected = scores.sort(-1, descending=True).values.gather(1, wanted[:, None] - 1)[:, 0]
    found = kth_largest(scores.requires_grad_(), wanted)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
