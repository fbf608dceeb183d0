"""TriAttention against its formula written out, and in a cache against the oracle."""

from __future__ import annotations

import cmath
import math
import statistics

import pytest
import torch

from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import QueryStatistics, TriAttention
from tests.support.models import HEAD_SIZE, HEADS, LAYERS, build, prompt
from tests.support.oracle import Recorder
from tests.support.scorer_inputs import held_tokens

COUNTS, LENGTHS = [[20, 1, 33], [5, 5, 3], [12, 13, 14]], [60, 5, 14]
LAYER, SIZE, GROUP = 3, 16, 2


def make_statistics(
    layers: tuple[int, ...], heads: int, group: int = GROUP, size: int = SIZE
) -> QueryStatistics:
    """Random ones; a mean is never larger than the mean absolute value."""
    draw = torch.Generator().manual_seed(1)
    mean = torch.randn(len(layers), heads, group, size, generator=draw)
    more = torch.rand(len(layers), heads, group, size // 2, generator=draw)
    norm = torch.hypot(*mean.chunk(2, -1)) + more
    frequencies = 100.0 ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))
    return QueryStatistics(layers, mean, norm, frequencies)


@pytest.mark.parametrize("longest", [1, 100, 65536])
def test_it_is_its_formula(longest: int) -> None:
    """Keys are turned back, then every distance and pair is one term of the sum."""
    known = make_statistics((1, LAYER), heads=3)
    held = held_tokens(COUNTS, LENGTHS, layer=LAYER, group=GROUP)
    scores = TriAttention(known, longest).score(held)
    angles = known.frequencies.tolist()
    ahead = [2**power for power in range(32) if 2**power <= longest]
    for row, counts in enumerate(COUNTS):
        newest = LENGTHS[row] - 1
        for head, count in enumerate(counts):
            by_query_head = []
            for query_head in range(GROUP):
                mean = known.mean[1, head, query_head].double().tolist()
                norm = known.norm[1, head, query_head].double().tolist()
                found = []
                for token in range(count):
                    at = int(held.positions[row, head, token])
                    key = held.keys[row, head, token].double().tolist()
                    total = 0.0
                    for pair, angle in enumerate(angles):
                        query = complex(mean[pair], mean[pair + SIZE // 2])
                        turned = complex(key[pair], key[pair + SIZE // 2])
                        plain = turned * cmath.exp(-1j * angle * at)
                        phase = cmath.phase(query * plain.conjugate())
                        total += (norm[pair] - abs(query)) * abs(plain)
                        total += statistics.mean(
                            abs(query) * abs(plain) * math.cos(angle * (newest - at + far) + phase)
                            for far in ahead
                        )
                    found.append(total)
                middle, spread = statistics.mean(found), statistics.pstdev(found)
                by_query_head.append([(each - middle) / max(spread, 1e-6) for each in found])
            expected = [max(each) for each in zip(*by_query_head, strict=True)]
            got = scores[row, head, :count].tolist()
            if count > 1:
                assert got == pytest.approx(expected, abs=2e-4)
    assert torch.isfinite(scores).all()


def test_a_key_in_the_direction_of_the_next_query_wins() -> None:
    known = make_statistics((LAYER,), heads=1)
    mean = known.mean.clone()
    still = QueryStatistics((LAYER,), mean, torch.hypot(*mean.chunk(2, -1)), known.frequencies * 0)
    held = held_tokens([[9]], [9], layer=LAYER)
    held.keys[0, 0, 4] = 20 * mean[0, 0, 1]
    assert int(TriAttention(still).score(held).argmax()) == 4


def test_logits_equal_oracle_and_rows_are_alone() -> None:
    model, inputs = build("llama"), prompt(batch=2, padding=(0, 7))
    scorer = TriAttention(make_statistics((0, 1, 2), HEADS, 3, HEAD_SIZE))

    def new() -> ReasonAllocCache:
        return ReasonAllocCache(
            model.config, budget=24, buffer=8, window=4, protect=False, scorer=scorer
        )

    recorder = Recorder(model, new(), inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    for _ in range(50):
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    assert recorder.cache.report().evictions >= 10
    recorder.check(1e-4)
    both, alone = new(), new()
    model.generate(**inputs, **cache_kwarg(both), max_new_tokens=50)
    single = {name: each[1:, 7:] for name, each in inputs.items()}
    model.generate(**single, **cache_kwarg(alone), max_new_tokens=50)
    for layer in range(LAYERS):
        shifted = [[at + 7 for at in head] for head in alone.held_positions(layer)[0]]
        assert shifted == both.held_positions(layer)[1]


def test_what_is_refused_by_name() -> None:
    known = make_statistics((0, 1), heads=3)
    with pytest.raises(ValueError, match=r"statistics of layer 3 .* got those of layers \[0, 1\]"):
        TriAttention(known).score(held_tokens(COUNTS, LENGTHS, layer=LAYER))
    with pytest.raises(ValueError, match="longest >= 1, got 0"):
        TriAttention(known, 0)
    with pytest.raises(ValueError, match=r"expected mean \[L, H_kv, G, D\]"):
        QueryStatistics((0,), known.mean, known.norm, known.frequencies)
    with pytest.raises(ValueError, match="expected 8 frequencies"):
        QueryStatistics((0, 1), known.mean, known.norm, known.frequencies[:3])
    assert (
        repr(known)
        == repr(make_statistics((0, 1), heads=3))
        != repr(make_statistics((0, 2), heads=3))
    )
