"""The formula of R-KV and what it keeps, against the literal ones."""

import pytest
import torch

from tests.support.ops.rkv_cases import literally_found, tokens
from triton_ops.redundancy import GONE
from triton_ops.rkv import find_repeats, rkv_scores


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_repeats_are_found_or_sought_again(count):
    positions, state, *_ = tokens(count)
    found, literal = find_repeats(state, positions), literally_found(state, positions)
    assert torch.equal(found.where(found != GONE, literal), literal)
    assert (found == literal).float().mean() > 0.7


@pytest.mark.parametrize(("count", "kernel"), [(1, 7), (9, 1), (9, 5), (40, 7)])
def test_scores_and_state_are_the_literal_ones(count, kernel):
    positions, _, importance, repeated, repeat = tokens(count, torch.float64)
    scores, state = rkv_scores(importance, repeated, repeat, positions, lam=0.3, kernel=kernel)
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        held = positions[tuple(at)] >= 0
        redundant = repeated[tuple(at)][held].softmax(-1)
        own, half = importance[tuple(at)][held], kernel // 2
        for token in range(len(own)):
            near = own[max(0, token - half) : token + half + 1].max()
            expected = 0.3 * near - 0.7 * redundant[token]
            assert scores[tuple(at)][token] == pytest.approx(float(expected), abs=1e-6)
            place = int(repeat[tuple(at)][token])
            noted = 1 if place < 0 else int(positions[tuple(at)][place]) + 2
            assert state[tuple(at)][token] == noted
        assert not scores[tuple(at)][~held].any() and not state[tuple(at)][~held].any()
