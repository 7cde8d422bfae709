"""The attention function "kvevict" of transformers' AttentionInterface, and how a model comes to use it.

It computes what SDPA computes, learned sinks too. Where the keys come from an EvictingCache, its layer is asked to do
it: it knows which slots hold no token, notes queries and attention for the policies that read them, and evicts when
attention is done.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

logger = logging.getLogger("kvevict")
NAME = "kvevict"
SET_UP = f'model.set_attn_implementation("{NAME}")'
UNSERVED = ("softcap", "position_bias", "sinks")  # options of attention functions that change what is computed

# A model calls cache.update(...), then attention with the keys that it returned, or with keys that it made of them.
_owners: Any = WeakTensorKeyDictionary()
_last = threading.local()


def hand_over(layer: Any, keys: Tensor) -> None:
    """Attention over `keys`, and the next attention of that layer of the model, is `layer`'s."""
    _owners[keys] = _last.layer = weakref.ref(layer)


def _owner(module: Any, key: Tensor) -> Any:
    if torch.compiler.is_compiling():  # a step that is compiled whole belongs to a static cache, whose masks are right
        return None
    found = _owners.get(key)
    if found is not None:
        return found()
    found = getattr(_last, "layer", None)
    layer = None if found is None else found()
    return layer if layer is not None and layer.awaits(module, key) else None


def attention(module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    """Signature and result of transformers' attention functions: output [B, T, Hq, Dv] and no weights.

    Raises:
        ValueError: a model whose attention SDPA does not compute: soft-capped, or with a bias by position.
    """
    for name in UNSERVED:
        if options.get(name) is not None:
            raise ValueError(
                f'{type(module).__name__} has attention with {name}, which "{NAME}" does not compute: call '
                'model.set_attn_implementation("eager"), and use a policy that reads keys alone'
            )
    layer = _owner(module, key)
    if layer is None:
        return sdpa(module, query, key, value, attention_mask, **options)
    return layer.attend(module, query, key, value, attention_mask, **options)


def sdpa(module, query, key, value, attention_mask, s_aux=None, **options) -> tuple[Tensor, None]:
    """transformers' SDPA. s_aux: a logit for each query head that takes its share of the softmax (GPT-OSS's sinks)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if s_aux is not None:
        key, value, attention_mask = _with_sink(query, key, value, attention_mask, s_aux)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _with_sink(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor) -> tuple[Tensor, ...]:
    """The sink as one more key and value of zeros, which the mask gives the sink's logit. The mask has an entry per
    query head, query and key, as the weights have that "eager" computes."""
    B, Hq, T, _ = query.shape
    if mask is None:
        mask = torch.ones(T, key.shape[2], dtype=torch.bool, device=key.device)
        mask = (mask.tril() if T > 1 else mask)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    logits = sinks.to(query.dtype).view(1, Hq, 1, 1).expand(B, Hq, T, 1)
    mask = torch.cat([mask.to(query.dtype).expand(B, Hq, T, -1), logits], dim=-1)
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return key, value, mask


def set_up(model: Any) -> bool:
    """Make "kvevict" the model's attention where it can be; where it cannot, say so, and have the model refuse padding
    that an EvictingCache would not see. Returns whether it is."""
    config = model.config.get_text_config(decoder=True)
    has_sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())  # which ours computes
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    able = (getattr(model, "_supports_sdpa", False) or has_sinks) and not capped
    inner = model.base_model  # which may be called by itself
    if able and config._attn_implementation != NAME and inner not in _guarded:
        model.set_attn_implementation(NAME)
    if config._attn_implementation == NAME:
        return True
    if inner not in _guarded:
        _guarded[inner] = inner.register_forward_pre_hook(_refuse_padding, with_kwargs=True)
        logger.warning(
            'kvevict: %s computes attention in a way of its own, and "%s" cannot be set: policies that read queries or '
            "attention, padding, and budgets that differ by layer are refused",
            type(model).__name__, NAME,
        )  # fmt: skip
    return False


_guarded: Any = weakref.WeakKeyDictionary()  # models that cannot use our attention -> their hook


def _refuse_padding(module, arguments: tuple, options: dict) -> None:
    from kvevict.hf.cache import EvictingCache

    if not any(isinstance(x, EvictingCache) for x in (*arguments, *options.values())):
        return
    mask = options.get("attention_mask", arguments[1] if len(arguments) > 1 else None)
    if isinstance(mask, Tensor) and (mask.ndim != 2 or not mask.all()):
        raise ValueError(
            f'attention_mask has padding or is not 2-D: {type(module).__name__} cannot use "{NAME}" attention, without '
            "which an EvictingCache takes padding for tokens; pass requests of equal length"
        )


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
