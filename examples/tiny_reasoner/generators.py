"""Writers of problems with their chains of thought.

A `Writer` turns a stream of random numbers into drafts: the words of a prompt, the words of a
solution, the true answer. Two things in a solution are left to chance, so that a model trained on
them answers differently when sampled: the filler between steps and, where ``noise`` is above zero,
a wrong digit now and then.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from .families import ChainShape, Family, WalkShape
from .machine import Machine, Node, draw_machine, draw_pieces
from .vocabulary import DIGITS, DIRECTIVES, SIGNAL_WORDS, SMALL_TALK, THINKING_ALOUD

Sign = Literal["+", "-"]


@dataclass(frozen=True)
class Definition:
    """A line ``a: b +3`` of a ``chain``, or its last one, ``c: 5``."""

    name: str
    following: str | None
    sign: Sign
    number: int
    term: str
    """Sign and number as they are written."""

    @property
    def words(self) -> list[str]:
        """The line as it stands in prompt and solution."""
        following = [] if self.following is None else [self.following]
        return [f"{self.name}:", *following, self.term]


@dataclass(frozen=True)
class Draft:
    """A problem in words."""

    prompt: list[str]
    solution: list[str]
    answer: str
    instructions: dict[str, str] = field(default_factory=dict)
    supervised: list[bool] | None = None
    """Words of the solution that can be predicted; None where all can."""


class Writer:
    """Draws problems of one family.

    Parameters
    ----------
    family
        Words, format and sizes.
    rng
        The only source of chance: equal states give equal drafts.
    noise
        Probability that a result of the chain of thought is off. The answer of a draft is always
        the true one.
    """

    def __init__(self, family: Family, rng: random.Random, noise: float = 0.0) -> None:
        self.family = family
        self.rng = rng
        self.noise = noise

    def chain(
        self, shape: ChainShape, small_talk: float = 0.4, aloud: float = 0.25, recheck: float = 0.75
    ) -> Draft:
        """Write definitions like ``a: b +3`` and a question for the sum of several names' values.

        The solution follows each chain from its head with a running accumulator, often checks it by
        a second pass, records ``a= 7``, and at the end sums the recorded values: a look-up into its
        own text.

        Parameters
        ----------
        shape
            The size.
        small_talk
            Probability of an idle sentence after a definition.
        aloud
            Probability of filler after a step.
        recheck
            Probability of a second pass over a chain.
        """
        rng = self.rng
        chains = self._draw_chains(shape)
        questions = chains[: shape.questions]
        prompt = ["<bos>"]
        definitions = sorted((line for chain in chains for line in chain), key=lambda d: d.name)
        for line in rng.sample(definitions, len(definitions)):
            prompt += [*line.words, "."]
            if rng.random() < small_talk:
                prompt += [*rng.choice(SMALL_TALK), "."]
        heads = [chain[0].name for chain in questions]
        rng.shuffle(heads)
        prompt += ["?", *(f"{head}?" for head in heads), "sum", "<think>"]

        chain_of = {chain[0].name: chain for chain in chains}
        links = list(pairwise([*(f"{head}?" for head in heads), "sum"]))
        recorded: dict[str, int] = {}
        solution = ["?", f"{heads[0]}?"]
        for head, link in zip(heads, links, strict=True):
            recorded[head] = self._trace(solution, chain_of[head], aloud)
            solution.append(".")
            if rng.random() < recheck:
                recorded[head] = self._recheck(solution, chain_of[head], recorded[head], aloud)
            self._think_aloud(solution, aloud)
            solution += link
        total = 0
        solution += ["?", f"{heads[0]}?"]
        for head, link in zip(heads, links, strict=True):
            total = self._apply(total, "+", recorded[head])
            solution += [f"{head}=", self._term(recorded[head]), str(total), ".", *link]
        solution += ["</think>", "ANS", str(total), "<eos>"]
        truth = sum(
            -line.number if line.sign == "-" else line.number
            for chain in questions
            for line in chain
        )
        return Draft(prompt, solution, str(truth % 10))

    def _draw_chains(self, shape: ChainShape) -> list[list[Definition]]:
        rng = self.rng
        names = list(self.family.letters)
        rng.shuffle(names)
        chains: list[list[str]] = []
        for _ in range(shape.questions + shape.distractors):
            length = rng.randint(*shape.lengths)
            if len(names) < length:
                break
            chains.append([names.pop() for _ in range(length)])
        signs = {name: rng.choice(("+", "-")) for chain in chains for name in chain}
        numbers = {name: rng.randint(0, 9) for chain in chains for name in chain}

        def define(name: str, after: str | None) -> Definition:
            number = numbers[name]
            if after is None:
                return Definition(name, None, "+", number, self._term(number))
            return Definition(name, after, signs[name], number, signs[name] + str(number))

        return [[define(*pair) for pair in pairwise([*chain, None])] for chain in chains]

    def _trace(self, solution: list[str], chain: list[Definition], aloud: float) -> int:
        """Write one pass over a chain and return its value."""
        total = 0
        for line in chain:
            total = self._apply(total, line.sign, line.number)
            solution += [*line.words, str(total), "."]
            self._think_aloud(solution, aloud)
        solution += [f"{chain[0].name}=", self._term(total)]
        return total

    def _recheck(
        self, solution: list[str], chain: list[Definition], value: int, aloud: float, most: int = 4
    ) -> int:
        """Trace again until two passes in a row agree, `most` times at most."""
        for _ in range(most):
            solution += ["wait", "check"]
            again = self._trace(solution, chain, aloud)
            if again == value:
                solution += ["ok", "."]
                break
            solution += ["hmm", "."]
            value = again
        return value

    def walk(self, shape: WalkShape, small_talk: float | None = None, aloud: float = 0.2) -> Draft:
        """Write a machine to run for a number of steps, and the standing instructions of the shape.

        Parameters
        ----------
        shape
            The size, and the instructions.
        small_talk
            Probability of an idle sentence after a fact; by default 0.25, and 0.15 in a compact
            family, whose facts are shorter.
        aloud
            Probability of filler after a step.
        """
        rng = self.rng
        if small_talk is None:
            small_talk = 0.15 if self.family.compact else 0.25
        machine, name, accumulator = draw_machine(self.family, rng, shape)
        instructions = {directive: rng.choice(SIGNAL_WORDS) for directive in shape.directives}
        facts = machine.facts()
        facts += [["DO", directive, word] for directive, word in instructions.items()]
        rng.shuffle(facts)
        prompt = ["<bos>", "RULE"]
        for fact in facts:
            prompt += [*fact, "."]
            if rng.random() < small_talk:
                prompt += [*rng.choice(SMALL_TALK), "."]
        prompt += ["start", name, str(accumulator), "go", f"#{shape.steps}", "<think>"]

        answer = machine.run(name, accumulator, shape.steps)[-1][1]
        solution: list[str] = []
        for step in range(shape.steps, 0, -1):
            addend = machine.nodes[name].addend
            accumulator = self._apply(accumulator, "+", addend)
            after = machine.after(name, accumulator)
            if self.family.compact:
                key, edge = f"{name}*", []
            else:
                key, edge = f"{name}+", [name + (">" if machine.goes_right(accumulator) else "<")]
            solution += [f"#{step}", key, self._term(addend), str(accumulator), *edge, after]
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

    def lookups(self, keys: int, queries: int, nodes: int = 0) -> Draft:
        """Write dense look-ups, the warm-up that makes retrieval form first.

        Only the values looked up are supervised.

        Parameters
        ----------
        keys
            Facts of a key and a value.
        queries
            Look-ups.
        nodes
            Nodes of a compact machine, queried in the layout of a step: ``a* +5 2 c``.
        """
        rng = self.rng
        values = self._draw_values(keys)
        machine = Machine(
            {
                name: Node(draw_pieces(self.family, rng), *rng.choices(self.family.letters, k=2))
                for name in rng.sample(self.family.letters, nodes)
            },
            self.family.compact,
        )
        facts = [[key, value] for key, value in values.items()] + machine.facts()
        rng.shuffle(facts)
        prompt = ["<bos>"]
        for fact in facts:
            prompt += [*fact, "."] if rng.random() < 0.5 else fact
        prompt.append("<think>")

        solution: list[str] = []
        supervised: list[bool] = []
        for _ in range(queries):
            if nodes and rng.random() < 0.5:
                name, result = rng.choice(list(machine.nodes)), rng.randint(0, 9)
                addend = self._term(machine.nodes[name].addend)
                solution += [f"{name}*", addend, str(result), machine.after(name, result)]
                supervised += [False, True, False, True]
            elif values:
                key = rng.choice(list(values))
                solution += [key, values[key]]
                supervised += [False, True]
            if rng.random() < 0.3:
                solution.append(".")
                supervised.append(False)
        return Draft(prompt, solution, "", supervised=supervised)

    def sums(self, length: int) -> Draft:
        """Write a running sum, the warm-up for arithmetic; only the results are supervised.

        The words around a result are those of a step of a ``chain`` or a ``walk``, drawn at random.
        """
        rng = self.rng
        letters = self.family.letters
        total = rng.randint(0, 9)
        solution = [str(total), "."]
        supervised = [False, False]
        for _ in range(length):
            number = rng.randint(0, 9)
            layout = rng.choice(("bare", "chain", "walk"))
            if layout == "chain":
                sign = rng.choice(("+", "-"))
                before, term, after = [rng.choice(letters) + ":"], sign + str(number), ["."]
                before.append(rng.choice(letters))
            else:
                sign, term = "+", self._term(number)
                before, after = [], []
                if layout == "walk":
                    mark = "*" if self.family.compact else "+"
                    before = [f"#{rng.randint(1, 64)}", rng.choice(letters) + mark]
                    after = [rng.choice(letters), "."]
            total = self._apply(total, sign, number)
            step = [*before, term, str(total), *after]
            self._think_aloud(step, 0.2)
            solution += step
            supervised += [place == len(before) + 1 for place in range(len(step))]
        return Draft(["<bos>", "<think>"], solution, "", supervised=supervised)

    def _draw_values(self, keys: int) -> dict[str, str]:
        rng = self.rng
        marks = ":=?" if self.family.compact else ":+><=?"
        pool = [letter + mark for letter in self.family.letters for mark in marks]
        values = {}
        for key in rng.sample([*pool, *DIRECTIVES], keys):
            if key in DIRECTIVES:
                values[key] = rng.choice(SIGNAL_WORDS)
            elif key[1] in "+=":
                values[key] = rng.choice(DIGITS)
            else:
                values[key] = rng.choice(self.family.letters) + ("?" if key[1] == "?" else "")
        return values

    def _term(self, number: int) -> str:
        """Write a number that is added: in a compact family always with its sign.

        Then every sum takes a digit and a signed digit, and is learned once for all tasks.
        """
        return f"+{number}" if self.family.compact else str(number)

    def _apply(self, value: int, sign: str, number: int) -> int:
        result = (value + number) % 10 if sign == "+" else (value - number) % 10
        if self.noise and self.rng.random() < self.noise:
            result = (result + self.rng.randint(1, 9)) % 10
        return result

    def _think_aloud(self, solution: list[str], probability: float) -> None:
        if self.rng.random() < probability:
            solution += self.rng.choice(THINKING_ALOUD)


def is_triggered(directive: str, step: int, accumulator: int) -> bool:
    """Say whether a standing instruction asks for its word at this step.

    Never so for ``FINAL``, which is due after the last one.
    """
    if directive == "ODD":
        return accumulator % 2 == 1
    if directive == "EVEN":
        return accumulator % 2 == 0
    if directive == "FIVE":
        return step % 5 == 0
    return directive == "EACH"
