"""A device that is not there: its tensors compute on the CPU, and all that it would do is counted.

Inside `fake_device()`, tensors that are made on `DEVICE` or moved there claim to be on another
device than the CPU, and lie in the CPU's memory. So a model and a cache run as they would on a GPU,
with the same results as on the CPU, and three things show that a CPU alone hides:

- what a step asks of the device: operations, kernel launches, synchronisations, copies;
- where it waits for the device, or sends something there;
- tensors of both places in one operation, which a GPU refuses: `MixedDevicesError`.

How it counts:

- An operation of PyTorch below its Python layer (`aten`) is one, however many kernels it takes.
  Views and allocations are none. `scaled_dot_product_attention` is one, as on a GPU.
- Launches are those of our own Triton kernels, which run in Triton's interpreter.
- A synchronisation makes the host wait for a value: `item`, `tolist`, `bool`, `equal`, and results
  whose shape depends on values, such as those of `nonzero` or of a mask as an index.
- A copy goes from one memory to the other, in either direction. On a GPU it makes the host wait
  too; it is counted once, as a copy. A number costs none, and what the host sends without waiting
  (`non_blocking`) is an operation.

What it cannot know: the time that anything takes, and waits inside an operation of CUDA's that
PyTorch does not mark.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from numbers import Number
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from triton_ops.backend import interpreting

aten = torch.ops.aten

DEVICE = torch.device("meta")
"""The name of the fake device: the only one, besides the CPU's, that every build of PyTorch has."""

Kind = Literal["operation", "launch", "synchronisation", "copy", "mark"]

_ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
_VIEWS = {aten._unsafe_view.default}  # besides those that PyTorch itself calls so
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_READS = {aten.index.Tensor, aten._unsafe_index.Tensor}
_WRITES = {
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
# Besides pointwise operations; the host hands their number over with the launch.
_TAKE_A_NUMBER = {
    aten.fill.Tensor,
    aten.fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.index_fill.int_Tensor,
    aten.index_fill_.int_Tensor,
}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of the CPU and of the fake device."""


@dataclass(frozen=True)
class Event:
    """Something that the device was asked for.

    Attributes
    ----------
    kind : {"operation", "launch", "synchronisation", "copy", "mark"}
        A mark is what somebody else has noted, between events.
    name : str
        The operation's or the kernel's.
    place : str
        Module and line that asked, below PyTorch's and Triton's own.
    """

    kind: Kind
    name: str
    place: str


@dataclass(frozen=True)
class Counts:
    """How often the device was asked for something; see the module."""

    operations: int = 0
    launches: int = 0
    synchronisations: int = 0
    copies: int = 0

    @classmethod
    def of(cls, events: Iterable[Event]) -> Counts:
        """Count events."""
        kinds = Counter(event.kind for event in events)
        return cls(kinds["operation"], kinds["launch"], kinds["synchronisation"], kinds["copy"])

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            *(mine - its for mine, its in zip(astuple(self), astuple(other), strict=True))
        )

    def __mul__(self, times: int) -> Counts:
        return Counts(*(each * times for each in astuple(self)))


class DeviceTensor(torch.Tensor):
    """A tensor of the fake device.

    Attributes
    ----------
    hidden : Tensor
        What it holds, on the CPU; for the device and for tests only.
    """

    hidden: torch.Tensor

    # Without this, PyTorch would make every result a `DeviceTensor` once more.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, hidden: torch.Tensor) -> DeviceTensor:
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            hidden.size(),
            strides=hidden.stride(),
            storage_offset=hidden.storage_offset(),
            dtype=hidden.dtype,
            device=DEVICE,
        )
        tensor.hidden = hidden
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: expected fake_device() around all use of its tensors.")

    def as_subclass(self, cls: type[torch.Tensor]) -> torch.Tensor:
        """Return a tensor of another class with this one's shape and type, but without contents.

        A class that refuses all computation, as our guards do, needs none.
        """
        with _disable_current_modes():
            return torch.empty(self.shape, dtype=self.dtype, device=DEVICE).as_subclass(cls)

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return where the contents lie, so that tensors that share memory are seen to do so."""
        return self.hidden.untyped_storage()

    def __repr__(self) -> str:
        return f"DeviceTensor({self.hidden})"


class FakeDevice(TorchDispatchMode):
    """Runs operations on the fake device; entered by `fake_device`."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[Event] | None = None

    @contextmanager
    def counting(self) -> Iterator[list[Event]]:
        """Collect what the device is asked for inside a `with` block.

        Yields
        ------
        list of Event
            In order, and complete when the block ends.
        """
        if self._events is not None:
            raise RuntimeError("counting: expected one count at a time, got one inside another.")
        events = self._events = []
        try:
            yield events
        finally:
            self._events = None

    def note(self, kind: Kind, name: str) -> None:
        """Take note of an event, if somebody counts."""
        if self._events is not None:
            self._events.append(Event(kind, name, _place()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, DeviceTensor)]
        asked = kwargs.get("device")
        stays = bool(ours) if asked is None else torch.device(asked) == DEVICE
        if not ours and not stays:
            return func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func}: the fake device cannot change a tensor's shape.")
        _require_one_place(func, args, kwargs, tensors)
        for kind in _kinds(func, args, kwargs, stays=stays):
            self.note(kind, str(func))
        result = func(*_hidden(args), **_hidden(kwargs | ({"device": "cpu"} if asked else {})))
        if not stays:
            return result
        # What is written in place comes back as the object that it was.
        known = {id(x.hidden): x for x in ours}
        return pytree.tree_map_only(
            torch.Tensor, lambda x: known[id(x)] if id(x) in known else DeviceTensor(x), result
        )


class _Functions(TorchFunctionMode):
    """What PyTorch's Python layer does in one way for CUDA and in another for other devices."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = any(isinstance(x, DeviceTensor) for x in tensors)
        if func is F.scaled_dot_product_attention and ours:
            _require_one_place(func, args, kwargs, tensors)
            self.device.note("operation", "scaled_dot_product_attention")
            return DeviceTensor(func(*_hidden(args), **_hidden(kwargs)))
        if func is torch.Tensor.tolist and ours:
            self.device.note("synchronisation", "tolist")
            return args[0].hidden.tolist()
        if func is torch.Tensor.__setitem__ and ours and isinstance(args[2], Number):
            # For CUDA the number stays on the host until it goes along with a kernel.
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))
        elif func in (torch.tensor, torch.as_tensor) and "device" in kwargs and not ours:
            # PyTorch would build it out of our sight.
            target = kwargs.pop("device")
            return func(*args, **kwargs).to(target)
        return func(*args, **kwargs)


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """Have the fake device inside a `with` block.

    Its tensors are of no use outside. In a process with `TRITON_INTERPRET=1`, kernels can be
    launched on it (with `use_backend("triton")`).
    """
    device = FakeDevice()
    with device, _Functions(device), _launching(device):
        yield device


