"""Runnable examples of hf_reasoncache; each stands alone."""
