"""One decode step over pages whose heads keep unequal numbers of tokens, beside equal heads of the same total."""

import torch

from bench.case import Case, Point
from bench.cases.paged_keydiff_compact import BLOCK
from kvevict.paged import paged_decode_attention
from kvevict.traffic import DecodeAttention


def unequal(point):
    """Tokens of each head, S on average: the first has three times as many, or what two or four heads allow."""
    longest = int(min(3, (point.H + 1) / 2) * point.S) // BLOCK * BLOCK
    rest, blocks = divmod((point.H * point.S - longest) // BLOCK, point.H - 1)
    return [longest, *[BLOCK * (rest + (h < blocks)) for h in range(point.H - 1)]]


def pages(point, lengths, device):
    """(keys, values, table, lengths): blocks in random order, a table for each head."""
    columns = max(lengths) // BLOCK
    blocks = point.B * sum(lengths) // BLOCK
    keys, values = (point.random(blocks, BLOCK, 1, point.D, device=device) for _ in range(2))
    held = torch.tensor(lengths, dtype=torch.int32, device=device).expand(point.B, -1).contiguous()
    used = torch.arange(columns, device=device) * BLOCK < held[..., None]
    table = torch.full(used.shape, -1, dtype=torch.int32, device=device)
    table[used] = torch.randperm(blocks, device=device).int()
    return keys, values, table, held


def inputs(point, device):
    query = point.random(point.B, point.H * point.group, 1, point.D, device=device)
    return query, *pages(point, unequal(point), device), *pages(point, [point.S] * point.H, device)


CASE = Case(
    "paged_decode_attention",
    inputs=inputs,
    run=lambda point, query, *unequal_and_equal: paged_decode_attention(query, *unequal_and_equal[:4]),
    floor=lambda point, result: DecodeAttention(
        point.B * point.H, point.group, point.S, point.D, point.D, point.element_size, tracked=False
    ),
    gate=lambda point: 1.1,  # partial results of the runs, a block's number for each row, the check of the table
    peers={
        "equal heads (ours)": lambda point, query, *unequal_and_equal: paged_decode_attention(
            query, *unequal_and_equal[4:]
        )
    },
    more=lambda on_gpu, quick: (
        [] if on_gpu or quick else [Point(2048, H=8)]
    ),  # where the longest has three times the mean
)
