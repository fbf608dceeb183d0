"""Multi-head latent attention: latents are held once, attended to as they are, and evicted."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import DynamicCache

from hf_reasoncache import ReasonAllocCache, SharedBranchCache
from hf_reasoncache.planning import row_bytes
from hf_reasoncache.protection import Protect
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV, Random, SnapKV, StreamingLLM
from hf_reasoncache.storage.pool_store import distinct_bytes
from tests.support.caches import BRANCHED, KINDS, exact_cache, make_cache
from tests.support.driver import MODES, Driver, mask_bytes
from tests.support.models import BUILDERS, LATENT_MODELS, VOCABULARY, build, prompt
from tests.support.oracle import Recorder

LATENTS = ["deepseek_v3", "minicpm3"]
RANK, ROPE = 20, 8
# What transformers' linear layers cannot take back.
CROPS = ("prompt_lookup", "assisted")
LINEAR = ("kimi_linear", "bailing_hybrid")
CASES = [
    (name, mode)
    for name in LATENT_MODELS
    for mode in MODES
    if name not in BUILDERS and not (name in LINEAR and mode in CROPS)
]


def tokens(model, cache, inputs=None, **arguments):
    torch.manual_seed(7)
    arguments = {"max_new_tokens": 24} | arguments
    return model.generate(**(inputs or prompt()), **arguments, **cache_kwarg(cache))


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_tokens_equal_dynamic_cache(name, mode):
    model, arguments, inputs = build(name, "sdpa"), dict(MODES[mode]), prompt()
    if mode in CROPS:
        inputs = {key: value[:1] for key, value in inputs.items()}
    if mode == "assisted":
        arguments["assistant_model"] = build(name, "sdpa")
    expected = tokens(model, DynamicCache(config=model.config), inputs, **arguments)
    model.set_attn_implementation("reasoncache")
    for kind in KINDS:
        found = tokens(model, exact_cache(kind, model), inputs, **arguments)
        assert torch.equal(found, expected), kind


# --------------------------------------------------------------------------------------- evictions


def decode(recorder, logits, steps):
    for _ in range(steps):
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    return logits


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *(("reason_alloc", {"scorer": s}) for s in (RKV(), SnapKV(), H2O(), StreamingLLM())),
        ("reason_alloc", {"risk": True}),
        ("sliding_window", {}),
        ("sliding_window", {"max_budget": 42, "scorer": RKV()}),
        (BRANCHED, {}),
    ],
    ids=str,
)
def test_logits_equal_oracle_over_compactions_and_turns(kind, changes):
    model, inputs = build("deepseek_v3"), prompt()
    cache = make_cache(kind, model, profile=[1, 9, 4], **changes)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = decode(recorder, recorder.forward(inputs["input_ids"]), 50)
    assert cache.report().evictions >= 4
    second = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(5))
    logits = recorder.forward(torch.cat([logits.argmax(-1, keepdim=True), second], dim=1))
    decode(recorder, logits, 12)
    recorder.check(1e-4)


@pytest.mark.parametrize("name", [name for name in LATENT_MODELS if name not in LINEAR])
def test_logits_equal_oracle_in_every_model(name):
    model, inputs = build(name), prompt()
    cache = make_cache("reason_alloc", model)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    decode(recorder, recorder.forward(inputs["input_ids"]), 40)
    assert cache.report().evictions > 0
    recorder.check(1e-4)


@pytest.mark.parametrize("changes", [{"scorer": RKV()}, {"scorer": H2O()}], ids=str)
def test_logits_equal_oracle_when_the_prompt_is_cut(changes):
    model, inputs = build("minicpm3"), prompt(tokens=90, padding=(0, 33))
    cache = make_cache("reason_alloc", model, budget=24, protect=False, **changes)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    assert max(len(head) for row in cache.layers[0].held_now() for head in row) <= 32
    decode(recorder, logits, 30)
    recorder.check(1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("reason_alloc", {"budget": 32, "scorer": s}) for s in (RKV(), H2O(), Random())]
    + [("sliding_window", {"protect": False})],
    ids=str,
)
def test_row_in_padded_batch_equals_row_alone(kind, changes):
    model, inputs = build("deepseek_v3"), prompt(batch=3, padding=(0, 7, 16))

    def run(ids, mask):
        cache = make_cache(kind, model, profile=[1.0, 9.0, 4.0], **changes)
        inputs = {"input_ids": ids, "attention_mask": mask}
        found = tokens(model, cache, inputs, max_new_tokens=48)
        return found[:, ids.shape[1] :], [cache.held_positions(i) for i in range(3)]

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    together, held = run(ids, mask)
    for row, pad in enumerate((0, 7, 16)):
        alone, held_alone = run(ids[row : row + 1, pad:], mask[row : row + 1, pad:])
        assert torch.equal(alone[0], together[row])
        for layer in range(3):
            shifted = [[position + pad for position in head] for head in held_alone[layer][0]]
            assert shifted == held[layer][row]


def test_assisted_equals_plain_with_evictions():
    model = build("deepseek_v3")
    inputs = {key: value[:1] for key, value in prompt().items()}
    found = []
    for more in ({}, {"prompt_lookup_num_tokens": 6}, {"assistant_model": build("deepseek_v3")}):
        protect = Protect(prompt_length=inputs["input_ids"].shape[1])
        cache = make_cache("reason_alloc", model, budget=32, buffer=5, protect=protect)
        found.append(tokens(model, cache, inputs, max_new_tokens=60, **more))
        assert cache.report().evictions > 5
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# ---------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize(("storage", "size"), [(None, (RANK + ROPE) * 4), ("fp8", RANK + ROPE + 4)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LATENTS)
def test_a_token_takes_one_latent_and_one_rotary_key(name, kind, storage, size):
    """In 8 bits with a scale, in the model's type, for both."""
    model = build(name)
    cache = make_cache(kind, model, storage=storage)
    tokens(model, cache, max_new_tokens=50)
    report = cache.report()
    for layer, described in zip(cache.own_layers, report.layers, strict=True):
        shared = layer.store.tree.segments if kind == BRANCHED else []
        held = layer.store.pool.layout.slots + sum(part.tokens for part in shared)
        assert described.kv_bytes == distinct_bytes(layer.kv_tensors()) == held * size
        assert described.token_bytes == size


