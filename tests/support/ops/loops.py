"""The loops of a program, in the language of the assembler (PTX) or of the machine (SASS).

Blocks of a loop may stand anywhere in the text, so loops are found by who jumps where.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

LABEL = re.compile(r"\s*(\$L\w+|\.L\w+):")
TARGET = re.compile(r"\$L\w+|\.L\w+")
"""Labels of the compiler. Spin locks of inline assembly have others, and are no loops here."""

INSTRUCTION = re.compile(
    r"\s*(?:/\*\w+\*/\s*)?(?P<predicate>@\S+\s+)?(?P<name>[A-Za-z][\w.:]*)\s*(?P<operands>[^;]*);"
)


@dataclass
class Block:
    """Instructions that run one after the other."""

    instructions: Counter[str] = field(default_factory=Counter)
    target: str | None = None
    falls_through: bool = True


def instructions(text: str) -> Counter[str]:
    """Count the instructions of a program; names are those of `loops`."""
    return sum((block.instructions for block in _parse(text)[0]), Counter())


def sequence(text: str) -> list[str]:
    """Return the names of all instructions, in the order of the text."""
    return [found["name"] for found in map(INSTRUCTION.match, text.splitlines()) if found]


def loops(text: str, *, innermost: bool = False) -> list[Counter[str]]:
    """Count the instructions of each loop of a program.

    Parameters
    ----------
    text : str
        PTX, or SASS as `nvdisasm -c` prints it.
    innermost : bool, optional
        Leave out loops that have loops in them.

    Returns
    -------
    list of Counter
        By name; asynchronous copies have the number of their bytes behind it.
    """
    blocks, labels = _parse(text)
    following = []
    for place, block in enumerate(blocks):
        falls = block.falls_through and place + 1 < len(blocks)
        following.append({place + 1} if falls else set())
        if block.target is not None:
            following[-1].add(labels[block.target])
    found = _natural_loops(following)
    if innermost:
        found = [each for each in found if not any(other < each for other in found)]
    return [sum((blocks[place].instructions for place in each), Counter()) for each in found]


def _parse(text: str) -> tuple[list[Block], dict[str, int]]:
    """Return the blocks in the order of the text, and which of them each label begins."""
    blocks, labels = [Block()], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(blocks)
            blocks.append(Block())
        elif found := INSTRUCTION.match(line):
            name, operands = found["name"], found["operands"]
            size = re.search(r"0x\w+", operands) if name.startswith("cp.async.c") else None
            blocks[-1].instructions[f"{name} {int(size[0], 16)}" if size else name] += 1
            kind, target = name.split(".")[0].lower(), TARGET.search(operands)
            if kind in ("ret", "exit") or (kind == "bra" and target):
                # What decides a jump of the machine may stand among the operands.
                blocks[-1].falls_through = bool(found["predicate"]) or "," in operands
                blocks[-1].target = target[0] if kind == "bra" and target else None
                blocks.append(Block())
    return blocks, labels


def _natural_loops(following: list[set[int]]) -> list[set[int]]:
    """Return the blocks of each loop: those from which a jump back to its first one is reached."""
    before: list[set[int]] = [set() for _ in following]
    reached, waiting = set(), [0]
    while waiting:
        place = waiting.pop()
        if place not in reached:
            reached.add(place)
            waiting.extend(following[place])
            for other in following[place]:
                before[other].add(place)

    # Blocks that every way to a block passes.
    passed = {place: set(reached) for place in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for place in sorted(reached - {0}):
            now = {place} | set.intersection(*(passed[other] for other in before[place]))
            changed |= now != passed[place]
            passed[place] = now

    found: dict[int, set[int]] = {}
    for place in reached:
        for first in following[place] & passed[place]:
            body, waiting = found.setdefault(first, {first}), [place]
            while waiting:
                other = waiting.pop()
                if other not in body:
                    body.add(other)
                    waiting.extend(before[other])
    return list(found.values())
