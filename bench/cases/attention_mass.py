"""Attention mass: of a window of 32 queries at the end, and of the whole prompt (W = S); and far attention, the most
that a key draws from queries at least 32 tokens later."""

import torch

import kvevict
from bench.case import Case, Point, compiled, optional
from kvevict.traffic import WindowMass

FAR = 32  # tokens


def inputs(point, device):
    queries = point.random(point.B, point.H * point.group, point.W, point.D, device=device)
    return queries, point.cache(device)[0]


def eager(point, queries, keys):
    """The attention weights, which exist in full, summed over queries and averaged over the group."""
    keys = keys.repeat_interleave(point.group, dim=1)
    logits = queries @ keys.transpose(-1, -2) * point.D**-0.5
    hidden = torch.ones(point.W, point.S, dtype=torch.bool, device=keys.device).triu(point.S - point.W + 1)
    weights = logits.masked_fill(hidden, float("-inf")).float().softmax(-1)
    return weights.sum(2).unflatten(1, (point.H, point.group)).mean(2) / point.W


def eager_far(point, queries, keys):
    keys = keys.repeat_interleave(point.group, dim=1)
    logits = queries @ keys.transpose(-1, -2) * point.D**-0.5
    distance = torch.arange(point.S - point.W, point.S, device=keys.device)[:, None] - torch.arange(
        point.S, device=keys.device
    )
    weights = logits.masked_fill(distance < 0, float("-inf")).float().softmax(-1).masked_fill(distance < FAR, 0.0)
    return weights.amax(2).unflatten(1, (point.H, point.group)).amax(2)


def colreduce(module):
    def run(point, queries, keys):
        keys = keys.repeat_interleave(point.group, dim=1)
        mass = module.flash_colreduce(queries, keys, reduction="mean", is_causal=True)
        return mass.unflatten(1, (point.H, point.group)).mean(2)

    return run


def whole_prompts(on_gpu, quick):
    lengths = [2**k for k in range(13, 17)] if on_gpu else [512]  # two products per weight are slow in the interpreter
    return [Point(S, W=S, H=8 if on_gpu else 2) for S in (lengths[:1] if quick else lengths)]


CASE = Case(
    "attention_mass",
    inputs=inputs,
    run=lambda point, queries, keys: kvevict.attention_mass(queries, keys),
    floor=lambda point, result: WindowMass(
        point.B * point.H, point.group, point.W, point.S, point.D, point.element_size
    ),
    # Every block of 128 keys reads the queries that see it again, from L2: 32 of 4 heads are half as much as the keys
    # of a run, those of a whole prompt of 512 are most of all.
    gate=lambda point: 1.7 if point.W < point.S else 4.2,
    peers={
        "eager attention weights": eager,
        "torch.compile": compiled(eager),
        "flash-colreduce": optional("flash_colreduce", colreduce),
    },
    more=whole_prompts,
)


FAR_CASE = Case(
    "attention_mass, far",
    inputs=inputs,
    run=lambda point, queries, keys: kvevict.attention_mass(queries, keys, reduce="max", min_distance=FAR),
    floor=CASE.floor,
    gate=CASE.gate,
    peers={"eager attention weights": eager_far, "torch.compile": compiled(eager_far)},
    varies=(),
    more=whole_prompts,
)
