"""Approximate, refuted or unproven: nothing here is to be relied on, and nothing else imports it.

- `StepShareCache`: similar steps of a text share keys and values. Approximate; it costs accuracy.
- `semantic_prefill`, `SharingGate`: prompts with alike hidden states share a prefix. Refuted: the
  similarity takes another problem for the same one, and every answer to that one is wrong.
- `LogitLens`, `LensExit`: which tokens a layer before the last would decide. A measurement; an exit
  that saves time is not possible through public API.
- `least_budget`: below which budget a prompt should not be compressed. It ranks tasks as their
  evictions do on one of our models and not on the other.

The page on self-consistency has the figures of the first three, the page on risk those of the last.
Names and arguments may change or go without notice.
"""

from hf_reasoncache.experimental.lens import LensExit, LogitLens
from hf_reasoncache.experimental.lookup import least_budget
from hf_reasoncache.experimental.semantic import SharingGate, semantic_prefill
from hf_reasoncache.experimental.step_share import StepShareCache
from hf_reasoncache.experimental.steps import Boundaries

__all__ = [
    "Boundaries",
    "LensExit",
    "LogitLens",
    "SharingGate",
    "StepShareCache",
    "least_budget",
    "semantic_prefill",
]
