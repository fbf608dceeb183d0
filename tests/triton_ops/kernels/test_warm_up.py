"""After `warm_up` an eviction launches nothing that is not compiled yet."""

import inspect

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache, warm_up
from hf_reasoncache.scorers import H2O, RKV, SnapKV
from tests.support.models import prompt
from tests.support.ops.generation import generate, small_latents, small_llama
from triton_ops.backend import interpreting, use_backend

pytestmark = pytest.mark.skipif(not interpreting(), reason="looks at the interpreter's launches")

STEP = {"append_kernel", "attend_kernel", "join_kernel", "cumulative_kernel"}
"""Launched from the first step on, before which nobody has to wait twice."""


def binary(kernel, args, kwargs):
    """What decides which binary of a kernel is launched: Triton's specialisations."""
    parts = []
    signature = inspect.signature(kernel.fn)
    meta = {"num_warps", "num_stages"}
    bound = signature.bind(*args, **{k: v for k, v in kwargs.items() if k not in meta})
    free = kernel.kwargs["do_not_specialize"] or ()
    for name, value in bound.arguments.items():
        if isinstance(value, torch.Tensor):
            parts.append(value.dtype)
        elif isinstance(value, int) and "constexpr" not in str(signature.parameters[name]):
            parts.append("int" if name in free else (value == 1, value % 16 == 0))
        else:
            parts.append(value if not isinstance(value, float) else "float")
    return (kernel.__name__, *parts, *(kwargs.get(name) for name in sorted(meta)))


@pytest.fixture
def launched(monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    found, run = set(), InterpretedFunction.run

    def noted(kernel, *args, grid, warmup, **kwargs):
        found.add(binary(kernel, args, kwargs))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    return found


CASES = {
    "R-KV": (ReasonAllocCache, dict(budget=8, buffer=3, window=2, scorer=RKV(queries=2))),
    "SnapKV": (ReasonAllocCache, dict(budget=8, buffer=3, window=2, scorer=SnapKV(queries=3))),
    "H2O": (ReasonAllocCache, dict(budget=8, buffer=3, window=2, scorer=H2O())),
    "latents": (ReasonAllocCache, dict(budget=8, buffer=3, window=2, scorer=RKV(queries=2))),
    "windows": (SlidingWindowCompressCache, dict(window=4, ratio=0.5, recent=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_evictions_find_their_kernels_compiled(name, launched):
    kind, settings = CASES[name]
    model = small_latents() if name == "latents" else small_llama()
    if kind is ReasonAllocCache:
        settings = settings | {"protect": False}
    cache = kind(model.config, **settings)
    warm_up(model, cache)
    compiled = set(launched)
    assert compiled and cache.get_seq_length() == 0
    launched.clear()
    generate(model, cache, prompt(batch=1, tokens=7, padding=()), max_new_tokens=9)
    assert cache.report().evictions >= 2
    assert {each for each in launched if each[0] not in STEP} == compiled


def test_nothing_happens_where_no_kernel_runs(launched):
    model = small_llama()
    for backend, cache in (
        ("torch", ReasonAllocCache(model.config, budget=8, buffer=3, window=2)),
        ("triton", ReasonAllocCache(model.config, budget=None)),
    ):
        with use_backend(backend):
            warm_up(model, cache)
    assert not launched
