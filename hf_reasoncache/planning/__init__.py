"""What a model would need: bytes and speed, computed before a machine is rented."""

from hf_reasoncache.planning.rows import RowBytes, row_bytes

__all__ = ["RowBytes", "row_bytes"]
