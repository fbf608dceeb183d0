"""Several branches of one problem: when each may stop, and what they decide together."""

from hf_reasoncache.branching.calibrate import ExitCalibration, calibrate_exit
from hf_reasoncache.branching.exit import ConfidentExit
from hf_reasoncache.branching.rules import ConsensusExit, DecodeExit, ExitRules, WeakExit
from hf_reasoncache.branching.staged_vote import staged_vote
from hf_reasoncache.branching.vote import Branch, Reason, VoteResult, vote

__all__ = [
    "Branch",
    "ConfidentExit",
    "ConsensusExit",
    "DecodeExit",
    "ExitCalibration",
    "ExitRules",
    "Reason",
    "VoteResult",
    "WeakExit",
    "calibrate_exit",
    "staged_vote",
    "vote",
]
