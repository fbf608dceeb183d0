"""What a model would need and could do, computed from its config before a machine is rented."""

from hf_reasoncache.planning.devices import DEVICES, Device
from hf_reasoncache.planning.model import ModelSize
from hf_reasoncache.planning.plan import CachePlan, Setting
from hf_reasoncache.planning.rows import RowBytes, row_bytes
from hf_reasoncache.planning.speed import RowWork, prompt_seconds, step_seconds

__all__ = [
    "DEVICES",
    "CachePlan",
    "Device",
    "ModelSize",
    "RowBytes",
    "RowWork",
    "Setting",
    "prompt_seconds",
    "row_bytes",
    "step_seconds",
]
