"""Nothing waits for the compiler because there is another number of tokens, rows or chunks."""

import inspect

import pytest
import torch
from triton import runtime

from tests.support.ops.launches import CASES
from triton_ops.backend import interpreting
from triton_ops.layout import RaggedLayout, SharedPrefix

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


def attend(rows=1, capacity=1152, steps=1, prefix=None):
    """Attend in a step, a draft or a later turn, and add up what the keys receive."""
    from triton_ops.decode_attention.kernel import decode_attention_triton

    layout = RaggedLayout(torch.full((rows, HEADS), capacity))
    keys = torch.empty(layout.slots, SIZE, dtype=torch.bfloat16)
    decode_attention_triton(
        torch.empty(rows, HEADS, 4, steps, SIZE, dtype=torch.bfloat16),
        keys,
        torch.empty_like(keys),
        torch.empty(layout.slots, dtype=torch.int32),
        layout,
        layout.capacity,
        query_positions=None if steps == 1 else torch.empty(rows, steps, dtype=torch.long),
        scaling=0.1,
        softcap=None,
        s_aux=None,
        cumulative_attention=None if prefix else torch.empty(layout.slots),
        attention_weight=None,
        logsumexp=None,
        prefix=prefix,
    )


def token(rows, places=5, column=7):
    """Append a token and its queries."""
    from triton_ops.append.kernel import append_triton

    layout = RaggedLayout(torch.full((rows, HEADS), 20))
    keys = torch.empty(layout.slots, SIZE, dtype=torch.bfloat16)
    new = torch.empty(rows, HEADS, 1, SIZE, dtype=torch.bfloat16)
    asked = torch.empty(rows, 2 * HEADS, places, SIZE).bfloat16(), new.repeat(1, 2, 1, 1)
    pool = keys, torch.empty_like(keys), torch.empty(layout.slots, dtype=torch.int32)
    append_triton(pool, layout.start, layout.capacity, (new, new), column, asked)


def branch(count, capacity=1152):
    """Attend to a prefix that some rows share."""
    layout = RaggedLayout(torch.full((1, HEADS), capacity))
    keys = torch.empty(layout.slots, SIZE, dtype=torch.bfloat16)
    owner = torch.zeros(count, dtype=torch.long)
    held = SharedPrefix(keys, torch.empty_like(keys), layout, layout.capacity, owner)
    attend(count, 64, prefix=held)


TOKENS = (1, 15, 16, 40, 1151, 1152)
MANY = (17, 24, 31, 32, 33, 320)
"""Steps of a turn, or branches, that need the largest tile; fewer have tiles of their own."""


@pytest.mark.parametrize(
    ("launch", "count", "sizes"),
    [
        (repeats, 3, TOKENS),
        (scores, 2, TOKENS),
        (fill_holes, 3, TOKENS),
        (merge, 1, TOKENS),
        (lambda tokens: attend(capacity=tokens), 2, (*TOKENS, 40_000)),
        (lambda rows: attend(rows=rows), 2, (1, 3, 16, 64)),
        (lambda steps: attend(steps=steps), 3, MANY),
        (branch, 2, MANY),
        (lambda tokens: branch(32, tokens), 2, (*TOKENS, 40_000)),
        (token, 1, (1, 3, 16, 64)),
        (lambda places: token(2, places), 1, TOKENS),
        (lambda column: token(2, column=column), 1, TOKENS),
    ],
    ids=[
        "repeats",
        "scores",
        "fill_holes",
        "merge",
        "tokens",
        "rows",
        "steps",
        "branches",
        "prefix",
        "appended rows",
        "places",
        "columns",
    ],
)
def test_one_binary_serves_every_number(launch, count, sizes):
    from tests.support.ops.offline import compiling

    found = {}
    for size in sizes:
        with compiling(90) as kernels:
            launch(size)
        found[size] = {kernel.hash for kernel in kernels}
    first = found[sizes[0]]
    assert len(first) == count
    assert all(hashes == first for hashes in found.values())


KINDS = ("key", "value", "scale", "query")
STRIDES = {f"{each}_{axis}" for each in KINDS for axis in ("row", "head")}
MODEL = {"heads", "query_heads", "group", "lines", "size"} | STRIDES
"""What a model and a scorer fix once; such numbers may be part of a binary."""


def test_no_count_is_part_of_a_binary(monkeypatch):
    seen = set()

    def look(kernel, *args, grid, warmup, **kwargs):
        given = inspect.signature(kernel.fn).bind(
            *args, **{key: value for key, value in kwargs.items() if not key.startswith("num_")}
        )
        kept = {*kernel.do_not_specialize, *(kernel.arg_names[each] for each in kernel.constexprs)}
        for name, value in given.arguments.items():
            if isinstance(value, int) and name not in kept:
                seen.add((kernel.fn.__name__, name))

    monkeypatch.setattr(runtime.JITFunction, "run", look)
    for _, case in CASES.values():
        case()
    assert {name for _, name in seen} <= MODEL, sorted(seen)
    assert ("attend_kernel", "heads") in seen
