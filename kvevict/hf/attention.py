"""The attention function "kvevict" of transformers' AttentionInterface: `model.set_attn_implementation("kvevict")`.

It computes what SDPA computes. Where the keys come from an EvictingCache, its layer is asked to do it: it knows which
slots hold no token, notes queries and attention for the policies that read them, and evicts when attention is done.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import Tensor

NAME = "kvevict"
SET_UP = f'model.set_attn_implementation("{NAME}")'

# A model calls cache.update(...), then attention with the keys that it returned: that is how the two find each other.
_last = threading.local()


def hand_over(layer: Any, keys: Tensor) -> None:
    """The next attention over `keys` is `layer`'s."""
    _last.layer, _last.keys = weakref.ref(layer), weakref.ref(keys)


def _owner(keys: Tensor) -> Any:
    if getattr(_last, "keys", None) is None or _last.keys() is not keys:
        return None
    layer, _last.layer, _last.keys = _last.layer(), None, None
    return layer


def sdpa(module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def attention(module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    """Signature and result of transformers' attention functions: output [B, T, Hq, Dv] and no weights.

    Raises:
        ValueError: a model whose attention has learned sinks (GPT-OSS), which SDPA does not compute.
    """
    if options.get("s_aux") is not None:
        raise ValueError(f'{type(module).__name__} has attention sinks, which "{NAME}" does not compute: use "eager"')
    layer = _owner(key)
    if layer is None:
        return sdpa(module, query, key, value, attention_mask, **options)
    return layer.attend(module, query, key, value, attention_mask, **options)


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
