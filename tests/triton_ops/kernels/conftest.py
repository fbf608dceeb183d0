"""The kernels, run where they can be: on a GPU, or in Triton's interpreter.

`TRITON_INTERPRET=1 pytest tests/triton_ops/kernels` needs no GPU. The variable decides, when Triton
is imported, for the whole process; without it and without a GPU these tests skip.
"""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from triton_ops.backend import interpreting, use_backend


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if interpreting() else "cuda")


def interpreter_fault(triton, numpy):
    """Why the interpreter of this triton cannot run with this numpy; "" if it can."""
    if Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        return (
            f"the interpreter of triton {triton} makes Python numbers of arrays with one element, "
            f"which numpy {numpy} refuses; install triton >= 3.7 or numpy < 2.4"
        )
    return ""


@pytest.fixture(autouse=True)
def kernels_only():
    """Every test here runs the kernels, and fails if it cannot."""
    if not (interpreting() or torch.cuda.is_available()):
        pytest.skip("needs TRITON_INTERPRET=1, or a CUDA device")
    if interpreting() and (reason := interpreter_fault(version("triton"), version("numpy"))):
        pytest.skip(reason)
    with use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory holds NaN, so that nothing is read before it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
