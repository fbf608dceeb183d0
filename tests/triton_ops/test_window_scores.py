"""`window_scores` against its definition in float64, and the definition against loops."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from tests.support.ops.window_cases import SCALING, example
from triton_ops.window_scores import Sees, window_scores
from triton_ops.window_scores.reference import window_scores_reference


def defined(queries, keys, query_positions, key_positions, group, sees):
    """The definition in float64."""
    inputs = (queries.double(), keys.double(), query_positions, key_positions, SCALING)
    return window_scores_reference(*inputs, group=group, sees=sees)


def by_loops(queries, keys, query_positions, key_positions, group, sees):
    """One query and one key at a time."""
    rows, heads, group_size, window, _ = queries.shape
    scores = torch.zeros(keys.shape[:3], dtype=torch.float64)
    for row in range(rows):
        present = [a for a in range(window) if query_positions[row, a] >= 0]
        oldest = min((int(query_positions[row, a]) for a in present), default=0)
        for head in range(heads):
            for a in present:
                limits = {"past": oldest - 1, "causal": int(query_positions[row, a])}
                limit = limits.get(sees, math.inf)
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


@pytest.mark.parametrize("sees", get_args(Sees))
@pytest.mark.parametrize("group", ["max", "mean"])
def test_the_definition_is_what_loops_say(group, sees):
    inputs = example()
    found = defined(*inputs, group, sees)
    torch.testing.assert_close(found, by_loops(*inputs, group, sees), rtol=0, atol=1e-14)


@pytest.mark.parametrize("sees", get_args(Sees))
@pytest.mark.parametrize("group", ["max", "mean"])
def test_it_is_its_definition(group, sees):
    inputs = example()
    scores = window_scores(*inputs, SCALING, group=group, sees=sees)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, defined(*inputs, group, sees), rtol=0, atol=1e-14)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("window", [1, 4])
def test_group_of_one_and_window_of_one(group_size, window):
    inputs = example(group_size=group_size, window=window)
    for group in ("max", "mean"):
        scores = window_scores(*inputs, SCALING, group=group, sees="causal")
        torch.testing.assert_close(scores, defined(*inputs, group, "causal"), rtol=0, atol=1e-14)


@pytest.mark.parametrize("sees", get_args(Sees))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_return_float32(dtype, sees):
    queries, keys, *positions = example()
    queries, keys = queries.to(dtype), keys.to(dtype)
    scores = window_scores(queries, keys, *positions, SCALING, group="max", sees=sees)
    expected = defined(queries, keys, *positions, "max", sees)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sees", get_args(Sees))
@pytest.mark.parametrize("group", ["max", "mean"])
def test_filler_and_absent_queries_may_hold_nan(group, sees):
    queries, keys, query_positions, key_positions = example()
    clean = window_scores(
        queries, keys, query_positions, key_positions, SCALING, group=group, sees=sees
    )
    queries[1, :, :, :2] = torch.nan
    keys[0, 1, 11:] = torch.nan
    poisoned = window_scores(
        queries, keys, query_positions, key_positions, SCALING, group=group, sees=sees
    )
    assert torch.equal(poisoned, clean)
    assert (poisoned[0, 1, 11:] == 0).all()


@pytest.mark.parametrize("group", ["max", "mean"])
def test_a_window_without_a_past_scores_zero(group):
    queries, keys, query_positions, key_positions = example()
    key_positions += 100  # every key is younger than every query, filler stays below 100
    key_positions[key_positions < 100] = -1
    for sees in ("past", "causal"):
        scores = window_scores(
            queries, keys, query_positions, key_positions, SCALING, group=group, sees=sees
        )
        assert (scores == 0).all()


def test_a_row_without_queries_scores_zero():
    queries, keys, query_positions, key_positions = example()
    query_positions[0] = -1
    for sees in get_args(Sees):
        scores = window_scores(
            queries, keys, query_positions, key_positions, SCALING, group="max", sees=sees
        )
        assert (scores[0] == 0).all()
        assert (scores[1] > 0).any()


def test_causal_scores_are_a_distribution_and_past_scores_leave_the_window_out():
    queries, keys, _, _ = example()
    query_positions = torch.arange(12, 17).repeat(2, 1)
    key_positions = torch.arange(17).expand(2, 3, 17)
    causal, past = (
        window_scores(
            queries, keys, query_positions, key_positions, SCALING, group="mean", sees=only
        )
        for only in ("causal", "past")
    )
    torch.testing.assert_close(causal.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(past[..., :12].sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert (past[..., 12:] == 0).all()


def test_bidirectional_scores_depend_on_no_position():
    queries, keys, query_positions, key_positions = example()
    held, asked = key_positions >= 0, query_positions >= 0
    scores, moved = (
        window_scores(queries, keys, asking, at, SCALING, group="mean", sees="all")
        for asking, at in (
            (query_positions, key_positions),
            (torch.where(asked, 7, -1), torch.where(held, 3, -1)),
        )
    )
    assert torch.equal(scores, moved)
    torch.testing.assert_close(scores.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_huge_logits_stay_finite():
    queries, keys, *positions = example()
    scores = window_scores(
        (queries * 1e18).float(), keys.float(), *positions, 1.0, group="max", sees="causal"
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
        sees="past",
    )
    yield "a missing group axis", {**good, "queries": queries[:, :, 0]}, "group query heads"
    yield "other heads", {**good, "keys": keys[:, :2]}, "keys"
    yield "another head size", {**good, "keys": keys[..., :4]}, "keys"
    yield "query positions", {**good, "query_positions": query_positions[:, 1:]}, "query_positions"
    yield "key positions", {**good, "key_positions": key_positions[..., 1:]}, "key_positions"
    yield "group", {**good, "group": "median"}, "median"
    yield "sees", {**good, "sees": "future"}, "past.*causal.*all.*got 'future'"
    empty = {"queries": queries[:, :, :, :0], "query_positions": query_positions[:, :0]}
    yield "no query", {**good, **empty}, "at least one query"


@pytest.mark.parametrize(("arguments", "words"), [pytest.param(a, w, id=n) for n, a, w in faults()])
def test_faults_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        window_scores(**arguments)
