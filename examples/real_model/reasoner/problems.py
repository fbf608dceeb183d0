"""Problems in plain English with long chains of thought, and their checker.

Three tasks. In each, the question asks what three people have in the end, and the first sentence of
the prompt names a word to write before or after the answer, which matters only there:

``trades``
    People with one thing each trade with each other.
``ledger``
    People with a few coins pay each other.
``routes``
    People travel from city to city, to the end of a route, and have what is sold there.

A chain of thought quotes the sentence of the prompt that it needs, looks up what is known of those
whom it names, and writes what changes; then it quotes the question and the first sentence. Every
look-up finds a word two tokens after the one that it looks for, as in "Anna has bread": a small
pretrained model knows how to repeat that, and has to learn that the last time counts. Names, goods,
cities and words are one token each for SmolLM2, with a space before them.

Seeds are split for good: a number measured on `TEST_SEEDS` must never have steered a choice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase
from typing import Literal

from hf_reasoncache.evaluation.tasks import Judgement, Question

TASKS = ("trades", "ledger", "routes")

#: Seeds of training runs; `make_problems` never draws from their streams, whatever its seed.
TRAINING_SEEDS = range(1000)
#: Seeds for every choice: formats, sizes, learning rates.
DEVELOPMENT_SEEDS = range(1000, 2000)
#: Seeds for the figures that are reported, and for nothing else.
TEST_SEEDS = range(2000, 3000)


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _listed(
    "Anna Ben Carl Emma Frank Grace Henry Iris Jack Kate Leo Mary Nina Oscar Paul Rosa Sam Tom "
    "Victor Alice Bob David Eric Fred George Helen Ivan James Karen Laura Nancy Peter Rachel Sarah "
    "Tony Lucy Max Simon Martin Julia Maria Linda Lisa Alex Adam Daniel"
)
GOODS = _listed(
    "bread milk rice tea coffee cheese butter honey sugar salt soup pasta wine beer water gold "
    "silver paper wood wool silk cotton coal oil iron corn wheat fruit fish meat beef pork chicken "
    "cake pie jam juice chocolate cream ice soap glass steel copper leather rope sand clay stone "
    "ink paint glue wax rubber grass hay cloth yarn pepper garlic ginger mint tin brick candy bacon"
)
CITIES = _listed(
    "Paris London Rome Berlin Madrid Vienna Tokyo Boston Chicago Dublin Oslo Athens Cairo Delhi "
    "Sydney Toronto Moscow Prague Lisbon Dallas Miami Seattle Denver Houston Detroit Atlanta "
    "Melbourne Manchester Liverpool Oxford Cambridge Bristol Edinburgh Venice Milan Naples "
    "Barcelona Hamburg Munich Geneva Amsterdam Brussels Stockholm Copenhagen Warsaw Istanbul "
    "Jerusalem Damascus Baghdad Tehran Kabul Singapore Manila Shanghai Beijing Seoul Havana Lima "
    "Quebec Montreal"
)
WORDS = _listed(
    "amber violet golden purple green yellow indigo ivory scarlet maple cedar olive velvet thunder "
    "winter summer spring autumn ocean planet comet rocket tiger eagle falcon wolf bear lion "
    "marble crystal diamond pearl coral sunset breeze river mountain desert forest island shadow "
    "mirror window candle ladder hammer"
)
NUMBERS = _listed("zero one two three four five six seven eight nine")
"""Balances and amounts."""

ASKED = 3
"""People whom the question names."""


@dataclass(frozen=True)
class Size:
    """How large a problem is; both ends of a range are drawn.

    Attributes
    ----------
    people : tuple of int
        How many.
    steps : tuple of int
        Trades or payments; in ``routes`` the cities on the way of one person.
    """

    people: tuple[int, int]
    steps: tuple[int, int]

    def towards(self, other: Size, share: float) -> Size:
        """Return the size that lies this share of the way to another one."""
        people, steps = (
            tuple(round(a + share * (b - a)) for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in ((self.people, other.people), (self.steps, other.steps))
        )
        return Size(people, steps)


EASY = Size((3, 3), (1, 2))
FULL = {
    "trades": Size((6, 6), (12, 16)),
    "ledger": Size((6, 6), (9, 12)),
    "routes": Size((6, 6), (4, 6)),
}
MAX_NEW_TOKENS = 800
"""A generous limit on the length of a chain of a `FULL` size."""


@dataclass(frozen=True)
class Problem:
    """A problem to hand to a model.

    Attributes
    ----------
    task : str
        One of `TASKS`.
    prompt : str
        What the user says.
    chain : str
        A reply that the checker accepts.
    answer : tuple of str
        What the people of the question have in the end.
    word : str
        To be written beside the answer.
    side : str
        "before" or "after".
    """

    task: str
    prompt: str
    chain: str
    answer: tuple[str, ...]
    word: str
    side: Literal["before", "after"]

    @property
    def rule(self) -> str:
        """The first sentence of the prompt."""
        return f"Write the word {self.word} {self.side} the answer."


def make_problems(task: str, count: int, seed: int, size: Size | None = None) -> list[Problem]:
    """Return `count` problems, of full size by default; those of a smaller count come first.

    Raises
    ------
    ValueError
        Unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}.")
    rng = random.Random(f"{task}/{seed}")
    return [draw(task, rng, size or FULL[task]) for _ in range(count)]


