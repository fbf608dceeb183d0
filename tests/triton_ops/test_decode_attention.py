"""decode_attention against its definition in float64, and that against torch and loops."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.support.ops.attention_cases import (
    KEY_SIZE,
    OPTIONS,
    POISON,
    SHAPES,
    arguments_of,
    assert_close,
    cases,
    expected,
    make_case,
)
from triton_ops import cpu_features
from triton_ops.decode_attention import cpu, even_attention, fused
from triton_ops.layout import RaggedLayout

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
EXTRAS = {
    "plain": (),
    "s_aux": ("s_aux",),
    "softcap": ("softcap",),
    "cumulative_attention": ("cumulative_attention",),
    "everything": ("s_aux", "softcap", "cumulative_attention", "attention_weight"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_is_attention_head_by_head(shape):
    case = make_case(*SHAPES[shape], 4, 3).double()
    out, *_ = expected(case)
    for row, head in product(*map(range, case.length.shape)):
        own = case.head(row, head)
        seen = case.positions[own] <= case.query_positions[row, :, None]
        wanted = scaled_dot_product_attention(
            case.query[row, head], case.keys[own], case.values[own], attn_mask=seen, scale=0.3
        )
        wanted = wanted.where(seen.any(-1, keepdim=True), math.nan).transpose(0, 1)
        found = out[row, :, 4 * head : 4 * head + 4]
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_definition_with_everything_is_what_loops_say():
    case = make_case([[4, 2]], [[3, 1]], 2, 2).double()
    sinks, decay = [0.5, -1.0, 0.0, 2.0], [0.25, 1.0]
    out, cumulative_attention, lse = expected(
        case, softcap=1.5, s_aux=torch.tensor(sinks), attention_weight=torch.tensor(decay)
    )
    expected_mass = torch.zeros_like(cumulative_attention)
    for head, member, step in product(range(2), repeat=3):
        own, query_head = case.head(0, head), 2 * head + member
        logits = {
            slot: 0.3 * float(case.query[0, head, member, step] @ case.keys[slot])
            for slot in range(own.start, own.stop)
            if case.positions[slot] <= case.query_positions[0, step]
        }
        weights = {slot: math.exp(1.5 * math.tanh(x / 1.5)) for slot, x in logits.items()}
        total = sum(weights.values()) + math.exp(sinks[query_head])
        assert float(lse[0, step, query_head]) == pytest.approx(math.log(total))
        result = sum(weight / total * case.values[slot] for slot, weight in weights.items())
        found = out[0, step, query_head]
        torch.testing.assert_close(
            found, result if weights else torch.full_like(found, math.nan), equal_nan=True
        )
        for slot, weight in weights.items():
            expected_mass[slot] += decay[step] * weight / total
    torch.testing.assert_close(cumulative_attention, expected_mass)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("call", [0, 1 << 20], ids=["apart", "masked"])
def test_equals_the_definition(shape, extras, dtype, call, monkeypatch):
    # Heads that hold differently many: each stretch on its own, or all under a mask.
    monkeypatch.setattr(cpu, "_CALL", call)
    for group, steps in ((1, 1), (4, 1), (5, 1), (1, 3), (4, 5)):
        case = make_case(*SHAPES[shape], group, steps, dtype=dtype)
        heads, wanted = SHAPES[shape][0], EXTRAS[extras]
        arguments = {}
        if "s_aux" in wanted:
            arguments["s_aux"] = torch.linspace(-1, 2, len(heads[0]) * group).to(dtype)
        if "softcap" in wanted:
            arguments["softcap"] = 1.5
        if "attention_weight" in wanted:
            arguments["attention_weight"] = 0.5 ** torch.arange(steps - 1, -1, -1)
        out, cumulative_attention, lse = expected(case, **arguments)
        before = torch.rand(case.layout.slots) if "cumulative_attention" in wanted else None
        found = None if before is None else before.clone()
        total = torch.full(lse.shape, torch.nan)
        assert_close(case.run(cumulative_attention=found, **arguments), out, TOLERANCE[dtype])
        assert_close(case.run(logsumexp=total, **arguments), out, TOLERANCE[dtype])
        torch.testing.assert_close(total.double(), lse, atol=TOLERANCE[dtype], rtol=1e-6)
        if found is not None:
            tolerance = TOLERANCE[dtype] * group * steps
            torch.testing.assert_close(
                (found - before).double(),
                cumulative_attention,
                atol=tolerance,
                rtol=TOLERANCE[dtype],
            )


@pytest.mark.parametrize("able", [{}, {"amx_bf16": True}], ids=["together", "alone"])
@pytest.mark.parametrize(
    ("limit", "threads"), [(1 << 20, 1), (0, 1), (1 << 20, 2)], ids=["short", "long", "threads"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_few_queries_that_share_keys(shape, limit, threads, able, monkeypatch):
    monkeypatch.setattr(cpu_features, "capabilities", lambda: able)
    monkeypatch.setattr(fused, "_CACHED_BYTES", limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(query, *arguments, **settings):
        calls.append((query.shape[2], settings.get("attn_mask") is None))
        return attend(query, *arguments, **settings)

    monkeypatch.setattr(fused.F, "scaled_dot_product_attention", noted)
    for group, sizes in ((2, (8, 8)), (4, (8, 8)), (5, (8, 8)), (4, (8, 6))):
        case = make_case(*SHAPES[shape], group, 1, dtype=torch.bfloat16, sizes=sizes)
        assert_close(case.run(), expected(case)[0], TOLERANCE[torch.bfloat16])
        few = group == 2 or (group == 4 and limit and threads == 1)
        single = able and few and sizes[0] == sizes[1]
        assert all(rows == (1 if single and plain else group) for rows, plain in calls)
        calls.clear()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_that_are_the_first_numbers_of_the_keys(dtype, steps, monkeypatch):
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(query, keys, values, **settings):
        calls.append(keys.data_ptr() == values.data_ptr() and keys.shape == values.shape)
        return attend(query, keys, values, **settings)

    monkeypatch.setattr(fused.F, "scaled_dot_product_attention", noted)
    made = make_case([[9], [7]], [[9], [4]], 16, steps, dtype=dtype, sizes=(24, 20))
    case = replace(made, values=made.keys[:, :20])
    out, _, lse = expected(case)
    total = torch.empty(2, steps, 16)
    assert_close(case.run(), out, TOLERANCE[dtype])
    assert_close(case.run(logsumexp=total), out, TOLERANCE[dtype])
    torch.testing.assert_close(total.double(), lse, atol=TOLERANCE[dtype], rtol=1e-6)
    if dtype != torch.float64:
        assert calls and all(calls), "the fused code of CPUs takes equal sizes only"


@pytest.mark.parametrize("able", [{}, {"amx_bf16": True}], ids=["together", "alone"])
@pytest.mark.parametrize("sizes", [(8, 8), (8, 6)], ids=["equal", "narrow values"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_heads_that_hold_equally_many(dtype, sizes, able, monkeypatch):
    monkeypatch.setattr(cpu_features, "capabilities", lambda: able)
    for batch, heads, group, held, room in ((1, 1, 1, 1, 1), (3, 2, 2, 7, 9), (2, 3, 4, 9, 9)):
        capacity, length = [[room] * heads] * batch, [[held] * heads] * batch
        case = make_case(capacity, length, group, 1, dtype=dtype, sizes=sizes)
        # As a model has it: heads and steps swapped.
        query = case.query.flatten(1, 2).transpose(1, 2).contiguous().transpose(1, 2)
        out = even_attention(query, case.keys, case.values, case.layout, held, 0.3)
        assert_close(out, expected(case)[0], TOLERANCE[dtype])


@settings(max_examples=60)
@given(case=cases(), options=OPTIONS)
def test_any_pool_equals_the_definition(case, options):
    arguments = arguments_of(case, options)
    out, cumulative_attention, _ = expected(
        case, softcap=options["softcap"], s_aux=arguments["s_aux"]
    )
    assert_close(case.run(**arguments), out, 2e-5)
    if options["cumulative_attention"]:
        torch.testing.assert_close(
            arguments["cumulative_attention"].double(), cumulative_attention, atol=1e-4, rtol=1e-4
        )


@settings(max_examples=30)
@given(case=cases(), options=OPTIONS, seed=st.integers(0, 99))
def test_order_of_a_heads_slots_changes_nothing(case, options, seed):
    generator, order = torch.Generator().manual_seed(seed), torch.arange(case.layout.slots)
    for start, used in zip(
        case.layout.start.flatten().tolist(), case.length.flatten().tolist(), strict=True
    ):
        order[start : start + used] = start + torch.randperm(used, generator=generator)
    shuffled = replace(
        case, keys=case.keys[order], values=case.values[order], positions=case.positions[order]
    )
    first, second = arguments_of(case, options), arguments_of(case, options)
    sees = ~expected(case)[0].isnan()
    out, out_shuffled = case.run(**first), shuffled.run(**second)
    torch.testing.assert_close(out_shuffled[sees], out[sees], atol=1e-5, rtol=1e-5)
    if options["cumulative_attention"]:
        torch.testing.assert_close(
            second["cumulative_attention"],
            first["cumulative_attention"][order],
            atol=1e-5,
            rtol=1e-5,
        )


@settings(max_examples=30)
@given(case=cases(), options=OPTIONS)
def test_chunk_equals_its_queries_one_by_one(case, options):
    steps = case.query.shape[3]
    asking = case.query_positions
    whole, parts = arguments_of(case, options), arguments_of(case, options)
    sees = ~expected(case)[0].isnan()
    out = case.run(**whole)
    singles = [
        replace(
            case,
            query=case.query[:, :, :, t : t + 1],
            query_positions=None if asking is None else asking[:, t : t + 1],
        ).run(**parts)
        for t in range(steps)
    ]
    torch.testing.assert_close(torch.cat(singles, 1)[sees], out[sees], atol=1e-5, rtol=1e-5)
    if options["cumulative_attention"]:
        torch.testing.assert_close(
            parts["cumulative_attention"], whole["cumulative_attention"], atol=1e-5, rtol=1e-5
        )


@settings(max_examples=30)
@given(case=cases(), options=OPTIONS, extra=st.integers(0, 9))
def test_room_around_a_heads_tokens_changes_nothing(case, options, extra):
    """The same tokens in another layout: other capacities, other buckets, other neighbours."""
    spread = torch.arange(case.length.numel()).view_as(case.length).flip(0) % 3 * extra
    layout = RaggedLayout(case.length + spread)
    moved = {
        name: torch.full((layout.slots, *field.shape[1:]), -POISON).to(field.dtype)
        for name, field in (("keys", case.keys), ("values", case.values))
    }
    moved["positions"] = torch.zeros(layout.slots, dtype=torch.int32)
    other = replace(case, layout=layout, **moved)
    for row in range(case.length.shape[0]):
        for head in range(case.length.shape[1]):
            to, own = other.head(row, head), case.head(row, head)
            for name, field in moved.items():
                field[to] = getattr(case, name)[own]
    sees = ~expected(case)[0].isnan()
    out = case.run(**arguments_of(case, options))
    found = other.run(**arguments_of(other, options))
    torch.testing.assert_close(found[sees], out[sees], atol=1e-5, rtol=1e-5)


def test_pool_and_queries_stay_as_they_are():
    case = make_case([[9, 4], [4, 9]], [[7, 4], [2, 9]], 4, 3)
    before = [x.clone() for x in (case.query, case.keys, case.values, case.positions, case.length)]
    case.run(softcap=2.0, s_aux=torch.zeros(8), cumulative_attention=torch.zeros(case.layout.slots))
    after = (case.query, case.keys, case.values, case.positions, case.length)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("with_sum", [False, True])
def test_query_in_any_strides(with_sum):
    """One query per head, heads and rows swapped: fused attention answers in the same strides."""
    case = make_case([[9, 9], [9, 9], [9, 9]], [[7, 7], [7, 7], [7, 7]], 1, 1)
    swapped = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    total = torch.empty(3, 1, 2) if with_sum else None
    assert_close(replace(case, query=swapped).run(logsumexp=total), expected(case)[0], 2e-5)


def test_huge_sink_takes_all_weight():
    case = make_case([[5, 5]], [[5, 2]], 2, 1)
    assert case.run(s_aux=torch.full((4,), 1e4)).abs().max() == 0


def test_logits_beyond_the_range_of_exp_are_finite():
    case = make_case([[5, 7]], [[5, 2]], 2, 1)
    for extras in ({}, {"cumulative_attention": torch.zeros(12)}, {"s_aux": torch.zeros(4)}):
        assert bool(replace(case, query=case.query * 1e6).run(**extras).isfinite().all())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(keys=torch.zeros(8, KEY_SIZE + 1)), r"keys \[slots, 8\].*\(8, 9\)"),
        (dict(length=torch.tensor([[4], [4]])), r"length \[1, 2\].*\(2, 1\).*\[B, H_kv, G, T, D\]"),
        (dict(query_positions=None), r"2 queries per row need query_positions \[1, 2\].*got None"),
    ],
    ids=["head_size", "length", "no_positions"],
)
def test_what_does_not_fit_is_refused(change, said):
    case = make_case([[4, 4]], [[4, 3]], 2, 2)
    with pytest.raises(ValueError, match=said):
        replace(case, **change).run()


@pytest.mark.parametrize(
    "wrong",
    [torch.empty(1, 2, 5), torch.empty(1, 2, 4).half(), torch.empty(1, 4, 2).mT],
    ids=["shape", "dtype", "strides"],
)
def test_a_logsumexp_that_does_not_fit_is_refused(wrong):
    case = make_case([[4, 4]], [[4, 3]], 2, 2)
    with pytest.raises(ValueError, match=r"expected logsumexp float32 \[1, 2, 4\] and contiguous"):
        case.run(logsumexp=wrong)


@pytest.mark.parametrize(
    ("length", "threads", "steps", "calls"),
    [
        ([[576] * 8] * 4, 1, 1, [32]),
        ([[576] * 3 + [512] + [576] * 4] + [[576] * 8] * 3, 1, 1, [32]),
        ([[8192] * 8, [2048] * 4 + [8192] * 4], 1, 1, [8, 4, 4]),
        ([[8192] * 8, [2048] * 8], 1, 1, [8, 8]),
        ([[8192] * 8, [2048] * 8], 8, 1, [8, 8]),
        # Two calls of eight heads would take sixteen threads as long as one of sixteen each.
        ([[5760] * 8, [5120] * 8], 16, 1, [16]),
        ([list(range(500, 532))], 1, 1, [32]),
        ([[8192] * 8, [2048] * 8], 1, 3, [16]),
    ],
)
def test_heads_of_other_lengths_are_attended_to_apart_where_that_is_less_work(
    length, threads, steps, calls, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    length = torch.tensor(length)
    layout = RaggedLayout(torch.full_like(length, 9000))
    query = torch.empty(*length.shape, 4, steps, 1)
    found = list(cpu._calls(layout, length.flatten().tolist(), query))
    assert [bucket.count for bucket in found] == calls
    assert [bucket.begin for bucket in found] == [9000 * bucket.first for bucket in found]
