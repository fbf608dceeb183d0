"""CONTRIBUTING.md, "add a form", followed once: keys and values held in half the bytes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, SharedBranchCache
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.planning import row_bytes
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV
from hf_reasoncache.storage.branch_store import BranchStore
from hf_reasoncache.storage.forms import Form
from hf_reasoncache.storage.pool_store import PoolStore
from hf_reasoncache.storage.prompt_deduplicator import PromptDeduplicator
from tests.support.models import build, prompt


class HalfForm(Form):
    """Keys and values in bfloat16, of a model that computes in float32."""

    def fields(self, keys, values):
        """See `Form.fields`."""
        return {"half_keys": keys.bfloat16(), "half_values": values.bfloat16()}

    def read(self, name, take):
        """See `Form.read`; scorers see numbers of the model's type."""
        return take(f"half_{name}").float()

    def operands(self, fields):
        """See `Form.operands`."""
        return {"keys": fields["half_keys"], "values": fields["half_values"]}

    def query(self, query):
        """See `Form.query`."""
        return query.bfloat16()

    def token_bytes(self, size, dtype):
        """See `Form.token_bytes`."""
        return super().token_bytes(size, torch.bfloat16)


def half_cache(model, policies=None, make_store=PoolStore):
    def make_layer(index, rank, layers):
        policy = None if policies is None else policies.own_layers[rank].policy
        return CacheLayer(index, policy, make_store(form=HalfForm()))

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


def test_rows_that_share_hold_half_the_bytes():
    model, inputs = build("llama"), prompt(padding=())
    ids = inputs["input_ids"][[0, 0, 1]]
    deduplicator = PromptDeduplicator()
    half = half_cache(model, make_store=partial(BranchStore, deduplicator, 0))
    plain = SharedBranchCache(model.config)
    for step in range(8):
        with torch.no_grad():
            expected, got = (
                model(ids, **cache_kwarg(cache)).logits[:, -1] for cache in (plain, half)
            )
        assert 0 < (expected - got).abs().max() < 0.15 or not step
        ids = expected.argmax(-1, keepdim=True)
        if step == 4:
            # A fork makes segments of what rows have written.
            rows = torch.tensor([0, 0, 1, 2])
            ids = ids[rows]
            for layer in (*plain.own_layers, *half.own_layers):
                layer.fork(rows)
    assert 2 * half.report().kv_bytes == plain.report().kv_bytes
    layers = zip(plain.own_layers, half.own_layers, strict=True)
    for ours, halved in layers:
        for name in ("keys", "values"):
            whole, rounded = getattr(ours, name), getattr(halved, name)
            assert 0 < (whole - rounded).abs().max() < 0.15 and rounded.dtype == whole.dtype


def test_the_plan_asks_the_form():
    model = build("llama")
    lengths = dict(prompt=21, generated=60, dtype=torch.float32)
    half = row_bytes(half_cache(model), model.config, **lengths).held()
    plain = row_bytes(ReasonAllocCache(model.config, budget=None), model.config, **lengths).held()
    # Positions take 4 bytes of each slot in both.
    slots = plain // (3 * 2 * (2 * 16 * 4 + 4))
    assert plain - half == slots * 3 * 2 * 2 * 16 * 2
