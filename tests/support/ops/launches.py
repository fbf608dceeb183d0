"""What the operations launch, in the sizes of real models; nothing here has to run."""

import torch

from triton_ops.layout import RaggedLayout, SharedPrefix

BATCH, KV_HEADS, CAPACITY = 2, 8, 1152


def pool(dtype, head_size):
    layout = RaggedLayout(torch.full((BATCH, KV_HEADS), CAPACITY))
    keys, values = (torch.empty(layout.slots, head_size, dtype=dtype) for _ in range(2))
    return keys, values, torch.empty(layout.slots, dtype=torch.int32), layout, layout.capacity


def of_codes(dtype, codes):
    """Scales of the keys and values of a pool, which are columns of one field; or none."""
    if not codes:
        return {}
    slots = BATCH * KV_HEADS * CAPACITY
    keys, values = torch.empty(slots, 2, dtype=dtype).unbind(-1)
    return {"key_scales": keys, "value_scales": values}


def decode(dtype, head_size, group, steps=1, extras=False, codes=False):
    """Launch what `decode_attention` launches, with or without all that is optional."""
    from triton_ops.decode_attention.kernel import decode_attention_triton

    keys, values, positions, layout, length = pool(torch.uint8 if codes else dtype, head_size)
    decode_attention_triton(
        torch.empty(BATCH, KV_HEADS, group, steps, head_size, dtype=dtype),
        keys,
        values,
        positions,
        layout,
        length,
        query_positions=None if steps == 1 else torch.empty(BATCH, steps, dtype=torch.long),
        scaling=head_size**-0.5,
        softcap=30.0 if extras else None,
        s_aux=torch.empty(KV_HEADS * group, dtype=dtype) if extras else None,
        cumulative_attention=torch.empty(layout.slots) if extras else None,
        attention_weight=torch.empty(steps) if extras else None,
        logsumexp=None,
        **of_codes(dtype, codes),
    )


def latents(dtype, heads, steps=1, extras=False, apart=False, codes=False):
    """Launch what `decode_attention` launches for the latents of DeepSeek: 512 + 64 numbers.

    The first 512 are the value, unless keys and values are held `apart`.
    """
    from triton_ops.decode_attention.kernel import decode_attention_triton

    layout = RaggedLayout(torch.full((BATCH, 1), CAPACITY))
    keys = torch.empty(layout.slots, 576, dtype=torch.uint8 if codes else dtype)
    scales = torch.empty(layout.slots, dtype=dtype) if codes else None
    decode_attention_triton(
        torch.empty(BATCH, 1, heads, steps, 576, dtype=dtype),
        keys,
        torch.empty(layout.slots, 512, dtype=dtype) if apart else keys[:, :512],
        torch.empty(layout.slots, dtype=torch.int32),
        layout,
        layout.capacity,
        query_positions=None if steps == 1 else torch.empty(BATCH, steps, dtype=torch.long),
        scaling=192**-0.5,
        softcap=None,
        s_aux=None,
        cumulative_attention=torch.empty(layout.slots) if extras else None,
        attention_weight=None,
        logsumexp=None,
        key_scales=scales,
        value_scales=scales,
    )


def branches(dtype, head_size, group, count, codes=False, first=None):
    """Launch what `prefix_attention` launches for one prefix, and what `merge_state` does.

    With `first`, so many numbers of a key are its value.
    """
    from triton_ops.decode_attention.kernel import decode_attention_triton
    from triton_ops.merge_state.kernel import merge_state_triton

    keys, values, positions, _, _ = pool(torch.uint8 if codes else dtype, head_size)
    scales = of_codes(dtype, codes)
    if first is not None:
        values = keys[:, :first]
    layout = RaggedLayout(torch.full((count, KV_HEADS), 64))
    shared = RaggedLayout(torch.full((1, KV_HEADS), CAPACITY))
    prefix = SharedPrefix(
        keys, values, shared, shared.capacity, torch.zeros(count, dtype=torch.long), **scales
    )
    out = decode_attention_triton(
        torch.empty(count, KV_HEADS, group, 1, head_size, dtype=dtype),
        keys,
        values,
        positions,
        layout,
        layout.capacity,
        query_positions=None,
        scaling=head_size**-0.5,
        softcap=None,
        s_aux=None,
        cumulative_attention=None,
        attention_weight=None,
        logsumexp=None,
        prefix=prefix,
        **scales,
    )
    merge_state_triton(out, out[..., 0], out, out[..., 0])


