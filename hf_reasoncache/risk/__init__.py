"""What an eviction costs, as numbers: measured before it, bounded while it happens.

Every number here is about the output of one attention head under the queries that were seen. None
of them is about the quality of an answer.
"""

from hf_reasoncache.risk.conformal import conformal_bound, coverage
from hf_reasoncache.risk.damage import Damage, DamageScale, eviction_damage
from hf_reasoncache.risk.log import RiskLog
from hf_reasoncache.risk.probes import Probes
from hf_reasoncache.risk.settings import Risk

__all__ = [
    "Damage",
    "DamageScale",
    "Probes",
    "Risk",
    "RiskLog",
    "conformal_bound",
    "coverage",
    "eviction_damage",
]
