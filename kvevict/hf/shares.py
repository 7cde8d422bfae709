"""How a Budget falls on the layers of a cache, and on their heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvevict import validate
from kvevict.policies import Budget, Fixed, LayerWide, ModelWide, Policy, Uniform
from kvevict.policies.shares import config_hash

if TYPE_CHECKING:
    from kvevict.hf.layer import EvictingLayer

WHOLE = 1_000_000  # of which a layer's share is told in parts while it is not known how many tokens there will be
# Tokens, a share of each request's, or tokens of each request; or those of each KV head, an int64 tensor on the CPU:
# [H], or [B, H] for each request.
Keep = int | float | list[int] | Tensor


def policy_for(budget: Budget, policy: Policy) -> Policy:
    """The policy that chooses within the budget.

    Raises:
        ValueError: its scores do not compare over as much as the budget asks for; it gives all heads the same tokens.
    """
    if budget.spread == "layers":
        return policy
    if policy.heads == "shared":
        raise ValueError(
            f"policy has heads 'shared': expected dataclasses.replace(policy, heads='each'), because the heads of a "
            f"{type(budget).__name__} keep unequal numbers of tokens"
        )
    if isinstance(budget, LayerWide):
        return replace(policy, heads="adaptive", floor=budget.floor)
    if isinstance(budget, ModelWide):
        policy.require_comparable("model")
    return policy


def unequal_heads(budget: Budget, policy: Policy) -> bool:
    """Whether the heads of a layer may keep unequal numbers of tokens."""
    return budget.spread != "layers" or policy.heads == "adaptive"


def check_model(budget: Budget, config: Any) -> None:
    """Raises:
    ValueError: the budget's shares were measured on a model of another architecture.
    """
    if not isinstance(budget, Fixed):
        return
    theirs, ours = budget.shares.metadata.get("config"), config_hash(config)
    if theirs not in (None, ours):
        name = budget.shares.metadata.get("model", "another model")
        raise ValueError(f"shares are of {name} with config {theirs}: expected {ours}, that of this model")


def check_served(config: Any, policy: Policy, *, for_ever: bool, static: bool) -> None:
    """Whether heads may keep unequal numbers of tokens. for_ever: and be cut again, by what is noted until then.

    Raises:
        ValueError: they may not.
    """
    said = "heads are to keep unequal numbers of tokens"
    if static:
        raise ValueError(f"static is True, and {said}: expected static=False")
    for name in ("kv_lora_rank", "num_kv_shared_layers"):
        if getattr(config, name, None):
            raise ValueError(
                f"{said}, and config is of {config.model_type} with {name} {getattr(config, name)}, whose attention is "
                "not over each layer's own keys: expected a budget over layers"
            )
    noted = sorted(policy.needs & {"mass", "last_used"})
    if for_ever and noted:
        raise ValueError(
            f"{said}, by {type(policy).__name__}, which reads {' and '.join(noted)}: expected with budget= a policy "
            "that reads no attention of the past, because that is not noted over unequal heads; or keep="
        )
    if for_ever and not policy.by_row:
        raise ValueError(
            f"{said}, by {type(policy).__name__}, which reads W_O of all heads of a layer at once: expected keep=, or "
            "with budget= heads='each' and equal shares"
        )


def told(budget: Budget, layers: Sequence[EvictingLayer], heads: int, policy: Policy) -> list[Keep] | None:
    """What each layer is to keep of what it holds; None where all layers choose together."""
    if isinstance(budget, ModelWide):
        return None
    if isinstance(budget, (Uniform, LayerWide)):
        return [budget.keep] * len(layers)
    tokens: int | list[int]
    most = 0
    if any(layer.pages is not None for layer in layers):
        held = torch.stack([layer.tokens_of_heads().cpu() for layer in layers])
        tokens, most = (held.double().mean((0, 2)) + 0.5).long().tolist(), int(held.max())
    else:
        tokens = _most([layer.tokens() for layer in layers])
    facts = len(layers), heads, sum(policy.protected), tokens, most
    return [of_layer(budget, n, *facts) for n in range(len(layers))]


def _most(of_layers: list[Any]) -> int | list[int]:
    """Of each layer's number of tokens, or list of each request's: the largest."""
    if isinstance(of_layers[0], int):
        return max(of_layers)
    return [max(of_request) for of_request in zip(*of_layers, strict=True)]


def of_layer(
    budget: Budget, layer: int, layers: int, heads: int, protected: int, tokens: int | list[int], most: int = 0
) -> Keep:
    """What the `layer`-th of `layers` keeps. All layers together keep what the budget promises.

    Args:
        heads: KV heads of a layer.
        protected: tokens that are kept whatever their score.
        tokens: cached tokens (a list: of each request); where heads hold unequal numbers, their mean.
        most: tokens of the head that holds most, where they do.
    """
    if isinstance(budget, (Uniform, LayerWide)):
        return budget.keep
    counts = functools.partial(_counts, budget, isinstance(budget.keep, int), layers, heads, protected)
    if isinstance(tokens, list):
        told = [counts(count, most)[layer] for count in tokens]
    else:
        told = counts(tokens, most)[layer]
    return torch.tensor(told) if budget.spread == "heads" else told


@functools.lru_cache(maxsize=256)  # every layer asks, of every request
def _counts(
    budget: Budget, in_tokens: bool, layers: int, heads: int, protected: int, tokens: int, most: int
) -> tuple[Any, ...]:
    """in_tokens: as `keep` is; without it a budget of 1 token and one of all of them, 1.0, are one key of the cache."""
    tokens = max(tokens, 1)  # of a request without a token one is chosen, too, and not kept
    if most > tokens:  # a share of the mean, of which a head that holds more may keep more
        keep = min(budget.keep, tokens) if isinstance(budget.keep, int) else budget.keep
        budget, tokens = replace(budget, keep=validate.kept_tokens(keep, tokens, 0, 0)), most
    of_heads = budget.spread == "heads"
    if isinstance(budget.keep, int) and budget.keep > tokens:
        return ((tokens,) * heads if of_heads else tokens,) * layers
    return budget.per_head(layers, heads, tokens, protected) if of_heads else budget.per_layer(layers, tokens)


def beforehand(budget: Budget, layers: int, heads: int, protected: int) -> list[Any]:
    """Tokens that each layer keeps of any number of them, or parts of WHOLE where the budget is a share: an int, or a
    tensor [H] where the budget tells them for each head. A choice over all layers is told as their mean.

    Raises:
        ValueError: the budget is of a model with other layers or heads.
    """
    if isinstance(budget, ModelWide):
        budget = Uniform(budget.keep)
    if isinstance(budget.keep, int):
        tokens = 2**62
    else:
        tokens, protected = WHOLE, 0
    if budget.spread == "heads":
        return list(torch.tensor(budget.per_head(layers, heads, tokens, protected)))
    return list(budget.per_layer(layers, tokens))
