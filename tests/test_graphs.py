"""Which steps are recorded, what is refused by name, and what a model or a cache keeps of it.

That repeated steps give the same tokens is tested with the kernels.
"""

import copy
import functools
import gc
import inspect
import pickle
import weakref
from contextlib import ExitStack, contextmanager

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, decode_graphs, disable_graphs, enable_graphs
from hf_reasoncache.graphs import CudaRecorder, DecodeGraphs, _place_mask, _remember, _same
from hf_reasoncache.model_graphs import GraphedForward
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.risk import Probes, Risk
from hf_reasoncache.scorers import H2O
from tests.support.caches import make_cache
from tests.support.models import SHAPE, build, prompt
from triton_ops.backend import use_backend


class Never:
    """A recorder that must not be asked."""

    def record(self, step):
        raise AssertionError("nothing to record")


class Once:
    """A recorder whose recordings repeat nothing: for tests that end before they would."""

    def __init__(self, device=None):
        self.asked = 0

    def record(self, step):
        self.asked += 1
        return step(), lambda: None


@pytest.fixture
def kernels(monkeypatch):
    """Steps are recorded as if the kernels ran; the reference does."""
    monkeypatch.setattr("hf_reasoncache.model_graphs.chosen", lambda device, dtype: "triton")


def steps(model, cache, inputs, count, start=5):
    """Logits of `count` single tokens behind what the cache holds."""
    found = []
    with torch.no_grad():
        if not cache.get_seq_length():
            model(**inputs, **cache_kwarg(cache))
        for step in range(count):
            seen = cache.get_seq_length()
            mask = torch.nn.functional.pad(
                inputs["attention_mask"], (0, seen + 1 - inputs["input_ids"].shape[1]), value=1
            )
            ids = torch.full((len(mask), 1), start + step)
            out = model(input_ids=ids, attention_mask=mask, **cache_kwarg(cache))
            found.append(out.logits)
    return torch.cat(found, 1)


# ------------------------------------------------------------------------------- what is refused


def _chunked(model):
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]


def _flash(model):
    model.config._attn_implementation = "reasoncache_fa2"


@pytest.mark.parametrize(
    ("name", "change", "backend", "recorder", "said"),
    [
        ("llama", None, "auto", None, "one CUDA device, got cpu; generate without graphs"),
        ("llama", None, "torch", Never(), "the Triton backend, got torch"),
        ("gemma3", _chunked, "auto", Never(), "windows that slide, got chunked attention"),
        ("gemma3", _flash, "auto", Never(), "beside sliding windows, got 'reasoncache_fa2'"),
    ],
)
def test_what_cannot_be_recorded_is_refused(name, change, backend, recorder, said):
    model = build(name)
    cache = ReasonAllocCache(model.config, budget=None)
    if change is not None:
        change(model)
    with (
        pytest.raises(ValueError, match=f"decode_graphs: expected .*{said}"),
        use_backend(backend),
        decode_graphs(model, cache, recorder=recorder),
    ):
        raise AssertionError("entered")
    assert "forward" not in vars(model)


def test_layers_and_probes_that_cannot_be_recorded_are_named():
    model = build("gemma3")
    cache = ReasonAllocCache(model.config, budget=None)
    cache.layers[1] = object()
    with pytest.raises(ValueError, match="or linear attention, got object"):
        decode_graphs(model, cache, recorder=Never()).__enter__()
    model = build("llama")
    cache = make_cache("reason_alloc", model, risk=Risk(probes=Probes(heads=1.0)))
    with pytest.raises(ValueError, match="plain decoding, got probes"):
        decode_graphs(model, cache, recorder=Never()).__enter__()


def test_a_model_of_sliding_windows_only_has_nothing_to_compress():
    """Such a model has no cache of ours, hence no graphs of ours either."""
    from transformers import MistralConfig

    with pytest.raises(ValueError, match="no full-attention layer"):
        ReasonAllocCache(MistralConfig(**SHAPE, head_dim=16, sliding_window=8), budget=64)


