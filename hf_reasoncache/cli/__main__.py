"""`python -m hf_reasoncache.cli`, which `accelerate launch -m` needs."""

from hf_reasoncache.cli import main

main()
