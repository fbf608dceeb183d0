"""With nothing to evict, our caches change no token of any generate mode."""

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache.releases import cache_kwarg
from tests.support.caches import KINDS, exact_cache
from tests.support.driver import MODES
from tests.support.models import BUILDERS, build, prompt


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_equal_dynamic_cache(name, mode):
    base = "eager" if name == "gpt_oss" else "sdpa"
    model, arguments = build(name, base), dict(MODES[mode])
    inputs = prompt()
    if mode in ("prompt_lookup", "assisted"):
        inputs = {key: value[:1] for key, value in inputs.items()}
    if mode == "assisted":
        # A few of the assistant's drafts are right: its weights are a disturbed copy.
        assistant = build(name, base)
        with torch.no_grad():
            assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.02)
        arguments["assistant_model"] = assistant

    def run(cache):
        torch.manual_seed(7)
        return model.generate(
            **inputs, **arguments, **cache_kwarg(cache), max_new_tokens=24, use_cache=True
        )

    expected = run(DynamicCache(config=model.config))
    model.set_attn_implementation("reasoncache")
    assert torch.equal(run(DynamicCache(config=model.config)), expected), "foreign cache"
    for kind in KINDS:
        cache = exact_cache(kind, model)
        assert torch.equal(run(cache), expected), kind
        assert cache.report().evicted == 0
