"""KeyDiff eviction in a paged cache whose blocks lie in random order, beside the dense op on as many tokens."""

import torch

import kvevict
from bench.case import Case
from bench.cases.keydiff_compact import floor
from kvevict.paged import paged_keydiff_compact

BLOCK = 16  # tokens: vLLM's default on a GPU


def inputs(point, device):
    """K and V as [blocks, block_size, heads, D], tables, lengths; and dense K and V."""
    columns = -(-point.S // BLOCK)
    blocks = point.B * columns
    keys, values = (point.random(blocks, BLOCK, point.H, point.D, device=device) for _ in range(2))
    table = torch.randperm(blocks, device=device).view(point.B, columns).int()
    lengths = torch.full((point.B,), point.S, dtype=torch.int32, device=device)
    return keys, values, table, lengths, *point.cache(device)


def dense(point, keys, values, table, lengths, dense_keys, dense_values):
    return kvevict.keydiff_compact(dense_keys, dense_values, keep=point.keep)


def run(point, keys, values, table, lengths, *_):
    return paged_keydiff_compact(keys, values, table, lengths, keep=point.keep).freed_blocks.long()


CASE = Case(
    "paged_keydiff_compact",
    inputs=inputs,
    run=run,
    floor=floor,
    gate=lambda point: 1.45,  # as the dense one, and a table entry per row and access: 4 bytes, from L1
    varies=("keep", "D", "B"),
    peers={"dense (ours)": dense},
)
