"""Drop-in caches that let reasoning models think longer in less memory.

Importing the package registers the attention implementations "reasoncache", "reasoncache_eager" and
"reasoncache_fa2" with transformers.
"""

from hf_reasoncache.attention import register
from hf_reasoncache.branching.calibrate import calibrate_exit
from hf_reasoncache.branching.exit import ConfidentExit
from hf_reasoncache.branching.generate import branch_generate
from hf_reasoncache.branching.prefill_once import prefill_once
from hf_reasoncache.branching.vote import VoteResult
from hf_reasoncache.caches.reason_alloc import ReasonAllocCache
from hf_reasoncache.caches.shared_branch import SharedBranchCache
from hf_reasoncache.caches.sliding_window import SlidingWindowCompressCache
from hf_reasoncache.model_graphs import decode_graphs, disable_graphs, enable_graphs
from hf_reasoncache.pipeline import pipeline
from hf_reasoncache.profiles.profile import BudgetProfile
from hf_reasoncache.protection import Protect
from hf_reasoncache.risk import Risk
from hf_reasoncache.version import __version__
from hf_reasoncache.warm_up import warm_up

__all__ = [
    "BudgetProfile",
    "ConfidentExit",
    "Protect",
    "ReasonAllocCache",
    "Risk",
    "SharedBranchCache",
    "SlidingWindowCompressCache",
    "VoteResult",
    "__version__",
    "branch_generate",
    "calibrate_exit",
    "decode_graphs",
    "disable_graphs",
    "enable_graphs",
    "pipeline",
    "prefill_once",
    "warm_up",
]

register()
