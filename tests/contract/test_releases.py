"""From transformers 5.24 on the cache's argument has another name; no call of ours is warned."""

import inspect
import logging
import warnings

import pytest
import torch
import transformers
from packaging.version import Version

from hf_reasoncache import ReasonAllocCache, SharedBranchCache, branch_generate, prefill_once
from hf_reasoncache.calibration.coverage import Coverage
from hf_reasoncache.calibration.sensitivity import Eviction, Sensitivity
from hf_reasoncache.calibration.traces import TraceSettings, generate_traces
from hf_reasoncache.evaluation.generation import answer_batch
from hf_reasoncache.experimental.lookup import least_budget
from hf_reasoncache.experimental.semantic import semantic_prefill
from hf_reasoncache.releases import CACHE_ARGUMENT, cache_kwarg, take_cache
from tests.support.caches import KINDS, make_cache
from tests.support.models import VOCABULARY, build, prompt
from tests.support.traces import make_trace

NAMES = ("cache", "past_key_values")
IDS = prompt(padding=(0, 0))["input_ids"]


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture
def told(monkeypatch):
    """What transformers says, by a warning or in its log, whichever file it says it of."""
    found = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, text, *__: found.append(text))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda text, *_, **__: found.append(str(text)))
        yield found


def test_the_name_is_the_one_that_the_installed_models_have(llama):
    assert CACHE_ARGUMENT in inspect.signature(llama.forward).parameters
    assert CACHE_ARGUMENT in inspect.signature(llama.prepare_inputs_for_generation).parameters
    renamed = Version(transformers.__version__) >= Version("5.24.0")
    assert ("cache" if renamed else "past_key_values") == CACHE_ARGUMENT


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_found_under_either_name(llama, name):
    cache = SharedBranchCache(llama.config)
    kwargs = {name: cache, "use_cache": True}
    assert take_cache(kwargs) is cache and kwargs == {"use_cache": True}
    other = next(each for each in NAMES if each != name)
    assert take_cache({name: cache, other: None}) is cache
    assert take_cache({name: None}) is None is take_cache({})
    with pytest.raises(ValueError, match=f"expected one cache, got .*; pass {CACHE_ARGUMENT}="):
        take_cache({name: cache, other: cache})


BRANCHES = {
    "samples": dict(do_sample=True),
    "beams": dict(num_beams=3, do_sample=False),
}


@pytest.mark.parametrize("mode", BRANCHES)
@pytest.mark.parametrize("name", NAMES)
def test_branch_generate_takes_either_name(llama, name, mode, told):
    def run(**given):
        torch.manual_seed(1)
        return branch_generate(
            llama, prompt(), num_branches=3, max_new_tokens=12, **BRANCHES[mode], **given
        )

    cache = SharedBranchCache(llama.config)
    assert torch.equal(run(**{name: cache}), run())
    assert cache.get_seq_length() == 21 + 11
    with pytest.raises(ValueError, match=r"expected one cache, got `cache` and `past_key_values`"):
        run(cache=cache, past_key_values=cache)
    assert not [text for text in told if "past_key_values" in text]


def test_generate_still_takes_the_old_name(llama):
    """README's lines, on every release; from 5.24 on, the warning is about the user's own call."""
    arguments = prompt() | dict(max_new_tokens=12, do_sample=False)
    plain, cache = (ReasonAllocCache(llama.config, budget=None) for _ in range(2))
    expected = llama.generate(**arguments, **cache_kwarg(plain))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert torch.equal(llama.generate(**arguments, past_key_values=cache), expected)
    said = [each for each in found if "past_key_values" in str(each.message)]
    assert [each.filename for each in said] == [__file__] * (CACHE_ARGUMENT == "cache")


def generate(model, kind):
    cache = make_cache(kind, model)
    out = model.generate(
        **prompt(), **cache_kwarg(cache), max_new_tokens=60, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert getattr(out, CACHE_ARGUMENT) is cache and cache.report().evictions


def prefill(model):
    cache = SharedBranchCache(model.config)
    out = model.generate(
        **prompt(), **cache_kwarg(cache), num_return_sequences=2, do_sample=True, max_new_tokens=4,
        custom_generate=prefill_once, return_dict_in_generate=True,
    )  # fmt: skip
    assert getattr(out, CACHE_ARGUMENT) is cache and len(out.sequences) == 4


def assisted(model):
    cache = ReasonAllocCache(model.config, budget=None)
    model.generate(
        IDS[:1], **cache_kwarg(cache), prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False
    )


def calibrate(model):
    settings = TraceSettings(max_new_tokens=20)
    (trace,) = generate_traces(model, [IDS[0].tolist()], settings)
    assert trace.length > 21
    eviction = Eviction(buffer=6, window=4)
    traces = [make_trace(seed=seed) for seed in (1, 2)]
    for estimator in (
        Coverage(interval=8),
        Sensitivity(budgets=(8, 20), budget=12, eviction=eviction),
    ):
        records = [estimator.measure(model, each) for each in traces]
        assert estimator.estimate(records, traces).demand.shape == (3,)


def evaluate(model):
    cache = make_cache("reason_alloc", model)
    batch = answer_batch(model, IDS.tolist(), cache, max_new_tokens=40)
    assert [len(each.tokens) for each in batch.answers] == [40, 40] and batch.evicted


USES = {
    **{f"generate_{kind}": (lambda model, kind=kind: generate(model, kind)) for kind in KINDS},
    "prefill_once": prefill,
    "assisted": assisted,
    "semantic_prefill": lambda model: semantic_prefill(model, IDS, tau=-1.0, probe=4),
    "calibrate": calibrate,
    "least_budget": lambda model: least_budget(model, prompt(), window=4),
    "evaluate": evaluate,
}


@pytest.mark.parametrize("use", USES)
def test_no_call_of_ours_uses_the_old_name_on_a_release_that_has_the_new_one(llama, use, told):
    USES[use](llama)
    assert not [text for text in told if "past_key_values" in text]


def test_what_is_told_is_seen(llama, told):
    """The check above would see a warning about another file than ours, and a line in the log."""
    ids = torch.zeros(1, 3, dtype=torch.long).fill_(VOCABULARY - 1)
    out = llama(ids, past_key_values=ReasonAllocCache(llama.config, budget=None))
    assert out.past_key_values is not None
    said = [text for text in told if "past_key_values" in text]
    assert len(said) == (2 if CACHE_ARGUMENT == "cache" else 0)
