"""What transformers' own generation tests ask of a cache, beside `DynamicCache`."""

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache import Protect
from hf_reasoncache.releases import CACHE_ARGUMENT, cache_kwarg
from tests.support.caches import KINDS, exact_cache, make_cache
from tests.support.models import BUILDERS, build, prompt


def generate(model, cache, inputs=None, **arguments):
    arguments = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True) | arguments
    return model.generate(**(inputs or prompt()), **cache_kwarg(cache), **arguments)


def dynamic(model):
    return DynamicCache(config=model.config)


def stock(name, base="sdpa"):
    return build(name, "eager" if name == "gpt_oss" else base)


# ------------------------------------------------------------------------------- keys and values


BEAMS, CHUNKS = dict(num_beams=3), dict(prefill_chunk_size=5)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, {}) for name in BUILDERS]
    + [(n, m) for n in ("llama", "gpt_oss") for m in (BEAMS, CHUNKS)],
    ids=str,
)
def test_layers_show_the_keys_and_values_of_stock_layers(name, mode):
    model, inputs = stock(name), prompt()
    expected = generate(model, dynamic(model), inputs, **mode)
    model.set_attn_implementation("reasoncache")
    for kind in KINDS:
        cache = exact_cache(kind, model)
        found = generate(model, cache, inputs, **mode)
        assert found[CACHE_ARGUMENT] is cache
        assert len(cache) == len(expected[CACHE_ARGUMENT]) == model.config.num_hidden_layers
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 11, dtype=torch.long)], 1)
        real = mask.repeat_interleave(mode.get("num_beams", 1), 0)[:, None, :, None].bool()
        pairs = list(zip(cache.layers, expected[CACHE_ARGUMENT].layers, strict=True))
        for index, (ours, theirs) in enumerate(pairs):
            assert ours.is_initialized and ours.get_seq_length() == theirs.get_seq_length()
            for got, want in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                assert got.shape == want.shape and got.dtype == want.dtype, (kind, index)
                if hasattr(ours, "store"):
                    got, want = (x * real[: len(x)] for x in (got, want))
                assert torch.allclose(got, want, atol=1e-4), (kind, index)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_has_no_keys(kind):
    model = build("llama")
    cache = make_cache(kind, model)
    generate(model, cache)
    cache.reset()
    assert not cache.is_initialized
    assert all(layer.keys is layer.values is None for layer in cache.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_layers_that_have_evicted_say_why_not(kind):
    model = build("llama")
    cache = make_cache(kind, model)
    generate(model, cache, max_new_tokens=2)
    assert cache.layers[1].keys.shape == (2, 2, 22, 16), "nothing was evicted yet"
    cache.reset()
    generate(model, cache, max_new_tokens=60)
    said = r"layer 1: expected to hold all \d+ columns, for keys in one .*got heads that hold \d+ "
    with pytest.raises(ValueError, match=said):
        cache.layers[1].keys  # noqa: B018
    with pytest.raises(AttributeError, match="no setter"):
        cache.layers[1].values = torch.zeros(1)


def test_a_cache_becomes_a_stock_one():
    model = build("llama")
    inputs = prompt(padding=(0, 0))
    cache = exact_cache("reason_alloc", model)
    out = generate(model, cache, inputs).sequences
    copy = DynamicCache(list(cache), config=model.config)
    longer = {"input_ids": out, "attention_mask": torch.ones_like(out)}
    expected = generate(model, cache, longer).sequences
    model.set_attn_implementation("sdpa")
    assert torch.equal(generate(model, copy, longer).sequences, expected)


# -------------------------------------------------------------------------- outputs asked for

ASKED = dict(output_scores=True, output_logits=True, output_hidden_states=True)
MODES = {
    "greedy": {},
    "chunks": dict(prefill_chunk_size=5),
    "beams": dict(num_beams=3),
    "prompt_lookup": dict(prompt_lookup_num_tokens=4),
    "assisted": {},
}


def arguments_of(mode, name):
    arguments, inputs = dict(MODES[mode]), prompt()
    if mode in ("prompt_lookup", "assisted"):
        inputs = {key: x[:1] for key, x in inputs.items()}
    if mode == "assisted":
        # A few of the assistant's drafts are right: its weights are a disturbed copy.
        arguments["assistant_model"] = assistant = stock(name)
        with torch.no_grad():
            assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.02)
    return arguments, inputs


def same_outputs(found, expected, names):
    assert torch.equal(found.sequences, expected.sequences)
    for name in names:
        got, want = found[name], expected[name]
        assert len(got) == len(want), name
        for one, other in zip(got, want, strict=True):
            pairs = (
                [(one, other)] if isinstance(one, torch.Tensor) else zip(one, other, strict=True)
            )
            for x, y in pairs:
                assert x.shape == y.shape, name
                finite = y.isfinite()
                assert torch.equal(x.isfinite(), finite)
                assert torch.allclose(x[finite], y[finite], atol=1e-3), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_outputs_are_those_of_dynamic_cache(name, mode):
    arguments, inputs = arguments_of(mode, name)
    model = stock(name)
    expected = generate(model, dynamic(model), inputs, **arguments, **ASKED)
    model.set_attn_implementation("reasoncache")
    for kind in KINDS:
        found = generate(model, exact_cache(kind, model), inputs, **arguments, **ASKED)
        same_outputs(found, expected, ["scores", "logits", "hidden_states"])


