"""From text to token ranges, through a tokenizer's offsets and its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hf_reasoncache.messages import shown
from hf_reasoncache.protection.ranges import Range, Spans

Conversation = Sequence[dict[str, Any]]

# Stands in for the content of a message, to see where a chat template puts it. Private use
# characters: no template looks for them, strips them, or writes them itself.
_MARK = "\ue000\ue001\ue002"


def spans(
    tokenizer: Any,
    prompts: str | Sequence[str] | Conversation | Sequence[Conversation],
    *,
    substrings: Sequence[str] | Sequence[Sequence[str]] = (),
    characters: Sequence[Range] | Sequence[Sequence[Range]] = (),
    roles: str | Sequence[str] = (),
    add_special_tokens: bool | None = None,
    **template: Any,
) -> Spans:
    """Find the tokens of parts of some prompts.

    A token that shares a character with a part belongs to it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        A fast one: it must know which characters a token came from.
    prompts : str, conversation, or a sequence of either
        What `generate` will be given, in the order of the batch. A conversation is a list of
        messages as for `tokenizer.apply_chat_template`.
    substrings : sequence of str, or one sequence per prompt
        Texts to find; every occurrence counts.
    characters : sequence of (int, int), or one sequence per prompt
        Character ranges `(start, stop)` of the prompt, or of the text that the chat template makes.
    roles : str or sequence of str
        Roles, such as "system", whose messages' contents are meant; conversations only. The
        template's own words around a content are not part of it.
    add_special_tokens : bool, optional
        As `generate`'s inputs are tokenized; by default True for texts, and False for conversations
        (a chat template writes its special tokens itself).
    **template
        For `apply_chat_template`; `add_generation_prompt` is True by default.

    Returns
    -------
    Spans
        With the length of each prompt in tokens, which the cache compares with what it gets.

    Raises
    ------
    ValueError
        If the tokenizer is not fast, a part is not in its prompt or has no token, or nothing was
        asked for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "protection.spans: expected a fast tokenizer, which knows the characters of a token, "
            f"got {type(tokenizer).__name__}; load it with use_fast=True, or pass token ranges."
        )
    batch, chats = _batch(prompts)
    roles = [roles] if isinstance(roles, str) else list(roles)
    if roles and not chats:
        raise ValueError(
            f"protection.spans: expected conversations to find the roles {shown(roles)} in, got "
            "texts; pass lists of messages, or substrings."
        )
    per_row = zip(
        batch,
        _per_row("substrings", substrings, len(batch), str),
        _per_row("characters", characters, len(batch), int),
        strict=True,
    )
    rows, lengths = [], []
    for row, (prompt, texts, ranges) in enumerate(per_row):
        text = _render(tokenizer, prompt, template) if chats else prompt
        wanted = [*_checked(ranges, text, row), *_occurrences(texts, text, row)]
        if roles:
            wanted += _contents(tokenizer, prompt, text, roles, template, row)
        if not wanted:
            raise ValueError(
                f"protection.spans: expected something to find in row {row}, got no substrings, "
                "characters or roles."
            )
        special = (not chats) if add_special_tokens is None else add_special_tokens
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        offsets = encoding["offset_mapping"]
        rows.append(tuple(_tokens(offsets, each, text, row) for each in sorted(set(wanted))))
        lengths.append(len(offsets))
    return Spans(tuple(rows), tuple(lengths))


def _batch(prompts: Any) -> tuple[list[Any], bool]:
    """Return one prompt per row, and whether they are conversations."""
    if isinstance(prompts, str):
        return [prompts], False
    items = list(prompts)
    if items and all(isinstance(item, str) for item in items):
        return items, False
    if items and all(isinstance(item, dict) for item in items):
        return [items], True
    if items and all(
        isinstance(item, Sequence)
        and not isinstance(item, str)
        and all(isinstance(message, dict) for message in item)
        for item in items
    ):
        return items, True
    raise ValueError(
        f"protection.spans: expected texts or conversations (lists of messages), got "
        f"{shown(prompts)}."
    )


