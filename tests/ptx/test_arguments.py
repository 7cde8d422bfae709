"""Kernels' arguments, as Triton passes them."""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

import ptx


class Rows(NamedTuple):
    ptr: torch.Tensor
    stride: int
    table: torch.Tensor | None


@triton.jit
def row_of(rows, row):
    """The place of a row, through the table where there is one."""
    if rows.table is None:
        place = row
    else:
        place = tl.load(rows.table + row)
    return rows.ptr + place * rows.stride


@triton.jit
def copy_kernel(source, pair, n, scale, flag, D: tl.constexpr = 8):
    """Row by row, from source to both tensors of pair, whose second member is a tuple itself."""
    columns = tl.arange(0, D)
    x = tl.load(row_of(source, tl.program_id(0)) + columns)
    if flag:
        x = x * scale
    tl.store(row_of(pair[0], tl.program_id(0)) + columns, x)
    tl.store(pair[1][0] + tl.program_id(0) * D + columns, x, mask=columns < n)


@pytest.mark.parametrize("tables", ["neither", "source", "both"])
@pytest.mark.parametrize("stride", [8, 16, 1])
def test_tuples_of_tensors_numbers_and_none(tables, stride):
    """A None folds away, and so does a 1; what is left comes in order."""
    order = torch.randperm(4, dtype=torch.int32)
    x = torch.arange(64, dtype=torch.float32)
    first, second = torch.zeros(64), torch.zeros(4, 8)
    source = Rows(x, stride, order if tables != "neither" else None)
    target = Rows(first, 16, order if tables == "both" else None)
    copy_kernel[(4,)](source, (target, (second,)), 5, 0.5, tables == "both")
    places = order.long() if tables != "neither" else torch.arange(4)
    expected = torch.stack([x[p * stride : p * stride + 8] for p in places]) * (0.5 if tables == "both" else 1.0)
    assert torch.equal(first.reshape(4, 16)[order.long() if tables == "both" else slice(None), :8], expected)
    assert torch.equal(second[:, :5], expected[:, :5]) and not second[:, 5:].any()


@triton.jit
def grid_kernel(out, D: tl.constexpr):
    place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out + place, tl.program_id(0) + 10 * tl.program_id(1) + 100 * tl.program_id(2) + 1000 * D)


def test_a_grid_of_three_dimensions_that_depends_on_the_arguments():
    out = torch.zeros(2, 3, 4, dtype=torch.int32)
    grid_kernel[lambda arguments: (arguments["D"], 3, 2)](out, D=4)
    for z in range(2):
        for y in range(3):
            assert out[z, y].tolist() == [4000 + x + 10 * y + 100 * z for x in range(4)]


@triton.jit
def store_kernel(out, n, value):
    offsets = tl.arange(0, 64)
    tl.store(out + offsets, value, mask=offsets < n)


@pytest.mark.parametrize("value", [-7, 2**40, -(2**40), True])
def test_numbers(value):
    out = torch.zeros(64, dtype=torch.int64)
    store_kernel[(1,)](out, 60, value)
    assert out.tolist() == [int(value)] * 60 + [0] * 4


def test_a_wrong_mask_is_out_of_bounds():
    """The message names the argument and the line of the kernel."""
    with pytest.raises(ptx.EmulationError, match=r"outside every tensor.*of out of 240 bytes(.|\n)*test_arguments.py"):
        store_kernel[(1,)](torch.zeros(60, dtype=torch.int32), 64, 1)


def test_one_emulator_in_a_process():
    with pytest.raises(RuntimeError, match="already"):
        ptx.install("sm_80")
