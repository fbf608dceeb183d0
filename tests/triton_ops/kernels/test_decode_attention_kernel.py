"""The kernels of decode_attention against its definition in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.support.ops.attention_cases import OPTIONS, arguments_of, cases, expected, make_case
from triton_ops.decode_attention import kernel, work

TILE = work.STEP
SHAPES = {
    "one_head": ([[4]], [[3]]),
    "nothing_held": ([[5, 0]], [[0, 0]]),
    "below_a_tile": ([[TILE, TILE]], [[TILE - 1, 1]]),
    "a_tile": ([[2 * TILE]], [[TILE]]),
    "above_a_tile": ([[2 * TILE]], [[TILE + 1]]),
    "empty_splits": ([[3 * TILE, 7, 2 * TILE], [1, 3 * TILE + 1, 9]], [[5, 7, 0], [1, 130, 9]]),
}


def assert_equal(found, wanted, tolerance=1e-5):
    """Relative norm; a query that sees nothing yields zeros."""
    found, wanted = found.double().cpu(), wanted.nan_to_num(0.0)
    assert bool((found - wanted).norm() <= tolerance * max(float(wanted.norm()), 1e-3))


def check(case, device, tolerance=1e-5, **arguments):
    """Run a case with everything asked for, memory around it poisoned."""
    out, cumulative_attention, lse = expected(case, **arguments)
    found = torch.rand(case.layout.slots)
    before = found.clone()
    total = torch.full(lse.shape, math.nan, device=device)
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    found = found.to(device)
    got = case.to(device).run(cumulative_attention=found, logsumexp=total, **moved)
    assert got.dtype == case.query.dtype
    assert_equal(got, out, tolerance)
    assert_equal(found.cpu() - before, cumulative_attention, tolerance + 1e-6)
    torch.testing.assert_close(total.double().cpu(), lse, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize(("group", "steps"), [(1, 1), (4, 1), (5, 1), (4, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, group, steps, device):
    case = make_case(*SHAPES[shape], group, steps, poison=math.nan)
    check(case, device)


@pytest.mark.parametrize("steps", [1, 3])
def test_sinks_softcap_and_weighted_mass(steps, device):
    case = make_case(*SHAPES["empty_splits"], 4, steps, poison=math.nan)
    decay = 0.5 ** torch.arange(steps - 1, -1, -1)
    check(case, device, s_aux=torch.linspace(-1, 2, 12), softcap=1.5, attention_weight=decay)


def test_more_queries_than_one_tile(device):
    case = make_case([[70, 9]], [[66, 9]], 5, 14, poison=math.nan)
    check(case, device)


@pytest.mark.parametrize(
    "sizes",
    [(32, 32), (80, 80), (96, 40), (128, 128), (144, 128), (200, 72), (256, 256), (576, 512)],
    ids=str,
)
def test_head_sizes(sizes, device):
    case = make_case([[70, 9]], [[66, 9]], 2, 1, sizes=sizes, poison=math.nan)
    check(case, device)


@pytest.mark.parametrize(("size", "first"), [(144, 128), (192, 160), (576, 512), (40, 40)])
@pytest.mark.parametrize("steps", [1, 3])
def test_values_that_are_the_first_numbers_of_keys(size, first, steps, device):
    case = make_case([[70, 9]], [[66, 9]], 2, steps, sizes=(size, size), poison=math.nan)
    keys = case.keys.to(device)
    latents = replace(case.to(device), keys=keys, values=keys[:, :first])
    apart = replace(case, values=case.keys[:, :first].contiguous())
    out, _, _ = expected(apart)
    assert_equal(latents.run(), out)
    assert_equal(apart.to(device).run(), out)


def test_rows_of_a_wider_tensor_are_refused(device):
    case = make_case([[9, 9]], [[9, 8]], 4, 1).to(device)
    wide = torch.zeros(case.layout.slots, 16, device=device)
    with pytest.raises(ValueError, match=r"expected contiguous keys .* got strides .*\(16, 1\)"):
        replace(case, values=wide[:, :6]).run()
    with pytest.raises(ValueError, match="expected contiguous keys"):
        replace(case, keys=wide[:, :8]).run()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precisions(dtype, tolerance, device):
    case = make_case([[70, 9]], [[66, 9]], 4, 2, sizes=(64, 64), dtype=dtype, poison=math.nan)
    check(case, device, tolerance, s_aux=torch.linspace(-1, 2, 8).to(dtype))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), options=OPTIONS)
def test_any_pool(case, options, device):
    arguments = arguments_of(case, options)
    del arguments["cumulative_attention"]
    check(case, device, **arguments)


@pytest.mark.parametrize("chunk", [128, 512])
def test_the_number_of_splits_changes_nothing(chunk, device, monkeypatch):
    case = make_case(*SHAPES["empty_splits"], 4, 1).to(device)
    fine = case.run()
    for name in ("SMALLEST", "STEP"):
        monkeypatch.setattr(work, name, chunk)
    other = replace(case, layout=replace(case.layout))
    torch.testing.assert_close(other.run(), fine, atol=1e-6, rtol=1e-6)
    assert work.work(other.layout, 1, fine.device).chunk == chunk


def test_the_order_in_which_programs_come_changes_nothing(device):
    """The last one to come joins, in the order of the chunks, and leaves all as it was."""
    case = make_case([[5 * TILE, 7, 0]], [[5 * TILE - 3, 7, 0]], 4, 1, poison=math.nan).to(device)
    first = case.run()
    plan = work.work(case.layout, 1, first.device)
    assert plan.count > 5
    for order in (plan.items.flip(0), plan.items[torch.randperm(plan.count)], plan.items):
        plan.items.copy_(order.clone())
        assert torch.equal(case.run(), first)
        assert not plan.arrivals.any()


def test_more_queries_than_one_program_joins_are_joined_by_a_launch(device, monkeypatch):
    case = make_case([[3 * TILE, 7, 0]], [[3 * TILE - 3, 7, 0]], 4, 1).to(device)
    joined = case.run()
    monkeypatch.setattr(kernel, "JOINED", 3)
    torch.testing.assert_close(case.run(), joined, atol=1e-6, rtol=1e-6)


def test_a_query_that_is_a_view(device):
    case = make_case([[9, 9]], [[9, 8]], 4, 2).to(device)
    view = case.query.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(replace(case, query=view).run(), case.run())


def test_huge_logits_stay_finite(device):
    case = make_case([[5, 7]], [[5, 2]], 2, 1).to(device)
    assert bool(replace(case, query=case.query * 1e6).run().isfinite().all())
    assert case.run(s_aux=torch.full((4,), 1e4, device=device)).abs().max() == 0
