"""Where the prompt ends: what does not show in the forwards, `Protect` says."""

import pytest
import torch

from hf_reasoncache import Protect, SharedBranchCache
from hf_reasoncache.protection import Spans
from tests.support.caches import BRANCHED, KINDS, make_cache, make_policy
from tests.support.driver import tokens
from tests.support.models import build, prompt

COLUMNS = 29


@pytest.mark.parametrize("chunk", [7, 8, 28, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_chunks_is_protected_to_its_last_token(kind, chunk):
    """In chunks of 7 and 28 tokens the last one has a single token, like a decoding step."""
    model, inputs = build("llama"), prompt(tokens=COLUMNS, padding=(0, 5))

    def run(**arguments):
        cache = make_cache(kind, model, protect=Protect(prompt_length=COLUMNS))
        found = tokens(model, cache, inputs, max_new_tokens=48, **arguments)
        assert cache.report().evictions > 6
        for layer in range(3):
            for row, pad in enumerate((0, 5)):
                for head in cache.held_positions(layer)[row]:
                    assert set(range(pad, COLUMNS)) <= set(head)
        return found

    chunked = run(prefill_chunk_size=chunk)
    if kind == "reason_alloc":
        assert torch.equal(chunked, run()), "chunks change no token"


def test_the_last_chunk_of_a_prompt_is_shared_by_its_branches():
    model, inputs = build("llama"), prompt(tokens=COLUMNS, padding=(0, 0))
    cache = SharedBranchCache(
        model.config, suffix=make_policy("reason_alloc", protect=Protect(prompt_length=COLUMNS))
    )
    tokens(model, cache, inputs, num_return_sequences=3, do_sample=True, prefill_chunk_size=7)
    assert [part.tokens for part in cache.layers[0].store.tree.readers] == [COLUMNS] * 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != BRANCHED])
def test_a_whitelist_finds_a_prompt_in_chunks(kind):
    model, inputs = build("llama"), prompt(batch=1, tokens=COLUMNS, padding=(0,))
    keep = Spans(rows=(((3, 9),),), tokens=(COLUMNS,))
    protect = Protect(prompt=False, spans=keep, prompt_length=COLUMNS)
    settings = {"prompt_ratio": 0.5} if kind == "sliding_window" else {}
    cache = make_cache(kind, model, protect=protect, **settings)
    tokens(model, cache, inputs, prefill_chunk_size=7)
    for layer in range(3):
        assert all(set(range(3, 9)) <= set(head) for head in cache.held_positions(layer)[0])
    unsaid = make_cache(kind, model, protect=keep, **settings)
    expected = (
        "prompt of 29 tokens in row 0, got 28; .* Protect.prompt_length=.* prefill_chunk_size"
    )
    with pytest.raises(ValueError, match=expected):
        tokens(model, unsaid, inputs, prefill_chunk_size=7)
