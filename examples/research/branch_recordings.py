"""Sampled branches of a reasoner's problems, kept on disk batch by batch.

Whatever stops branches early is judged on these: `replay` cuts a recording short exactly where a
run with the same seed would have stopped. A run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.research.reasoners import Reasoner, encode
from hf_reasoncache.branching import ConfidentExit, ExitRules
from hf_reasoncache.branching.generate import branch_generate
from hf_reasoncache.branching.recording import Recording

GROUP = 64
"""Tokens of a sliding group: chains here have 200 to 300 tokens, DeepConf's tens of thousands."""


@dataclass(frozen=True)
class Sampling:
    """How branches are drawn.

    Attributes
    ----------
    reasoner : Reasoner
    temperature : float
    branches : int
    batch : int
        Problems generated together; part of the recipe, since a batch shares its random numbers.
    """

    reasoner: Reasoner
    temperature: float
    branches: int
    batch: int = 10

    def folder(self, root: Path, seed: int) -> Path:
        """Where the branches of the problems of a seed are kept."""
        recipe = f"{self.reasoner.name}-{self.temperature:g}-{self.branches}x{self.batch}-{seed}"
        return root / recipe


def generate_arguments(sampling: Sampling) -> dict[str, Any]:
    """Arguments of generate, but for inputs and criteria."""
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": sampling.reasoner.max_new_tokens,
    }


@torch.inference_mode()
def record_branches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: dict[str, list[Any]],
    sampling: Sampling,
    folder: Path,
    seed: int,
) -> list[Recording]:
    """Return the branches of all problems, in the order of the tasks.

    Batches that are on disk are read, the others are generated and written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recordings: list[Recording] = []
    with tqdm(total=sum(map(len, problems.values())), unit="problem", desc=folder.name) as progress:
        for task, some in problems.items():
            for start in range(0, len(some), sampling.batch):
                batch = some[start : start + sampling.batch]
                path = folder / f"{task}-{start:04d}-{len(batch)}.safetensors"
                if not path.exists():
                    task_index = sampling.reasoner.tasks.index(task)
                    torch.manual_seed(seed * 1_000_003 + task_index * 10_007 + start)
                    _write(path, _generate(model, tokenizer, batch, sampling))
                recordings += _read(path, tokenizer, sampling)
                progress.update(len(batch))
    return recordings


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Any],
    sampling: Sampling,
) -> list[Recording]:
    exit = ConfidentExit(
        sampling.reasoner.read_answer,
        branches=sampling.branches,
        tokenizer=tokenizer,
        rules=ExitRules(consensus=None, group=GROUP),
    )
    model.set_attn_implementation("reasoncache")
    branch_generate(
        model,
        encode(sampling.reasoner, tokenizer, batch),
        num_branches=sampling.branches,
        **generate_arguments(sampling),
        stopping_criteria=[exit],
        logits_processor=[exit.recorder],
    )
    return exit.recordings()


def _write(path: Path, recordings: Sequence[Recording]) -> None:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [each for recording in recordings for each in recording.ids]
    confidence = [each for recording in recordings for each in recording.confidence]
    tensors = {
        "ids": pad(ids, batch_first=True).to(torch.int32),
        "confidence": pad(confidence, batch_first=True),
        "lengths": torch.tensor([len(each) for each in ids]),
        "ended": torch.tensor([each for recording in recordings for each in recording.ended]),
    }
    # Renamed when it is whole: what has a name is never a part.
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def _read(path: Path, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> list[Recording]:
    stored = load_file(path)
    ids, confidence, ended = stored["ids"].long(), stored["confidence"], stored["ended"]
    lengths = stored["lengths"].tolist()
    rows = [(ids[row, :n], confidence[row, :n]) for row, n in enumerate(lengths)]
    found = []
    read_answer, branches = sampling.reasoner.read_answer, sampling.branches
    for first in range(0, len(rows), branches):
        some = rows[first : first + branches]
        found.append(
            Recording(
                ids=tuple(row for row, _ in some),
                confidence=tuple(row for _, row in some),
                answers=tuple(read_answer(tokenizer.decode(row)) for row, _ in some),
                ended=tuple(ended[first : first + branches].tolist()),
            )
        )
    return found
