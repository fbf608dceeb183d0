"""The reasoner's chains of thought under a cache: answers, and what eviction did on the way.

Every answer is a line of a journal (`hf_reasoncache.evaluation.journal`), so that a run that was
stopped goes on, and every signal of risk can be tried later without answering anything again.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm
from transformers import Cache, LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.real_model.reasoner.problems import Problem, check, make_problems
from examples.real_model.reasoner.train import encode
from hf_reasoncache.branching.prefill_once import prefill_once
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.calibration.settings import versions
from hf_reasoncache.evaluation import CacheSpec
from hf_reasoncache.evaluation.journal import Journal
from hf_reasoncache.evaluation.specs import Budget
from hf_reasoncache.processes import Processes
from hf_reasoncache.profiles.fingerprint import fingerprint
from hf_reasoncache.releases import cache_kwarg

MERGED = Path("build/reasoner-merged")
"""Where `examples.real_model.reasoner.adapter` saves the model."""

OWN = Path("examples/real_model/reasoner/sensitivity")
"""The layer profile that was calibrated on its own chains."""

ONE_BUDGET = Path("examples/real_model/reasoner/one-budget")
"""The same, from errors that were measured at 128 tokens alone."""

MAX_NEW_TOKENS = 520
"""An answer must have ended by then; the longest chain of the scripts takes 489."""

SAMPLING = 8
"""Steps between two looks at how many tokens a cache holds."""


@dataclass(frozen=True)
class Chain:
    """An answer to a problem.

    Attributes
    ----------
    task, seed, number : str, int, int
        Of the problem.
    cache, budget, digest : str, int or float or None, str
        Name of the spec, budget, and what tells specs of the same name apart.
    correct, followed : bool
        Whether the answer is exact, and whether its word is on the side that was asked for.
    finished : bool
        Whether it ended within `MAX_NEW_TOKENS`.
    tokens : int
        Written, without the one that ends it.
    right : int or None
        Tokens before the first that differs from the script's chain; None if none does.
    held : float
        Tokens held per KV head on average over steps, layers and heads.
    confidence : list of float
        Log-probability of each token that was chosen, the one that ends it included.
    damage : list of list of list of float
        Of each layer and eviction: tokens written before it, then error, squared error, mass and
        worst error of the heads, all on average (`hf_reasoncache.risk.damage.Damage`).
    """

    task: str
    seed: int
    number: int
    cache: str
    budget: int | float | None
    digest: str
    correct: bool
    followed: bool
    finished: bool
    tokens: int
    right: int | None
    held: float
    confidence: list[float]
    damage: list[list[list[float]]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, int, str, int | float | None]:
        """What no two answers of a journal have in common."""
        return self.task, self.seed, self.number, self.cache, self.budget


@dataclass(frozen=True)
class Arm:
    """A cache with a budget, on the first so many problems of each task.

    Attributes
    ----------
    spec : CacheSpec
    budget : int, float or None
    problems : int
    """

    spec: CacheSpec
    budget: Budget | None
    problems: int


def answer_arms(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    arms: Sequence[Arm],
    tasks: Sequence[str],
    seed: int,
    path: Path,
    batch_size: int = 100,
) -> list[list[Chain]]:
    """Answer the problems of all arms, as far as the journal at `path` has no answers to them.

    Returns
    -------
    list of list of Chain
        Of each arm, its answers by task and number.

    Raises
    ------
    ValueError
        If the journal is of another model or version, or has answers of other settings under the
        same names.
    """
    most = max(arm.problems for arm in arms)
    problems = {task: make_problems(task, most, seed) for task in tasks}

    def make(arm: Arm, task: str, numbers: Sequence[int]) -> list[Chain]:
        batch = {number: problems[task][number] for number in numbers}
        return answer(model, tokenizer, batch, arm, seed)

    about = about_model(model) | {"limit": MAX_NEW_TOKENS}
    return fill(model, path, Chain, about, arms, tasks, seed, batch_size, make)


class Line(Protocol):
    """A line of a journal on one problem under one arm."""

    @property
    def key(self) -> tuple[str, int, int, str, int | float | None]:
        """Task, seed, number, name of the cache, budget."""
        ...

    @property
    def digest(self) -> str:
        """That of the arm's spec."""
        ...


