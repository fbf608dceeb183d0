"""The model of a command, and options that are lists."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
import typer
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from hf_reasoncache.cli.options import Dtype
from hf_reasoncache.evaluation.specs import Budget, CacheSpec, parse_budget, parse_spec
from hf_reasoncache.messages import shown
from hf_reasoncache.model_graphs import enable_graphs
from hf_reasoncache.outputs import sole_writer
from hf_reasoncache.processes import Processes
from hf_reasoncache.profiles.hub import offline_if_silent

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of accelerate to spread layers over devices."""


def load_model(
    name: str,
    revision: str | None,
    dtype: Dtype,
    device: str | None,
    threads: int | None,
    attention: str | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load model and tokenizer, on the device of this process where none is given; graphs are on.

    Raises
    ------
    ValueError
        If there is no such device, or the model's files are not valid.
    OSError
        If there is no such model.
    """
    if device is not None:
        _require_device(device)
    load_config(name, revision)
    if threads is not None:
        torch.set_num_threads(threads)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype.value,
            device_map=device or processes_on(device).device,
            attn_implementation=attention,
        )
    except SafetensorError as error:
        raise ValueError(
            f"{shown(name)}: expected the weights of a model, got a damaged file: {shown(error)}; "
            "copy or download the model again."
        ) from error
    enable_graphs(model)
    return model.eval(), AutoTokenizer.from_pretrained(name, revision=revision)


@contextmanager
def open_run(
    output: Path,
    name: str,
    revision: str | None,
    dtype: Dtype,
    device: str | None,
    threads: int | None,
    attention: str | None = None,
) -> Iterator[tuple[PreTrainedModel, Tokenizer, bool]]:
    """Be the only run that writes an output, and load the model for it.

    Parameters
    ----------
    output : Path
        In a directory that exists.
    name, revision, dtype, device, threads, attention
        See `load_model`.

    Yields
    ------
    tuple
        Model, tokenizer, and whether this is the process that writes the results.

    Raises
    ------
    ValueError, OSError
        As `sole_writer` and `load_model`.
    """
    is_main = processes_on(device).is_main
    with sole_writer(output, is_main=is_main):
        model, tokenizer = load_model(name, revision, dtype, device, threads, attention)
        yield model, tokenizer, is_main


def expect_hub(*names: str) -> None:
    """Use what is on this machine only, and say so, if the Hub is needed and does not answer.

    Parameters
    ----------
    *names : str
        Models or repositories; those that exist as files here do not need the Hub.
    """
    if all(Path(name).exists() for name in names):
        return
    silent = offline_if_silent()
    if silent is not None:
        typer.echo(f"{silent} does not answer: only what is on this machine is used", err=True)


def load_config(name: str, revision: str | None) -> PretrainedConfig:
    """Load the config of a model.

    Raises
    ------
    ValueError
        If it is not valid.
    OSError
        If there is no such model.
    """
    expect_hub(name)
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (ValueError, OSError, ImportError):
        raise
    # Besides these, what a wrong value in the file leads to wherever it is first used.
    except Exception as error:
        raise ValueError(
            f"{shown(name)}: expected the config of a model, got {type(error).__name__}: "
            f"{shown(error, 120)}."
        ) from error


def processes_on(device: str | None) -> Processes:
    """Return the processes of this run; a device on which they will work may be given."""
    return Processes(cpu=device == "cpu" or not torch.cuda.is_available())


def _require_device(name: str) -> None:
    """Raise ValueError unless tensors can be made on a device."""
    if name in _SPREAD:
        return
    try:
        if torch.empty(0, device=name).is_meta:
            raise ValueError("it holds no numbers")
    # A build without the device's library raises AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"--device: expected a device of this machine, or auto, got {shown(name)}: "
            f"{shown(error, 120)}."
        ) from error


def require_packages(**packages: str) -> None:
    """Raise ModuleNotFoundError unless these packages are there, before any work needs them.

    Parameters
    ----------
    **packages : str
        By the name of each, the extra of ours that it belongs to.
    """
    for name, extra in packages.items():
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"expected the package {name}, which the results need, got no such module; pip "
                f"install 'hf-reasoncache[{extra}]'.",
                name=name,
            )


def warn_nothing_evicted(what: str) -> None:
    """Say that a cache at a budget has evicted nothing."""
    typer.echo(
        f"WARNING: {what}: the budget exceeds the text, and the line says nothing about the "
        "method.",
        err=True,
    )


def compressed(texts: list[str], window: int, buffer: int) -> list[CacheSpec]:
    """Return the caches to try; ValueError where a name is wrong or none of them compresses."""
    specs = [parse_spec(each, window, buffer) for each in texts]
    if all(spec.is_full for spec in specs):
        raise ValueError(
            "--cache: expected a compressed cache, got only the full one, which is always among "
            "what is tried; give --cache snapkv or another."
        )
    return specs


def budgets(text: str, option: str = "--budgets") -> list[Budget]:
    """Numbers with commas between them."""
    return [parse_budget(part, option) for part in text.split(",") if part.strip()]


def budget_of(spec: CacheSpec, text: str | None) -> Budget | None:
    """Read the budget of one cache; ValueError where one is missing or too many."""
    found = None if text is None else parse_budget(text, "--budget")
    if spec.is_full != (found is None):
        wanted = "none with the full cache" if spec.is_full else f"one for {spec.name}"
        raise ValueError(f"--budget: expected {wanted}, got {text}.")
    return found


def seeds(text: str) -> list[int]:
    """Whole numbers with commas between them; ValueError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(
            f"--seeds: expected whole numbers with commas, got {shown(text)}."
        ) from error
