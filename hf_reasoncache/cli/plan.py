"""`plan`: what fits a device and how fast it can be, before it is rented."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PretrainedConfig

from hf_reasoncache.arguments import require_share
from hf_reasoncache.caches.reason_alloc import ReasonAllocCache
from hf_reasoncache.caches.shared_branch import SharedBranchCache
from hf_reasoncache.cli.loading import budgets as parse_budgets
from hf_reasoncache.cli.loading import load_config, require_packages
from hf_reasoncache.cli.options import Dtype, Json, Revision
from hf_reasoncache.evaluation.specs import FULL, Budget, parse_spec
from hf_reasoncache.evaluation.table import markdown_table, text_table
from hf_reasoncache.messages import shown
from hf_reasoncache.outputs import new_directory, write_bytes, write_text
from hf_reasoncache.planning import CachePlan, Device, ModelSize, Setting
from hf_reasoncache.planning.devices import DEVICES, find_device
from hf_reasoncache.planning.plot import plan_png
from hf_reasoncache.planning.units import amount, parse_bytes

_DEFAULT_GPU = "H100-SXM"
_FULL = "no budget"
_LONGEST = 10_000_000
"""Tokens, and branches: windows are followed one by one."""
_LEGEND = (
    "MB/row: held at the end of the context, in 10^6 bytes; rows: the most that fit.",
    "tok/s: of all rows, at the end of the context; mean: over the whole of it.",
    f"vs: mean against DynamicCache, and against ours that keeps all ({_FULL!r}).",
)

Table = tuple[list[str], list[dict[str, str]]]


def plan_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A directory, or ORG/NAME. Only its config is read."),
    ],
    context: Annotated[
        int, typer.Option(min=2, max=_LONGEST, help="Tokens of prompt and answer together.")
    ],
    budget: Annotated[
        str,
        typer.Option(
            metavar="N,N,...",
            help="Tokens per KV head (for sliding-window its bound), or, below 1, shares of the "
            "tokens seen.",
        ),
    ],
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Of the device: 80GB is 80 * 10^9 bytes, 80GiB is 80 * 2^30.",
            show_default="that of --gpu",
        ),
    ] = None,
    prompt: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt, which is inside the context.")
    ] = 256,
    branches: Annotated[
        int, typer.Option(min=1, max=_LONGEST, help="Rows that continue each prompt.")
    ] = 1,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:SETTING,...]",
            help="What is planned beside the full cache, written as for evaluate; several times.",
            show_default="reason-alloc",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Directory or ORG/NAME of a budget profile.", show_default=False),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Also show these batch sizes.", show_default=False),
    ] = None,
    gpu: Annotated[
        str, typer.Option(help=f"Whose published limits are the ceiling: {', '.join(DEVICES)}.")
    ] = _DEFAULT_GPU,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=1, help="Of the memory, in GB/s.", show_default="that of --gpu"),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(min=0.001, help="Dense, in TFLOP/s.", show_default="that of --gpu"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="In memory, if quantised.", show_default="from the config"
        ),
    ] = None,
    reserve: Annotated[
        float,
        typer.Option(min=0.0, max=0.9, help="Share of the memory for runtime and fragmentation."),
    ] = 0.05,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and cache.")] = Dtype.auto,
    revision: Revision = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write plan.json, plan.md and plan.png.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute how many rows fit a device, and the most tokens/s it allows.

    Needs no weights and no device. Speeds are ceilings: the published bandwidth and operations per
    second, nothing lost. Full caches are transformers' DynamicCache, which copies itself at every
    step, and ours without a budget.
    """
    require_share("--reserve", reserve)
    if out is not None:
        require_packages(matplotlib="plot")
        new_directory(out)
    config = load_config(model, revision)
    device = _device(gpu, memory, bandwidth, flops)
    size = ModelSize.of(
        config,
        _dtype(config, dtype),
        name=model.rstrip("/").split("/")[-1],
        weight_bytes=None if weights is None else parse_bytes(weights, "--weights"),
    )
    setting = Setting(config, size, device, prompt, context, round(reserve * device.memory))
    plans = _plans(
        setting, cache or ["reason-alloc"], parse_budgets(budget, "--budget"), profile, branches
    )
    sizes = _batches(batch)
    header = _header(setting, branches, reserve)
    tables = [_rows_that_fit(plans)]
    if sizes:
        tables.append(_at_batch(plans, sizes))
    content = json.dumps([_facts(plan, sizes) for plan in plans], indent=1)
    if as_json:
        typer.echo(content)
    else:
        typer.echo("\n".join(header))
        for columns, lines in tables:
            typer.echo("\n" + text_table(columns, lines))
        typer.echo("\n" + "\n".join(_LEGEND))
    if out is not None:
        write_text(out / "plan.json", content + "\n")
        parts = ["\n".join(f"- {line}" for line in (*header, *_LEGEND)) + "\n"]
        parts += [markdown_table(columns, lines) for columns, lines in tables]
        write_text(out / "plan.md", "\n".join(parts))
        write_bytes(out / "plan.png", plan_png(plans))
        typer.echo(out, err=as_json)


def _device(gpu: str, memory: str | None, bandwidth: float | None, flops: float | None) -> Device:
    device = find_device(gpu)
    if memory is not None:
        device = replace(device, memory=parse_bytes(memory, "--memory"))
    if bandwidth is not None:
        device = replace(device, bandwidth=bandwidth * 1e9, source="--bandwidth")
    if flops is not None:
        device = replace(device, flops=flops * 1e12, source="--flops")
    return device


