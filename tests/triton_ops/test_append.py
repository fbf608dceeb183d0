"""append writes one token behind the last of each head and counts it."""

import pytest
import torch
from hypothesis import given, settings

from tests.support.ops.append_cases import check, requests
from triton_ops.append import append
from triton_ops.layout import RaggedLayout


@settings(max_examples=60)
@given(request=requests())
def test_a_token_lies_behind_the_last_one_and_is_counted(request):
    check(request)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 1, 1, 4), torch.float64), ((2, 1, 2, 4), torch.float32), ((1, 2, 1, 4), torch.float32)],
    ids=["another type", "two tokens", "other rows"],
)
def test_what_does_not_fit_is_refused(shape, dtype):
    layout = RaggedLayout(torch.full((2, 1), 3))
    pool = (torch.zeros(6, 4), torch.zeros(6, 4), torch.zeros(6, dtype=torch.int32))
    length, new = torch.zeros(2, 1, dtype=torch.long), torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=r"append: expected one token for each of \[2, 1\] heads"):
        append(pool, layout.start, length, (new, new), 0)
    assert not length.any()


@pytest.mark.parametrize(
    ("query", "said"), [((1, 4, 1, 3), r"a ring \[2, 4, 5, 3\] of 2 rows"), ((2, 4, 1, 2), "got")]
)
def test_a_query_that_does_not_fit_its_ring_is_refused(query, said):
    layout = RaggedLayout(torch.full((2, 1), 3))
    pool = (torch.zeros(6, 4), torch.zeros(6, 4), torch.zeros(6, dtype=torch.int32))
    length, new = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, 1, 4)
    asked = torch.zeros(2, 4, 5, 3), torch.zeros(query)
    with pytest.raises(ValueError, match=f"append: expected queries of one token for .*{said}"):
        append(pool, layout.start, length, (new, new), 0, asked)
    assert not length.any()
