"""Questions that a model of 135 million parameters answers from its prompt, drawn by seed.

Every prompt is longer than a small budget, and the answer stands in it word by word, so that what
is evicted is missed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hf_reasoncache.evaluation import Judgement, Question


def _words(text: str) -> list[str]:
    return text.split()


WORDS = _words("""
    apple bridge candle desert engine forest garden hammer island jacket kitchen ladder mirror
    needle orange pencil rabbit silver table umbrella violin window yellow zebra anchor basket
    castle dragon eagle feather guitar helmet iron jungle kettle lemon market night ocean paper
    queen river shadow tiger uncle valley winter
""")
NAMES = _words("""
    Alice Brian Clara David Emma Frank Grace Henry Irene James Karen Louis Maria Nathan Olivia
    Peter Quinn Rachel Simon Teresa Victor Wendy
""")
DISHES = _words("""
    pizza burger salad soup sandwich pasta steak fish rice cake coffee tea juice milk bread
    cheese banana omelette
""")
NOTES = (
    "The office opens at nine and closes at five.",
    "Please leave the windows shut when it rains.",
    "The train to the coast was late again this morning.",
    "Somebody painted the old fence behind the school.",
    "A small dog slept in front of the bakery all day.",
    "The library has new chairs on the second floor.",
    "Visitors should ring the bell at the main entrance.",
    "The garden needs water twice a week in summer.",
    "There will be music in the park on Saturday.",
    "The elevator stops only at the first and third floor.",
    "Our neighbours grow tomatoes and beans on the roof.",
    "The meeting about the new road took three hours.",
    "Fresh bread is sold here until noon.",
    "The printer in the hall is out of paper.",
    "Two boats crossed the lake before sunset.",
    "The teacher asked everyone to bring a warm coat.",
    "It snowed in the mountains during the night.",
    "The museum shows old maps of the harbour.",
    "A letter without a stamp was found on the stairs.",
    "The coffee machine is cleaned every Friday.",
)


@dataclass(frozen=True)
class Copy:
    """Write a numbered list of words again."""

    count: int = 100
    words: int = 8
    name: str = "copy"

    def questions(self, seed: int) -> Sequence[Question]:
        """Return the questions of a seed."""
        draw = random.Random(f"{self.name}/{seed}")
        found = []
        for index in range(self.count):
            lines = [f"{n}. {word}" for n, word in enumerate(draw.sample(WORDS, self.words), 1)]
            prompt = "Write this list again:\n\n" + "\n".join(lines)
            found.append(_question(index, prompt, " ".join(lines), 6 * self.words))
        return found

    def check(self, question: Question, answer: str) -> Judgement:
        """Whether the whole list stands in the answer."""
        return Judgement(_expected(question) in " ".join(answer.split()))


@dataclass(frozen=True)
class Recall:
    """Find one of three pass codes among notes about other things."""

    count: int = 100
    notes: int = 4
    codes: int = 3
    name: str = "recall"

    def questions(self, seed: int) -> Sequence[Question]:
        """Return the questions of a seed."""
        draw = random.Random(f"{self.name}/{seed}")
        found = []
        for index in range(self.count):
            names = draw.sample(NAMES, self.codes)
            codes = draw.sample(range(1000, 10000), self.codes)
            sentences = draw.sample(NOTES, self.notes)
            for name, code in zip(names, codes, strict=True):
                place = draw.randrange(len(sentences) + 1)
                sentences.insert(place, f"The pass code of {name} is {code}.")
            asked = draw.randrange(self.codes)
            prompt = " ".join(sentences) + f"\n\nWhat is the pass code of {names[asked]}?"
            found.append(_question(index, prompt, str(codes[asked]), 14))
        return found

    def check(self, question: Question, answer: str) -> Judgement:
        """Whether the code stands in the answer."""
        return Judgement(_expected(question) in answer)


@dataclass(frozen=True)
class Table:
    """Read rows of a table of prices; an answered question before shows what is wanted."""

    count: int = 100
    rows: int = 7
    name: str = "table"

    def questions(self, seed: int) -> Sequence[Question]:
        """Return the questions of a seed."""
        draw = random.Random(f"{self.name}/{seed}")
        found = []
        for index in range(self.count):
            dishes = draw.sample(DISHES, self.rows)
            prices = draw.sample(range(10, 100), self.rows)
            rows = [f"{dish} | {price}" for dish, price in zip(dishes, prices, strict=True)]
            shown, asked = draw.sample(range(self.rows), 2)
            table = "\n".join(f"| {row} |" for row in ("Dish | Price", "---|---", *rows))
            prompt = (
                {"role": "user", "content": f"{table}\n\nHow much does the {dishes[shown]} cost?"},
                {"role": "assistant", "content": rows[shown]},
                {"role": "user", "content": f"How much does the {dishes[asked]} cost?"},
            )
            found.append(_question(index, prompt, str(prices[asked]), 10))
        return found

    def check(self, question: Question, answer: str) -> Judgement:
        """Whether the answer names this price and no other."""
        numbers = {part.strip("$.,") for part in answer.split()} - {"|"}
        return Judgement({each for each in numbers if each.isdigit()} == {_expected(question)})


def tasks(count: int) -> tuple[Copy, Recall, Table]:
    """Return the three tasks with as many questions each."""
    return Copy(count), Recall(count), Table(count)


def _question(
    index: int, prompt: str | tuple[dict[str, str], ...], expected: str, longest: int
) -> Question:
    # What is expected is the id's second part: a checker needs nothing else.
    return Question(f"{index}: {expected}", prompt, max_new_tokens=longest)


def _expected(question: Question) -> str:
    return question.id.partition(": ")[2]
