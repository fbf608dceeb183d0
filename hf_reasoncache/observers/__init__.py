"""What watches the layers of a cache and changes nothing."""

from hf_reasoncache.observers.base import Observed, Observer
from hf_reasoncache.observers.probes import Shadow

__all__ = ["Observed", "Observer", "Shadow"]
