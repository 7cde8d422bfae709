"""A learned scorer of hidden states: which tokens the model would need to repeat its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvevict.policies.base import Policy
from kvevict.policies.mixture import Hybrid
from kvevict.policies.observed import Observed
from kvevict.policies.scorer import Scorer

_NAMES = {2: ("w", "b"), 4: ("w1", "b1", "w2", "b2")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned(Scorer):
    """W · h + b, or W2 · relu(W1 · h + b1) + b2, a row for each KV head, of the hidden states that enter a layer's
    attention. It predicts the logarithm of KVzip's score, as KVzap (arXiv 2601.07891) does.

    An EvictingCache asks it when hidden states pass, and holds what it says, not them: H numbers a token.

    Attributes:
        weights: of all layers, float32: (W [L, H, M], b [L, H]), or (W1 [L, N, M], b1 [L, N], W2 [L, H, N], b2 [L, H]);
            with H of 1 a layer's heads share them. 0 for layers that do not grow.
    """

    weights: tuple[Tensor, ...] = field(repr=False)
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    format: ClassVar[str] = "kvevict hidden-state scorer"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", tuple(self.weights))
        shapes = [tuple(tensor.shape) for tensor in self.weights]
        if len(shapes) not in _NAMES or len(shapes[0]) != 3 or any(len(x) != 3 for x in shapes[::2]):
            raise ValueError(f"weights has shapes {shapes}: expected W, b or W1, b1, W2, b2 of all layers")
        L, out, _ = shapes[0]
        expected = [shapes[0], (L, out)]
        if len(shapes) == 4:
            expected += [(L, shapes[2][1], out), (L, shapes[2][1])]
        if shapes != expected:
            raise ValueError(f"weights has shapes {shapes}: expected {expected}")
        if not all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in self.weights):
            raise ValueError("weights has values that are not float32, or not finite")

    @property
    def fitted_heads(self) -> int:
        return self.weights[-1].shape[1]

    def of_hidden(self, hidden: Tensor, layer: int) -> Tensor:
        """[B, H or 1, T] float32: the scores of tokens whose hidden states [B, T, M] enter the layer's attention.

        Raises:
            ValueError: a layer or width that it was not fitted to.
        """
        if not 0 <= layer < len(self.weights[0]):
            raise ValueError(f"layer is {layer}: expected 0 to {len(self.weights[0]) - 1}, the layers fitted")
        if hidden.shape[-1] != self.weights[0].shape[2]:
            raise ValueError(f"hidden has width {hidden.shape[-1]}: expected {self.weights[0].shape[2]}, as fitted")
        *first, w, b = (tensor[layer].to(hidden.device) for tensor in self.weights)
        if first:
            hidden = F.relu(F.linear(hidden, *(tensor.to(hidden.dtype) for tensor in first)))
        return F.linear(hidden.float(), w, b).mT

    def scores(self, seen: Observed) -> Tensor:
        B, H, S = seen.keys.shape[:3]
        found = seen.predicted
        if found is None:
            assert seen.hidden is not None
            if seen.hidden.shape[:2] != (B, S):
                raise ValueError(
                    f"hidden has shape {tuple(seen.hidden.shape)}: expected ({B}, {S}, ...), one per token"
                )
            found = self.of_hidden(seen.hidden, seen.layer)
        absent = torch.as_tensor(seen.padding(), device=found.device)
        return found.expand(B, H, S).masked_fill(absent, float("-inf"))

    def check(self, config: Any, layers: int, heads: int, head_dim: int) -> None:
        super().check(config, layers, heads, head_dim)
        (L, _, M), width = self.weights[0].shape, config.hidden_size
        if (L, M) != (layers, width) or self.fitted_heads not in (1, heads):
            raise ValueError(
                f"policy has weights for {L} layers of width {M} and {self.fitted_heads} heads: expected {layers}, "
                f"{width} and {heads}, as the model has"
            )

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(_NAMES[len(self.weights)], self.weights, strict=True))

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], **fields) -> Learned:
        names = next((names for names in _NAMES.values() if tensors.keys() == set(names)), None)
        if names is None:
            raise ValueError(f"has {sorted(tensors)}: expected {' or '.join(map(str, _NAMES.values()))}")
        return cls(weights=tuple(tensors[name] for name in names), **fields)


def parts_of(policy: Policy) -> Iterator[Policy]:
    """The policy, and what it is mixed of."""
    yield policy
    for _, part in policy.parts if isinstance(policy, Hybrid) else ():
        yield from parts_of(part)


def scorer_of_hidden(policy: Policy) -> Learned | None:
    """What of the policy reads hidden states.

    Raises:
        ValueError: several parts do, or one that is no Learned.
    """
    found = [part for part in parts_of(policy) if "hidden" in part.needs and not isinstance(part, Hybrid)]
    if len({id(part) for part in found}) > 1 or not all(isinstance(part, Learned) for part in found):
        raise ValueError(
            f"policy reads hidden states by {', '.join(type(part).__name__ for part in found)}: expected one Learned, "
            "whose scores a cache holds instead of them"
        )
    return next((part for part in found if isinstance(part, Learned)), None)
