"""What a context's tokens are worth for repeating it: KVzip's scores (Kim et al., arXiv 2505.23416).

The model reads the context, then a request to repeat it and the context once more, on top of the cache. A cached token
scores the largest attention weight that any of these later queries gives it. That costs a second reading of the
context, and the scores compare over the layers and heads of the model: `kvevict.policies.model_wide` chooses by them,
and `kvevict budgets` measures shares with them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvevict import ops, validate
from kvevict.hf import hidden
from kvevict.hf.attention import hand_over, sdpa, set_up
from kvevict.hf.weights import output_weights
from kvevict.policies import Policy

if TYPE_CHECKING:
    from kvevict.hf.layer import EvictingLayer

PROMPT = "\n\nRepeat the previous context exactly.\n"
LEAD = 8  # tokens before a later chunk that are repeated with it, so that the model finds the place


class _Scorer:
    """The attention that one layer's first `cached` tokens draw. output: W_O, for KVzip+."""

    def __init__(self, cached: int, output: Tensor | None = None) -> None:
        self.cached, self.output = cached, output
        self.entering: Tensor | None = None  # [B, T, M]: the hidden states that enter the layer's attention
        self.scores: Tensor | None = None  # [B, H, cached]
        self._norms: Tensor | None = None  # [B, Hq, cached]: ‖W_O v‖

    def awaits(self, module: Any, key: Tensor) -> bool:
        return False  # keys that are made of the cached ones are not scored

    def attend(self, module, query, key, value, attention_mask, scaling=None, s_aux=None, **options):
        lse = None
        if s_aux is not None or self.output is not None:
            lse = ops.attention_lse(query, key, scale=scaling)
        if lse is not None and s_aux is not None:  # learned sinks take their part of each query's attention
            lse = lse.logaddexp(s_aux.float()[None, :, None])
        if self.output is None:
            drawn = ops.attention_mass(query, key, scale=scaling, lse=lse, reduce="max")[:, :, : self.cached]
        else:
            drawn = self._normalized(query, key, value, lse, scaling)
        self.scores = drawn.contiguous() if self.scores is None else torch.maximum(self.scores, drawn)
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, s_aux=s_aux, **options)

    def _normalized(self, query: Tensor, key: Tensor, value: Tensor, lse: Any, scaling: float | None) -> Tensor:
        """The most of weight · ‖W_O v‖ / ‖h‖ over the queries of each head, then over the group."""
        assert self.entering is not None
        HQ, H = query.shape[1], key.shape[1]
        if self._norms is None:
            self._norms = _output_norms(value[:, :, : self.cached], self.output, HQ)
        lse = lse + self.entering.float().norm(dim=-1).log()[:, None]  # a weight e^(logit - lse) is then divided by it
        most = None
        for g in range(HQ // H):
            member = slice(g, None, HQ // H)
            of_head = (
                ops.attention_mass(query[:, member], key, scale=scaling, lse=lse[:, member].contiguous(), reduce="max")[
                    :, :, : self.cached
                ]
                * self._norms[:, member]
            )
            most = of_head if most is None else torch.maximum(most, of_head)
        assert most is not None
        return most


def _output_norms(values: Tensor, output: Any, heads: int) -> Tensor:
    """‖W_O v‖₂ [B, Hq, S] of each value, for each query head: v · (W_Oᵀ W_O) v is its square."""
    B, _, _, D = values.shape
    columns = output.float().unflatten(1, (heads, D)).transpose(0, 1)  # [Hq, M, Dv]
    squares = ops.quadratic_scores(
        values, torch.zeros(B, heads, D, device=values.device), (columns.mT @ columns).expand(B, -1, -1, -1)
    )
    return squares.clamp(min=0.0).sqrt()


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
    cache = _Cache(config=model.config)
    kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        raise ValueError(
            f'{name} has layers of the kind {kinds.pop().__name__}: expected a model whose attention can be "kvevict"'
        )
    with _attention_is_ours(model):
        for part in input_ids.split(chunk, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
        scores = _repeat(model, cache, input_ids, prompt_ids, chunk)
    return cache, scores


@contextlib.contextmanager
def _attention_is_ours(model: Any) -> Iterator[None]:
    """Inside the block. Raises ValueError where it cannot be."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    if not set_up(model):
        raise ValueError(
            f"{type(model).__name__} computes attention in a way of its own: expected a model whose attention can be "
            '"kvevict"'
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _repeat(
    model: Any, cache: _Cache, input_ids: Tensor, prompt_ids: Tensor, chunk: int, normalized: bool = False
) -> dict[int, Tensor]:
    """The scores of what the cache holds, by layer index. It stays as it is; the model's attention is "kvevict"."""
    B, S = input_ids.shape
    scorers = {i: _Scorer(S) for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer}
    noting: Any = contextlib.nullcontext()
    if normalized:
        weights = output_weights(model)
        for i, scorer in scorers.items():
            scorer.output = weights[i] if i < len(weights) else None
            if scorer.output is None:
                raise ValueError(
                    f"{type(model).__name__} has no o_proj in layer {i}, which KVzip+ reads: expected KVzip()"
                )
        noting = hidden.noting(model, scorers, lambda i, entering, _: setattr(scorers[i], "entering", entering))
    cache.scorers = scorers
    with noting:
        for start in range(0, S, chunk):
            piece = input_ids[:, max(start - LEAD, 0) : start + chunk]
            model(torch.cat([prompt_ids.expand(B, -1), piece], 1), past_key_values=cache, logits_to_keep=1)
    scores = {}
    for i, scorer in scorers.items():
        if scorer.scores is None:
            raise ValueError(
                f"{type(model).__name__} does not attend over what layer {i} caches: expected a model without MLA"
            )
        scores[i] = scorer.scores
    return scores


@torch.no_grad()
def note(
    evicting: list[EvictingLayer], cache: Any, policy: Policy, model: Any, input_ids: Tensor,
    prompt_ids: Tensor | None, chunk: int,
) -> None:  # fmt: skip
    """See `kvevict.hf.EvictingCache.reconstruct`."""
    name = type(policy).__name__
    if "repeated" not in policy.needs:
        raise ValueError(f"policy is {name}: expected KVzip, which reads what the repetition of the text draws")
    validate.tensor("input_ids", input_ids, 2, (torch.int64,))
    if prompt_ids is None:
        prompt_ids = input_ids.new_empty(0)
    else:
        validate.tensor("prompt_ids", prompt_ids, 1, (torch.int64,), input_ids)
    validate.integer("chunk", chunk, 1)
    B, S = input_ids.shape
    for layer in evicting:
        if layer.evicted or layer.compressed or layer.lengths is not None or layer.pages is not None:
            raise ValueError(
                "the cache has been cut, or its requests have padding: expected one that holds all of the text, of "
                "requests of equal length"
            )
        held = (layer.keys.shape[0] if layer.is_initialized else B, layer.cached())
        if held != (B, S):
            raise ValueError(f"input_ids has shape {(B, S)}: expected {held}, the tokens that the cache holds")
    evicts = {layer.index for layer in evicting}
    for i, layer in enumerate(cache.layers):
        if i not in evicts and type(layer) is not DynamicSlidingWindowLayer:
            raise ValueError(
                f"{type(model).__name__} has layers of the kind {type(layer).__name__}, whose state the repetition "
                "would change: expected full attention, or attention with a window"
            )
    whole = _Cache(config=model.config)
    for i, layer in enumerate(cache.layers):
        whole.layers[i] = layer
    for layer in evicting:
        plain = DynamicLayer()
        plain.lazy_initialization(layer.keys, layer.values)
        plain.keys, plain.values = layer.keys.detach(), layer.values.detach()
        whole.layers[layer.index] = plain
    with _attention_is_ours(model):
        scores = _repeat(model, whole, input_ids, prompt_ids, chunk, getattr(policy, "normalized", False))
    for layer in evicting:
        layer.notes.repeated = scores[layer.index]
