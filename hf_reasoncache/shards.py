"""Which KV heads of a layer this process holds, and what it tells the processes with the others.

Under tensor parallelism each process has some KV heads of every layer. What a head keeps is decided
from its own tokens, but how much it may keep depends on all heads of its layer. So processes tell
each other, at an eviction and never at other steps, what such a decision needs, and each of them
then makes it by itself, from the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

TPMode = Literal["agree", "local"]


@dataclass(frozen=True, eq=False)
class Shard:
    """The KV heads of one layer that this process holds.

    Attributes
    ----------
    first : int
        Number of the first of them among the heads of the layer.
    total : int or None
        KV heads of the layer; None where this process has all of them.
    group : ProcessGroup or None
        The processes that hold the others and decide together with this one. None where each
        decides for its own heads as if there were no others.
    """

    first: int = 0
    total: int | None = None
    group: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        """Return the shard itself: it never changes, and a process group cannot be copied."""
        return self

    @property
    def agrees(self) -> bool:
        """Whether decisions are made together with other processes."""
        return self.group is not None

    def describe(self, heads: int) -> tuple[int, int, int] | None:
        """Return first head, `heads` and total; None where this process has all of them."""
        return None if self.total is None else (self.first, heads, self.total)

    def own(self, everyone: torch.Tensor, heads: int) -> torch.Tensor:
        """Return the `heads` heads of this process, of a tensor `[R, H, ...]` of those decided for.

        A view.
        """
        return everyone.narrow(1, self.first, heads) if self.agrees else everyone

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Return the heads of all processes that decide together; all of them must call it.

        Parameters
        ----------
        own : Tensor[R, H_own, ...]
            Of the same shape and dtype everywhere.

        Returns
        -------
        Tensor[R, H, ...]
            On the device of `own`; `own` itself where this process decides alone.

        Raises
        ------
        RuntimeError
            If a process does not answer within the timeout of the group, or has ended.
        """
        if not self.agrees:
            return own
        sent = own.to(_device_of(self.group, own.device)).contiguous()
        found = [torch.empty_like(sent) for _ in range(dist.get_world_size(self.group))]
        try:
            dist.all_gather(found, sent, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"expected {len(found)} processes to agree on an eviction, got no answer from all "
                f"of them: {error}. One of them has ended or hangs, or reads other tokens than "
                "this one; see the log of each, and start all of them again."
            ) from error
        return torch.cat(found, 1).to(own.device)


ALONE = Shard()
"""All heads of a layer in one process."""


def in_several_processes() -> bool:
    """Whether torch.distributed runs more than this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def find_shard(module: torch.nn.Module, heads: int, total: int, tp_mode: TPMode) -> Shard:
    """Find out which heads of a layer this process holds, if there are several processes.

    Parameters
    ----------
    module : Module
        The attention module of the layer. Its sharded parameters name the process group.
    heads : int
        KV heads that this process has computed.
    total : int
        KV heads of the layer by the model's config.
    tp_mode : {"agree", "local"}

    Returns
    -------
    Shard

    Raises
    ------
    ValueError
        If the processes that hold the other heads cannot be told, or do not hold as many each.
    """
    if heads == total:
        return ALONE
    group = _group_of(module)
    size = dist.get_world_size(group)
    if heads * size != total:
        raise ValueError(
            f"tensor parallelism: expected the {total} KV heads of a layer in equal shares, so "
            f"{heads} of them in each of {total / heads:g} processes, got a group of {size} "
            "processes; load the model with tp_plan='auto' and a number of processes that divides "
            "its KV heads."
        )
    first = dist.get_rank(group) * heads
    return Shard(first, total, group if tp_mode == "agree" else None)


def _group_of(module: torch.nn.Module) -> Any:
    """Return the group over which the weights of a module are sharded by heads.

    Weights that do not say so (quantised ones, and those of older releases of transformers) are
    taken to be sharded over all processes.
    """
    from torch.distributed.tensor import DTensor  # half a second, which only sharded models pay

    meshes = {
        parameter.device_mesh
        for parameter in module.parameters()
        if isinstance(parameter, DTensor) and any(each.is_shard() for each in parameter.placements)
    }
    if not meshes:
        return dist.group.WORLD
    names = sorted({str(mesh.mesh_dim_names) for mesh in meshes})
    if len(meshes) > 1:
        raise ValueError(
            f"tensor parallelism: expected the weights of {type(module).__name__} on one device "
            f"mesh, got {len(meshes)} with the dimensions {', '.join(names)}; load the model with "
            "tp_plan='auto'."
        )
    (mesh,) = meshes
    if mesh.ndim == 1:
        return mesh.get_group()
    if "tp" in (mesh.mesh_dim_names or ()):
        return mesh.get_group("tp")
    raise ValueError(
        f"tensor parallelism: expected a device mesh with a dimension called 'tp', got {names[0]}; "
        "name it so in init_device_mesh."
    )


def _device_of(group: Any, device: torch.device) -> torch.device:
    """Where what lies on `device` must lie to be sent: for gloo on the CPU, for NCCL on a GPU."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    backend = backends.get(device.type)
    if backend == "gloo":
        return torch.device("cpu")
    if backend is not None:
        return device
    return torch.device(next(iter(backends)), torch.accelerator.current_device_index())


def require_tp_mode(value: str) -> TPMode:
    """Return a valid setting.

    Raises
    ------
    ValueError
        If it is none.
    """
    if value not in get_args(TPMode):
        raise ValueError(f"tensor_parallel: expected one of {get_args(TPMode)}, got {value!r}.")
    return value  # type: ignore[return-value]
