"""Every kernel beside its floor, the bytes it must move over the measured copy bandwidth.

    python -m examples.benchmarks.gpu_kernels --output results/
    TRITON_INTERPRET=1 python -m examples.benchmarks.gpu_kernels --interpret

Shapes are those of Llama 8B (8 KV heads of size 128, 4 query heads each). Calls take turns on
buffers that together exceed the GPU's L2 cache, and are launched as one CUDA graph, but for those
marked "eager", which read from the device. The second form needs no GPU: it runs everything once at
toy size, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.benchmarks.gpu import Call, Gpu
from examples.benchmarks.machine import Machine
from examples.benchmarks.results import write_csv
from triton_ops.backend import use_backend
from triton_ops.compact import compact
from triton_ops.decode_attention import decode_attention
from triton_ops.layout import RaggedLayout, SharedPrefix
from triton_ops.prefix_attention import prefix_attention
from triton_ops.redundancy import redundancy
from triton_ops.window_scores import window_scores


@dataclass(frozen=True)
class Implementation:
    """One way to do what a case asks for.

    Attributes
    ----------
    call : Callable or None
        None if it is not here, for which `note` is the reason.
    note : str
    graph : bool
        False for a call that reads from the device, which no graph can hold: the host's launches
        are in its time.
    """

    call: Call | None
    note: str = ""
    graph: bool = True


Made = dict[str, Implementation]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run; `event` is an eviction."""

    dtype: torch.dtype = torch.bfloat16
    head_size: int = 128
    kv_heads: int = 8
    group: int = 4
    decode_tokens: tuple[int, ...] = (1 << 10, 1 << 13, 1 << 14, 1 << 15, 1 << 17)
    event_rows: int = 16
    event_tokens: int = 1152
    window: int = 8
    prefix: int = 1 << 14
    branches: tuple[int, ...] = (4, 16, 64)
    suffix: int = 256


TOY = Sizes(
    dtype=torch.float32,
    head_size=16,
    kv_heads=2,
    group=2,
    decode_tokens=(70,),
    event_rows=1,
    event_tokens=40,
    window=2,
    prefix=40,
    branches=(2,),
    suffix=9,
)
GOALS = {1 << 13: 0.45, 1 << 14: 0.60, 1 << 15: 0.75, 1 << 17: 0.90}
"""Share of the copy bandwidth that decode attention is to reach, by tokens: 33, 67, 134, 537 MB."""

LATENCY_GOAL = 8e-6
"""Seconds for decode attention to 4 MB, which launches decide and not bytes."""

BUFFER, REDUNDANCY_GOAL = 128, 0.1
"""Steps between two evictions, and what the redundancy of one may add to their attention."""


@dataclass(frozen=True)
class Row:
    """One implementation in one case; times in microseconds.

    Attributes
    ----------
    op, case, implementation : str
    megabytes : float
        What must be read and written at the least.
    floor_us : float
        `megabytes` over the copy bandwidth.
    us : float or None
    share : float or None
        `floor_us / us`.
    goal, note : str
    """

    op: str
    case: str
    implementation: str
    megabytes: float
    floor_us: float
    us: float | None
    share: float | None
    goal: str = ""
    note: str = ""

    def __str__(self) -> str:
        measured = " not run:"
        if self.us is not None and self.share is not None:
            measured = f"{self.us:9.1f}{100 * self.share:7.1f}%"
        return (
            f"{self.op:17}{self.case:14}{self.implementation:11}{self.megabytes:6.1f}"
            f"{self.floor_us:7.1f}{measured} {self.goal or self.note}".rstrip()
        )


