"""Train the learned scorer: from a token's hidden state to the attention that later queries will give it.

Of every text the model reads `tokens` tokens and a future window behind them. The target of a token is the mass that
the window's queries give it, `attention_mass` averaged over the layer's KV heads, as its rank among the text's tokens
in [0, 1]: selection depends on order alone, and masses of different texts have different scales. One network per layer
learns it with binary cross-entropy; whole texts are held out, and the epoch that ranks them best is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvevict import models, ops
from kvevict.policies.learned import Learned, Weights


@dataclass(frozen=True)
class Sample:
    """One text in one layer."""

    hidden: Tensor  # [T, M]
    mass: Tensor  # [T] float32, from the future window


@dataclass(frozen=True)
class Fitted:
    """A trained scorer and how well it ranks tokens of texts that it never saw."""

    policy: Learned
    losses: list[list[tuple[float, float]]]  # per layer and epoch: (training, held-out) loss
    spearman: dict[str, list[float]] = field(default_factory=dict)  # "learned", "recency", "random": per layer


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; ties take their mean rank."""
    ranks = [ops.combine_scores([(1.0, x.float()[None, None])])[0, 0].double() for x in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    return float(centred[0] @ centred[1] / (centred[0].norm() * centred[1].norm()).clamp(min=1e-12))


@torch.no_grad()
def collect(model: Any, ids: Tensor, future: int, layers: int) -> list[Sample]:
    """A text's ids [1, T + future] -> its Sample in each of the first `layers` layers."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    with models.capture(model) as captured:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    samples = []
    for layer in range(layers):
        queries, hidden = captured.of(layer)
        mass = ops.attention_mass(queries[:, :, -future:], cache.layers[layer].keys)
        samples.append(Sample(hidden[0, :-future].float(), mass[0, :, :-future].mean(0)))
    return samples


def _target(sample: Sample) -> Tensor:
    return ops.combine_scores([(1.0, sample.mass[None, None])])[0, 0]


def _train_layer(
    train: list[Sample], held_out: list[Sample], epochs: int, patience: int, seed: int, advance: Callable[[], None]
) -> tuple[Weights, list[tuple[float, float]]]:
    device, width = train[0].hidden.device, train[0].hidden.shape[1]
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1)).to(device)
    torch.set_rng_state(torch_state)
    shuffle = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    inputs, targets = torch.cat([s.hidden for s in train]), torch.cat([_target(s) for s in train])
    held_inputs, held_targets = torch.cat([s.hidden for s in held_out]), torch.cat([_target(s) for s in held_out])
    loss_of = nn.functional.binary_cross_entropy_with_logits

    best, best_state, losses, since = float("inf"), None, [], 0
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(inputs), generator=shuffle).to(device).split(256):
            loss = loss_of(network(inputs[rows])[:, 0], targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        with torch.no_grad():
            held = loss_of(network(held_inputs)[:, 0], held_targets).item()
        losses.append((total / len(inputs), held))
        advance()
        since += 1
        if held < best:
            best, since = held, 0
            best_state = {name: value.clone() for name, value in network.state_dict().items()}
        if since >= patience:
            break
    assert best_state is not None
    weights = tuple(best_state[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    return weights, losses  # type: ignore[return-value]


def fit(
    model: Any,
    texts: Sequence[str | Tensor],
    *,
    tokenizer: Any = None,
    tokens: int = 1024,
    future: int = 128,
    held_out: int | None = None,
    layers: int | None = None,
    epochs: int = 12,
    patience: int = 2,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Fitted:
    """Train a Learned scorer for a transformers causal language model.

    Args:
        model: on the device where it is to run.
        texts: strings (with `tokenizer`) or token ids [T]; those shorter than tokens + future are an error.
        tokenizer: the model's.
        tokens, future: length of a sample, and of the window behind it whose queries give the target.
        held_out: how many texts, the last ones, are for early stopping and the figures; default: a quarter, at least 1.
        layers: train the first so many layers; default: all.
        epochs, patience: at most so many passes; stop after so many without a better held-out loss.
        seed: of the initial weights and the order of the samples.
        progress: called with (stage, done, total).

    Raises:
        ValueError: fewer than two texts, a text too short, strings without a tokenizer.
    """
    held_out = max(len(texts) // 4, 1) if held_out is None else held_out
    if not 1 <= held_out < len(texts):
        raise ValueError(
            f"texts has {len(texts)} texts and held_out is {held_out}: expected at least one for each side"
        )
    encoded = []
    for i, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("tokenizer is None: expected the model's, because texts are strings")
            text = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(text) < tokens + future:
            raise ValueError(f"texts[{i}] has {len(text)} tokens: expected at least {tokens} + {future}")
        encoded.append(text[None, : tokens + future].to(model.device))
    count = model.config.num_hidden_layers if layers is None else layers
    if not 1 <= count <= model.config.num_hidden_layers:
        raise ValueError(f"layers is {layers}: expected 1 to {model.config.num_hidden_layers}")

    samples = []
    for i, ids in enumerate(encoded):
        samples.append(collect(model, ids, future, count))
        progress("reading", i + 1, len(encoded))

    weights, losses = [], []
    for layer in range(count):
        of_layer = [sample[layer] for sample in samples]
        done = layer * epochs

        def advance() -> None:
            nonlocal done
            done += 1
            progress("training", done, count * epochs)

        trained, curve = _train_layer(of_layer[:-held_out], of_layer[-held_out:], epochs, patience, seed, advance)
        weights.append(trained)
        losses.append(curve)
    progress("training", count * epochs, count * epochs)

    policy = Learned(layers=tuple(weights))
    return Fitted(policy, losses, _rank_correlations(policy, [s[:count] for s in samples[-held_out:]], seed))


def _rank_correlations(policy: Learned, held_out: list[list[Sample]], seed: int) -> dict[str, list[float]]:
    """Spearman's correlation with the future mass, mean over held-out texts, per layer."""
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, list[float]] = {"learned": [], "recency": [], "random": []}
    for layer, weights in enumerate(policy.layers):
        found: dict[str, list[float]] = {name: [] for name in result}
        for sample in (samples[layer] for samples in held_out):
            T = len(sample.mass)
            predictions = {
                "learned": ops.mlp_scores(sample.hidden[None], *weights)[0],
                "recency": torch.arange(T, device=sample.mass.device),
                "random": torch.rand(T, generator=generator).to(sample.mass.device),
            }
            for name, predicted in predictions.items():
                found[name].append(spearman(predicted, sample.mass))
        for name, values in found.items():
            result[name].append(sum(values) / len(values))
    return result