def test_an_enabled_model_on_a_cpu_decodes_as_before_and_says_why():
    model, inputs = build("gemma3"), prompt()
    plain, cache = (ReasonAllocCache(model.config, budget=None) for _ in range(2))
    assert plain.report().graphs is None
    expected = steps(model, plain, inputs, 3)
    assert "graphs: none on this device (cpu)" in str(plain.report())
    enable_graphs(model)
    assert torch.equal(steps(model, cache, inputs, 3), expected)
    disable_graphs(model)
    said = "expected a model on one CUDA device, got cpu"
    assert cache.graph_use.eager == 3 and cache.graph_use.reason == said
    assert f"graphs: recorded 0, replayed 0, eager 3 ({said})" in " ".join(
        str(cache.report()).split()
    )
    assert max(map(len, str(cache.report()).splitlines())) <= 80
    cache.reset()
    assert cache.graph_use.eager == 0
    with pytest.raises(ValueError, match=r"graphs: expected .*, got 'on'\."):
        cache.graphs = "on"


@pytest.mark.parametrize(
    ("around", "arguments", "said"),
    [
        (torch.enable_grad, {}, "got a step that records gradients"),
        (lambda: torch.autocast("cpu", torch.bfloat16), {}, "got autocast"),
        (ExitStack, {"output_attentions": False}, None),
        (ExitStack, {"output_attentions": True}, "got output_attentions"),
        (ExitStack, {"scale": torch.ones(1)}, "got scale"),
        (ExitStack, {"attention_mask": torch.ones(2, 1, 1, 22)}, "expected a 2-D mask"),
        (ExitStack, {"attention_mask": torch.ones(2, 22).tril(20)}, "got rows without one"),
    ],
)
def test_a_step_that_cannot_be_recorded_runs_and_says_why(around, arguments, said):
    model, inputs, asked = build("llama"), prompt(), []
    cache = ReasonAllocCache(model.config, budget=None)

    def forward(**kwargs):
        asked.append(kwargs)

    graphs = DecodeGraphs(forward, cache, Never())
    with torch.no_grad():
        model(**inputs, **cache_kwarg(cache))
        with around():
            graphs(input_ids=inputs["input_ids"][:, -1:], **cache_kwarg(cache), **arguments)
    assert graphs.eager == len(asked) == 1
    assert graphs.use.reason is None if said is None else said in graphs.use.reason


# ---------------------------------------------------------------------------------- which steps


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_step_is_known_under_either_name_of_the_cache(name):
    """The first single token runs as usual; the model gets the cache by the release's own name."""
    model, inputs = build("llama"), prompt()
    cache = ReasonAllocCache(model.config, budget=None)
    graphs = DecodeGraphs(model, cache, Never())
    with torch.no_grad():
        model(**inputs, **cache_kwarg(cache))
        graphs(input_ids=inputs["input_ids"][:, -1:], **{name: cache}, use_cache=True)
    assert graphs.eager == 1
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1


def test_other_forwards_pass_through():
    """Prompts, chunks, other caches, drafts and embeddings go to the model as they are."""
    model, inputs = build("llama"), prompt()
    cache, other = (ReasonAllocCache(model.config, budget=None) for _ in range(2))
    calls = []

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return model(*args, **kwargs)

    graphs = DecodeGraphs(forward, cache, Never())
    with torch.no_grad():
        for each in (cache, other):
            graphs(**inputs, **cache_kwarg(each), use_cache=True)
        token = inputs["input_ids"][:, -1:]
        graphs(input_ids=token.repeat(1, 2), **cache_kwarg(cache), use_cache=True)
        graphs(input_ids=token, **cache_kwarg(other), use_cache=True)
        embedded = model.get_input_embeddings()(token)
        graphs(inputs_embeds=embedded, **cache_kwarg(cache), use_cache=True)
        for layer in cache.layers:
            layer.activate_past_recording()
        graphs(input_ids=token, **cache_kwarg(cache), use_cache=True)
    assert len(calls) == 6
    assert graphs.recorded == graphs.replayed == 0
    assert graphs.eager == 1 and "may be cropped" in graphs.use.reason


def test_what_is_remembered_is_not_kept_alive():
    """A pool that an eviction replaces is freed at once, not a step later."""
    tensor = torch.ones(2)
    remembered = _remember([tensor, ("use_cache", True)])
    assert _same(remembered, [tensor, ("use_cache", True)])
    assert not _same(remembered, [tensor, ("use_cache", False)])
    assert not _same(remembered, [tensor.clone(), ("use_cache", True)])
    watch = weakref.ref(tensor)
    del tensor
    assert watch() is None and not _same(remembered, [None, ("use_cache", True)][:1])


