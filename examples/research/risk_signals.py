"""Which signal of a run predicts a wrong answer? On the reasoner, pretrained weights.

    python -m examples.real_model.reasoner.adapter --out build/reasoner-merged
    python -m examples.research.risk_signals

Every problem is answered once, and the damage of every eviction and the probability of every token
are kept. A signal is a number per answer that should be higher where the answer is wrong. The one
that is best on development problems is tried as a threshold on fresh ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize

from examples.real_model.model import SENSITIVITY, load
from examples.real_model.reasoner.problems import DEVELOPMENT_SEEDS, TASKS, TEST_SEEDS
from examples.research.arguments import parse, real_parser
from examples.research.chains import MAX_NEW_TOKENS, MERGED, ONE_BUDGET, Arm, Chain, answer_arms
from examples.research.reasoner_budgets import COMMON, MAIN
from examples.research.reasoner_budgets import shipped as shipped_profile
from examples.research.risk_roc import area, area_with_interval
from examples.research.tables import publish, versions
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation import CacheSpec
from hf_reasoncache.profiles import BudgetProfile
from hf_reasoncache.risk import conformal_bound

LAYER, AT, ERROR, SQUARE, MASS, WORST = range(6)
"""Columns of `evictions`."""

EARLY, SPAN = 100, 64
"""Tokens of the part that `early` looks at, and of the stretch whose sum `peak` takes."""

ALPHAS = (0.3, 0.2, 0.1)
SPLITS = 1000
PENALTY = 1.0
"""Of the squared weights of the logistic regressions, in units of one answer's loss."""


def evictions(chain: Chain) -> np.ndarray:
    """Array[N, 6]: layer, tokens written before, and damage of every eviction of an answer."""
    rows = [(layer, *eviction) for layer, own in enumerate(chain.damage) for eviction in own]
    return np.array(rows, dtype=float).reshape(-1, 6)


@dataclass(frozen=True)
class Weights:
    """What a layer's error costs, by layer.

    Attributes
    ----------
    equal, demand, divergence : Array[L]
        One; the demand of the profile that made the budgets, over its mean; what squeezing the
        layer alone cost on the reasoner's own chains in nats per token, over the mean squared error
        of its evictions on development problems, over the mean.
    """

    equal: np.ndarray
    demand: np.ndarray
    divergence: np.ndarray

    @staticmethod
    def of(
        shipped: BudgetProfile, calibrated: BudgetProfile, development: Sequence[Chain]
    ) -> Weights:
        """Make them of two sensitivity profiles, the second with statistics."""
        demand = np.array(shipped.demand)
        cost = calibrated.statistics["divergence"].double().numpy().mean((0, 2))  # [L]
        found = np.concatenate([evictions(chain) for chain in development])
        squares = [found[found[:, LAYER] == layer, SQUARE].mean() for layer in range(len(demand))]
        divergence = cost / np.array(squares)
        return Weights(np.ones_like(demand), demand / demand.mean(), divergence / divergence.mean())


Signal = Callable[[Chain], float]


def signals(weights: Weights) -> dict[str, Signal]:
    """Return every signal that needs no fit."""
    found: dict[str, Signal] = {
        "mean error": partial(mean_of, column=ERROR),
        "mean mass lost": partial(mean_of, column=MASS),
        "worst error": lambda chain: max(evictions(chain)[:, WORST], default=0.0),
        "sum of errors": partial(total, column=ERROR, weights=weights.equal),
        "sum of errors x demand": partial(total, column=ERROR, weights=weights.demand),
        "sum of squares x demand": partial(total, column=SQUARE, weights=weights.demand),
        "sum of squares x divergence": partial(total, column=SQUARE, weights=weights.divergence),
        "mean of squares x demand": partial(mean_of, column=SQUARE, weights=weights.demand),
        "mean of squares x divergence": partial(mean_of, column=SQUARE, weights=weights.divergence),
        "peak of errors": partial(peak, column=ERROR, weights=weights.equal),
        "peak of squares x demand": partial(peak, column=SQUARE, weights=weights.demand),
        "peak of squares x divergence": partial(peak, column=SQUARE, weights=weights.divergence),
        "early: mean error": partial(mean_of, column=ERROR, until=EARLY),
        "early: sum of squares x demand": partial(
            total, column=SQUARE, weights=weights.demand, until=EARLY
        ),
        "early: sum of squares x divergence": partial(
            total, column=SQUARE, weights=weights.divergence, until=EARLY
        ),
        "length": lambda chain: chain.tokens,
        "confidence: mean": lambda chain: -float(np.mean(chain.confidence)),
        "confidence: least": lambda chain: -min(chain.confidence),
        "confidence: least of early": lambda chain: -min(chain.confidence[:EARLY]),
    }
    return found


