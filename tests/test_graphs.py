"""decode_graphs refuses what it cannot do, and changes nothing else. Its work is tested with the
kernels."""

import weakref
from contextlib import contextmanager

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, decode_graphs
from hf_reasoncache.graphs import CudaRecorder, DecodeGraphs, _remember, _same
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import build, prompt
from triton_ops.backend import use_backend


class Never:
    """A recorder that must not be asked."""

    def record(self, step):
        raise AssertionError("nothing to record")


@pytest.mark.parametrize(
    ("name", "backend", "recorder", "said"),
    [
        ("gemma3", "auto", Never(), "full-attention layers only, got .*DynamicSlidingWindowLayer"),
        ("llama", "auto", None, "one CUDA device, got cpu; move the model"),
        ("llama", "torch", Never(), "the Triton backend, got torch"),
    ],
)
def test_what_cannot_be_recorded_is_refused(name, backend, recorder, said):
    model = build(name)
    cache = ReasonAllocCache(model.config, budget=None)
    with (
        pytest.raises(ValueError, match=f"decode_graphs: expected .*{said}"),
        use_backend(backend),
        decode_graphs(model, cache, recorder=recorder),
    ):
        raise AssertionError("entered")
    assert "forward" not in vars(model)


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
    assert graphs.recorded == graphs.replayed == graphs.eager == 0


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


def test_a_failed_recording_leaves_the_stream_as_it_was(cuda):
    cuda.fails = True
    recorder = CudaRecorder()
    with pytest.raises(RuntimeError, match="during capture"):
        recorder.record(lambda: 1)
    assert cuda.current == "main" and recorder._last is None
