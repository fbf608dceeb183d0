"""`window_scores` against its definition, one query and one key at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch

from triton_ops.window_scores import window_scores

SCALING = 0.3


def by_hand(queries, keys, query_positions, key_positions, group, past_only):
    """Loop over rows, heads and queries; exponentials of one row at a time."""
    rows, heads, group_size, window, _ = queries.shape
    scores = torch.zeros(keys.shape[:3], dtype=torch.float64)
    for row in range(rows):
        present = [a for a in range(window) if query_positions[row, a] >= 0]
        oldest = min((int(query_positions[row, a]) for a in present), default=0)
        for head in range(heads):
            for a in present:
                limit = oldest - 1 if past_only else int(query_positions[row, a])
                seen = [
                    n for n, p in enumerate(key_positions[row, head].tolist()) if 0 <= p <= limit
                ]
                logits = [
                    [SCALING * float(queries[row, head, g, a] @ keys[row, head, n]) for n in seen]
                    for g in range(group_size)
                ]
                if group == "max":
                    logits = [[max(column) for column in zip(*logits, strict=True)]]
                for line in logits:
                    weights = [math.exp(logit) for logit in line]
                    for n, weight in zip(seen, weights, strict=True):
                        share = weight / sum(weights) / len(logits) / len(present)
                        scores[row, head, n] += share
    return scores


def example(rows=2, heads=3, group_size=4, window=5, held=17, size=8):
    queries = torch.randn(rows, heads, group_size, window, size, dtype=torch.float64)
    keys = torch.randn(rows, heads, held, size, dtype=torch.float64)
    positions = torch.stack([torch.randperm(40)[:held] for _ in range(rows * heads)])
    key_positions = positions.view(rows, heads, held)
    key_positions[0, 1, 11:] = -1  # a ragged head
    query_positions = torch.arange(30, 30 + window).repeat(rows, 1)
    query_positions[1, :2] = -1  # a row with fewer queries
    return queries, keys, query_positions, key_positions


@pytest.mark.parametrize("past_only", [True, False])
@pytest.mark.parametrize("group", ["max", "mean"])
def test_it_is_its_definition(group, past_only):
    inputs = example()
    scores = window_scores(*inputs, SCALING, group=group, past_only=past_only)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, by_hand(*inputs, group, past_only), rtol=0, atol=1e-14)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("window", [1, 4])
def test_group_of_one_and_window_of_one(group_size, window):
    inputs = example(group_size=group_size, window=window)
    for group in ("max", "mean"):
        scores = window_scores(*inputs, SCALING, group=group, past_only=False)
        torch.testing.assert_close(scores, by_hand(*inputs, group, False), rtol=0, atol=1e-14)


@pytest.mark.parametrize("past_only", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_return_float32(dtype, past_only):
    queries, keys, *positions = example()
    queries, keys = queries.to(dtype), keys.to(dtype)
    scores = window_scores(queries, keys, *positions, SCALING, group="max", past_only=past_only)
    expected = by_hand(queries.double(), keys.double(), *positions, "max", past_only)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("past_only", [True, False])
@pytest.mark.parametrize("group", ["max", "mean"])
def test_filler_and_absent_queries_may_hold_nan(group, past_only):
    queries, keys, query_positions, key_positions = example()
    clean = window_scores(
        queries, keys, query_positions, key_positions, SCALING, group=group, past_only=past_only
    )
    queries[1, :, :, :2] = torch.nan
    keys[0, 1, 11:] = torch.nan
    poisoned = window_scores(
        queries, keys, query_positions, key_positions, SCALING, group=group, past_only=past_only
    )
    assert torch.equal(poisoned, clean)
    assert (poisoned[0, 1, 11:] == 0).all()


@pytest.mark.parametrize("group", ["max", "mean"])
def test_a_window_without_a_past_scores_zero(group):
    queries, keys, query_positions, key_positions = example()
    key_positions += 100  # every key is younger than every query, filler stays below 100
    key_positions[key_positions < 100] = -1
    for past_only in (True, False):
        scores = window_scores(
            queries, keys, query_positions, key_positions, SCALING, group=group, past_only=past_only
        )
        assert (scores == 0).all()


def test_a_row_without_queries_scores_zero():
    queries, keys, query_positions, key_positions = example()
    query_positions[0] = -1
    for past_only in (True, False):
        scores = window_scores(
            queries, keys, query_positions, key_positions, SCALING, group="max", past_only=past_only
        )
        assert (scores[0] == 0).all()
        assert (scores[1] > 0).any()


def test_causal_scores_are_a_distribution_and_past_scores_leave_the_window_out():
    queries, keys, _, _ = example()
    query_positions = torch.arange(12, 17).repeat(2, 1)
    key_positions = torch.arange(17).expand(2, 3, 17)
    causal, past = (
        window_scores(
            queries, keys, query_positions, key_positions, SCALING, group="mean", past_only=only
        )
        for only in (False, True)
    )
    torch.testing.assert_close(causal.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(past[..., :12].sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert (past[..., 12:] == 0).all()


def test_huge_logits_stay_finite():
    queries, keys, *positions = example()
    scores = window_scores(
        (queries * 1e18).float(), keys.float(), *positions, 1.0, group="max", past_only=False
    )
    assert scores.isfinite().all()


def faults():
    queries, keys, query_positions, key_positions = example()
    good = dict(
        queries=queries,
        keys=keys,
        query_positions=query_positions,
        key_positions=key_positions,
        scaling=SCALING,
        group="max",
        past_only=True,
    )
    yield "a missing group axis", {**good, "queries": queries[:, :, 0]}, "group query heads"
    yield "other heads", {**good, "keys": keys[:, :2]}, "keys"
    yield "another head size", {**good, "keys": keys[..., :4]}, "keys"
    yield "query positions", {**good, "query_positions": query_positions[:, 1:]}, "query_positions"
    yield "key positions", {**good, "key_positions": key_positions[..., 1:]}, "key_positions"
    yield "group", {**good, "group": "median"}, "median"
    empty = {"queries": queries[:, :, :, :0], "query_positions": query_positions[:, :0]}
    yield "no query", {**good, **empty}, "at least one query"


@pytest.mark.parametrize(("arguments", "words"), [pytest.param(a, w, id=n) for n, a, w in faults()])
def test_faults_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        window_scores(**arguments)
