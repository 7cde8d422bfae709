"""How a transformers model turns its keys: RoPE's frequencies, for policies that look at keys before it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from kvevict.policies.rotary import before_rope

STATIC = ("default", "linear", "llama3")  # kinds of RoPE whose frequencies do not change with the text's length


def inv_freq(model: Any) -> Tensor:
    """[R/2] float32: the angles by which a position turns the keys of the layers with full attention.

    Raises:
        ValueError: they are not known, change with the length, or turn other pairs than j and j + R/2: seen by turning
            random keys with the model's own function.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("full_attention", parameters).get("rope_type", "default")
    rotary = next((module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")), None)
    found = getattr(rotary, "full_attention_inv_freq", getattr(rotary, "inv_freq", None))
    if kind not in STATIC or found is None:
        raise ValueError(f"{name} has RoPE of the kind {kind!r}: expected one of {STATIC}, with inv_freq")
    frequencies = found.detach().float()
    turn = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        raise ValueError(f"{name} has no apply_rotary_pos_emb: expected RoPE as Llama has it")
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 5, D, generator=generator).to(frequencies.device)
    angle = torch.arange(5, device=keys.device)[:, None] * torch.cat([frequencies, frequencies])
    turned = turn(keys, keys, angle.cos()[None], angle.sin()[None])[1]
    if not torch.allclose(before_rope(turned, frequencies), keys, atol=1e-4):
        raise ValueError(f"{name} turns other pairs of elements than j and j + R/2: expected RoPE as Llama has it")
    return frequencies
