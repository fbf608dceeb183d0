"""decode_attention against softmax attention written out head by head in float64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_ops.decode_attention import decode_attention
from triton_ops.layout import RaggedLayout

KEY_SIZE, VALUE_SIZE = 8, 6
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
POISON = 1e4
"""What unused slots hold: finite, as the pool promises, and large enough to be seen."""


@dataclass
class Case:
    """A filled pool and queries."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    layout: RaggedLayout
    length: torch.Tensor
    query_positions: torch.Tensor | None

    def head(self, row, head):
        """The slots that a head uses."""
        start = int(self.layout.start[row, head])
        return slice(start, start + int(self.length[row, head]))

    def run(self, **settings):
        return decode_attention(
            self.query,
            self.keys,
            self.values,
            self.positions,
            self.layout,
            self.length,
            query_positions=self.query_positions,
            scaling=0.3,
            **settings,
        )


def make_case(capacity, length, group, steps, *, dtype=torch.float32, seed=0, asking=None):
    """Random tokens at shuffled positions; the last query stands at the last position."""
    capacity, length = torch.tensor(capacity), torch.tensor(length)
    layout, generator = RaggedLayout(capacity), torch.Generator().manual_seed(seed)
    keys = torch.full((layout.slots, KEY_SIZE), POISON)
    values = torch.full((layout.slots, VALUE_SIZE), POISON)
    positions = torch.zeros(layout.slots, dtype=torch.int32)
    end = int(length.max())
    for start, used in zip(layout.start.flatten().tolist(), length.flatten().tolist(), strict=True):
        own = slice(start, start + used)
        keys[own] = torch.randn(used, KEY_SIZE, generator=generator)
        values[own] = torch.randn(used, VALUE_SIZE, generator=generator)
        positions[own] = torch.randperm(end, generator=generator)[:used].int()
    batch, heads = capacity.shape
    if asking is None and steps > 1:
        asking = torch.arange(end - steps, end).expand(batch, steps)
    query = torch.randn(batch, heads, group, steps, KEY_SIZE, generator=generator)
    return Case(
        query.to(dtype), keys.to(dtype), values.to(dtype), positions, layout, length, asking
    )


