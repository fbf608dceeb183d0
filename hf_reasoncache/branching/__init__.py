"""Several branches of one problem: when each may stop, and what they decide together."""

from hf_reasoncache.branching.calibrate import ExitCalibration, calibrate_exit
from hf_reasoncache.branching.exit import ConfidentExit
from hf_reasoncache.branching.rules import ConsensusExit, DecodeExit, ExitRules, WeakExit
from hf_reasoncache.branching.vote import Branch, Reason, VoteResult, vote
from hf_reasoncache.branching.waves import vote_in_waves

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
    "vote",
    "vote_in_waves",
]
