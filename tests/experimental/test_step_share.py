"""Shared steps: exact when nothing is shared, and equal to an oracle when something is."""

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache.experimental.blocks import BlockLayer
from hf_reasoncache.experimental.rotation import Rotation
from hf_reasoncache.experimental.step_share import StepShareCache
from hf_reasoncache.experimental.steps import Boundaries
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import build, prompt

STOP = 7
BOUNDARIES = Boundaries((), tokens=(STOP,), maximum=12)


class Nothing:
    """Boundaries are ids here, so no text is ever asked for."""


def make(model, **settings):
    return StepShareCache(
        model, Nothing(), **(dict(boundaries=BOUNDARIES, block=4, distance=10.0) | settings)
    )


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding", "gpt_oss"])
@pytest.mark.parametrize("sampled", [False, True])
def test_without_sharing_it_is_dynamic_cache(name, sampled):
    model = build(name, "eager" if name == "gpt_oss" else "sdpa")
    arguments = prompt() | dict(do_sample=sampled, num_return_sequences=3 if sampled else 1)
    arguments |= dict(max_new_tokens=30, prefill_chunk_size=4)
    torch.manual_seed(0)
    expected = model.generate(**arguments)
    cache = make(model, distance=0.0, branches=3 if sampled else 1)
    for _ in range(2):
        torch.manual_seed(0)
        out = model.generate(**arguments, **cache_kwarg(cache), stopping_criteria=[cache.watcher])
        assert torch.equal(out, expected)
        report = cache.report()
        assert report.steps >= 2 and report.shared_blocks == report.saved_bytes == 0
        cache.reset()


def dynamic_bytes(model, columns, rows):
    config = model.config
    per_token = 2 * config.num_key_value_heads * config.head_dim * 4 * config.num_hidden_layers
    return per_token * columns * rows


STEP = [11, 12, 13, 14, 15, STOP]
IDS = [3, 4, 5, 6, 20, STOP, *STEP, 21, 22, 23, STOP, *STEP, *STEP, 24, 25, 26]


def feed(model, cache, ids, shown=True):
    """Feed fixed tokens as generate would; return the logits of every step."""
    batch = torch.tensor(ids) if isinstance(ids[0], list) else torch.tensor([ids])
    start = 4
    logits = [model(batch[:, :start], **cache_kwarg(cache)).logits[:, -1]]
    for column in range(start, batch.shape[1]):
        if shown:
            cache.watcher(batch[:, : column + 1], None)
        logits.append(model(batch[:, column : column + 1], **cache_kwarg(cache)).logits[:, -1])
        yield column, logits[-1]


@pytest.mark.parametrize(
    ("share", "rerotate"), [("values", True), ("keys_values", True), ("keys_values", False)]
)
def test_shared_steps_equal_a_cache_that_is_overwritten(share, rerotate):
    """The oracle replaces a repeated step's keys and values in DynamicCache by hand."""
    model = build("llama", "sdpa")
    cache, oracle = make(model, share=share, rerotate=rerotate), DynamicCache(config=model.config)
    move = Rotation(model).move
    repeats = {22: (6, 16), 28: (16, 22)}  # after this column: from, to (the latest of equals)
    changed = False
    ours = feed(model, cache, IDS)
    for column, expected in feed(model, oracle, IDS, shown=False):
        # A step is compared when the token after it is shown, hence before that token's forward.
        assert torch.allclose(next(ours)[1], expected, atol=1e-4), column
        if column + 1 in repeats:
            first, second = repeats[column + 1]
            for layer in oracle.layers:
                old, new = slice(first, first + 6), slice(second, second + 6)
                layer.values[:, :, new] = layer.values[:, :, old]
                if share == "keys_values":
                    keys = layer.keys[:, :, old]
                    layer.keys[:, :, new] = move(keys, second - first) if rerotate else keys
            changed = True
    assert changed
    report = cache.report()
    assert (report.steps, report.candidates, report.matched) == (5, 2, 2)
    assert (report.blocks, report.shared_blocks) == (8, 4)  # blocks of 4 and 2 tokens
    whole = dynamic_bytes(model, len(IDS), 1)
    assert report.held_bytes + report.saved_bytes == whole
    half = dynamic_bytes(model, 12, 1) // (2 if share == "values" else 1)
    assert report.saved_bytes == half
    assert report.value_distance > 0


