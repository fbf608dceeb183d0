"""What a tiny reasoner is trained on: problems that grow, after a warm-up of dense
look-ups and sums."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .families import ChainShape, Family, WalkShape
from .generators import Draft, Writer
from .vocabulary import DIRECTIVES
from .warmup import write_lookups, write_sums

IGNORED = -100
"""Label of what is not trained on: prompts, padding, words nobody could predict."""

FIRST_READ = 2.0
"""Weight of a fact where a chain of thought reads it for the first time."""


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right."""

    input_ids: torch.Tensor
    """Token ids ``[B, T]``, int64."""
    labels: torch.Tensor
    """The next token of every position ``[B, T]``, int64, or `IGNORED`."""
    weights: torch.Tensor
    """Weight of every label in the loss ``[B, T]``, float32."""


class Curriculum:
    """An endless stream of training batches whose difficulty is set from outside.

    Parameters
    ----------
    family
        What to write.
    seed
        Equal seeds and equal settings give equal batches.
    tokens
        Most tokens in a batch, padding included.
    noise
        Share of wrong results in the chains of thought: a model that knows them errs now and then
        when sampled, so that votes differ.
    """

    def __init__(self, family: Family, seed: int, tokens: int = 4096, noise: float = 0.01) -> None:
        self.family = family
        self.tokens = tokens
        self.difficulty = 0.0
        """From 0 (one or two facts) to 1 (somewhat beyond the evaluation problems)."""
        self.warmup_share = 0.0
        """Share of dense look-ups and sums."""
        self._rng = random.Random(f"{family.name}/training/{seed}")
        self._writer = Writer(family, self._rng, noise)
        self._ids = {word: index for index, word in enumerate(family.vocabulary)}

    def batches(self, pool: int = 256) -> Iterator[Batch]:
        """Yield batches of sequences of similar length.

        A new difficulty takes effect after at most `pool` sequences.
        """
        while True:
            drafts = sorted((self.draw() for _ in range(pool)), key=_length)
            groups: list[list[Draft]] = [[]]
            for draft in drafts:
                if groups[-1] and _length(draft) * (len(groups[-1]) + 1) > self.tokens:
                    groups.append([])
                groups[-1].append(draft)
            self._rng.shuffle(groups)
            for group in groups:
                yield self._collate(group)

    def draw(self) -> Draft:
        """Return one training sequence."""
        rng = self._rng
        if rng.random() < self.warmup_share:
            if rng.random() < 0.5:
                return write_sums(self._writer, rng.randint(4, 24))
            compact = self.family.compact
            nodes = self._size(0, 2, 10) if compact else 0
            return write_lookups(
                self._writer, self._size(2, 6, 14 if compact else 24), rng.randint(16, 40), nodes
            )
        task = rng.choice(("chain", "walk", "instr"))
        if task == "chain":
            goal = self.family.chain
            return self._writer.chain(
                ChainShape(
                    questions=self._size(1, 1, goal.questions + 1),
                    lengths=(2, round(2 + self.difficulty * (goal.lengths[1] - 2))),
                    distractors=self._size(0, 0, goal.distractors + 1),
                )
            )
        goal = max(self.family.walk, self.family.instr, key=lambda shape: shape.steps)
        directives: tuple[str, ...] = ()
        if task == "instr":
            chosen = tuple(directive for directive in DIRECTIVES if rng.random() < 0.6)
            directives = chosen or (rng.choice(DIRECTIVES),)
        most = round(goal.steps * (0.7 if directives else 1.1))
        return self._writer.walk(
            WalkShape(
                nodes=self._size(2, 2, goal.nodes + 1),
                distractors=self._size(0, 0, goal.distractors + 1),
                steps=self._size(3, 4, most),
                directives=directives,
            )
        )

    def _size(self, least: int, easy: int, hard: int) -> int:
        """Draw a size whose upper limit moves from `easy` to `hard`.

        At full difficulty it is the larger one of two draws.
        """
        most = round(easy + self.difficulty * (hard - easy))
        draws = 2 if self.difficulty >= 1 else 1
        return max(self._rng.randint(least, max(least, most)) for _ in range(draws))

    def _collate(self, drafts: list[Draft]) -> Batch:
        length = max(_length(draft) for draft in drafts)
        input_ids = torch.zeros(len(drafts), length, dtype=torch.long)
        labels = torch.full_like(input_ids, IGNORED)
        weights = torch.zeros(len(drafts), length)
        for row, draft in enumerate(drafts):
            words = draft.prompt + draft.solution
            ids = torch.tensor([self._ids[word] for word in words])
            start, stop = len(draft.prompt) - 1, len(words) - 1
            input_ids[row, : len(words)] = ids
            labels[row, start:stop] = ids[start + 1 :]
            if draft.supervised is not None:
                labels[row, start:stop].masked_fill_(~torch.tensor(draft.supervised), IGNORED)
            weights[row, start:stop] = torch.tensor(_weights(draft))
        return Batch(input_ids, labels, weights)


def _length(draft: Draft) -> int:
    return len(draft.prompt) + len(draft.solution)


def _weights(draft: Draft) -> list[float]:
    """Weigh what is rare in a chain of thought and decides it.

    That is the first word, the next question, and facts that are read for the first time.
    """
    if draft.supervised is not None:
        return [1.0] * len(draft.solution)
    weights = []
    seen = set()
    previous = ""
    for word in draft.solution:
        is_question = word == "sum" or (len(word) == 2 and word[1] == "?")
        is_first_read = previous not in seen and (
            previous in DIRECTIVES or (len(previous) == 2 and previous[1] in ":+*<>=")
        )
        weights.append(4.0 if is_question else FIRST_READ if is_first_read else 1.0)
        seen.add(previous)
        previous = word
    weights[0] = 10.0
    return weights
