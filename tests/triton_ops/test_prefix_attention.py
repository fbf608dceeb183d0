"""prefix_attention against its definition in float64, and that against copies of the prefix."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from tests.support.ops.attention_cases import assert_close, expected
from tests.support.ops.prefix_cases import SHAPES, make_shared, shared_cases


def check(case, tolerance=2e-5, **arguments):
    out, lse = case.expected(**arguments)
    total = torch.full(lse.shape, torch.nan)
    assert_close(case.run(logsumexp=total, **arguments), out, tolerance)
    torch.testing.assert_close(total.double(), lse, atol=tolerance, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_is_attention_to_a_copy_of_the_prefix_in_every_row(shape):
    case = make_shared(*SHAPES[shape], 4, 2)
    settings = dict(s_aux=torch.linspace(-1, 2, 4 * case.own.length.shape[1]), softcap=1.5)
    for arguments in ({}, settings):
        out, _, lse = expected(case.copied(), **arguments)
        found, total = case.expected(**arguments)
        torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(total, lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("group", "steps"), [(1, 1), (4, 1), (3, 4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, group, steps):
    check(make_shared(*SHAPES[shape], group, steps))


def test_sinks_are_counted_once_and_softcap_is_applied_to_both():
    case = make_shared(*SHAPES["mixed_owners"], 4, 2)
    check(case, s_aux=torch.linspace(-1, 2, 8), softcap=1.5)


def test_half_precision():
    check(make_shared(*SHAPES["four_branches"], 4, 1, dtype=torch.bfloat16), 4e-2)


@settings(max_examples=40)
@given(case=shared_cases())
def test_any_pools(case):
    check(case)


def test_rows_stand_where_they_stood():
    """The same rows in another order, with their owners, give the same results in that order."""
    case = make_shared(*SHAPES["four_branches"], 2, 1)
    order = torch.tensor([2, 0, 3, 1])
    apart = make_shared(*SHAPES["four_branches"], 2, 1)
    capacity, length = apart.own.layout.capacity[order], apart.own.length[order]
    moved = replace(
        apart.own,
        query=apart.own.query[order],
        layout=type(apart.own.layout)(capacity),
        length=length,
    )
    for name in ("keys", "values"):
        field = getattr(apart.own, name).clone()
        for new, old in enumerate(order.tolist()):
            for head in range(2):
                own = apart.own.head(old, head)
                start = int(moved.layout.start[new, head])
                field[start : start + own.stop - own.start] = getattr(apart.own, name)[own]
        setattr(moved, name, field)
    torch.testing.assert_close(replace(apart, own=moved).run(), case.run()[order])


@pytest.mark.parametrize(
    ("owner", "heads", "steps", "said"),
    [
        ([0], 1, 1, r"owner for 2 rows.*got \[1\]"),
        ([0, 0], 2, 1, r"prefixes of 1 KV heads, got \[2\] and \[1, 2\]"),
        ([0, 0], 1, 2, r"2 queries per row need query_positions \[2, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(owner, heads, steps, said):
    case = make_shared(([[4]] * 2, [[3]] * 2), ([[5] * heads], [[5] * heads]), owner, 1, steps)
    case.own.query_positions = None
    with pytest.raises(ValueError, match=said):
        case.run()
