"""The reasoners that scripts on branches run on: one on pretrained weights, and the tiny ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from examples import tiny_reasoner
from examples.real_model import model as real_model
from examples.real_model.reasoner import problems as chats
from examples.tiny_reasoner import evaluate as tiny_evaluate
from hf_reasoncache.experimental import Boundaries


class Reasoner(Protocol):
    """A model, problems that it understands, and their checker; problems are its own objects.

    Attributes
    ----------
    name : str
        As `--reasoner` takes it, and as files are called.
    title : str
        What notes call it.
    tasks : tuple of str
    boundaries : Boundaries
        Where a step of its chains of thought ends.
    max_new_tokens : int
        A generous limit on the length of a chain.
    guess : callable or None
        What stands for the answer of a chain that has none yet, for exits that do not wait for one.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def boundaries(self) -> Boundaries: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def guess(self) -> Callable[[str], str | None] | None: ...

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return model and tokenizer."""

    def make_problems(self, task: str, count: int, seed: int) -> list[Any]:
        """Return problems; those of a smaller count with the same seed come first."""

    def prompt(self, tokenizer: PreTrainedTokenizerBase, problem: Any) -> str:
        """Return what the model reads, special tokens included."""

    def read_answer(self, text: str) -> str | None:
        """Read the answer of a chain; None while it is not complete."""

    def is_right(self, problem: Any, answer: str | None) -> bool:
        """Judge an answer."""


def last_number(text: str) -> str | None:
    """Read the last digit that stands alone, wherever the chain of thought is by then."""
    return next((word for word in reversed(text.split()) if word.isdigit()), None)


@dataclass(frozen=True)
class TinyReasoner:
    """One of `examples.tiny_reasoner`, in float32."""

    name: str
    tasks: tuple[str, ...] = tiny_reasoner.TASKS
    # A sentence's full stop is a word of its own.
    boundaries: Boundaries = field(default_factory=lambda: Boundaries((r"\.",), look_back=1))
    guess: Callable[[str], str | None] | None = last_number

    @property
    def max_new_tokens(self) -> int:
        """That of the family's longest task."""
        return max(tiny_reasoner.FAMILIES[self.name].max_new_tokens.values())

    @property
    def title(self) -> str:
        """The family."""
        return f"{self.name} model, float32"

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """See `Reasoner`."""
        return tiny_evaluate.load(tiny_reasoner.MODELS[self.name])

    def make_problems(self, task: str, count: int, seed: int) -> list[Any]:
        """See `Reasoner`."""
        return list(tiny_reasoner.make_problems(task, count, seed, self.name))

    def prompt(self, tokenizer: PreTrainedTokenizerBase, problem: Any) -> str:
        """See `Reasoner`."""
        return str(problem.prompt)

    def read_answer(self, text: str) -> str | None:
        """See `Reasoner`."""
        return tiny_reasoner.read_answer(text)

    def is_right(self, problem: Any, answer: str | None) -> bool:
        """See `Reasoner`."""
        return bool(answer == problem.answer)


SHORT = {"trades": chats.Size((6, 6), (4, 5)), "ledger": chats.Size((6, 6), (3, 4))}
"""A third as many steps as `problems.FULL` has: chains of 140 to 190 tokens, for many branches."""


@dataclass(frozen=True)
class ChatReasoner:
    """`examples.real_model.reasoner` with its adapter merged, in bfloat16.

    Attributes
    ----------
    sizes : mapping of str to Size
        Of the problems of each task.
    folder : Path
        What `python -m examples.real_model.reasoner.adapter --out FOLDER` wrote.
    """

    name: str
    title: str
    sizes: Mapping[str, chats.Size]
    max_new_tokens: int
    # A sentence of a chain has 4 to 10 tokens.
    boundaries: Boundaries = field(default_factory=lambda: Boundaries((r"\.",), look_back=2))
    folder: Path = Path("build/reasoner-merged")
    guess: Callable[[str], str | None] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that have a size."""
        return tuple(self.sizes)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """See `Reasoner`."""
        return real_model.load(torch.bfloat16, self.folder)

    def make_problems(self, task: str, count: int, seed: int) -> list[Any]:
        """See `Reasoner`."""
        return list(chats.make_problems(task, count, seed, self.sizes[task]))

    def prompt(self, tokenizer: PreTrainedTokenizerBase, problem: Any) -> str:
        """See `Reasoner`."""
        chat = [{"role": "user", "content": problem.prompt}]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def read_answer(self, text: str) -> str | None:
        """Return the line after "Answer:" once its full stop is there."""
        found = re.search(r"^Answer:([^.\n]+)\.", text, re.MULTILINE)
        return None if found is None else found[1].strip()

    def is_right(self, problem: Any, answer: str | None) -> bool:
        """See `Reasoner`; the side of the rule's word does not count."""
        return answer is not None and bool(chats.check(problem, f"Answer: {answer}.").correct)


REASONERS: dict[str, Reasoner] = {
    each.name: each
    for each in (
        ChatReasoner("smollm2", "SmolLM2 reasoner, bfloat16", chats.FULL, 600),
        ChatReasoner(
            "smollm2-short",
            "SmolLM2 reasoner (trades and ledger, a third of the steps), bfloat16",
            SHORT,
            240,
        ),
        *map(TinyReasoner, tiny_reasoner.MODELS),
    )
}


def encode(
    reasoner: Reasoner, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Any]
) -> BatchEncoding:
    """Turn the prompts of some problems into one batch, padded on the left."""
    return tokenizer(
        [reasoner.prompt(tokenizer, problem) for problem in problems],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    )


def mixed(reasoner: Reasoner, count: int, seed: int) -> dict[str, list[Any]]:
    """Return that many problems, as equally as can be from each task."""
    tasks = reasoner.tasks
    sizes = [count // len(tasks) + (index < count % len(tasks)) for index in range(len(tasks))]
    return {
        task: reasoner.make_problems(task, size, seed)
        for task, size in zip(tasks, sizes, strict=True)
    }
