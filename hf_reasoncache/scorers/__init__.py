"""Token scorers: which tokens a head keeps. One method, one file, one line in `SCORERS`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hf_reasoncache.messages import shown
from hf_reasoncache.scorers.base import HeldTokens, Scorer
from hf_reasoncache.scorers.bidirectional import Bidirectional
from hf_reasoncache.scorers.cur import CUR
from hf_reasoncache.scorers.expected_attention import ExpectedAttention
from hf_reasoncache.scorers.h2o import H2O
from hf_reasoncache.scorers.key_diff import KeyDiff
from hf_reasoncache.scorers.key_norm import KeyNorm
from hf_reasoncache.scorers.lag_kv import LagKV
from hf_reasoncache.scorers.random import Random
from hf_reasoncache.scorers.rkv import RKV
from hf_reasoncache.scorers.snapkv import SnapKV
from hf_reasoncache.scorers.streaming_llm import StreamingLLM
from hf_reasoncache.scorers.tova import TOVA
from hf_reasoncache.scorers.tri_attention import QueryStatistics, TriAttention
from hf_reasoncache.scorers.value_norm import ValueNorm
from hf_reasoncache.scorers.vase import VaSE

__all__ = [
    "CUR",
    "H2O",
    "RKV",
    "SCORERS",
    "TOVA",
    "Bidirectional",
    "ExpectedAttention",
    "HeldTokens",
    "KeyDiff",
    "KeyNorm",
    "LagKV",
    "QueryStatistics",
    "Random",
    "Scorer",
    "SnapKV",
    "StreamingLLM",
    "TriAttention",
    "VaSE",
    "ValueNorm",
    "make_scorer",
]

SCORERS: dict[str, type[Scorer]] = {
    "random": Random,
    "streaming-llm": StreamingLLM,
    "key-norm": KeyNorm,
    "value-norm": ValueNorm,
    "key-diff": KeyDiff,
    "lag-kv": LagKV,
    "tova": TOVA,
    "snapkv": SnapKV,
    "h2o": H2O,
    "rkv": RKV,
    "bidirectional": Bidirectional,
    "vase": VaSE,
    "cur": CUR,
}
"""Every scorer by the name that the command line, the caches (`scorer="snapkv"`) and files use.

`TriAttention` and `ExpectedAttention` are not among them: they need statistics or the RoPE of the
model.
"""

_OF_THE_RUN = {"queries": "window", "lag": "window", "seed": "seed"}
"""Fields that follow a setting of the run, as the newest tokens that a cache keeps anyway."""


def make_scorer(name: str, *, window: int | None = None, seed: int | None = None) -> Scorer:
    """Make a scorer by its name.

    Parameters
    ----------
    name : str
        One of `SCORERS`.
    window : int, optional
        Of the run: what `queries` and `lag` become, where the scorer has such a field.
    seed : int, optional
        Of the run: what `seed` becomes, where the scorer has that field.

    Raises
    ------
    ValueError
        If the name is not known, or a setting is out of range.
    """
    if name not in SCORERS:
        raise ValueError(f"scorer: expected one of {', '.join(SCORERS)}, got {shown(name)}.")
    made: Any = SCORERS[name]
    of_the_run = {"window": window, "seed": seed}
    settings = {
        field.name: value
        for field in fields(made)
        if (value := of_the_run.get(_OF_THE_RUN.get(field.name, ""))) is not None
    }
    scorer: Scorer = made(**settings)
    return scorer
