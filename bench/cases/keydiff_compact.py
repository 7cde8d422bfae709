"""KeyDiff eviction in one call, against the same formula as kvpress writes it in torch."""

import torch
import torch.nn.functional as F

import kvevict
from bench.case import Case, compiled
from kvevict.traffic import KeydiffCompact


def eager(point, keys, values):
    keys, original = (keys.bfloat16(), keys) if point.dtype == "float8" else (keys, keys)  # torch computes no float8
    anchor = F.normalize(keys, p=2, dim=-1).mean(dim=2, keepdim=True)
    scores = -F.cosine_similarity(keys, anchor, dim=-1)
    index = scores.topk(point.n, dim=-1).indices[..., None].expand(-1, -1, -1, point.D)
    return gather(original, index), gather(values, index)


def gather(rows, index):
    return (
        rows.view(torch.uint8).gather(2, index).view(rows.dtype) if rows.element_size() == 1 else rows.gather(2, index)
    )


def floor(point, result):
    return KeydiffCompact(point.B * point.H, point.S, point.D, point.element_size, point.n)


CASE = Case(
    "keydiff_compact",
    inputs=lambda point, device: point.cache(device),
    run=lambda point, keys, values: kvevict.keydiff_compact(keys, values, keep=point.keep),
    floor=floor,
    # Beside K and V: scores written once and read five times, indices written and read, 36 bytes a token at most,
    # against 2·D·e = 256 for the first pass at D = 64 in bf16; and the partial anchors, from L2, at most half of K.
    gate=lambda point: 1.4,
    varies=("keep", "D", "B", "dtype"),
    peers={"eager torch": eager, "torch.compile": compiled(eager)},
)


def moved(point, result):
    stayed = (result.indices == torch.arange(point.n, device=result.indices.device)).sum()
    rows = point.n - stayed.item() / (point.B * point.H)
    return KeydiffCompact(point.B * point.H, point.S, point.D, point.element_size, rows)


FEWEST_MOVES = Case(
    "keydiff_compact, fewest moves",
    inputs=CASE.inputs,
    run=lambda point, keys, values: kvevict.keydiff_compact(keys, values, keep=point.keep, preserve_order=False),
    floor=moved,
    gate=lambda point: 1.5,  # as above, and slots written and read
    varies=("keep",),
    peers=CASE.peers,
)
