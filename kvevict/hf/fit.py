"""Fit a scorer to a model: regression, per layer and head, of the logarithm of KVzip's score.

The model reads each text, then repeats it (`kvevict.hf.reconstruct`): a token's target is ln(s + 1e-6), s the most
attention that it draws in that. Its features are what the cache holds of it ("kv", LearnedKV), or the hidden state that
entered the layer's attention ("h" and "mlp", Learned). The linear ones are closed-form ridge regressions: sums over
tokens are all that is kept of a text. From the same scores the shares of layers and heads are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvevict import ops, validate
from kvevict.hf import hidden
from kvevict.hf.reconstruct import read_and_repeat
from kvevict.hf.rotary import before_rope, inv_freq
from kvevict.policies import KeyDiff, Learned, LearnedKV, Scorer, Shares, kept_shares
from kvevict.policies.learned_kv import mixed
from kvevict.policies.shares import config_hash
from kvevict.policies.training import Ridge, network, spearman

RIDGE = {"kv": 0.003, "h": 0.1}  # of standardised features: enough where several say the same
FEATURES = ("kv", "h", "mlp")
KEEPS = (0.1, 0.25, 0.5)  # at which shares are measured, where a text is long enough
SINK, RECENT = KeyDiff().protected  # what is always kept is not learned


@dataclass(frozen=True)
class Fit:
    """A fitted scorer, and how well it ranks the tokens of texts that it has not seen."""

    policy: Scorer
    correlation: dict[str, list[float]]  # "learned", "keydiff": Spearman's with the target, per layer, mean over heads


class _Rows(NamedTuple):
    """A text's tokens in one layer, but those that are always kept."""

    features: Tensor  # [H, T, F], or [1, T, M] of hidden states
    target: Tensor  # [H, T]
    keydiff: Tensor  # [H, T]


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
    features: str = "kv",
    held_out: int = 1,
    epochs: int = 12,
    metadata: dict[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    """Fit a scorer to a transformers causal language model, where it is.

    Args:
        model: with attention that can be "kvevict"; for "kv" with RoPE that `kvevict.hf.rotary.inv_freq` knows.
        texts: ids [T] int64 each, of about the length of use; features do not depend on it much.
        prompt_ids: [P], as in `kvevict.hf.reconstruct.repeat_scores`.
        features: "kv": LearnedKV; "h": Learned, linear in the hidden states; "mlp": Learned, a network, whose training
            holds the hidden states of all texts.
        held_out: so many texts, the last ones, are for the correlation, and tell a network when to stop.
        epochs: of a network, at most.
        metadata: kept with the scorer, beside the config's hash.
        progress: called with (texts read, texts).

    Raises:
        ValueError: too few texts, or too short ones; a model whose RoPE or attention is not served.
    """
    validate.one_of("features", features, FEATURES)
    if not 1 <= held_out < len(texts):
        raise ValueError(f"texts has {len(texts)} texts and held_out is {held_out}: expected some for each side")
    short = [i for i, text in enumerate(texts) if len(text) <= SINK + RECENT]
    if short:
        raise ValueError(f"texts[{short[0]}] has {len(texts[short[0]])} tokens: expected more than {SINK + RECENT}")
    frequencies = inv_freq(model) if features == "kv" else None
    keeps = [keep for keep in KEEPS if keep * min(map(len, texts)) > SINK + RECENT]

    sums: dict[int, Ridge] = {}
    kept_rows: list[dict[int, _Rows]] = []  # of a network's texts
    held_rows: list[dict[int, _Rows]] = []
    table: Any = 0.0
    trained = len(texts) - held_out
    for i, text in enumerate(texts):
        rows, scores = _read(model, text, prompt_ids, frequencies)
        if i < trained and keeps:
            table = table + kept_shares(scores, keeps, sink=SINK, recent=RECENT)
        if i >= trained:
            held_rows.append(rows)
        elif features == "mlp":
            kept_rows.append(rows)
        else:
            for layer, those in rows.items():
                sums.setdefault(layer, Ridge()).add(those.features, those.target)
        progress(i + 1, len(texts))
    if features == "mlp":
        weights = _networks(model, kept_rows, held_rows, epochs)
    else:
        linear = _whole(model, {layer: (those.weights(RIDGE[features]),) for layer, those in sums.items()})[0]
        weights = (linear,) if features == "kv" else (linear[..., :-1].contiguous(), linear[..., -1].contiguous())

    told = {**(metadata or {}), "config": config_hash(model.config), "features": features}
    policy: Scorer
    if frequencies is not None:
        policy = LearnedKV(weights=weights[0], inv_freq=frequencies.cpu(), metadata=told)
    else:
        policy = Learned(weights=weights, metadata=told)
    correlation = _correlations(policy, held_rows)
    means = {name: sum(values) / len(values) for name, values in correlation.items()}
    told["correlation"] = f"{means['learned']:.3f}"
    shares = Shares(tuple(keeps), table / trained, told) if keeps else None
    return Fit(replace(policy, metadata=told, shares=shares), correlation)


def _read(
    model: Any, text: Tensor, prompt_ids: Tensor, frequencies: Tensor | None
) -> tuple[dict[int, _Rows], list[Tensor]]:
    """A text's rows, by layer, and KVzip's scores [1, H, T] of each layer with full attention. Without RoPE's
    frequencies the features are hidden states."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    entering: dict[int, list[Tensor]] = {layer: [] for layer in range(count if frequencies is None else 0)}

    def note(layer: int, states: Tensor, _: Any) -> None:  # of the text, not of its repetition
        if sum(part.shape[1] for part in entering[layer]) < len(text):
            entering[layer].append(states)

    with hidden.noting(model, entering, note):
        cache, scores = read_and_repeat(model, text[None].to(model.device), prompt_ids.to(model.device))
    found, inner = {}, slice(SINK, -RECENT)
    for layer, drawn in scores.items():
        held: Any = cache.layers[layer]
        if frequencies is None:
            x, keydiff = torch.cat(entering[layer], 1).float(), ops.keydiff_scores(held.keys)[0]
        else:
            x = features(held.keys, held.values, frequencies)
            keydiff = -x[..., -1]
        found[layer] = _Rows(x[:, inner], (drawn[0, :, inner] + 1e-6).log(), keydiff[:, inner])
    return found, list(scores.values())


def _networks(
    model: Any, texts: list[dict[int, _Rows]], held_out: list[dict[int, _Rows]], epochs: int
) -> tuple[Tensor, ...]:
    def joined(those: list[dict[int, _Rows]], layer: int) -> tuple[Tensor, Tensor]:
        return torch.cat([x[layer].features[0] for x in those]), torch.cat([x[layer].target for x in those], 1)

    return _whole(
        model, {layer: network(*joined(texts, layer), *joined(held_out, layer), epochs) for layer in texts[0]}
    )


def _whole(model: Any, of_layer: dict[int, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Each layer's tensors, stacked over all layers of the model, 0 for those that do not grow; on the CPU."""
    some = next(iter(of_layer.values()))
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    return tuple(
        torch.stack([of_layer[layer][i] if layer in of_layer else torch.zeros_like(x) for layer in range(count)]).cpu()
        for i, x in enumerate(some)
    )


def _correlations(policy: Scorer, texts: list[dict[int, _Rows]]) -> dict[str, list[float]]:
    """Mean over heads and texts, per layer."""
    found: dict[str, list[float]] = {"learned": [], "keydiff": []}
    for layer in texts[0]:
        of_layer: dict[str, list[float]] = {name: [] for name in found}
        for rows in (text[layer] for text in texts):
            scores = {"learned": predicted(policy, rows.features, rows.keydiff, layer), "keydiff": rows.keydiff}
            for name, of_heads in scores.items():
                of_layer[name] += [spearman(a, b) for a, b in zip(of_heads, rows.target, strict=True)]
        for name, values in of_layer.items():
            found[name].append(sum(values) / len(values))
    return found


def predicted(policy: Scorer, rows: Tensor, keydiff: Tensor, layer: int) -> Tensor:
    """[H, T]: what the policy says of a layer's rows."""
    if isinstance(policy, LearnedKV):
        weights = policy.weights[layer].to(rows.device)
        return mixed((rows @ weights[:, :-1, None])[None, ..., 0] + weights[None, :, -1:], keydiff[None])[0]
    assert isinstance(policy, Learned)
    return policy.of_hidden(rows, layer)[0].contiguous()
