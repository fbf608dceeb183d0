"""Every kernel compiles for sm_80 and sm_90 in the sizes of real models, within their limits."""

import pytest

from tests.support.ops.launches import CASES
from triton_ops.backend import interpreting

pytestmark = pytest.mark.skipif(
    interpreting(), reason="TRITON_INTERPRET=1 replaces the kernels by Python"
)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_it_compiles_within_limits(name, capability, tmp_path):
    from tests.support.ops.offline import SHARED_MEMORY, Binary, compiling

    programs, launch = CASES[name]
    with compiling(capability) as kernels:
        launch()
    binaries = [Binary.of(kernel, tmp_path) for kernel in kernels]
    assert binaries
    for binary in binaries:
        assert binary.stack == binary.local == 0, f"registers are spilled: {binary}"
        assert binary.shared < SHARED_MEMORY[capability], str(binary)
        assert binary.programs(capability) >= programs, str(binary)
