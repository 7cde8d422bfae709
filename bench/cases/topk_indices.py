"""Selection alone, on scores that are already there."""

import torch

import kvevict
from bench.case import Case, optional
from kvevict.traffic import Selection


def inputs(point, device):
    return (torch.randn(point.B, point.H, point.S, device=device),)


def torch_topk(point, scores):
    """Sorted by position, as a cache wants them."""
    return scores.topk(point.n, dim=-1).indices.sort(-1).values


def flashinfer(module):
    def run(point, scores):
        indices = module.top_k(scores.flatten(0, 1), point.n)[1]
        return indices.sort(-1).values.view(point.B, point.H, point.n)

    return run


CASE = Case(
    "topk_indices",
    inputs=inputs,
    run=lambda point, scores: kvevict.topk_indices(scores, point.keep),
    floor=lambda point, result: Selection(point.B * point.H, point.S, point.n),
    # A row of up to 8,192 scores is read twice: to find the key, and to write. A longer one is read five times, from L2
    # after the first, and split rows add a quarter for histograms.
    gate=lambda point: 1.3 * ((8 if point.S <= 8192 else 20) * point.S + 8 * point.n) / (4 * point.S + 8 * point.n),
    varies=("keep", "B"),
    peers={"torch.topk": torch_topk, "flashinfer top_k": optional("flashinfer", flashinfer)},
)
