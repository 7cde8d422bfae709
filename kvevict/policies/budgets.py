"""How a model's budget is shared out over its layers."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from fractions import Fraction

from kvevict import validate


@dataclass(frozen=True)
class Budget(abc.ABC):
    """Tokens that each layer keeps. The total is always layers × the tokens that `keep` gives one layer.

    Attributes:
        keep: tokens (int) or share (float in (0, 1]) as in `kvevict.ops.topk_indices`: the mean over layers.
    """

    keep: int | float

    def __post_init__(self) -> None:
        # A share is judged now; whether an int fits is known once there are tokens.
        if isinstance(self.keep, int) and not isinstance(self.keep, bool):
            validate.integer("keep", self.keep, 1)
        else:
            validate.kept_tokens(self.keep, 1, 0, 0)

    @abc.abstractmethod
    def per_layer(self, layers: int, tokens: int) -> tuple[int, ...]:
        """The `keep` of every layer, first to last, each from 1 to `tokens`."""

    def _total(self, layers: int, tokens: int) -> int:
        validate.integer("layers", layers, 1)
        validate.integer("tokens", tokens, 1)
        return layers * validate.kept_tokens(self.keep, tokens, 0, 0)


@dataclass(frozen=True)
class Uniform(Budget):
    """The same for every layer."""

    def per_layer(self, layers: int, tokens: int) -> tuple[int, ...]:
        return (self._total(layers, tokens) // layers,) * layers


@dataclass(frozen=True)
class Pyramid(Budget):
    """More for lower layers: linear from the most to the least. Cai et al., "PyramidKV" (arXiv 2406.02069, eq. 6 to 8).

    Attributes:
        steepness: the last layer keeps 1/steepness of the mean (β in the paper), more where the first would otherwise
            keep more than there is.
    """

    steepness: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if validate.number("steepness", self.steepness) < 1.0:
            raise ValueError(f"steepness is {self.steepness}: expected at least 1")

    def per_layer(self, layers: int, tokens: int) -> tuple[int, ...]:
        total = self._total(layers, tokens)
        mean = Fraction(total, layers)
        least = max(mean / Fraction(self.steepness), Fraction(1))
        most = min(2 * mean - least, Fraction(tokens))
        step = 2 * (most - mean) / max(layers - 1, 1)
        kept = [int(most - step * layer) if layers > 1 else total for layer in range(layers)]
        # Rounding down leaves fewer tokens than there are layers: one each, lower layers first.
        left = total - sum(kept)
        for layer in range(layers):
            if left and kept[layer] < tokens:
                kept[layer] += 1
                left -= 1
        return tuple(kept)
