"""What the compiler makes of every kernel, in the sizes of real models, for three kinds of GPU."""

import re
from pathlib import Path

import pytest
import triton

from tests.support.ops.launches import CASES
from triton_ops.backend import interpreting

pytestmark = pytest.mark.skipif(
    interpreting(), reason="TRITON_INTERPRET=1 replaces the kernels by Python"
)

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"

HOT = ("attend_kernel", "cumulative_kernel", "sums_kernel", "scores_kernel", "search_kernel")
"""Kernels that read keys for a matrix product."""

NARROW = re.compile(r"ld\.global\.(b16|v2\.b16|v4\.b16|v2\.b32)|cp\.async\.\S+ 8")
"""Loads of keys or values in pieces of less than 16 bytes. Masks, positions and lengths are loaded
one number per thread, of 1, 4 or 8 bytes."""


def check_limits(binary, capability, programs):
    """Registers, spills and shared memory."""
    from tests.support.ops.offline import SHARED_MEMORY

    # For sm_100 the assembler keeps up to four constants in memory where one register less lets
    # another program fit; a loop may read one of them again.
    few = (16, 1) if capability == 100 else (0, 0)
    assert binary.stack <= few[0] and binary.spilled_in_loops <= few[1], f"spilled: {binary}"
    assert binary.local == 0, str(binary)
    assert binary.shared < SHARED_MEMORY[capability], str(binary)
    assert binary.programs(capability) >= programs, str(binary)


def matrix_unit(rows, capability):
    """Instructions that multiply tiles of so many rows: of a warp, or of a group of warps."""
    if rows < 64 or capability == 80:
        return "mma"
    return {90: "wgmma", 100: "tcgen05"}[capability]


def check_loops(binary, capability):
    """Loads of 16 bytes, ahead of their use, and products of the matrix units."""
    from tests.support.ops.offline import is_matrix_product

    loops = binary.multiplying_loops()
    for loop in loops:
        copies = loop["cp.async.cg.shared.global 16"]
        assert copies or loop["ld.global.v4.b32"], f"{binary}: {loop}"
        assert copies or binary.stages == 1, f"tiles are not loaded ahead: {binary}: {loop}"
        assert not [name for name in loop if NARROW.match(name)], f"{binary}: {loop}"

    half = binary.types["keys"] in ("*bf16", "*fp16")
    assert half or binary.stages == 1
    tiles = [binary.constants.get("BLOCK_M") or binary.constants["BLOCK_A"]]
    if binary.name == "attend_kernel" and "prefix_items" not in binary.constants:
        tiles.append(binary.constants["BLOCK_P"])
    assert min(tiles) >= 16
    units = sorted(name.split(".")[0] for loop in loops for name in loop if is_matrix_product(name))
    assert units == (sorted(matrix_unit(rows, capability) for rows in tiles) if half else [])


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_it_compiles_within_limits(name, capability):
    from tests.support.ops.compiled_table import compiled, documented, rows

    programs, _ = CASES[name]
    binaries = compiled(name, capability)
    assert binaries
    for binary in binaries:
        check_limits(binary, capability, programs)
        if binary.name in HOT:
            check_loops(binary, capability)

    if said := documented(triton.__version__):
        column = [80, 90, 100].index(capability)
        written = {kernel: cells[column] for (case, kernel), cells in said.items() if case == name}
        assert rows(name, capability) == written, (
            "docs/kernels.md says something else: python -m tests.support.ops.compiled_table "
            "--write"
        )


def test_the_documentation_is_about_the_pinned_version():
    from tests.support.ops.compiled_table import documented

    (pinned,) = re.findall(r"^triton==([\d.]+)", CONSTRAINTS.read_text("utf-8"), re.MULTILINE)
    shown = {case for case, _ in documented(pinned)}
    assert shown == {name for name in CASES if "float32" not in name and "compact" not in name}
