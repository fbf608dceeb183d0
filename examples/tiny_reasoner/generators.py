"""Writers of problems with their chains of thought.

A `Writer` turns a stream of random numbers into drafts: the words of a prompt, the words of a solution, the true answer. Two things in a
solution are left to chance, so that a model trained on them answers differently when sampled: the filler between steps and, where
``noise`` is above zero, a wrong digit now and then.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from .families import ChainShape, Family, WalkShape
from .vocabulary import DIGITS, DIRECTIVES, SIGNAL_WORDS, SMALL_TALK, THINKING_ALOUD

#: Facts that add up to the addend of a node in a compact family; each is a digit from 0 to 3, so their sum is a digit.
PIECES = 3


@dataclass(frozen=True)
class Draft:
    """A problem in words."""

    prompt: list[str]
    solution: list[str]
    answer: str
    instructions: dict[str, str] = field(default_factory=dict)
    supervised: list[bool] | None = None
    """Words of the solution that can be predicted; None where all can."""


@dataclass(frozen=True)
class Node:
    """A state of the machine of a ``walk``: what it adds, and where it leads."""

    pieces: tuple[int, ...]
    right: str
    left: str

    @property
    def addend(self) -> int:
        """What a visit adds to the accumulator."""
        return sum(self.pieces)


class Writer:
    """Draws problems of one family.

    Parameters
    ----------
    family
        Words, format and sizes.
    rng
        The only source of chance: equal states give equal drafts.
    noise
        Probability that a result of the chain of thought is off. The answer of a draft is always the true one.
    """

    def __init__(self, family: Family, rng: random.Random, noise: float = 0.0) -> None:
        self.family = family
        self.rng = rng
        self.noise = noise

    # -- chain ---------------------------------------------------------------------------------------------------------------------
    def chain(self, shape: ChainShape, small_talk: float = 0.4, aloud: float = 0.25, recheck: float = 0.75) -> Draft:
        """Shuffled definitions ``a: b +3``, and a question for the sum of the values of several names.

        The solution follows each chain from its head with a running accumulator, often checks it by a second pass, records ``a= 7``, and
        at the end sums the recorded values: a look-up into its own text.
        """
        rng = self.rng
        chains = self._draw_chains(shape)
        questions = chains[: shape.questions]
        signs = {name: rng.choice("+-") for chain in chains for name in chain}
        numbers = {name: rng.randint(0, 9) for chain in chains for name in chain}
        following = {name: after for chain in chains for name, after in zip(chain, [*chain[1:], None])}

        prompt = ["<bos>"]
        for name in rng.sample(sorted(following), len(following)):
            after = following[name]
            prompt += [f"{name}:", *([after, signs[name] + str(numbers[name])] if after else [str(numbers[name])]), "."]
            if rng.random() < small_talk:
                prompt += [*rng.choice(SMALL_TALK), "."]
        heads = [chain[0] for chain in questions]
        rng.shuffle(heads)
        prompt += ["?", *(f"{head}?" for head in heads), "sum", "<think>"]

        chain_of = {chain[0]: chain for chain in chains}
        solution: list[str] = []

        def trace(head: str) -> int:
            total = 0
            for name in chain_of[head]:
                after = following[name]
                sign = signs[name] if after else "+"
                total = self._apply(total, sign, numbers[name])
                written = [after, sign + str(numbers[name])] if after else [str(numbers[name])]
                solution.extend([f"{name}:", *written, str(total), "."])
                self._think_aloud(solution, aloud)
            solution.extend([f"{head}=", str(total)])
            return total

        links = dict(zip(heads, [*(f"{head}?" for head in heads[1:]), "sum"]))
        recorded: dict[str, int] = {}
        solution += ["?", f"{heads[0]}?"]
        for head in heads:
            recorded[head] = trace(head)
            solution.append(".")
            if rng.random() < recheck:
                recorded[head] = self._recheck(solution, recorded[head], lambda: trace(head))
            self._think_aloud(solution, aloud)
            solution += [f"{head}?", links[head]]
        total = 0
        solution += ["?", f"{heads[0]}?"]
        for head in heads:
            total = self._apply(total, "+", recorded[head])
            solution += [f"{head}=", str(recorded[head]), str(total), ".", f"{head}?", links[head]]
        solution += ["</think>", "ANS", str(total), "<eos>"]

        truth = sum(
            numbers[name] * (-1 if following[name] and signs[name] == "-" else 1) for chain in questions for name in chain
        )
        return Draft(prompt, solution, str(truth % 10))

    def _draw_chains(self, shape: ChainShape) -> list[list[str]]:
        names = list(self.family.letters)
        self.rng.shuffle(names)
        chains: list[list[str]] = []
        for _ in range(shape.questions + shape.distractors):
            length = self.rng.randint(*shape.lengths)
            if len(names) < length:
                break
            chains.append([names.pop() for _ in range(length)])
        return chains

    def _recheck(self, solution: list[str], value: int, trace, most: int = 4) -> int:
        """Trace again until two passes in a row agree, `most` times at most."""
        for _ in range(most):
            solution += ["wait", "check"]
            again = trace()
            if again == value:
                solution += ["ok", "."]
                break
            solution += ["hmm", "."]
            value = again
        return value

    # -- walk and instr ------------------------------------------------------------------------------------------------------------
    def walk(self, shape: WalkShape, small_talk: float | None = None, aloud: float = 0.2) -> Draft:
        """A machine to run for a number of steps, with standing instructions on what to say when.

        Each visit of a node adds its addend to an accumulator (modulo 10), and the result picks the next node: the right one (``a> c``)
        if it is even, in a compact family if it is at least 5, else the left one (``a< d``).
        """
        rng = self.rng
        if small_talk is None:
            small_talk = 0.15 if self.family.compact else 0.25
        nodes, start, accumulator = self._draw_machine(shape)
        instructions = {directive: rng.choice(SIGNAL_WORDS) for directive in shape.directives}
        facts = [fact for name, node in nodes.items() for fact in self._facts(name, node)]
        facts += [["DO", directive, word, "."] for directive, word in instructions.items()]
        rng.shuffle(facts)
        prompt = ["<bos>", "RULE"]
        for fact in facts:
            prompt += fact
            if rng.random() < small_talk:
                prompt += [*rng.choice(SMALL_TALK), "."]
        prompt += ["start", start, str(accumulator), "go", f"#{shape.steps}", "<think>"]

        answer = self._run(nodes, start, accumulator, shape.steps)[-1][1]
        solution: list[str] = []
        name = start
        for step in range(shape.steps, 0, -1):
            node = nodes[name]
            accumulator = self._apply(accumulator, "+", node.addend)
            right = self._goes_right(accumulator)
            after = node.right if right else node.left
            if self.family.compact:
                solution += [f"#{step}", f"{name}*", str(node.addend), str(accumulator), after]
            else:
                solution += [f"#{step}", f"{name}+", str(node.addend), str(accumulator), name + (">" if right else "<"), after]
            for directive in ("ODD", "EVEN", "FIVE", "EACH"):
                if directive in instructions and is_triggered(directive, step, accumulator):
                    solution += [directive, instructions[directive]]
            solution.append(".")
            self._think_aloud(solution, aloud)
            name = after
        solution.append("</think>")
        if "FINAL" in instructions:
            solution += ["FINAL", instructions["FINAL"]]
        solution += ["ANS", str(accumulator), "<eos>"]
        return Draft(prompt, solution, str(answer), instructions)

    def _facts(self, name: str, node: Node) -> list[list[str]]:
        """The sentences of the prompt about one node; in a compact family they are scattered, else they stay together."""
        addends = [[f"{name}+", str(piece)] for piece in node.pieces]
        edges = [[f"{name}>", node.right], [f"{name}<", node.left]]
        if self.family.compact:
            return [[*fact, "."] for fact in addends + edges]
        return [[*(word for fact in addends + edges for word in fact), "."]]

    def _draw_pieces(self) -> tuple[int, ...]:
        if self.family.compact:
            return tuple(self.rng.randint(0, 3) for _ in range(PIECES))
        return (self.rng.randint(0, 9),)

    def _draw_machine(self, shape: WalkShape, tries: int = 20) -> tuple[dict[str, Node], str, int]:
        """Return nodes, first node and first accumulator of a machine.

        A machine has ``10 * nodes`` states, so a random one soon runs in a circle that a short memory suffices for. Of several machines this
        keeps the one whose walk takes the most different edges.
        """
        rng = self.rng
        names = rng.sample(self.family.letters, shape.nodes + shape.distractors)
        active = names[: shape.nodes]
        accumulator = rng.randint(0, 9)
        best: dict[str, Node] = {}
        most = 0
        for _ in range(tries):
            nodes = {}
            for name in names:
                reachable = [other for other in (active if name in active else names) if other != name] or [name]
                right = rng.choice(reachable)
                left = rng.choice([other for other in reachable if other != right] or reachable)
                nodes[name] = Node(self._draw_pieces(), right, left)
            states = self._run(nodes, active[0], accumulator, shape.steps)
            edges = len({(name, self._goes_right(result)) for name, result in states})
            if edges > most:
                best, most = nodes, edges
        return best, active[0], accumulator

    def _goes_right(self, accumulator: int) -> bool:
        return accumulator >= 5 if self.family.compact else accumulator % 2 == 0

    def _run(self, nodes: dict[str, Node], name: str, accumulator: int, steps: int) -> list[tuple[str, int]]:
        """Return the states of a walk: each node visited, with the accumulator after the visit."""
        states = []
        for _ in range(steps):
            accumulator = (accumulator + nodes[name].addend) % 10
            states.append((name, accumulator))
            name = nodes[name].right if self._goes_right(accumulator) else nodes[name].left
        return states

    # -- warm-up -------------------------------------------------------------------------------------------------------------------
    def lookups(self, keys: int, queries: int, nodes: int = 0) -> Draft:
        """Dense look-ups, the warm-up that makes retrieval form first; only the values looked up are supervised.

        `nodes` (compact families) adds machines' facts and queries in the very layout of a step: ``a* 5 2 c``.
        """
        rng = self.rng
        marks = ":=?" if self.family.compact else ":+><=?"
        pool = [letter + mark for letter in self.family.letters for mark in marks] + list(DIRECTIVES)
        values: dict[str, str] = {}
        for key in rng.sample(pool, keys):
            if key in DIRECTIVES:
                values[key] = rng.choice(SIGNAL_WORDS)
            elif key[1] in "+=":
                values[key] = rng.choice(DIGITS)
            else:
                values[key] = rng.choice(self.family.letters) + ("?" if key[1] == "?" else "")
        facts = [[key, value] for key, value in values.items()]
        names = rng.sample(self.family.letters, nodes)
        machine = {
            name: Node(self._draw_pieces(), rng.choice(self.family.letters), rng.choice(self.family.letters)) for name in names
        }
        facts += [fact[:-1] for name, node in machine.items() for fact in self._facts(name, node)]
        rng.shuffle(facts)
        prompt = ["<bos>"]
        for fact in facts:
            prompt += [*fact, "."] if rng.random() < 0.5 else fact
        prompt.append("<think>")

        solution: list[str] = []
        supervised: list[bool] = []
        for _ in range(queries):
            if names and rng.random() < 0.5:
                name, result = rng.choice(names), rng.randint(0, 9)
                node = machine[name]
                solution += [f"{name}*", str(node.addend), str(result), node.right if self._goes_right(result) else node.left]
                supervised += [False, True, False, True]
            elif values:
                key = rng.choice(list(values))
                solution += [key, values[key]]
                supervised += [False, True]
            if rng.random() < 0.3:
                solution.append(".")
                supervised.append(False)
        return Draft(prompt, solution, "", supervised=supervised)

    # -- chance --------------------------------------------------------------------------------------------------------------------
    def _apply(self, value: int, sign: str, number: int) -> int:
        result = (value + number) % 10 if sign == "+" else (value - number) % 10
        if self.noise and self.rng.random() < self.noise:
            result = (result + self.rng.randint(1, 9)) % 10
        return result

    def _think_aloud(self, solution: list[str], probability: float) -> None:
        if self.rng.random() < probability:
            solution += self.rng.choice(THINKING_ALOUD)


def is_triggered(directive: str, step: int, accumulator: int) -> bool:
    """Say whether a standing instruction asks for its word at this step (never so for ``FINAL``, due after the last step)."""
    if directive == "ODD":
        return accumulator % 2 == 1
    if directive == "EVEN":
        return accumulator % 2 == 0
    if directive == "FIVE":
        return step % 5 == 0
    return directive == "EACH"

