"""A simulated fleet: which rate of requests a machine sustains with which cache, and how long they
wait.
"""
