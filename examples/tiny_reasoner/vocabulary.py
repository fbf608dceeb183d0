"""The words the tiny reasoners read and write.

A word is a token: the tokenizers split at whitespace and look the word up. The order of a family's
list is the order of the rows of its model's embedding, so a list may grow at its end but never
change before it.
"""

from __future__ import annotations

from collections.abc import Iterable

SPECIAL = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "ANS")
DIGITS = tuple("0123456789")
OPERATIONS = tuple(sign + digit for sign in "+-" for digit in DIGITS)
MARKERS = (".", "?", "sum", "ok", "wait", "check", "start", "until", "RULE", "DO")
# fmt: off
FILLER = (
    "so", "now", "then", "well", "we", "the", "let", "me", "see", "go", "on", "hmm", "it", "is",
    "this", "that", "next", "have", "to", "think", "about", "right", "and", "also", "good", "just",
    "one", "more",
)
SIGNAL_WORDS = (
    "red", "blue", "green", "gold", "pink", "gray", "lime", "cyan", "rose", "sand", "jade", "ruby",
    "opal", "iron", "salt", "mint",
)
# fmt: on
DIRECTIVES = ("EACH", "ODD", "EVEN", "FIVE", "FINAL")
STEP_LABELS = tuple(f"#{step}" for step in range(1, 65))

#: What a solver murmurs between two steps of its chain of thought.
THINKING_ALOUD = tuple(
    tuple(phrase.split())
    for phrase in (
        "so now",
        "well let me see",
        "hmm so then",
        "now the next one",
        "ok then we go on",
        "right so",
        "and then",
        "let me think",
        "good now",
        "so we have this",
        "and also",
        "now let me go on",
    )
)

#: Sentences without content between the facts of a prompt.
SMALL_TALK = tuple(
    tuple(phrase.split())
    for phrase in (
        "that is just the one",
        "we have more to see about it",
        "this is also good",
        "and the next one is right",
        "let me think about that",
        "to the one we have",
        "well it is good",
        "so on",
    )
)


def build_vocabulary(letters: Iterable[str], marks: Iterable[str]) -> tuple[str, ...]:
    """Return every word of a family, in the order of the embedding rows.

    Parameters
    ----------
    letters
        The names of variables and nodes, one character each.
    marks
        What may follow a name; ``a+`` (the addend of ``a``) is one word, so that every look-up has
        a key of one token.

    Returns
    -------
    tuple of str
        Distinct words; the first is ``<pad>``.
    """
    letters = tuple(letters)
    words = (
        *SPECIAL,
        *DIGITS,
        *OPERATIONS,
        *MARKERS,
        *FILLER,
        *DIRECTIVES,
        *SIGNAL_WORDS,
        *STEP_LABELS,
    )
    return tuple(dict.fromkeys((*words, *(letter + mark for mark in marks for letter in letters))))
