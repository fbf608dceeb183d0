"""With nothing to evict, our caches change no token of any generate mode, except by rounding."""

import pytest
import torch
import transformers
from packaging.version import Version

from hf_reasoncache.releases import cache_kwarg
from tests.support.caches import KINDS, exact_cache
from tests.support.driver import MODES
from tests.support.models import BUILDERS, build, prompt
from tests.support.quantised import stock_cache

CASES = [(name, mode, None) for name in BUILDERS for mode in MODES]
CASES += [(name, mode, "fp8") for name in ("llama", "deepseek_v3") for mode in MODES]
CASES += [("gpt_oss", "four_beams", "fp8-keys"), ("gemma3", "chunked_prefill", "fp8-values")]


@pytest.mark.parametrize(("name", "mode", "storage"), CASES)
def test_tokens_equal_dynamic_cache(name, mode, storage):
    release = transformers.__version__
    if name == "minicpm3" and mode == "assisted" and Version(release) < Version("5.23"):
        pytest.skip(f"MiniCPM3 of transformers {release} cannot be asked about no tokens")
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

    expected = run(stock_cache(model, storage))
    model.set_attn_implementation("reasoncache")
    assert torch.equal(run(stock_cache(model, storage)), expected), "foreign cache"
    settings = {} if storage is None else {"storage": storage}
    for kind in KINDS:
        cache = exact_cache(kind, model, **settings)
        assert torch.equal(run(cache), expected), kind
        assert cache.report().evicted == 0
