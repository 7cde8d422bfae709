"""A learned scorer that reads keys and values alone, fitted in closed form to what a model's own repetition needs."""

from __future__ import annotations

import functools
import importlib.resources
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.observed import Observed
from kvevict.policies.scorer import Scorer
from kvevict.policies.shares import config_hash, find

_ENDING = ".scorer.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedKV(Scorer):
    """w · (key before RoPE, value, ln ‖key‖, ln ‖value‖, cosine to the mean key, 1), which predicts the logarithm of
    KVzip's score (arXiv 2505.23416): the most attention that a token draws when the model repeats the text. As KVzap
    (arXiv 2601.07891), but linear, and without the hidden states. `kvevict.hf.fit` fits it; see `kvevict train`.

    Keys are turned back by positions that count a request's own tokens from 0, as `generate` gives them to the model;
    in a padded batch a forward by hand needs `position_ids` that do, or keys are turned back by too little.

    Attributes:
        weights: [L, H, D + Dv + 4] float32, as `kvevict.ops.kv_scores` takes them; 0 for layers that do not grow.
        inv_freq: [R/2] float32, RoPE's angles.
        mix: add KeyDiff of the keys before RoPE, scaled to the same deviation in each head.
    """

    weights: Tensor = field(repr=False)
    inv_freq: Tensor = field(repr=False)
    mix: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    format: ClassVar[str] = "kvevict key-value scorer"

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
    def fitted_heads(self) -> int:
        return self.weights.shape[1]

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

    def tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights, "inv_freq": self.inv_freq}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], **fields) -> LearnedKV:
        if tensors.keys() != {"weights", "inv_freq"}:
            raise ValueError(f"has {sorted(tensors)}: expected weights and inv_freq")
        return cls(weights=tensors["weights"], inv_freq=tensors["inv_freq"], **fields)

    @classmethod
    def of_model(cls, config: Any) -> LearnedKV:
        """The scorer that the package carries for a model of this architecture, with the shares that it carries.

        Raises:
            ValueError: it carries none.
        """
        wanted = config_hash(config)
        for scorer in _packaged():
            if scorer.metadata.get("config") == wanted:
                return scorer if scorer.shares is not None else replace(scorer, shares=find(config))
        known = ", ".join(scorer.metadata.get("model", "?") for scorer in _packaged())
        raise ValueError(
            f"there is no learned scorer for this {config.model_type} model (the package carries those of: {known}): "
            "run `kvevict train --model ID --text FILES --out FILE` and give LearnedKV.load(FILE)"
        )

    def check(self, config: Any, layers: int, heads: int, head_dim: int) -> None:
        super().check(config, layers, heads, head_dim)
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
        if ours.shape == inv_freq.shape and torch.allclose(ours, inv_freq, rtol=1e-5):
            return
        if ours.shape == inv_freq.shape and any(
            torch.equal(ours.to(dtype).float(), inv_freq) for dtype in (torch.bfloat16, torch.float16)
        ):
            raise ValueError(
                "policy has inv_freq that a cast of the model (.half(), .bfloat16(), .to(dtype)) has rounded in the "
                "model: expected from_pretrained(dtype=...), which leaves RoPE's angles in float32"
            )
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
