"""The kernels of R-KV's formula, against the definition in float64."""

import pytest
import torch

from tests.support.ops.rkv_cases import literally_found, tokens
from triton_ops.rkv import find_repeats, rkv_scores
from triton_ops.rkv.reference import rkv_scores_reference


@pytest.mark.parametrize("count", [1, 2, 40, 255, 256, 300])
def test_every_repeat_is_found(count, device):
    positions, state, *_ = tokens(count)
    found = find_repeats(state.to(device), positions.to(device))
    assert torch.equal(found.cpu(), literally_found(state, positions))


@pytest.mark.parametrize(("count", "kernel"), [(1, 7), (40, 1), (511, 5), (513, 7)])
def test_scores_and_state_are_those_of_the_definition(count, kernel, device):
    positions, _, importance, repeated, repeat = tokens(count)
    given = (importance, repeated, repeat, positions)
    scores, state = rkv_scores(*(each.to(device) for each in given), lam=0.1, kernel=kernel)
    wide = (importance.double(), repeated.double(), repeat, positions)
    expected, noted = rkv_scores_reference(*wide, lam=0.1, kernel=kernel)
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(state.cpu(), noted)
