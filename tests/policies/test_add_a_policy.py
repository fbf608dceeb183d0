"""CONTRIBUTING.md, "add a policy", followed once: one file, and all that a cache does with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.planning import row_bytes
from hf_reasoncache.policies.base import EvictionSpan, Policy, RowState
from hf_reasoncache.policies.plan import EvictionPlan, ranked
from hf_reasoncache.scorers import KeyDiff, Scorer, SnapKV
from tests.support.driver import Driver, tokens
from tests.support.models import VOCABULARY, build, prompt
from tests.support.oracle import Recorder

KEYS = KeyDiff()


@dataclass(frozen=True)
class Halving(Policy):
    """Every `every` tokens, half of what a head holds goes, the newest `every` tokens apart.

    Attributes
    ----------
    scorer : Scorer
    every : int
    """

    scorer: Scorer = KEYS
    every: int = 12

    def begin(self, prompt, before):
        """See `Policy.begin`; the prompt is evicted from like the rest."""
        due = torch.full_like(prompt.first, prompt.columns + self.every)
        return HalvingRows(self, prompt.first, due)


@dataclass(frozen=True, eq=False)
class HalvingRows(RowState):
    """When each row halves next.

    Attributes
    ----------
    policy : Halving
    first : LongTensor[B]
    due_at : LongTensor[B]
        Columns stored when the row is due.
    """

    policy: Halving
    first: torch.Tensor
    due_at: torch.Tensor

    def room(self, counts, columns):
        """See `RowState.room`."""
        return int(self.due_at.min()) - columns

    def due(self, counts, columns, steps):
        """See `RowState.due`."""
        return (self.due_at < columns + steps).nonzero()[:, 0]

    def next_span(self, rows, columns, counts):
        """See `RowState.next_span`: all but the newest tokens, once."""
        rows = rows[self.due_at[rows] <= columns]
        if not rows.numel():
            return self, None
        first = self.first[rows]
        state = replace(self, due_at=self.due_at.index_fill(0, rows, columns + self.policy.every))
        now = columns - first
        old = (now - self.policy.every).clamp_min(0)
        return state, EvictionSpan(rows, columns, first, now, torch.zeros_like(now), old)

    def quota(self, span, count, forced):
        """See `RowState.quota`."""
        return (count + 1) // 2

    def expected(self, span, counts):
        """See `RowState.expected`."""
        return counts.length[span.rows] - self.policy.every

    def plan(self, span, tokens, scores):
        """See `RowState.plan`."""
        half = self.quota(span, tokens.count, tokens.count).cpu()
        forced = torch.zeros_like(tokens.valid)
        ranks = ranked(tokens, scores, forced)
        plan = EvictionPlan(span.rows, tokens, scores, ranks, forced, half)
        return self, plan

    def capacity(self, length, columns):
        """See `RowState.capacity`."""
        return length + (self.due_at - columns).clamp_min(0)[:, None]

    def fitted(self, counts, columns):
        """See `RowState.fitted`."""
        target = self.capacity(counts.length, columns)
        return None if torch.equal(target, counts.capacity) else target

    def crop(self, columns):
        """See `RowState.crop`."""
        return replace(self, due_at=self.due_at.clamp_max(columns + self.policy.every))

    def select_rows(self, rows):
        """See `RowState.select_rows`."""
        return replace(self, first=self.first[rows], due_at=self.due_at[rows])


def halving_cache(model, **settings):
    policy = Halving(**settings)
    return ReasonCache(model.config, lambda index, rank, layers: CacheLayer(index, policy))


@pytest.mark.parametrize("scorer", [KeyDiff(), SnapKV(queries=4)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_equal_the_oracle(name, scorer):
    model, inputs = build(name), prompt()
    cache = halving_cache(model, scorer=scorer)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    for _ in range(40):
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    more = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(5))
    recorder.forward(more)
    recorder.forward(more[:, :1])
    assert cache.report().evictions > 12
    recorder.check(1e-4)


def test_a_row_in_a_batch_is_that_row_alone():
    model, inputs = build("llama"), prompt()
    together = tokens(model, halving_cache(model), inputs)
    alone = {name: each[1:, 7:] for name, each in inputs.items()}
    assert torch.equal(together[1:, 7:], tokens(model, halving_cache(model), alone))


@pytest.mark.parametrize("mode", [dict(num_beams=2), dict(prompt_lookup_num_tokens=3)], ids=str)
def test_modes_of_generate(mode):
    model, inputs = build("llama"), prompt(batch=1)
    cache = halving_cache(model)
    out = tokens(model, cache, inputs, **mode)
    assert cache.report().evictions > 0
    if "num_beams" not in mode:
        assert torch.equal(out, tokens(model, halving_cache(model), inputs))


def test_the_plan_asks_the_policy():
    model, inputs = build("llama"), prompt(batch=1)
    driver = Driver(model, halving_cache(model), inputs["attention_mask"])
    driver.greedy(driver(inputs["input_ids"]), 50)
    expected = row_bytes(
        halving_cache(model), model.config, prompt=21, generated=50, dtype=torch.float32
    )
    report = driver.cache.report()
    mask = driver.seen
    assert expected.held() == report.total_bytes - report.table_bytes - mask
