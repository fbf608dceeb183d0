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


def check_limits(binary, capability, programs):
    """Registers, spills and shared memory."""
    from tests.support.ops.offline import SHARED_MEMORY

    # For sm_100 the assembler keeps up to four values in memory where one register less lets
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


def tile_bytes(binary):
    """Bytes of queries, keys and values that one turn of the innermost loop loads."""
    size = binary.constants
    width = size["BLOCK_D"] + size.get("BLOCK_REST", 0)
    if binary.name == "attend_kernel":
        # Keys may hold the values.
        numbers = size["BLOCK_N"] * (width + (0 if "values" in size else size["BLOCK_DV"]))
    elif binary.name == "search_kernel":
        numbers = (size["BLOCK_M"] + size["BLOCK_N"]) * width
    elif size.get("ONE_TILE"):
        numbers = size["BLOCK_N"] * width
    else:
        # The keys stay, the queries pass.
        numbers = (size.get("BLOCK_M") or size["BLOCK_A"]) * width
    return numbers * {"*fp32": 4, "*u8": 1}.get(binary.types["keys"], 2)


def check_loops(binary, capability):
    """Loads of 16 bytes, or 8 of codes, ahead of their use, and products of the matrix units."""
    from tests.support.ops.offline import is_matrix_product

    half = binary.types.get("query", binary.types["keys"]) != "*fp32"
    loops = binary.multiplying_loops()
    # A search has no known end, and what float32 needs of registers leaves none for loads.
    ahead = half and binary.name != "search_kernel"
    assert ahead == (binary.stages > 1), str(binary)
    for loop in loops:
        copies, loads = loop["cp.async.cg.shared.global 16"], loop["ld.global.v4.b32"]
        assert copies if ahead else loads, f"{binary}: {loop}"
        # The layout in which values are widened has no 16 codes beside each other.
        narrow = loop["cp.async.ca.shared.global 8"] if binary.types["keys"] == "*u8" else 0
        each = 16 * (copies + loads) + 8 * narrow
        assert each * 32 * binary.warps >= tile_bytes(binary), f"{binary}: {loop}"

    tiles = [binary.constants.get("BLOCK_M") or binary.constants["BLOCK_A"]]
    if binary.name == "attend_kernel" and "prefix_items" not in binary.constants:
        tiles.append(binary.constants["BLOCK_P"])
    assert min(tiles) >= 16
    units = [{name.split(".")[0] for name in loop if is_matrix_product(name)} for loop in loops]
    expected = [{matrix_unit(rows, capability)} if half else set() for rows in tiles]
    assert sorted(units, key=str) == sorted(expected, key=str), str(binary)


def check_arrival(binary):
    """What `is_last` relies on: barriers around one atomic addition that releases and acquires, for
    the whole GPU, with the partial results stored before and loaded, by the caches that it has
    made valid, behind.
    """
    from tests.support.ops.loops import sequence

    found = sequence(binary.ptx)
    (at,) = [place for place, name in enumerate(found) if name.startswith(("atom.", "red."))]
    assert found[at] == "atom.global.gpu.acq_rel.add.u32", found[at]
    memory = [name for name in found[:at] if name.startswith(("bar.", "st.global"))]
    behind = [name for name in found[at:] if name.startswith(("bar.", "ld.global"))]
    assert memory[-1] == behind[0] == "bar.sync"
    stores = [name for name in memory if name.startswith("st.global")]
    loads = [name for name in behind if name.startswith("ld.global")]
    assert len(stores) >= 2 and len(loads) >= 3
    assert not any(".nc" in name for name in loads)


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
        if binary.name == "attend_kernel" and "arrivals" not in binary.constants:
            check_arrival(binary)

    if said := documented(triton.__version__):
        column = [80, 90, 100].index(capability)
        written = {kernel: cells[column] for (case, kernel), cells in said.items() if case == name}
        assert rows(name, capability) == written, (
            "docs/kernels.md says something else: python -m tests.support.ops.compiled_table "
            "--write"
        )


def test_decode_steps_join_in_the_launch_that_attends():
    from tests.support.ops.compiled_table import compiled

    for name, names in (
        ("decode: Llama 8B", ["attend_kernel"]),
        ("decode: latents, 16 heads", ["attend_kernel", "cumulative_kernel"]),
        ("decode: latents, 128 heads", ["attend_kernel", "join_kernel"]),
        ("draft of 8", ["attend_kernel", "join_kernel"]),
    ):
        found = compiled(name, 90)
        assert [binary.name for binary in found] == names
        assert ("arrivals" in found[0].constants) == ("join_kernel" in names)


def test_the_documentation_is_about_the_pinned_version():
    from tests.support.ops.compiled_table import documented

    (pinned,) = re.findall(r"^triton==([\d.]+)", CONSTRAINTS.read_text("utf-8"), re.MULTILINE)
    shown = {case for case, _ in documented(pinned)}
    others = re.compile("float32|compact|append|quantise|R-KV formula|layers at once")
    assert shown == {name for name in CASES if not others.search(name)}