@pytest.mark.parametrize("kind", ["reason_alloc", "sliding_window"])
def test_a_cache_that_evicts_gives_outputs_too(kind):
    model, inputs = build("llama"), {key: x[:1] for key, x in prompt().items()}
    settings = dict(prompt_lookup_num_tokens=4, max_new_tokens=50)
    plain = generate(
        model, make_cache(kind, model, protect=Protect(prompt_length=21)), inputs, **settings
    )
    cache = make_cache(kind, model, protect=Protect(prompt_length=21))
    asked = generate(model, cache, inputs, **settings, **ASKED)
    assert torch.equal(asked.sequences, plain.sequences) and cache.report().evicted > 0
    assert len(asked.scores) == len(asked.logits) == 50


# What a mode asks of a cache does not depend on the architecture; with sinks or without is enough.
EVERY = [(name, "greedy") for name in BUILDERS]
EVERY += [(name, mode) for name in ("llama", "gpt_oss") for mode in MODES if mode != "greedy"]


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_attention_weights_are_those_of_eager_attention(name, mode):
    arguments, inputs = arguments_of(mode, name)
    model = build(name, "eager")
    asked = dict(output_attentions=True)
    expected = generate(model, dynamic(model), inputs, **arguments, **asked)
    model.set_attn_implementation("reasoncache_eager")
    for kind in KINDS:
        found = generate(model, exact_cache(kind, model), inputs, **arguments, **asked)
        same_outputs(found, expected, ["attentions"])


def test_attention_weights_asked_for_by_the_config():
    model, inputs = build("llama", "eager"), prompt()
    model.config.output_attentions = True
    model.set_attn_implementation("reasoncache_eager")
    cache = exact_cache("reason_alloc", model)
    with torch.no_grad():
        model(**inputs, **cache_kwarg(cache))
        out = model(torch.ones(2, 1, dtype=torch.long), **cache_kwarg(cache))
    assert [x.shape for x in out.attentions] == [(2, 6, 1, 22)] * 3


@pytest.mark.parametrize("lookup", [{}, dict(prompt_lookup_num_tokens=3)], ids=str)
@pytest.mark.parametrize(
    ("attention", "kind", "words"),
    [
        ("reasoncache", "exact", "another implementation, which computes none"),
        ("reasoncache_eager", "reason_alloc", "a cache that evicts"),
        ("reasoncache_eager", "sliding_window", "a cache that evicts"),
        ("reasoncache_eager", "branched", "a cache that evicts"),
    ],
)
def test_attention_weights_that_there_are_not(attention, kind, words, lookup):
    """One error, before any token, and the cache is as it was."""
    if kind == "branched" and lookup:
        lookup = dict(num_beams=2)
    model, inputs = build("llama", attention), {key: x[:1] for key, x in prompt().items()}
    cache = exact_cache("reason_alloc", model) if kind == "exact" else make_cache(kind, model)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    with pytest.raises(ValueError, match=rf"expected attn_impl.*'reasoncache_eager'.*got {words}"):
        generate(model, cache, inputs, output_attentions=True, **lookup)
    assert not steps and cache.get_seq_length() == 0
    assert len(generate(model, cache, inputs).sequences) == 1


# ---------------------------------------------------------------------------------------- gradients


def gradients(model):
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_forward_gives_gradients(kind):
    found = []
    for attention in ("sdpa", "reasoncache"):
        model, inputs = build("llama", attention), prompt()
        cache = dynamic(model) if attention == "sdpa" else make_cache(kind, model)
        model.train()(**inputs, **cache_kwarg(cache), labels=inputs["input_ids"]).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("trained", ["all", "q_proj", "k_proj", "embed_tokens"])
@pytest.mark.parametrize("make", [make_cache, exact_cache])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_a_pool_are_an_error(kind, make, trained):
    model, inputs = build("llama"), prompt()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or trained in name)
    cache, token = make(kind, model), torch.ones(2, 1, dtype=torch.long)
    model(**inputs, **cache_kwarg(cache))
    out = model(token, **cache_kwarg(cache), labels=token)
    with pytest.raises(ValueError, match=r"expected inference, got a backward pass.*DynamicCache"):
        out.loss.backward()
    with torch.no_grad():
        assert model(token, **cache_kwarg(cache)).logits.shape == (2, 1, 97)


def test_gradients_for_what_was_stored_are_an_error():
    """Soft prompts: the second forward itself has nothing to train."""
    model = build("llama").requires_grad_(False)
    soft = torch.randn(2, 5, 48, requires_grad=True)
    cache = exact_cache("reason_alloc", model)
    model(inputs_embeds=soft, **cache_kwarg(cache))
    token = torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="expected inference, got a backward pass"):
        model(token, **cache_kwarg(cache), labels=token).loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_in_grad_mode_is_as_one_without(kind):
    model, inputs = build("llama"), prompt()
    cache, found = make_cache(kind, model), []
    for grad in (True, False):
        cache.reset()
        with torch.set_grad_enabled(grad):
            logits = model(**inputs, **cache_kwarg(cache)).logits
            for _ in range(30):
                logits = model(logits[:, -1:].argmax(-1), **cache_kwarg(cache)).logits
        found.append(logits.detach())
    assert torch.equal(*found) and cache.report().evicted > 0
