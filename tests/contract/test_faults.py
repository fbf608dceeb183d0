"""Bad input: a ValueError that says what was expected, what came and what to do about it."""

import inspect
import re

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    DynamicCache,
    Gemma3TextConfig,
    MambaConfig,
    MistralConfig,
    T5Config,
)

import hf_reasoncache
from hf_reasoncache import (
    Protect,
    ReasonAllocCache,
    SlidingWindowCompressCache,
    experimental,
)
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import RKV
from tests.support.caches import CLASSES, KINDS, SETTINGS, exact_cache, make_cache
from tests.support.driver import Driver
from tests.support.models import SHAPE, build, prompt, sliding_first
from tests.support.pairs import in_turn

HUGE = 10**30


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def generate(model, cache, inputs=None, **arguments):
    arguments = dict(max_new_tokens=30, do_sample=False) | arguments
    return model.generate(**(inputs or prompt()), **cache_kwarg(cache), **arguments)


class Counter(transformers.StoppingCriteria):
    """Counts the tokens that generate has chosen."""

    tokens = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.tokens += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


# --------------------------------------------------------------------------------------- arguments


def test_constructors_have_at_most_thirteen_settings():
    public = [
        each
        for package in (hf_reasoncache, experimental)
        for each in map(vars(package).get, package.__all__)
        if isinstance(each, type) and issubclass(each, transformers.Cache)
    ]
    assert {ReasonAllocCache, SlidingWindowCompressCache} < set(public)
    for cache in public:
        assert len(inspect.signature(cache).parameters.keys() - {"config"}) <= 13, cache


@pytest.mark.parametrize("value", [0, -1, -HUGE, True, 64.0, float("nan"), "64", [64]], ids=repr)
@pytest.mark.parametrize("name", ["budget", "buffer", "window"])
def test_number_out_of_range_or_of_another_type(llama, name, value):
    settings = {"budget": 64} | {name: value}
    said = rf"{name}: expected an integer >= \d+, got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=said):
        ReasonAllocCache(llama.config, **settings)


@pytest.mark.parametrize("value", [0, -1, -HUGE, True, 64.0, float("nan"), "64", [64]], ids=repr)
def test_prompt_length_out_of_range_or_of_another_type(value):
    said = f"protect: expected prompt_length as an integer >= 1, got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=said):
        Protect(prompt_length=value)


@pytest.mark.parametrize("name", ["buffer", "window"])
def test_none_is_no_number(llama, name):
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1, got None"):
        ReasonAllocCache(llama.config, **{"budget": 64, name: None})


@pytest.mark.parametrize("window", [64, 65])
def test_budget_that_cannot_hold_the_window(llama, window):
    with pytest.raises(ValueError, match=f"budget: expected an integer >= {window + 1}, got 64"):
        ReasonAllocCache(llama.config, budget=64, window=window)
    ReasonAllocCache(llama.config, budget=64, window=63)


@pytest.mark.parametrize(
    "profile",
    [
        [1, -1, 2],
        [1, float("nan"), 2],
        [1, float("inf"), 2],
        [0, 0, 0],
        [],
        torch.tensor([1, -1, 2]),
    ],
    ids=["negative", "nan", "inf", "zeros", "empty", "tensor"],
)
@pytest.mark.parametrize("kind", CLASSES)
def test_profile_with_unusable_numbers(llama, profile, kind):
    with pytest.raises(ValueError, match=r"profile: expected .*demand.* got "):
        CLASSES[kind](llama.config, **SETTINGS[kind], profile=profile)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("name", "layers"), [("llama", 3), ("gemma3", 2)])
@pytest.mark.parametrize("off_by", [-1, 1])
def test_profile_of_another_geometry(name, layers, off_by, kind):
    said = (
        rf"profile: expected {layers} demands, one per full-attention layer.* "
        rf"got {layers + off_by}; use a profile that was calibrated on this model"
    )
    with pytest.raises(ValueError, match=said):
        profile = [1.0] * (layers + off_by)
        CLASSES[kind](build(name).config, **SETTINGS[kind], profile=profile)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("scorer", [7, object(), RKV, lambda held: held.keys])
