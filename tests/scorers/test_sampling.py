"""VaSE and CUR against their formulas, with the random numbers written out one by one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from hf_reasoncache.scorers import CUR, Random, VaSE
from tests.support import scorer_formulas as formulas
from tests.support.scorer_inputs import head_of, held_tokens

COUNTS, LENGTHS = [[20, 1, 33], [5, 5, 3], [12, 13, 14]], [60, 5, 14]
LAYER = 3


def hashed(state: int) -> int:
    state = ((state ^ (state >> 16)) * 0x7FEB352D) % 2**32
    state = ((state ^ (state >> 15)) * 0x846CA68B) % 2**32
    return state ^ (state >> 16)


def uniform(state: int) -> float:
    return ((hashed(state) >> 8) + 0.5) / 2**24


@pytest.mark.parametrize(("largest", "seed"), [(0, 0), (3, 0), (200, 5)])
def test_vase_is_its_formula(largest, seed):
    held = held_tokens(COUNTS, LENGTHS, layer=LAYER)
    scores = VaSE(largest=largest, sinks=2, queries=6, seed=seed).score(held)
    for row, counts in enumerate(COUNTS):
        for number, count in enumerate(counts):
            head = head_of(held, row, number)
            received = formulas.attention(head, last=6)
            width = [float(value.max() - value.min()) for value in head.values]
            width = [
                math.inf if at < 2 else each for at, each in zip(head.positions, width, strict=True)
            ]
            kept = sorted(range(count), key=lambda token: -width[token])[:largest]
            got = scores[row, number, :count].tolist()
            state = hashed(hashed(hashed(seed) ^ LAYER) ^ number)
            for token, at in enumerate(head.positions):
                if token in kept:
                    assert got[token] > 30
                    continue
                noise = -math.log(-math.log(uniform(state ^ at)))
                log = math.log(max(received[token], torch.finfo(torch.float32).tiny))
                assert got[token] == pytest.approx(log + noise, abs=1e-4)
            for wide, narrow in pairwise(token for token in kept if width[token] < math.inf):
                assert got[wide] > got[narrow] or width[wide] - width[narrow] < 1e-3


def test_vase_samples_by_attention():
    """Of two tokens with attention p and q, that with p comes first in p / (p + q) of the draws."""
    held = held_tokens([[2] * 400], [2], queries=1, size=8)
    held.keys.zero_()
    held.keys[:, :, 1, 0] = 8**0.5
    held.queries.zero_()
    held.queries[..., 0] = 1.0
    wins = [VaSE(largest=0, seed=seed).score(held)[0].argmax(-1) for seed in range(5)]
    share = torch.e / (1 + torch.e)
    assert float(torch.stack(wins).float().mean()) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("resample", [True, False])
def test_cur_is_its_formula(resample):
    held = held_tokens(COUNTS, LENGTHS, layer=LAYER)
    scores = CUR(rank=3, sinks=2, resample=resample, seed=1).score(held)
    size = held.values.shape[-1]
    for row, counts in enumerate(COUNTS):
        state = hashed(hashed(hashed(1) ^ LAYER) ^ (LENGTHS[row] if resample else 0))
        numbers = [uniform(state ^ hashed(counter)) for counter in range(2 * size * 3)]
        radius, angle = torch.tensor(numbers, dtype=torch.float64).view(2, size, 3)
        gaussian = (-2 * radius.log()).sqrt() * (2 * torch.pi * angle).cos()
        for number, count in enumerate(counts):
            head = head_of(held, row, number)
            key = (head.keys @ gaussian[: head.keys.shape[1]]).square().sum(-1)
            expected = key * (head.values @ gaussian).square().sum(-1)
            got = scores[row, number, :count].double()
            first = torch.tensor([at < 2 for at in head.positions])
            torch.testing.assert_close(got[~first], expected[~first], rtol=1e-4, atol=1e-5)
            assert (got[first] > 1e29).all()


def test_cur_draws_again_when_more_has_been_seen():
    held = held_tokens([[9, 9]], [30])
    later = held_tokens([[9, 9]], [30])
    for name in ("keys", "positions", "valid"):
        getattr(later, name).copy_(getattr(held, name))
    object.__setattr__(later, "load_values", lambda: held.values)
    object.__setattr__(later, "length", held.length + 1)
    for resample in (True, False):
        scorer = CUR(sinks=0, resample=resample)
        assert torch.equal(scorer.score(held), scorer.score(later)) is not resample


def test_the_projections_are_normal():
    held = held_tokens([[1]] * 8, [9, 10, 11, 12, 13, 14, 15, 16])
    drawn = CUR(rank=40)._gaussian(held, 64)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(1, abs=0.03)
    assert float((drawn.abs() < 1).float().mean()) == pytest.approx(0.683, abs=0.02)
    assert drawn[0].sub(drawn[1]).abs().min() > 0


def test_random_numbers_are_those_of_the_token():
    held = held_tokens(COUNTS, LENGTHS, layer=LAYER)
    scores = Random(seed=2).score(held)
    state = hashed(hashed(hashed(2) ^ LAYER) ^ 1)
    at = int(held.positions[0, 1, 0])
    assert float(scores[0, 1, 0]) == (hashed(state ^ at) >> 8) / 2**24
