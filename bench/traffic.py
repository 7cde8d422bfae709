"""Bytes and operations: what an op must move, and what its kernels ask for."""

import contextlib
from dataclasses import dataclass


@dataclass(frozen=True)
class KeydiffCompact:
    """The floor of `keydiff_compact` in two passes: `heads` heads of S keys and values, `moved` rows moved in each."""

    heads: int
    S: int
    D: int
    element_size: int
    moved: float

    @property
    def bytes(self) -> float:
        """K read twice; the moved rows of K and V read and written."""
        return self.heads * (2 * self.S + 4 * self.moved) * self.D * self.element_size

    @property
    def operations(self) -> float:
        """Per key and dimension: a square and a sum, a scale and a sum (anchor); a square and a dot product (score)."""
        return self.heads * 8 * self.S * self.D


@dataclass(frozen=True)
class WindowMass:
    """The floor of `attention_mass` for a window of W queries, without a given LSE: two passes over K."""

    heads: int  # KV heads
    group: int
    W: int
    S: int
    D: int
    element_size: int

    @property
    def bytes(self) -> float:
        """K read twice, the window's queries once, the mass written."""
        return self.heads * ((2 * self.S + self.group * self.W) * self.D * self.element_size + 4 * self.S)

    @property
    def operations(self) -> float:
        """Two products of queries and keys, and an exponential and a sum per weight in each pass."""
        return self.heads * self.group * self.W * self.S * (4 * self.D + 4)


@dataclass(frozen=True)
class DecodeAttention:
    """The floor of `decode_attention`; tracked: with mass and last_used."""

    heads: int  # KV heads
    group: int
    S: int
    D: int
    DV: int
    element_size: int
    tracked: bool

    @property
    def bytes(self) -> float:
        """K and V read once; to track, the logits written and read, mass read and written."""
        track = (8 * self.group + 8) * self.S if self.tracked else 0
        return self.heads * (self.S * (self.D + self.DV) * self.element_size + track)

    @property
    def operations(self) -> float:
        return self.heads * self.group * self.S * 2 * (self.D + self.DV)


@contextlib.contextmanager
def counted():
    """Bytes of all loads, stores and atomics (read and written) inside the block."""
    from triton.runtime.interpreter import InterpreterBuilder

    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    original = {name: getattr(InterpreterBuilder, name) for name in names}
    traffic = {"bytes": 0}

    def element(pointers):
        return pointers.get_element_ty().primitive_bitwidth // 8

    def load(self, ptrs, mask, *rest, **options):
        traffic["bytes"] += int(mask.data.sum()) * element(ptrs)
        return original["create_masked_load"](self, ptrs, mask, *rest, **options)

    def store(self, ptrs, value, mask, *rest, **options):
        traffic["bytes"] += int(mask.data.sum()) * element(ptrs)
        return original["create_masked_store"](self, ptrs, value, mask, *rest, **options)

    def read_modify_write(self, op, ptr, value, mask, *rest):
        traffic["bytes"] += 2 * int(mask.data.sum()) * element(ptr)
        return original["create_atomic_rmw"](self, op, ptr, value, mask, *rest)

    def compare_and_swap(self, ptr, *rest):
        traffic["bytes"] += 2 * ptr.data.size * element(ptr)
        return original["create_atomic_cas"](self, ptr, *rest)

    try:
        for name, counting in zip(names, (load, store, read_modify_write, compare_and_swap), strict=True):
            setattr(InterpreterBuilder, name, counting)
        yield traffic
    finally:
        for name in names:
            setattr(InterpreterBuilder, name, original[name])
