"""When rows evict, how much every head may hold, and which tokens go.

A policy works on counts, positions and scores; it knows no keys or values and no transformers.
"""
