"""KeyDiff scores alone."""

import torch.nn.functional as F

import kvevict
from bench.case import Case, compiled
from kvevict.traffic import KeydiffScores


def eager(point, keys):
    keys = keys.bfloat16() if point.dtype == "float8" else keys
    anchor = F.normalize(keys, p=2, dim=-1).mean(dim=2, keepdim=True)
    return -F.cosine_similarity(keys, anchor, dim=-1)


CASE = Case(
    "keydiff_scores",
    inputs=lambda point, device: point.cache(device)[:1],
    run=lambda point, keys: kvevict.keydiff_scores(keys),
    floor=lambda point, result: KeydiffScores(point.B * point.H, point.S, point.D, point.element_size),
    gate=lambda point: 1.1,  # the anchor's sums, to which every program of a row adds in L2
    varies=("D", "B", "dtype"),
    peers={"eager torch": eager, "torch.compile": compiled(eager)},
)
