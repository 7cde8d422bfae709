"""A learned scorer that reads keys and values alone, fitted in closed form to what a model's own repetition needs."""

from __future__ import annotations

import functools
import importlib.resources
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.base import Policy
from kvevict.policies.observed import Observed
from kvevict.policies.shares import config_hash

_FORMAT = "kvevict key-value scorer"
_ENDING = ".scorer.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedKV(Policy):
    """w · (key before RoPE, value, ln ‖key‖, ln ‖value‖, cosine to the mean key, 1), which predicts the logarithm of
    KVzip's score (arXiv 2505.23416): the most attention that a token draws when the model repeats the text. As KVzap
    (arXiv 2601.07891), but linear, and without the hidden states. `kvevict.hf.fit` fits it; see `kvevict train`.

    Scores compare over the heads and layers of the model: with heads="each", keep=0.1 alone means ModelWide(0.1).

    Keys are turned back by positions that count a request's own tokens from 0, as `generate` gives them to the model;
    in a padded batch a forward by hand needs `position_ids` that do, or keys are turned back by too little.

    Attributes:
        weights: [L, H, D + Dv + 4] float32, as `kvevict.ops.kv_scores` takes them; 0 for layers that do not grow.
        inv_freq: [R/2] float32, RoPE's angles.
        mix: add KeyDiff of the keys before RoPE, scaled to the same deviation in each head.
        metadata: model, config hash, features, texts, tokens, date, version, correlation.
    """

    weights: Tensor = field(repr=False)
    inv_freq: Tensor = field(repr=False)
    mix: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)
    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    comparable: ClassVar[str] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.flag("mix", self.mix)
        validate.tensor("weights", self.weights, 3, (torch.float32,))
        validate.tensor("inv_freq", self.inv_freq, 1, (torch.float32,))
        for name in ("weights", "inv_freq"):
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"{name} has values that are not finite")

    @property
    def reads_positions(self) -> bool:
        return True

    @property
    def spread(self) -> str:
        return "model-wide" if self.heads == "each" else "layers"

    def scores(self, seen: Observed) -> Tensor:
        assert seen.values is not None
        if not 0 <= seen.layer < len(self.weights):
            raise ValueError(f"layer is {seen.layer}: expected 0 to {len(self.weights) - 1}, the layers fitted")
        device = seen.keys.device
        weights = self.weights[seen.layer].to(device)
        if seen.keys.shape[1] == 1 and len(weights) > 1:  # each head is a request of its own: theirs in turn
            weights = weights.repeat(len(seen.keys) // len(weights), 1)[:, None]
        fitted, keydiff = ops.kv_scores(
            seen.keys, seen.values, weights, inv_freq=self.inv_freq.to(device),
            positions=seen.positions, lengths=seen.lengths, return_keydiff=True,
        )  # fmt: skip
        return mixed(fitted, keydiff) if self.mix else fitted

    def save(self, path: str | pathlib.Path) -> None:
        """Write a safetensors file, the metadata in its header."""
        from safetensors.torch import save_file

        tensors = {"weights": self.weights.contiguous(), "inv_freq": self.inv_freq.contiguous()}
        save_file(tensors, str(path), metadata={**self.metadata, "format": _FORMAT})

    @classmethod
    def load(cls, path: str | pathlib.Path, **fields) -> LearnedKV:
        """Read what `save` wrote; fields: sink, recent, heads, mix.

        Raises:
            FileNotFoundError: no such file. ValueError: not such a scorer, or not a whole one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no scorer: {error}") from error
        found = metadata.pop("format", None)
        if found != _FORMAT or tensors.keys() != {"weights", "inv_freq"}:
            raise ValueError(
                f"{path} is of the format {found!r} with {sorted(tensors)}: expected {_FORMAT!r}, weights and inv_freq"
            )
        try:
            return cls(**tensors, metadata=metadata, **fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def of_model(cls, config: Any) -> LearnedKV:
        """The scorer that the package carries for a model of this architecture.

        Raises:
            ValueError: it carries none.
        """
        wanted = config_hash(config)
        for scorer in _packaged():
            if scorer.metadata.get("config") == wanted:
                return scorer
        known = ", ".join(scorer.metadata.get("model", "?") for scorer in _packaged())
        raise ValueError(
            f"there is no learned scorer for this {config.model_type} model (the package carries those of: {known}): "
            "run `kvevict train --model ID --text FILES --out FILE` and give LearnedKV.load(FILE)"
        )

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
        expected = (layers, heads, 2 * head_dim + 4)
        if self.weights.shape != expected:
            raise ValueError(
                f"policy has weights of shape {tuple(self.weights.shape)}: expected {expected}, the layers, KV heads "
                "and features of the model"
            )
        if 2 * len(self.inv_freq) > head_dim:
            raise ValueError(f"policy has {len(self.inv_freq)} angles: expected at most {head_dim // 2}, head_dim / 2")

    def check_angles(self, inv_freq: Tensor) -> None:
        """Raises:
        ValueError: the model turns its keys by other angles than the one it was fitted to.
        """
        ours = self.inv_freq.to(inv_freq.device)
        if ours.shape != inv_freq.shape or not torch.allclose(ours, inv_freq, rtol=1e-5):
            raise ValueError("policy has inv_freq of other RoPE than the model's: expected a scorer fitted to it")


@functools.cache
def _packaged() -> tuple[LearnedKV, ...]:
    found = []
    for file in sorted(importlib.resources.files("kvevict").joinpath("data").iterdir(), key=lambda file: file.name):
        if file.name.endswith(_ENDING):
            with importlib.resources.as_file(file) as path:
                found.append(LearnedKV.load(path))
    return tuple(found)


def mixed(fitted: Tensor, keydiff: Tensor) -> Tensor:
    """fitted + sd(fitted) · z(keydiff) in each row [B, H, S]: both have equal weight, on the scale of the former. Of
    the tokens that are there and finite."""
    there = fitted.isfinite() & keydiff.isfinite()
    count = there.sum(-1, keepdim=True)

    def centred(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.masked_fill(~there, 0.0)
        x = (x - x.sum(-1, keepdim=True) / count).masked_fill(~there, 0.0)
        return x, (x.square().sum(-1, keepdim=True) / count).sqrt()

    (_, deviation), (difference, spread) = centred(fitted), centred(keydiff)
    return fitted + difference * (deviation / spread.clamp(min=1e-12))