def scores(dtype, head_size, group, window, pooling):
    """Launch what `window_scores` launches."""
    from triton_ops.window_scores.kernel import window_scores_triton

    window_scores_triton(
        torch.empty(BATCH, KV_HEADS, group, window, head_size, dtype=dtype),
        torch.empty(BATCH, KV_HEADS, CAPACITY, head_size, dtype=dtype),
        torch.zeros(BATCH, window, dtype=torch.long),
        torch.zeros(BATCH, KV_HEADS, CAPACITY, dtype=torch.long),
        head_size**-0.5,
        group=pooling,
        sees="past",
    )


def repeats(dtype, head_size):
    """Launch what `redundancy` launches."""
    from triton_ops.redundancy.kernel import redundancy_triton
    from triton_ops.redundancy.places import UNSEEN

    keys = torch.empty(BATCH, KV_HEADS, CAPACITY, head_size, dtype=dtype)
    known = torch.full(keys.shape[:3], UNSEEN)
    redundancy_triton(keys, torch.ones_like(known, dtype=torch.bool), threshold=0.5, known=known)


def fill_holes(dtype, head_size):
    """Launch what `compact` launches."""
    from triton_ops.compact.kernel import compact_triton

    keys, values, positions, layout, _ = pool(dtype, head_size)
    slots = torch.zeros(BATCH, KV_HEADS, CAPACITY, dtype=torch.long)
    compact_triton([keys, values, positions, torch.empty(layout.slots)], slots, slots, slots.bool())


def one_token(dtype, head_size, group=0, fields=2):
    """Launch what `append` launches for keys and values, or for one field that is both; with or
    without a ring of queries.
    """
    from triton_ops.append.kernel import append_triton

    keys, values, positions, layout, length = pool(dtype, head_size)
    new = torch.empty(BATCH, KV_HEADS, 1, head_size, dtype=dtype)
    asked = None
    if group:
        heads = KV_HEADS * group
        asked = (
            torch.empty(BATCH, heads, 8, head_size, dtype=dtype),
            torch.empty(BATCH, heads, 1, head_size, dtype=dtype),
        )
    held = (keys, values)[:fields]
    append_triton((*held, positions), layout.start, length, (new,) * fields, 7, asked)


def one_token_in_codes(dtype, head_size, fields=2):
    """Launch what turns a token into codes, and what appends these and their scales."""
    from triton_ops.append.kernel import append_triton
    from triton_ops.fp8.kernel import quantise_triton

    keys, values, positions, layout, length = pool(torch.uint8, head_size)
    held = *(keys, values)[:fields], torch.empty(layout.slots, fields, dtype=dtype), positions
    codes, scales = quantise_triton(torch.empty(BATCH, KV_HEADS, 1, head_size, dtype=dtype))
    new = *(codes,) * fields, torch.stack([scales] * fields, -1)
    append_triton(held, layout.start, length, new, 7)


def prompt_in_codes(dtype, head_size):
    """Launch what turns a prompt into codes."""
    from triton_ops.fp8.kernel import quantise_triton

    quantise_triton(torch.empty(BATCH, KV_HEADS, CAPACITY, head_size, dtype=dtype))


