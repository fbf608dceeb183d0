"""Where the spans that questions name lie among the tokens of their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_reasoncache.calibration.prompts import Message
from hf_reasoncache.evaluation.tasks import Question
from hf_reasoncache.messages import shown
from hf_reasoncache.protection import Spans
from hf_reasoncache.protection import spans as find_spans


def spans_of(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> Spans | None:
    """Find the spans of a batch, in the order that each question names them.

    Parameters
    ----------
    questions : sequence of Question
        One for each row.
    tokenizer : PreTrainedTokenizerBase
    chat : bool
        Whether prompts of plain text become the message of a user.

    Returns
    -------
    Spans or None
        None where no question names any.

    Raises
    ------
    ValueError
        If a span is not in its prompt, or several times, or only some questions have spans.
    """
    if not any(question.spans for question in questions):
        return None
    rows, lengths = [], []
    for question in questions:
        content: Any = question.prompt
        if chat and isinstance(content, str):
            content = ({"role": "user", "content": content},)
        text = content if isinstance(content, str) else _text(content)
        for span in question.spans:
            if text.count(span) != 1:
                raise ValueError(
                    f"question {shown(question.id)}: expected the span {shown(span)} once in the "
                    f"prompt, got it {text.count(span)} times; give more of its context."
                )
        if not question.spans:
            raise ValueError(
                f"question {shown(question.id)}: expected spans as the other questions of its "
                "batch have, got none; name them for all questions of a task, or for none."
            )
        found = [find_spans(tokenizer, [content], substrings=[span]) for span in question.spans]
        rows.append(tuple(each.rows[0][0] for each in found))
        lengths.append(found[0].tokens[0] if found[0].tokens else 0)
    return Spans(tuple(rows), tuple(lengths))


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(str(message["content"]) for message in messages)