Until = Callable[[Chain, float], float]
"""A number of an answer up to some token."""


def before_the_error(weights: Weights) -> dict[str, Until]:
    """Return what is asked about the time before the first wrong token.

    None of it is a signal, as nobody knows where the first error is: it says whether damage leads
    to errors. A right chain is looked at up to the same token as the wrong one that it is compared
    with, because damage changes along a chain.
    """
    return {
        "mean error": lambda chain, until: mean_of(chain, ERROR, until=until),
        "sum of errors": lambda chain, until: total(chain, ERROR, weights.equal, until),
        "sum of squares x demand": lambda chain, until: total(chain, SQUARE, weights.demand, until),
        f"mean error of the last {SPAN} tokens": lambda chain, until: mean_of(
            chain, ERROR, until=until, since=until - SPAN
        ),
    }


def matched_area(chains: Sequence[Chain], value: Until) -> str:
    """Area under the ROC curve up to the first error within tasks, with its 95% interval.

    Wrong chains, here those that leave the script, and right ones are resampled.
    """
    rng = np.random.default_rng(0)
    drawn, found = [], []
    for task in dict.fromkeys(chain.task for chain in chains):
        own = [chain for chain in chains if chain.task == task]
        right = [chain for chain in own if chain.right is None]
        wins = np.array(
            [
                [_wins(value(wrong, wrong.right), value(other, wrong.right)) for other in right]
                for wrong in own
                if wrong.right is not None
            ]
        )
        if min(wins.shape) < 2:
            continue
        rows, columns = (rng.integers(size, size=(RESAMPLES, size)) for size in wins.shape)
        drawn.append([wins[np.ix_(*pair)].mean() for pair in zip(rows, columns, strict=True)])
        found.append(wins.mean())
    if not found:
        return ""
    low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975))
    return f"{np.mean(found):.2f} ({low:.2f}-{high:.2f})"


def _wins(wrong: float, right: float) -> float:
    return float(wrong > right) + 0.5 * float(wrong == right)


def _chosen(chain: Chain, until: float, since: float = -math.inf) -> np.ndarray:
    found = evictions(chain)
    return found[(found[:, AT] <= until) & (found[:, AT] > since)]


def mean_of(
    chain: Chain,
    column: int,
    weights: np.ndarray | None = None,
    until: float = math.inf,
    since: float = -math.inf,
) -> float:
    """Mean over the evictions between two tokens, each times its layer's weight."""
    found = _chosen(chain, until, since)
    values = found[:, column]
    if weights is not None:
        values = values * weights[found[:, LAYER].astype(int)]
    return float(values.mean()) if len(values) else 0.0


def total(chain: Chain, column: int, weights: np.ndarray, until: float = math.inf) -> float:
    """Sum over the evictions up to some token, each times its layer's weight."""
    found = _chosen(chain, until)
    return float((found[:, column] * weights[found[:, LAYER].astype(int)]).sum())


def peak(chain: Chain, column: int, weights: np.ndarray) -> float:
    """Largest sum over the evictions of `SPAN` tokens that follow each other."""
    found = evictions(chain)
    found = found[np.argsort(found[:, AT])]
    values = found[:, column] * weights[found[:, LAYER].astype(int)]
    sums = np.concatenate([[0.0], values.cumsum()])
    first = np.searchsorted(found[:, AT], found[:, AT] - SPAN, side="right")
    last = np.searchsorted(found[:, AT], found[:, AT], side="right")
    return float((sums[last] - sums[first]).max(initial=0.0))


def by_layer(chain: Chain) -> np.ndarray:
    """Array[L]: logarithm of each layer's mean error."""
    found = evictions(chain)
    layers = len(chain.damage)
    means = [
        found[found[:, LAYER] == layer, ERROR].mean() if (found[:, LAYER] == layer).any() else 0.0
        for layer in range(layers)
    ]
    return np.log(np.array(means) + 1e-4)


def with_confidence(chain: Chain) -> np.ndarray:
    """Array[L + 2]: `by_layer`, and the mean and the least confidence."""
    sure = np.array(chain.confidence)
    return np.concatenate(
        [by_layer(chain), [math.log(1e-4 - sure.mean()), math.log(1e-4 - sure.min())]]
    )


