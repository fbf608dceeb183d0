"""`generate`: answers to a file of prompts, for data sets and rollouts."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_reasoncache.calibration.settings import differences, plain, versions
from hf_reasoncache.cli.loading import budget_of, load_model
from hf_reasoncache.cli.options import (
    Buffer,
    Chat,
    Device,
    Dtype,
    Dtypes,
    Model,
    OneBudget,
    OneCache,
    Revision,
    Temperature,
    Threads,
    Window,
)
from hf_reasoncache.evaluation.journal import Journal
from hf_reasoncache.evaluation.specs import parse_spec
from hf_reasoncache.generation import (
    Completion,
    Defaults,
    Limits,
    Line,
    Sampling,
    Worker,
    digest,
    generate,
    pack,
    read_lines,
)
from hf_reasoncache.generation.lines import LONGEST
from hf_reasoncache.outputs import naming, new_directory, sole_writer, write_text
from hf_reasoncache.planning.units import parse_bytes
from hf_reasoncache.processes import Processes
from hf_reasoncache.profiles.fingerprint import fingerprint

_MOST = 1_000_000
"""Answers to a prompt: they are listed before any work."""


def _write_answers(
    path: Path, prompts: Sequence[Line], journal: Journal[Completion], samples: int
) -> None:
    """Write all answers in the order of the prompts; a crash leaves all of the file or nothing."""
    temporary = path.with_name(f".{path.name}.new")
    with naming(path), temporary.open("w", encoding="utf-8") as file:
        for line in prompts:
            for sample in range(samples):
                answer = journal.records[line.id, sample].beside(line)
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    temporary.replace(path)


def generate_command(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="JSON lines with prompt or messages; if wanted id, max_new_tokens, temperature, "
            "top_k, top_p, seed, spans. Other fields are kept.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="JSON lines, in the order of the prompts; settings and speed go to "
            "FILE.meta.json. The same command goes on after a kill.",
        ),
    ],
    memory: Annotated[
        str,
        typer.Option(
            metavar="2GB|1.5GiB|...",
            help="What the cache of a batch may take, in each process; GB is 10^9 bytes, GiB 2^30.",
        ),
    ],
    cache: OneCache = "full",
    budget: OneBudget = None,
    samples: Annotated[int, typer.Option(min=1, max=_MOST, help="Answers to each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=LONGEST, help="Longest answer.")] = 4096,
    temperature: Temperature = None,
    top_k: Annotated[
        int | None, typer.Option(help="Of the sampling.", show_default="likewise")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Of the sampling.", show_default="likewise")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Most answers in a batch.")] = 256,
    look_ahead: Annotated[
        int, typer.Option(min=1, help="Prompts sorted by length before batches are cut.")
    ] = 1024,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first prompts.", show_default=False)
    ] = None,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Also write the tokens of the answers.")
    ] = False,
    chat: Chat = False,
    window: Window = 8,
    buffer: Buffer = 128,
    revision: Revision = None,
    dtype: Dtypes = Dtype.auto,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Answer a file of prompts at a bound on the cache's memory.

    Each answer is one line: the fields of its prompt, id, sample, seed, text, prompt_tokens,
    completion_tokens and finish_reason. Greedy or sampled, an answer does not depend on what else
    is in its batch, but for the rounding of a padded batch. Several processes share the prompts:
    accelerate launch -m hf_reasoncache.cli generate ...
    """
    spec = parse_spec(cache, window, buffer)
    held = budget_of(spec, budget)
    limits = Limits(parse_bytes(memory, "--memory"), batch_size, look_ahead)
    loaded = load_model(model, revision, dtype, device, threads)
    processes = Processes.of(loaded[0])
    usual = loaded[0].generation_config
    sampling = Sampling.of(usual) if temperature is None else Sampling(temperature)
    sampling = sampling.changed(top_k=top_k, top_p=top_p)
    read = read_lines(prompts, loaded[1], Defaults(max_new_tokens, sampling, seed, chat), limit)
    if samples > 1 and any(line.sampling.temperature == 0 for line in read):
        raise ValueError(
            "--samples: expected 1, as greedy answers to a prompt are all alike, got "
            f"{samples}; pass --temperature."
        )
    worker = Worker(*loaded, spec, held, samples=samples, chat=chat, token_ids=token_ids)
    worker.check(read)
    # Before any work: every prompt must fit.
    pack([(line, range(samples)) for line in read], worker.row_bytes, limits)
    settings = {
        "model": Path(loaded[0].config._name_or_path).name,
        "fingerprint": fingerprint(loaded[0]),
        "prompts": digest(read),
        "cache": spec.name,
        "budget": held,
        "spec": plain(spec),
        "samples": samples,
        "sampling": plain(sampling),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "chat": chat,
        "token_ids": token_ids,
        "dtype": str(loaded[0].dtype).removeprefix("torch."),
        "device": loaded[0].device.type,
        **versions(),
    }
    about = out.with_name(f"{out.name}.meta.json")
    with sole_writer(new_directory(out.parent) / out.name, is_main=processes.is_main):
        if _complete(out, about, settings):
            if processes.is_main:
                typer.echo(f"{out}: complete already")
            return
        partial = out.with_name(f"{out.name}.partial")
        with Journal(partial, Completion, settings, processes) as journal:
            work = generate(read, worker, journal, limits, samples, processes)
            journal.join((line.id, n) for line in read for n in range(samples))
        if processes.is_main:
            content = {"settings": settings, "shared_prompts": worker.shares}
            content |= {"limits": asdict(limits), "processes": processes.count}
            content |= {"last_run": asdict(work), "machine": _machine(loaded[0].device)}
            # First, as a file of answers without it would be taken for another's.
            write_text(about, json.dumps(content, indent=1) + "\n")
            _write_answers(out, read, journal, samples)
            partial.unlink()
            for text in (*work.lines(limits.memory, processes.count), str(out)):
                typer.echo(text)
    processes.wait()


def _complete(out: Path, about: Path, settings: dict[str, Any]) -> bool:
    """Whether these answers are there already; ValueError if others are."""
    if not out.exists():
        return False
    found = json.loads(about.read_text("utf-8"))["settings"] if about.exists() else {}
    differing = differences(found, json.loads(json.dumps(settings)))
    if differing:
        raise ValueError(
            f"{out}: expected no file, or the answers of this command, got others, which differ in "
            f"{', '.join(differing)}; choose another file."
        )
    return True


def _machine(device: torch.device) -> dict[str, Any]:
    """What the speed of a run must be read with."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
