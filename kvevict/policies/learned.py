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
_NAMES = ("w1", "b1", "w2", "b2")
_FORMAT = "kvevict learned scorer"


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
        for i, weights in enumerate(self.layers):
            shapes = [tuple(tensor.shape) for tensor in weights]
            N, M = shapes[0] if shapes and len(shapes[0]) == 2 else (0, 0)
            if shapes != [(N, M), (N,), (1, N), (1,)]:
                raise ValueError(f"layers[{i}] has shapes {shapes}: expected [N, M], [N], [1, N] and [1]")

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

        tensors = {
            f"layers.{i}.{name}": tensor.contiguous()
            for i, weights in enumerate(self.layers)
            for name, tensor in zip(_NAMES, weights, strict=True)
        }
        save_file(tensors, str(path), metadata={"format": _FORMAT, "layers": str(len(self.layers))})

    @classmethod
    def load(cls, path: str | pathlib.Path, **fields) -> Learned:
        """Read what `save` wrote; fields: sink, recent, heads.

        Raises:
            FileNotFoundError: no such file. ValueError: not a learned scorer, or not a whole one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no learned scorer: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is of the format {metadata.get('format')!r}: expected {_FORMAT!r}")
        said, count = metadata.get("layers", ""), len(tensors) // len(_NAMES)
        expected = [f"layers.{i}.{name}" for i in range(count) for name in _NAMES]
        if said != str(count) or tensors.keys() != set(expected):
            odd = sorted(tensors.keys() ^ set(expected))
            raise ValueError(
                f"{path} says that it has {said!r} layers: expected their tensors and no other; at odds: {odd[:4]}"
            )
        flat = [tensors[name] for name in expected]
        layers = tuple(tuple(flat[i : i + len(_NAMES)]) for i in range(0, len(flat), len(_NAMES)))
        try:
            return cls(layers=layers, **fields)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
