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
from .machine import draw_machine
from .vocabulary import SIGNAL_WORDS, SMALL_TALK, THINKING_ALOUD

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
            self.think_aloud(solution, aloud)
            solution += link
        total = 0
        solution += ["?", f"{heads[0]}?"]
        for head, link in zip(heads, links, strict=True):
            total = self.apply(total, "+", recorded[head])
            solution += [f"{head}=", self.term(recorded[head]), str(total), ".", *link]
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
                return Definition(name, None, "+", number, self.term(number))
            return Definition(name, after, signs[name], number, signs[name] + str(number))

        return [[define(*pair) for pair in pairwise([*chain, None])] for chain in chains]

    def _trace(self, solution: list[str], chain: list[Definition], aloud: float) -> int:
        """Write one pass over a chain and return its value."""
        total = 0
        for line in chain:
            total = self.apply(total, line.sign, line.number)
            solution += [*line.words, str(total), "."]
            self.think_aloud(solution, aloud)
        solution += [f"{chain[0].name}=", self.term(total)]
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
            accumulator = self.apply(accumulator, "+", addend)
            after = machine.after(name, accumulator)
            if self.family.compact:
                key, edge = f"{name}*", []
            else:
                key, edge = f"{name}+", [name + (">" if machine.goes_right(accumulator) else "<")]
            solution += [f"#{step}", key, self.term(addend), str(accumulator), *edge, after]
            for directive in ("ODD", "EVEN", "FIVE", "EACH"):
                if directive in instructions and is_triggered(directive, step, accumulator):
                    solution += [directive, instructions[directive]]
            solution.append(".")
            self.think_aloud(solution, aloud)
            name = after
        solution.append("</think>")
        if "FINAL" in instructions:
            solution += ["FINAL", instructions["FINAL"]]
        solution += ["ANS", str(accumulator), "<eos>"]
        return Draft(prompt, solution, str(answer), instructions)

    def term(self, number: int) -> str:
        """Write a number that is added: in a compact family always with its sign.

        Then every sum takes a digit and a signed digit, and is learned once for all tasks.
        """
        return f"+{number}" if self.family.compact else str(number)

    def apply(self, value: int, sign: str, number: int) -> int:
        """Return a result modulo 10, off by chance where there is noise."""
        result = (value + number) % 10 if sign == "+" else (value - number) % 10
        if self.noise and self.rng.random() < self.noise:
            result = (result + self.rng.randint(1, 9)) % 10
        return result

    def think_aloud(self, solution: list[str], probability: float) -> None:
        """Add filler to a solution, with this probability."""
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
