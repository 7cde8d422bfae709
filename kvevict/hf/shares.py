"""How a Budget falls on the layers of a cache."""

from __future__ import annotations

import functools

from kvevict.policies import Budget, Uniform

WHOLE = 1_000_000  # of which a layer's share is told in parts while it is not known how many tokens there will be
Keep = int | float | list[int]  # tokens, a share of each request's tokens, or tokens of each request


def of_layer(budget: Budget, layer: int, layers: int, tokens: int | list[int]) -> Keep:
    """What the `layer`-th of `layers` keeps of `tokens` cached tokens (a list: of each request's). All layers together
    keep what the budget promises."""
    if isinstance(budget, Uniform):
        return budget.keep
    if isinstance(tokens, list):
        return [_per_layer(budget, layers, count)[layer] for count in tokens]
    return _per_layer(budget, layers, tokens)[layer]


@functools.lru_cache(maxsize=256)  # every layer asks, of every request
def _per_layer(budget: Budget, layers: int, tokens: int) -> tuple[int, ...]:
    if isinstance(budget.keep, int) and budget.keep > tokens:
        return (tokens,) * layers
    return budget.per_layer(layers, tokens)


def beforehand(budget: Budget, layers: int) -> tuple[int, ...]:
    """Tokens that each layer keeps of any number of them, or parts of WHOLE where the budget is a share."""
    return budget.per_layer(layers, 2**62 if isinstance(budget.keep, int) else WHOLE)
