"""Tasks x caches x budgets x seeds: what a run is to answer, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hf_reasoncache.arguments import require_int, require_temperature
from hf_reasoncache.evaluation.specs import FULL, Budget, CacheSpec
from hf_reasoncache.evaluation.tasks import Question, Task
from hf_reasoncache.messages import shown


@dataclass(frozen=True)
class Settings:
    """How questions are answered.

    Attributes
    ----------
    max_new_tokens : int
        Longest answer, where a question does not say so.
    temperature : float
        0 is greedy; otherwise the model's generation config has the other settings of sampling.
    batch_size : int
        Questions answered together.
    chat : bool
        Whether prompts of plain text become the message of a user.
    """

    max_new_tokens: int = 4096
    temperature: float = 0.0
    batch_size: int = 8
    chat: bool = False

    def __post_init__(self) -> None:
        """Check; raises ValueError."""
        require_int("max_new_tokens", self.max_new_tokens, low=1)
        require_int("batch_size", self.batch_size, low=1)
        require_temperature(self.temperature)


@dataclass(frozen=True)
class Grid:
    """What is to be answered by which caches.

    The full cache is always among them: everything is compared with it.

    Attributes
    ----------
    tasks : sequence of Task
    specs : sequence of CacheSpec
    budgets : sequence of int or float
        See `CacheSpec.make`.
    seeds : sequence of int
        Of the questions that a task draws, of the sampling, and of random eviction.
    baseline : CacheSpec or None
        One more cache, which is left out at budgets that its protected prompt does not fit.
    limit : int or None
        How many of the questions of each task and seed are asked, the first ones; None for all.
    """

    tasks: Sequence[Task]
    specs: Sequence[CacheSpec]
    budgets: Sequence[Budget]
    seeds: Sequence[int] = (0,)
    baseline: CacheSpec | None = None
    limit: int | None = None
    questions: dict[tuple[str, int], Sequence[Question]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings and draw the questions."""
        for name, values in (
            ("tasks", [task.name for task in self.tasks]),
            ("caches", [spec.name for spec in self.all_specs]),
            ("budgets", self.budgets),
            ("seeds", self.seeds),
        ):
            if not values or len(set(values)) != len(values):
                raise ValueError(
                    f"{name}: expected at least one, and no two alike, got {shown(values)}."
                )
        for seed in self.seeds:
            require_int("seeds", seed, low=0)
        if self.limit is not None:
            require_int("limit", self.limit, low=1)
        drawn = {
            (task.name, n): task.questions(n)[: self.limit]
            for task in self.tasks
            for n in self.seeds
        }
        object.__setattr__(self, "questions", drawn)
        for (task_name, _), questions in self.questions.items():
            ids = [question.id for question in questions]
            if not ids or len(set(ids)) != len(ids):
                raise ValueError(
                    f"task {shown(task_name)}: expected questions, each with an id of its own, got "
                    f"{len(ids)} questions and {len(set(ids))} ids."
                )

    @property
    def all_specs(self) -> list[CacheSpec]:
        """The full cache first, the baseline second, then the others."""
        control = [] if self.baseline is None else [self.baseline]
        return [FULL, *control, *(spec for spec in self.specs if not spec.is_full)]

    def cells(self) -> Iterator[tuple[Task, int, CacheSpec, Budget | None]]:
        """Yield task, seed, spec and budget of everything to run."""
        for seed in self.seeds:
            for task in self.tasks:
                for spec in self.all_specs:
                    for budget in [None] if spec.is_full else self.budgets:
                        yield task, seed, spec, budget