L = TypeVar("L", bound=Line)


def fill(
    model: PreTrainedModel,
    path: Path,
    kind: type[L],
    about: Mapping[str, Any],
    arms: Sequence[Arm],
    tasks: Sequence[str],
    seed: int,
    batch_size: int,
    make: Callable[[Arm, str, Sequence[int]], list[L]],
) -> list[list[L]]:
    """Make the lines that a journal lacks; return those of each arm, by task and number.

    Parameters
    ----------
    model : PreTrainedModel
    path : Path
        Of the journal, whose lines are of a `kind` and `about` the same.
    kind : type
    about : mapping
    arms : sequence of Arm
    tasks : sequence of str
    seed : int
        Of the problems.
    batch_size : int
        Problems at once.
    make : Callable
        Makes the lines of an arm on some problems of a task, by number.

    Raises
    ------
    ValueError
        If the journal is about something else, or has lines of other settings under the same names.
    """
    found = []
    with (
        Journal(path, kind, dict(about), Processes.of(model)) as journal,
        tqdm(total=len(tasks) * sum(arm.problems for arm in arms), unit="chain") as bar,
    ):
        for arm in arms:
            bar.set_description(f"{arm.spec.name} {arm.budget or ''}".strip()[:40])
            lines = []
            for task in tasks:
                keys = [(task, seed, n, arm.spec.name, arm.budget) for n in range(arm.problems)]
                missing = [key[2] for key in keys if key not in journal.records]
                for start in range(0, len(missing), batch_size):
                    numbers = missing[start : start + batch_size]
                    journal.add(make(arm, task, numbers))
                    bar.update(len(numbers))
                bar.update(len(keys) - len(missing))
                lines += [journal.records[key] for key in keys]
            if {line.digest for line in lines} != {digest(arm.spec)}:
                raise ValueError(
                    f"{path}: expected lines on {arm.spec.name} as it is now, got some of other "
                    "settings under this name; choose another file, or another name."
                )
            found.append(lines)
    return found


def about_model(model: PreTrainedModel) -> dict[str, str]:
    """Return what all lines of a journal have in common."""
    return {"fingerprint": fingerprint(model), "dtype": str(model.dtype), **versions()}


def digest(spec: CacheSpec) -> str:
    """16 hexadecimal digits that identify a spec."""
    return hashlib.sha256(repr(spec).encode()).hexdigest()[:16]


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    problems: Mapping[int, Problem],
    arm: Arm,
    seed: int,
) -> list[Chain]:
    """Answer problems of one seed, by number, greedily in one batch with a new cache."""
    examples = [encode(tokenizer, problem) for problem in problems.values()]
    longest = max(each.start for each in examples)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pad = tokenizer.pad_token_id
    prompts = [each.ids[: each.start] for each in examples]
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    model.set_attn_implementation(arm.spec.attention)
    cache = arm.spec.make(model.config, arm.budget, None, seed)
    watch, confidence = Watch(cache, mask, end), Confidence()
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        **cache_kwarg(cache),
        **dict.fromkeys(("temperature", "top_p", "top_k")),
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=pad,
        eos_token_id=end,
        logits_processor=[confidence],
        stopping_criteria=[watch],
        custom_generate=prefill_once,
    )
    sure = torch.stack(confidence.steps, 1).tolist()
    chains = []
    for row, (number, problem) in enumerate(problems.items()):
        wrote = output[row, longest:].tolist()
        tokens = [*takewhile(lambda token: token != end, wrote)]
        text = str(tokenizer.decode(tokens))
        judgement = check(problem, text)
        script = examples[row].ids[examples[row].start :]
        finished = len(tokens) < len(wrote)
        chains.append(
            Chain(
                task=problem.task,
                seed=seed,
                number=number,
                cache=arm.spec.name,
                budget=arm.budget,
                digest=digest(arm.spec),
                correct=bool(judgement.correct),
                followed=judgement.followed["word"],
                finished=finished,
                tokens=len(tokens),
                right=right_until(script, [*tokens, end] if finished else tokens),
                held=round(statistics.mean(watch.held[row]), 2),
                confidence=[rounded(x) for x in sure[row][: len(tokens) + finished]],
                damage=watch.damage[row],
            )
        )
    return chains


