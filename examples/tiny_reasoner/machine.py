"""The machine that a ``walk`` runs: nodes that add to an accumulator, and two edges out of each."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .families import Family, WalkShape

#: Facts that add up to the addend of a node in a compact family; each is a digit from 0 to 3, so
#: their sum is a digit.
PIECES = 3


@dataclass(frozen=True)
class Node:
    """What a visit adds, and where it leads."""

    pieces: tuple[int, ...]
    right: str
    left: str

    @property
    def addend(self) -> int:
        """What a visit adds to the accumulator."""
        return sum(self.pieces)


@dataclass(frozen=True)
class Machine:
    """Nodes by name, and the rule that picks an edge.

    A visit of a node adds its addend to the accumulator, modulo 10; the result picks the next node.
    """

    nodes: dict[str, Node]
    compact: bool

    def goes_right(self, accumulator: int) -> bool:
        """Say whether the right edge (``a> c``) is taken, rather than the left one (``a< d``).

        A compact machine goes right at 5 and above: the parity of a sum depends on the parities of
        its terms alone, so a machine that branches on even and odd runs in small circles.
        """
        return accumulator >= 5 if self.compact else accumulator % 2 == 0

    def after(self, name: str, accumulator: int) -> str:
        """Return the node after `name`, where the visit of `name` left this accumulator."""
        node = self.nodes[name]
        return node.right if self.goes_right(accumulator) else node.left

    def run(self, name: str, accumulator: int, steps: int) -> list[tuple[str, int]]:
        """Return each node visited, with the accumulator after the visit."""
        states = []
        for _ in range(steps):
            accumulator = (accumulator + self.nodes[name].addend) % 10
            states.append((name, accumulator))
            name = self.after(name, accumulator)
        return states

    def facts(self) -> list[list[str]]:
        """Return the sentences that describe the machine, without their full stops.

        A compact machine has a sentence for each fact, another one a sentence for each node.
        """
        facts = []
        for name, node in self.nodes.items():
            addends = [[f"{name}+", str(piece)] for piece in node.pieces]
            edges = [[f"{name}>", node.right], [f"{name}<", node.left]]
            parts = addends + edges
            facts += parts if self.compact else [[word for part in parts for word in part]]
        return facts


def draw_pieces(family: Family, rng: random.Random) -> tuple[int, ...]:
    """Return the parts of an addend."""
    if family.compact:
        return tuple(rng.randint(0, 3) for _ in range(PIECES))
    return (rng.randint(0, 9),)


def draw_machine(
    family: Family, rng: random.Random, shape: WalkShape, tries: int = 20
) -> tuple[Machine, str, int]:
    """Return a machine, its first node and its first accumulator.

    A machine has ``10 * nodes`` states, so a random one soon runs in a circle that a short memory
    suffices for. Of several machines this keeps the one whose walk takes the most different edges.
    """
    names = rng.sample(family.letters, shape.nodes + shape.distractors)
    active = names[: shape.nodes]
    accumulator = rng.randint(0, 9)
    best = Machine({}, family.compact)
    most = 0
    for _ in range(tries):
        nodes = {}
        for name in names:
            reachable = active if name in active else names
            rights = [other for other in reachable if other != name] or [name]
            right = rng.choice(rights)
            left = rng.choice([other for other in rights if other != right] or rights)
            nodes[name] = Node(draw_pieces(family, rng), right, left)
        machine = Machine(nodes, family.compact)
        states = machine.run(active[0], accumulator, shape.steps)
        edges = len({(name, machine.goes_right(result)) for name, result in states})
        if edges > most:
            best, most = machine, edges
    return best, active[0], accumulator
