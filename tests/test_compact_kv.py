"""Compaction: what moves, what stays, in place and out of place, in order and with the fewest moves."""

import itertools

import pytest
import torch
from cases import as_bytes, assert_same, both, cache, copy_of, crossed, name
from conftest import DEVICE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvevict
from kvevict.backends import reference, triton
from kvevict.kernels import compact_kv
from kvevict.kernels.launch_config import FillConfig, cdiv, move_config

SHAPES = [(2, 3, 517, 64, 64), (1, 2, 100, 80, 96), (1, 1, 1, 128, 128), (1, 1, 70, 576, 512), (2, 1, 300, 128, 256),
          (1, 2, 45, 5, 3)]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def kept(B, H, S, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(S, generator=generator)[:n].sort()[0] for _ in range(B * H)]
    return torch.stack(rows).reshape(B, H, n).to(DEVICE)


@pytest.mark.parametrize("preserve_order", [True, False], ids=["ordered", "fewest-moves"])
@pytest.mark.parametrize("inplace", [True, False], ids=["in-place", "copy"])
@pytest.mark.parametrize("shape, dtype, layout", crossed(SHAPES, DTYPES, ["BHSD", "BSHD", "sliced"]))
def test_slot_j_holds_the_token_it_names(shape, dtype, layout, inplace, preserve_order):
    keys, values = cache(shape, dtype, layout)
    B, H, S = shape[:3]
    indices = kept(B, H, S, max(S // 2, 1))

    def run():
        k, v = copy_of(keys), copy_of(values)
        result = kvevict.compact(k, v, indices, inplace=inplace, preserve_order=preserve_order)
        if inplace:
            assert result.keys.data_ptr() == k.data_ptr() and result.values.data_ptr() == v.data_ptr()
        else:
            assert torch.equal(as_bytes(k), as_bytes(keys)) and torch.equal(as_bytes(v), as_bytes(values))
        return result

    reference, kernel = both(run)
    assert_same(kernel, reference)
    slots = kernel.indices
    if preserve_order:
        assert torch.equal(slots, indices)
    else:
        assert torch.equal(slots.sort(-1)[0], indices)
        n = indices.shape[2]
        stay = (indices < n).sum(-1)
        assert torch.equal((slots == torch.arange(n, device=DEVICE)).sum(-1), stay)  # no row moved in vain
    for rows, old in ((kernel.keys, keys), (kernel.values, values)):
        expected = as_bytes(old).gather(2, slots[..., None].expand(-1, -1, -1, old.shape[3]))
        assert torch.equal(as_bytes(rows), expected)


def test_by_hand_fewest_moves():
    keys = torch.arange(8.0, device=DEVICE).reshape(1, 1, 8, 1)
    indices = torch.tensor([[[1, 4, 6, 7]]], device=DEVICE)
    for result in both(lambda: kvevict.compact(keys.clone(), -keys, indices, preserve_order=False)):
        assert result.indices.tolist() == [[[4, 1, 6, 7]]]  # holes 0, 2, 3 are filled in order
        assert result.keys.flatten().tolist() == [4, 1, 6, 7]
        assert result.values.flatten().tolist() == [-4, -1, -6, -7]


def test_padding():
    keys = torch.arange(1.0, 7.0, device=DEVICE).reshape(2, 1, 3, 1)
    indices = torch.tensor([[[0, 2]], [[2, -1]]], device=DEVICE)
    for result in both(lambda: kvevict.compact(keys, keys.clone(), indices, inplace=False)):
        assert result.keys.flatten().tolist() == [1, 3, 6, 0]
    for result in both(lambda: kvevict.compact(keys.clone(), keys.clone(), indices)):
        assert result.keys.flatten().tolist() == [1, 3, 6, 5]  # the padding slot is as it was
    for result in both(lambda: kvevict.compact(keys.clone(), keys.clone(), indices, preserve_order=False)):
        assert result.indices.flatten().tolist() == [0, 2, 2, -1]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=name)
def test_quantised_rows_move_too(dtype):
    keys = torch.randint(0, 127, (1, 2, 40, 64), device=DEVICE).to(dtype)
    for result in both(lambda: kvevict.compact(keys.clone(), keys.clone(), kept(1, 2, 40, 9))):
        assert torch.equal(result.keys, keys.gather(2, kept(1, 2, 40, 9)[..., None].expand(-1, -1, -1, 64)))


def test_interleaved_keys_and_values():
    packed = torch.randn(2, 50, 2, 3, 16, device=DEVICE)  # [B, S, (k, v), H, D]
    for result in both(lambda: kvevict.compact(*packed.clone().permute(2, 0, 3, 1, 4), kept(2, 3, 50, 20))):
        expected = packed.permute(2, 0, 3, 1, 4)[1].gather(2, kept(2, 3, 50, 20)[..., None].expand(-1, -1, -1, 16))
        assert torch.equal(result.values, expected)


def test_rows_beyond_the_kept_ones_and_other_memory_stay():
    keys, values = cache((2, 2, 64, 16, 16), layout="sliced")
    base = keys._base.clone()
    for _ in both(lambda: kvevict.compact(keys, values, kept(2, 2, 64, 20))):
        inside = torch.zeros_like(base, dtype=torch.bool)
        inside[:, 1:, 2:22, 8:24] = True
        assert torch.equal(keys._base[~inside], base[~inside])
        keys._base.copy_(base)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_multiset_of_rows_survives(data):
    S = data.draw(st.integers(1, 300))
    chosen = sorted(data.draw(st.sets(st.integers(0, S - 1), min_size=1)))
    indices = torch.tensor(chosen, device=DEVICE)[None, None]
    keys, values = cache((1, 1, S, 8, 16), seed=S)
    for preserve_order in (True, False):
        for inplace in (True, False):

            def run(inplace=inplace, preserve_order=preserve_order):
                k, v = keys.clone(), values.clone()
                return kvevict.compact(k, v, indices, inplace=inplace, preserve_order=preserve_order)

            reference, kernel = both(run)
            assert_same(kernel, reference)
            assert sorted(kernel.indices.flatten().tolist()) == chosen
            assert torch.equal(kernel.values, values[:, :, kernel.indices[0, 0]])


def pages_of(table, block_size, D, dtype=torch.float32, heads=1, seed=0):
    """A paged cache [blocks, heads, block_size, D] of random rows, two blocks larger than the table needs."""
    blocks = int(table.max()) + 3
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(blocks, block_size, heads, D, generator=generator).to(dtype).to(DEVICE)
    return rows.transpose(1, 2)


def table_of(*shape):
    """Block numbers in no order, each once."""
    numbers = torch.randperm(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(1))
    return numbers.view(shape).int().to(DEVICE)


def page(cache, table, b, h, t):
    """The row of token t, found as the layout says."""
    block_size = cache.shape[2]
    if table.ndim == 3:
        return cache[table[b, h, t // block_size], 0, t % block_size]
    return cache[table[b, t // block_size], h, t % block_size]


backends = pytest.mark.parametrize("backend", [reference, triton], ids=["reference", "triton"])


@backends
@pytest.mark.parametrize("per_head", [False, True], ids=["table-per-request", "table-per-head"])
@pytest.mark.parametrize("from_end", [False, True], ids=["front", "tail"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "fewest-moves"])
def test_paged_rows_move_with_their_scales(backend, ordered, from_end, per_head):
    B, H, block_size, n = 2, 3, 4, 9
    table = table_of(B, H, 5) if per_head else table_of(B, 5)
    cache_of = {name: pages_of(table, block_size, D, dtype, heads=1 if per_head else H, seed=D) for name, D, dtype in (
        ("keys", 24, torch.float8_e4m3fn), ("values", 16, torch.float8_e4m3fn),
        ("key_scales", 1, torch.float32), ("value_scales", 1, torch.float32),
    )}  # fmt: skip
    lengths = torch.tensor([18, 15], dtype=torch.int32, device=DEVICE)
    slots = kept(B, H, 15, n)
    slots[1, 2, 7:] = -1
    if not ordered:
        holes = torch.empty_like(slots)
        backend.fill_holes(slots, holes)
        slots = holes
    old = {name: rows.clone() for name, rows in cache_of.items()}
    ends = lengths[:, None].expand(B, H).contiguous() if per_head else lengths
    backend.move_rows(
        cache_of["keys"], cache_of["values"], slots, ordered, table, ends if from_end else None, None,
        cache_of["key_scales"], cache_of["value_scales"],
    )  # fmt: skip
    for part, rows in cache_of.items():
        expected = as_bytes(old[part]).clone()
        for b in range(B):
            for h in range(H):
                for j, source in enumerate(slots[b, h].tolist()):
                    if source >= 0:
                        last = int(lengths[b]) - 1
                        to, of = (last - j, last - source) if from_end else (j, source)
                        page(expected, table, b, h, to).copy_(as_bytes(page(old[part], table, b, h, of)))
        assert torch.equal(as_bytes(rows), expected), part


@backends
@pytest.mark.parametrize("target", ["dense", "table-per-request", "table-per-head"])
@pytest.mark.parametrize("source", ["dense", "table-per-request", "table-per-head"])
def test_rows_move_between_layouts(backend, source, target):
    B, H, S, n, D, DV, block_size = 2, 3, 20, 11, 24, 5, 4

    def layout(kind, tokens, width, seed):
        if kind == "dense":
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(B, H, tokens, width, generator=generator).to(DEVICE), None
        per_head = kind == "table-per-head"
        table = table_of(B, H, -(-tokens // block_size)) if per_head else table_of(B, -(-tokens // block_size))
        return pages_of(table, block_size, width, heads=1 if per_head else H, seed=seed), table

    def row(rows, table, b, h, t):
        return rows[b, h, t] if table is None else page(rows, table, b, h, t)

    (keys, table), (values, _) = layout(source, S, D, 0), layout(source, S, DV, 1)
    (new_keys, new_table), (new_values, _) = layout(target, n, D, 2), layout(target, n, DV, 3)
    slots = kept(B, H, S, n)
    slots[0, 1, 6:] = -1
    before = [new_keys.clone(), new_values.clone()]
    if new_table is not None and new_table.ndim == 3:
        new_table[0, 1, 2:] = -1  # no block where nothing is written
    backend.copy_rows(keys, values, slots, new_keys, new_values, table, new_table)
    for rows, new, expected in ((keys, new_keys, before[0]), (values, new_values, before[1])):
        for b in range(B):
            for h in range(H):
                for j, t in enumerate(slots[b, h].tolist()):
                    if t >= 0:
                        row(expected, new_table, b, h, j).copy_(row(rows, table, b, h, t))
                    elif new_table is None:
                        expected[b, h, j] = 0
        assert torch.equal(new, expected)


def test_flags_are_the_callers():
    keys, values = cache((2, 2, 64, 16, 16))
    slots = kept(2, 2, 64, 40)
    flags = torch.zeros(triton.move_flags(slots, keys, values), dtype=torch.int32, device=DEVICE)
    expected = keys.gather(2, slots[..., None].expand(-1, -1, -1, 16))
    triton.move_rows(keys, values, slots, True, flags=flags)
    assert torch.equal(keys[:, :, :40], expected)
    assert flags.any()
    unchanged = keys.clone()
    with pytest.raises(ValueError, match="flags has .* elements: expected"):
        triton.move_rows(keys, values, slots, True, flags=flags[:-1])
    assert torch.equal(keys, unchanged)


def test_flags_are_enough_on_every_device():
    slots = torch.empty(2, 3, 1000, dtype=torch.int64)
    for D, DV, dtype in itertools.product(
        (3, 64, 128, 576), (5, 128, 512), (torch.uint8, torch.float16, torch.float32)
    ):
        flags = triton.move_flags(slots, *(torch.empty(1, 1, 1, width, dtype=dtype) for width in (D, DV)))
        for device, access in itertools.product(("cuda", "hip"), (1, 2, 4, 8, 16)):
            rows = move_config(D, DV, dtype.itemsize, access, True, device).block_rows
            assert flags >= 1 + 2 * 3 * cdiv(1000, rows)


@pytest.mark.parametrize("n", [1, 256, 257, 700])
@pytest.mark.parametrize("chunk", [256, 512, 1024])
def test_runs_of_blocks_fill_the_same_holes(n, chunk, monkeypatch):
    """However a row is cut, and where its padding begins: nowhere, at once, inside a run, at its edge."""
    monkeypatch.setattr(compact_kv, "fill_config", lambda *_: FillConfig(chunk))
    indices = kept(2, 2, 900, n)
    for row, valid in zip(indices.view(4, n), (n, 0, n // 2, min(256, n)), strict=True):
        row[valid:] = -1
    found = [torch.empty_like(indices) for _ in range(2)]
    reference.fill_holes(indices, found[0])
    triton.fill_holes(indices, found[1])
    assert torch.equal(*found)
