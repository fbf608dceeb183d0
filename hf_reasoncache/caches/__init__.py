"""The public caches: a constructor and a docstring each."""

from hf_reasoncache.caches.reason_alloc import ReasonAllocCache
from hf_reasoncache.caches.shared_branch import SharedBranchCache
from hf_reasoncache.caches.sliding_window import SlidingWindowCompressCache

__all__ = ["ReasonAllocCache", "SharedBranchCache", "SlidingWindowCompressCache"]
