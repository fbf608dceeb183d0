"""Planned bytes against the storages that caches of that geometry really hold."""

from __future__ import annotations

from functools import cache as once

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_reasoncache import (
    ReasonAllocCache,
    SharedBranchCache,
    SlidingWindowCompressCache,
)
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.planning import RowBytes, row_bytes
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.report import storage_bytes
from hf_reasoncache.scorers import H2O, RKV, KeyNorm, StreamingLLM
from tests.support.models import VOCABULARY, build

build_once = once(build)


def held(cache) -> int:
    if isinstance(cache, DynamicCache):
        return sum(storage_bytes(layer) for layer in cache.layers)
    report = cache.report()
    return report.total_bytes - report.table_bytes


@torch.inference_mode()
def run(model, cache, prompt: int, generated: int, rows: int = 1, branches: int = 1) -> None:
    """Read a prompt in every row and feed random tokens."""
    model.set_attn_implementation("eager" if isinstance(cache, DynamicCache) else "reasoncache")
    ids = torch.randint(3, VOCABULARY, (rows, prompt))
    model(input_ids=ids, **cache_kwarg(cache), use_cache=True)
    if branches > 1:
        cache.batch_repeat_interleave(branches)
    for _ in range(generated):
        ids = torch.randint(3, VOCABULARY, (rows * branches, 1))
        model(input_ids=ids, **cache_kwarg(cache), use_cache=True)


def make(kind: str, name: str, **changes):
    config = build_once(name).config
    if kind == "full":
        return DynamicCache(config=config)
    if kind == "exact":
        return ReasonAllocCache(config, budget=None)
    if kind == "window":
        return SlidingWindowCompressCache(config, **({"window": 16, "recent": 4} | changes))
    spent = {} if "ratio" in changes else {"budget": 40}
    return ReasonAllocCache(config, **(spent | {"buffer": 8} | changes))


def plan(cache, name: str, prompt: int, generated: int) -> RowBytes:
    """The bytes of a row; computed before a model has touched the cache."""
    config = build_once(name).config
    return row_bytes(cache, config, prompt=prompt, generated=generated, dtype=torch.float32)


CASES = {
    "full": ("full", {}),
    "exact": ("exact", {}),
    "budget": ("budget", {}),
    "budget, head budgets": ("budget", dict(head_budgets=True)),
    "budget, long buffer": ("budget", dict(buffer=24, scorer=RKV(queries=4))),
    "budget, no queries": ("budget", dict(scorer=KeyNorm())),
    "budget, mass": ("budget", dict(scorer=H2O())),
    "budget, prompt evicted": ("budget", dict(protect=False, budget=20)),
    "ratio": ("budget", dict(ratio=0.6, min_budget=12)),
    "ratio, prompt evicted": ("budget", dict(ratio=0.3, min_budget=10, protect=False)),
    "windows": ("window", {}),
    "windows, little kept": ("window", dict(ratio=0.1, scorer=StreamingLLM())),
    "windows, prompt evicted": ("window", dict(protect=False)),
    "windows, bound": ("window", dict(max_budget=48)),
}


# What a case holds in a layer, and which layers of a model hold it, do not depend on each other.
OTHERS = ["qwen3", "qwen2_sliding", "gemma3", "gpt_oss"]
PLACES = [(case, name) for n, case in enumerate(CASES) for name in ("llama", OTHERS[n % 4])]


@pytest.mark.parametrize(("case", "name"), PLACES)
def test_bytes_held(name: str, case: str) -> None:
    kind, changes = CASES[case]
    model = build_once(name)
    for prompt, generated, rows in ((25, 0, 1), (25, 1, 2), (25, 90, 2), (3, 5, 1)):
        if generated == 0 and case == "windows, prompt evicted":
            continue  # what `held_positions` answers from until the next forward is not planned
        cache = make(kind, name, **changes)
        planned = plan(cache, name, prompt, generated)
        run(model, cache, prompt, generated, rows)
        assert (planned.shared, rows * planned.own) == (0, held(cache)), (prompt, generated)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", [3, 25])