HEADER = f"{'':42}{'MB':>6}{'floor':>7}{'us':>9}{'share':>8} goal"


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes
    ----------
    op, name : str
    size : int
        Bytes that must be read and written.
    make : Callable
        Makes buffers and returns implementations by name.
    goal : str
    """

    op: str
    name: str
    size: int
    make: Callable[[], Made]
    goal: str = ""


class Cases:
    """All cases at some sizes on a device."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.token_bytes = 2 * sizes.head_size * sizes.dtype.itemsize

    def __iter__(self) -> Iterator[Case]:
        sizes = self.sizes
        for tokens in sizes.decode_tokens:
            goal = f">= {100 * GOALS[tokens]:.0f}%" if tokens in GOALS else ""
            if tokens == 1 << 10:
                goal = f"<= {1e6 * LATENCY_GOAL:.0f} us"
            size = self.token_bytes * tokens * sizes.kv_heads
            yield Case("decode_attention", f"{tokens} tokens", size, self._decode(tokens), goal)
        held = sizes.event_rows * sizes.kv_heads * sizes.event_tokens
        name = f"{sizes.event_rows} x {sizes.event_tokens}"
        made = self._decode(sizes.event_tokens, sizes.event_rows)
        yield Case("decode_attention", name, held * self.token_bytes, made)
        yield Case("window_scores", name, held * self.token_bytes // 2, self._scores)
        yield Case("redundancy", name, held * self.token_bytes // 2, self._redundancy)
        # Every eighth token goes; each that fills a hole is read and written.
        yield Case("compact", name, held // 8 * self.token_bytes * 2, self._compact)
        for count in sizes.branches:
            tokens = sizes.kv_heads * (sizes.prefix + count * sizes.suffix)
            made = self._branches(count)
            yield Case("prefix_attention", f"{count} branches", tokens * self.token_bytes, made)

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device).to(self.sizes.dtype)

    def _pool(self, rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
        layout = RaggedLayout(torch.full((rows, self.sizes.kv_heads), tokens))
        keys, values = (self._random(layout.slots, self.sizes.head_size) for _ in range(2))
        positions = torch.arange(tokens, dtype=torch.int32, device=self.device)
        return keys, values, positions.repeat(rows * self.sizes.kv_heads), layout

    def _query(self, rows: int) -> torch.Tensor:
        sizes = self.sizes
        return self._random(rows, sizes.kv_heads, sizes.group, 1, sizes.head_size)

    def _decode(self, tokens: int, rows: int = 1) -> Callable[[], Made]:
        sizes, scaling = self.sizes, self.sizes.head_size**-0.5

        def make() -> Made:
            query, (keys, values, positions, layout) = self._query(rows), self._pool(rows, tokens)
            length = layout.capacity.to(self.device)
            shape = (rows, sizes.kv_heads, tokens, sizes.head_size)
            dense = query.flatten(1, 2), keys.view(shape), values.view(shape)

            def ours() -> object:
                return decode_attention(
                    query,
                    keys,
                    values,
                    positions,
                    layout,
                    layout.capacity,
                    device_length=length,
                    query_positions=None,
                    scaling=scaling,
                )

            def apart() -> object:
                """Join partial results by a launch of its own, where one program would."""
                from triton_ops.decode_attention import kernel

                with mock.patch.object(kernel, "JOINED", 0):
                    return ours()

            def sdpa() -> object:
                return F.scaled_dot_product_attention(*dense, enable_gqa=True)

            def flash() -> object:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    return sdpa()

            ask = torch.arange(rows * sizes.kv_heads + 1, dtype=torch.int32, device=self.device)
            bounds, used = ask * tokens, length.flatten().int()

            def pool() -> object:
                """Attend to the pool as it is, each KV head a sequence of its own."""
                # Private, but alike from torch 2.8 to 2.13; `torch.nn.attention.varlen` is younger.
                return torch.ops.aten._flash_attention_forward(
                    query[:, :, :, 0].flatten(0, 1),
                    keys[:, None],
                    values[:, None],
                    ask,
                    bounds,
                    1,
                    tokens,
                    0.0,
                    False,
                    False,
                    scale=scaling,
                    seqused_k=used,
                )

            return {
                "ours": Implementation(ours),
                "join apart": Implementation(apart),
                "sdpa": Implementation(sdpa),
                "sdpa flash": self._flash(flash),
                "flash pool": self._flash(pool),
                "flashinfer": self._flashinfer(*dense),
            }

        return make

    def _flash(self, call: Call) -> Implementation:
        if self.sizes.dtype == torch.float32:
            return Implementation(None, "bf16, fp16 only")
        if self.device.type != "cuda":
            return Implementation(None, "needs a GPU")
        try:
            call()
        except RuntimeError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            return Implementation(None, "refused")
        return Implementation(call)

    def _flashinfer(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> Implementation:
        if self.device.type != "cuda" or importlib.util.find_spec("flashinfer") is None:
            return Implementation(None, "not installed")
        if query.shape[0] != 1:
            return Implementation(None, "one row only")
        import flashinfer

        q, k, v = query[0, :, 0], keys[0], values[0]
        return Implementation(
            lambda: flashinfer.single_decode_with_kv_cache(q, k, v, kv_layout="HND")
        )

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = self.sizes
        shape = (sizes.event_rows, sizes.kv_heads, sizes.event_tokens)
        # Keys of trained models share a large component: a mean cosine of 0.7.
        keys = self._random(*shape, sizes.head_size) + 1.5 * self._random(
            *shape[:2], 1, sizes.head_size
        )
        return keys, torch.ones(shape, dtype=torch.bool, device=self.device)

    def _scores(self) -> Made:
        sizes, (keys, valid) = self.sizes, self._held()
        size = (sizes.event_rows, sizes.kv_heads, sizes.group, sizes.window, sizes.head_size)
        at = torch.arange(sizes.event_tokens, device=self.device)
        arguments = (
            self._random(*size),
            keys,
            at[-sizes.window :].expand(sizes.event_rows, -1),
            at.expand(valid.shape),
            sizes.head_size**-0.5,
        )
        return self._both(lambda: window_scores(*arguments, group="max", sees="past"))

    def _redundancy(self) -> Made:
        keys, valid = self._held()
        return self._both(lambda: redundancy(keys, valid))

    def _compact(self) -> Made:
        sizes = self.sizes
        keys, values, positions, layout = self._pool(sizes.event_rows, sizes.event_tokens)
        offset = torch.arange(sizes.event_tokens, device=self.device)
        offset = offset.expand(sizes.event_rows, sizes.kv_heads, -1)
        slots = layout.start_on(self.device)[..., None] + offset
        keep = offset % 8 != 0
        fields = (keys, values, positions)
        return self._both(lambda: compact(fields, slots, offset, keep))

    def _branches(self, count: int) -> Callable[[], Made]:
        sizes, scaling = self.sizes, self.sizes.head_size**-0.5

        def make() -> Made:
            query = self._query(count)
            shared_keys, shared_values, _, shared = self._pool(1, sizes.prefix)
            prefix = SharedPrefix(
                shared_keys,
                shared_values,
                shared,
                shared.capacity,
                torch.zeros(count, dtype=torch.long),
            )
            own = self._pool(count, sizes.suffix)
            whole = self._pool(count, sizes.prefix + sizes.suffix)
            lengths = [pool[3].capacity.to(self.device) for pool in (own, whole)]
            settings = dict(query_positions=None, scaling=scaling)

            def shares() -> object:
                return prefix_attention(
                    query, prefix, *own, own[3].capacity, device_length=lengths[0], **settings
                )

            def copies() -> object:
                return decode_attention(
                    query, *whole, whole[3].capacity, device_length=lengths[1], **settings
                )

            return {"ours": Implementation(shares), "copies": Implementation(copies)}

        return make

    def _both(self, call: Call) -> Made:
        """Kernels and references; all references of an eviction's operations read the device."""

        def with_torch() -> object:
            with use_backend("torch"):
                return call()

        return {
            "ours": Implementation(call),
            "torch": Implementation(with_torch, "eager", graph=False),
        }


def measure(case: Case, gpu: Gpu, bandwidth: float) -> Iterator[Row]:
    """Time all implementations of a case."""
    floor = case.size / bandwidth
    sets = [case.make() for _ in range(gpu.buffers(case.size))]
    for name, first in sets[0].items():
        seconds = None
        calls = [each[name].call for each in sets]
        if first.call is not None:
            seconds = gpu.seconds(calls, graph=first.graph)
        yield Row(
            op=case.op,
            case=case.name,
            implementation=name,
            megabytes=round(case.size / 1e6, 3),
            floor_us=round(1e6 * floor, 2),
            us=None if seconds is None else round(1e6 * seconds, 2),
            share=None if seconds is None else round(floor / seconds, 4),
            goal=case.goal if name == "ours" else "",
            note=first.note,
        )


def run(sizes: Sizes, output: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Measure everything; print it, and write `gpu_kernels.csv` after each case."""
    gpu, machine = Gpu.here(), Machine.here(seed=0)
    torch.manual_seed(0)
    say(f"{gpu}\n{machine}")
    if not gpu.real:
        say("interpreted at toy size: the times mean nothing")
    rows: list[Row] = []
    with use_backend("triton"):
        bandwidth = gpu.copy_bandwidth()
        say(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s\n{HEADER}")
        for case in Cases(sizes, gpu.device):
            for row in measure(case, gpu, bandwidth):
                say(str(row))
                rows.append(row)
            if output is not None:
                extra = gpu.row() | {"dtype": str(sizes.dtype), "copy_tb_s": f"{bandwidth / 1e12}"}
                write_csv(output / "gpu_kernels.csv", rows, machine, **extra)
    say(eviction_share(rows, judge=gpu.real))
    return rows


def eviction_share(rows: Sequence[Row], *, judge: bool) -> str:
    """Hold an event's redundancy against the steps of decode attention that lie between two."""
    case = next(row.case for row in rows if row.op == "redundancy")
    us = {row.op: row.us for row in rows if row.case == case and row.implementation == "ours"}
    share = us["redundancy"] / (BUFFER * us["decode_attention"])
    verdict = ("met" if share < REDUNDANCY_GOAL else "missed") if judge else "not judged"
    return (
        f"redundancy / {BUFFER} steps of attention, {case}: {100 * share:.1f}% "
        f"(goal < {100 * REDUNDANCY_GOAL:.0f}%, {verdict})"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Time the kernels against their floors.")
    parser.add_argument(
        "--interpret", action="store_true", help="toy sizes, to see that everything runs"
    )
    parser.add_argument("--output", type=Path, help="folder for gpu_kernels.csv")
    chosen = parser.parse_args(arguments)
    run(TOY if chosen.interpret else Sizes(), chosen.output, print)


if __name__ == "__main__":
    main()
