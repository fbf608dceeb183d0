"""What the GPU benchmarks share: the device, its copy bandwidth, and time with a cold cache."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from hf_reasoncache.graphs import CudaRecorder
from triton_ops.backend import interpreting

Call = Callable[[], object]

COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """The device of a run, in words and in numbers.

    Attributes
    ----------
    device : device
        CUDA, or the CPU under Triton's interpreter, where times mean nothing.
    gpu, cuda, triton, date : str
    """

    device: torch.device
    gpu: str
    cuda: str
    triton: str
    date: str

    @staticmethod
    def here() -> Gpu:
        """Describe the device that this process runs on.

        Raises
        ------
        SystemExit
            If there is neither a GPU nor the interpreter.
        """
        if not (torch.cuda.is_available() or interpreting()):
            raise SystemExit(
                "error: expected a CUDA device, got none; --help names the form that needs none"
            )
        if interpreting():
            return Gpu.of(torch.device("cpu"), "none (interpreter)")
        return Gpu.of(torch.device("cuda"), torch.cuda.get_device_name())

    @staticmethod
    def of(device: torch.device, name: str) -> Gpu:
        """Describe a device."""
        return Gpu(
            device=device,
            gpu=name,
            cuda=str(torch.version.cuda) if device.type == "cuda" else "-",
            triton=version("triton"),
            date=datetime.date.today().isoformat(),
        )

    @property
    def real(self) -> bool:
        """Whether times mean anything."""
        return self.device.type == "cuda"

    def row(self) -> dict[str, str]:
        """Columns that make a line of a CSV speak for itself."""
        return {"gpu": self.gpu, "cuda": self.cuda, "triton": self.triton, "date": self.date}

    def __str__(self) -> str:
        return f"{self.gpu}, CUDA {self.cuda}, triton {self.triton}, {self.date}"

    def clock(self) -> float:
        """Seconds, once all that was launched is done."""
        if self.real:
            torch.cuda.synchronize()
        return time.perf_counter()

    def buffers(self, size: int) -> int:
        """How many sets of `size` bytes to take in turns, so that none is still in the cache."""
        if not self.real:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(64, -(-3 * cache // max(size, 1))))

    def seconds(self, calls: Sequence[Call], *, graph: bool = True, repeats: int = 20) -> float:
        """Median time of one call; the calls do the same on different memory.

        They are launched as one CUDA graph, so that the host's launches do not count. Calls that
        read from the device cannot be; without a graph their launches count.
        """
        if not self.real:
            start = self.clock()
            calls[0]()
            return self.clock() - start

        def step() -> None:
            for call in calls:
                call()

        step()
        launch = CudaRecorder().record(step)[1] if graph else step
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launch()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
        return statistics.median(times)

    def copy_bandwidth(self) -> float:
        """Bytes per second of a large copy, read and written."""
        size = COPY_BYTES if self.real else 1 << 20
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds([lambda: target.copy_(source)])
