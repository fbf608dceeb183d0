"""ROUGE-L recall: how much of a text another one gives away, in order."""

from __future__ import annotations

from collections.abc import Sequence

from hf_reasoncache.messages import shown


def rouge_l_recall(reference: str, answer: str) -> float:
    """Share of the reference's words that are a common subsequence with the answer.

    The "L" of ROUGE (Lin, 2004). Words are separated by whitespace and compared without
    case and without punctuation at their ends.

    Raises
    ------
    ValueError
        If the reference has no word.
    """
    wanted, found = _words(reference), _words(answer)
    if not wanted:
        raise ValueError(
            f"rouge_l_recall: expected a reference with words, got {shown(reference)}."
        )
    return _common(wanted, found) / len(wanted)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, in `len(first) * len(second)` steps."""
    row = [0] * (len(first) + 1)
    for word in second:
        diagonal = 0
        for place, other in enumerate(first, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def _words(text: str) -> list[str]:
    stripped = (word.strip(".,;:!?\"'()[]{}") for word in text.casefold().split())
    return [word for word in stripped if word]
