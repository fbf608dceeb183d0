"""Calibration: measure what the layers of a model need, once, and share it.

The caches import `calibration.profile`, which runs this module first. So nothing is offered here
that imports a cache; measurements are imported from their own modules.
"""

from hf_reasoncache.calibration.fingerprint import fingerprint
from hf_reasoncache.calibration.profile import BudgetProfile
from hf_reasoncache.calibration.provenance import Calibration

__all__ = ["BudgetProfile", "Calibration", "fingerprint"]
