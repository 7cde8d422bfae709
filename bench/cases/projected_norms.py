"""What a value can add to the residual stream: the norm of W_O v."""

import torch

import kvevict
from bench.case import Case, compiled
from kvevict.traffic import ProjectedNorms


def width(point):
    """M, of the residual stream: what the query heads have together; less in the interpreter."""
    return (point.H * point.group if torch.cuda.is_available() else 2) * point.D


def inputs(point, device):
    return point.cache(device)[1], point.random(width(point), point.H * point.group * point.D, device=device)


def eager(point, values, weight):
    matrices = weight.unflatten(1, (point.H, point.group, point.D)).movedim(0, -1)  # [H, G, Dv, M]
    return (values[:, :, None] @ matrices).float().abs().sum(-1).mean(2)


CASE = Case(
    "projected_norms",
    inputs=inputs,
    run=lambda point, values, weight: kvevict.ops.projected_norms(values, weight),
    floor=lambda point, result: ProjectedNorms(
        point.B * point.H, point.group, point.S, point.D, width(point), point.element_size
    ),
    gate=lambda point: 9,  # every block of tokens reads the group's part of W_O again, from L2
    peers={"eager torch": eager, "torch.compile": compiled(eager)},
    varies=(),
)
