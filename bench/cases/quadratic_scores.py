"""What a key draws in the mean from queries of known mean and covariance: Expected Attention's logits."""

import kvevict
from bench.case import Case, compiled
from kvevict.traffic import QuadraticScores


def inputs(point, device):
    heads = point.H * point.group
    keys, linear = point.cache(device)[0], point.random(point.B, heads, point.D, device=device).float()
    factor = point.random(point.B, heads, point.D, point.D, device=device).float() / point.D
    return keys, linear, factor @ factor.mT


def eager(point, keys, linear, quadratic):
    keys = keys.float().repeat_interleave(point.group, dim=1)
    return ((keys @ quadratic + linear[:, :, None]) * keys).sum(-1)


CASE = Case(
    "quadratic_scores",
    inputs=inputs,
    run=lambda point, *tensors: kvevict.ops.quadratic_scores(*tensors),
    floor=lambda point, result: QuadraticScores(point.B * point.H, point.group, point.S, point.D, point.element_size),
    gate=lambda point: 11,  # every block of tokens reads the group's matrices from L2, and its keys for each from L1
    peers={"eager torch": eager, "torch.compile": compiled(eager)},
    varies=("D",),
)
