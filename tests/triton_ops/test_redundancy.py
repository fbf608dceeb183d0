"""`redundancy` against R-KV's definition with the whole cosine matrix in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.triton_ops.redundancy_cases import by_definition, keys_with, prefix
from triton_ops.redundancy import redundancy, reference


@pytest.mark.parametrize("common", [0.0, 0.6, 0.9, 2.0])
@pytest.mark.parametrize("held", [1, 2, 127, 128, 129, 300])
def test_it_is_its_definition(held, common):
    keys = keys_with(common, (2, 2, held, 8))
    valid = prefix([[held, held // 2], [1, max(1, held - 3)]], held)
    expected = by_definition(keys, valid)
    torch.testing.assert_close(redundancy(keys, valid), expected, rtol=0, atol=1e-12)
    single = redundancy(keys.float(), valid)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
def test_the_threshold(threshold):
    keys = keys_with(0.6, (1, 2, 150, 8))
    valid = prefix([[150, 140]], 150)
    torch.testing.assert_close(
        redundancy(keys, valid, threshold=threshold),
        by_definition(keys, valid, threshold),
        rtol=0,
        atol=1e-12,
    )


def test_rows_that_find_no_repeat_are_searched_to_the_end():
    # All but a few keys match at once; those few, others per head, match the oldest key only.
    keys = keys_with(2.0, (1, 2, 400, 16))
    for head, odd in ((0, [3, 77, 399]), (1, [5])):
        keys[0, head, [0, *odd]] = -2.0 + 0.1 * torch.randn(len(odd) + 1, 16, dtype=torch.float64)
    valid = torch.ones(1, 2, 400, dtype=torch.bool)
    torch.testing.assert_close(
        redundancy(keys, valid), by_definition(keys, valid), rtol=0, atol=1e-12
    )


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    kinds=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_repeated_and_zero_keys(counts, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(kinds, 4, generator=generator, dtype=torch.float64)
    distinct[0] = 0.0
    pick = torch.randint(kinds, (len(counts), 1, 40), generator=generator)
    keys, valid = distinct[pick], prefix([[count] for count in counts], 40)
    torch.testing.assert_close(
        redundancy(keys, valid), by_definition(keys, valid), rtol=0, atol=1e-12
    )


def test_the_newest_of_the_repeats_is_spared():
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[None, None]
    scores = redundancy(keys, torch.ones(1, 1, 4, dtype=torch.bool))[0, 0]
    # Rows 0 and 1 exempt column 2, row 2 exempts column 1.
    torch.testing.assert_close(scores, torch.tensor([2.0, 1.0, 0.0, 0.0]) / 4)


def test_every_row_is_scored_by_its_own_keys():
    keys = keys_with(0.6, (3, 2, 140, 8))
    valid = prefix([[140, 20], [50, 60], [1, 139]], 140)
    together = redundancy(keys, valid)
    for row in range(3):
        held = int(valid[row].sum(-1).max())
        alone = redundancy(keys[row : row + 1, :, :held], valid[row : row + 1, :, :held])
        torch.testing.assert_close(together[row : row + 1, :, :held], alone, rtol=0, atol=1e-14)
        assert (together[row, :, held:] == 0).all()


def test_filler_may_hold_nan():
    keys = keys_with(0.6, (1, 2, 30, 8))
    valid = prefix([[30, 12]], 30)
    clean = redundancy(keys, valid)
    keys[0, 1, 12:] = torch.nan
    assert torch.equal(redundancy(keys, valid), clean)


class Sizes(TorchDispatchMode):
    """Record the largest tensor that is made, and how many cosines are computed."""

    def __init__(self):
        super().__init__()
        self.largest = self.cosines = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            if func is torch.ops.aten.bmm.default and result.shape[-1] > 1:
                self.cosines += result.numel()
        return result


def test_no_buffer_grows_with_the_square_of_the_tokens():
    keys = keys_with(0.0, (1, 1, 1024, 16), torch.float32)
    with Sizes() as sizes:
        redundancy(keys, torch.ones(1, 1, 1024, dtype=torch.bool))
    assert sizes.largest == 1024 * reference.BLOCK


def test_many_heads_are_worked_off_in_groups(monkeypatch):
    keys = keys_with(0.6, (3, 3, 160, 8))
    valid = prefix([[160, 1, 30], [2, 160, 60], [159, 58, 57]], 160)
    at_once = redundancy(keys, valid)
    monkeypatch.setattr(reference, "TILE", 160 * reference.BLOCK * 2)
    with Sizes() as sizes:
        in_groups = redundancy(keys, valid)
    assert sizes.largest <= 160 * reference.BLOCK * 2
    torch.testing.assert_close(in_groups, at_once, rtol=0, atol=1e-14)


def test_a_sink_does_not_keep_every_row_searching():
    keys = keys_with(2.0, (1, 2, 1024, 16))
    valid = torch.ones(1, 2, 1024, dtype=torch.bool)
    keys[:, :, 0] = -keys[:, :, 0]  # resembles nothing
    with Sizes() as sizes:
        redundancy(keys, valid)
    assert sizes.cosines < 1.1 * 2 * 1024 * reference.BLOCK


@pytest.mark.parametrize(
    ("keys", "valid", "threshold", "words"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), 0.5, r"\[R, H, N, D\]"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4, dtype=torch.bool), 0.5, r"\[1, 2, 4\]"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3), 0.5, "bool"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool), -0.1, "threshold"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool), 1.5, "threshold"),
    ],
)
def test_faults_are_named(keys, valid, threshold, words):
    with pytest.raises(ValueError, match=words):
        redundancy(keys, valid, threshold=threshold)