@dataclass(frozen=True)
class Logistic:
    """A logistic regression over features that are centred and scaled within each task.

    Attributes
    ----------
    features : Callable
        From a chain to an array.
    centre, scale : mapping of str to Array[F]
        Of each task, on the problems it was fitted on.
    weights : Array[F]
    """

    features: Callable[[Chain], np.ndarray]
    centre: Mapping[str, np.ndarray]
    scale: Mapping[str, np.ndarray]
    weights: np.ndarray

    @staticmethod
    def fit(chains: Sequence[Chain], features: Callable[[Chain], np.ndarray]) -> Logistic:
        """Fit on the answers to some problems, with `PENALTY` on the weights."""
        by_task = {
            task: np.array([features(chain) for chain in chains if chain.task == task])
            for task in dict.fromkeys(chain.task for chain in chains)
        }
        centre = {task: found.mean(0) for task, found in by_task.items()}
        scale = {task: found.std(0) + 1e-9 for task, found in by_task.items()}
        inputs = np.array(
            [(features(chain) - centre[chain.task]) / scale[chain.task] for chain in chains]
        )
        sign = np.array([1.0 if chain.correct else -1.0 for chain in chains])
        tasks = sorted(by_task)
        own = np.array([[chain.task == task for task in tasks] for chain in chains], dtype=float)

        def loss(both: np.ndarray) -> tuple[float, np.ndarray]:
            weights, offsets = both[: inputs.shape[1]], both[inputs.shape[1] :]
            margin = sign * (inputs @ weights + own @ offsets)
            pull = sign / (1 + np.exp(-margin))
            slope = np.concatenate([inputs.T @ pull + PENALTY * weights, own.T @ pull])
            return float(np.logaddexp(0, margin).sum() + PENALTY / 2 * weights @ weights), slope

        found = minimize(loss, np.zeros(inputs.shape[1] + len(tasks)), jac=True)
        return Logistic(features, centre, scale, found.x[: inputs.shape[1]])

    def __call__(self, chain: Chain) -> float:
        """Return the log-odds of a wrong answer, up to a constant of the task."""
        own = (self.features(chain) - self.centre[chain.task]) / self.scale[chain.task]
        return float(own @ self.weights)


FITTED: Mapping[str, Callable[[Chain], np.ndarray]] = {
    "fitted: errors by layer": by_layer,
    "fitted: errors by layer, confidence": with_confidence,
}
"""Logistic regressions and their features."""


@dataclass(frozen=True)
class Scored:
    """What a signal says of some answers.

    Attributes
    ----------
    tasks : Array[N]
        Names.
    wrong : BoolArray[N]
    values : Array[N]
    """

    tasks: np.ndarray
    wrong: np.ndarray
    values: np.ndarray

    @staticmethod
    def of(chains: Sequence[Chain], signal: Signal) -> Scored:
        """Ask a signal about answers."""
        return Scored(
            np.array([chain.task for chain in chains]),
            np.array([not chain.correct for chain in chains]),
            np.array([signal(chain) for chain in chains], dtype=float),
        )

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return list(dict.fromkeys(self.tasks.tolist()))

    def within(self, task: str) -> tuple[np.ndarray, np.ndarray]:
        """Values and marks of a task."""
        own = self.tasks == task
        return self.values[own], self.wrong[own]

    @property
    def mean_area(self) -> float:
        """Area under the ROC curve within a task, on average over those with both kinds."""
        areas = []
        for task in self.names:
            values, wrong = self.within(task)
            if 0 < wrong.sum() < len(wrong):
                areas.append(float(area(values[wrong], values[~wrong])))
        return float(np.mean(areas)) if areas else math.nan

    @property
    def mean_area_with_interval(self) -> str:
        """The same with its bootstrapped 95% interval, right and wrong of each task resampled."""
        rng = np.random.default_rng(0)
        drawn = []
        for task in self.names:
            values, is_wrong = self.within(task)
            wrong, right = values[is_wrong], values[~is_wrong]
            if min(len(wrong), len(right)) < 2:
                continue
            some = [rng.choice(each, (RESAMPLES, len(each))) for each in (wrong, right)]
            drawn.append(area(*some))
        if not drawn:
            return ""
        low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975))
        return f"{self.mean_area:.2f} ({low:.2f}-{high:.2f})"


RESAMPLES = 2000


def area_line(
    name: str, development: Scored, fresh: Scored, tasks: Sequence[str]
) -> dict[str, str]:
    """Row of the table of areas, with columns of some tasks alone."""
    return {
        "signal": name,
        "development": f"{development.mean_area:.2f}",
        "fresh": fresh.mean_area_with_interval,
        **{task: area_with_interval(*fresh.within(task)) for task in tasks},
    }


