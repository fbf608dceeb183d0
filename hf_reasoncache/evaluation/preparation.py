"""What can be known before a model runs: prompts as tokens, their spans, and whether caches fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hf_reasoncache.calibration.prompts import Prompt
from hf_reasoncache.evaluation.spans import spans_of
from hf_reasoncache.evaluation.specs import Budget, CacheSpec
from hf_reasoncache.evaluation.tasks import Question
from hf_reasoncache.messages import shown
from hf_reasoncache.protection import Spans


@dataclass(frozen=True)
class Prompts:
    """Questions that are answered together, as model and cache get them.

    Attributes
    ----------
    questions : sequence of Question
    start : int
        Place of the first among the questions of its task.
    ids : tuple of tuple of int
        Tokens of each prompt.
    spans : Spans or None
    """

    questions: Sequence[Question]
    start: int
    ids: tuple[tuple[int, ...], ...]
    spans: Spans | None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids))


def prepare(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, chat: bool, size: int
) -> list[Prompts]:
    """Encode the questions of a task, `size` of them together.

    Raises
    ------
    ValueError
        If a prompt is unusable, or a span is not in it once; names the question.
    """
    found = []
    for start in range(0, len(questions), size):
        some = questions[start : start + size]
        prompts = [Prompt(each.prompt, f"question {shown(each.id)}") for each in some]
        ids = tuple(each.encode(tokenizer, chat=chat) for each in prompts)
        found.append(Prompts(some, start, ids, spans_of(some, tokenizer, chat=chat)))
    return found


def require_room(
    spec: CacheSpec,
    budget: Budget | None,
    config: PretrainedConfig,
    seed: int,
    batches: Sequence[Prompts],
) -> None:
    """Check, before the model runs, that a cache accepts these prompts.

    Raises
    ------
    ValueError
        If the cache does not take the budget, or the budget cannot hold what is protected of a
        prompt; names the question.
    """
    # Settings and profile are the same for all batches: one cache checks them.
    cache = spec.make(config, budget, batches[0].spans, seed)
    policies = [layer.policy for layer in getattr(cache, "own_layers", ()) if layer.policy]
    for batch in batches:
        # All that can be wrong with the spans of the others: they are missing, or overlap.
        spec.span_settings(batch.spans)
        listed = batch.spans.counts if spec.whitelist and batch.spans else [0] * len(batch.ids)
        for question, ids, count in zip(batch.questions, batch.ids, listed, strict=True):
            try:
                for policy in policies:
                    policy.require_room(len(ids), count)
            except ValueError as error:
                raise ValueError(
                    f"question {shown(question.id, 40)} with {shown(spec.name, 60)} at {budget}: "
                    f"{error}"
                ) from error
