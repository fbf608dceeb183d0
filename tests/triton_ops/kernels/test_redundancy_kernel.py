"""The kernels of redundancy against the definition with the whole cosine matrix in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.triton_ops.redundancy_cases import by_definition, keys_with, prefix
from triton_ops.redundancy import NONE, UNSEEN, redundancy


def check(keys, valid, device, threshold=0.5, tolerance=1e-5):
    expected = by_definition(keys, valid, threshold)
    poisoned = keys.masked_fill(~valid[..., None], torch.nan)
    scores, _ = redundancy(poisoned.to(device), valid.to(device), threshold=threshold)
    assert scores.dtype == torch.float32
    difference = (scores.double().cpu() - expected).norm()
    assert bool(difference <= tolerance * max(float(expected.norm()), 1e-1))


@pytest.mark.parametrize("common", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("held", [1, 15, 16, 17, 40])
def test_equals_float64(held, common, device):
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


@pytest.mark.parametrize("common", [0.0, 0.6, 0.9])
@pytest.mark.parametrize(("old", "new"), [(33, 0), (20, 13), (40, 16)])
def test_a_search_goes_on_from_an_earlier_one(common, old, new, device):
    keys = keys_with(common, (1, 2, old + new, 8), torch.float32).to(device)
    before = prefix([[old, old - 5]], old + new).to(device)
    after = prefix([[old + new, old - 5 + new]], old + new).to(device)
    known = redundancy(keys, before)[1].where(before, UNSEEN)
    lost = torch.rand(known.shape, device=device) < 0.3
    known = known.masked_fill(lost & (known != NONE), UNSEEN)
    expected, searched = redundancy(keys, after), redundancy(keys, after, known=known)
    assert torch.equal(searched[1], expected[1])
    torch.testing.assert_close(searched[0], expected[0], rtol=0, atol=1e-6)


def test_nothing_held(device):
    keys = torch.full((1, 2, 3, 8), torch.nan, device=device)
    mean, repeat = redundancy(keys, torch.zeros(1, 2, 3, dtype=torch.bool, device=device))
    assert (mean == 0).all()
    assert (repeat == NONE).all()
    assert redundancy(keys[:, :, :0], keys[:, :, :0, 0].bool())[0].shape == (1, 2, 0)
