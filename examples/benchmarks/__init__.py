"""Benchmarks: each module measures one thing and prints it with the machine it ran on."""
