"""One decode step that notes the mass of every cached token, against attention that does not."""

import torch
import torch.nn.functional as F

import kvevict
from bench.case import Case
from kvevict.traffic import DecodeAttention


def inputs(point, device):
    query = point.random(point.B, point.H * point.group, 1, point.D, device=device)
    return query, *point.cache(device), torch.zeros(point.B, point.H, point.S, device=device)


def untracked(point, query, keys, values, mass):
    return kvevict.decode_attention(query, keys, values)


def sdpa(point, query, keys, values, mass):
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def flex():
    if not torch.cuda.is_available():
        return "FlexAttention decodes on a GPU only"
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False)
    return lambda point, query, keys, values, mass: attend(query, keys, values, enable_gqa=True)


CASE = Case(
    "decode_attention",
    inputs=inputs,
    run=lambda point, query, keys, values, mass: kvevict.decode_attention(query, keys, values, mass=mass),
    floor=lambda point, result: DecodeAttention(
        point.B * point.H, point.group, point.S, point.D, point.D, point.element_size, tracked=True
    ),
    gate=lambda point: 1.1,  # partial results of the splits
    peers={"without tracking (ours)": untracked, "torch SDPA": sdpa, "FlexAttention": flex()},
)
