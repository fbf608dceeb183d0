"""What each policy is known for, on inputs made to show it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV, TOVA, KeyDiff, LagKV, Random, SnapKV, StreamingLLM
from hf_reasoncache.scorers.pooling import pool
from tests.support import scorer_formulas as formulas
from tests.support.caches import make_cache
from tests.support.models import build, prompt
from tests.support.scorer_inputs import head_of, held_tokens
from triton_ops.rkv import find_repeats, reference


def kept(scores: torch.Tensor, count: int) -> list[int]:
    """Places of the `count` best tokens of row 0, head 0."""
    return sorted(scores[0, 0].topk(count).indices.tolist())


def test_streaming_llm_keeps_sinks_and_the_newest():
    held = held_tokens([[30]], [30])
    assert kept(StreamingLLM(sinks=4).score(held), 10) == [0, 1, 2, 3, *range(24, 30)]
    assert kept(StreamingLLM(sinks=4).score(held), 3) == [0, 1, 2]
    assert kept(StreamingLLM(sinks=0).score(held), 10) == list(range(20, 30))


def test_h2o_gives_its_share_to_the_newest_and_the_rest_to_heavy_hitters():
    held = held_tokens([[10]], [10])
    cumulative_attention = torch.tensor([5.0, 1, 9, 2, 3, 4, 8, 0, 0, 0]).expand(1, 1, 10)
    held = dataclasses.replace(held, cumulative_attention=cumulative_attention)
    assert kept(H2O(recent_ratio=0.3).score(held), 6) == [0, 2, 6, 7, 8, 9]
    assert kept(H2O(recent_ratio=0.0).score(held), 3) == [0, 2, 6]
    assert kept(H2O(recent_ratio=1.0).score(held), 4) == [6, 7, 8, 9]


def test_h2o_recency_outranks_the_attention_of_other_heads():
    held = held_tokens([[10, 10]], [10])
    cumulative_attention = torch.stack([torch.full((10,), 0.1), torch.full((10,), 50.0)]).unsqueeze(
        0
    )
    scores = H2O(recent_ratio=0.5).score(
        dataclasses.replace(held, cumulative_attention=cumulative_attention)
    )
    assert scores[0, 0, 5:].min() > scores[0, 1, :5].max()


def test_the_average_of_h2o_forgives_late_arrival():
    held = held_tokens([[10]], [10])
    # Every query pays each token it sees the same: the sum ranks by age, the average does not.
    cumulative_attention = torch.arange(10.0, 0.0, -1.0).expand(1, 1, 10)
    held = dataclasses.replace(held, cumulative_attention=cumulative_attention)
    assert kept(H2O(recent_ratio=0.0).score(held), 4) == [0, 1, 2, 3]
    even = H2O(recent_ratio=0.0, average=True).score(held)
    torch.testing.assert_close(even, torch.ones_like(even))


@pytest.mark.parametrize("entries", [1, 4])
@pytest.mark.parametrize("common", [0.0, 0.6, 1.5])
def test_rkv_scores_the_same_with_notes_of_earlier_evictions(common, entries, monkeypatch):
    # With one entry per token, tokens share entries of the table that finds them again.
    monkeypatch.setattr(reference, "_ENTRIES", entries)
    heads, size, budget, new = 3, 16, 40, 20
    keys = torch.randn(1, heads, 0, size)
    positions = torch.zeros(1, heads, 0, dtype=torch.long)
    scorer_state = torch.zeros(1, heads, 0, dtype=torch.int32)
    for event in range(6):
        seen = budget + (event + 1) * new
        fresh = torch.arange(0 if event == 0 else seen - new, seen).expand(1, heads, -1)
        keys = torch.cat([keys, torch.randn(*fresh.shape, size) + common], dim=2)
        positions = torch.cat([positions, fresh], dim=2)
        scorer_state = torch.cat([scorer_state, torch.zeros_like(fresh, dtype=torch.int32)], dim=2)
        held = dataclasses.replace(
            held_tokens([[keys.shape[2]] * heads], [seen]),
            keys=keys,
            positions=positions,
            valid=torch.ones_like(positions, dtype=torch.bool),
            scorer_state=scorer_state,
        )
        scores = RKV().score(held)
        torch.testing.assert_close(
            scores, RKV().score(dataclasses.replace(held, scorer_state=None))
        )
        assert (scorer_state > 0).all()
        # Evict at random, so that repeats are lost too.
        stay = torch.rand(positions.shape).topk(budget, dim=-1).indices.sort(-1).values
        keys = keys.gather(2, stay[..., None].expand(-1, -1, -1, size))
        positions, scorer_state = positions.gather(2, stay), scorer_state.gather(2, stay)


def test_rkv_finds_the_repeat_in_any_position_beside_filler():
    # Positions are looked up modulo a power of two, and filler has position -1.
    seen, counts = 1 << 14, [600, 640]
    held = held_tokens([counts], [seen])
    scorer_state = held.valid.int()
    for head, count in enumerate(counts):
        held.positions[0, head, :count] = torch.arange(seen - count, seen)
    scorer_state[..., 0] = seen - 1 + 2
    known = find_repeats(scorer_state, held.positions)
    assert known[0, :, 0].tolist() == [599, 639]


def test_tova_listens_to_the_last_query_alone():
    held = held_tokens([[12, 9]], [12])
    louder = held.queries.clone()
    louder[..., :-1, :] *= 100
    assert torch.equal(TOVA().score(held), TOVA().score(dataclasses.replace(held, queries=louder)))


def test_rkv_drops_the_oldest_of_three_repeats_first():
    held = held_tokens([[20]], [40])
    keys = torch.nn.functional.normalize(torch.randn(1, 1, 20, 64), dim=-1)
    keys[0, 0, [5, 8]] = keys[0, 0, 11].clone()
    held = dataclasses.replace(held, keys=keys, queries=torch.randn(1, 1, 2, 8, 64))
    oldest, middle, newest = RKV(lam=0.0).score(held)[0, 0, [5, 8, 11]]
    assert oldest < middle < newest


def test_snapkv_lifts_the_neighbours_of_an_attended_token():
    held = held_tokens([[30]], [38])
    positions = torch.arange(30).expand(1, 1, 30)
    keys = torch.zeros(1, 1, 30, 16)
    keys[0, 0, 12, 0] = 10.0
    queries = torch.zeros(1, 1, 2, 8, 16)
    queries[..., 0] = 10.0
    held = dataclasses.replace(held, positions=positions, keys=keys, queries=queries)
    assert kept(SnapKV(kernel=5).score(held), 5) == [10, 11, 12, 13, 14]
    assert kept(SnapKV(kernel=1).score(held), 1) == [12]


def test_key_diff_keeps_the_odd_one():
    held = held_tokens([[15]], [15])
    keys = torch.ones(1, 1, 15, 16) + 0.1 * torch.randn(1, 1, 15, 16)
    keys[0, 0, 6] *= -1
    assert kept(KeyDiff().score(dataclasses.replace(held, keys=keys)), 1) == [6]


def test_lag_kv_is_a_window_until_two_chunks_are_full():
    held = held_tokens([[11]], [40])
    assert kept(LagKV(sinks=2, lag=5).score(held), 6) == [0, 1, 7, 8, 9, 10]


def test_lag_kv_leaves_a_constant_channel_out():
    held = held_tokens([[20]], [20])
    held.keys[..., :10, 3] = 1.0
    expected = torch.tensor(formulas.lag_kv(head_of(held, 0, 0), sinks=0, lag=5))
    torch.testing.assert_close(LagKV(sinks=0, lag=5).score(held)[0, 0], expected)


def test_random_is_a_property_of_the_token():
    held = held_tokens([[40, 40]], [1000])
    scores = Random().score(held)
    fewer = dataclasses.replace(
        held,
        positions=held.positions[..., 10:],
        valid=held.valid[..., 10:],
        length=held.length + 5,
    )
    assert torch.equal(Random().score(fewer), scores[..., 10:])


def test_random_depends_on_seed_layer_head_and_position():
    positions = torch.arange(5000).expand(1, 2, 5000)
    held = dataclasses.replace(
        held_tokens([[1, 1]], [5000], layer=0), positions=positions, valid=positions >= 0
    )
    first = Random(seed=0).score(held)
    for other in (
        Random(seed=1).score(held)[0, 0],
        Random(seed=0).score(dataclasses.replace(held, layer=1))[0, 0],
        first[0, 1],
        first[0, 0].roll(1),
    ):
        correlation = torch.corrcoef(torch.stack([first[0, 0], other]))[0, 1]
        assert correlation.abs() < 0.06  # four standard errors


def test_random_protects_the_first_tokens_of_an_answer():
    held = dataclasses.replace(held_tokens([[40, 30]], [50]), prompt=torch.tensor([20]))
    scores = Random(protect_first=9).score(held)
    for head, count in enumerate((40, 30)):
        place = [at - 20 for at in held.positions[0, head, :count].tolist()]
        first = [token for token, at in enumerate(place) if 0 <= at < 9]
        assert kept(scores[:, head : head + 1], len(first)) == first
        others = [token for token in range(count) if token not in first]
        plain = Random().score(held)[0, head, others]
        assert torch.equal(scores[0, head, others], plain)
    assert repr(Random(seed=3)) == "Random(seed=3)"
    assert repr(Random(protect_first=9)) == "Random(seed=0, protect_first=9)"
    with pytest.raises(ValueError, match="expected the length of the prompt, to protect 9 tokens"):
        Random(protect_first=9).score(held_tokens([[4]], [5]))


@pytest.mark.parametrize("kind", ["reason_alloc", "sliding_window"])
def test_the_first_tokens_of_every_row_stay(kind):
    """Rows of a padded batch have prompts of their own lengths."""
    threshold = kind == "reason_alloc"
    settings = {"budget": 24, "head_budgets": False} if threshold else {"chunk_share": 0.0}
    model, inputs = build("llama"), prompt(batch=2, padding=(0, 7))
    cache = make_cache(kind, model, protect=False, scorer=Random(protect_first=3), **settings)
    model.generate(**inputs, **cache_kwarg(cache), max_new_tokens=60)
    end = inputs["input_ids"].shape[1]
    # A window that is cut short may keep one token only: the earliest.
    stay = set(range(end, end + 3)) if threshold else {end}
    for layer in range(3):
        for row in cache.held_positions(layer):
            assert all(stay <= set(head) for head in row)
            assert all(len(head) < end + 59 - 7 for head in row)


def test_random_is_uniform():
    positions = torch.arange(20000).expand(1, 2, 20000)
    held = dataclasses.replace(
        held_tokens([[1, 1]], [20000]), positions=positions, valid=positions >= 0
    )
    scores = Random(seed=7).score(held)
    assert scores.min() >= 0.0
    assert scores.max() < 1.0
    filled = torch.histc(scores, bins=20, min=0, max=1)
    assert (filled - 2000).abs().max() < 4 * 2000**0.5


@pytest.mark.parametrize("kind", ["max", "mean"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_pooling_looks_at_held_neighbours_only(kind, kernel):
    scores = torch.randn(2, 3, 12)
    valid = torch.arange(12) < torch.tensor([[12, 5, 1], [0, 7, 12]]).unsqueeze(-1)
    scores[~valid] = torch.nan
    pooled = pool(scores, valid, kernel, kind)
    reduce = max if kind == "max" else lambda near: sum(near) / len(near)
    for row, head, n in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
        near = scores[row, head, max(0, n - kernel // 2) : n + kernel // 2 + 1]
        near = near[~near.isnan()].tolist()
        expected = reduce(near) if valid[row, head, n] else 0.0
        assert pooled[row, head, n].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("kernel", "kind", "words"), [(2, "max", "odd"), (3, "median", "median")])
def test_pooling_faults(kernel, kind, words):
    with pytest.raises(ValueError, match=words):
        pool(torch.ones(1, 1, 4), torch.ones(1, 1, 4, dtype=torch.bool), kernel, kind)
