"""Shared steps: exact when nothing is shared, and equal to an oracle when something is."""

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache.experimental.rotation import Rotation
from hf_reasoncache.experimental.step_share import StepShareCache
from hf_reasoncache.experimental.steps import Boundaries
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.storage.branch_store import ROOM
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
    model = build(name, "reasoncache_eager" if name == "gpt_oss" else "reasoncache")
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
    model = build("llama")
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


def blocks_of(cache, row=0):
    """Blocks of a row in the second layer, by the column that they begin at."""
    table = cache.own_layers[1].store.table
    return {int(block.columns[0]): block for block in table.rows[row]}


def test_a_shared_block_is_one_storage():
    model = build("llama")
    cache = make(model)
    for _ in feed(model, cache, IDS):
        pass
    at = blocks_of(cache)
    assert at[16].values is at[6].values and at[22].values is at[6].values
    assert at[16].keys is not at[6].keys and at[16].offset == 0
    cache = make(model, share="keys_values")
    for _ in feed(model, cache, IDS):
        pass
    at = blocks_of(cache)
    assert at[22].keys is at[6].keys and at[22].offset == 16
    part = at[22].keys
    assert part.untyped_storage().nbytes() == part.nbytes  # nothing else is kept alive


def test_branches_share_with_each_other_and_problems_do_not():
    model = build("llama")
    rows = [[*IDS[:4], first, STOP, *STEP, 24, 25] for first in (20, 21)]
    for branches, shared in ((2, 1), (1, 0)):
        cache = make(model, branches=branches)
        for _ in feed(model, cache, rows):
            pass
        assert cache.report().prompt_bytes == shared * dynamic_bytes(model, 4, 1)
        assert (blocks_of(cache, 0)[0] is blocks_of(cache, 1)[0]) == bool(shared)
        # Blocks of 4 and 2 tokens of STEP; the short steps differ in half of their tokens.
        assert cache.report().shared_blocks == 2 * shared


def test_the_threshold_decides():
    model = build("llama")
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
    model = build("llama")
    cache = make(model)
    assert "nan" in str(cache.report())
    for _ in feed(model, cache, IDS):
        pass
    text = str(cache.report())
    assert "2 share" in text and "4 of 8 blocks shared" in text


def test_misuse_says_what_to_do():
    model = build("llama")
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
        make(build("gemma3"), share="keys_values")
    layer = cache.own_layers[1]
    rows = torch.tensor([0, 0])
    for refused in (
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(rows),
        lambda: cache.reorder_cache(rows),
        lambda: cache.crop(-1),
        lambda: layer.store.crop(20, 20),
    ):
        with pytest.raises(ValueError, match="SharedBranchCache"):
            refused()
    assert not cache.is_croppable and layer.seen == 40
    assert layer.held_positions()[0][0] == list(range(40))


def test_nothing_that_is_held_can_be_hidden():
    model, inputs = build("llama"), prompt(batch=1)
    cache = make(model)
    model(**inputs, **cache_kwarg(cache))
    ids = torch.cat([inputs["input_ids"], torch.tensor([[5]])], 1)
    cache.watcher(ids, None)
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    for _ in range(2):
        with pytest.raises(ValueError, match="an attention mask that hides"):
            model(ids[:, -1:], attention_mask=mask, **cache_kwarg(cache))
    model(ids[:, -1:], attention_mask=torch.ones_like(ids), **cache_kwarg(cache))


@pytest.mark.parametrize("rerotate", [True, False])
def test_what_is_held_is_reported_as_in_other_caches(rerotate):
    model, full = build("llama"), DynamicCache(config=build("llama").config)
    cache = make(model, share="keys_values", rerotate=rerotate)
    for _ in feed(model, cache, IDS):
        pass
    for _ in feed(model, full, IDS, shown=False):
        pass
    layer = cache.own_layers[0]
    keys, values = layer.keys, layer.values
    # The first layer's keys and values depend on their token and position alone.
    torch.testing.assert_close(values, full.layers[0].values)
    moved = 0 if rerotate else 12
    assert ((keys - full.layers[0].keys).abs().amax((0, 1, 3)) > 1e-4).sum() == moved
    assert cache.held_positions(0) == [[list(range(len(IDS)))] * 2]
    report = cache.report()
    assert report.layers[1].held == [[len(IDS)] * 2] and report.seen == len(IDS)
    free = report.kv_bytes - report.held_bytes
    # A prompt's slots go when it is sealed.
    assert 0 <= free <= dynamic_bytes(model, 2 * ROOM, 1)


def test_a_prompt_under_another_mask_is_another_prompt():
    model, ids = build("llama"), torch.tensor([IDS[:6]] * 3)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    cache = make(model, branches=3)
    model(ids, attention_mask=mask, **cache_kwarg(cache))
    cache.watcher(torch.cat([ids, ids[:, :1]], 1), None)
    assert cache.report().prompt_bytes == dynamic_bytes(model, 6, 1)
    assert [heads[0] for heads in cache.held_positions(0)] == [
        list(range(6)),
        list(range(2, 6)),
        list(range(6)),
    ]


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
        make(build("llama"), **settings)


def test_latents_are_refused():
    with pytest.raises(ValueError, match="expected a model that caches keys and values, got"):
        make(build("deepseek_v3"))