def draw(task: str, rng: random.Random, size: Size) -> Problem:
    """Return a problem; equal states of `rng` give equal problems."""
    people = rng.sample(NAMES, rng.randint(*size.people))
    if task == "routes":
        told, facts, chain, final = _routes(rng, people, size.steps)
    else:
        tell = _trades if task == "trades" else _ledger
        told, facts, chain, final = tell(rng, people, rng.randint(*size.steps))
    asked = rng.sample(people, ASKED)
    question = (
        f"What do {', '.join(asked[:-1])} and {asked[-1]} have after step "
        f"{ascii_uppercase[len(told) - 1]}?"
    )
    answer = tuple(final[name] for name in asked)
    word = rng.choice(WORDS)
    side: Literal["before", "after"] = rng.choice(("before", "after"))
    items = [word, *answer] if side == "before" else [*answer, word]
    rule = f"Write the word {word} {side} the answer."
    moves = [f"{label}. {each}" for label, each in zip(ascii_uppercase, told, strict=False)]
    prompt = "\n".join([rule, facts, *moves, question])
    lines = [f"{move} {each}" for move, each in zip(moves, chain, strict=True)]
    results = [f"{name} has {final[name]}." for name in asked]
    lines += [" ".join([question, *results]), rule, f"Answer: {', '.join(items)}."]
    return Problem(task, prompt, "\n".join(lines), answer, word, side)


Told = tuple[list[str], str, list[str], dict[str, str]]
"""Moves, the sentences before them, what the chain adds to each move, and who has what at last."""


def _trades(rng: random.Random, people: Sequence[str], steps: int) -> Told:
    has = dict(zip(people, rng.sample(GOODS, len(people)), strict=True))
    facts = f"At the start {_state(has)}"
    told, chain = [], []
    for _ in range(steps):
        one, two = rng.sample(people, 2)
        told.append(f"{one} meets {two}.")
        first, second = has[one], has[two]
        chain.append(
            f"{one} has {first}, {two} has {second}. Now {two} has {first}, {one} has {second}."
        )
        has[one], has[two] = second, first
    return told, facts, chain, has


