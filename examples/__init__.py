"""Runnable examples of hf_reasoncache."""
