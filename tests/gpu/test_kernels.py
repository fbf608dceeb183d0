"""bfloat16 on the GPU against float64, at lengths of real use.

`tests/triton_ops/kernels` runs on a GPU as well, and covers shapes and options at small sizes.
"""

import pytest
import torch

from tests.support.ops.attention_cases import expected, make_case
from tests.support.ops.redundancy_cases import keys_with
from triton_ops.backend import use_backend
from triton_ops.redundancy import redundancy
from triton_ops.redundancy.reference import redundancy_reference
from triton_ops.window_scores import window_scores
from triton_ops.window_scores.reference import window_scores_reference

TOLERANCE = 1e-2


@pytest.fixture(autouse=True)
def kernels_only():
    with use_backend("triton"):
        yield


def close(found, wanted):
    found, wanted = found.double().cpu(), wanted.nan_to_num(0.0)
    return bool((found - wanted).norm() <= TOLERANCE * wanted.norm())


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("steps", [1, 8])
def test_decode_attention(size, steps, device):
    lengths = [[1, 1151, 640, 1152], [7, 64, 129, 3000]]
    capacity = [[64, 1152, 1152, 1152], [64, 64, 1152, 3072]]
    case = make_case(
        capacity, lengths, 4, steps, sizes=(size, size), dtype=torch.bfloat16, poison=torch.nan
    )
    out, cumulative_attention, _ = expected(case)
    found = torch.zeros(case.layout.slots, device=device)
    assert close(case.to(device).run(cumulative_attention=found), out)
    assert close(found, cumulative_attention)


def test_whichever_program_joins_the_bits_are_the_same(device):
    """As many programs as a GPU runs at once arrive in another order at every launch."""
    capacity = torch.full((4, 8), 8 * 1152)
    held = [[1 + 1151 * (row + head) for head in range(8)] for row in range(4)]
    case = make_case(
        capacity.tolist(), held, 4, 1, sizes=(128, 128), dtype=torch.bfloat16, poison=torch.nan
    ).to(device)
    first = case.run()
    for _ in range(500):
        assert torch.equal(case.run(), first)


@pytest.mark.parametrize("group", ["max", "mean"])
def test_window_scores(group, device):
    queries = torch.randn(2, 2, 4, 8, 128).bfloat16()
    keys = torch.randn(2, 2, 300, 128).bfloat16()
    at = torch.arange(300).expand(2, 2, 300)
    asked = torch.arange(292, 300).expand(2, 8)
    exact = (queries.double(), keys.double(), asked, at)
    wanted = window_scores_reference(*exact, 0.3, group=group, sees="past")
    inputs = [x.to(device) for x in (queries, keys, asked, at)]
    assert close(window_scores(*inputs, 0.3, group=group, sees="past"), wanted)


@pytest.mark.parametrize("common", [0.0, 0.6, 2.0])
def test_redundancy(common, device):
    keys = keys_with(common, (1, 2, 1152, 128), torch.bfloat16)
    valid = torch.ones(1, 2, 1152, dtype=torch.bool)
    mean, _ = redundancy(keys.to(device), valid.to(device))
    assert close(mean, redundancy_reference(keys.double(), valid)[0])
