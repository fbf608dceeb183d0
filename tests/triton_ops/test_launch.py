"""Every kernel is launched with the GPU of its tensors as the current device."""

import importlib
import pkgutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from triton import runtime

import triton_ops
from tests.support.ops.launches import CASES
from triton_ops import launch
from triton_ops.backend import interpreting

pytestmark = pytest.mark.skipif(
    interpreting(), reason="TRITON_INTERPRET=1 replaces the kernels by Python"
)


def all_kernels():
    """Names of everything that can be launched; functions that kernels call are not."""
    names = set()
    for module in pkgutil.walk_packages(triton_ops.__path__, "triton_ops."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, runtime.JITFunction) and name.endswith("_kernel"):
                names.add(name)
    return names


def test_every_kernel_is_launched_inside_the_guard(monkeypatch):
    guarded, launched = [], []

    @contextmanager
    def guard(tensor):
        guarded.append(tensor)
        yield
        guarded.pop()

    def run(kernel, *args, grid, warmup, **kwargs):
        assert guarded, f"{kernel.fn.__name__} is launched on whatever device is current"
        launched.append(kernel.fn.__name__)

    monkeypatch.setattr(launch, "on_device", guard)
    monkeypatch.setattr(runtime.JITFunction, "run", run)
    for _, case in CASES.values():
        case()
    assert set(launched) == all_kernels()


def test_the_guard_is_for_cuda_tensors(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", entered.append)
    for is_cuda in (False, True):
        launch.on_device(SimpleNamespace(is_cuda=is_cuda))
    assert [tensor.is_cuda for tensor in entered] == [True]


def test_the_first_tensor_decides():
    """Fields may come as an iterable, which nobody may use up."""
    seen = []

    @launch.launcher
    def run(fields, slots):
        seen.extend(fields)
        return slots

    slots = torch.zeros(1)
    assert run(iter([1, 2]), slots) is slots
    assert seen == [1, 2]
