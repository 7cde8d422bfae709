"""What a context's tokens are worth for repeating it: KVzip's scores (Kim et al., arXiv 2505.23416).

The model reads the context, then a request to repeat it and the context once more, on top of the cache. A cached token
scores the largest attention weight that any of these later queries gives it. That costs a second reading of the
context, and the scores compare over the layers and heads of the model: `kvevict.policies.model_wide` chooses by them,
and `kvevict budgets` measures shares with them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvevict import ops, validate
from kvevict.hf.attention import hand_over, sdpa, set_up

PROMPT = "\n\nRepeat the previous context exactly.\n"
LEAD = 8  # tokens before a later chunk that are repeated with it, so that the model finds the place


class _Scorer:
    """The attention that one layer's first `cached` tokens draw."""

    def __init__(self, cached: int) -> None:
        self.cached = cached
        self.scores: Tensor | None = None  # [B, H, cached]

    def awaits(self, module: Any, key: Tensor) -> bool:
        return False  # keys that are made of the cached ones are not scored

    def attend(self, module, query, key, value, attention_mask, scaling=None, s_aux=None, **options):
        lse = None
        if s_aux is not None:  # learned sinks take their part of each query's attention
            lse = ops.attention_lse(query, key, scale=scaling).logaddexp(s_aux.float()[None, :, None])
        drawn = ops.attention_mass(query, key, scale=scaling, lse=lse, reduce="max")[:, :, : self.cached]
        self.scores = drawn.contiguous() if self.scores is None else torch.maximum(self.scores, drawn)
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, s_aux=s_aux, **options)


class _Cache(DynamicCache):
    """A cache which, once it has read the context, stays as it is, whatever is read on top of it."""

    scorers: dict[int, _Scorer] | None = None  # of the layers with full attention, while the context is repeated

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if self.scorers is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = copy.copy(self.layers[layer_idx])  # which binds what is joined; the cache's own keeps its tensors
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if layer_idx in self.scorers:
            hand_over(self.scorers[layer_idx], keys)
        return keys, values


def repeat_scores(model: Any, input_ids: Tensor, prompt_ids: Tensor, *, chunk: int = 2048) -> list[Tensor]:
    """KVzip's score of every token of a context: the largest attention weight, over the queries of its repetition and
    the GQA group, in each layer. Without an S × S matrix.

    Args:
        model: a transformers causal language model; its attention is set to "kvevict" meanwhile.
        input_ids: [B, S] int64, contexts of equal length.
        prompt_ids: [P] int64, what stands between the context and its repetition: the tokens of `PROMPT`.
        chunk: the context is repeated in pieces of so many tokens, each after a prompt of its own.

    Returns:
        [B, H, S] float32 for each layer with full attention.

    Raises:
        ValueError: the model's attention cannot be ours, or it is over keys that are made of what is cached (MLA).
    """
    return list(read_and_repeat(model, input_ids, prompt_ids, chunk=chunk)[1].values())


@torch.no_grad()
def read_and_repeat(
    model: Any, input_ids: Tensor, prompt_ids: Tensor, *, chunk: int = 2048
) -> tuple[DynamicCache, dict[int, Tensor]]:
    """The cache of a context, and `repeat_scores` by layer index."""
    validate.tensor("input_ids", input_ids, 2, (torch.int64,))
    validate.tensor("prompt_ids", prompt_ids, 1, (torch.int64,), input_ids)
    validate.integer("chunk", chunk, 1)
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    cache = _Cache(config=model.config)
    kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds or not set_up(model):
        what = f"has layers of the kind {kinds.pop().__name__}" if kinds else "computes attention in a way of its own"
        raise ValueError(f'{name} {what}: expected a model whose attention can be "kvevict"')
    try:
        B, S = input_ids.shape
        for part in input_ids.split(chunk, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
        scorers = {i: _Scorer(S) for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer}
        cache.scorers = scorers
        for start in range(0, S, chunk):
            piece = input_ids[:, max(start - LEAD, 0) : start + chunk]
            model(torch.cat([prompt_ids.expand(B, -1), piece], 1), past_key_values=cache, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    scores = {}
    for i, scorer in scorers.items():
        if scorer.scores is None:
            raise ValueError(f"{name} does not attend over what layer {i} caches: expected a model without MLA")
        scores[i] = scorer.scores
    return cache, scores
