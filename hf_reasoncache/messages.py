"""What errors say of values they refuse: cut short, and harmless to a terminal."""

from __future__ import annotations

LONGEST = 300
"""Characters of a message."""

_SHOWN = 80


def shown(value: object, most: int = _SHOWN) -> str:
    """Return the beginning of a value's repr, or of an error's text, in printable characters.

    Parameters
    ----------
    value : object
    most : int
        Characters; three dots follow what is cut.
    """
    try:
        text = str(value) if isinstance(value, BaseException) else repr(value)
    except (ValueError, RecursionError):
        # An integer of thousands of digits, or values nested too deeply.
        text = f"a {type(value).__name__} too large to show"
    plain = _printable(text[: most + 1])
    return plain if len(plain) <= most else f"{plain[:most]}..."


def shortened(message: str, most: int = LONGEST) -> str:
    """Return a message as one line of at most `most` printable characters.

    What was expected stands at its beginning and the remedy at its end, so the middle is cut.
    """
    line = _printable(" ".join(message.split()))
    if len(line) <= most:
        return line
    end = most // 3
    return f"{line[: most - end - 5]} ... {line[-end:]}"


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