def test_a_shared_block_is_one_storage():
    model = build("llama", "sdpa")
    cache = make(model)
    for _ in feed(model, cache, IDS):
        pass
    (row,) = cache.table
    at = {entry.start: entry for entry in row}
    assert at[16].values is at[6].values and at[22].values is at[6].values
    assert at[16].keys is not at[6].keys and at[16].offset == 0
    cache = make(model, share="keys_values")
    for _ in feed(model, cache, IDS):
        pass
    at = {entry.start: entry for entry in cache.table[0]}
    assert at[22].keys is at[6].keys and at[22].offset == 16
    part = at[22].keys.parts[1]
    assert part.untyped_storage().nbytes() == part.nbytes  # nothing else is kept alive


def test_branches_share_with_each_other_and_problems_do_not():
    model = build("llama", "sdpa")
    rows = [[*IDS[:4], first, STOP, *STEP, 24, 25] for first in (20, 21)]
    for branches, shared in ((2, 1), (1, 0)):
        cache = make(model, branches=branches)
        for _ in feed(model, cache, rows):
            pass
        assert cache.report().prompt_bytes == shared * dynamic_bytes(model, 4, 1)
        assert (cache.table[0][0] is cache.table[1][0]) == bool(shared)
        # Blocks of 4 and 2 tokens of STEP; the short steps differ in half of their tokens.
        assert cache.report().shared_blocks == 2 * shared


def test_the_threshold_decides():
    model = build("llama", "sdpa")
    found = []
    for distance in (0.0, 0.05, 10.0):
        cache = make(model, distance=distance)
        for _ in feed(model, cache, IDS):
            pass
        report = cache.report()
        found.append(report.shared_blocks)
        if report.shared_blocks:
            assert report.value_distance <= distance
    assert found[0] == 0 and found == sorted(found) and found[2] == 4
    strict = make(model, lexical=1.0)
    different = [*IDS[:22], 16, *IDS[23:]]
    for _ in feed(model, strict, different):
        pass
    assert strict.report().candidates == 1


def test_the_report_fits_a_terminal_and_says_what_is_missing():
    model = build("llama", "sdpa")
    cache = make(model)
    assert "nan" in str(cache.report())
    for _ in feed(model, cache, IDS):
        pass
    text = str(cache.report())
    assert "2 share" in text and "4 of 8 blocks shared" in text


def test_misuse_says_what_to_do():
    model = build("llama", "sdpa")
    arguments = prompt(batch=1) | dict(do_sample=False, max_new_tokens=20)
    cache = make(model)
    with pytest.raises(ValueError, match=r"stopping_criteria=\[cache.watcher\]"):
        model.generate(**arguments, **cache_kwarg(cache))
    cache.reset()
    watched = dict(**cache_kwarg(cache), stopping_criteria=[cache.watcher])
    with pytest.raises(ValueError, match="beam search"):
        model.generate(**arguments | dict(num_beams=2), **watched)
    cache.reset()
    with pytest.raises(ValueError, match="got assisted decoding"):
        model.generate(**arguments, **watched, assistant_model=model)
    cache.reset()
    model.generate(**arguments, **watched)
    with pytest.raises(ValueError, match="reset"):
        model.generate(**arguments, **watched)
    with pytest.raises(ValueError, match="branches to num_return_sequences"):
        few = make(model, branches=2)
        model.generate(**arguments, **cache_kwarg(few), stopping_criteria=[few.watcher])
    with pytest.raises(ValueError, match=r"one rotary embedding|position_ids"):
        make(build("gemma3", "sdpa"), share="keys_values")
    layer = BlockLayer(0, [], None)
    for refused in (layer.offload, lambda: layer.batch_repeat_interleave(2)):
        with pytest.raises(ValueError, match="SharedBranchCache"):
            refused()


@pytest.mark.parametrize(
    "settings",
    [
        dict(share="keys"),
        dict(rerotate=1),
        dict(lexical=2.0),
        dict(distance=-1.0),
        dict(block=0),
        dict(candidates=0),
        dict(branches=0),
    ],
)
def test_arguments_are_checked(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected"):
        make(build("llama", "sdpa"), **settings)
