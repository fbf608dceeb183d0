"""Keys and values, or latents, in 8 bits: half the bytes, else all that other caches promise."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_reasoncache import ReasonAllocCache, SharedBranchCache, SlidingWindowCompressCache
from hf_reasoncache.planning import row_bytes
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV
from tests.support.caches import CLASSES, KINDS, exact_cache, make_cache
from tests.support.driver import mask_bytes, new_cache, tokens
from tests.support.models import build, prepare, prompt
from tests.support.oracle import Recorder
from tests.support.quantised import stock_cache

STORAGES = ("fp8", "fp8-keys", "fp8-values")
MODELS = ("llama", "deepseek_v3")
"""With keys and values, and with latents."""


def distinct_storages(tensors):
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(found.values())


@pytest.fixture(scope="module")
def half():
    """A model in bfloat16 with heads of usual size."""
    torch.manual_seed(0)
    shape = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    config = LlamaConfig(**shape, **heads, max_position_embeddings=256)
    return prepare(LlamaForCausalLM(config), "reasoncache").to(torch.bfloat16)


@pytest.mark.parametrize(
    ("storage", "share"), [("fp8", 0.52), ("fp8-keys", 0.76), ("fp8-values", 0.76)]
)
def test_bytes_are_halved(half, storage, share):
    """Of 2 * 64 * 2 bytes per token and head, 64 and 2 for a scale stay of each half."""
    held = {}
    for name in (None, storage):
        for kind in KINDS:
            cache = exact_cache(kind, half, storage=name)
            tokens(half, cache, max_new_tokens=30)
            found = distinct_storages(x for layer in cache.layers for x in layer.kv_tensors())
            assert found == cache.report().kv_bytes
            held[name, kind] = found
    for kind in KINDS:
        assert held[storage, kind] / held[None, kind] == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
    ("name", "storage"), [*(("llama", each) for each in STORAGES), ("deepseek_v3", "fp8")]
)
def test_what_is_read_is_what_8_bits_leave(name, storage):
    model, inputs = build(name, "sdpa"), prompt(padding=())
    expected = stock_cache(model, storage)
    tokens(model, expected, inputs, max_new_tokens=9)
    model.set_attn_implementation("reasoncache")
    for kind in KINDS:
        cache = exact_cache(kind, model, storage=storage)
        tokens(model, cache, inputs, max_new_tokens=9)
        for ours, theirs in zip(cache.layers, expected.layers, strict=True):
            assert ours.keys.dtype == theirs.keys.dtype
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


EVICTING = [
    ("llama", "reason_alloc", "fp8", dict(scorer=RKV(), protect=False)),
    ("llama", "reason_alloc", "fp8-keys", dict(scorer=H2O(), protect=False)),
    ("llama", "reason_alloc", "fp8", dict(risk=0.3)),
    ("llama", "sliding_window", "fp8", dict(head_budgets=True)),
    ("llama", "sliding_window", "fp8-values", dict(prompt_ratio=0.5, protect=False, max_budget=30)),
    ("llama", "branched", "fp8", {}),
    ("deepseek_v3", "reason_alloc", "fp8", dict(scorer=RKV(), protect=False)),
    ("deepseek_v3", "reason_alloc", "fp8", dict(scorer=H2O(), protect=False)),
    ("deepseek_v3", "reason_alloc", "fp8", dict(risk=0.3)),
    ("deepseek_v3", "sliding_window", "fp8", dict(prompt_ratio=0.5, protect=False, max_budget=30)),
    ("deepseek_v3", "branched", "fp8", {}),
    ("minicpm3", "reason_alloc", "fp8", {}),
]


@pytest.mark.parametrize(("name", "kind", "storage", "changes"), EVICTING, ids=str)
def test_logits_equal_the_oracle_over_rounded_keys_and_values(name, kind, storage, changes):
    model, inputs = build(name), prompt(batch=3, padding=(0, 7, 3))
    cache = make_cache(kind, model, storage=storage, **changes)
    stock = partial(stock_cache, model, storage)
    recorder = Recorder(model, cache, inputs["attention_mask"], stock)
    logits = recorder.forward(inputs["input_ids"])
    for _ in range(34):
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    for steps in (9, 4):
        more = torch.randint(3, 97, (3, steps), generator=torch.Generator().manual_seed(steps))
        recorder.forward(more)
    assert cache.report().evictions > 3
    # A number between two codes may become the other one; without rounding the logits of models
    # with latents differ by 0.7.
    recorder.check(1e-4 if name == "llama" else 1e-2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent(kind, name):
    # Alone and together matrix products round differently; in this prompt to no other code.
    model, inputs = build(name), prompt(seed=2)
    together = tokens(model, new_cache(model, kind, storage="fp8"), inputs)
    for row, padding in enumerate((0, 7)):
        alone = {name: x[row : row + 1, padding:] for name, x in inputs.items()}
        found = tokens(model, new_cache(model, kind, storage="fp8"), alone)
        assert torch.equal(found[0], together[row, padding:])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", CLASSES)
def test_drafts_that_are_taken_back_leave_no_trace(kind, name):
    model, inputs = build(name), {name: x[:1] for name, x in prompt().items()}
    caches = [new_cache(model, kind, storage="fp8") for _ in range(2)]
    plain = tokens(model, caches[0], inputs)
    drafted = tokens(model, caches[1], inputs, prompt_lookup_num_tokens=4)
    assert torch.equal(plain, drafted) and caches[1].report().evicted > 0


@pytest.mark.parametrize("name", MODELS)
def test_branches_fork_park_and_return(name):
    model, inputs = build(name), prompt(padding=())
    cache = SharedBranchCache(model.config, storage="fp8")
    exact = ReasonAllocCache(model.config, budget=None, storage="fp8")
    ids = inputs["input_ids"]
    for step in range(14):
        with torch.no_grad():
            expected, got = (model(ids, **cache_kwarg(x)).logits[:, -1] for x in (exact, cache))
        assert (expected - got).abs().max() < 1e-4
        ids = expected.argmax(-1, keepdim=True)
        if step == 3:
            assert cache.fork(1) == [2]
            exact.batch_select_indices(torch.tensor([0, 1, 1]))
            ids = torch.tensor([[5], [6], [7]])
        if step == 8:
            # At once back, as the last row.
            assert cache.resume(cache.park(0, score=1.0)) == 2
            exact.batch_select_indices(torch.tensor([1, 2, 0]))
            ids = ids[[1, 2, 0]]
    prompts = {id(path[0]) for path in cache.layers[0].store.tree.paths}
    assert len(prompts) == 2, "the fork reads the same prompt"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_stored_is_rounded(kind, name):
    """The first forward is that of a cache in full precision, the second is not."""
    model, inputs = build(name), prompt()
    caches = [exact_cache(kind, model, storage=storage) for storage in (None, "fp8")]
    token = torch.full((2, 1), 5)
    with torch.no_grad():
        first = [model(**inputs, **cache_kwarg(cache)).logits for cache in caches]
        second = [model(token, **cache_kwarg(cache)).logits for cache in caches]
    assert torch.equal(*first) and not torch.allclose(*second, atol=1e-2)


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("wrong", ["fp4", "", 8, True, ["fp8"]], ids=repr)
@pytest.mark.parametrize("make", [*CLASSES.values(), SharedBranchCache])
def test_other_storages_are_refused(make, wrong):
    budget = {"budget": None} if make is ReasonAllocCache else {}
    with pytest.raises(ValueError, match=r"storage: expected one of \['fp8', .*or None, got "):
        make(build("llama").config, **budget, storage=wrong)


@pytest.mark.parametrize("storage", ["fp8-keys", "fp8-values"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_of_a_latent_is_refused(kind, storage):
    said = f"storage: expected 'fp8' or None for a model with latents.* got '{storage}'; use 'fp8'"
    with pytest.raises(ValueError, match=said):
        exact_cache(kind, build("deepseek_v3"), storage=storage)


def test_branches_take_the_storage_of_their_suffix():
    config = build("llama").config
    suffix = SlidingWindowCompressCache.policy(storage="fp8-keys")
    cache = SharedBranchCache(config, suffix=suffix)
    named = SharedBranchCache(config, suffix=SlidingWindowCompressCache.policy(), storage="fp8")
    assert {layer.store.form.quantised for layer in cache.own_layers} == {("keys",)}
    assert {layer.store.form.quantised for layer in named.own_layers} == {("keys", "values")}
    with pytest.raises(ValueError, match=r"storage: expected that of the suffix.*'fp8-keys', got"):
        SharedBranchCache(config, suffix=suffix, storage="fp8")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", CLASSES)
def test_plans_count_what_is_held(half, kind, storage):
    cache = make_cache(kind, half, storage=storage, head_budgets=False)
    inputs = {name: x[:1] for name, x in prompt().items()}
    plan = partial(row_bytes, cache, half.config, prompt=21, dtype=torch.bfloat16)
    planned, reading = plan(generated=29), plan(generated=0)
    tokens(half, cache, inputs, max_new_tokens=30)
    report = cache.report()
    tables = sum(each.table_bytes for each in report.layers)
    assert planned.held() == report.total_bytes - tables - mask_bytes(cache)
    # While a prompt is read, the model's keys and values of one layer are there in full.
    assert planned.prompt - reading.held() == 21 * 2 * 64 * 2
