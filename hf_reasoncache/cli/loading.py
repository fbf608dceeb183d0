"""The model of a command, and options that are lists."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from hf_reasoncache.cli.options import Dtype
from hf_reasoncache.evaluation.arms import Budget, parse_budget
from hf_reasoncache.messages import shown
from hf_reasoncache.processes import Processes


def load_model(
    name: str,
    revision: str | None,
    dtype: Dtype,
    device: str | None,
    threads: int | None,
    attention: str | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load model and tokenizer, on the device of this process where none is given."""
    if threads is not None:
        torch.set_num_threads(threads)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    processes = Processes(cpu=device == "cpu" or not torch.cuda.is_available())
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=dtype.value,
        device_map=device or processes.device,
        attn_implementation=attention,
    )
    return model.eval(), AutoTokenizer.from_pretrained(name, revision=revision)


def budgets(text: str) -> list[Budget]:
    """Numbers with commas between them."""
    return [parse_budget(part) for part in text.split(",") if part.strip()]


def seeds(text: str) -> list[int]:
    """Whole numbers with commas between them; ValueError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(
            f"--seeds: expected whole numbers with commas, got {shown(text)}."
        ) from error


def new_directory(path: Path) -> Path:
    """Make a directory for results, with those above it."""
    path.mkdir(parents=True, exist_ok=True)
    return path
