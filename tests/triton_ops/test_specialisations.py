"""An eviction never waits for the compiler because heads hold another number of tokens."""

import pytest
import torch

from triton_ops.backend import interpreting

pytestmark = pytest.mark.skipif(
    interpreting(), reason="TRITON_INTERPRET=1 replaces the kernels by Python"
)

ROWS, HEADS, SIZE = 1, 2, 64


def repeats(tokens):
    from triton_ops.redundancy.kernel import redundancy_triton

    keys = torch.empty(ROWS, HEADS, tokens, SIZE, dtype=torch.bfloat16)
    known = torch.zeros(keys.shape[:3], dtype=torch.long)
    redundancy_triton(keys, torch.ones_like(known, dtype=torch.bool), threshold=0.5, known=known)


def scores(tokens):
    from triton_ops.window_scores.kernel import window_scores_triton

    window_scores_triton(
        torch.empty(ROWS, HEADS, 4, 8, SIZE, dtype=torch.bfloat16),
        torch.empty(ROWS, HEADS, tokens, SIZE, dtype=torch.bfloat16),
        torch.zeros(ROWS, 8, dtype=torch.long),
        torch.zeros(ROWS, HEADS, tokens, dtype=torch.long),
        0.1,
        group="max",
        sees="past",
    )


def fill_holes(tokens):
    from triton_ops.compact.kernel import compact_triton

    slots = torch.zeros(ROWS, HEADS, tokens, dtype=torch.long)
    keys = torch.empty(ROWS * HEADS * tokens, SIZE, dtype=torch.bfloat16)
    positions = torch.empty(len(keys), dtype=torch.int32)
    compact_triton([keys, positions], slots, slots, slots.bool())


def merge(tokens):
    from triton_ops.merge_state.kernel import merge_state_triton

    out, total = torch.empty(tokens, SIZE), torch.empty(tokens)
    merge_state_triton(out, total, out, total)


@pytest.mark.parametrize(
    ("launch", "count"), [(repeats, 3), (scores, 2), (fill_holes, 3), (merge, 1)]
)
def test_one_binary_serves_every_number_of_tokens(launch, count):
    from tests.support.ops.offline import compiling

    found = {}
    for tokens in (1, 15, 16, 40, 1151, 1152):
        with compiling(90) as kernels:
            launch(tokens)
        found[tokens] = {kernel.hash for kernel in kernels}
    assert len(found[1]) == count
    assert all(hashes == found[1] for hashes in found.values())
