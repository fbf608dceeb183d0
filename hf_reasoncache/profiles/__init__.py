"""Budget profiles: what the layers of a model need, as files and on the Hub.

Nothing here imports a cache: caches read profiles, calibrations write them.
"""

from hf_reasoncache.profiles.fingerprint import fingerprint
from hf_reasoncache.profiles.profile import BudgetProfile
from hf_reasoncache.profiles.provenance import Calibration

__all__ = ["BudgetProfile", "Calibration", "fingerprint"]