def test_scorer_that_is_none(llama, scorer, kind):
    with pytest.raises(ValueError, match=r"scorer: expected .*scorers or a name, got .*RKV\(\)"):
        CLASSES[kind](llama.config, **SETTINGS[kind], scorer=scorer)


@pytest.mark.parametrize("value", [0, -1, -HUGE, HUGE, True, 64.0, "64", [64]], ids=repr)
@pytest.mark.parametrize("name", ["window", "recent", "max_budget"])
def test_windows_refuse_numbers_out_of_range_or_of_another_type(llama, name, value):
    said = rf"{name}: expected an integer [><]= \d+, got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=said):
        SlidingWindowCompressCache(llama.config, **{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), HUGE, True, "0.3", [0.3]], ids=repr)
@pytest.mark.parametrize("name", ["ratio", "prompt_ratio", "chunk_share"])
def test_windows_refuse_shares_that_are_none(llama, name, value):
    said = rf"{name}: expected a number from 0\S* to 1, got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=said):
        SlidingWindowCompressCache(llama.config, **{name: value})


def test_windows_refuse_what_does_not_fit_together(llama):
    with pytest.raises(ValueError, match=r"ratio: expected a number from 0\.125 to 1, got 0\.1"):
        SlidingWindowCompressCache(llama.config, window=8, ratio=0.1)
    with pytest.raises(ValueError, match=r"max_budget: expected an integer >= 70, got 69"):
        SlidingWindowCompressCache(llama.config, max_budget=69)
    with pytest.raises(ValueError, match=r"max_budget: expected a ratio below 1.*ReasonAllocCache"):
        SlidingWindowCompressCache(llama.config, ratio=1.0, max_budget=4096)


@pytest.mark.parametrize("name", ["protect", "head_budgets"])
@pytest.mark.parametrize("value", ["no", None, 2])
def test_windows_refuse_a_flag_that_is_no_bool(llama, name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SlidingWindowCompressCache(llama.config, **{name: value})


# ------------------------------------------------------------------------------------------ models


def unsupported():
    yield "t5", T5Config(), "encoder-decoder"
    yield "bart", BartConfig(), "encoder-decoder"
    yield (
        "mistral",
        MistralConfig(num_hidden_layers=2, sliding_window=16),
        "no full-attention layer",
    )
    gemma = dict(num_hidden_layers=2, layer_types=["sliding_attention"] * 2, sliding_window=16)
    yield "gemma3_text", Gemma3TextConfig(**gemma), "no full-attention layer"
    yield "mamba", MambaConfig(num_hidden_layers=2), "no full-attention layer"
    for name, feature in {
        "DeepseekV32Config": "indexer",
        "GlmMoeDsaConfig": "indexer",
        "Gemma3nTextConfig": "reuse the keys and values of other layers",
    }.items():
        if hasattr(transformers, name):
            config = getattr(transformers, name)()
            yield config.model_type, config, feature
    if hasattr(transformers, "Gemma4TextConfig"):
        config = transformers.Gemma4TextConfig(num_hidden_layers=12, num_kv_shared_layers=6)
        yield config.model_type, config, "reuse the keys and values of other layers"


@pytest.mark.parametrize(
    ("model_type", "config", "feature"), [pytest.param(*row, id=row[0]) for row in unsupported()]
)
@pytest.mark.parametrize("kind", CLASSES)
def test_unsupported_model_by_name(model_type, config, feature, kind):
    said = rf"{model_type}.*: expected .*full-attention.*got .*({feature}).*; use DynamicCache"
    with pytest.raises(ValueError, match=said):
        CLASSES[kind](config, **SETTINGS[kind])


@pytest.mark.parametrize("config", [None, {}, "meta/model", MistralConfig, 3], ids=repr)
def test_config_of_another_type(config):
    with pytest.raises(
        ValueError, match=r"config: expected a transformers config, got .*model\.config"
    ):
        ReasonAllocCache(config, budget=64)


def test_model_in_place_of_its_config(llama):
    with pytest.raises(ValueError, match=r"got LlamaForCausalLM; pass model\.config"):
        ReasonAllocCache(llama, budget=64)


# ---------------------------------------------------------------------------- prompts and batches


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"prefill_chunk_size": 8}], ids=repr)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_budget_below_the_protected_prompt_and_the_window(name, arguments):
    model, chosen = build(name), Counter()
    # 21 prompt tokens in the longest row; the other one would fit.
    cache = ReasonAllocCache(model.config, budget=24, window=4)
    said = (
        r"expected budget >= 25 \(21 protected prompt tokens and a window of 4\), got budget=24\. "
        r"Raise the budget, shorten the prompt, or pass protect=False"
    )
    if "prefill_chunk_size" in arguments:
        said = r"expected budget >= \d+ \(\d+ protected prompt tokens.*got budget=24\. Raise"
    with pytest.raises(ValueError, match=said):
        generate(model, cache, stopping_criteria=[chosen], **arguments)
    assert chosen.tokens == 0, "before any token"


