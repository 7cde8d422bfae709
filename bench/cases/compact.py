"""Compaction alone, in place and in order, of tokens that are already chosen."""

import torch

import kvevict
from bench.case import Case
from bench.cases.keydiff_compact import gather
from kvevict.traffic import Compaction


def inputs(point, device):
    scores = torch.randn(point.B, point.H, point.S, device=device)
    return *point.cache(device), scores.topk(point.n).indices.sort(-1).values


def torch_gather(point, keys, values, indices):
    index = indices[..., None].expand(-1, -1, -1, point.D)
    return gather(keys, index), gather(values, index)


def floor(point, result):
    return Compaction(point.B * point.H, point.n, point.n, point.D, point.D, point.element_size)


CASE = Case(
    "compact",
    inputs=inputs,
    run=lambda point, keys, values, indices: kvevict.compact(keys, values, indices),
    floor=floor,
    gate=lambda point: 1.1,  # flags and a search of the indices per block of rows
    varies=("keep", "D", "B", "dtype"),
    peers={"torch gather (into new memory)": torch_gather},
)
