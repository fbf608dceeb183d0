"""The kernels of compact, held to the properties of the reference and to its exact result."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.support.ops.compact_cases import check, requests
from triton_ops.backend import use_backend
from triton_ops.compact import compact, kernel

FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(request=requests())
def test_kept_tokens_fill_the_first_slots_and_nothing_else_changes(request, device):
    check(request, device)


@pytest.mark.parametrize("tokens", [1023, 1024, 1025, 2100])
def test_equals_the_reference_over_several_blocks(tokens, device):
    offset = torch.stack([torch.randperm(tokens) for _ in range(2)])[None].to(device)
    keep = torch.rand(1, 2, tokens).to(device) < 0.5
    slots = offset + torch.tensor([0, tokens], device=device)[:, None]
    fields = [torch.randn(2 * tokens, *size).to(device) for size in ((), (80,), (5, 7))]
    wanted = [field.clone() for field in fields]
    with use_backend("torch"):
        compact(wanted, slots, offset, keep)
    compact(fields, slots, offset, keep)
    for field, expected in zip(fields, wanted, strict=True):
        assert torch.equal(field, expected)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.bool]
)
def test_bits_are_moved_whatever_they_mean(dtype, device):
    field = torch.randint(0, 2, (6, 3)).to(device).to(dtype)
    if dtype.is_floating_point:
        field[0], field[1, 0], field[2] = torch.nan, torch.inf, -0.0
    bits = field.view(kernel.BITS[dtype.itemsize]).clone()
    order = torch.arange(6, device=device).view(1, 1, 6)
    compact([field], order, order, order % 2 == 1)
    moved = field.view(kernel.BITS[dtype.itemsize])
    assert torch.equal(moved[:3].sort(0).values, bits[1::2].sort(0).values)


def test_no_row_and_no_token(device):
    for shape in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        nothing = torch.zeros(shape, dtype=torch.long, device=device)
        field = torch.arange(4.0, device=device)
        compact([field], nothing, nothing, nothing.bool())
        assert torch.equal(field.cpu(), torch.arange(4.0))


def test_a_pool_without_slots(device):
    """All heads empty, but the request has filler."""
    filler = torch.zeros(1, 2, 3, dtype=torch.long, device=device)
    compact([torch.zeros(0, 4, device=device)], filler, filler - 1, filler.bool())
