"""The two families of problems, one for each trained model.

``llama`` is the easier one: every look-up is written out with its key (``a> c``) and reads a single
fact. ``qwen3`` asks for more: an addend is the sum of three facts scattered over the prompt, the
key of a transition is never written but composed from the node and the accumulator, and chains of
thought are longer than 300 words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .vocabulary import DIRECTIVES, build_vocabulary

TASKS = ("chain", "walk", "instr")


@dataclass(frozen=True)
class ChainShape:
    """The size of a ``chain`` problem."""

    questions: int
    """Chains asked about."""
    lengths: tuple[int, int]
    """Fewest and most definitions in a chain."""
    distractors: int
    """Chains nobody asks about."""


@dataclass(frozen=True)
class WalkShape:
    """The size of a ``walk`` or ``instr`` problem."""

    nodes: int
    """Nodes the walk may visit."""
    distractors: int
    """Nodes it never reaches."""
    steps: int
    """Steps to walk, at most 64."""
    directives: tuple[str, ...] = ()
    """Standing instructions, out of ``vocabulary.DIRECTIVES``."""


@dataclass(frozen=True)
class Family:
    """A dialect of the tasks: its words, its format and the sizes of its evaluation problems."""

    name: str
    letters: str
    marks: tuple[str, ...]
    compact: bool
    """Three facts per addend, unwritten transition keys, signs on all that is added."""
    chain: ChainShape
    walk: WalkShape
    instr: WalkShape
    max_new_tokens: dict[str, int]
    """Per task, a generous limit: at least 1.25 times the longest reference solution."""

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word, in the order of the embedding rows."""
        return build_vocabulary(self.letters, self.marks)


FAMILIES = {
    "llama": Family(
        name="llama",
        letters="abcdefghijklmnop",
        marks=("", ":", "=", "?", "+", ">", "<"),
        compact=False,
        chain=ChainShape(questions=4, lengths=(3, 4), distractors=1),
        walk=WalkShape(nodes=5, distractors=5, steps=30),
        instr=WalkShape(nodes=4, distractors=4, steps=20, directives=DIRECTIVES),
        max_new_tokens={"chain": 384, "walk": 384, "instr": 384},
    ),
    "qwen3": Family(
        name="qwen3",
        letters="abcdefghijklmnopqrstuvwxyz",
        marks=("", ":", "=", "?", "+", ">", "<", "*"),
        compact=True,
        chain=ChainShape(questions=6, lengths=(3, 4), distractors=1),
        walk=WalkShape(nodes=10, distractors=2, steps=48),
        instr=WalkShape(nodes=8, distractors=2, steps=30, directives=DIRECTIVES),
        max_new_tokens={"chain": 512, "walk": 512, "instr": 512},
    ),
}


def get_family(name: str) -> Family:
    """Return the family called ``name``; a `ValueError` names the known ones."""
    if name not in FAMILIES:
        raise ValueError(f"unknown family: expected one of {sorted(FAMILIES)}, got {name!r}")
    return FAMILIES[name]
