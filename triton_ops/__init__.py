"""Operations of the caches' hot path on ragged pools of keys and values.

Each folder is one operation: `__init__` validates and dispatches, `reference` defines it in plain
PyTorch and is the CPU path, `kernel` is the GPU path. `backend` says which of the two runs.
"""
