"""Token scorers: which tokens a head keeps. One method, one file."""

from hf_reasoncache.scorers.base import HeldTokens, Scorer
from hf_reasoncache.scorers.bidirectional import Bidirectional
from hf_reasoncache.scorers.h2o import H2O
from hf_reasoncache.scorers.key_diff import KeyDiff
from hf_reasoncache.scorers.key_norm import KeyNorm
from hf_reasoncache.scorers.lag_kv import LagKV
from hf_reasoncache.scorers.random import Random
from hf_reasoncache.scorers.rkv import RKV
from hf_reasoncache.scorers.snapkv import SnapKV
from hf_reasoncache.scorers.streaming_llm import StreamingLLM
from hf_reasoncache.scorers.tova import TOVA
from hf_reasoncache.scorers.value_norm import ValueNorm

__all__ = [
    "H2O",
    "RKV",
    "TOVA",
    "Bidirectional",
    "HeldTokens",
    "KeyDiff",
    "KeyNorm",
    "LagKV",
    "Random",
    "Scorer",
    "SnapKV",
    "StreamingLLM",
    "ValueNorm",
]
