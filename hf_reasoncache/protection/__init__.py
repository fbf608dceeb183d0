"""Which tokens must not be lost, and how fairly the rest is treated: spans of the prompt.

`spans` finds the tokens of substrings, character ranges or roles; `Spans` says them in numbers. The
caches take either as `protect=`, or a `Protect`, which says more.
"""

from hf_reasoncache.protection.fair import Fair
from hf_reasoncache.protection.ranges import Ranges, Spans
from hf_reasoncache.protection.resolve import spans
from hf_reasoncache.protection.rows import Protection, RowProtection
from hf_reasoncache.protection.settings import Protect

__all__ = ["Fair", "Protect", "Protection", "Ranges", "RowProtection", "Spans", "spans"]
