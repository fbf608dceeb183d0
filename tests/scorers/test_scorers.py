"""Every scorer through the same tests: its formula, row independence, ragged heads, faults."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from hf_reasoncache.scorers import (
    H2O,
    RKV,
    SCORERS,
    Bidirectional,
    ExpectedAttention,
    LagKV,
    Random,
    Scorer,
    SnapKV,
    StreamingLLM,
)
from tests.support import scorer_formulas as formulas
from tests.support.scorer_inputs import head_of, heads_alone, held_tokens, row_alone

ANGLES = tuple(100.0 ** (-pair / 8) for pair in range(8))
# Every listed scorer with its defaults, and some with other settings.
MATRIX = {name: scorer() for name, scorer in SCORERS.items()} | {
    "rkv-other": RKV(lam=0.7, queries=3, kernel=1, threshold=0.2),
    "snapkv-other": SnapKV(queries=3, kernel=3),
    "bidirectional-some": Bidirectional(queries=3),
    "h2o-average": H2O(recent_ratio=0.25, average=True),
    "h2o-decayed-average": H2O(recent_ratio=0.0, attention_decay=0.9, average=True),
    "lag-kv-short": LagKV(sinks=2, lag=4),
    "random-other": Random(seed=5),
    "expected-attention": ExpectedAttention(ANGLES),
    "expected-attention-other": ExpectedAttention(ANGLES, queries=3, ahead=7, sinks=2),
}
# Of one head. Random numbers have no formula; they are tested in test_behaviour.py.
FORMULAS = {
    "rkv": formulas.rkv,
    "rkv-other": partial(formulas.rkv, lam=0.7, last=3, kernel=1, threshold=0.2),
    "snapkv": formulas.snapkv,
    "snapkv-other": partial(formulas.snapkv, last=3, kernel=3),
    "tova": partial(formulas.attention, last=1),
    "bidirectional": partial(formulas.attention, last=128, causal=False),
    "bidirectional-some": partial(formulas.attention, last=3, causal=False),
    "h2o": formulas.h2o,
    "h2o-average": partial(formulas.h2o, recent_ratio=0.25, average=True),
    "h2o-decayed-average": partial(formulas.h2o, recent_ratio=0.0, decay=0.9, average=True),
    "streaming-llm": formulas.streaming_llm,
    "key-norm": formulas.key_norm,
    "key-diff": formulas.key_diff,
    "lag-kv-short": partial(formulas.lag_kv, sinks=2, lag=4),
    "value-norm": formulas.value_norm,
    "expected-attention": partial(formulas.expected_attention, frequencies=ANGLES),
    "expected-attention-other": partial(
        formulas.expected_attention, frequencies=ANGLES, last=3, ahead=7, sinks=2
    ),
}
ALL = pytest.mark.parametrize("scorer", [pytest.param(s, id=n) for n, s in MATRIX.items()])

# Heads of one token and of many, a row shorter than the observation window, and a long one.
COUNTS = [[20, 1, 33], [5, 5, 3], [12, 13, 14]]
LENGTHS = [60, 5, 14]


@pytest.mark.parametrize(
    ("scorer", "formula"), [pytest.param(MATRIX[n], f, id=n) for n, f in FORMULAS.items()]
)
def test_the_score_is_its_formula(scorer, formula):
    held = held_tokens(COUNTS, LENGTHS)
    scores = scorer.score(held)
    for row, counts in enumerate(COUNTS):
        for head, count in enumerate(counts):
            got = scores[row, head, :count]
            expected = torch.tensor(formula(head_of(held, row, head)), dtype=torch.float32)
            # Infinity in a formula: above all others of the row, and the newest highest.
            top = expected.isinf()
            torch.testing.assert_close(got[~top], expected[~top], rtol=1e-5, atol=1e-6)
            if top.any():
                assert got[top].min() > held.cumulative_attention[row].max()
                assert (got[top].diff() > 0).all()


@ALL
def test_scores_are_finite_float32(scorer):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        held = held_tokens(COUNTS, LENGTHS, dtype=dtype)
        scores = scorer.score(held)
        assert scores.dtype == torch.float32
        assert scores.shape == held.valid.shape
        assert scores.isfinite().all()


@ALL
def test_a_row_in_a_batch_scores_as_alone(scorer):
    held = held_tokens(COUNTS, LENGTHS)
    together = scorer.score(held)
    for row in range(len(COUNTS)):
        single = row_alone(held, row)
        alone = scorer.score(single)[single.valid]
        # Sums over a wider row may round otherwise in the last bit, hence not torch.equal.
        torch.testing.assert_close(together[row][held.valid[row]], alone, rtol=1e-5, atol=1e-7)


@ALL
def test_other_rows_do_not_matter(scorer):
    held = held_tokens(COUNTS, LENGTHS)
    other = held_tokens([COUNTS[0], COUNTS[1][::-1], [14, 1, 2]], [60, 9, 40])
    mixed = dataclasses.replace(
        held,
        **{
            name: torch.cat([getattr(held, name)[:1], getattr(other, name)[1:]])
            for name in ("keys", "positions", "valid", "length", "queries", "query_positions")
        },
        cumulative_attention=torch.cat(
            [held.cumulative_attention[:1], other.cumulative_attention[1:]]
        ),
        load_values=lambda: torch.cat([held.values[:1], other.values[1:]]),
    )
    assert torch.equal(scorer.score(mixed)[0], scorer.score(held)[0])


@ALL
def test_a_head_scores_as_without_the_other_heads(scorer):
    """Under tensor parallelism they are in other processes."""
    held = held_tokens(COUNTS, LENGTHS)
    some = heads_alone(held, slice(1, 3))
    torch.testing.assert_close(
        scorer.score(held)[:, 1:3][some.valid], scorer.score(some)[some.valid], rtol=1e-5, atol=1e-7
    )


@ALL
def test_scoring_twice_is_scoring_once(scorer):
    held = held_tokens(COUNTS, LENGTHS)
    before = {f.name: getattr(held, f.name) for f in dataclasses.fields(held)}
    kept = {name: t.clone() for name, t in before.items() if isinstance(t, torch.Tensor)}
    assert torch.equal(scorer.score(held), scorer.score(held))
    assert all(torch.equal(getattr(held, name), tensor) for name, tensor in kept.items())


@ALL
def test_it_is_a_frozen_scorer(scorer):
    assert isinstance(scorer, Scorer)
    assert scorer.queries >= 0
    assert 0 < scorer.attention_decay <= 1
    assert hash(scorer) == hash(dataclasses.replace(scorer))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scorer.seed = 1


@ALL
def test_it_asks_for_what_it_needs_and_no_more(scorer):
    held = held_tokens(COUNTS, LENGTHS)
    full = scorer.score(held)
    lean = dataclasses.replace(
        held,
        queries=held.queries[..., -scorer.queries :, :] if scorer.queries else None,
        query_positions=held.query_positions[:, -scorer.queries :] if scorer.queries else None,
        cumulative_attention=held.cumulative_attention
        if scorer.needs_cumulative_attention
        else None,
    )
    assert torch.equal(scorer.score(lean), full)
    if scorer.queries:
        with pytest.raises(ValueError, match=f"last {scorer.queries} queries, got none"):
            scorer.score(dataclasses.replace(held, queries=None))
    if scorer.needs_cumulative_attention:
        with pytest.raises(ValueError, match="accumulated attention, got none"):
            scorer.score(dataclasses.replace(held, cumulative_attention=None))


@pytest.mark.parametrize("scorer", [RKV(queries=8), SnapKV(queries=8)], ids=["rkv", "snapkv"])
@pytest.mark.parametrize("length", [5, 40])
def test_missing_queries_are_as_if_never_asked_for(scorer, length):
    held = held_tokens([[4, 3]], [length])
    held.query_positions[:, :3] = -1
    present = dataclasses.replace(
        held, queries=held.queries[..., -5:, :], query_positions=held.query_positions[:, -5:]
    )
    torch.testing.assert_close(scorer.score(held), scorer.score(present))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RKV(lam=1.5), r"lam in \[0, 1\], got 1.5"),
        (lambda: RKV(lam=float("nan")), "got nan"),
        (lambda: RKV(queries=0), "queries >= 1, got 0"),
        (lambda: RKV(kernel=4), "odd kernel >= 1, got 4"),
        (lambda: RKV(threshold=-0.5), "threshold"),
        (lambda: Bidirectional(queries=0), "queries >= 1, got 0"),
        (lambda: SnapKV(queries=-1), "queries >= 1, got -1"),
        (lambda: SnapKV(queries=2.5), "got 2.5"),
        (lambda: SnapKV(kernel=0), "odd kernel >= 1, got 0"),
        (lambda: H2O(recent_ratio=2), "recent_ratio"),
        (lambda: H2O(attention_decay=1.1), "attention_decay"),
        (lambda: H2O(attention_decay=0.0), "attention_decay > 0"),
        (lambda: StreamingLLM(sinks=-1), "sinks >= 0, got -1"),
        (lambda: LagKV(sinks=-4), "sinks >= 0, got -4"),
        (lambda: LagKV(lag=1), "lag >= 2, got 1"),
        (lambda: Random(seed=-1), "seed >= 0, got -1"),
    ],
)
def test_nonsense_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