def formula():
    """Launch what `find_repeats` and `rkv_scores` launch."""
    from triton_ops.rkv.kernel import find_repeats_triton, rkv_scores_triton

    numbers = torch.empty(BATCH, KV_HEADS, CAPACITY)
    places = torch.zeros(numbers.shape, dtype=torch.long)
    find_repeats_triton(places.int(), places)
    rkv_scores_triton(numbers, numbers, places, places, lam=0.1, kernel=7)


def layers_at_once(dtype, head_size):
    """Launch what an eviction from the pools of two layers does besides scoring."""
    from triton_ops.pools import HeadsOfPools, Pools

    keys, values, positions, layout, length = pool(dtype, head_size)
    notes = torch.empty_like(positions)
    fields = {"keys": keys, "values": values, "positions": positions, "notes": notes}
    table = torch.stack([length, length, layout.start, length]).repeat(1, 2, 1)
    first = torch.zeros(2 * BATCH, dtype=torch.long)
    pools = Pools.of([fields] * 2, [length] * 2, ["notes"])
    held = HeadsOfPools.read(pools, table, first, CAPACITY)
    held.field("keys")
    held.write("notes", held.field("notes"))
    held.compact(torch.zeros_like(held.offset, dtype=torch.bool), table[3])


# What is launched, and how many programs of each kernel must fit one multiprocessor: two wherever
# latency has to be hidden, one where a single program fills it.
CASES = {
    "decode: Llama 8B": (2, lambda: decode(torch.bfloat16, 128, 4)),
    "decode: Qwen3 14B": (2, lambda: decode(torch.bfloat16, 128, 5)),
    "decode: GPT-OSS": (2, lambda: decode(torch.bfloat16, 64, 8, extras=True)),
    "decode: Phi-3 mini": (2, lambda: decode(torch.bfloat16, 96, 1)),
    "decode: Gemma 3": (2, lambda: decode(torch.bfloat16, 256, 2)),
    "decode: Gemma 3, all extras": (2, lambda: decode(torch.bfloat16, 256, 2, extras=True)),
    "decode: size 512": (2, lambda: decode(torch.bfloat16, 512, 8, extras=True)),
    "decode: float16, all extras": (2, lambda: decode(torch.float16, 128, 4, extras=True)),
    "decode: float32, all extras": (2, lambda: decode(torch.float32, 128, 4, extras=True)),
    "decode: latents, 16 heads": (2, lambda: latents(torch.bfloat16, 16, extras=True)),
    "decode: latents, 128 heads": (1, lambda: latents(torch.bfloat16, 128)),
    "decode: latents, values apart": (1, lambda: latents(torch.bfloat16, 16, apart=True)),
    "decode: latents, float32": (1, lambda: latents(torch.float32, 16, extras=True)),
    "decode: latents, fp8, 16 heads": (
        2,
        lambda: latents(torch.bfloat16, 16, extras=True, codes=True),
    ),
    "decode: latents, fp8, 128 heads": (1, lambda: latents(torch.bfloat16, 128, codes=True)),
    "decode: Llama 8B, fp8": (2, lambda: decode(torch.bfloat16, 128, 4, codes=True)),
    "decode: fp8, all extras": (
        2,
        lambda: decode(torch.float16, 128, 4, extras=True, codes=True),
    ),
    "decode: fp8, float32": (2, lambda: decode(torch.float32, 128, 4, codes=True)),
    "draft of 8": (1, lambda: decode(torch.bfloat16, 128, 4, steps=8)),
    "second turn": (1, lambda: decode(torch.bfloat16, 128, 4, steps=64, extras=True)),
    "second turn: size 256": (1, lambda: decode(torch.bfloat16, 256, 4, steps=64)),
    "second turn: size 512": (1, lambda: decode(torch.bfloat16, 512, 8, steps=64)),
    "second turn: latents": (1, lambda: latents(torch.bfloat16, 16, steps=64, extras=True)),
    "second turn: latents, fp8": (
        1,
        lambda: latents(torch.bfloat16, 16, steps=64, extras=True, codes=True),
    ),
    "second turn: float32": (1, lambda: decode(torch.float32, 256, 4, steps=64, extras=True)),
    "second turn: fp8": (
        1,
        lambda: decode(torch.bfloat16, 128, 4, steps=64, extras=True, codes=True),
    ),
    "16 branches, fp8": (1, lambda: branches(torch.bfloat16, 128, 4, 16, codes=True)),
    "16 branches: latents": (1, lambda: branches(torch.bfloat16, 576, 16, 16, first=512)),
    "16 branches: latents, fp8": (
        1,
        lambda: branches(torch.bfloat16, 576, 16, 16, codes=True, first=512),
    ),
    "16 branches": (1, lambda: branches(torch.bfloat16, 128, 4, 16)),
    "64 branches: size 256": (1, lambda: branches(torch.bfloat16, 256, 2, 64)),
    "64 branches: size 512": (1, lambda: branches(torch.bfloat16, 512, 8, 64)),
    "16 branches: float32": (1, lambda: branches(torch.float32, 128, 4, 16)),
    "R-KV scores": (2, lambda: scores(torch.bfloat16, 128, 4, 8, "max")),
    "SnapKV scores": (2, lambda: scores(torch.bfloat16, 128, 5, 8, "mean")),
    "Kara scores": (2, lambda: scores(torch.bfloat16, 128, 4, 512, "mean")),
    "scores: size 256": (1, lambda: scores(torch.float16, 256, 2, 512, "max")),
    "scores: size 512": (1, lambda: scores(torch.bfloat16, 512, 8, 8, "max")),
    "scores: latents": (1, lambda: scores(torch.bfloat16, 576, 16, 8, "max")),
    "scores: float32": (1, lambda: scores(torch.float32, 256, 2, 8, "max")),
    "redundancy": (2, lambda: repeats(torch.bfloat16, 128)),
    "redundancy: size 96": (2, lambda: repeats(torch.float16, 96)),
    "redundancy: size 256": (1, lambda: repeats(torch.bfloat16, 256)),
    "redundancy: size 512": (1, lambda: repeats(torch.bfloat16, 512)),
    "redundancy: latents": (1, lambda: repeats(torch.bfloat16, 576)),
    "redundancy: float32": (1, lambda: repeats(torch.float32, 128)),
    "redundancy: float32, size 256": (1, lambda: repeats(torch.float32, 256)),
    "compact": (2, lambda: fill_holes(torch.bfloat16, 128)),
    "compact: size 80": (2, lambda: fill_holes(torch.float32, 80)),
    "R-KV formula": (2, formula),
    "layers at once": (2, lambda: layers_at_once(torch.bfloat16, 128)),
    "layers at once: float32, size 80": (2, lambda: layers_at_once(torch.float32, 80)),
    "quantise": (2, lambda: prompt_in_codes(torch.bfloat16, 128)),
    "quantise: latents": (2, lambda: prompt_in_codes(torch.bfloat16, 576)),
    "quantise: float32, size 96": (2, lambda: prompt_in_codes(torch.float32, 96)),
    "append: fp8": (2, lambda: one_token_in_codes(torch.bfloat16, 128)),
    "append: latents, fp8": (2, lambda: one_token_in_codes(torch.bfloat16, 576, fields=1)),
    "append: fp8, float16": (2, lambda: one_token_in_codes(torch.float16, 80)),
    "append": (2, lambda: one_token(torch.bfloat16, 128)),
    "append: size 512": (2, lambda: one_token(torch.bfloat16, 512)),
    "append: queries": (2, lambda: one_token(torch.bfloat16, 128, group=4)),
    "append: latents": (2, lambda: one_token(torch.bfloat16, 576, fields=1)),
    "append: float32, size 96": (2, lambda: one_token(torch.float32, 96)),
}
