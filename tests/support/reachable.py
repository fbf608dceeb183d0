"""The memory that an object holds, whether or not its own report says so."""

import torch


def tensors_reachable_from(value, found, seen):
    """Fill `found`: address -> bytes of every storage that `value` keeps alive."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        for each in value.values():
            tensors_reachable_from(each, found, seen)
    elif hasattr(value, "__iter__") and not isinstance(value, str | range):
        for each in value:
            tensors_reachable_from(each, found, seen)
    elif hasattr(value, "__dict__"):
        tensors_reachable_from(vars(value), found, seen)