@dataclass(frozen=True)
class Promise:
    """What a threshold did on average over random halves, each of which chose it for the other.

    Attributes
    ----------
    missed : float
        Share of the wrong answers that were accepted; promised to be at most alpha.
    accepted : float
        Share of all answers that were accepted.
    wrong : float
        Share of wrong ones among the accepted; NaN if none ever was.
    """

    missed: float
    accepted: float
    wrong: float

    @staticmethod
    def of(values: np.ndarray, wrong: np.ndarray, alpha: float) -> Promise:
        """Accept what lies below the conformal bound of the wrong answers of a random half."""
        rng = np.random.default_rng(0)
        missed, accepted, wrong_accepted = [], 0, 0
        for _ in range(SPLITS):
            first = rng.permutation(len(values)) < len(values) // 2
            if not wrong[first].any() or not wrong[~first].any():
                continue
            # That a wrong answer lies below it has a probability of alpha at most.
            bound = -conformal_bound([[-value] for value in values[first & wrong]], alpha)
            taken = ~first & (values < bound)
            missed.append(taken[wrong].sum() / wrong[~first].sum())
            accepted += taken.sum() / (~first).sum()
            wrong_accepted += (taken & wrong).sum() / (~first).sum()
        return Promise(
            float(np.mean(missed)),
            accepted / len(missed),
            wrong_accepted / accepted if accepted else math.nan,
        )


def promise_lines(name: str, fresh: Scored) -> list[dict[str, str]]:
    """Rows of the table of thresholds: a signal at every alpha, on each task."""
    table = []
    for alpha in ALPHAS:
        for task in fresh.names:
            values, wrong = fresh.within(task)
            if min(wrong.sum(), (~wrong).sum()) < 10:
                continue
            found = Promise.of(values, wrong, alpha)
            table.append(
                {
                    "signal": name,
                    "promised": f"{100 * alpha:.0f}",
                    "task": task,
                    "missed": f"{100 * found.missed:.1f}",
                    "accepted": f"{100 * found.accepted:.1f}",
                    "wrong of accepted": f"{100 * found.wrong:.1f}",
                    "wrong of all": f"{100 * wrong.mean():.1f}",
                }
            )
    return table


def cross_validated(chains: Sequence[Chain], features: Callable[[Chain], np.ndarray]) -> Scored:
    """Score every answer by a regression on the other four fifths."""
    values = np.zeros(len(chains))
    for fold in range(FOLDS):
        rest = [chain for place, chain in enumerate(chains) if place % FOLDS != fold]
        made = Logistic.fit(rest, features)
        for place in range(fold, len(chains), FOLDS):
            values[place] = made(chains[place])
    return replace(Scored.of(chains, lambda chain: 0.0), values=values)


FOLDS = 5


def tables(
    development: Sequence[Chain],
    fresh: Sequence[Chain],
    shipped: BudgetProfile,
    calibrated: BudgetProfile,
) -> tuple[list[dict[str, str]], list[dict[str, str]], dict[str, Scored]]:
    """Return areas of all signals, thresholds of the chosen ones, and the chosen ones' scores.

    Parameters
    ----------
    development : sequence of Chain
        On which signals are fitted and chosen.
    fresh : sequence of Chain
        Which the tables are about.
    shipped, calibrated : BudgetProfile
        See `Weights`.
    """
    weights = Weights.of(shipped, calibrated, development)
    made = signals(weights)
    scores = {
        name: (Scored.of(development, signal), Scored.of(fresh, signal))
        for name, signal in made.items()
    }
    for name, features in FITTED.items():
        fitted = Logistic.fit(development, features)
        scores[name] = cross_validated(development, features), Scored.of(fresh, fitted)
    # The best of what damage says, and the best of all.
    damage = [name for name in scores if "confidence" not in name and name != "length"]
    picked = [max(names, key=lambda name: scores[name][0].mean_area) for names in (damage, scores)]
    tasks = list(dict.fromkeys(chain.task for chain in fresh))
    # Of one task, it is the average already.
    columns = tasks if len(tasks) > 1 else []
    areas = [area_line(name, *pair, columns) for name, pair in scores.items()]
    for name, value in before_the_error(weights).items():
        both = [matched_area(some, value) for some in (development, fresh)]
        by_task = {
            task: matched_area([chain for chain in fresh if chain.task == task], value)
            for task in columns
        }
        name = f"until the first error: {name}"
        areas.append({"signal": name, "development": both[0][:4], "fresh": both[1], **by_task})
    chosen = {name: scores[name][1] for name in dict.fromkeys(picked)}
    promises = [line for name, scored in chosen.items() for line in promise_lines(name, scored)]
    return areas, promises, chosen