def test_budget_that_just_holds_the_prompt_and_the_window(llama):
    for budget in (25, 26):
        cache = ReasonAllocCache(llama.config, budget=budget, window=4, buffer=4)
        assert generate(llama, cache).shape == (2, 51)
        for head in cache.held_positions(0)[0]:
            assert head[:21] == list(range(21)), "the prompt"
    free = ReasonAllocCache(llama.config, budget=8, window=4, buffer=4, protect=False)
    assert generate(llama, free).shape == (2, 51)


def test_budget_error_goes_away_with_reset_and_a_shorter_prompt(llama):
    cache = ReasonAllocCache(llama.config, budget=24, window=4)
    for _ in range(2):
        with pytest.raises(ValueError, match="budget >= 25"):
            generate(llama, cache)
        cache.reset()
    short = {key: value[:, 8:] for key, value in prompt().items()}
    fresh = ReasonAllocCache(llama.config, budget=24, window=4)
    assert torch.equal(generate(llama, cache, short), generate(llama, fresh, short))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("batch", [1, 3])
def test_other_batch_without_reset(llama, batch, kind):
    cache = make_cache(kind, llama)
    generate(llama, cache, max_new_tokens=3)
    longer = prompt(batch=batch, tokens=40, padding=(0,) * batch)
    with pytest.raises(ValueError, match=rf"a batch of 2 rows.*got {batch}; reset\(\) the cache"):
        generate(llama, cache, longer)
    cache.reset()
    fresh = make_cache(kind, llama)
    other = prompt(batch=batch, padding=(0,) * batch)
    assert torch.equal(generate(llama, cache, other), generate(llama, fresh, other))


def test_crop_by_a_positive_number(llama):
    cache = ReasonAllocCache(llama.config, budget=40, window=4)
    generate(llama, cache, max_new_tokens=3)
    with pytest.raises(
        ValueError, match=r"negative number of tokens to remove, got 2; use crop\(-n\)"
    ):
        cache.crop(2)
    assert cache.get_seq_length() == 23


@pytest.mark.parametrize("layer", [1, 3, -1])
def test_held_positions_of_a_layer_that_is_not_ours(layer):
    cache = ReasonAllocCache(build("gemma3").config, budget=40)
    with pytest.raises(ValueError, match=rf"a full-attention layer of \[0, 2\], got {layer}"):
        cache.held_positions(layer)


# ------------------------------------------------------------------------ interrupted generations


@pytest.mark.parametrize("make", [exact_cache, make_cache])
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("layer", [0, 1])
def test_generation_interrupted_between_cache_and_attention(llama, kind, make, layer, monkeypatch):
    cache = make(kind, llama)
    generate(llama, cache, max_new_tokens=3)
    token = torch.ones(2, 1, dtype=torch.long)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[layer], "take_incoming", interrupt)
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            llama(token, **cache_kwarg(cache))
    with pytest.raises(ValueError, match=r"interrupted|reset\(\)"), torch.no_grad():
        llama(token, **cache_kwarg(cache))
    cache.reset()
    assert torch.equal(generate(llama, cache), generate(llama, make(kind, llama)))


def test_cache_that_is_still_generating_is_not_shared(llama):
    """A second generation that starts inside the first one meets the cache between two calls."""
    cache = ReasonAllocCache(llama.config, budget=None)
    layer, update = cache.layers[0], cache.layers[0].update

    def nested(*args, **kwargs):
        layer.update = update
        guards = update(*args, **kwargs)
        llama(torch.ones(2, 3, dtype=torch.long), **cache_kwarg(cache))
        return guards

    layer.update = nested
    with pytest.raises(ValueError, match="one generation at a time"):
        generate(llama, cache)


