"""Key norms."""

import kvevict
from bench.case import Case, compiled
from kvevict.traffic import KeyNorms


def eager(point, keys):
    keys = keys.bfloat16() if point.dtype == "float8" else keys
    return -keys.norm(dim=-1)


CASE = Case(
    "key_norm_scores",
    inputs=lambda point, device: point.cache(device)[:1],
    run=lambda point, keys: kvevict.key_norm_scores(keys),
    floor=lambda point, result: KeyNorms(point.B * point.H, point.S, point.D, point.element_size),
    gate=lambda point: 1.01,
    varies=("D", "B", "dtype"),
    peers={"eager torch": eager, "torch.compile": compiled(eager)},
)
