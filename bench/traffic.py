"""What kernels ask for, counted exactly while they run in Triton's interpreter. The floors are in kvevict.traffic."""

import contextlib
from collections import Counter
from dataclasses import dataclass, field

import torch


@dataclass
class Counted:
    """Bytes read and written, in all and by kernel; launches, and buffers that had to be cleared."""

    bytes: int = 0
    by_kernel: Counter = field(default_factory=Counter)
    launches: int = 0
    fills: int = 0


@contextlib.contextmanager
def counted():
    """Count all loads, stores and atomics, launches and torch.zeros inside the block."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    original = {name: getattr(InterpreterBuilder, name) for name in names}
    launch, zeros = GridExecutor.__call__, torch.zeros
    traffic, running = Counted(), ["?"]

    def count(pointers, elements):
        size = elements * pointers.get_element_ty().primitive_bitwidth // 8
        traffic.bytes += size
        traffic.by_kernel[running[0]] += size

    def load(self, ptrs, mask, *rest, **options):
        count(ptrs, int(mask.data.sum()))
        return original["create_masked_load"](self, ptrs, mask, *rest, **options)

    def store(self, ptrs, value, mask, *rest, **options):
        count(ptrs, int(mask.data.sum()))
        return original["create_masked_store"](self, ptrs, value, mask, *rest, **options)

    def read_modify_write(self, op, ptr, value, mask, *rest):
        count(ptr, 2 * int(mask.data.sum()))
        return original["create_atomic_rmw"](self, op, ptr, value, mask, *rest)

    def compare_and_swap(self, ptr, *rest):
        count(ptr, 2 * ptr.data.size)
        return original["create_atomic_cas"](self, ptr, *rest)

    def launched(self, *args, **options):
        traffic.launches += 1
        running[0] = self.fn.__name__
        return launch(self, *args, **options)

    def filled(*args, **options):
        traffic.fills += 1
        return zeros(*args, **options)

    try:
        for name, counting in zip(names, (load, store, read_modify_write, compare_and_swap), strict=True):
            setattr(InterpreterBuilder, name, counting)
        GridExecutor.__call__, torch.zeros = launched, filled
        yield traffic
    finally:
        for name in names:
            setattr(InterpreterBuilder, name, original[name])
        GridExecutor.__call__, torch.zeros = launch, zeros