def test_no_step_holds_more_than_the_most(case: str, prompt: int) -> None:
    kind, changes = CASES[case]
    model = build_once("llama")
    cache = make(kind, "llama", **changes)
    most = plan(cache, "llama", prompt, 70)
    run(model, cache, prompt, 0)
    seen = [held(cache)]
    for _ in range(70):
        ids = torch.randint(3, VOCABULARY, (1, 1))
        model(input_ids=ids, **cache_kwarg(cache), use_cache=True)
        seen.append(held(cache))
    assert max(seen[1:]) <= most.peak and max(seen) <= most.most()
    assert most.peak == pytest.approx(max(seen[1:]), rel=0.02)


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding"])
@pytest.mark.parametrize("kind", ["budget", "window"])
@pytest.mark.parametrize("bound", [None, 64])
def test_a_profile_is_respected(name: str, kind: str, bound: int | None) -> None:
    layers = len(Geometry.of(build_once(name).config).full_attention_layers)
    changes = {"profile": [3.0, 1.0, 0.2][:layers]}
    if kind == "window":
        changes["max_budget"] = bound
    cache = make(kind, name, **changes)
    planned = plan(cache, name, 25, 90)
    run(build_once(name), cache, 25, 90, rows=2)
    assert 2 * planned.own == pytest.approx(held(cache), rel=0.02)
    if kind == "budget":
        capacities = {sum(layer.capacity[0]) for layer in cache.report().layers}
        assert len(capacities) > 1, "the profile gives layers different budgets"
        assert 2 * planned.own == held(cache)


SUFFIXES = {
    "exact": None,
    "budget": ReasonAllocCache.policy(budget=60, buffer=8),
    "windows": SlidingWindowCompressCache.policy(window=16, recent=4),
    "windows, bound": SlidingWindowCompressCache.policy(window=16, recent=4, max_budget=56),
}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_branches_share_their_prompt(name: str, suffix: str) -> None:
    model = build_once(name)
    for generated in (1, 17, 80):
        cache = SharedBranchCache(model.config, suffix=SUFFIXES[suffix])
        planned = plan(cache, name, 25, generated)
        run(model, cache, 25, generated, branches=3)
        assert planned.held(3) == pytest.approx(held(cache), rel=0.02)
        assert planned.held(3) == held(cache)
        assert planned.shared > 0


def test_branches_with_reserved_room() -> None:
    cache = SharedBranchCache(build_once("llama").config)
    cache.reserve(40)
    planned = plan(cache, "llama", 25, 10)
    run(build_once("llama"), cache, 25, 10, branches=2)
    assert planned.held(2) == held(cache)


@settings(max_examples=25)
@given(
    prompt=st.integers(1, 60),
    generated=st.integers(1, 90),
    budget=st.integers(12, 50),
    buffer=st.integers(1, 30),
    queries=st.integers(1, 12),
)
def test_budgets_of_any_size(prompt, generated, budget, buffer, queries) -> None:
    settings = dict(budget=budget, buffer=buffer, window=4, scorer=RKV(queries=queries))
    cache = make("budget", "llama", **settings, protect=False)
    planned = plan(cache, "llama", prompt, generated)
    run(build_once("llama"), cache, prompt, generated)
    assert planned.own == held(cache)


@settings(max_examples=25)
@given(
    prompt=st.integers(1, 40),
    generated=st.integers(1, 120),
    window=st.integers(2, 40),
    ratio=st.floats(0.1, 0.9),
    recent=st.integers(1, 12),
    protect=st.booleans(),
    bound=st.none() | st.integers(40, 100),
)
def test_windows_of_any_size(prompt, generated, window, ratio, recent, protect, bound) -> None:
    """Without a bound the plan is exact; with one it is less than a window off."""
    ratio = max(ratio, 1 / window)
    assume(round(ratio * window) < window)
    if bound is not None:
        bound += recent + round(ratio * window) + (prompt if protect else 0)
    settings = dict(window=window, ratio=ratio, recent=recent, protect=protect)
    cache = make("window", "llama", **settings, max_budget=bound, scorer=KeyNorm())
    planned = plan(cache, "llama", prompt, generated)
    run(build_once("llama"), cache, prompt, generated)
    layers = cache.report().layers
    slots = sum(sum(layer.capacity[0]) for layer in layers)
    heads = sum(len(layer.capacity[0]) for layer in layers)
    slack = 0 if bound is None else window * heads * held(cache) / slots
    assert abs(planned.own - held(cache)) <= slack
