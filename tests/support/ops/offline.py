"""Compile what a launcher would launch on a GPU that is not there, and read the binary.

The launcher runs on CPU tensors with a driver that only names a target, and every launch stops
after compilation: types, alignment and specialised arguments are those of a real call.
"""

from __future__ import annotations

import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from triton import backends, runtime
from triton.backends.compiler import GPUTarget

CUOBJDUMP = Path(backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"

SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024}
"""Bytes per multiprocessor, by compute capability; one program may use 1 KB less."""


@dataclass(frozen=True)
class Binary:
    """What the assembler made of one kernel.

    Attributes
    ----------
    name : str
    registers : int
        Per thread.
    stack, local : int
        Bytes per thread in memory; more than 0 means that registers were spilled.
    shared : int
        Bytes per program.
    warps : int
    """

    name: str
    registers: int
    stack: int
    local: int
    shared: int
    warps: int

    @staticmethod
    def of(kernel, folder: Path) -> Binary:
        """Read the resource usage of a compiled kernel."""
        path = folder / f"{kernel.hash}.cubin"
        path.write_bytes(kernel.asm["cubin"])
        printed = subprocess.run(
            [CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", printed)}
        return Binary(
            name=kernel.name,
            registers=found["REG"],
            stack=found["STACK"],
            local=found["LOCAL"],
            # Shared memory is asked for at launch; the binary itself declares none.
            shared=kernel.metadata.shared + found["SHARED"],
            warps=kernel.metadata.num_warps,
        )

    def programs(self, capability: int) -> int:
        """Programs that fit one multiprocessor: CUDA C++ Programming Guide, compute capabilities.

        Registers are given out per warp in units of 256, shared memory has 1 KB of overhead per
        program.
        """
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65536 // (per_warp * self.warps)
        return min(by_registers, SHARED_MEMORY[capability] // (self.shared + 1024))


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
