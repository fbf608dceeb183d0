"""A CUDA graph's stand-in on the CPU: operations are written down once and repeated blindly.

Like a graph, a tape repeats what reached the device, on the same memory, and runs no line of
Python in between. What a graph could not record is refused: reading a value from the device, and
shapes that depend on values.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


READS = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy}


class NotReplayableError(Exception):
    """An operation that a CUDA graph cannot hold."""


def _by_numbers(func, args):
    """Whether this is indexing with whole numbers, whose result has the shape of the index."""
    indexing = func in (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor)
    return indexing and not any(each.dtype == torch.bool for each in args[1] if each is not None)


class Tape(TorchDispatchMode):
    """Write down operations and kernel launches."""

    def __init__(self):
        super().__init__()
        self.entries = []
        self._inside_launch = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._inside_launch:
            return func(*args, **kwargs)
        if HOST_READS & set(func.tags) and not _by_numbers(func, args):
            raise NotReplayableError(str(func))
        result = func(*args, **kwargs)
        if not any(
            each.alias_info and not each.alias_info.is_write for each in func._schema.returns
        ):
            writes = any(each.alias_info for each in func._schema.returns)
            self.entries.append((func, args, kwargs, None if writes else result))
        return result

    def launch(self, run, kernel, args, kwargs):
        """Run a kernel and write its launch down."""

        def again():
            before, self._inside_launch = self._inside_launch, True
            try:
                run(kernel, *args, **kwargs)
            finally:
                self._inside_launch = before

        again()
        self.entries.append((lambda: again(), (), {}, None))

    def replay(self):
        """Repeat everything, writing results where they were the first time."""
        for func, args, kwargs, result in self.entries:
            again = func(*args, **kwargs)
            if result is None:
                continue
            old, new = pytree.tree_leaves(result), pytree.tree_leaves(again)
            for to, value in zip(old, new, strict=True):
                if isinstance(to, torch.Tensor):
                    to.copy_(value)


class HostWatch(TorchFunctionMode):
    """Refuse to send the tensors that live on the host to the device, or to read others there.

    On the CPU both are the same place, so a missing copy is no error by itself.
    """

    def __init__(self, host):
        super().__init__()
        self.host = host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise NotReplayableError(f"{func.__name__} reads from the device")
        if func is torch.Tensor.to and any(args[0] is tensor for tensor in self.host):
            raise NotReplayableError("a tensor of the host is sent to the device")
        return func(*args, **(kwargs or {}))


class TapeRecorder:
    """Records tapes; kernels are those of Triton's interpreter.

    Parameters
    ----------
    host : callable
        Returns the tensors that live on the host.
    """

    def __init__(self, host=tuple):
        self.tapes, self.host = [], host

    def record(self, step):
        from triton.runtime.interpreter import InterpretedFunction

        tape, run = Tape(), InterpretedFunction.run

        def noted(kernel, *args, **kwargs):
            with torch._C.DisableTorchFunction():
                tape.launch(run, kernel, args, kwargs)

        InterpretedFunction.run = noted
        try:
            with HostWatch(self.host()), tape:
                result = step()
        finally:
            InterpretedFunction.run = run
        self.tapes.append(tape)
        return result, tape.replay