@pytest.mark.parametrize("storage", [None, "fp8"])
@pytest.mark.parametrize("make", [exact_cache, make_cache])
def test_the_plan_is_what_a_cache_then_holds(make, storage):
    model, inputs = build("deepseek_v3"), prompt(batch=1, tokens=24, padding=())
    cache = make("reason_alloc", model, storage=storage)
    tokens(model, cache, inputs, max_new_tokens=41)
    lengths = dict(prompt=24, generated=40, dtype=torch.float32)
    plan = row_bytes(make("reason_alloc", model, storage=storage), model.config, **lengths)
    layers = cache.report().layers
    held = sum(each.kv_bytes + each.other_bytes for each in layers)
    assert plan.held() == held - mask_bytes(cache)


def test_head_budgets_are_moot_and_the_report_says_so():
    model = build("deepseek_v3")
    cache = make_cache("reason_alloc", model, head_budgets=True)
    plain = make_cache("reason_alloc", model, head_budgets=False)
    assert torch.equal(tokens(model, cache), tokens(model, plain))
    assert "one latent per token" in str(cache.report())
    assert "head_budgets" in str(cache.report()) and "head_budgets" not in str(plain.report())


# -------------------------------------------------------------------------- the way to the layer


def test_another_attention_implementation_is_an_error_before_the_second_layer():
    model = build("minicpm3", "sdpa")
    cache = ReasonAllocCache(model.config, budget=None)
    with pytest.raises(ValueError, match=r"expected the model to run 'reasoncache'.*new tokens"):
        tokens(model, cache)
    assert cache.get_seq_length() == 0
    model.set_attn_implementation("reasoncache")
    assert tokens(model, cache).shape == (2, 45)


def test_another_implementation_from_the_second_forward_on():
    model = build("minicpm3")
    inputs = prompt(padding=())
    driver = Driver(model, ReasonAllocCache(model.config, budget=None), inputs["attention_mask"])
    logits = driver(inputs["input_ids"])
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="expected the model to run 'reasoncache'"):
        driver(logits[:, -1:].argmax(-1))


def test_a_mask_made_outside_is_an_error():
    model = build("minicpm3")
    cache = ReasonAllocCache(model.config, budget=None)
    mask = torch.ones(2, 1, 21, 21, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="mask was prepared outside the model"):
        model(prompt()["input_ids"], attention_mask=mask, **cache_kwarg(cache))


def test_code_that_caches_expanded_keys_is_refused():
    model = build("minicpm3")
    cache = ReasonAllocCache(model.config, budget=None)
    said = r"expected latents \[batch, 1, tokens, 20\].*trust_remote"
    with pytest.raises(ValueError, match=said):
        cache.update(torch.ones(2, 6, 3, 20), torch.ones(2, 6, 3, 10), 0)


def test_attention_weights_equal_stock():
    model, inputs = build("deepseek_v3", "eager"), prompt()

    def run(cache):
        arguments = dict(output_attentions=True, return_dict_in_generate=True, max_new_tokens=5)
        return tokens(model, cache, inputs, **arguments).attentions

    expected = run(DynamicCache(config=model.config))
    model.set_attn_implementation("reasoncache_eager")
    found = run(ReasonAllocCache(model.config, budget=None))
    real = inputs["attention_mask"].bool()
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for got, want in zip(ours, theirs, strict=True):
            for row in range(2):
                # Queries of padding attend to whatever their base lets them.
                asked = slice(None) if step else real[row]
                assert torch.allclose(got[row, :, asked], want[row, :, asked], atol=1e-5)