def expected(case, *, softcap=None, s_aux=None, mass_weight=None):
    """Output `[B, T, H_q, D_v]` and mass per slot, in float64; NaN where a query sees nothing."""
    batch, heads, group, steps, _ = case.query.shape
    out = torch.full((batch, steps, heads * group, VALUE_SIZE), math.nan, dtype=torch.float64)
    mass = torch.zeros(case.layout.slots, dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            own = case.head(row, head)
            k, v = case.keys[own].double(), case.values[own].double()
            for g in range(group):
                for t in range(steps):
                    seen = torch.ones(k.shape[0], dtype=torch.bool)
                    if case.query_positions is not None:
                        seen = case.positions[own] <= case.query_positions[row, t]
                    if not bool(seen.any()):
                        continue
                    logits = k @ case.query[row, head, g, t].double() * 0.3
                    if softcap is not None:
                        logits = softcap * torch.tanh(logits / softcap)
                    weights = logits.exp() * seen
                    total = weights.sum()
                    if s_aux is not None:
                        total = total + s_aux[head * group + g].double().exp()
                    weights = weights / total
                    out[row, t, head * group + g] = weights @ v
                    mass[own] += weights * (1.0 if mass_weight is None else float(mass_weight[t]))
    return out, mass


def assert_close(found, wanted, tolerance):
    """Compare where something was seen; everywhere else any finite number will do."""
    assert found.shape == wanted.shape
    assert bool(found.isfinite().all())
    sees = ~wanted.isnan()
    torch.testing.assert_close(found.double()[sees], wanted[sees], atol=tolerance, rtol=tolerance)


SHAPES = {
    "one_head": ([[4]], [[3]]),
    "one_token": ([[1, 1]], [[1, 1]]),
    "full": ([[7, 7], [7, 7]], [[7, 7], [7, 7]]),
    "ragged_in_one_bucket": ([[9, 9], [9, 9]], [[9, 1], [5, 8]]),
    "several_buckets": ([[9, 4, 33], [4, 17, 9]], [[9, 3, 31], [1, 17, 5]]),
    "unordered_buckets": ([[33, 1, 9], [2, 17, 1]], [[32, 1, 9], [1, 3, 1]]),
    "empty_heads": ([[0, 5, 5], [5, 2, 0]], [[0, 0, 5], [4, 0, 0]]),
    "odd_and_large": ([[129, 257], [131, 257]], [[129, 200], [1, 257]]),
}
EXTRAS = {
    "plain": (),
    "s_aux": ("s_aux",),
    "softcap": ("softcap",),
    "mass": ("mass",),
    "everything": ("s_aux", "softcap", "mass", "mass_weight"),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64_head_by_head(shape, extras, dtype):
    for group, steps in ((1, 1), (4, 1), (5, 1), (1, 3), (4, 5)):
        case = make_case(*SHAPES[shape], group, steps, dtype=dtype)
        heads, wanted = SHAPES[shape][0], EXTRAS[extras]
        arguments = {}
        if "s_aux" in wanted:
            arguments["s_aux"] = torch.linspace(-1, 2, len(heads[0]) * group).to(dtype)
        if "softcap" in wanted:
            arguments["softcap"] = 1.5
        if "mass_weight" in wanted:
            arguments["mass_weight"] = 0.5 ** torch.arange(steps - 1, -1, -1)
        out, mass = expected(case, **arguments)
        before = torch.rand(case.layout.slots) if "mass" in wanted else None
        found = None if before is None else before.clone()
        assert_close(case.run(mass=found, **arguments), out, TOLERANCE[dtype])
        if found is not None:
            tolerance = TOLERANCE[dtype] * group * steps
            torch.testing.assert_close(
                (found - before).double(), mass, atol=tolerance, rtol=TOLERANCE[dtype]
            )


@st.composite
def cases(draw):
    """Small ragged pools; a query may stand before, among or after all keys, or be padding (-1)."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=3))
    capacity = [[draw(st.sampled_from(sizes)) for _ in range(heads)] for _ in range(batch)]
    length = [[draw(st.integers(0, slots)) for slots in row] for row in capacity]
    group, steps = draw(st.sampled_from([1, 4, 5])), draw(st.integers(1, 4))
    asking = None
    if steps > 1 or draw(st.booleans()):
        row = st.lists(st.integers(-1, 12), min_size=steps, max_size=steps)
        asking = torch.tensor([draw(row) for _ in range(batch)])
    return make_case(capacity, length, group, steps, seed=draw(st.integers(0, 99)), asking=asking)


OPTIONS = st.fixed_dictionaries(
    {"softcap": st.sampled_from([None, 0.7, 20.0]), "sinks": st.booleans(), "mass": st.booleans()}
)


def arguments_of(case, options):
    _, heads, group, *_ = case.query.shape
    return {
        "softcap": options["softcap"],
        "s_aux": torch.linspace(-1, 1, heads * group) if options["sinks"] else None,
        "mass": torch.zeros(case.layout.slots) if options["mass"] else None,
    }


@settings(max_examples=60)
@given(case=cases(), options=OPTIONS)
def test_any_pool_equals_float64_head_by_head(case, options):
    arguments = arguments_of(case, options)
    out, mass = expected(case, softcap=options["softcap"], s_aux=arguments["s_aux"])
    assert_close(case.run(**arguments), out, 2e-5)
    if options["mass"]:
        torch.testing.assert_close(arguments["mass"].double(), mass, atol=1e-4, rtol=1e-4)


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
    if options["mass"]:
        torch.testing.assert_close(second["mass"], first["mass"][order], atol=1e-5, rtol=1e-5)


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
    if options["mass"]:
        torch.testing.assert_close(parts["mass"], whole["mass"], atol=1e-5, rtol=1e-5)


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
    case.run(softcap=2.0, s_aux=torch.zeros(8), mass=torch.zeros(case.layout.slots))
    after = (case.query, case.keys, case.values, case.positions, case.length)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_huge_sink_takes_all_weight():
    case = make_case([[5, 5]], [[5, 2]], 2, 1)
    assert case.run(s_aux=torch.full((4,), 1e4)).abs().max() == 0


def test_logits_beyond_the_range_of_exp_are_finite():
    case = make_case([[5, 7]], [[5, 2]], 2, 1)
    for extras in ({}, {"mass": torch.zeros(12)}, {"s_aux": torch.zeros(4)}):
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