def _per_row(name: str, value: Any, rows: int, leaf: type) -> list[list[Any]]:
    """Give every row its list of parts, a part being a string or a pair of integers."""
    items = [value] if isinstance(value, str) else list(value)

    def is_part(item: Any) -> bool:
        return isinstance(item, str) if leaf is str else _is_ints(item)

    if all(is_part(item) for item in items):
        return [items] * rows
    nested = [list(item) if _is_list(item) else [None] for item in items]
    if len(nested) != rows or not all(is_part(part) for parts in nested for part in parts):
        raise ValueError(
            f"protection.spans: expected {name} as one list for all prompts or as one list for "
            f"each of {rows}, got {shown(value)}."
        )
    return nested


def _is_list(item: Any) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str)


def _is_ints(item: Any) -> bool:
    return _is_list(item) and len(item) == 2 and all(isinstance(end, int) for end in item)


def _checked(ranges: Sequence[Sequence[int]], text: str, row: int) -> Iterator[Range]:
    for start, stop in ranges:
        if not 0 <= start < stop <= len(text):
            raise ValueError(
                f"protection.spans: expected characters with 0 <= start < stop <= {len(text)} in "
                f"row {row}, got ({start}, {stop})."
            )
        yield start, stop


def _occurrences(substrings: Sequence[str], text: str, row: int) -> Iterator[Range]:
    for wanted in substrings:
        start = text.find(wanted) if wanted else -1
        if start < 0:
            raise ValueError(
                f"protection.spans: expected {shown(wanted)} in the prompt of row {row}, found "
                "none; pass the text exactly as it stands there (after the chat template)."
            )
        while start >= 0:
            yield start, start + len(wanted)
            start = text.find(wanted, start + len(wanted))


def _render(tokenizer: Any, conversation: Conversation, template: dict[str, Any]) -> str:
    arguments = {"add_generation_prompt": True} | template
    text: str = tokenizer.apply_chat_template(list(conversation), tokenize=False, **arguments)
    return text


def _contents(
    tokenizer: Any,
    conversation: Conversation,
    text: str,
    roles: Sequence[str],
    template: dict[str, Any],
    row: int,
) -> Iterator[Range]:
    """Where the contents of messages stand in the text that the chat template makes.

    A content is not searched for, since it may stand there twice or trimmed: it is replaced, and
    what the template writes before and after it stays the same.
    """
    for role in roles:
        found = [place for place, each in enumerate(conversation) if each.get("role") == role]
        if not found:
            raise ValueError(
                f"protection.spans: expected a message with role {shown(role)} in row {row}, got "
                f"roles {shown([message.get('role') for message in conversation])}."
            )
        for place in found:
            marked = [dict(message) for message in conversation]
            marked[place]["content"] = _MARK
            before, mark, after = _render(tokenizer, marked, template).partition(_MARK)
            fits = mark and text.startswith(before) and text.endswith(after)
            if not fits or len(before) + len(after) >= len(text):
                raise ValueError(
                    f"protection.spans: expected the chat template to write the content of message "
                    f"{place} of row {row} (role {shown(role)}) as it is, got a text without it, "
                    "or one that depends on it elsewhere; pass substrings instead."
                )
            yield len(before), len(text) - len(after)


def _tokens(offsets: Sequence[Range], part: Range, text: str, row: int) -> Range:
    """Turn characters into the tokens that share any with them."""
    inside = [
        place
        for place, (start, stop) in enumerate(offsets)
        if max(start, part[0]) < min(stop, part[1])
    ]
    if not inside:
        raise ValueError(
            f"protection.spans: expected tokens for {shown(text[part[0] : part[1]])} in row "
            f"{row}, got none; this tokenizer gives it no token of its own, pass token ranges."
        )
    return inside[0], inside[-1] + 1
