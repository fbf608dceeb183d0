"""Compile what a launcher would launch on a GPU that is not there, and read what was made.

The launcher runs on CPU tensors with a driver that only names a target, and every launch stops
after compilation: types, alignment and specialised arguments are those of a real call.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from triton import backends, runtime
from triton.backends.compiler import GPUTarget

from tests.support.ops.loops import instructions, loops

TOOLS = Path(backends.__file__).parent / "nvidia" / "bin"

SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Bytes per multiprocessor, by compute capability; one program may use 1 KB less."""


@dataclass(frozen=True)
class Binary:
    """What the compiler and the assembler made of one kernel.

    Attributes
    ----------
    name : str
    registers : int
        Per thread.
    stack, local : int
        Bytes per thread in memory; more than 0 means that registers were spilled.
    spilled_in_loops : int
        Instructions of loops that move a spilled register.
    shared : int
        Bytes per program.
    warps, stages : int
    types : dict
        Of the arguments, by name.
    constants : dict
        Arguments that are part of the program, by name.
    ptx : str
        What the assembler got.
    """

    name: str
    registers: int
    stack: int
    local: int
    spilled_in_loops: int
    shared: int
    warps: int
    stages: int
    types: dict[str, str] = field(repr=False)
    constants: dict[str, object] = field(repr=False)
    ptx: str = field(repr=False)

    @staticmethod
    def of(kernel, folder: Path) -> Binary:
        """Read what a compiled kernel uses."""
        path = folder / f"{kernel.hash}.cubin"
        path.write_bytes(kernel.asm["cubin"])
        printed = _run("cuobjdump", "-res-usage", path)
        found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", printed)}
        spills = 0
        if found["STACK"]:
            looped = sum(loops(_run("nvdisasm", "-c", path)), Counter())
            spills = sum(looped[name] for name in looped if name.startswith(("LDL", "STL")))
        names = kernel.src.fn.arg_names
        return Binary(
            name=kernel.name,
            registers=found["REG"],
            stack=found["STACK"],
            local=found["LOCAL"],
            spilled_in_loops=spills,
            # Shared memory is asked for at launch; the binary itself declares none.
            shared=kernel.metadata.shared + found["SHARED"],
            warps=kernel.metadata.num_warps,
            stages=kernel.metadata.num_stages,
            types=kernel.src.signature,
            constants={names[place]: value for (place,), value in kernel.src.constants.items()},
            ptx=kernel.asm["ptx"],
        )

    def programs(self, capability: int) -> int:
        """Programs that fit one multiprocessor: CUDA C++ Programming Guide, compute capabilities.

        Registers are given out per warp in units of 256, shared memory has 1 KB of overhead per
        program.
        """
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65536 // (per_warp * self.warps)
        by_threads = min(32, 64 // self.warps)
        return min(by_registers, by_threads, SHARED_MEMORY[capability] // (self.shared + 1024))

    def multiplying_loops(self) -> list[Counter[str]]:
        """Return the instructions of each innermost loop that multiplies matrices.

        Matrix units do it for half precision. For float32 these are the loops with as many sums of
        products as any, or half as many.
        """
        innermost = loops(self.ptx, innermost=True)
        if any(is_matrix_product(name) for name in instructions(self.ptx)):
            return [each for each in innermost if any(map(is_matrix_product, each))]
        most = max(each["fma.rn.f32"] for each in innermost)
        return [each for each in innermost if 2 * each["fma.rn.f32"] >= most]


def is_matrix_product(name: str) -> bool:
    """Whether an instruction is one of the matrix units."""
    return name.startswith(("mma.sync", "wgmma.mma_async", "tcgen05.mma"))


def _run(tool: str, *arguments: object) -> str:
    command = [TOOLS / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Target:
    """A driver that knows what it compiles for, and can run nothing."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # Compiled kernels are kept per device: targets must not share them.
        return self.target.arch

    def get_current_stream(self, device):
        return 0


@contextmanager
def compiling(capability: int):
    """Turn launches into compilations; yields the list of compiled kernels."""
    compiled, run = [], runtime.JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    runtime.driver.set_active(Target(capability))
    runtime.JITFunction.run = only_compile
    try:
        yield compiled
    finally:
        runtime.JITFunction.run = run
        runtime.driver._active = None
