"""What a figure must be read with: the machine, the versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Machine:
    """Where and with what a benchmark ran."""

    cpu: str
    cores: int
    threads: int
    load: float
    torch: str
    transformers: str
    commit: str
    seed: int

    @staticmethod
    def here(seed: int) -> Machine:
        """Describe this process; call it before the work starts, as it reads the load."""
        return Machine(
            cpu=_cpu_name(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            load=round(os.getloadavg()[0], 2),
            torch=torch.__version__,
            transformers=transformers.__version__,
            commit=_commit(),
            seed=seed,
        )

    def row(self) -> dict[str, str | int | float]:
        """Columns that make a line of a CSV speak for itself."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.threads} threads, load {self.load} at start\n"
            f"torch {self.torch}, transformers {self.transformers}, commit {self.commit}, "
            f"seed {self.seed}"
        )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash of HEAD, marked if tracked files differ from it; "unknown" without git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()
