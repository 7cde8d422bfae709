"""The learned scorer on hidden states of width 32 × head_dim."""

import torch

import kvevict
from bench.case import Case, compiled
from kvevict.traffic import MlpScores


def width(point):
    """M: a model of 4,096 with heads of 128; less in the interpreter."""
    return (32 if torch.cuda.is_available() else 2) * point.D


def inputs(point, device):
    M = width(point)
    shapes = ((point.B, point.S, M), (M // 2, M), (M // 2,), (1, M // 2), (1,))
    return tuple(point.random(*shape, device=device) / (M**0.5 if shape[-1] == M else 1) for shape in shapes)


def eager(point, hidden, w1, b1, w2, b2):
    return ((hidden @ w1.T + b1).relu() @ w2.T + b2).sigmoid()[..., 0]


CASE = Case(
    "mlp_scores",
    inputs=inputs,
    run=lambda point, *tensors: kvevict.mlp_scores(*tensors),
    floor=lambda point, result: MlpScores(point.B * point.S, width(point), width(point) // 2, point.element_size),
    gate=lambda point: 6,  # every block of tokens reads the weights again, from L2
    peers={"eager torch": eager, "torch.compile": compiled(eager)},
    varies=(),
)
