"""What a call would launch on a GPU, counted in Triton's interpreter: kernels, and torch's own small operations."""

import contextlib
import re

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from kvevict import custom_ops

# Views, memory that is not cleared (which conftest.py fills, for the tests), and what only the CPU does, to raise an
# error at once.
FREE = re.compile(
    r"aten::(empty|new_empty|fill_|view|_unsafe_view|as_strided|slice|select|expand|alias|t|transpose|permute|"
    r"unsqueeze|squeeze|split|unbind|detach|reshape|lift_fresh|_local_scalar_dense|is_nonzero|item)\b"
)


class _Calls(TorchDispatchMode):
    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("kvevict::"):
            with self:  # what it calls counts
                return getattr(custom_ops, f"_{name.removeprefix('kvevict::')}_op")(*args, **kwargs or {})
        if not FREE.match(name):
            self.names.append(name)
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def launches():
    """A list of what is launched inside the block, in order: names of kernels and of torch's operations."""
    names: list[str] = []
    launch = GridExecutor.__call__

    def launched(self, *args, **options):
        names.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter's own copies
            return launch(self, *args, **options)

    GridExecutor.__call__ = launched
    try:
        with _Calls(names):
            yield names
    finally:
        GridExecutor.__call__ = launch