# ------------------------------------------------------------------------------ refused forwards


def small(kind, model):
    """A cache whose bound is too small for the prompts of 30 tokens, and not for those of 8."""
    settings = dict(budget=24) if kind != "sliding_window" else dict(max_budget=24)
    return make_cache(kind, model, **settings)


def of_length(tokens, batch=2):
    return prompt(batch=batch, tokens=tokens, padding=(0, 3)[:batch])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("kind", ["reason_alloc", "branched", "sliding_window"])
def test_a_refused_prompt_leaves_the_cache_as_new(name, kind):
    """Another prompt, another batch, and the report say so, without a reset."""
    model = build(name)
    cache = small(kind, model)
    for _ in range(2):
        with pytest.raises(ValueError, match="budget"):
            generate(model, cache, of_length(30))
        assert cache.get_seq_length() == 0
        assert cache.report() == small(kind, model).report()
    inputs = of_length(8, batch=1)
    expected = generate(model, small(kind, model), inputs, max_new_tokens=12)
    assert torch.equal(generate(model, cache, inputs, max_new_tokens=12), expected)


def test_a_first_forward_that_runs_out_of_memory_leaves_the_cache_as_new(llama, monkeypatch):
    cache = ReasonAllocCache(llama.config, budget=40, window=4)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[1], "store_first", full)
        with pytest.raises(torch.OutOfMemoryError):
            generate(llama, cache)
    fewer = {key: x[1:] for key, x in prompt().items()}
    fresh = ReasonAllocCache(llama.config, budget=40, window=4)
    assert torch.equal(generate(llama, cache, fewer), generate(llama, fresh, fewer))


@pytest.mark.parametrize("kind", ["reason_alloc", "branched"])
def test_a_refused_chunk_of_a_prompt_is_taken_back(llama, kind):
    """The chunks before it are held, and a shorter rest fits."""
    inputs, cache, fresh = of_length(30), small(kind, llama), small(kind, llama)
    with pytest.raises(ValueError, match="budget too small"):
        generate(llama, cache, inputs, prefill_chunk_size=16)
    assert [layer.seen for layer in cache.layers] == [16] * 3
    first, second = (Driver(llama, x, inputs["attention_mask"]) for x in (cache, fresh))
    first.seen = 16
    second(inputs["input_ids"][:, :16])
    rest = inputs["input_ids"][:, 16:18]
    found = [torch.cat([x(rest), x.greedy(x(rest), 20)], 1) for x in (first, second)]
    assert torch.allclose(*found, atol=1e-5)
    assert cache.held_positions(1) == fresh.held_positions(1)


@pytest.mark.parametrize("make", [exact_cache, make_cache])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_mask_that_was_refused_is_forgotten(llama, kind, make):
    cache, fresh = make(kind, llama), make(kind, llama)
    generate(llama, cache, max_new_tokens=3)
    generate(llama, fresh, max_new_tokens=3)
    token = torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        with pytest.raises(ValueError, match="expected a 2-D padding mask"):
            llama(token, attention_mask=torch.zeros(2, 1, 1, 24), **cache_kwarg(cache))
        found = [llama(token, **cache_kwarg(each)).logits for each in (cache, fresh)]
    assert torch.equal(*found)


def test_a_forward_that_was_interrupted_says_so_before_torch_does(llama):
    """A shorter prompt would have no new token, which is an error of torch's deep in the model."""
    cache = ReasonAllocCache(llama.config, budget=None)
    hook = llama.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(llama, cache)
    hook.remove()
    with pytest.raises(ValueError, match=r"got \[0, 21\]: a forward was interrupted.*reset\(\)"):
        generate(llama, cache, of_length(8))


# ------------------------------------------------------------------------------ the wrong model


def other(layers, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": layers}, head_dim=16)
    model = transformers.LlamaForCausalLM(config).eval().to(dtype)
    model.set_attn_implementation("reasoncache")
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("make", [exact_cache, make_cache])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [2, 4])
def test_a_cache_for_another_number_of_layers(llama, layers, kind, make):
    cache, chosen = make(kind, other(layers)), Counter()
    said = rf"expected a model of {layers} layers, as in .*got one of 3; make the cache from this"
    with pytest.raises(ValueError, match=said):
        generate(llama, cache, stopping_criteria=[chosen])
    assert chosen.tokens == 0 and cache.get_seq_length() == 0
    generate(other(layers), cache)


