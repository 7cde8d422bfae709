"""How a transformers model turns its keys: RoPE's frequencies, for policies that look at keys before it."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvevict.policies.rotary import before_rope

STATIC = ("default", "linear", "llama3")  # kinds of RoPE whose frequencies do not change with the text's length
TURN = "apply_rotary_pos_emb"
PROBE = 8  # tokens that a model reads once, to see how it turns their keys

_known: Any = weakref.WeakKeyDictionary()  # a model is looked at once


def inv_freq(model: Any) -> Tensor:
    """[R/2] float32: the angles by which a position turns the keys of the layers with full attention.

    The model reads a few tokens, once: what its layers cache must be what its own rotation has made, by these angles.

    Raises:
        ValueError: they are not known, change with the length, or turn other pairs than j and j + R/2; a layer caches
            keys that are not turned, or are changed after it.
    """
    if model not in _known:
        frequencies = _stated(model)
        _check(model, frequencies)
        _known[model] = frequencies
    return _known[model]


def _stated(model: Any) -> Tensor:
    """By the model's own module."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("full_attention", parameters).get("rope_type", "default")
    text = model.get_decoder() if hasattr(model, "get_decoder") else model  # the towers of other senses have theirs
    rotary = next((module for module in text.modules() if type(module).__name__.endswith("RotaryEmbedding")), None)
    found = getattr(rotary, "full_attention_inv_freq", getattr(rotary, "inv_freq", None))
    if found is None:
        raise ValueError(f"{name} has no module that knows RoPE's angles (inv_freq): expected a model with RoPE")
    if kind not in STATIC:
        raise ValueError(f"{name} has RoPE of the kind {kind!r}: expected one of {STATIC}")
    return found.detach().float()


@torch.no_grad()
def _check(model: Any, frequencies: Tensor) -> None:
    name = type(model).__name__
    turns: list[tuple[Tensor, Tensor]] = []  # keys (and queries) before and after
    patched = []
    for source in {type(module).__module__ for module in model.modules()}:
        own = getattr(sys.modules[source], TURN, None)
        if own is not None:
            patched.append((sys.modules[source], own))
            setattr(sys.modules[source], TURN, _noting(own, turns))
    try:
        cache = DynamicCache(config=model.config)
        device = model.get_input_embeddings().weight.device
        ids = torch.arange(PROBE, device=device)[None] % model.get_input_embeddings().weight.shape[0]
        positions = 37 * torch.arange(PROBE, device=device)[None]
        model(ids, position_ids=positions, past_key_values=cache)
    finally:
        for module, own in patched:
            setattr(module, TURN, own)
    for i, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        if type(layer) is DynamicLayer and keys is not None:
            _check_layer(f"layer {i} of {name}", keys, positions, frequencies, turns)


def _noting(own: Any, turns: list[tuple[Tensor, Tensor]]):
    def turn(*arguments, **options):
        results = own(*arguments, **options)
        turns.extend(zip(arguments, results if isinstance(results, tuple) else (results,), strict=False))
        return results

    return turn


def _check_layer(layer: str, keys: Tensor, positions: Tensor, frequencies: Tensor, turns) -> None:
    for before, after in turns:
        for x, turned in ((before, after), (before.transpose(1, 2), after.transpose(1, 2))):
            if turned.shape[:3] == keys.shape[:3] and torch.equal(turned, keys[..., : turned.shape[3]]):
                back = before_rope(keys.float(), frequencies.to(keys.device), positions.to(keys.device))
                error = (back[..., : x.shape[3]] - x.float()).abs().max()
                if error > 16 * torch.finfo(keys.dtype).eps * x.abs().max() + 1e-4 * x.abs().max():
                    raise ValueError(f"{layer} turns other pairs of elements than j and j + R/2, or by other angles")
                return
    raise ValueError(f"{layer} caches keys that its rotation has not made: expected RoPE on each, and nothing after it")
