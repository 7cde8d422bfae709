"""The most attention that a window of 32 queries gives a token and its four neighbours: DefensiveKV's."""

import torch
import torch.nn.functional as F

import kvevict
from bench.case import Case, compiled
from bench.cases.attention_mass import inputs
from kvevict.traffic import AttentionPeaks

POOL = 5


def eager(point, queries, keys):
    """The attention weights, which exist in full."""
    keys, n = keys.repeat_interleave(point.group, dim=1), point.S - point.W
    hidden = torch.ones(point.W, point.S, dtype=torch.bool, device=keys.device).triu(n + 1)
    logits = (queries @ keys.mT * point.D**-0.5).masked_fill(hidden, float("-inf"))
    weights = logits.float().softmax(-1)[..., :n]
    pooled = F.avg_pool1d(weights.flatten(0, 1), POOL, 1, POOL // 2).view_as(weights)
    pooled = pooled * (weights.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True))
    most = pooled.amax(2).unflatten(1, (point.H, point.group)).amax(2)
    return F.pad(most, (0, point.W), value=float("-inf"))


CASE = Case(
    "attention_peaks",
    inputs=inputs,
    run=lambda point, queries, keys: kvevict.attention_peaks(queries, keys, POOL),
    floor=lambda point, result: AttentionPeaks(
        point.B * point.H, point.group, point.W, point.S, point.D, point.element_size
    ),
    # A third pass; 32 of 4 heads are as much as the keys of a block, which reads them in each pass from L2; and the
    # neighbours' keys, and those queries once for each of the five, from L1.
    gate=lambda point: 15.5,
    peers={"eager torch": eager, "torch.compile": compiled(eager)},
    varies=(),
)