@contextmanager
def _launching(device: FakeDevice) -> Iterator[None]:
    """Let Triton's interpreter launch kernels on the device."""
    if not interpreting():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        name = kernel.fn.__name__
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        foreign = [tuple(x.shape) for x in tensors if not isinstance(x, DeviceTensor)]
        if foreign:
            raise MixedDevicesError(f"{name}: expected tensors of the device, got {foreign}.")
        device.note("launch", name)
        return run(kernel, *_hidden(args), **_hidden(kwargs))

    with mock.patch.object(InterpretedFunction, "run", counted):
        yield


def _hidden(tree: Any) -> Any:
    return pytree.tree_map_only(DeviceTensor, lambda x: x.hidden, tree)


def _place() -> str:
    """Return the line that asked, below PyTorch, Triton and this module."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and name.split(".")[0] not in ("torch", "triton", "contextlib"):
            break
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '')}:{frame.f_lineno}"


def _kinds(func: Any, args: Any, kwargs: Any, *, stays: bool) -> list[Kind]:
    """Return what an operation asks of the device."""
    if func in (aten._to_copy.default, aten.copy_.default):
        crosses = isinstance(args[0], DeviceTensor) != (
            stays if func is aten._to_copy.default else isinstance(args[1], DeviceTensor)
        )
        sends = not isinstance(args[1 if func is aten.copy_.default else 0], DeviceTensor)
        at_once = kwargs.get("non_blocking") or args[2:] == (True,)
        return ["copy" if crosses and not (sends and at_once) else "operation"]
    if not stays or func in _ALLOCATIONS or func in _VIEWS or func.is_view:
        return []
    if func is aten._local_scalar_dense.default:
        return ["synchronisation"]
    if func in _READS | _WRITES:
        return ["operation", *_kinds_of_indices(func, args)]
    if _WAITS & set(func.tags) and kwargs.get("output_size") is None:
        return ["operation", "synchronisation"]
    return ["operation"]


def _kinds_of_indices(func: Any, args: Any) -> Iterator[Kind]:
    """Yield what indices cost: the host's are sent, and masks become lists of unknown length."""
    indices = [index for index in args[1] if index is not None]
    value = args[2] if func in _WRITES else None
    if value is not None and not isinstance(value, DeviceTensor):
        if all(index.dtype == torch.bool for index in indices):
            return  # filled under the mask
        yield "copy"
    for index in indices:
        mask = index.dtype == torch.bool
        if not isinstance(index, DeviceTensor):
            for _ in range(index.dim() if mask else 1):
                yield "copy"
        elif mask:
            yield "synchronisation"


def _require_one_place(func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
    """Raise MixedDevicesError where a GPU would refuse tensors of the host."""
    foreign = [x for x in tensors if not isinstance(x, DeviceTensor)]
    if any(x.is_meta for x in foreign):
        raise RuntimeError(f"{func}: expected tensors made inside fake_device(), got another one.")
    if len(foreign) in (0, len(tensors)) or func in (aten._to_copy.default, aten.copy_.default):
        return
    tags = getattr(func, "tags", ())
    if func in _READS | _WRITES and isinstance(args[0], DeviceTensor):
        refused = [x for x in args[2:3] if not isinstance(x, DeviceTensor) and x.dim() > 0]
    elif torch.Tag.pointwise in tags or func in _TAKE_A_NUMBER:
        written = args[0] if torch.Tag.inplace in tags else kwargs.get("out")
        refused = [x for x in foreign if x.dim() > 0 or x is written]
    else:
        refused = foreign
    if refused:
        raise MixedDevicesError(
            f"{func}: expected tensors of one device, got tensors of the CPU with shapes "
            f"{[tuple(x.shape) for x in refused]} beside those of the fake device."
        )
