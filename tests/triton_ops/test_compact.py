"""compact keeps exactly what it is told to, moves no more than it must and touches nobody else."""

import pytest
import torch
from hypothesis import given, settings

from tests.support.ops.compact_cases import check, requests
from triton_ops.compact import compact


@settings(max_examples=100)
@given(request=requests())
def test_kept_tokens_fill_the_first_slots_and_nothing_else_changes(request):
    check(request)


@pytest.mark.parametrize("kept", [0, 6])
def test_keeping_nothing_or_everything_moves_nothing(kept):
    offset = torch.arange(6).flip(0).expand(1, 1, 6)
    field = torch.arange(6.0)
    compact([field], offset, offset, offset < kept)
    assert torch.equal(field, torch.arange(6.0))


def test_any_iterable_of_fields_will_do():
    offset = torch.arange(4).expand(1, 1, 4)
    fields = {"a": torch.arange(4), "b": torch.arange(4).bfloat16()}
    compact(fields.values(), offset, offset, offset >= 2)
    assert sorted(fields["a"][:2].tolist()) == sorted(fields["b"][:2].tolist()) == [2, 3]


def test_a_view_of_the_storage_is_refused():
    offset = torch.arange(4).expand(1, 1, 4)
    with pytest.raises(ValueError, match=r"expected contiguous fields .*got \[4, 2\].*\(1, 4\)"):
        compact([torch.zeros(2, 4).mT], offset, offset, offset >= 2)
