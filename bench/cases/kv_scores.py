"""The learned scorer on keys before RoPE and values; and KeyDiff on keys before RoPE."""

import torch
import torch.nn.functional as F

import kvevict
from bench.case import Case, compiled
from bench.cases import keydiff_scores
from kvevict.traffic import KvScores


def angles(point, device):
    """RoPE's, as Llama has them."""
    return 10_000.0 ** -(torch.arange(0, point.D, 2, device=device) / point.D)


def before_rope(point, keys, inv_freq):
    keys = keys.bfloat16() if point.dtype == "float8" else keys
    angle = torch.arange(point.S, device=keys.device)[:, None] * inv_freq
    x, y = keys.float().chunk(2, -1)
    return torch.cat([x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()], -1)


def inputs(point, device):
    weights = torch.randn(point.H, 2 * point.D + 4, device=device)
    return *point.cache(device), weights, angles(point, device)


def eager(point, keys, values, weights, inv_freq):
    keys = before_rope(point, keys, inv_freq)
    values = values.float()
    mean = F.normalize(keys, dim=-1).mean(2, keepdim=True)
    cosine = F.cosine_similarity(keys, mean, dim=-1)[..., None]
    log_norms = [x.norm(dim=-1, keepdim=True).log() for x in (keys, values)]
    features = torch.cat([keys, values, *log_norms, cosine, torch.ones_like(cosine)], -1)
    return torch.einsum("bhsf,hf->bhs", features, weights)


CASE = Case(
    "kv_scores",
    inputs=inputs,
    run=lambda point, keys, values, weights, inv_freq: kvevict.kv_scores(keys, values, weights, inv_freq=inv_freq),
    floor=lambda point, result: KvScores(point.B * point.H, point.S, point.D, point.element_size, point.D),
    gate=lambda point: 1.25,  # the partial anchors, which every program of a row reads from L2: at most half of K
    varies=("D", "B", "dtype"),
    peers={"eager torch": eager, "torch.compile": compiled(eager)},
)


def eager_keydiff(point, keys, inv_freq):
    return keydiff_scores.eager(point, before_rope(point, keys, inv_freq))


BEFORE_ROPE = Case(
    "keydiff_scores, before RoPE",
    inputs=lambda point, device: (point.cache(device)[0], angles(point, device)),
    run=lambda point, keys, inv_freq: kvevict.keydiff_scores(keys, inv_freq=inv_freq),
    floor=keydiff_scores.CASE.floor,
    gate=lambda point: 1.3,  # as that of KeyDiff
    varies=("D", "B", "dtype"),
    peers={"eager torch": eager_keydiff, "torch.compile": compiled(eager_keydiff)},
)
