"""Compaction: what moves, what stays, in place and out of place, in order and with the fewest moves."""

import pytest
import torch
from cases import as_bytes, assert_same, both, cache, copy_of, name
from conftest import DEVICE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvevict

SHAPES = [(2, 3, 517, 64, 64), (1, 2, 100, 80, 96), (1, 1, 1, 128, 128), (1, 1, 70, 576, 512), (2, 1, 300, 128, 256),
          (1, 2, 45, 5, 3)]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def kept(B, H, S, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(S, generator=generator)[:n].sort()[0] for _ in range(B * H)]
    return torch.stack(rows).reshape(B, H, n).to(DEVICE)


@pytest.mark.parametrize("preserve_order", [True, False], ids=["ordered", "fewest-moves"])
@pytest.mark.parametrize("inplace", [True, False], ids=["in-place", "copy"])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
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