@pytest.mark.parametrize("end", range(1, 12))
def test_the_columns_of_a_mask_stand_where_those_of_a_ring_do(end):
    places, shown = 4, torch.rand(2, end) > 0.5
    real = torch.zeros(2, places, dtype=torch.bool)
    _place_mask(real, shown, end)
    for column in range(max(end - places, 0), end):
        assert torch.equal(real[:, column % places], shown[:, column])
    _place_mask(real, None, end)
    assert real.all()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_stop_that_is_noticed_late_is_taken_back(name, kernels):
    """transformers may defer its stop check: it records the past, and crops the last step."""
    model, inputs = build(name), prompt()
    plain, cache = (ReasonAllocCache(model.config, budget=None) for _ in range(2))
    steps(model, plain, inputs, 3)
    expected = steps(model, plain, inputs, 2, start=9)
    enable_graphs(model, make_recorder=Once)
    with torch.no_grad():
        model(**inputs, **cache_kwarg(cache))
    cache.activate_past_recording()
    for step in range(4):
        steps(model, cache, inputs, 1, start=5 + step)
        cache.crop(0 if step < 3 else -1)
    for layer in cache.layers:
        layer.record_past = False
    assert cache.graph_use.eager == 4 and "may be cropped" in cache.graph_use.reason
    found = steps(model, cache, inputs, 2, start=9)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (cache.graph_use.recorded, cache.graph_use.eager) == (1, 5)
    assert cache.graph_use.reason is None


class Failing:
    """A recorder like CUDA's when a step does what a recording forbids: nothing has been run."""

    def __init__(self, cache, error):
        self.cache, self.error, self.asked = cache, error, 0

    def record(self, step):
        self.asked += 1
        parts = [part for layer in self.cache.own_layers for part in layer.static_parts()]
        before = [(x, x.clone()) for x in parts if isinstance(x, torch.Tensor)]
        step()
        for tensor, value in before:
            tensor.copy_(value)
        raise self.error


FAILED = RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_recording_leaves_no_trace_and_is_not_tried_again(kernels):
    model, inputs = build("llama"), prompt()
    settings = dict(budget=24, buffer=4, scorer=H2O(), protect=False)
    plain, cache = (ReasonAllocCache(model.config, **settings) for _ in range(2))
    expected = steps(model, plain, inputs, 12)
    recorder = Failing(cache, FAILED)
    enable_graphs(model, make_recorder=lambda device: recorder)
    with pytest.warns(UserWarning, match="without CUDA graphs, recording failed: operation not"):
        found = steps(model, cache, inputs, 12)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert cache.report().evictions == plain.report().evictions >= 4
    assert cache.held_positions(0) == plain.held_positions(0)
    assert recorder.asked == 1 and cache.graph_use.eager == 12
    assert "recording failed" in cache.graph_use.reason


