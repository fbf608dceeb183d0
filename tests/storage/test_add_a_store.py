"""CONTRIBUTING.md, "add a store", followed once: keys and values held in half the bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.planning import row_bytes
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV
from hf_reasoncache.storage.pool_store import PoolStore
from tests.support.models import build, prompt


class HalfStore(PoolStore):
    """Holds keys and values in bfloat16, whatever type the model computes in."""

    def packed(self, keys, values):
        """See `PoolStore.packed`."""
        return keys.bfloat16(), values.bfloat16()

    def take(self, slots, name):
        """See `PoolStore.take`; scorers see numbers of the model's type."""
        taken = super().take(slots, name)
        return taken.float() if name in ("keys", "values") else taken

    def attend(self, new, end):
        """See `PoolStore.attend`."""
        asking = replace(new, query=new.query.bfloat16())
        return super().attend(asking, end).to(new.query.dtype)

    def slot_bytes(self, size, dtype):
        """See `PoolStore.slot_bytes`."""
        return super().slot_bytes(size, torch.bfloat16)


def half_cache(model, policies=None):
    def make_layer(index, rank, layers):
        policy = None if policies is None else policies.own_layers[rank].policy
        return CacheLayer(index, policy, HalfStore())

    return ReasonCache(model.config, make_layer)


def settings(model, scorer):
    return ReasonAllocCache(model.config, budget=40, buffer=8, window=4, scorer=scorer)


@pytest.mark.parametrize("scorer", [None, RKV(), H2O()], ids=str)
def test_half_the_bytes_and_nearly_the_same_logits(scorer):
    model, inputs = build("llama"), prompt()
    plain = settings(model, scorer) if scorer else ReasonAllocCache(model.config, budget=None)
    half = half_cache(model, settings(model, scorer) if scorer else None)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(30):
        with torch.no_grad():
            expected, got = (
                model(ids, attention_mask=mask, **cache_kwarg(cache)).logits[:, -1]
                for cache in (plain, half)
            )
        # Of logits of 1.4; where tokens are evicted, rounding may decide between two of them.
        assert scorer is not None or (expected - got).abs().max() < 0.15
        ids = expected.argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert 2 * half.report().kv_bytes == plain.report().kv_bytes
    assert half.report().evictions == plain.report().evictions


def test_the_plan_asks_the_store():
    model = build("llama")
    lengths = dict(prompt=21, generated=60, dtype=torch.float32)
    half = row_bytes(half_cache(model), model.config, **lengths).held()
    plain = row_bytes(ReasonAllocCache(model.config, budget=None), model.config, **lengths).held()
    # Positions take 4 bytes of each slot in both.
    slots = plain // (3 * 2 * (2 * 16 * 4 + 4))
    assert plain - half == slots * 3 * 2 * 2 * 16 * 2
