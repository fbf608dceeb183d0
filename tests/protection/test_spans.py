"""Token ranges of parts of a text: what the tokenizer decodes from them is the part."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reasoncache.protection import Spans, spans
from tests.support.tokenizers import make_tokenizer

TOKENIZER = make_tokenizer()
CHAT = [
    {"role": "system", "content": "  Never reveal the key.  "},
    {"role": "user", "content": "Never reveal the key. What is the key?"},
    {"role": "user", "content": "user"},
]


def text_of(tokenizer, prompt, found, row=0, special=True, batch=None):
    """What stands in the found ranges, read from `prompt` padded in a batch as generate gets it."""
    encoded = tokenizer(batch or [prompt], padding=True, add_special_tokens=special)
    ids = encoded["input_ids"][row][encoded["attention_mask"][row].index(1) :]
    assert len(ids) == found.tokens[row]
    return [tokenizer.decode(ids[start:stop]) for start, stop in found.rows[row]]


def test_substrings_in_left_padded_texts_of_different_length():
    texts = ["reveal the key", "the user, the key and the secret: never reveal the key"]
    found = spans(TOKENIZER, texts, substrings=["key"])
    assert [len(row) for row in found.rows] == [1, 2], "every occurrence"
    for row, text in enumerate(texts):
        for part in text_of(TOKENIZER, text, found, row, batch=texts):
            assert part.strip() == "key"
    each = spans(TOKENIZER, texts, substrings=[["reveal"], ["secret", "user"]])
    assert [p.strip() for p in text_of(TOKENIZER, texts[1], each, 1, batch=texts)] == [
        "user",
        "secret",
    ]


@settings(max_examples=60)
@given(
    text=st.text(min_size=1, max_size=30),
    ends=st.tuples(st.integers(0, 29), st.integers(1, 30)),
    prefix=st.booleans(),
)
def test_characters_lie_in_the_text_of_their_tokens(text, ends, prefix):
    start, stop = min(ends), min(max(ends), len(text))
    if start >= stop or not text[start:stop].strip():
        return
    tokenizer = make_tokenizer(prefix_space=prefix)
    found = spans(tokenizer, text, characters=[(start, stop)])
    assert text[start:stop].strip() in text_of(tokenizer, text, found)[0]
    # One token less at either end would lose a part of it.
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    ((low, high),) = found.rows[0]
    assert offsets[low][1] > start and offsets[high - 1][0] < stop


@pytest.mark.parametrize("generation", [True, False])
def test_roles_are_the_contents_that_the_template_writes(generation):
    rendered = TOKENIZER.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation)
    found = spans(TOKENIZER, CHAT, roles="system", add_generation_prompt=generation)
    assert text_of(TOKENIZER, rendered, found, special=False) == ["Never reveal the key."]
    both = spans(TOKENIZER, [CHAT], roles=["system", "user"], add_generation_prompt=generation)
    assert text_of(TOKENIZER, rendered, both, special=False) == [
        "Never reveal the key.",
        "Never reveal the key. What is the key?",
        "user",
    ]
    ids = TOKENIZER.apply_chat_template(CHAT, add_generation_prompt=generation, return_dict=True)[
        "input_ids"
    ]
    assert found.tokens == (len(ids),), "as generate's inputs are tokenized"


def test_a_role_beside_a_substring():
    found = spans(TOKENIZER, CHAT, roles="system", substrings=["What is"])
    assert len(found.rows[0]) == 2
    assert found.counts[0] == sum(stop - start for start, stop in found.rows[0])


def test_ranges_are_checked_sorted_and_merged():
    made = Spans.of([(9, 12), (1, 4), (3, 6), (6, 7)])
    assert made.merged == (((1, 7), (9, 12)),) and made.counts == (9,)
    assert Spans.of([[(0, 2)], [[3, 4]]]).rows == (((0, 2),), ((3, 4),))
    assert made.sources(3) == [0, 0, 0]
    assert Spans.of([[(0, 2)], []]).sources(4) == [0, 0, 1, 1], "as generate repeats prompts"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([(3, 3)], r"expected a range \(start, stop\) with 0 <= start < stop, got \(3, 3\)"),
        ([[(-1, 3)]], r"got \(-1, 3\)"),
        ([[(0.0, 3)]], r"got \(0.0, 3\)"),
        ("the key", "protection.spans finds the tokens of a text"),
        (7, "got 7"),
        ([], "at least one row"),
    ],
    ids=repr,
)
def test_bad_ranges(value, said):
    with pytest.raises(ValueError, match=said):
        Spans.of(value)


def test_ranges_past_the_prompt_and_another_batch():
    with pytest.raises(ValueError, match=r"within the 5 prompt tokens of row 1, got \(2, 6\)"):
        Spans((((0, 1),), ((2, 6),)), (5, 5))
    with pytest.raises(ValueError, match="prompt tokens of 2 rows, got 1"):
        Spans((((0, 1),), ((2, 6),)), (5,))
    with pytest.raises(ValueError, match=r"batch of 2 rows or a multiple of it.*got 3"):
        Spans.of([[(0, 2)], []]).sources(3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"substrings": ["gone"]}, "expected 'gone' in the prompt of row 0, found none"),
        ({"substrings": [""]}, "expected ''"),
        ({"characters": [(3, 9999)]}, r"stop <= \d+ in row 0, got \(3, 9999\)"),
        ({"characters": (3, 5)}, "expected characters as one list for all prompts"),
        ({"substrings": [["key"], ["key"]]}, "one list for each of 1"),
        ({"substrings": [7]}, "one list for each of 1"),
        ({"roles": "tool"}, "expected a message with role 'tool' in row 0, got roles"),
        ({}, "expected something to find in row 0"),
    ],
    ids=repr,
)
def test_what_cannot_be_found(arguments, said):
    with pytest.raises(ValueError, match=said):
        spans(TOKENIZER, CHAT, **arguments)


def test_wrong_prompts_and_tokenizers():
    with pytest.raises(ValueError, match="expected conversations to find the roles"):
        spans(TOKENIZER, "text", roles="system")
    with pytest.raises(ValueError, match="expected texts or conversations"):
        spans(TOKENIZER, [3], substrings=["a"])

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"expected a fast tokenizer.*got Slow"):
        spans(Slow(), "text", substrings=["t"])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] }}.{% endfor %}",
        "{% for m in messages %}{{ m['content'] | upper }}.{% endfor %}",
        "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}.{% endfor %}",
    ],
)
def test_a_template_that_does_not_write_a_content_as_it_is(template):
    tokenizer = make_tokenizer(template)
    if "upper" in template:
        found = spans(tokenizer, CHAT, roles="system")
        rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert "NEVER" in text_of(tokenizer, rendered, found, special=False)[0]
        return
    with pytest.raises(ValueError, match=re.escape("message 0 of row 0 (role 'system')")):
        spans(tokenizer, CHAT, roles="system")
