"""`chat`: a model answers at the terminal, and the cache says what it holds."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from transformers import Cache, TextStreamer

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.cli.loading import budget_of, load_model
from hf_reasoncache.cli.options import (
    Buffer,
    Device,
    Dtype,
    Dtypes,
    MaxNewTokens,
    Model,
    OneBudget,
    OneCache,
    Revision,
    Temperature,
    Threads,
    Window,
)
from hf_reasoncache.evaluation.specs import parse_spec
from hf_reasoncache.generation import Conversation, Sampling


def chat_command(
    model: Model,
    budget: OneBudget = None,
    cache: OneCache = "reason-alloc",
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Told to the model first.")
    ] = None,
    max_new_tokens: MaxNewTokens = 4096,
    temperature: Temperature = None,
    window: Window = 8,
    buffer: Buffer = 128,
    revision: Revision = None,
    dtype: Dtypes = Dtype.auto,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Chat with a model, and see what its cache holds.

    A line is a turn; /new begins another conversation, and /quit or the end of the input ends it.
    An interrupt (Ctrl-C) ends an answer, and its turn is forgotten.
    """
    spec = parse_spec(cache, window, buffer)
    held = budget_of(spec, budget)
    drawn = None if temperature is None else Sampling(temperature)
    loaded, tokenizer = load_model(model, revision, dtype, device, threads, spec.attention)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if drawn is not None:
        settings["do_sample"] = drawn.temperature > 0
        settings["temperature"] = drawn.temperature or None
    talk = Conversation(loaded, tokenizer, lambda config: spec.make(config, held, None, 0), system)
    typer.echo("A line is a turn; /new begins another conversation, /quit ends.", err=True)
    while (text := _line()) not in (None, "/quit"):
        if text == "/new":
            talk.restart()
        elif text:
            _turn(talk, text, settings)


def _line() -> str | None:
    """Read a turn; None at the end of the input."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _turn(talk: Conversation, text: str, settings: dict[str, Any]) -> None:
    """Stream an answer, then say what the cache holds."""
    streamer = TextStreamer(talk.tokenizer, skip_prompt=True, skip_special_tokens=True)
    begin = time.perf_counter()
    try:
        talk.answer(text, streamer=streamer, **settings)
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; the turn is forgotten", err=True)
        return
    typer.echo(status(talk.cache, time.perf_counter() - begin), err=True)


def status(cache: Cache | None, seconds: float) -> str:
    """Say in a line what a cache holds."""
    if not isinstance(cache, ReasonCache):
        return f"[{cache.get_seq_length():,} tokens held, {seconds:.1f} s]" if cache else "[]"
    report = cache.report()
    return (
        f"[{report.mean_held:,.0f} of {report.seen:,} tokens held per head, "
        f"{report.kv_bytes / 1e6:,.1f} of {report.dynamic_bytes / 1e6:,.1f} MB, {seconds:.1f} s]"
    )
