"""Shared prefixes as part of the decode launch, and the join of two results."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.support.ops.prefix_cases import SHAPES, Shared, make_shared, shared_cases
from triton_ops.backend import use_backend
from triton_ops.merge_state import merge_state


def check(case, device, tolerance=1e-5, **arguments):
    out, lse = case.expected(**arguments)
    out = out.nan_to_num(0.0)
    total = torch.full(lse.shape, math.nan, device=device)
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    found = case.run(device, logsumexp=total, **moved).double().cpu()
    assert bool((found - out).norm() <= tolerance * max(float(out.norm()), 1e-3))
    torch.testing.assert_close(total.double().cpu(), lse, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize(("group", "steps"), [(4, 1), (3, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, group, steps, device):
    check(make_shared(*SHAPES[shape], group, steps, poison=math.nan), device)


def test_more_queries_of_a_prefix_than_one_tile(device):
    rows = ([[3]] * 6, [[3], [0], [1], [2], [3], [1]])
    case = make_shared(rows, ([[70]], [[66]]), [0] * 6, 4, 3, poison=math.nan)
    check(case, device)


@pytest.mark.parametrize("own_values_apart", [False, True])
def test_values_that_are_the_first_numbers_of_keys(own_values_apart, device):
    case = make_shared(*SHAPES["mixed_owners"], 4, 1, sizes=(144, 144), poison=math.nan)
    own, prefix = case.own.to(device), replace(case.prefix, keys=case.prefix.keys.to(device))
    own = replace(own, values=own.keys[:, :128])
    latents = Shared(own, replace(prefix, values=prefix.keys[:, :128]))
    out, _ = latents.expected()
    if own_values_apart:
        latents.own = replace(own, values=own.values.contiguous())
    found = latents.run(device).double()
    assert bool((found - out.nan_to_num(0.0)).norm() <= 1e-5 * out.nan_to_num(0.0).norm())


def test_sinks_softcap_and_half_precision(device):
    case = make_shared(*SHAPES["mixed_owners"], 4, 1, dtype=torch.float16, poison=math.nan)
    sinks = torch.linspace(-1, 2, 8).half()
    check(case, device, 2e-3, s_aux=sinks, softcap=1.5)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=shared_cases())
def test_any_pools(case, device):
    check(case, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_equals_the_reference(dtype, device):
    out, other = (torch.randn(5, 7, 80, device=device).to(dtype) for _ in range(2))
    a, b = (30 * torch.randn(5, 7, device=device) for _ in range(2))
    a[0], b[1], a[2], b[2] = -math.inf, -math.inf, -math.inf, -math.inf
    with use_backend("torch"):
        expected_out, expected_sum = merge_state(out, a, other, b)
    # Interpreted bfloat16 is cut off where it should be rounded.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    out[0], other[1] = math.nan, math.nan
    merged, total = merge_state(out, a, other, b)
    torch.testing.assert_close(merged, expected_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(total, expected_sum)


def test_merge_of_nothing(device):
    nothing = torch.zeros(0, 3, 4, device=device)
    merged, total = merge_state(nothing, nothing[..., 0], nothing, nothing[..., 0])
    assert merged.shape == (0, 3, 4) and total.shape == (0, 3)
