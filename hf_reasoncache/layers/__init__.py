"""Storage and life of one layer of a cache."""
