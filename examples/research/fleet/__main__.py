"""Which rate of requests a machine sustains with which cache, and how long they wait.

    python -m examples.research.fleet --trace examples/research/fleet/trace.csv --model MODEL \
        --memory 80GB --budget 1024,4096

Everything is simulated, on step times that are computed (`hf-reasoncache plan` says how) or fitted
to a table of measured ones (`python -m examples.research.fleet.measure`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig

from examples.research.fleet.caches import specs
from examples.research.fleet.command import run_command
from examples.research.fleet.measured import read_measured
from examples.research.fleet.report import fleet_png, lines_of
from examples.research.fleet.search import MODES, Outcome, Workload, sustained_rate
from examples.research.fleet.server import Ceiling, Server, Timing
from examples.research.fleet.trace import rate_of, read_trace
from examples.research.tables import write_csv
from hf_reasoncache.caches.reason_alloc import ReasonAllocCache
from hf_reasoncache.evaluation.table import text_table
from hf_reasoncache.planning import ModelSize, Setting
from hf_reasoncache.planning.devices import find_device
from hf_reasoncache.planning.units import amount, parse_bytes

LOADS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
"""Shares of its sustained rate at which the latency of a server is shown."""


def fleet(
    trace: Annotated[
        Path,
        typer.Option(help="CSV or JSON lines: prompt_tokens, answer_tokens, perhaps arrival (s)."),
    ],
    model: Annotated[str, typer.Option(help="A directory or ORG/NAME; only its config is read.")],
    budget: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens per KV head.")],
    memory: Annotated[
        str | None, typer.Option(help="80GB or 80GiB.", show_default="that of --gpu")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Whose published limits give step times.")] = "H100-SXM",
    cache: Annotated[str, typer.Option(help="As for hf-reasoncache evaluate.")] = "reason-alloc",
    branches: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    mode: Annotated[str, typer.Option(help="continuous, static or both.")] = "both",
    requests: Annotated[
        int | None,
        typer.Option(
            min=20,
            help="Of each simulation.",
            show_default="what fills the server 5 times, 20 in static batches",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest answer, for which memory is set aside.",
            show_default="the trace's",
        ),
    ] = None,
    known_lengths: Annotated[
        bool,
        typer.Option(
            "--known-lengths", help="Set memory aside for each answer's true length instead."
        ),
    ] = False,
    recorded: Annotated[
        bool,
        typer.Option(
            "--recorded", help="Requests come as the trace's arrival column says, scaled to a rate."
        ),
    ] = False,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the device's limits reached.")
    ] = 1.0,
    overhead: Annotated[float, typer.Option(min=0.0, help="Milliseconds more per forward.")] = 0.0,
    reserve: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of memory.")] = 0.05,
    measured: Annotated[
        Path | None, typer.Option(help="Measured step times instead of the device's limits.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of arrivals and draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="fleet.csv and fleet.png.")] = None,
) -> None:
    """Simulate a fleet of one kind of machine; several serve so many times the rate."""
    modes = list(MODES) if mode == "both" else [mode]
    if not set(modes) <= set(MODES):
        raise ValueError(f"--mode: expected continuous, static or both, got {mode!r}.")
    config = AutoConfig.from_pretrained(model)
    lengths = read_trace(trace)
    if recorded and requests is not None:
        raise ValueError("--requests: expected none with --recorded, which takes all of the trace.")
    own = rate_of(lengths) if recorded else None
    limit = max_new_tokens or max(each.answer for each in lengths)
    longest = max(each.prompt for each in lengths)
    device = find_device(gpu)
    if memory is not None:
        device = replace(device, memory=parse_bytes(memory))
    size = ModelSize.of(config, _dtype(config, dtype), name=model.rstrip("/").split("/")[-1])
    setting = Setting(
        config, size, device, longest, longest + limit, round(reserve * device.memory)
    )
    timing = Ceiling(size, device, config, efficiency, overhead / 1000)
    servers = _servers(setting, timing, cache, budget, branches, measured)
    rows = max(server.capacity(limit) for server in servers)
    count = len(lengths) if recorded else requests
    workload = Workload(lengths, count, branches, limit, known_lengths, seed, recorded)
    source = f"computed for {device.name}" if measured is None else f"fitted to {measured}"
    typer.echo(
        f"{size.name}: {amount(setting.room)} for rows, at most {rows:,} of them; {branches} per "
        f"prompt\n{len(lengths):,} lines of trace, answers to {limit:,} tokens, seed {seed}\n"
        f"step times {source}; everything below is simulated"
    )
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for server in tqdm(servers, desc="servers", unit="server", leave=False):
        for each in modes:
            best = sustained_rate(server, each, workload)
            rates = {load * best for load in LOADS}
            if own is not None and own < best:
                rates.add(own)
            outcomes[server.name, each] = [
                workload.serve(server, each, rate) for rate in sorted(rates)
            ]
    lines = lines_of(outcomes)
    columns = [column for column in lines[0] if column != "batches"]
    if own is not None:
        typer.echo(f"the trace itself: {own:.3g} requests/s")
    for each in modes:
        told = {f"{own:.3g}"} if own is not None else set()
        shown = [
            x
            for x in lines
            if x["batches"] == each and (x["load"] in ("50%", "90%") or x["rate/s"] in told)
        ]
        typer.echo(f"\n{each} batches\n{text_table(columns, shown)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "fleet.csv", lines)
        (out / "fleet.png").write_bytes(fleet_png(outcomes, "simulated"))


def _servers(
    setting: Setting,
    timing: Timing,
    cache: str,
    budgets: str,
    branches: int,
    measured: Path | None,
) -> list[Server]:
    config, caches = setting.config, {}
    if measured is None:
        # Like DynamicCache, without copying itself at every step.
        caches["no budget"] = ReasonAllocCache(config, budget=None)
    for name, (spec, number) in specs(cache, budgets).items():
        caches[name] = spec.make(config, number, None, 0)
        if branches > 1:
            kind = "no budget" if spec.is_full else name
            caches[f"shared, {kind}"] = spec.make_shared(config, number, 0)
    fits = {} if measured is None else read_measured(measured)
    for name in caches if measured is not None else ():
        if name not in fits:
            raise ValueError(f"{measured}: expected times of {name!r}, got {sorted(fits)}.")
    return [
        Server(
            name=name,
            cache=made,
            config=config,
            size=setting.size,
            room=setting.room,
            timing=fits.get(name, timing),
            longest=(setting.prompt, setting.answer),
            branches=branches,
        )
        for name, made in caches.items()
    ]


def _dtype(config: PretrainedConfig, name: str) -> torch.dtype:
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype: expected auto, float32, bfloat16 or float16, got {name!r}.")
    found = config.dtype if name == "auto" else getattr(torch, name)
    return found if isinstance(found, torch.dtype) else torch.float32


if __name__ == "__main__":
    run_command(fleet)
