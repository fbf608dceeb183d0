"""The kernels of redundancy against their definition in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.ops.redundancy_cases import keys_with, prefix
from triton_ops.backend import use_backend
from triton_ops.redundancy import GONE, NONE, UNSEEN, redundancy
from triton_ops.redundancy.reference import redundancy_reference


def check(keys, valid, device, threshold=0.5, tolerance=1e-5):
    expected, _ = redundancy_reference(keys.double(), valid, threshold=threshold)
    poisoned = keys.masked_fill(~valid[..., None], torch.nan)
    scores, _ = redundancy(poisoned.to(device), valid.to(device), threshold=threshold)
    assert scores.dtype == torch.float32
    difference = (scores.double().cpu() - expected).norm()
    assert bool(difference <= tolerance * max(float(expected.norm()), 1e-1))


@pytest.mark.parametrize("common", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("held", [1, 15, 16, 17, 40])
def test_equals_the_definition(held, common, device):
    keys = keys_with(common, (2, 2, held, 8), torch.float32)
    check(keys, prefix([[held, held // 2], [1, max(1, held - 3)]], held), device)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
def test_the_threshold(threshold, device):
    keys = keys_with(0.6, (1, 2, 30, 8), torch.float32)
    check(keys, prefix([[30, 26]], 30), device, threshold)


@pytest.mark.parametrize("size", [32, 80, 128, 256])
def test_head_sizes(size, device):
    keys = keys_with(0.8, (1, 1, 20, size), torch.float32)
    check(keys, prefix([[18]], 20), device)


@pytest.mark.parametrize("held", [63, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_have_exact_products(dtype, held, device):
    check(keys_with(0.7, (1, 2, held, 16), dtype), prefix([[held, 9]], held), device)


def test_rows_that_find_no_repeat_are_searched_to_the_end(device):
    keys = keys_with(2.0, (1, 1, 50, 16), torch.float32)
    keys[0, 0, [0, 3, 37, 49]] = -2.0 + 0.1 * torch.randn(4, 16)
    check(keys, prefix([[50]], 50), device)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mask=st.lists(st.booleans(), min_size=40, max_size=40),
    kinds=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_repeated_and_zero_keys_and_filler_anywhere(mask, kinds, seed, device):
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(kinds, 4, generator=generator)
    distinct[0] = 0.0
    keys = distinct[torch.randint(kinds, (1, 1, 40), generator=generator)]
    check(keys, torch.tensor(mask).view(1, 1, 40), device)


def test_nothing_held(device):
    keys = torch.full((1, 2, 3, 8), torch.nan, device=device)
    mean, repeat = redundancy(keys, torch.zeros(1, 2, 3, dtype=torch.bool, device=device))
    assert (mean == 0).all() and (repeat == NONE).all()
    assert redundancy(keys[:, :, :0], keys[:, :, :0, 0].bool())[1].shape == (1, 2, 0)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("new", [0, 1, 16, 21])
def test_a_search_goes_on_from_an_earlier_one(common, new, device):
    counts = torch.tensor([33, 9])
    width = 33 + new
    keys = keys_with(common, (1, 2, width, 8), torch.float32).to(device)
    before, after = (prefix([held.tolist()], width).to(device) for held in (counts, counts + new))
    with use_backend("torch"):
        known = redundancy(keys, before)[1].where(before, UNSEEN)
        expected, wanted = redundancy(keys, after)
    # Some keys lose what they knew: their repeat was evicted.
    known = known.masked_fill((torch.rand(known.shape) < 0.3).to(device) & (known >= 0), GONE)
    for start in (None, known):
        mean, repeat = redundancy(keys, after, known=start)
        assert torch.equal(repeat, wanted)
        torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-5)


def test_what_is_known_is_believed_and_not_searched_again(device):
    """A wrong answer among the old columns stays: nobody looks there."""
    keys = torch.ones(1, 1, 40, 8, device=device)
    keys[..., 36:, :] = torch.eye(4, 8, device=device) - 0.1
    valid = torch.ones(1, 1, 40, dtype=torch.bool, device=device)
    known = torch.full((1, 1, 40), UNSEEN, device=device)
    known[..., :36] = 7
    assert redundancy(keys, valid)[1][0, 0, 3] == 35
    assert redundancy(keys, valid, known=known)[1][0, 0, 3] == 7
