"""The kernels of window_scores against their definition in float64."""

from typing import get_args

import pytest
import torch

from tests.support.ops.window_cases import SCALING, example
from triton_ops.window_scores import Sees, window_scores
from triton_ops.window_scores.reference import window_scores_reference


def check(inputs, device, group, sees, tolerance=1e-5):
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    expected = window_scores_reference(*exact, SCALING, group=group, sees=sees)
    moved = [x.to(device) for x in inputs]
    scores = window_scores(*moved, SCALING, group=group, sees=sees)
    assert scores.dtype == torch.float32
    difference = (scores.double().cpu() - expected).norm()
    assert bool(difference <= tolerance * max(float(expected.norm()), 1e-3))


def poisoned(dtype=torch.float32, **sizes):
    """An example whose filler and absent queries hold NaN."""
    queries, keys, query_positions, key_positions = example(**sizes)
    keys[key_positions < 0] = torch.nan
    queries.movedim(3, 1)[query_positions < 0] = torch.nan
    return queries.to(dtype), keys.to(dtype), query_positions, key_positions


@pytest.mark.parametrize("sees", get_args(Sees))
@pytest.mark.parametrize("group", ["max", "mean"])
def test_equals_the_definition(group, sees, device):
    check(poisoned(), device, group, sees)


@pytest.mark.parametrize("group", ["max", "mean"])
@pytest.mark.parametrize("window", [1, 3, 17])
def test_windows_and_tiles(window, group, device):
    inputs = poisoned(rows=2, heads=1, group_size=2, window=window, held=130, positions=200)
    check(inputs, device, group, "causal")


@pytest.mark.parametrize("held", [1, 63, 64, 65])
def test_numbers_of_keys(held, device):
    check(poisoned(rows=2, heads=2, group_size=1, window=2, held=held), device, "max", "past")


@pytest.mark.parametrize("size", [32, 80, 128])
def test_head_sizes(size, device):
    check(poisoned(rows=2, heads=2, size=size), device, "max", "all")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-5), (torch.bfloat16, 1e-5)])
def test_half_precisions_have_exact_products(dtype, tolerance, device):
    check(poisoned(dtype), device, "mean", "causal", tolerance)


def test_a_row_without_queries_and_one_without_a_past_score_zero(device):
    queries, keys, query_positions, key_positions = poisoned()
    query_positions[0], query_positions[1] = -1, torch.arange(5)
    key_positions[1] = key_positions[1].clamp(min=5)
    inputs = [x.to(device) for x in (queries, keys, query_positions, key_positions)]
    for group in ("max", "mean"):
        for sees in ("past", "causal"):
            assert (window_scores(*inputs, SCALING, group=group, sees=sees) == 0).all()


def test_no_key(device):
    inputs = [x.to(device) for x in poisoned(held=0, heads=1, rows=2)]
    assert window_scores(*inputs, SCALING, group="max", sees="all").shape == (2, 1, 0)
