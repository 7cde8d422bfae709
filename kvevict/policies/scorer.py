"""Scorers that were fitted to a model: what such a policy knows of where it came from, and its file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvevict.policies.base import Policy
from kvevict.policies.shares import Shares, config_hash, read_file


@dataclass(frozen=True, kw_only=True, eq=False)
class Scorer(Policy):
    """A policy that predicts KVzip's score (arXiv 2505.23416), see `kvevict.hf.fit` and `kvevict train`.

    Scores compare over the heads and layers of the model: with heads="each", keep=0.1 alone means ModelWide(0.1). With
    heads="shared" it means `Fixed(shares, 0.1, per="layer")`, where there are shares.

    Attributes:
        metadata: model, config hash, features, texts, tokens, date, version, correlation; facts, where they were asked.
        shares: of the model's cache, measured when the scorer was fitted.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    shares: Shares | None = field(default=None, repr=False)
    comparable: ClassVar[str] = "model"
    format: ClassVar[str]

    @property
    def spread(self) -> str:
        return "model-wide" if self.heads == "each" else "layers"

    @property
    def fitted_heads(self) -> int:
        """KV heads that have weights of their own; 1: all share them."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict) -> Scorer:
        return self  # never changes: a copied cache asks the same one

    def tensors(self) -> dict[str, Tensor]:
        """By name, what `of_tensors` takes."""
        raise NotImplementedError

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], **fields) -> Scorer:
        """Raises:
        ValueError: they are not those of such a scorer.
        """
        raise NotImplementedError

    def check(self, config: Any, layers: int, heads: int, head_dim: int) -> None:
        """Raises:
        ValueError: it was fitted to another model.
        """
        known = self.metadata.get("config")
        if known is not None and known != config_hash(config):
            raise ValueError(
                f"policy was fitted to {self.metadata.get('model')}, config {known}: expected {config_hash(config)}, "
                "this model's"
            )

    def save(self, path: str | pathlib.Path) -> None:
        """Write a safetensors file; metadata and shares in its header."""
        from safetensors.torch import save_file

        metadata = {**self.metadata, "format": self.format}
        if self.shares is not None:
            table = [[[round(x, 5) for x in row] for row in rows] for rows in self.shares.table.tolist()]
            metadata["shares"] = json.dumps({"keeps": self.shares.keeps, "table": table})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | pathlib.Path, **fields) -> Any:
        """Read what `save` wrote; `Scorer.load` reads any kind. fields: sink, recent, heads, ...

        Raises:
            FileNotFoundError: no such file. ValueError: not such a scorer, or not a whole one.
        """
        metadata, tensors = read_file(path, "is no scorer")
        found, told = metadata.pop("format", None), metadata.pop("shares", None)
        kinds = {kind.format: kind for kind in cls.__subclasses__() or (cls,)}
        if found not in kinds:
            raise ValueError(f"{path} is of the format {found!r}: expected {' or '.join(map(repr, kinds))}")
        try:
            shares = None if told is None else _shares(json.loads(told), metadata)
            return kinds[found].of_tensors(tensors, metadata=metadata, shares=shares, **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def _shares(told: dict[str, Any], metadata: dict[str, str]) -> Shares:
    return Shares(tuple(told["keeps"]), torch.tensor(told["table"], dtype=torch.float32), metadata)
