"""`python -m hf_reasoncache`."""

from hf_reasoncache.cli import main

main()
