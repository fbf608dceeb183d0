"""Answers to a file of prompts, in batches as large as a bound on the cache's memory lets them be.

`read_lines` reads the prompts, `pack` cuts them into batches, a `Worker` answers a batch with one
cache, and `generate` shares the batches between processes. The command `hf-reasoncache generate`
is made of them; a `Conversation` is behind `hf-reasoncache chat`.
"""

from hf_reasoncache.generation.conversation import Conversation
from hf_reasoncache.generation.lines import Completion, Defaults, Line, digest, read_lines
from hf_reasoncache.generation.packing import Job, Limits, pack
from hf_reasoncache.generation.sampling import Sampling
from hf_reasoncache.generation.work import Work, generate
from hf_reasoncache.generation.worker import Made, Worker

__all__ = [
    "Completion",
    "Conversation",
    "Defaults",
    "Job",
    "Limits",
    "Line",
    "Made",
    "Sampling",
    "Work",
    "Worker",
    "digest",
    "generate",
    "pack",
    "read_lines",
]
