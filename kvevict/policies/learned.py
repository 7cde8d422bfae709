"""A learned scorer: a small network on hidden states that predicts the attention later queries will give."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from kvevict import ops
from kvevict.policies.base import Policy
from kvevict.policies.observed import Observed

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # w1 [N, M], b1 [N], w2 [1, N], b2 [1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned(Policy):
    """sigmoid(w2 · relu(W1 · h + b1) + b2) on the hidden states that enter a layer's attention; heads share it.

    Attributes:
        layers: the two linear layers' weights and biases, for each layer of the model.
    """

    layers: tuple[Weights, ...] = field(repr=False)
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise ValueError("layers is empty: expected the weights of every layer of the model")

    def scores(self, seen: Observed) -> Tensor:
        hidden = seen.hidden
        assert hidden is not None
        if not 0 <= seen.layer < len(self.layers):
            raise ValueError(f"layer is {seen.layer}: expected 0 to {len(self.layers) - 1}, the layers trained")
        B, H, S = seen.keys.shape[:3]
        if hidden.shape[:2] != (B, S):
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}: expected ({B}, {S}, ...), one per cached token")
        weights = (w.to(hidden.device, hidden.dtype) for w in self.layers[seen.layer])
        return ops.mlp_scores(hidden, *weights)[:, None].expand(B, H, S)

    @classmethod
    def fit(cls, model: Any, texts: Sequence[Any], *, tokenizer: Any = None, **options) -> Learned:
        """Train on texts with a transformers model. Arguments as for `kvevict.policies.training.fit`, which also
        returns the losses and how well held-out tokens are ranked."""
        from kvevict.policies.training import fit

        return fit(model, texts, tokenizer=tokenizer, **options).policy

    def save(self, path: str | pathlib.Path) -> None:
        """Write the weights as safetensors."""
        from safetensors.torch import save_file

        names = ("w1", "b1", "w2", "b2")
        tensors = {
            f"layers.{i}.{name}": tensor.contiguous()
            for i, weights in enumerate(self.layers)
            for name, tensor in zip(names, weights, strict=True)
        }
        save_file(tensors, str(path), metadata={"format": "kvevict learned scorer", "layers": str(len(self.layers))})

    @classmethod
    def load(cls, path: str | pathlib.Path, **fields) -> Learned:
        """Read what `save` wrote; fields: sink, recent, heads.

        Raises:
            FileNotFoundError: no such file. ValueError: not a learned scorer.
        """
        from safetensors.torch import load_file

        tensors = load_file(str(path))
        count = len(tensors) // 4
        try:
            layers = tuple(tuple(tensors[f"layers.{i}.{n}"] for n in ("w1", "b1", "w2", "b2")) for i in range(count))
        except KeyError as error:
            raise ValueError(f"{path} has no tensor {error}: expected the weights of a learned scorer") from error
        return cls(layers=layers, **fields)  # type: ignore[arg-type]
