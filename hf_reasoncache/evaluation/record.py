"""One answer of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """One answer: its question and cache, its text and cost, and how it was judged.

    Attributes
    ----------
    task, seed, cache, budget, question
        Which answer this is.
    digest : str
        Of the question's text and the cache's settings, which the key only names.
    prompt_tokens : int
    answer : str
        As the model wrote it, special tokens included, without the end token.
    tokens : int
        Tokens of the answer.
    finished : bool
        Whether the answer ended before the longest length.
    correct : bool or None
        None where the question has no right answer.
    followed : dict of str to bool
        Instructions, by name.
    leakage : float or None
        Share of a protected text that the answer gives away.
    held, mean_bytes : float or None
        Tokens held per KV head, and bytes per row, on average over the samples; None if the answer
        ended before the first one.
    keep_rates : list of list of float
        For each layer and span of the question, the share of its tokens held, on average over the
        same samples.
    evicted : int
        Tokens evicted in the whole batch, layers and heads counted.
    seconds : float
        Time of the batch, divided by its rows.
    """

    task: str
    seed: int
    cache: str
    budget: int | float | None
    question: str
    digest: str
    prompt_tokens: int
    answer: str
    tokens: int
    finished: bool
    correct: bool | None
    evicted: int
    seconds: float
    followed: dict[str, bool] = field(default_factory=dict)
    leakage: float | None = None
    held: float | None = None
    mean_bytes: float | None = None
    keep_rates: list[list[float]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, str, int | float | None, str]:
        """What no two answers of a run have in common."""
        return self.task, self.seed, self.cache, self.budget, self.question
