"""The attention pair: what it refuses, and that nothing changes for anybody else's cache."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    StaticCache,
)

import hf_reasoncache
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.attention import BASES, register
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import SHAPE, SLIDING_FIRST, build, prepare, prompt, sliding_first
from tests.support.oracle import Recorder

NAMES = ["reasoncache", "reasoncache_eager", "reasoncache_fa2"]


def gemma2(attention, layer_types=("full_attention",) * 3):
    torch.manual_seed(0)
    # Low caps, so that a logit that misses one changes the output.
    config = Gemma2Config(
        **SHAPE,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=12,
        layer_types=list(layer_types),
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    )
    return prepare(Gemma2ForCausalLM(config), attention)


def tokens(model, cache, inputs=None, **arguments):
    arguments = dict(max_new_tokens=40, do_sample=False) | arguments
    return model.generate(**(inputs or prompt()), **cache_kwarg(cache), **arguments)


# ------------------------------------------------------------------------------------ registration


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_an_attention_and_a_mask_function(name):
    assert sorted(BASES) == sorted(NAMES)
    assert name in AttentionInterface().valid_keys()
    assert name in AttentionMaskInterface().valid_keys()


def test_registering_again_changes_nothing():
    model = build("llama")
    expected = tokens(model, ReasonAllocCache(model.config, budget=None))
    register()
    hf_reasoncache.register()
    assert torch.equal(tokens(model, ReasonAllocCache(model.config, budget=None)), expected)


# ------------------------------------------------------------------- a forgotten implementation


FORGOTTEN = [(name, base) for name in ("llama", "qwen3", "gemma3") for base in ("sdpa", "eager")]


@pytest.mark.parametrize(("name", "attention"), [*FORGOTTEN, ("gpt_oss", "eager")])
@pytest.mark.parametrize("budget", [None, 40])
def test_forgotten_attention_is_an_error_that_names_the_remedy(name, attention, budget):
    model = build(name, attention)
    with pytest.raises(ValueError, match=r"set_attn_implementation\('reasoncache'\)"):
        tokens(model, ReasonAllocCache(model.config, budget=budget, window=4))


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_forgotten_attention_is_an_error_where_the_first_layer_slides(name):
    model = sliding_first(name, "eager")
    with pytest.raises(ValueError, match=r"set_attn_implementation\('reasoncache'\)"):
        tokens(model, ReasonAllocCache(model.config, budget=40, window=4))


# --------------------------------------------------------------------------- anybody else's cache


def base_of(name, attention):
    # gpt_oss has sinks, which sdpa does not know: the reasoncache pair runs its eager code instead.
    return "eager" if attention == "reasoncache_eager" or name == "gpt_oss" else "sdpa"


@pytest.mark.parametrize("attention", ["reasoncache", "reasoncache_eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2_sliding", "gemma3", "gpt_oss"])
class TestBitEqualToTheBase:
    """Same weights, same inputs, our attention pair against its base."""

    @staticmethod
    def both(name, attention, run):
        expected = run(build(name, base_of(name, attention)))
        found = run(build(name, attention))
        assert len(expected) == len(found) > 0
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)

    def test_without_a_cache(self, name, attention):
        def run(model):
            inputs = prompt()
            with torch.no_grad():
                padded = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
                return [padded, model(inputs["input_ids"], use_cache=False).logits]

        self.both(name, attention, run)

    @pytest.mark.parametrize("padding", [(0, 0), (0, 7)], ids=["unpadded", "padded"])
    @pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
    def test_with_a_cache_of_transformers(self, name, attention, kind, padding):
        def run(model):
            inputs = prompt(padding=padding)
            length = {"max_cache_len": 40} if kind is StaticCache else {}
            cache, ids, mask = kind(config=model.config, **length), inputs["input_ids"], None
            logits = []
            for step in range(6):
                # Twice a chunk, then single tokens.
                new = ids if step == 0 else ids[:, :5] if step == 1 else ids[:, step : step + 1]
                if mask is None:
                    mask = inputs["attention_mask"]
                else:
                    mask = torch.cat([mask, torch.ones_like(new)], dim=1)
                positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
                with torch.no_grad():
                    out = model(
                        new, attention_mask=mask, position_ids=positions, **cache_kwarg(cache)
                    )
                logits.append(out.logits[mask[:, -new.shape[1] :].bool()])
            return logits

        self.both(name, attention, run)

    def test_training_forward_and_gradients(self, name, attention):
        def run(model):
            inputs = prompt()
            out = model.train()(**inputs, labels=inputs["input_ids"])
            out.loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            return [out.loss.detach(), *gradients]

        self.both(name, attention, run)

    def test_packed_sequences(self, name, attention):
        positions = torch.tensor([[*range(9), *range(5), *range(7)]])

        def run(model):
            with torch.no_grad():
                packed = model(
                    prompt()["input_ids"][:1], position_ids=positions, use_cache=False
                ).logits
                return [packed]

        self.both(name, attention, run)
        if name == "gpt_oss":
            return  # its base does not separate packed sequences
        model, ids = build(name, attention), prompt()["input_ids"][:1]
        with torch.no_grad():
            alone = model(ids[:, 9:14], use_cache=False).logits
        torch.testing.assert_close(run(model)[0][:, 9:14], alone, atol=1e-4, rtol=1e-4)

    def test_prepared_4d_mask(self, name, attention):
        def run(model):
            dtype = torch.bool if base_of(name, attention) == "sdpa" else torch.float32
            mask = torch.ones(21, 21, dtype=torch.bool).tril()[None, None]
            if dtype == torch.float32:
                mask = torch.zeros(1, 1, 21, 21).masked_fill(~mask, torch.finfo(dtype).min)
            with torch.no_grad():
                ids = prompt()["input_ids"]
                return [model(ids, attention_mask=mask.expand(2, 1, 21, 21)).logits]

        self.both(name, attention, run)

    def test_generate(self, name, attention):
        self.both(name, attention, lambda model: [tokens(model, DynamicCache(config=model.config))])


# ------------------------------------------------------------------------------- masks of our own


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("budget", [None, 40])
@pytest.mark.parametrize("turn", [1, 2])
def test_4d_mask_is_refused_with_our_cache(name, budget, turn):
    model = build(name)
    cache, ids = ReasonAllocCache(model.config, budget=budget, window=4), prompt()["input_ids"]
    with torch.no_grad():
        if turn == 2:
            model(ids, **cache_kwarg(cache))
        seen = 21 * turn
        mask = (
            torch.ones(21, seen, dtype=torch.bool).tril(seen - 21)[None, None].expand(2, 1, -1, -1)
        )
        with pytest.raises(
            ValueError, match=r"expected a 2-D padding mask.*shape \[batch, tokens\]"
        ):
            model(ids, attention_mask=mask, **cache_kwarg(cache))


# ------------------------------------------------------------------ sinks, softcap, sliding first


@pytest.mark.parametrize("attention", ["reasoncache", "reasoncache_eager"])
@pytest.mark.parametrize("types", [("full_attention",) * 3, SLIDING_FIRST], ids=["full", "hybrid"])
def test_softcap_model_equals_dynamic_cache(attention, types):
    plain, model = gemma2("eager", types), gemma2(attention, types)
    expected = tokens(plain, DynamicCache(config=plain.config))
    assert torch.equal(tokens(model, DynamicCache(config=model.config)), expected)
    assert torch.equal(tokens(model, ReasonAllocCache(model.config, budget=None)), expected)
    chunked = ReasonAllocCache(model.config, budget=None)
    assert torch.equal(tokens(model, chunked, prefill_chunk_size=8), expected)
    steps = torch.arange(3, 23).repeat(2, 1)

    def logits(model, cache):
        with torch.no_grad():
            first = model(**prompt(padding=(0, 0)), **cache_kwarg(cache)).logits
            rest = [model(steps[:, t : t + 1], **cache_kwarg(cache)).logits for t in range(20)]
        return torch.cat([first, *rest], dim=1)

    torch.testing.assert_close(
        logits(model, ReasonAllocCache(model.config, budget=None)),
        logits(plain, DynamicCache(config=plain.config)),
        atol=1e-4,
        rtol=1e-4,
    )


def test_softcap_is_part_of_this_test():
    """Without the cap the logits differ by far more than the tolerance above."""
    capped, free = gemma2("eager"), gemma2("eager")
    for layer in free.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    with torch.no_grad():
        ids = prompt()["input_ids"]
        assert (capped(ids).logits - free(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["reasoncache", "reasoncache_eager"])
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_model_whose_first_layer_slides_equals_dynamic_cache(name, attention):
    plain, model = sliding_first(name, "eager"), sliding_first(name, attention)
    for arguments in ({}, {"prefill_chunk_size": 8}, {"num_beams": 3}, {"do_sample": True}):
        torch.manual_seed(3)
        expected = tokens(plain, DynamicCache(config=plain.config), **arguments)
        torch.manual_seed(3)
        cache = ReasonAllocCache(model.config, budget=None)
        assert torch.equal(tokens(model, cache, **arguments), expected), arguments


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_model_whose_first_layer_slides_evicts_as_the_oracle_says(name):
    model, inputs = sliding_first(name), prompt()
    cache = ReasonAllocCache(model.config, budget=40, buffer=8, window=4, profile=[4, 1])
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    for _ in range(60):
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    assert cache.report().evictions > 0
    recorder.check(1e-4)


def test_eager_pair_evicts_like_the_sdpa_pair():
    def run(attention):
        model = build("llama", attention)
        cache = ReasonAllocCache(model.config, budget=40, buffer=8, window=4)
        return tokens(model, cache), cache.held_positions(1)

    (first, held), (second, held_too) = run("reasoncache"), run("reasoncache_eager")
    assert torch.equal(first, second) and held == held_too


# ------------------------------------------------------------------------------- flash attention


@pytest.mark.parametrize("padding", [(0, 0), (0, 7)], ids=["unpadded", "padded"])
def test_fa2_pair_hands_the_padding_mask_to_flash_attention(fake_flash, padding):
    plain, model = build("llama", "sdpa"), build("llama", "reasoncache_fa2")
    inputs = prompt(padding=padding)
    expected = tokens(plain, DynamicCache(config=plain.config), inputs)
    assert torch.equal(tokens(model, DynamicCache(config=model.config), inputs), expected)
    forwards = 40
    assert len(fake_flash) == 3 * forwards
    fake_flash.clear()
    assert torch.equal(tokens(model, ReasonAllocCache(model.config, budget=None), inputs), expected)
    assert len(fake_flash) == 3, "flash attention for the prompt, the pool for the rest"
