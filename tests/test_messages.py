"""What errors echo: cut short, printable, whatever the value."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hf_reasoncache.messages import LONGEST, shortened, shown


def test_a_value_is_shown_as_python_writes_it() -> None:
    assert shown("é") == "'é'"
    assert shown([1, "a"]) == "[1, 'a']"
    assert shown(ValueError("it's wrong")) == "it's wrong"


def test_a_long_value_is_cut() -> None:
    assert shown("x" * 100_000) == "'" + "x" * 79 + "..."
    assert shown([1] * 100_000, 9) == "[1, 1, 1,..."


def test_what_has_no_repr_is_named() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a list too large to show"
    assert shown(10**5000) == "a int too large to show"
    while deep:
        # Freed level by level: a chain that is freed at once may overflow the stack.
        deep = deep.pop()  # type: ignore[assignment]


@given(st.text(), st.integers(20, 400))
def test_a_message_is_one_printable_line(text: str, most: int) -> None:
    line = shortened(text * 10, most)
    assert len(line) <= most and line.isprintable()
    assert shown(text).isprintable()


def test_beginning_and_remedy_stay() -> None:
    line = shortened("expected a, got " + "x" * 1000 + ";\n  pass b instead.")
    assert len(line) == LONGEST
    assert line.startswith("expected a, got xxx") and line.endswith("xxx; pass b instead.")
    assert shortened("a\n\tb") == "a b"