@pytest.mark.parametrize(
    ("kind", "dtype", "what"),
    in_turn(
        KINDS,
        [torch.float16, torch.bfloat16, torch.float64],
        [("llama", exact_cache), ("gemma3", make_cache), ("llama", make_cache)],
    ),
    ids=lambda each: f"{each[0]}-{each[1].__name__}" if isinstance(each, tuple) else str(each),
)
def test_another_dtype_in_mid_cache(kind, dtype, what):
    """As after `model.half()` between two turns; going back goes on."""
    name, make = what
    model = sliding_first(name) if name == "gemma3" else build(name)
    cache, fresh = make(kind, model), make(kind, model)
    for each in (cache, fresh):
        generate(model, each, max_new_tokens=30)
    token = torch.ones(2, 1, dtype=torch.long)
    said = rf"expected keys and values in torch.float32 as before, got {dtype}; reset\(\) the cache"
    with torch.no_grad():
        with pytest.raises(ValueError, match=said):
            model.to(dtype)(token, **cache_kwarg(cache))
        model.float()
        found = [model(token, **cache_kwarg(each)).logits for each in (cache, fresh)]
    if dtype == torch.float64:
        assert torch.equal(*found)
    cache.reset()
    generate(model.to(dtype), cache, max_new_tokens=3)


def test_keys_and_values_put_in_by_hand(llama):
    """As prefix tuning fills a cache, without an attention."""
    cache = ReasonAllocCache(llama.config, budget=None)
    for layer in range(3):
        cache.update(torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16), layer)
    with pytest.raises(ValueError, match=r"cannot be filled by hand \(prefix tuning: use Dynamic"):
        generate(llama, cache, max_new_tokens=3)
    cache.reset()
    assert generate(llama, cache).shape == (2, 51)


# ------------------------------------------------------------------------------- guarded tensors


@pytest.mark.parametrize(
    "compute",
    [
        lambda k: k + 1,
        lambda k: k @ k.transpose(-1, -2),
        lambda k: torch.cat([k, k], dim=2),
        lambda k: k[:, :, -1],
        lambda k: k.clone(),
        lambda k: k.reshape(2, -1),
        lambda k: torch.nn.functional.scaled_dot_product_attention(k, k, k),
        lambda k: k.mul_(2),
        lambda k: k.to(torch.float64),
    ],
    ids=["add", "matmul", "cat", "index", "clone", "reshape", "sdpa", "in_place", "to"],
)
def test_guarded_keys_cannot_be_computed_with(llama, compute):
    cache = ReasonAllocCache(llama.config, budget=None)
    keys, values = cache.update(torch.ones(2, 2, 5, 16), torch.ones(2, 2, 5, 16), 0)
    assert keys.shape == values.shape == (2, 2, 5, 16) and keys.dtype == torch.float32
    for guard in (keys, values):
        with pytest.raises(ValueError, match=r"set_attn_implementation\('reasoncache'\)"):
            compute(guard)


def test_a_compiled_forward_is_refused_by_name(llama):
    forward = torch.compile(llama.forward, backend="eager")
    with pytest.raises(Exception, match=r"torch\.compile traces the forward"):
        forward(**prompt(), **cache_kwarg(ReasonAllocCache(llama.config, budget=None)))


def test_default_settings_are_accepted(llama):
    """The other side of this file: what is right raises nothing."""
    ReasonAllocCache(llama.config, budget=None)
    ReasonAllocCache(llama.config, budget=9)
    ReasonAllocCache(
        llama.config, budget=64, scorer=RKV(), profile=(0, 1, 2), protect=Protect(prompt_length=21)
    )
    ReasonAllocCache(llama.config, budget=64, profile=torch.ones(3), buffer=1, window=1)
    for name in ("qwen3", "mistral", "gemma3", "gpt_oss"):
        cache = ReasonAllocCache(build(name).config, budget=64)
        assert len(cache.layers) == len(DynamicCache(config=build(name).config).layers) == 3