@pytest.mark.parametrize("error", [FAILED, KeyboardInterrupt()])
def test_in_a_block_a_failed_recording_is_an_error_and_the_cache_goes_on(error, kernels):
    model, inputs = build("gemma3"), prompt()
    plain, cache = (ReasonAllocCache(model.config, budget=None) for _ in range(2))
    expected = steps(model, plain, inputs, 4)
    with (
        pytest.raises(type(error)),
        decode_graphs(model, cache, recorder=Failing(cache, error)),
    ):
        steps(model, cache, inputs, 4)
    assert "forward" not in vars(model)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1
    found = steps(model, cache, inputs, 3, start=6)
    torch.testing.assert_close(found, expected[:, 1:], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------- models and caches


def test_blocks_may_overlap(kernels):
    """Threads leave in any order; each cache has graphs exactly while its block is open."""
    model, inputs = build("llama"), prompt()
    model.forward = own = functools.partial(type(model).forward, model)
    first, second = (ReasonAllocCache(model.config, budget=None) for _ in range(2))
    blocks = [decode_graphs(model, each, recorder=Once()) for each in (first, second)]
    for block in blocks:
        block.__enter__()
    steps(model, first, inputs, 2)
    blocks[0].__exit__(None, None, None)
    steps(model, first, inputs, 2)
    steps(model, second, inputs, 2)
    blocks[1].__exit__(None, None, None)
    for cache in (first, second):
        assert (cache.graph_use.recorded, cache.graph_use.eager) == (1, 1)
    assert model.forward is own


def test_an_enabled_model_stays_enabled_after_a_block(kernels):
    model, inputs = build("llama"), prompt()
    cache = ReasonAllocCache(model.config, budget=None)
    enable_graphs(model, make_recorder=Once)
    with decode_graphs(model, cache, recorder=Once()):
        pass
    steps(model, cache, inputs, 2)
    assert cache.graph_use.recorded == 1
    assert "logits_to_keep" in inspect.signature(model.forward).parameters
    disable_graphs(model)
    disable_graphs(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_model_runs_itself(copied, kernels):
    model, inputs = build("llama"), prompt()
    enable_graphs(model, make_recorder=Once)
    other = copied(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    cache = ReasonAllocCache(model.config, budget=None)
    assert not steps(other, cache, inputs, 2).any()
    assert cache.graph_use.recorded == 1
    assert isinstance(other.forward, GraphedForward) and other.forward is not model.forward


def test_neither_a_model_nor_a_cache_is_kept_alive(kernels):
    model, inputs = build("llama"), prompt()
    cache = ReasonAllocCache(model.config, budget=None)
    enable_graphs(model, make_recorder=Once)
    steps(model, cache, inputs, 2)
    assert cache.graph_use.recorded == 1
    twin = copy.deepcopy(cache)
    steps(model, twin, inputs, 1)
    gone = weakref.ref(cache), weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del cache
        assert gone[0]() is None
        del model
        assert gone[1]() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError):
        GraphedForward(build("llama"), None).plain.model.eval()


def test_wrappers_are_looked_through_or_refused():
    model = build("llama")

    class Peft(torch.nn.Module):
        def get_base_model(self):
            return model

    class Compiled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = model

    enable_graphs(Peft(), make_recorder=Once)
    assert isinstance(model.forward, GraphedForward)
    disable_graphs(Peft())
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match=r"got the result of torch\.compile"):
        enable_graphs(Compiled())


def test_a_prompt_ends_the_graph_of_the_last_turn(kernels):
    """Adapters or weights may be others by then."""
    model, inputs, recorder = build("llama"), prompt(), Once()
    cache = ReasonAllocCache(model.config, budget=None)
    enable_graphs(model, make_recorder=lambda device: recorder)
    steps(model, cache, inputs, 2)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :3], **cache_kwarg(cache))
    steps(model, cache, inputs, 2)
    assert recorder.asked == 2 and cache.graph_use.eager == 2


class FakeCuda:
    """`torch.cuda` as far as a recorder sees it; `log` is what was asked of it."""

    def __init__(self):
        self.log, self.current, self.fails = [], "main", False

    def graph(self):
        return FakeGraph(self)

    def stream(self, name):
        @contextmanager
        def entered():
            before, self.current = self.current, name
            try:
                yield
            finally:
                self.current = before

        return entered()


class FakeGraph:
    def __init__(self, cuda):
        self.cuda = cuda

    def pool(self):
        return ("pool of", id(self))

    def capture_begin(self, pool, capture_error_mode):
        self.cuda.log.append((self.cuda.current.name, pool, capture_error_mode))

    def capture_end(self):
        if self.cuda.fails:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        self.cuda.log.append(("replay", self.cuda.current))


class FakeGenerator:
    def __init__(self, cuda):
        self.cuda = cuda

    def clone_state(self):
        return "a state of its own"

    def graphsafe_set_state(self, state):
        self.cuda.log.append(state)


class FakeStream:
    def __init__(self, device):
        self.name = f"side of {device}"

    def wait_stream(self, stream):
        assert stream == "main"


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.graph)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.current)
    monkeypatch.setattr(torch.cuda, "default_generators", [FakeGenerator(fake)] * 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fake.log.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: fake.log.append("synchronize"))
    return fake


def test_recordings_share_one_pool_and_empty_the_cache_once(cuda):
    recorder = CudaRecorder(torch.device("cuda", 1))
    assert recorder.record(lambda: 1)[0] == 1
    pool = recorder._last.pool()
    assert recorder.record(lambda: 2)[0] == 2
    assert cuda.log == [
        "empty_cache",
        ("side of cuda:1", None, "thread_local"),
        ("replay", "main"),
        ("side of cuda:1", pool, "thread_local"),
        ("replay", "main"),
    ]


@pytest.mark.parametrize("inside", [True, False])
def test_a_failed_recording_leaves_stream_and_random_numbers_as_they_were(cuda, inside):
    cuda.fails = True
    recorder = CudaRecorder(torch.device("cuda", 1))

    def step():
        if inside:
            raise RuntimeError("the step read the device")

    with pytest.raises(RuntimeError, match="read the device" if inside else "during capture"):
        recorder.record(step)
    assert cuda.current == "main" and recorder._last is None
    assert cuda.log[-1] == "a state of its own"