def right_until(script: Sequence[int], wrote: Sequence[int]) -> int | None:
    """Return how many tokens are those of the script; None if all of the script's are."""
    pairs = zip(script, wrote, strict=False)
    right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return None if right == len(script) else right


class Confidence(LogitsProcessor):
    """Notes the log-probability of the likeliest token of every row and step.

    Attributes
    ----------
    steps : list of Tensor[B]
    """

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Return the scores as they are."""
        self.steps.append(scores.max(-1).values - scores.logsumexp(-1))
        return scores


class Watch(StoppingCriteria):
    """Stops nothing; notes what a row held, and its damage just before it leaves the batch.

    Parameters
    ----------
    cache : Cache
    mask : LongTensor[B, T]
        Of the prompts.
    end : int
        The token with which a row ends.

    Attributes
    ----------
    held : list of list of float
        Of each row, tokens per KV head at some steps.
    damage : list
        Of each row, see `Chain`.
    """

    def __init__(self, cache: Cache, mask: torch.Tensor, end: int) -> None:
        self.cache, self.end = cache, end
        self.columns, self.mask = mask.shape[1], mask
        self.live = torch.arange(len(mask))
        self.held: list[list[float]] = [[] for _ in mask]
        self.damage: list[list[list[list[float]]]] = [[] for _ in mask]

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> Any:
        """Return that no row has to stop."""
        written = input_ids.shape[1] - self.columns
        ended = input_ids[self.live, -1] == self.end
        if written % SAMPLING == 1:
            seen = torch.nn.functional.pad(self.mask[self.live], (0, written - 1), value=1)
            held = held_by_row(self.cache, seen)
            for row, tokens in zip(self.live.tolist(), held.tolist(), strict=True):
                self.held[row].append(tokens)
        last = written == MAX_NEW_TOKENS
        for place, row in enumerate(self.live.tolist()):
            if last or ended[place]:
                self.damage[row] = list(damage_of(self.cache, place, self.columns))
        self.live = self.live[~ended]
        return torch.zeros(len(input_ids), dtype=torch.bool)


def held_by_row(cache: Cache, mask: torch.Tensor) -> torch.Tensor:
    """Tensor[B]: tokens held per KV head, on average over layers and heads.

    Parameters
    ----------
    cache : Cache
    mask : Tensor[B, T]
        Of the tokens so far, for caches that hold padding as well.
    """
    if isinstance(cache, ReasonCache):
        return torch.stack([layer.held().float() for layer in cache.own_layers]).mean((0, 2))
    return mask.sum(-1).float()


def damage_of(cache: Cache, row: int, columns: int) -> Iterator[list[list[float]]]:
    """Yield the evictions of each layer that were measured in a row; see `Chain.damage`."""
    for layer in getattr(cache, "own_layers", ()):
        own = layer.risk.of_row(row)
        parts = (own.error, own.error.square(), own.mass, own.worst)
        means = torch.stack([part.mean(-1) for part in parts], -1).tolist() if len(own) else []
        yield [
            [column - columns, *map(rounded, values)]
            for column, values in zip(own.columns.tolist(), means, strict=True)
        ]


def rounded(value: float) -> float:
    """Three digits: a line of the journal stays short."""
    return float(f"{value:.3g}")
