"""Fit LearnedKV to a model: ridge regression, per layer and head, of the logarithm of KVzip's score.

The model reads each text, then repeats it (`kvevict.hf.reconstruct`): a token's target is ln(s + 1e-6), s the most
attention that it draws in that. Its features are what the cache holds of it. Sums over tokens are all that is kept of a
text, and texts add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvevict.hf.reconstruct import read_and_repeat
from kvevict.hf.rotary import before_rope, inv_freq
from kvevict.policies.learned_kv import LearnedKV, mixed
from kvevict.policies.shares import config_hash
from kvevict.policies.training import spearman

RIDGE = 0.003  # of standardised features: enough where two of them say the same
SINK, RECENT = 4, 32  # what is always kept is not learned


@dataclass(frozen=True)
class Fit:
    """A fitted scorer, and how well it ranks the tokens of texts that it has not seen."""

    policy: LearnedKV
    correlation: dict[str, list[float]]  # "learned", "keydiff": Spearman's with the target, per layer, mean over heads


class _Sums:
    """What a ridge regression needs of the rows [N, F] and targets [N] that it has seen, for every head: [H, ...]."""

    def __init__(self) -> None:
        self.square: Any = 0.0  # Σ xxᵀ, x with a 1 behind: [H, F + 1, F + 1]
        self.product: Any = 0.0  # Σ xy: [H, F + 1]

    def add(self, features: Tensor, target: Tensor) -> None:
        rows = F.pad(features, (0, 1), value=1.0).double()
        self.square = self.square + rows.transpose(1, 2) @ rows
        self.product = self.product + (rows * target.double()[..., None]).sum(1)

    def weights(self) -> Tensor:
        """[H, F + 1] float32, the constant last."""
        count = self.square[:, -1:, -1:]
        mean, mean_target = self.square[:, :-1, -1:] / count, self.product[:, -1:] / count[..., 0]
        covariance = self.square[:, :-1, :-1] / count - mean @ mean.transpose(1, 2)
        with_target = self.product[:, :-1] / count[..., 0] - mean[..., 0] * mean_target
        deviation = covariance.diagonal(dim1=1, dim2=2).clamp(min=1e-10).sqrt()
        scaled = covariance / deviation[:, :, None] / deviation[:, None]
        scaled = scaled + RIDGE * torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
        slope = torch.linalg.solve(scaled, with_target / deviation) / deviation
        constant = mean_target - (mean[..., 0] * slope).sum(-1, keepdim=True)
        return torch.cat([slope, constant], -1).float()


def features(keys: Tensor, values: Tensor, frequencies: Tensor) -> Tensor:
    """[H, S, D + Dv + 3] float32 of the cached [1, H, S, D] and [1, H, S, Dv]: those of `kvevict.ops.kv_scores`."""
    keys, values = before_rope(keys[0].float(), frequencies), values[0].float()
    mean = F.normalize(keys, dim=-1).mean(1, keepdim=True)
    cosine = F.cosine_similarity(keys, mean, dim=-1)
    norms = (x.norm(dim=-1).clamp(min=1e-12).log() for x in (keys, values))
    return torch.cat([keys, values, torch.stack([*norms, cosine], -1)], -1)


@torch.no_grad()
def fit(
    model: Any,
    texts: Sequence[Tensor],
    prompt_ids: Tensor,
    *,
    held_out: int = 1,
    metadata: dict[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    """Fit a scorer to a transformers causal language model, where it is.

    Args:
        texts: token ids [T], each of more than 36; 2,000 tokens in all suffice, 640 a text.
        prompt_ids: [P], as in `kvevict.hf.reconstruct.repeat_scores`.
        held_out: so many texts, the last ones, are for the correlation.
        metadata: kept with the scorer, beside the config's hash.
        progress: called with (texts read, texts).

    Raises:
        ValueError: too few texts, or too short ones; a model whose RoPE or attention is not served.
    """
    if not 1 <= held_out < len(texts):
        raise ValueError(f"texts has {len(texts)} texts and held_out is {held_out}: expected some for each side")
    short = [i for i, text in enumerate(texts) if len(text) <= SINK + RECENT]
    if short:
        raise ValueError(f"texts[{short[0]}] has {len(texts[short[0]])} tokens: expected more than {SINK + RECENT}")
    frequencies = inv_freq(model)
    sums: dict[int, _Sums] = {}
    for i, text in enumerate(texts[:-held_out]):
        for layer, (x, y) in _rows(model, text, prompt_ids, frequencies).items():
            sums.setdefault(layer, _Sums()).add(x[:, SINK:-RECENT], y[:, SINK:-RECENT])
        progress(i + 1, len(texts))
    of_layer = {layer: those.weights() for layer, those in sums.items()}
    some = next(iter(of_layer.values()))
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    weights = torch.stack([of_layer.get(layer, torch.zeros_like(some)) for layer in range(layers)]).cpu()

    found: dict[str, list[list[float]]] = {"learned": [], "keydiff": []}
    for i, text in enumerate(texts[-held_out:]):
        for layer, (x, y) in _rows(model, text, prompt_ids, frequencies).items():
            predicted = torch.einsum("hsf,hf->hs", F.pad(x, (0, 1), value=1.0), of_layer[layer])
            scores = {"learned": mixed(predicted[None], -x[None, ..., -1])[0], "keydiff": -x[..., -1]}
            for name, of_heads in scores.items():
                pairs = zip(of_heads[:, SINK:-RECENT], y[:, SINK:-RECENT], strict=True)
                found[name].append([spearman(a, b) for a, b in pairs])
        progress(len(texts) - held_out + i + 1, len(texts))
    each = len(of_layer)
    correlation = {
        name: [float(torch.tensor(values[layer::each]).mean()) for layer in range(each)]
        for name, values in found.items()
    }
    mean = sum(correlation["learned"]) / each
    told = {**(metadata or {}), "config": config_hash(model.config), "features": "kv", "correlation": f"{mean:.3f}"}
    return Fit(LearnedKV(weights=weights, inv_freq=frequencies.cpu(), metadata=told), correlation)


def _rows(model: Any, text: Tensor, prompt_ids: Tensor, frequencies: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer: features [H, T, F] and targets [H, T] of a text's tokens."""
    cache, scores = read_and_repeat(model, text[None].to(model.device), prompt_ids.to(model.device))
    found = {}
    for layer, drawn in scores.items():
        held: Any = cache.layers[layer]
        found[layer] = features(held.keys, held.values, frequencies), (drawn[0] + 1e-6).log()
    return found