def _dtype(config: PretrainedConfig, dtype: Dtype) -> torch.dtype:
    """As `from_pretrained(dtype="auto")` would choose."""
    if dtype is not Dtype.auto:
        return getattr(torch, dtype.value)
    named = config.dtype or config.get_text_config(decoder=True).dtype
    return named if isinstance(named, torch.dtype) else torch.float32


def _plans(
    setting: Setting, caches: list[str], budgets: list[Budget], profile: str | None, branches: int
) -> list[CachePlan]:
    if not budgets:
        raise ValueError("--budget: expected at least one number, got none.")
    for number in budgets:
        if number >= setting.context:
            raise ValueError(
                f"--budget: expected less than the context of {setting.context}, got {number}, "
                "which evicts nothing; the lines of the full caches say what that takes."
            )
    config = setting.config
    plans = [
        CachePlan(setting, "DynamicCache", FULL.make(config, None, None, 0), branches),
        CachePlan(setting, _FULL, ReasonAllocCache(config, budget=None), branches),
    ]
    if branches > 1:
        exact = SharedBranchCache(config)
        exact.reserve(setting.answer)
        plans.append(CachePlan(setting, f"shared, {_FULL}", exact, branches))
    for text in caches:
        if profile is not None:
            text += f"{',' if ':' in text else ':'}profile={profile}"
        spec = parse_spec(text)
        if spec.is_full:
            raise ValueError(
                f"--cache: expected a compressed cache, got {shown(text)}, which has a line "
                "already."
            )
        name = text.partition(":")[0]
        for number in budgets:
            label = f"{name} {number}"
            made = spec.make(config, number, None, 0)
            plans.append(CachePlan(setting, label, made, branches))
            if branches > 1:
                shared = spec.make_shared(config, number, 0)
                plans.append(CachePlan(setting, f"shared, {label}", shared, branches))
    return plans


def _batches(text: str | None) -> list[int]:
    if text is None:
        return []
    found = parse_budgets(text, "--batch")
    if not all(isinstance(number, int) for number in found):
        raise ValueError(f"--batch: expected whole numbers with commas, got {shown(text)}.")
    return [int(number) for number in found]


def _header(setting: Setting, branches: int, reserve: float) -> list[str]:
    size, device = setting.size, setting.device
    active = f" ({size.active / 1e6:,.0f} active)" if size.routed else ""
    lines = [
        f"{size.name}: {size.parameters / 1e6:,.0f} million parameters{active}, "
        f"{str(size.dtype).removeprefix('torch.')}",
        f"memory {amount(device.memory)} - weights {amount(size.weight_bytes)} - reserve "
        f"{amount(setting.reserve)} ({reserve:.0%})",
        f"= {amount(setting.room)} for rows (1 GB = 10^9 bytes) and their activations",
        f"{setting.prompt:,} tokens of prompt and {setting.answer:,} of answer"
        + (f", {branches} branches per prompt" if branches > 1 else ""),
        f"{device.name}: {device.bandwidth / 1e12:g} TB/s, {device.flops / 1e12:g} TFLOP/s,",
        f"  from {device.source}",
        "Everything below is computed: ceilings, not measurements.",
    ]
    longest = getattr(setting.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and setting.context > longest:
        lines.append(f"NOTE: the model's config allows {longest:,} positions only.")
    return lines


def _rows_that_fit(plans: list[CachePlan]) -> Table:
    columns = ["cache", "MB/row", "rows", "tok/s", "mean", "vs Dyn.", "vs full"]
    copied, full = (plan.mean_tokens_per_second(plan.rows) for plan in plans[:2])
    lines = []
    for plan in plans:
        mean = plan.mean_tokens_per_second(plan.rows)
        line = {
            "cache": plan.name,
            "MB/row": f"{plan.bytes_per_row / 1e6:,.1f}",
            "rows": f"{plan.rows:,}",
            "tok/s": _speed(plan.tokens_per_second(plan.rows)),
            "mean": _speed(mean),
            "vs Dyn.": _ratio(mean, copied),
            "vs full": _ratio(mean, full),
        }
        lines.append(line)
    return columns, lines


def _at_batch(plans: list[CachePlan], batches: list[int]) -> Table:
    columns = ["cache", *(f"{size} rows" for size in batches)]
    lines = [
        {"cache": plan.name}
        | {f"{size} rows": _speed(plan.tokens_per_second(size)) for size in batches}
        for plan in plans
    ]
    return columns, lines


def _ratio(value: float | None, other: float | None) -> str:
    return "-" if value is None or other is None else f"{value / other:.1f}x"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _facts(plan: CachePlan, batches: list[int]) -> dict[str, object]:
    return {
        "cache": plan.name,
        "branches": plan.branches,
        "prompt": plan.setting.prompt,
        "answer": plan.setting.answer,
        "memory": plan.setting.device.memory,
        "weight_bytes": plan.setting.size.weight_bytes,
        "reserve": plan.setting.reserve,
        "bytes": vars(plan.row),
        "bytes_per_row": plan.bytes_per_row,
        "rows": plan.rows,
        "tokens_per_second": plan.tokens_per_second(plan.rows),
        "mean_tokens_per_second": plan.mean_tokens_per_second(plan.rows),
        "at_batch": {size: plan.tokens_per_second(size) for size in batches},
    }
