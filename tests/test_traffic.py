"""The bytes that keydiff_compact asks for, counted exactly in Triton's interpreter, against the floor."""

import contextlib

import pytest
import torch
from conftest import HAS_GPU

import kvevict

pytestmark = pytest.mark.skipif(HAS_GPU, reason="counts in Triton's interpreter")


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


@pytest.mark.parametrize("preserve_order", [True, False], ids=["ordered", "fewest-moves"])
@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_keydiff_compact_moves_what_it_must(keep, preserve_order):
    S, D, H, e = 8192, 128, 2, 2
    keys, values = (torch.randn(1, H, S, D, dtype=torch.bfloat16) for _ in range(2))
    before = keys.clone()
    with kvevict.backend("triton"), counted() as traffic:
        result = kvevict.keydiff_compact(keys, values, keep=keep, preserve_order=preserve_order)
    n = result.keys.shape[2]
    if preserve_order:
        moved = n
    else:
        moved = int((result.indices[0] != torch.arange(n)).sum()) / H
    per_head = traffic["bytes"] / H
    assert per_head <= 1.05 * (2 * S + 4 * moved) * D * e + 24 * S
    assert per_head >= (2 * S + 3 * moved) * D * e  # the counter counts: this much cannot be saved
    assert not torch.equal(before[:, :, :n], result.keys)