def draw(chosen: Mapping[str, Scored], path: Path) -> None:
    """Draw the ROC curves of some signals on fresh problems, a panel for each task."""
    tasks = next(iter(chosen.values())).names
    figure = Figure(figsize=(1 + 3.2 * len(tasks), 3.6), layout="constrained")
    grid = figure.subplots(1, len(tasks), sharey=True, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=True):
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        for name, scored in chosen.items():
            values, wrong = scored.within(task)
            marks = np.append(False, wrong[np.argsort(-values, kind="stable")])
            right = np.append(False, ~marks[1:])
            axes.plot(
                np.cumsum(right) / max(right.sum(), 1),
                np.cumsum(marks) / max(marks.sum(), 1),
                label=name,
            )
        axes.set_title(task)
        axes.set_xlabel("share of right answers flagged")
    figure.axes[0].set_ylabel("share of wrong answers flagged")
    figure.axes[0].legend(loc="lower right", frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def main(given: Sequence[str] | None = None) -> None:
    """Answer what is missing, write both tables and the picture."""
    made = real_parser(__doc__, "risk.md", threads=1, model=MERGED)
    made.add_argument("--profile", type=Path, default=ONE_BUDGET, help="the reasoner's own")
    made.add_argument("--journal", type=Path, default=Path("build/reasoner_chains.jsonl"))
    made.add_argument("--budget", type=int, default=224)
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    made.add_argument("--development", type=int, default=100, help="problems of each task")
    made.add_argument("--problems", type=int, default=200, help="fresh problems of each task")
    made.add_argument("--batch-size", type=int, default=60)
    arguments = parse(made, given)
    settings = {**COMMON, "risk": True, "profile": shipped_profile()}
    spec = CacheSpec(MAIN, ReasonAllocCache, settings, scorer="rkv")
    model, tokenizer = load(torch.bfloat16, arguments.model)
    development, fresh = (
        answer_arms(
            model,
            tokenizer,
            [Arm(spec, arguments.budget, count)],
            arguments.tasks,
            seeds[0],
            arguments.journal,
            arguments.batch_size,
        )[0]
        for seeds, count in (
            (DEVELOPMENT_SEEDS, arguments.development),
            (TEST_SEEDS, arguments.problems),
        )
    )
    profiles = [BudgetProfile.from_pretrained(each) for each in (SENSITIVITY, arguments.profile)]
    areas, promises, chosen = tables(development, fresh, *profiles)
    wrong = [sum(not chain.correct for chain in some) for some in (development, fresh)]
    command = (
        f"python -m examples.research.risk_signals --tasks {' '.join(arguments.tasks)} "
        f"--development {arguments.development} --problems {arguments.problems}"
    )
    setting = (
        f"The reasoner in bfloat16 under {MAIN} at a budget of {arguments.budget}, window "
        f"{COMMON['window']}, buffer {COMMON['buffer']}, prompt evictable; greedy, at most "
        f"{MAX_NEW_TOKENS} tokens; {wrong[0]} of {len(development)} answers to development "
        f"problems (seed {DEVELOPMENT_SEEDS[0]}) and {wrong[1]} of {len(fresh)} to fresh ones "
        f"(seed {TEST_SEEDS[0]}) are wrong."
    )
    note = (
        f"{setting} Area under the ROC curve within a task ({', '.join(arguments.tasks)}), "
        f"with bootstrapped 95% intervals ({RESAMPLES} resamples). `fitted`: logistic regressions "
        f"on the development problems, whose own area is cross-validated in {FOLDS} parts. "
        "`until the first error` is no signal, as nobody knows where that is; right chains are "
        "looked at up to the same token. "
        f"`{command}`, {versions()}."
    )
    publish(areas, note, "risk-signals", arguments.output, arguments.document)
    note = (
        "An answer is accepted if its signal lies below the conformal bound of the wrong answers "
        f"of a random half of a task's fresh problems; means over {SPLITS} halves, in percent. "
        "`missed`: wrong answers of the other half that are accepted; `promised`: the most that "
        "it may be. The signals are those that were best on the development problems: of damage, "
        "and of all."
    )
    publish(promises, note, "risk-thresholds", arguments.output, arguments.document)
    draw(chosen, arguments.output / "risk-signals.png")


if __name__ == "__main__":
    main()
