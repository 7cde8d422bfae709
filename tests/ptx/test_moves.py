"""The ordered move in place: programs that read and overwrite each other's rows, in many orders.

The order in which programs start and are preempted is random, and 1, 2, 3 or all of them are on the device at once.
"""

import pytest
import torch

from kvevict.backends import reference
from kvevict.backends import triton as kernels

SEEDS = 52
S, n, D = 260, 196, 128  # blocks of 64 rows: 4 programs a head


def rows(seed):
    return torch.randn(1, 1, S, D, generator=torch.Generator().manual_seed(seed)).bfloat16()


def slots(seed):
    """Four patterns in turn: any tokens, a shift by one row, by the most, any tokens and padding."""
    any_tokens = torch.randperm(S, generator=torch.Generator().manual_seed(seed))[:n].sort()[0]
    padded = any_tokens.clone()
    padded[-20:] = -1
    return (any_tokens, torch.arange(1, n + 1), torch.arange(S - n, S), padded)[seed % 4][None, None]


def paged(x, seed):
    """x in blocks of 20 rows, in random order, and the table."""
    order = torch.randperm(S // 20, generator=torch.Generator().manual_seed(seed))
    cache = torch.empty(S // 20, 1, 20, D, dtype=x.dtype)
    cache[order] = x[0].reshape(-1, 1, 20, D)
    return cache, order[None].to(torch.int32)


@pytest.mark.parametrize("resident", [1, 2, 3, None])
@pytest.mark.parametrize(
    "layout",
    ["dense", pytest.param("paged", marks=pytest.mark.slow), pytest.param("paged-to-the-end", marks=pytest.mark.slow)],
)
def test_any_order_of_programs(emulator, layout, resident):
    keys, values, options = rows(1), rows(2), ()
    if layout != "dense":
        (keys, table), (values, _) = paged(keys, 3), paged(values, 3)
        options = (table, torch.tensor([S - 7], dtype=torch.int32)) if layout == "paged-to-the-end" else (table,)
    for seed in range(SEEDS):
        moves = slots(seed)
        if layout == "paged-to-the-end":
            moves = torch.where(moves < S - 7, moves, -1)  # slots count back from the end
        got, expected = [keys.clone(), values.clone()], [keys.clone(), values.clone()]
        with emulator.using(seed=seed, resident=resident) as problems:
            kernels.move_rows(*got, moves, True, *options)
        reference.move_rows(*expected, moves, True, *options)
        assert all(map(torch.equal, got, expected)), f"seed {seed}"
        assert not problems, f"seed {seed}\n{problems}"