def _ledger(rng: random.Random, people: Sequence[str], steps: int) -> Told:
    # Nobody begins with nine: somebody can always pay somebody.
    coins = {name: rng.randrange(1, len(NUMBERS) - 1) for name in people}
    has = {name: NUMBERS[count] for name, count in coins.items()}
    facts = f"Coins at the start: {_state(has)}"
    told, chain = [], []
    while len(told) < steps:
        one, two = rng.sample(people, 2)
        most = min(coins[one], len(NUMBERS) - 1 - coins[two])
        if most < 1:
            continue
        paid = rng.randint(1, most)
        coins[one] -= paid
        coins[two] += paid
        first, second, some = has[one], has[two], NUMBERS[paid]
        has[one], has[two] = NUMBERS[coins[one]], NUMBERS[coins[two]]
        told.append(f"{one} pays {two} {some}.")
        chain.append(
            f"{one} has {first}, {two} has {second}. "
            f"{first} minus {some} is {has[one]}, {second} plus {some} is {has[two]}. "
            f"Now {one} has {has[one]}, {two} has {has[two]}."
        )
    return told, facts, chain, has


def _routes(rng: random.Random, people: Sequence[str], steps: tuple[int, int]) -> Told:
    cities = rng.sample(CITIES, len(CITIES))
    told, facts, chain, has = [], [], [], {}
    for name in people:
        route = [cities.pop() for _ in range(rng.randint(*steps))]
        sold = [rng.choice(GOODS) for _ in route]
        sales = [f"{city} sells {goods}." for city, goods in zip(route, sold, strict=True)]
        ways = [
            f"After {a} comes {b}." for a, b in zip(route, [*route[1:], "nothing"], strict=True)
        ]
        facts += sales + ways
        told.append(f"{name} starts in {route[0]}.")
        walk = [each for pair in zip(sales, ways, strict=True) for each in pair]
        has[name] = sold[-1]
        chain.append(" ".join([*walk, f"Now {name} has {has[name]}."]))
    rng.shuffle(facts)
    return told, f"The map: {' '.join(facts)}", chain, has


def _state(has: dict[str, str]) -> str:
    return " ".join(f"{name} has {what}." for name, what in has.items())


def check(problem: Problem, reply: str) -> Judgement:
    """Judge a reply: whether its answer is exact, and its word on the side that was asked for."""
    items = read_answer(reply)
    followed = items.count(problem.word) == 1 and (
        items[0 if problem.side == "before" else -1] == problem.word
    )
    answer = tuple(item for item in items if item != problem.word)
    return Judgement(answer == problem.answer, {"word": followed})


def read_answer(reply: str) -> list[str]:
    """Return the items of the first line that begins with "Answer:"; none without one."""
    found = re.search(r"^Answer:(.*)$", reply, re.MULTILINE)
    return [] if found is None else [item.strip() for item in found[1].rstrip(". ").split(",")]


def first_difference(problem: Problem, reply: str) -> tuple[str, str] | None:
    """Return the first sentence of the chain that a reply has not, and what it has there."""
    wanted, found = (re.split(r"(?<=[.?])\s", text) for text in (problem.chain, reply.strip()))
    found += [""] * (len(wanted) - len(found))
    pairs = zip(wanted, found, strict=False)
    return next(((want, have) for want, have in pairs if want != have), None)


class ReasonerTask:
    """One of `TASKS` for `hf_reasoncache.evaluation`: its questions are messages of a chat.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    count : int
        How many questions.
    """

    def __init__(self, name: str, count: int = 200) -> None:
        self.name = name
        self.count = count

    def questions(self, seed: int) -> list[Question]:
        """Return the questions of a seed, with the rule as what matters of the prompt."""
        return [
            Question(
                f"{self.name}/{seed}/{number}",
                ({"role": "user", "content": problem.prompt},),
                MAX_NEW_TOKENS,
                (problem.rule,),
            )
            for number, problem in enumerate(_made(self.name, self.count, seed))
        ]

    def check(self, question: Question, answer: str) -> Judgement:
        """Judge what the model wrote."""
        _, seed, number = question.id.split("/")
        return check(_made(self.name, self.count, int(seed))[int(number)], answer)


TRADES, LEDGER, ROUTES = (ReasonerTask(name) for name in TASKS)
"""For `hf-reasoncache evaluate --task`."""


@lru_cache(maxsize=8)
def _made(task: str, count: int, seed: int) -> list[Problem]:
    return make_problems(task, count, seed)
