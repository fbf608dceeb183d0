"""Rows that share prefixes, and the same rows with a copy of the prefix each."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from tests.support.ops.attention_cases import Case, make_case, seen_only
from triton_ops.layout import RaggedLayout, SharedPrefix
from triton_ops.prefix_attention import prefix_attention
from triton_ops.prefix_attention.reference import prefix_attention_reference

EVERYWHERE = -100
"""A position that every query sees, padding at -1 included."""


@dataclass
class Shared:
    """Rows with tokens of their own behind a shared prefix."""

    own: Case
    prefix: SharedPrefix

    def run(self, device="cpu", attention=prefix_attention, **settings):
        own, prefix = self.own.to(device), self.prefix
        keys, values = (x.to(device) for x in (prefix.keys, prefix.values))
        return attention(
            own.query,
            replace(prefix, keys=keys, values=values),
            own.keys,
            own.values,
            own.positions,
            own.layout,
            own.length,
            query_positions=own.query_positions,
            scaling=0.3,
            **settings,
        )

    def expected(self, **settings):
        """Output and logsumexp by the definition in float64; NaN for a query that sees nothing."""
        keys, values = (x.double() for x in (self.prefix.keys, self.prefix.values))
        case = Shared(self.own.double(), replace(self.prefix, keys=keys, values=values))
        batch, heads, group, steps, _ = self.own.query.shape
        lse = torch.zeros(batch, steps, heads * group, dtype=torch.float64)
        out = case.run(attention=prefix_attention_reference, logsumexp=lse, **settings)
        return seen_only(out), lse

    def copied(self):
        """A case in which every row holds its own copy of the prefix."""
        own, prefix = self.own, self.prefix
        length = own.length + prefix.length[prefix.owner]
        layout = RaggedLayout(length)
        keys, values = (x.new_zeros(layout.slots, x.shape[1]) for x in (own.keys, own.values))
        positions = torch.full((layout.slots,), EVERYWHERE, dtype=torch.int32)
        for row, owner in enumerate(prefix.owner.tolist()):
            for head in range(length.shape[1]):
                to, held = layout.head(row, head, length), own.head(row, head)
                shared = prefix.layout.head(owner, head, prefix.length)
                keys[to] = torch.cat([prefix.keys[shared], own.keys[held]])
                values[to] = torch.cat([prefix.values[shared], own.values[held]])
                positions[to.stop - (held.stop - held.start) : to.stop] = own.positions[held]
        return Case(own.query, keys, values, positions, layout, length, own.query_positions)


def make_shared(own, prefix, owner, group, steps, **settings):
    """Pairs `(capacity, length)` of the rows' own tokens and of the prefixes."""
    rows = make_case(*own, group, steps, **settings)
    pool = make_case(*prefix, group, 1, **settings | {"seed": 7})
    return Shared(
        rows,
        SharedPrefix(pool.keys, pool.values, pool.layout, pool.length, torch.tensor(owner)),
    )


SHAPES = {
    "one_branch": (([[4]], [[3]]), ([[9]], [[7]]), [0]),
    "four_branches": (([[9, 5]] * 4, [[3, 5], [0, 1], [9, 2], [1, 1]]), ([[70, 66]],) * 2, [0] * 4),
    "mixed_owners": (
        ([[5, 9]] * 5, [[5, 2], [1, 1], [4, 9], [0, 0], [3, 3]]),
        ([[9, 140], [33, 8], [5, 5]], [[9, 131], [30, 8], [1, 0]]),
        [1, 0, 1, 2, 0],
    ),
    "a_prefix_without_rows": (([[4]] * 2, [[3], [1]]), ([[9], [5]], [[7], [2]]), [1, 1]),
    "no_prefix_at_all": (([[4, 4]], [[3, 1]]), ([[0, 5]], [[0, 0]]), [0]),
    "nothing_of_their_own": (([[0, 3]] * 2, [[0, 0]] * 2), ([[20, 5]], [[17, 5]]), [0, 0]),
}


@st.composite
def shared_cases(draw):
    """Few rows and prefixes of any lengths, some empty."""
    batch, prefixes, heads = (draw(st.integers(1, most)) for most in (4, 2, 2))

    def pool(rows):
        capacity = [[draw(st.integers(0, 9)) for _ in range(heads)] for _ in range(rows)]
        return capacity, [[draw(st.integers(0, slots)) for slots in row] for row in capacity]

    owner = [draw(st.integers(0, prefixes - 1)) for _ in range(batch)]
    group, steps = draw(st.sampled_from([1, 3])), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 99))
    return make_shared(pool(batch), pool(prefixes), owner, group, steps, seed=seed)
