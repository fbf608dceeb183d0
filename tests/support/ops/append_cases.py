"""Requests to append a token to a ragged pool, and what must hold after any of them."""

import torch
from hypothesis import strategies as st

from triton_ops.append import append
from triton_ops.layout import RaggedLayout


@st.composite
def requests(draw):
    """A pool with room in every head, the sizes, type and column of the token, a ring's shape."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    each = st.integers(1, 5)
    numbers = [[draw(each) for _ in range(shape[1])] for _ in range(shape[0])]
    layout = RaggedLayout(torch.tensor(numbers))
    length = torch.tensor([[draw(st.integers(0, n - 1)) for n in row] for row in numbers])
    sizes = draw(
        st.sampled_from([(1, 1), (16, 16), (20, 8), (64, 40), (40,), (20, 8, 2), (64, 64, 1)])
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    # Codes of keys and values come with scales.
    dtypes = (torch.uint8, torch.uint8, dtype) if len(sizes) == 3 else (dtype,) * len(sizes)
    ring = draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40)))
    return layout, length, sizes, dtypes, draw(st.integers(0, 2**30)), draw(st.booleans()), ring


def check(request, device="cpu"):
    """The token lies behind the last one of its head, its queries at the column's place of a ring,
    if there is one, and nothing else changes but the count.
    """
    layout, length, sizes, dtypes, column, counted, shape = request
    batch, heads = length.shape
    kinds = list(zip(sizes, dtypes, strict=True))
    fields = [(9 * torch.rand(layout.slots, n)).to(device, dtype) for n, dtype in kinds]
    fields.append(torch.randint(0, 9, (layout.slots,), dtype=torch.int32).to(device))
    # As a model makes them: heads beside each other in memory, tokens outside.
    new = [(9 * torch.rand(batch, 1, heads, n)).to(device, dtype) for n, dtype in kinds]
    new = [each.transpose(1, 2) for each in new]
    wanted = [field.clone() for field in fields]
    for row in range(batch):
        for head in range(heads):
            slot = int(layout.start[row, head] + length[row, head])
            for field, each in zip(wanted, [*new, None], strict=True):
                field[slot] = column if each is None else each[row, head, 0]
    there = length.to(device, copy=True)
    at = torch.tensor([column], device=device) if counted else column
    asked = None
    if shape is not None:
        group, places, size = shape
        query = torch.randn(batch, 1, heads * group, size).to(device, dtypes[-1]).transpose(1, 2)
        asked = torch.randn(batch, heads * group, places, size).to(device, dtypes[-1]), query
        kept = asked[0].clone()
        kept[:, :, column % places] = query[:, :, 0]
    append(tuple(fields), layout.start.to(device), there, tuple(new), at, asked)
    assert asked is None or torch.equal(asked[0], kept)
    for field, expected in zip(fields, wanted, strict=True):
        assert torch.equal(field, expected)
    assert torch.equal(there.cpu(), length + 1)
