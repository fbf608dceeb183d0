"""Operations of the caches' hot path on ragged pools of keys and values.

Each folder is one operation: `__init__` validates and dispatches, `reference` defines the result in
plain PyTorch, `kernel` is the path for GPUs, and `cpu` the one for CPUs and wherever else the
kernels do not run. Where nothing in PyTorch is faster than the definition, that is the CPU path
too. `backend` says which path runs.
"""