def test_copies_of_a_cache_share_the_projection_and_nothing_else():
    model = build("deepseek_v3")
    driver = Driver(model, make_cache("reason_alloc", model), prompt()["attention_mask"])
    logits = driver.greedy(driver(prompt()["input_ids"]), 30)
    other = Driver(model, copy.deepcopy(driver.cache), driver.mask)
    other.seen = driver.seen
    assert torch.equal(driver.greedy(logits, 20), other.greedy(logits, 20))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_and_lower_types(base):
    model = build("minicpm3").to(base)
    exact, evicting = ReasonAllocCache(model.config, budget=None), make_cache("reason_alloc", model)
    stock = DynamicCache(config=model.config)
    for cache in (exact, evicting):
        driver = Driver(model, cache, prompt()["attention_mask"])
        theirs = Driver(model, copy.deepcopy(stock), prompt()["attention_mask"])
        ids = prompt()["input_ids"]
        with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
            for _ in range(24):
                got, want = driver(ids)[:, -1], theirs(ids)[:, -1]
                if cache is exact:
                    assert (got - want).abs().max() < 0.1 * want.abs().max()
                ids = want.argmax(-1, keepdim=True)
        assert {x.dtype for layer in cache.own_layers for x in layer.kv_tensors()} == {
            torch.bfloat16
        }


# --------------------------------------------------------------------------------- the projection


class LowRank(torch.nn.Module):
    """A projection with an adapter, as PEFT makes them."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 3, bias=False)
        self.up = torch.nn.Linear(3, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + 2 * self.up(self.down(x))


class Rounded(torch.nn.Module):
    """A projection that rounds what comes in, as int8 activations do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base((x * 4).round() / 4)


def replace_projections(model, wrap):
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = wrap(layer.self_attn.kv_b_proj)
    return model


def test_adapters_are_honoured():
    torch.manual_seed(3)
    model = replace_projections(build("minicpm3", "sdpa"), LowRank)
    expected = tokens(model, DynamicCache(config=model.config))
    assert not torch.equal(expected, tokens(build("minicpm3"), None)), "the adapter does something"
    model.set_attn_implementation("reasoncache")
    for kind in KINDS:
        assert torch.equal(tokens(model, exact_cache(kind, model)), expected)


def test_offloaded_weights():
    model = build("minicpm3", "sdpa")
    expected = tokens(model, DynamicCache(config=model.config))
    model.set_attn_implementation("reasoncache")
    cpu_offload(model, execution_device=torch.device("cpu"))
    cache = ReasonAllocCache(model.config, budget=None)
    assert torch.equal(tokens(model, cache), expected)
    linear = model.model.layers[0].self_attn.kv_b_proj
    assert linear.weight.is_meta
    assert cache.report().table_bytes > 3 * linear.weight.numel() * 4, "matrices are counted"


def test_weights_that_change_between_generations():
    """A step of training, or another adapter: nothing of the old weights stays."""
    model = build("minicpm3")
    cache = ReasonAllocCache(model.config, budget=None)
    before = tokens(model, cache)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.weight.mul_(-1.5)
    cache.reset()
    found = tokens(model, cache)
    model.set_attn_implementation("sdpa")
    expected = tokens(model, DynamicCache(config=model.config))
    assert torch.equal(found, expected) and not torch.equal(found, before)


@pytest.mark.parametrize("what", ["rounds", "has a bias"])
def test_a_projection_that_is_not_linear_is_refused(what):
    def biased(base):
        made = torch.nn.Linear(base.in_features, base.out_features)
        made.weight = base.weight
        return made

    model = replace_projections(build("minicpm3"), Rounded if what == "rounds" else biased)
    cache = ReasonAllocCache(model.config, budget=None)
    with pytest.raises(ValueError, match="kv_b_proj: expected a linear projection"):
        tokens(model, cache)
    assert cache.get_seq_length() == 0


# ------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_a_mask_hides_and_shows_again(kind):
    model, inputs = build("deepseek_v3"), prompt(padding=())
    ours = Driver(model, exact_cache(kind, model), inputs["attention_mask"])
    theirs = Driver(model, DynamicCache(config=model.config), inputs["attention_mask"])
    ids = inputs["input_ids"]
    for hidden in ([], [], [4, 5], [4, 9], []):
        for driver in (ours, theirs):
            driver.mask = torch.ones(2, driver.seen + ids.shape[1], dtype=torch.long)
            driver.mask[1, hidden] = 0
        found, wanted = (driver(ids)[:, -1] for driver in (ours, theirs))
        assert torch.allclose(found, wanted, atol=1e-4), hidden
        ids = wanted.argmax(-1, keepdim=True)


def test_a_branch_is_parked_and_resumed():
    model = build("deepseek_v3")
    cache = SharedBranchCache(model.config)
    whole = DynamicCache(config=model.config)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:1, :6], **cache_kwarg(cache))
        cache.fork(0)
        model(torch.cat([ids[:1, 6:9], ids[1:, 6:9]]), **cache_kwarg(cache))
        parked = cache.park(1, score=1.0)
        assert cache.resume(parked) == 1
        cache.park(0, score=1.0)
        found = model(ids[1:, 9:], **cache_kwarg(cache))
        expected = model(torch.cat([ids[:1, :6], ids[1:, 6:]], 1), **cache_kwarg(whole))
    assert torch.allclose(found.logits, expected.logits[:, -3:], atol=1e-4)
