"""Whether the votes that are still out can change the majority."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from hf_reasoncache.branching.vote import Branch, Reason


def voters(branches: Iterable[Branch]) -> list[str | None]:
    """Return the answers of the branches that came to an end of their own, None for none."""
    silent = (Reason.WEAK, Reason.CONSENSUS)
    return [branch.answer for branch in branches if branch.reason not in silent]


def probability_kept(answers: Iterable[str | None], remaining: int) -> float:
    """Probability that the leading answer is the sole majority when all branches have voted.

    Ours. Every branch that is left supports the leader with one unknown probability, whose
    posterior is `Beta(1 + n1, 1 + n - n1)` after `n1` of `n` branches did (uniform prior), so the
    number of supporters is beta-binomial. The others are all taken to join the runner-up, which is
    the worst case, and a tie counts as lost; hence the probability is a lower bound under the
    model, and it is 1 if and only if no vote whatsoever can overturn the leader. Adaptive
    consistency (arXiv 2305.11860) asks a related question: whether the leader is the likeliest
    answer of the model, where here it is whether more branches could change this vote.

    Parameters
    ----------
    answers : iterable of str or None
        One per branch that has ended; None, an end without an answer, supports nobody.
    remaining : int
        Branches that are still running.

    Returns
    -------
    float
        0 if nobody has answered.
    """
    answers = list(answers)
    ranking = Counter(answer for answer in answers if answer is not None).most_common(2)
    if not ranking:
        return 0.0
    leader, runner_up = ranking[0][1], ranking[1][1] if len(ranking) > 1 else 0
    if leader > runner_up + remaining:
        return 1.0
    # Fewest supporters x among them for which leader + x > runner_up + (remaining - x).
    needed = (runner_up + remaining - leader) // 2 + 1
    return min(
        1.0,
        math.fsum(
            _beta_binomial(x, remaining, 1 + leader, 1 + len(answers) - leader)
            for x in range(needed, remaining + 1)
        ),
    )


def _beta_binomial(x: int, trials: int, alpha: int, beta: int) -> float:
    """Probability of `x` successes, exact: all arguments are integers."""
    ways = math.comb(trials, x)
    return ways * _beta(x + alpha, trials - x + beta) / _beta(alpha, beta)


def _beta(a: int, b: int) -> float:
    return math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
