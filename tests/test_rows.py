"""A cache as one argument: what is known of its addresses, and that odd layouts are read and written rightly."""

import pytest
import torch
from conftest import DEVICE

from kvevict.backends import reference, triton
from kvevict.kernels.rows import rows_of

HALF, BYTE = torch.bfloat16, torch.uint8


def bytes_of(*shape, dtype=HALF):
    """Random bits, NaN among them: rows move as they are."""
    generator = torch.Generator().manual_seed(sum(shape))
    width = shape[-1] * dtype.itemsize
    return torch.randint(0, 256, (*shape[:-1], width), dtype=BYTE, generator=generator).view(dtype).clone().to(DEVICE)


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def odd_batch_stride(batch):
    """[batch, 2, 20, 64] whose batches are an odd number of elements apart."""
    return bytes_of(2 * 2561).as_strided((batch, 2, 20, 64), (2561, 1280, 64, 1))


# name: a cache [B, H, S, D], and of how many elements its rows' addresses are multiples (16 bytes at most)
CASES = {
    "D128": (lambda: bytes_of(2, 2, 20, 128), 8),
    "D72": (lambda: bytes_of(2, 2, 20, 72), 8),
    "D100": (lambda: bytes_of(2, 2, 20, 100), 4),
    "D5": (lambda: bytes_of(2, 2, 20, 5), 1),
    "float32-D72": (lambda: bytes_of(2, 2, 20, 72, dtype=torch.float32), 4),
    "float8-D72": (lambda: bytes_of(2, 2, 20, 72, dtype=torch.float8_e4m3fn), 8),
    "uint8-D128": (lambda: bytes_of(2, 2, 20, 128, dtype=BYTE), 16),
    "from-element-8": (lambda: bytes_of(2, 2, 20, 80)[..., 8:72], 8),
    "from-element-2": (lambda: bytes_of(2, 2, 20, 80)[..., 2:66], 2),
    "from-element-1": (lambda: bytes_of(2, 2, 20, 80)[..., 1:65], 1),
    "float8-from-element-8": (lambda: bytes_of(2, 2, 20, 80, dtype=torch.float8_e5m2)[..., 8:72], 8),
    "odd-batch-stride": (lambda: odd_batch_stride(2), 1),
    "one-batch-odd-stride": (lambda: odd_batch_stride(1), 8),
    "one-token-odd-stride": (lambda: bytes_of(2, 2, 1, 81)[..., :64].as_strided((2, 2, 1, 64), (128, 64, 81, 1)), 8),
    "all-ones": (lambda: bytes_of(1, 1, 1, 64), 8),
    "expanded": (lambda: bytes_of(2, 1, 20, 64).expand(2, 3, 20, 64), 8),
    "BSHD": (lambda: bytes_of(2, 20, 3, 64).transpose(1, 2), 8),
}
case = pytest.mark.parametrize("name", CASES)


@case
def test_alignment(name):
    make, align = CASES[name]
    x = make()
    rows = rows_of(x)
    assert rows.align.value == align
    assert x.data_ptr() % (align * x.element_size()) == 0
    strides = (rows.stride_b, rows.stride_h, rows.stride_s)
    for ours, stride, size in zip(strides, x.stride(), x.shape, strict=False):
        assert ours * align == stride or size == 1


@case
def test_read_and_written(name):
    """Out of place for every layout; in place where an element has one address."""
    x = CASES[name][0]()
    B, H, S, D = x.shape
    n = max(S // 2, 1)
    generator = torch.Generator().manual_seed(S + D)
    rows = [torch.randperm(S, generator=generator)[:n].sort()[0] for _ in range(B * H)]
    slots = torch.stack(rows).view(B, H, n).to(DEVICE)
    expected = bits(x).clone().gather(2, slots[..., None].expand(B, H, n, D))
    out = [torch.empty((B, H, n, D), dtype=x.dtype, device=DEVICE) for _ in range(2)]
    triton.copy_rows(x, x, slots, *out)
    assert all(torch.equal(bits(y), expected) for y in out)
    if name != "expanded":
        whole = x._base.clone() if x._base is not None else None
        triton.move_rows(x, CASES[name][0](), slots, True)
        assert torch.equal(bits(x)[:, :, :n], expected)
        if whole is not None:  # nothing outside the moved rows is written
            view = bits(whole.as_strided(x.shape, x.stride(), x.storage_offset()))
            view[:, :, :n] = expected
            assert torch.equal(bits(x._base), bits(whole))


def test_a_table_per_head_names_the_head():
    x = bytes_of(7, 16, 1, 64).transpose(1, 2)
    table = torch.zeros(2, 3, 4, dtype=torch.int32, device=DEVICE)
    rows = rows_of(x, table)
    assert (rows.stride_h, rows.table_stride_b >> 1, rows.table_stride_h >> 1) == (0, 12, 4)
    assert rows_of(x, table[:, 0]).table_stride_h >> 1 == 0


def test_backends_agree_on_an_odd_layout():
    x = CASES["from-element-1"][0]()
    slots = torch.tensor([3, 7, 19, -1], device=DEVICE).expand(2, 2, 4).contiguous()
    found = []
    for backend in (reference, triton):
        y = x.clone()
        backend.move_rows(y, x.clone(), slots, True)
        found.append(bits(y))
    assert torch.equal(*found) and not torch.equal(found[0], bits(x))
