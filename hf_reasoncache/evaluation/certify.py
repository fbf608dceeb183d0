"""The smallest budget that a task allows, with a bound on what it costs: conformal risk control."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from hf_reasoncache.arguments import require_share
from hf_reasoncache.evaluation.record import Record
from hf_reasoncache.evaluation.specs import Budget
from hf_reasoncache.evaluation.statistics import Paired
from hf_reasoncache.messages import shown

SIGNIFICANT = 0.05
"""Below this p of the paired test a loss that rises with the budget is not taken for chance."""


@dataclass(frozen=True)
class Certificate:
    """What the questions of a task say about the budgets of one cache.

    Attributes
    ----------
    alpha : float
        Most that the mean excess loss may be.
    questions : int
        How many different questions this rests on.
    budget : int, float or None
        The smallest certified one; None where none is: use the full cache.
    bound : float
        Bound on the mean excess loss at that budget, or, where none is certified, the smallest
        bound of any budget.
    mean_loss : float
        Mean excess loss that was measured at the budget of `bound`.
    bounds : dict
        The bound at every budget, smaller ones first.
    refusal : str or None
        Why no budget is certified.
    """

    alpha: float
    questions: int
    budget: Budget | None
    bound: float
    mean_loss: float
    bounds: dict[Budget, float]
    refusal: str | None = None


def certify(losses: Mapping[Budget, Sequence[float]], alpha: float) -> Certificate:
    """Return the smallest budget whose mean excess loss is at most `alpha`, as far as is certain.

    Conformal risk control (Angelopoulos et al., arXiv 2208.02814): one more question, of which
    nothing is known, counts as a loss of 1, so the bound is `(n * mean + 1) / (n + 1)`. Over draws
    of n questions and one later question of the same kind, the expected excess loss of that later
    question at the certified budget is at most `alpha`. The theorem wants every question to lose
    less at larger budgets; answers are not so tidy, so a question counts at each budget with its
    largest loss at that or any larger budget. kvcalib 0.4.0 certifies the compression of prompts in
    this way, by the absolute loss.

    Parameters
    ----------
    losses : Mapping of budgets to sequences of float
        Excess loss of every question, in [0, 1], the questions in the same order at each budget.
        Budgets are all tokens, or all ratios.
    alpha : float
        In (0, 1).

    Returns
    -------
    Certificate
        With no budget where there are fewer than `1 / alpha - 1` questions, where losses rise with
        the budget beyond chance (a sign test on the questions of two neighbouring budgets), or
        where no bound is small enough.

    Raises
    ------
    ValueError
        If `alpha` or a loss is out of range, there is no loss, or budgets differ in their number of
        questions.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"certify: expected alpha in (0, 1), got {alpha!r}.")
    ordered = {budget: list(losses[budget]) for budget in sorted(losses)}
    counts = {len(values) for values in ordered.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "certify: expected the losses of the same questions, at least one, at every budget, "
            f"got {shown({budget: len(values) for budget, values in ordered.items()})}."
        )
    for budget, values in ordered.items():
        for value in values:
            require_share(f"certify: loss at {budget}", value)
    count = counts.pop()
    bounds = {
        budget: (count * mean(values) + 1) / (count + 1)
        for budget, values in _falling(ordered).items()
    }
    # Bounds do not rise with the budget.
    allowed = [budget for budget, bound in bounds.items() if bound <= alpha]
    refusal = _too_few(count, alpha) or _rises(ordered)
    if refusal is None and not allowed:
        refusal = f"no budget has a bound of {alpha:g} or less"
    best = max(bounds) if refusal else min(allowed)
    return Certificate(
        alpha=alpha,
        questions=count,
        budget=None if refusal else best,
        bound=bounds[best],
        mean_loss=mean(ordered[best]),
        bounds=bounds,
        refusal=refusal,
    )


def certificates(
    records: Iterable[Record], alpha: float
) -> dict[tuple[str, str], list[Certificate]]:
    """Certify budgets of every cache on every task, from the answers of `evaluate`.

    The excess loss of a question is 1 where the full cache answers right and the cache does not.
    Answers to the same question under several seeds count as one question, with their mean.

    Parameters
    ----------
    records : iterable of Record
        Those without right and wrong are left out.
    alpha : float

    Returns
    -------
    dict
        By task and cache, a certificate for its budgets in tokens and one for its ratios, whichever
        it has.

    Raises
    ------
    ValueError
        As `certify`; and if a question has no answer by the full cache.
    """
    judged = [each for each in records if each.correct is not None]
    full = {(r.task, r.seed, r.question): r for r in judged if r.budget is None}
    # By task, cache and kind of budget; then by budget and question.
    found: dict[tuple[str, str, bool], dict[Budget, dict[str, list[float]]]] = {}
    for each in judged:
        if each.budget is None:
            continue
        other = full.get((each.task, each.seed, each.question))
        if other is None:
            raise ValueError(
                f"certify: expected an answer of the full cache to {shown(each.question)}, got "
                "none; answer it with the full cache too."
            )
        group = found.setdefault((each.task, each.cache, isinstance(each.budget, float)), {})
        # The digest of the full cache's answer is that of the question.
        by_question = group.setdefault(each.budget, defaultdict(list))
        by_question[other.digest].append(float(bool(other.correct) and not each.correct))
    made: dict[tuple[str, str], list[Certificate]] = defaultdict(list)
    for (task, cache, _), group in found.items():
        questions = sorted({name for by_question in group.values() for name in by_question})
        losses = {
            budget: [mean(by_question[name]) for name in questions if name in by_question]
            for budget, by_question in group.items()
        }
        made[task, cache].append(certify(losses, alpha))
    return dict(made)


def _falling(losses: Mapping[Budget, Sequence[float]]) -> dict[Budget, list[float]]:
    """Every question's largest loss at each budget or a larger one, smaller budgets first."""
    largest: list[float] = []
    found = {}
    for budget in sorted(losses, reverse=True):
        values = losses[budget]
        largest = [max(pair) for pair in zip(values, largest or values, strict=True)]
        found[budget] = largest
    return {budget: found[budget] for budget in sorted(found)}


def _too_few(count: int, alpha: float) -> str | None:
    """Say so where even without any loss the bound would be above `alpha`."""
    if 1 / (count + 1) <= alpha:
        return None
    return f"{count} questions; {alpha:g} needs {math.ceil(1 / alpha - 1 - 1e-9)} or more"


def _rises(losses: Mapping[Budget, Sequence[float]]) -> str | None:
    """Say so where more questions lose at a larger budget than chance explains."""
    for small, large in pairwise(losses):
        pairs = list(zip(losses[small], losses[large], strict=True))
        changed = Paired(
            lost=sum(after > before for before, after in pairs),
            gained=sum(after < before for before, after in pairs),
            total=len(pairs),
        )
        if changed.lost > changed.gained and changed.p_value < SIGNIFICANT:
            return f"loss rises from {small} to {large} (p = {changed.p_value:.2g})"
    return None
