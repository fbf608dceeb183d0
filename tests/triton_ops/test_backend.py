"""One choice of backend, in force everywhere, never left behind in silence."""

import runpy
from threading import Thread

import pytest
import torch

from triton_ops import backend
from triton_ops.backend import chosen, get_backend, interpreting, set_backend, use_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def restore():
    before = get_backend()
    yield
    set_backend(before)


def test_auto_takes_the_kernels_where_they_run():
    assert get_backend() == "auto"
    assert chosen(CPU, torch.float32) == "torch"
    assert chosen(CUDA, torch.bfloat16) == "triton"
    assert chosen(CUDA, torch.float64) == "torch"


def test_auto_works_without_triton(monkeypatch):
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert chosen(CUDA, torch.bfloat16) == "torch"
    assert not interpreting()


def test_torch_is_torch_everywhere():
    with use_backend("torch"):
        assert chosen(CUDA, torch.bfloat16) == "torch"


def test_triton_is_triton_or_an_error(monkeypatch):
    with use_backend("triton"):
        assert chosen(CUDA, torch.float16) == "triton"
        with pytest.raises(ValueError, match=r"expected one of .*bfloat16, got torch.float64"):
            chosen(CUDA, torch.float64)
        monkeypatch.setattr(backend, "interpreting", lambda: False)
        with pytest.raises(ValueError, match=r"expected CUDA tensors, got .*cpu.*TRITON_INTERPRET"):
            chosen(CPU, torch.float32)
        monkeypatch.setattr(backend, "_installed", lambda: False)
        with pytest.raises(ValueError, match="not installed"):
            chosen(CUDA, torch.float16)


def test_a_block_ends_with_the_choice_before_it():
    set_backend("torch")
    with pytest.raises(KeyError), use_backend("auto"):
        assert get_backend() == "auto"
        raise KeyError
    assert get_backend() == "torch"


def test_the_choice_reaches_other_threads():
    found = []
    with use_backend("torch"):
        thread = Thread(target=lambda: found.append(get_backend()))
        thread.start()
        thread.join()
    assert found == ["torch"]


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"set_backend: expected one of .*'torch'.*got 'cuda'"):
        set_backend("cuda")


def test_the_environment_variable(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert runpy.run_path(backend.__file__)["get_backend"]() == "torch"
    monkeypatch.setenv(backend.VARIABLE, "gpu")
    with pytest.raises(ValueError, match=rf"{backend.VARIABLE}: expected one of .*got 'gpu'"):
        runpy.run_path(backend.__file__)
