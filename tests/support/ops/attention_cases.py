"""Ragged pools to attend to, and what the definition says of them in float64."""

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from triton_ops.decode_attention import decode_attention
from triton_ops.decode_attention.reference import decode_attention_reference
from triton_ops.layout import RaggedLayout

KEY_SIZE, VALUE_SIZE = 8, 6
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
        return self.layout.head(row, head, self.length)

    def double(self):
        """The same in float64."""
        fields = {name: getattr(self, name).double() for name in ("query", "keys", "values")}
        return replace(self, **fields)

    def to(self, device):
        """The same on another device; layout and length stay on the CPU."""
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor) and name != "length"
        }
        return replace(self, **moved)

    def run(self, attention=decode_attention, **settings):
        return attention(
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


def make_case(
    capacity,
    length,
    group,
    steps,
    *,
    dtype=torch.float32,
    seed=0,
    asking=None,
    sizes=(KEY_SIZE, VALUE_SIZE),
    poison=POISON,
):
    """Random tokens at shuffled positions; the last query stands at the last position."""
    capacity, length = torch.tensor(capacity), torch.tensor(length)
    layout, generator = RaggedLayout(capacity), torch.Generator().manual_seed(seed)
    keys = torch.full((layout.slots, sizes[0]), poison)
    values = torch.full((layout.slots, sizes[1]), poison)
    positions = torch.zeros(layout.slots, dtype=torch.int32)
    end = int(length.max())
    for start, used in zip(layout.start.flatten().tolist(), length.flatten().tolist(), strict=True):
        own = slice(start, start + used)
        keys[own] = torch.randn(used, sizes[0], generator=generator)
        values[own] = torch.randn(used, sizes[1], generator=generator)
        positions[own] = torch.randperm(end, generator=generator)[:used].int()
    batch, heads = capacity.shape
    if asking is None and steps > 1:
        asking = torch.arange(end - steps, end).expand(batch, steps)
    query = torch.randn(batch, heads, group, steps, sizes[0], generator=generator)
    return Case(
        query.to(dtype), keys.to(dtype), values.to(dtype), positions, layout, length, asking
    )


def expected(case, **settings):
    """Output `[B, T, H_q, D_v]`, attention per slot and logsumexp `[B, T, H_q]` by definition.

    The output of a query that sees nothing is NaN.
    """
    batch, heads, group, steps, _ = case.query.shape
    cumulative_attention = torch.zeros(case.layout.slots, dtype=torch.float64)
    lse = torch.zeros(batch, steps, heads * group, dtype=torch.float64)
    run = case.double().run
    out = run(
        attention=decode_attention_reference,
        cumulative_attention=cumulative_attention,
        logsumexp=lse,
        **settings,
    )
    return seen_only(out), cumulative_attention, lse


def seen_only(out):
    """Let the output of queries that see nothing, which is 0 by the definition, be NaN."""
    return out.where(out.any(-1, keepdim=True), math.nan)


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
    {
        "softcap": st.sampled_from([None, 0.7, 20.0]),
        "sinks": st.booleans(),
        "cumulative_attention": st.booleans(),
    }
)


def arguments_of(case, options):
    _, heads, group, *_ = case.query.shape
    return {
        "softcap": options["softcap"],
        "s_aux": torch.linspace(-1, 1, heads * group) if options["sinks"] else None,
        "cumulative_attention": torch.zeros(case.layout.slots)
        if options["cumulative_attention"]
        else None,
    }
