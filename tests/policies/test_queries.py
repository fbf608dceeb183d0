"""The queries by which an eviction scores: those of the newest columns, whatever came before it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.scorers import RKV
from hf_reasoncache.storage.pool_store import PoolStore
from tests.support.driver import Driver
from tests.support.models import build, prompt

QUERIES, BUFFER = 3, 15
ACTIONS = st.one_of(
    st.tuples(st.just("tokens"), st.integers(1, 2 * BUFFER)),
    st.tuples(st.just("chunk"), st.integers(2, 2 * BUFFER)),
    st.tuples(st.just("crop"), st.integers(1, 2 * QUERIES)),
    st.tuples(st.just("rows"), st.permutations([0, 1, 1, 2])),
    st.tuples(st.just("drafts"), st.integers(1, BUFFER)),
)


class Witness:
    """Keeps the queries of all columns, and holds those that an eviction gets against them."""

    def __init__(self, patch):
        self.known, self.checked, self.skipped = {}, 0, 0
        self.cache = None
        append, asked = PoolStore.append, CacheLayer._queries_before

        def watched_append(store, chunk, end, ring):
            append(store, chunk, end, ring)
            (layer,) = [each for each in self.cache.layers if each.store is store]
            self.skipped += layer.queries.last() is None
            for index in range(chunk.q_len):
                column = end - chunk.q_len + index
                self.known[layer.index, column] = chunk.query[:, :, index].clone()

        def watched_asked(layer, wanted, span, first, heads):
            found = asked(layer, wanted, span, first, heads)
            columns = range(span.columns - QUERIES, span.columns)
            newest = torch.stack([self.known[layer.index, at] for at in columns], dim=2)
            assert torch.equal(found[0].flatten(1, 2), newest[span.rows])
            self.checked += 1
            return found

        patch.setattr(PoolStore, "append", watched_append)
        patch.setattr(CacheLayer, "_queries_before", watched_asked)

    def rows(self, rows):
        self.known = {place: query[rows] for place, query in self.known.items()}


def run(actions, witness):
    model, inputs = build("llama"), prompt(batch=3, padding=(0, 7, 3))
    cache = ReasonAllocCache(
        model.config, budget=40, buffer=BUFFER, window=4, scorer=RKV(queries=QUERIES)
    )
    witness.cache = cache
    driver, drafting = Driver(model, cache, inputs["attention_mask"]), False
    ids = driver(inputs["input_ids"])[:, -1:].argmax(-1)
    # A single token ends the prompt.
    ids = driver(ids)[:, -1:].argmax(-1)
    for action, what in actions:
        if action == "rows":
            rows = torch.tensor(what[: len(ids)])
            cache.batch_select_indices(rows)
            witness.rows(rows)
            ids, driver = ids[rows], driver.rows(rows)
        elif action == "crop" and not drafting:
            # Never what an eviction may already have taken.
            what = min(what, driver.seen - 21)
            cache.crop(-what)
            driver.seen -= what
        elif action == "drafts":
            if not drafting:
                for layer in cache.layers:
                    layer.activate_past_recording()
            drafting = True
            for wrong in range(what):
                ids = driver(ids.expand(-1, 4))[:, -1:].argmax(-1)
                cache.crop(-(wrong % 4))
                driver.seen -= wrong % 4
        else:
            many = 1 if action == "tokens" else what
            for _ in range(what // many):
                ids = driver(ids[:, -1:].expand(-1, many))[:, -1:].argmax(-1)


@settings(max_examples=40)
@given(actions=st.lists(ACTIONS, min_size=1, max_size=6))
def test_every_eviction_gets_the_newest_queries(actions):
    with pytest.MonkeyPatch.context() as patch:
        run(actions, Witness(patch))


def test_queries_long_before_an_eviction_are_not_kept(monkeypatch):
    witness = Witness(monkeypatch)
    run([("tokens", 5 * BUFFER), ("chunk", 2 * BUFFER), ("tokens", BUFFER)], witness)
    assert witness.checked >= 15
    # Of the steps between two evictions all but so many.
    assert witness.skipped >= 3 * 4 * (BUFFER - QUERIES - 1)
